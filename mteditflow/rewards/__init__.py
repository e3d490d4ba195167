"""Rewards of edited chains: instruction following by a judge, content consistency by a detector.

Needs the extra ``mteditflow[rewards]``.
"""

try:
    import httpx2  # noqa: F401
    import openai  # noqa: F401
    import PIL  # noqa: F401
    import pydantic  # noqa: F401
    import tenacity  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"mteditflow.rewards needs {error.name}: pip install 'mteditflow[rewards]'"
    ) from error

from mteditflow.rewards.faults import AnswerError, Fault, Lost
from mteditflow.rewards.scores import InvalidRewardsError, Reward, TurnScores

__all__ = [
    "AnswerError",
    "Fault",
    "InvalidRewardsError",
    "Lost",
    "Reward",
    "TurnScores",
]
