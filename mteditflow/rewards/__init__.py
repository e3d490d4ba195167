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

from mteditflow.rewards.background import Background
from mteditflow.rewards.cache import AnswerCache
from mteditflow.rewards.chat import ChatAnswer, ChatClient
from mteditflow.rewards.consistency import Consistency, ConsistencyScorer
from mteditflow.rewards.consistency_client import ConsistencyClient
from mteditflow.rewards.dispatch import Dispatcher, Statistics
from mteditflow.rewards.expectation import ExpectationPrompt
from mteditflow.rewards.faults import AnswerError, Fault, Lost
from mteditflow.rewards.judge import Judge
from mteditflow.rewards.pairs import ConsistencyScores, Pair, PairScores, pairs_of
from mteditflow.rewards.preflight import EndpointReport, inspect_endpoints
from mteditflow.rewards.prompts import JudgePrompt
from mteditflow.rewards.protocols import Detector, FeatureExtractor
from mteditflow.rewards.scores import InvalidRewardsError, Reward, TurnScores
from mteditflow.rewards.similarity import Features

__all__ = [
    "AnswerCache",
    "AnswerError",
    "Background",
    "ChatAnswer",
    "ChatClient",
    "Consistency",
    "ConsistencyClient",
    "ConsistencyScorer",
    "ConsistencyScores",
    "Detector",
    "Dispatcher",
    "EndpointReport",
    "ExpectationPrompt",
    "Fault",
    "FeatureExtractor",
    "Features",
    "InvalidRewardsError",
    "Judge",
    "JudgePrompt",
    "Lost",
    "Pair",
    "PairScores",
    "Reward",
    "Statistics",
    "TurnScores",
    "inspect_endpoints",
    "pairs_of",
]
