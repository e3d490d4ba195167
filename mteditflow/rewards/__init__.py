"""Rewards of edited chains: instruction following by a judge, content consistency by a detector.

``judge`` and ``consistency`` compute scores; both can use remote models over HTTP by ``transport``.
``server`` serves consistency. Names are imported on first use: scores and faults need only torch,
everything else the extra ``mteditflow[rewards]``.
"""

from typing import TYPE_CHECKING

from mteditflow._lazy import lazy

if TYPE_CHECKING:
    from mteditflow.rewards.consistency.client import ConsistencyClient
    from mteditflow.rewards.consistency.models import DinoV3, GroundingDino
    from mteditflow.rewards.consistency.pairs import ConsistencyScores, Pair, PairScores, pairs_of
    from mteditflow.rewards.consistency.scorer import (
        Consistency,
        ConsistencyScorer,
        Detector,
        FeatureExtractor,
        ScoredDetector,
    )
    from mteditflow.rewards.consistency.similarity import Features
    from mteditflow.rewards.faults import AnswerError, Fault, Lost
    from mteditflow.rewards.images import pixel_change
    from mteditflow.rewards.judge.judge import Judge
    from mteditflow.rewards.judge.preflight import (
        EndpointReport,
        inspect_endpoints,
        reach_endpoints,
    )
    from mteditflow.rewards.judge.prompts import ExpectationPrompt, JudgePrompt
    from mteditflow.rewards.request_options import RequestOptions
    from mteditflow.rewards.scale import BINARY, LIKERT, SCALES, Scale
    from mteditflow.rewards.scores import InvalidRewardsError, TurnScores
    from mteditflow.rewards.transport.cache import AnswerCache
    from mteditflow.rewards.transport.chat import ChatAnswer, ChatClient, Usage
    from mteditflow.rewards.transport.concurrency import Background
    from mteditflow.rewards.transport.dispatch import Dispatcher, Statistics
    from mteditflow.rewards.transport.identity import consistency_identity, judge_identity
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "AnswerCache": ".transport.cache",
            "AnswerError": ".faults",
            "BINARY": ".scale",
            "Background": ".transport.concurrency",
            "ChatAnswer": ".transport.chat",
            "ChatClient": ".transport.chat",
            "Consistency": ".consistency.scorer",
            "ConsistencyClient": ".consistency.client",
            "ConsistencyScorer": ".consistency.scorer",
            "ConsistencyScores": ".consistency.pairs",
            "Detector": ".consistency.scorer",
            "DinoV3": ".consistency.models",
            "Dispatcher": ".transport.dispatch",
            "EndpointReport": ".judge.preflight",
            "ExpectationPrompt": ".judge.prompts",
            "Fault": ".faults",
            "FeatureExtractor": ".consistency.scorer",
            "Features": ".consistency.similarity",
            "GroundingDino": ".consistency.models",
            "InvalidRewardsError": ".scores",
            "Judge": ".judge.judge",
            "JudgePrompt": ".judge.prompts",
            "LIKERT": ".scale",
            "Lost": ".faults",
            "Pair": ".consistency.pairs",
            "PairScores": ".consistency.pairs",
            "RequestOptions": ".request_options",
            "SCALES": ".scale",
            "Scale": ".scale",
            "ScoredDetector": ".consistency.scorer",
            "Statistics": ".transport.dispatch",
            "TurnScores": ".scores",
            "Usage": ".transport.chat",
            "consistency_identity": ".transport.identity",
            "inspect_endpoints": ".judge.preflight",
            "judge_identity": ".transport.identity",
            "pairs_of": ".consistency.pairs",
            "pixel_change": ".images",
            "reach_endpoints": ".judge.preflight",
        },
        extra="rewards",
    )

__all__ = [
    "BINARY",
    "LIKERT",
    "SCALES",
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
    "DinoV3",
    "Dispatcher",
    "EndpointReport",
    "ExpectationPrompt",
    "Fault",
    "FeatureExtractor",
    "Features",
    "GroundingDino",
    "InvalidRewardsError",
    "Judge",
    "JudgePrompt",
    "Lost",
    "Pair",
    "PairScores",
    "RequestOptions",
    "Scale",
    "ScoredDetector",
    "Statistics",
    "TurnScores",
    "Usage",
    "consistency_identity",
    "inspect_endpoints",
    "judge_identity",
    "pairs_of",
    "pixel_change",
    "reach_endpoints",
]
