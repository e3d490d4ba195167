"""Rewards of edited chains: instruction following by a judge, content consistency by a detector.

``judge`` and ``consistency`` score, each over HTTP by ``transport``; ``server`` serves consistency.
``consistency.models`` (GroundingDINO, DINOv3) and ``server`` are imported by their own names, since
transformers and FastAPI take their time. Needs the extra ``mteditflow[rewards]``.
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

from mteditflow.rewards.consistency.client import ConsistencyClient
from mteditflow.rewards.consistency.pairs import ConsistencyScores, Pair, PairScores, pairs_of
from mteditflow.rewards.consistency.protocols import Detector, FeatureExtractor
from mteditflow.rewards.consistency.scorer import Consistency, ConsistencyScorer
from mteditflow.rewards.consistency.similarity import Features
from mteditflow.rewards.faults import AnswerError, Fault, Lost
from mteditflow.rewards.judge.expectation import ExpectationPrompt
from mteditflow.rewards.judge.judge import Judge
from mteditflow.rewards.judge.preflight import EndpointReport, inspect_endpoints
from mteditflow.rewards.judge.prompts import JudgePrompt
from mteditflow.rewards.scores import InvalidRewardsError, Reward, TurnScores
from mteditflow.rewards.transport.background import Background
from mteditflow.rewards.transport.cache import AnswerCache
from mteditflow.rewards.transport.chat import ChatAnswer, ChatClient
from mteditflow.rewards.transport.dispatch import Dispatcher, Statistics

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
