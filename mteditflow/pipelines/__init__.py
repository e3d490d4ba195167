"""Any diffusers flow pipeline, unpatched: SDE steps, recorded rollouts, policies on one model.

Needs the extra ``mteditflow[diffusers]``.
"""

try:
    import diffusers  # noqa: F401
    import peft  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"mteditflow.pipelines needs {error.name}: pip install 'mteditflow[diffusers]'"
    ) from error

from mteditflow.pipelines.chain_calls import Seen
from mteditflow.pipelines.comfyui import comfyui_lora
from mteditflow.pipelines.editor import Editor, Part
from mteditflow.pipelines.families import FAMILIES, Family, describe
from mteditflow.pipelines.loop import Step
from mteditflow.pipelines.lora_files import read_lora
from mteditflow.pipelines.policies import LoraPolicies
from mteditflow.pipelines.prompts import Instruction, Prompts
from mteditflow.pipelines.recognize import ReplayError
from mteditflow.pipelines.recorder import Recorder
from mteditflow.pipelines.references import aspect_buckets, fit_to_bucket
from mteditflow.pipelines.rollout import Rollout, RolloutVelocity
from mteditflow.pipelines.scheduler import FlowMatchSDEScheduler
from mteditflow.pipelines.shared_casts import shared_casts
from mteditflow.pipelines.siblings import load_sibling
from mteditflow.pipelines.start import Start

__all__ = [
    "FAMILIES",
    "Editor",
    "Family",
    "FlowMatchSDEScheduler",
    "Instruction",
    "LoraPolicies",
    "Part",
    "Prompts",
    "Recorder",
    "ReplayError",
    "Rollout",
    "RolloutVelocity",
    "Seen",
    "Start",
    "Step",
    "aspect_buckets",
    "comfyui_lora",
    "describe",
    "fit_to_bucket",
    "load_sibling",
    "read_lora",
    "shared_casts",
]
