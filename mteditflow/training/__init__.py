"""What a long run needs around its loop: rows, updates, checkpoints, log, pictures.

Each part stands alone; none knows the trainer. Needs the extra ``mteditflow[train]``.
"""

try:
    import accelerate  # noqa: F401
    import matplotlib  # noqa: F401
    import peft  # noqa: F401
    import tqdm  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"mteditflow.training needs {error.name}: pip install 'mteditflow[train]'"
    ) from error

from mteditflow.training.checkpoint import Checkpoint, Checkpoints
from mteditflow.training.gathering import gather_scores
from mteditflow.training.optimizer_state import load_optimizer_state, optimizer_state
from mteditflow.training.parallel import shard_model, sum_gradients
from mteditflow.training.progress import Bar
from mteditflow.training.round_rewards import Aggregation, RoundRewards
from mteditflow.training.run_log import RunLog
from mteditflow.training.stopwatch import Stopwatch
from mteditflow.training.termination import Termination
from mteditflow.training.updater import Update, Updater, most_parts
from mteditflow.training.watch import RewardCollapseError, RewardWatch

__all__ = [
    "Aggregation",
    "Bar",
    "Checkpoint",
    "Checkpoints",
    "RewardCollapseError",
    "RewardWatch",
    "RoundRewards",
    "RunLog",
    "Stopwatch",
    "Termination",
    "Update",
    "Updater",
    "gather_scores",
    "load_optimizer_state",
    "most_parts",
    "optimizer_state",
    "shard_model",
    "sum_gradients",
]
