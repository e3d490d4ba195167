"""Averages of a single-turn benchmark within each group and over groups, with denominators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel
from torch import Tensor

from mteditflow.evaluation.benchmarks.items import ItemScores, Scores
from mteditflow.metrics import Interval, bootstrap_interval


class Estimate(BaseModel):
    """Number with its 95% bootstrap interval over items; ``None`` if nothing was scored."""

    estimate: float | None
    low: float | None
    high: float | None


class Group(BaseModel):
    """Averages of some items.

    Attributes:
        items: number of items.
        scored: number of items with all their scores: the denominator.
        lost: number of items that lost an answer of the judge.
        missing: number of items with an unreadable image.
        metrics: name of a metric to its average.
    """

    items: int
    scored: int
    lost: int
    missing: int
    metrics: dict[str, Estimate]


class BenchmarkReport(BaseModel):
    """Results of a single-turn benchmark.

    Attributes:
        benchmark: name of the benchmark.
        groups: name of a group to averages of its items, in the benchmark's order.
        overall: unweighted mean over these groups; ``None`` if one of them has no score, since the
            mean of the others would be another measure.
        absent_groups: groups of the benchmark without any item in the data.
        reasons: reason for a lost answer to the number of items that it affects.
    """

    benchmark: str
    groups: dict[str, Group]
    overall: Group
    absent_groups: tuple[str, ...]
    reasons: dict[str, int]


def summarize(
    benchmark: str,
    found: ItemScores,
    metrics: Callable[[Scores], dict[str, float]],
    groups: Sequence[str],
) -> BenchmarkReport:
    """Average the metrics of items within each group, then over groups.

    Args:
        benchmark: name of the benchmark.
        found: scores of its items.
        metrics: function from the scores of an item's criteria to its metrics by name, with the
            same names for every item.
        groups: groups of the benchmark, in order.

    Raises:
        ValueError: there is no item, or an item belongs to another group.
    """
    present = {item.group for item in found.items}
    if not present or not present <= set(groups):
        expected = f"expected at least one item, of the groups {', '.join(groups)}"
        raise ValueError(f"items: {expected}, got {sorted(present)}")
    names = [group for group in groups if group in present]
    scored = [item for item in found.items if item.key in found.scores]
    rows = [metrics(found.scores[item.key]) for item in scored]
    columns = list(rows[0]) if rows else []
    values = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64, device="cpu")
    of_group = torch.tensor(
        [names.index(item.group) for item in scored], dtype=torch.int64, device="cpu"
    )
    table = _intervals(values, of_group, len(names)) if rows else None

    def group(row: int, *own: str) -> Group:
        keys = [item.key for item in found.items if item.group in own]
        estimates = {} if table is None else _estimates(columns, table, row)
        return Group(
            items=len(keys),
            scored=sum(key in found.scores for key in keys),
            lost=sum(key in found.lost for key in keys),
            missing=sum(key in found.missing for key in keys),
            metrics=estimates,
        )

    return BenchmarkReport(
        benchmark=benchmark,
        groups={name: group(row, name) for row, name in enumerate(names)},
        overall=group(len(names), *names),
        absent_groups=tuple(name for name in groups if name not in present),
        reasons=dict(Counter(x.fault.value for x in found.lost.values()).most_common()),
    )


def _intervals(values: Tensor, of_group: Tensor, groups: int) -> Interval:
    """Return means [groups + 1, metrics] of values [items, metrics]; the last row is over groups.

    A resample without an item of some group gives NaN there, as an unscored group does.
    """

    def means(values: Tensor, of_group: Tensor) -> Tensor:
        member = (
            of_group == torch.arange(groups, dtype=torch.int64, device=of_group.device)[:, None]
        ).to(values.dtype)
        # Products with a 0/1 matrix, since torch.vmap allows no boolean indexing.
        own = member @ values / member.sum(dim=1, keepdim=True)
        return torch.cat([own, own.mean(dim=0, keepdim=True)])

    seeded = torch.Generator().manual_seed(0)  # equal scores give equal reports
    return bootstrap_interval(means, values, of_group, generator=seeded, vectorized=True)


def _estimates(columns: Sequence[str], table: Interval, row: int) -> dict[str, Estimate]:
    cells = (x[row].tolist() for x in table)
    # NaN, for which x == x is False, becomes None: JSON has no NaN.
    return {
        name: Estimate(
            **{key: x if x == x else None for key, x in zip(Interval._fields, values, strict=True)}
        )
        for name, *values in zip(columns, *cells, strict=True)
    }
