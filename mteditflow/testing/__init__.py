"""Laws and hypothesis strategies for property tests of flow-RL mathematics.

Each law takes your function and searches for the smallest case that breaks it; the message has the
case and why the law matters. Three entry points: ``check_group_advantage(fn)`` and the other check
functions, the pytest plugin ``mteditflow.testing.plugin``, and the command
``mteditflow check advantage mypackage.module:fn``. Needs ``mteditflow[testing]``.
"""

from typing import TYPE_CHECKING

from mteditflow._lazy import lazy

if TYPE_CHECKING:
    from mteditflow.testing.advantage import GroupAdvantage, check_group_advantage
    from mteditflow.testing.densities import Density, LogProb, check_kl, check_log_prob
    from mteditflow.testing.endpoint import FAULTS, ScriptedServer
    from mteditflow.testing.fusion import Fusion, check_fusion
    from mteditflow.testing.gaussian import GaussianFlow, GaussianPolicy
    from mteditflow.testing.kinds import KINDS, laws_of
    from mteditflow.testing.law import About, Law, LawBroken, Laws, Result
    from mteditflow.testing.losses import Loss, check_loss
    from mteditflow.testing.models import (
        Average,
        check_adapter,
        check_average,
        check_replay,
        check_saved,
    )
    from mteditflow.testing.policy_losses import (
        NFTLoss,
        PolicyLoss,
        check_nft_loss,
        check_policy_loss,
    )
    from mteditflow.testing.reward_client import check_reward_client
    from mteditflow.testing.selection import Selection, check_selection
    from mteditflow.testing.signatures import SIGNATURES, Signature
    from mteditflow.testing.solvers import SolverStep, check_solver
    from mteditflow.testing.strategies import (
        RewardBatch,
        TurnBatch,
        group_ids,
        named_rewards,
        reward_batches,
        sigma_grids,
        tensors,
        turn_batches,
    )
    from mteditflow.testing.turns import (
        Aggregator,
        TurnCreditFunction,
        check_aggregator,
        check_credit,
    )
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "FAULTS": ".endpoint",
            "KINDS": ".kinds",
            "SIGNATURES": ".signatures",
            "About": ".law",
            "Aggregator": ".turns",
            "Average": ".models",
            "Density": ".densities",
            "ScriptedServer": ".endpoint",
            "Fusion": ".fusion",
            "GaussianFlow": ".gaussian",
            "GaussianPolicy": ".gaussian",
            "GroupAdvantage": ".advantage",
            "Law": ".law",
            "LawBroken": ".law",
            "Laws": ".law",
            "LogProb": ".densities",
            "Loss": ".losses",
            "NFTLoss": ".policy_losses",
            "PolicyLoss": ".policy_losses",
            "Result": ".law",
            "RewardBatch": ".strategies",
            "Selection": ".selection",
            "Signature": ".signatures",
            "SolverStep": ".solvers",
            "TurnBatch": ".strategies",
            "TurnCreditFunction": ".turns",
            "check_adapter": ".models",
            "check_aggregator": ".turns",
            "check_average": ".models",
            "check_credit": ".turns",
            "check_fusion": ".fusion",
            "check_group_advantage": ".advantage",
            "check_kl": ".densities",
            "check_log_prob": ".densities",
            "check_loss": ".losses",
            "check_nft_loss": ".policy_losses",
            "check_policy_loss": ".policy_losses",
            "check_replay": ".models",
            "check_reward_client": ".reward_client",
            "check_saved": ".models",
            "check_selection": ".selection",
            "check_solver": ".solvers",
            "group_ids": ".strategies",
            "laws_of": ".kinds",
            "named_rewards": ".strategies",
            "reward_batches": ".strategies",
            "sigma_grids": ".strategies",
            "tensors": ".strategies",
            "turn_batches": ".strategies",
        },
        extra="testing",
    )

__all__ = [
    "FAULTS",
    "KINDS",
    "SIGNATURES",
    "About",
    "Aggregator",
    "Average",
    "Density",
    "Fusion",
    "GaussianFlow",
    "GaussianPolicy",
    "GroupAdvantage",
    "Law",
    "LawBroken",
    "Laws",
    "LogProb",
    "Loss",
    "NFTLoss",
    "PolicyLoss",
    "Result",
    "RewardBatch",
    "ScriptedServer",
    "Selection",
    "Signature",
    "SolverStep",
    "TurnBatch",
    "TurnCreditFunction",
    "check_adapter",
    "check_aggregator",
    "check_average",
    "check_credit",
    "check_fusion",
    "check_group_advantage",
    "check_kl",
    "check_log_prob",
    "check_loss",
    "check_nft_loss",
    "check_policy_loss",
    "check_replay",
    "check_reward_client",
    "check_saved",
    "check_selection",
    "check_solver",
    "group_ids",
    "laws_of",
    "named_rewards",
    "reward_batches",
    "sigma_grids",
    "tensors",
    "turn_batches",
]
