"""EdiVal-Bench's metrics per turn, each with the number of images that it is a mean over.

``B`` chains, one for each image; ``N`` turns.

| metric | images that count at turn t |
|---|---|
| IF(t) | those that have the score of every turn 1..t |
| Marginal(t) | those that have the score of turn t |
| object and background term of CC(t) | those that have that term at turn t |
| CC(t), per-sample | those that have a term at turn t |

An image is left out of turn t where its chain is shorter, its reference or an edited image cannot
be read, or a score was lost; nothing counts as a failure because of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mteditflow._checks import check_count, check_mask
from mteditflow.metrics import (
    Interval,
    bootstrap_interval,
    content_consistency,
    instruction_following,
    marginal_success,
    overall,
)
from mteditflow.rewards import ConsistencyScores, TurnScores

METRICS = (
    "instruction_following",
    "marginal",
    "consistency_corpus",
    "consistency_per_sample",
    "overall",
)


@dataclass(frozen=True, eq=False)
class EdiValReport:
    """The metrics with their denominators.

    Attributes:
        images: how many there are, with those that could not be read.
        metrics: name to percent per turn, [N], with 95% bootstrap intervals over images; "overall"
            is of IF and the corpus average of CC.
        counted: what a mean is over, in images per turn, [N].
        left_out: why images are left out of IF, in images per turn, [N]: "unreadable", "shorter",
            "lost".
    """

    images: int
    metrics: Mapping[str, Interval]
    counted: Mapping[str, list[int]]
    left_out: Mapping[str, list[int]]


def report_edival(
    success: TurnScores, consistency: ConsistencyScores, *, unreadable: int = 0
) -> EdiValReport:
    """Compute IF, Marginal, CC and Overall at every turn.

    Args:
        success: 0 or 1 per turn, [B, N], such as of ``EdiValJudge`` or of a ``Judge`` that answers
            yes or no.
        consistency: of the same chains, paired with the reference image.
        unreadable: images of the benchmark that are in neither, since a file was not there.

    Raises:
        ValueError: the turns differ, or a success is neither 0 nor 1.

    Source: EdiVal-Bench (arXiv 2509.13399), as used by MT-EditFlow (arXiv 2606.01985).

    Example:
        >>> turns = torch.ones(2, 1) > 0
        >>> success = TurnScores(torch.tensor([[1.0], [0.0]]), turns, {})
        >>> object_term, background = torch.tensor([[[0.8], [0.6]], [[1.0], [torch.nan]]])
        >>> both = object_term, background, object_term, background
        >>> report = report_edival(success, ConsistencyScores(*both, turns, {}))
        >>> {name: round(float(x.estimate), 1) for name, x in report.metrics.items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'instruction_following': 50.0, 'marginal': 50.0, 'consistency_corpus': 85.0,
         'consistency_per_sample': 75.0, 'overall': 65.2}
        >>> report.counted["background"]
        [1]
    """
    check_count("unreadable", unreadable, low=0)
    turns = success.turn_mask
    check_mask("consistency.turn_mask", consistency.turn_mask, turns.shape, "of success")
    if not torch.equal(consistency.turn_mask, turns):
        raise ValueError("consistency: expected the turns of success, got others")
    terms = consistency.object, consistency.background
    samples = success.score, *terms, consistency.scores.score
    interval = bootstrap_interval(_metrics, *samples, generator=torch.Generator().manual_seed(0))
    whole = success.measured.long().cumprod(dim=1).bool()
    counted = {
        "instruction_following": whole,
        "marginal": success.measured,
        "object": terms[0].isfinite(),
        "background": terms[1].isfinite(),
        "consistency_per_sample": consistency.scores.measured,
    }
    left_out = {"shorter": ~turns, "lost": turns & ~whole}
    return EdiValReport(
        images=len(success) + unreadable,
        metrics={name: Interval(*(x[i] for x in interval)) for i, name in enumerate(METRICS)},
        counted={name: _count(mask) for name, mask in counted.items()},
        left_out={"unreadable": [unreadable] * turns.shape[1]}
        | {name: _count(mask) for name, mask in left_out.items()},
    )


def _metrics(success: Tensor, objects: Tensor, background: Tensor, samples: Tensor) -> Tensor:
    """Percent, [metrics, N]; NaN in a sample is a score that is not there."""
    score, valid = success.nan_to_num(), success.isfinite()
    following = instruction_following(score, valid=valid)
    corpus = content_consistency(objects, background)
    shares = [
        following,
        marginal_success(score, valid=valid),
        corpus,
        content_consistency(samples),
        overall(following, corpus),
    ]
    return 100 * torch.stack([share.double() for share in shares])


def _count(mask: Tensor) -> list[int]:
    return [int(count) for count in mask.sum(dim=0)]
