"""Parts of a long run around its loop: updates, checkpoints, log, report, pictures.

Each name is imported on its own, on first use. All need only torch and safetensors, except for
``RunLog`` and ``Bar`` (tqdm), ``gather_scores`` (``mteditflow[chains]``) and the report (rich).
Import ``training.pictures`` by its own name. ``mteditflow[train]`` installs everything.
"""

from typing import TYPE_CHECKING

from mteditflow._lazy import lazy

if TYPE_CHECKING:
    from mteditflow.training.checkpoint import Checkpoint, Checkpoints
    from mteditflow.training.curriculum import DepthCurriculum, scheduled_turns
    from mteditflow.training.gathering import gather_scores
    from mteditflow.training.metrics_file import read_metrics
    from mteditflow.training.optimizers import load_optimizer_state, optimizer_state
    from mteditflow.training.parallel import partition_model, shard_model, sum_gradients
    from mteditflow.training.promotion import (
        SessionCounts,
        SessionGain,
        count_sessions,
        promotes,
        promotion_at,
        session_gain,
    )
    from mteditflow.training.report import (
        print_summary,
        run_report,
        summary_text,
        write_report,
    )
    from mteditflow.training.round_rewards import Aggregation, RoundRewards
    from mteditflow.training.run_log import Bar, RunLog
    from mteditflow.training.schedules import learning_rate_share
    from mteditflow.training.stopwatch import Stopwatch
    from mteditflow.training.termination import Termination
    from mteditflow.training.updater import Update, Updater, most_parts
    from mteditflow.training.watch import RewardCollapseError, RewardWatch
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "Aggregation": ".round_rewards",
            "Bar": ".run_log",
            "Checkpoint": ".checkpoint",
            "Checkpoints": ".checkpoint",
            "DepthCurriculum": ".curriculum",
            "RewardCollapseError": ".watch",
            "RewardWatch": ".watch",
            "RoundRewards": ".round_rewards",
            "RunLog": ".run_log",
            "SessionCounts": ".promotion",
            "SessionGain": ".promotion",
            "Stopwatch": ".stopwatch",
            "Termination": ".termination",
            "Update": ".updater",
            "Updater": ".updater",
            "count_sessions": ".promotion",
            "gather_scores": ".gathering",
            "learning_rate_share": ".schedules",
            "load_optimizer_state": ".optimizers",
            "most_parts": ".updater",
            "optimizer_state": ".optimizers",
            "partition_model": ".parallel",
            "print_summary": ".report",
            "promotes": ".promotion",
            "promotion_at": ".promotion",
            "read_metrics": ".metrics_file",
            "run_report": ".report",
            "scheduled_turns": ".curriculum",
            "session_gain": ".promotion",
            "shard_model": ".parallel",
            "sum_gradients": ".parallel",
            "summary_text": ".report",
            "write_report": ".report",
        },
        "train",
    )

__all__ = [
    "Aggregation",
    "Bar",
    "Checkpoint",
    "Checkpoints",
    "DepthCurriculum",
    "RewardCollapseError",
    "RewardWatch",
    "RoundRewards",
    "RunLog",
    "SessionCounts",
    "SessionGain",
    "Stopwatch",
    "Termination",
    "Update",
    "Updater",
    "count_sessions",
    "gather_scores",
    "learning_rate_share",
    "load_optimizer_state",
    "most_parts",
    "optimizer_state",
    "partition_model",
    "print_summary",
    "promotes",
    "promotion_at",
    "read_metrics",
    "run_report",
    "scheduled_turns",
    "session_gain",
    "shard_model",
    "sum_gradients",
    "summary_text",
    "write_report",
]
