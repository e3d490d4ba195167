"""Objectives: from a rollout with advantages to loss and metrics, using only the core.

Each is a frozen dataclass whose fields are its hyperparameters. The pure losses that they are built
on can be imported from ``mteditflow``. See ``mteditflow.objectives.base`` for the training loop.
"""

from mteditflow.objectives.awm import AWM
from mteditflow.objectives.base import Card, Objective, Output, Sampling, Velocity
from mteditflow.objectives.crd import CRD
from mteditflow.objectives.dgpo import DGPO
from mteditflow.objectives.distillation import Distillation
from mteditflow.objectives.dpo import DPO
from mteditflow.objectives.dppo import DPPO
from mteditflow.objectives.flow_awr import FlowAWR
from mteditflow.objectives.forward import ForwardObjective, Renoise
from mteditflow.objectives.grouped import GroupObjective
from mteditflow.objectives.grpo import GRPO
from mteditflow.objectives.guard import Guard
from mteditflow.objectives.keys import RoundKey, keyed_generator
from mteditflow.objectives.kl_gate import gate_kl
from mteditflow.objectives.mt_opsd import MTOPSD, WornSamples
from mteditflow.objectives.nft import NFT
from mteditflow.objectives.replay import ReplayObjective
from mteditflow.objectives.samples import Buckets, CleanSamples, Samples
from mteditflow.objectives.units import Units, training_rows
from mteditflow.objectives.velocities import BucketVelocity

#: Objectives by their names in command lines and tables.
OBJECTIVES: dict[str, type[Objective]] = {
    "grpo": GRPO,
    "guard": Guard,
    "dppo": DPPO,
    "nft": NFT,
    "awm": AWM,
    "flow_awr": FlowAWR,
    "dpo": DPO,
    "dgpo": DGPO,
    "crd": CRD,
    "distillation": Distillation,
    "mt_opsd": MTOPSD,
}

__all__ = [
    "AWM",
    "CRD",
    "DGPO",
    "DPO",
    "DPPO",
    "GRPO",
    "MTOPSD",
    "NFT",
    "OBJECTIVES",
    "BucketVelocity",
    "Buckets",
    "Card",
    "CleanSamples",
    "Distillation",
    "FlowAWR",
    "ForwardObjective",
    "GroupObjective",
    "Guard",
    "Objective",
    "Output",
    "Renoise",
    "ReplayObjective",
    "RoundKey",
    "Samples",
    "Sampling",
    "Units",
    "Velocity",
    "WornSamples",
    "gate_kl",
    "keyed_generator",
    "training_rows",
]
