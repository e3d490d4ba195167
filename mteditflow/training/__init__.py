"""Parts of a long run around its loop: rows, updates, checkpoints, log, report, pictures.

Each name is imported alone, on first use. All but ``RunLog`` and ``Bar`` (tqdm), and
``round_numbers`` and ``gather_scores`` (``mteditflow[rewards]``), need torch and safetensors only.
``training.pictures`` and ``training.report`` are imported by their own names. The extra
``mteditflow[train]`` has everything.
"""

from typing import TYPE_CHECKING

from mteditflow._lazy import lazy

if TYPE_CHECKING:
    from mteditflow.training.checkpoint import Checkpoint, Checkpoints
    from mteditflow.training.gathering import gather_scores
    from mteditflow.training.optimizers import load_optimizer_state, optimizer_state
    from mteditflow.training.parallel import shard_model, sum_gradients
    from mteditflow.training.round_numbers import round_numbers
    from mteditflow.training.rows import training_rows
    from mteditflow.training.run_log import Bar, RunLog
    from mteditflow.training.seeding import keyed_generator
    from mteditflow.training.stopwatch import Stopwatch
    from mteditflow.training.termination import Termination
    from mteditflow.training.updater import Update, Updater
    from mteditflow.training.watch import RewardCollapseError, RewardWatch
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "Bar": ".run_log",
            "Checkpoint": ".checkpoint",
            "Checkpoints": ".checkpoint",
            "RewardCollapseError": ".watch",
            "RewardWatch": ".watch",
            "RunLog": ".run_log",
            "Stopwatch": ".stopwatch",
            "Termination": ".termination",
            "Update": ".updater",
            "Updater": ".updater",
            "gather_scores": ".gathering",
            "keyed_generator": ".seeding",
            "load_optimizer_state": ".optimizers",
            "optimizer_state": ".optimizers",
            "round_numbers": ".round_numbers",
            "shard_model": ".parallel",
            "sum_gradients": ".parallel",
            "training_rows": ".rows",
        },
        "train",
    )

__all__ = [
    "Bar",
    "Checkpoint",
    "Checkpoints",
    "RewardCollapseError",
    "RewardWatch",
    "RunLog",
    "Stopwatch",
    "Termination",
    "Update",
    "Updater",
    "gather_scores",
    "keyed_generator",
    "load_optimizer_state",
    "optimizer_state",
    "round_numbers",
    "shard_model",
    "sum_gradients",
    "training_rows",
]
