"""Report of a scored benchmark: every metric by turn, its fall, and by edit type.

``C`` chains of up to ``N`` turns, ``K`` edit types.

A chain that lost a score counts in no number, at no turn: all metrics and turns are of the same
chains, and two runs can be compared pairwise. A shorter chain counts at the turns that it has, and
a term of consistency at the turns that have it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mteditflow.chains import TASK_TYPES, Chain
from mteditflow.evaluation.evaluation import (
    CONSISTENCY,
    FOLLOWING,
    METRICS,
    PER_SAMPLE,
    Evaluation,
    interval_of,
)
from mteditflow.metrics import Interval

DROP, ALL = "drop", "all"  # from turn 1 to N; all turns of an edit type
BY_TYPE = METRICS[:2]  # IF and Marginal


class Place(NamedTuple):
    """Name of a number: metric, edit type (None: all chains), and turn from 1 on."""

    metric: str
    edit_type: str | None
    turn: int | str


class Estimate(BaseModel):
    """One number of a report; ``None`` where there is nothing to compute it from.

    Attributes:
        metric: its name; the first four and the per-sample average are in percent.
        edit_type: whose turns it is of; None for all.
        turn: from 1 on; "drop" is turn 1 minus turn N, "all" the mean over all turns of a type.
        estimate: the value.
        low: of the 95% bootstrap interval over chains.
        high: likewise.
        count: chains it is a mean over; for an edit type turns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    metric: str
    edit_type: str | None
    turn: int | str
    estimate: float | None
    low: float | None
    high: float | None
    count: int


class Report(BaseModel):
    """A benchmark's numbers with their denominators.

    Attributes:
        title: what was scored.
        turns: of the longest chain, N.
        asked: chains that the benchmark holds, with those that could not be read.
        counted: chains that the numbers are of.
        left_out: chain or line to why it was not scored.
        lost: chain to why a score of it was lost; such a chain counts nowhere.
        estimates: the numbers.
        notes: remarks on the numbers.
        checks: edit type ("unknown" where none is named) to the check of success, to its number of
            turns in the counted chains; empty where that is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    turns: int
    asked: int
    counted: int
    left_out: dict[str, str]
    lost: dict[str, str]
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...]
    checks: dict[str, dict[str, int]] = {}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in order."""
        return tuple(dict.fromkeys(x.metric for x in self.estimates))

    @property
    def edit_types(self) -> tuple[str, ...]:
        """Edit types that occur, in the order of ``TASK_TYPES``."""
        return tuple(dict.fromkeys(x.edit_type for x in self.estimates if x.edit_type))

    def find(self, metric: str, turn: int | str, edit_type: str | None = None) -> Estimate:
        """One of the numbers.

        Raises:
            KeyError: there is none of this name.
        """
        wanted = Place(metric, edit_type, turn)
        for x in self.estimates:
            if (x.metric, x.edit_type, x.turn) == wanted:
                return x
        raise KeyError(f"expected a number of the report, got {wanted}")


def report_of(
    evaluation: Evaluation,
    chains: Sequence[Chain],
    *,
    title: str,
    left_out: Mapping[str, str],
    ways: Sequence[Sequence[str]] | None = None,
) -> Report:
    """Compute every number of a benchmark, with 95% bootstrap intervals over chains.

    Args:
        evaluation: scores of the chains.
        chains: in the order of the evaluation, with their edit types where they are known.
        title: what was scored.
        left_out: what the benchmark holds besides, to why it was not scored.
        ways: what told the success of each turn of each chain, if that is known.

    Raises:
        ValueError: the chains are not those of the evaluation, or a turn has no way.

    Example:
        >>> import torch
        >>> from mteditflow.rewards import TurnScores
        >>> scores = TurnScores(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.ones(2, 2) > 0, {})
        >>> chains = [Chain(id=x, image="x.png", instructions=("a", "b")) for x in "12"]
        >>> evaluation = Evaluation(0, "12", ["ab", "ab"], {"following": scores}, success_at=1)
        >>> report = report_of(evaluation, chains, title="x", left_out={"3": "no image"})
        >>> report.find("marginal", 2).estimate, report.find("marginal", "drop").estimate
        (50.0, 50.0)
        >>> report.asked, report.counted
        (3, 2)
    """
    numbers = Numbers(evaluation, chains)
    places, samples = numbers.places, numbers.samples(evaluation.valid)
    interval = interval_of(numbers.values, samples, (len(places),))
    return Report(
        title=title,
        turns=evaluation.turns,
        asked=len(evaluation) + len(left_out),
        counted=evaluation.counted,
        left_out=dict(left_out),
        lost=lost_chains(evaluation),
        estimates=tuple(in_words(places, interval, numbers.counts(evaluation.valid))),
        notes=tuple(_notes(evaluation, numbers.edit_types)),
        checks={} if ways is None else _checks(chains, ways, evaluation.valid.tolist()),
    )


def _notes(evaluation: Evaluation, edit_types: Sequence[str]) -> Iterator[str]:
    """Yield the notes that a reader of the numbers needs."""
    if evaluation.parts:
        counts = (
            f"{name} {' / '.join(str(int(x)) for x in measured.sum(dim=0))}"
            for name in evaluation.parts
            for measured in [evaluation.terms[name].measured[evaluation.valid]]
        )
        yield f"Chains behind the parts of CC (corpus average), by turn: {', '.join(counts)}."
    elif CONSISTENCY in evaluation.terms:
        yield "One consistency score per turn: corpus and per-sample average are the same."
    if not edit_types:
        yield "The chains name no edit types."


def _checks(
    chains: Sequence[Chain], ways: Sequence[Sequence[str]], counted: Sequence[bool]
) -> dict[str, dict[str, int]]:
    """Count by edit type what told the turns of the counted chains."""
    if [len(own) for own in ways] != [chain.turns for chain in chains]:
        raise ValueError("ways: expected one for each turn of each chain, got others")
    found: dict[str, Counter[str]] = {}
    for chain, own in compress(zip(chains, ways, strict=True), counted):
        for name, way in zip(chain.task_types or ["unknown"] * len(own), own, strict=True):
            found.setdefault(name, Counter())[way] += 1
    names = (*TASK_TYPES, "unknown")
    return {name: dict(found[name].most_common()) for name in names if name in found}


def in_words(
    places: Sequence[Place], interval: Interval, counts: Sequence[int]
) -> Iterator[Estimate]:
    """Name the numbers of a vector."""
    for place, *values, count in zip(places, *(x.tolist() for x in interval), counts, strict=True):
        estimate, low, high = (None if math.isnan(x) else x for x in values)
        yield Estimate(**place._asdict(), estimate=estimate, low=low, high=high, count=count)


def lost_chains(evaluation: Evaluation) -> dict[str, str]:
    """Name the chains that lost a score, and why."""
    lost: dict[str, str] = {}
    for name, term in evaluation.terms.items():
        for (c, n), why in sorted(term.lost.items()):
            lost.setdefault(evaluation.chain_ids[c], f"{name} at turn {n + 1}: {why}")
    for c in (~evaluation.valid).nonzero().flatten().tolist():
        lost.setdefault(evaluation.chain_ids[c], "nothing to measure")
    return lost


class Numbers:
    """All numbers of an evaluation as one vector, for a bootstrap over its chains.

    Attributes:
        edit_types: those that occur.
        places: which number stands where.
    """

    def __init__(self, evaluation: Evaluation, chains: Sequence[Chain]) -> None:
        if [chain.id for chain in chains] != list(evaluation.chain_ids):
            raise ValueError("chains: expected those of the evaluation in its order, got others")
        self._evaluation, turns = evaluation, evaluation.turns
        named = {name for chain in chains for name in chain.task_types or ()}
        self.edit_types = tuple(name for name in TASK_TYPES if name in named)
        steps: list[int | str] = list(range(1, turns + 1))
        self.places = [
            *(Place(x, None, turn) for x in evaluation.names for turn in [*steps, DROP]),
            *(Place(x, k, t) for k in self.edit_types for x in BY_TYPE for t in [*steps, ALL]),
        ]
        self._types = torch.full(
            (len(chains), turns), -1, dtype=torch.int64, device="cpu"
        )  # index of each turn's type
        for c, chain in enumerate(chains):
            for n, name in enumerate(chain.task_types or ()):
                self._types[c, n] = self.edit_types.index(name)

    def samples(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Select chains for ``values``."""
        return self._types[rows], *self._evaluation.samples(rows)

    def values(self, types: Tensor, *samples: Tensor) -> Tensor:
        """Compute all numbers of some chains, in the order of ``places``."""
        metrics = self._evaluation.per_turn(*samples)
        metrics = torch.cat([metrics, metrics[:, :1] - metrics[:, -1:]], dim=1)
        success, shares = samples[0].float(), []
        for followed in (success.cumprod(dim=1), success):
            of_type, turns = (_with_sum(x) for x in self._by_type(types, followed))
            shares.append(100 * of_type / turns)
        return torch.cat([metrics.flatten(), torch.stack(shares, dim=1).flatten()])

    def _by_type(self, types: Tensor, followed: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of followed turns and of all turns of each type, both [K, N]."""
        of_type = types[..., None] == torch.arange(
            len(self.edit_types), dtype=torch.int64, device="cpu"
        )
        return (followed[..., None] * of_type).sum(dim=0).T, of_type.sum(dim=0).T

    def counts(self, rows: Tensor) -> list[int]:
        """Denominator of each number, in chains; for an edit type in turns."""
        evaluation, found = self._evaluation, []
        names = dict.fromkeys(evaluation.names, FOLLOWING) | {x: x for x in evaluation.others}
        names |= dict.fromkeys(("content_consistency", PER_SAMPLE), CONSISTENCY)
        for metric in evaluation.names:
            measured = evaluation.terms[names[metric]].measured[rows]
            both = measured[:, 0] & measured[:, -1]  # a drop is of the chains that have both ends
            found += [*measured.sum(dim=0).tolist(), int(both.sum())]
        types = self._types[rows]
        _, of_type = self._by_type(types, torch.zeros_like(types))
        for turns in _with_sum(of_type).tolist():
            found += turns * len(BY_TYPE)
        return found


def _with_sum(x: Tensor) -> Tensor:
    """Append the sum over turns: [K, N] -> [K, N + 1]."""
    return torch.cat([x, x.sum(dim=1, keepdim=True)], dim=1)
