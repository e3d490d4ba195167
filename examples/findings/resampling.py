"""The same differences by another interval: a bootstrap over the chains of the seeds as they are.

It knows how much is due to which chains were held out, and nothing of what other seeds would give:
narrower than the interval over seeds, and not what decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mteditflow.evaluation import Evaluation
from mteditflow.metrics import overall

RESAMPLES = 2000


def chain_values(evaluation: Evaluation) -> dict[str, Tensor]:
    """What the metrics at the last turn are means of, in percent, each ``[chains]``."""
    last = {name: scores.score[:, -1].double() for name, scores in evaluation.terms.items()}
    return {
        "instruction_following": 100 * evaluation.success.all(dim=1).double(),
        "content_consistency": 100 * last["consistency"],
        "strict": 100 * last["strict"],
    }


def resampled(
    evaluations: Sequence[Sequence[Evaluation]], *, resamples: int = RESAMPLES
) -> dict[str, Tensor]:
    """Resample the chains of every seed, the same for all settings.

    Args:
        evaluations: Of K settings with S seeds; those of a seed are of the same chains.
        resamples: R.

    Returns:
        Each metric at the last turn, mean over seeds, in percent, ``[R, K]``.
    """
    totals: dict[str, Tensor] = {}
    for seed, own in enumerate(zip(*evaluations, strict=True)):
        generator, chains = torch.Generator().manual_seed(seed), len(own[0])
        draws = torch.randint(chains, (resamples, chains), generator=generator)
        ones = torch.ones_like(draws, dtype=torch.float64)
        weights = torch.zeros_like(ones).scatter_add(1, draws, ones / chains)
        values = [chain_values(evaluation) for evaluation in own]
        means = {name: weights @ torch.stack([v[name] for v in values], 1) for name in values[0]}
        means["overall"] = overall(means["instruction_following"], means["content_consistency"])
        for name, mean in means.items():
            totals[name] = totals.get(name, 0) + mean / len(evaluations[0])
    return totals


def ends(differences: Tensor) -> tuple[float, float]:
    """Of the 95% percentile interval of resampled differences ``[R]``."""
    low, high = differences.quantile(torch.tensor([0.025, 0.975], dtype=differences.dtype)).tolist()
    return low, high
