"""Report of a scored benchmark: every metric by turn, its drop from turn 1 to N, and by edit type.

``C`` chains of up to ``N`` turns, ``K`` edit types.

Every number has its own denominator, as in ``Evaluation``. A chain counts in IF at the turns up to
which all were judged, in Marginal at the judged turns, and in a term where it was measured. Lost
scores are listed with their reasons; a turn with nothing to measure is not lost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from mteditflow.chains import TASK_TYPES, Chain
from mteditflow.evaluation.evaluation import CONSISTENCY, PARTS, Evaluation
from mteditflow.evaluation.long_chains import survival_numbers
from mteditflow.evaluation.provenance import Provenance
from mteditflow.evaluation.tabulation import SURVIVAL, SURVIVED, Numbers, Place
from mteditflow.metrics import FEW_CASES, Interval


class Estimate(BaseModel):
    """One number of a report; ``None`` if there is nothing to compute it from.

    Attributes:
        metric: name of the metric. IF, Marginal, CC, Overall, the per-sample average, "collapse"
            (CR) and "survival" (Kaplan-Meier) are in percent, "turns_survived" in turns, any other
            term in its own unit.
        edit_type: edit type of the turns that count; None for all turns.
        turn: number from 1, or a word. "drop" is turn 1 minus turn N over the chains that have both
            (for Overall the difference of the two numbers), with no estimate if N is 1. "all" is
            the mean over all turns of an edit type. "mean" and "median" are those of the turns
            survived.
        estimate: the value.
        low: lower end of the 95% interval over chains. The interval is Wilson's for a share of one
            outcome per chain, Newcombe's for a paired difference of two, Greenwood's for survival
            and turns survived, a bootstrap for the others; ``evaluation.intervals`` replaces a
            bootstrap if all chains are alike. None with an estimate means that all chains are
            alike and the range of the scores is unknown.
        high: upper end of the same interval.
        count: number of chains behind the estimate, or of turns for an edit type. For Overall the
            smaller of its two denominators, for survival the chains at risk at that turn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    metric: str
    edit_type: str | None
    turn: int | str
    estimate: float | None
    low: float | None
    high: float | None
    count: int

    @property
    def few(self) -> bool:
        """Whether there are so few cases (below ``FEW_CASES``) that the interval is rough."""
        return 0 < self.count < FEW_CASES

    @property
    def alike(self) -> bool:
        """Whether the interval is missing: all chains are alike in scores of unknown range."""
        return self.estimate is not None and self.low is None


class Report(BaseModel):
    """Numbers of a benchmark with their denominators.

    Attributes:
        title: name of the scored editor or images.
        turns: number of turns of the longest chain, N.
        asked: number of chains in the benchmark, unreadable ones included.
        scored: number of chains with readable images; each counts wherever it has a score.
        left_out: chain or line to the reason why it was not scored.
        lost: chain to the reason of its first lost score; its other scores still count.
        unmeasured: term to the number of turns with nothing to measure (not lost).
        estimates: the numbers.
        notes: remarks on the numbers.
        checks: edit type ("unknown" if none is given) to check of success to its number of judged
            turns; empty if the checks are unknown.
        sources: provenance of the evaluation, or of both evaluations of a comparison.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    turns: int
    asked: int
    scored: int
    left_out: dict[str, str]
    lost: dict[str, str]
    unmeasured: dict[str, int] = {}
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...]
    checks: dict[str, dict[str, int]] = {}
    sources: tuple[Provenance, ...] = ()

    @property
    def invalid_share(self) -> float:
        """Share of the benchmark's chains that were left out or lost a score, in [0, 1]."""
        return (len(self.left_out) + len(self.lost)) / max(self.asked, 1)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics with a number at each turn and a drop, in order."""
        names = dict.fromkeys(x.metric for x in self.estimates)
        return tuple(name for name in names if name not in (SURVIVAL, SURVIVED))

    @property
    def has_survival(self) -> bool:
        """Whether survival and turns survived are there; reports of older versions lack them."""
        return any(x.metric == SURVIVED for x in self.estimates)

    @property
    def edit_types(self) -> tuple[str, ...]:
        """Edit types that occur, in the order of ``TASK_TYPES``."""
        return tuple(dict.fromkeys(x.edit_type for x in self.estimates if x.edit_type))

    def find(self, metric: str, turn: int | str, edit_type: str | None = None) -> Estimate:
        """Return one of the numbers.

        Raises:
            KeyError: the report has no such number.
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
    """Compute every number of a benchmark, with 95% intervals over chains.

    Args:
        evaluation: scores of the chains.
        chains: chains in the order of the evaluation, with their edit types if known.
        title: title of the report.
        left_out: further chains or lines of the benchmark to the reason why they were not scored.
        ways: check that decided the success of each turn of each chain, if known.

    Raises:
        ValueError: the chains are not those of the evaluation, or ``ways`` lacks a turn.

    Example:
        >>> import torch
        >>> from mteditflow.rewards import TurnScores
        >>> scores = TurnScores(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.ones(2, 2) > 0, {})
        >>> chains = [Chain(id=x, image="x.png", instructions=("a", "b")) for x in "12"]
        >>> evaluation = Evaluation(0, "12", ["ab", "ab"], {"following": scores}, success_at=1)
        >>> report = report_of(evaluation, chains, title="x", left_out={"3": "no image"})
        >>> report.find("marginal", 2).estimate, report.find("marginal", "drop").estimate
        (50.0, 50.0)
        >>> report.asked, report.scored
        (3, 2)
    """
    numbers = Numbers(evaluation, chains)
    samples = evaluation.samples
    interval = numbers.interval(samples)
    return Report(
        title=title,
        turns=evaluation.turns,
        asked=len(evaluation) + len(left_out),
        scored=len(evaluation),
        left_out=dict(left_out),
        lost=lost_chains(evaluation),
        unmeasured=evaluation.unmeasured,
        estimates=(
            *in_words(numbers.places, interval, numbers.counts(samples)),
            *in_words(*survival_numbers(*samples[:2])),
        ),
        notes=tuple(_notes(evaluation, numbers.edit_types)),
        sources=(evaluation.provenance,),
        checks={} if ways is None else _checks(chains, ways, evaluation.judged.tolist()),
    )


def _notes(evaluation: Evaluation, edit_types: Sequence[str]) -> Iterator[str]:
    """Yield the notes that a reader of the numbers needs."""
    if evaluation.parts:
        counts = (
            f"{name} {' / '.join(str(int(x)) for x in measured.sum(dim=0))}"
            for name in evaluation.parts
            for measured in [evaluation.terms[name].measured]
        )
        yield f"Chains behind the parts of CC (corpus average), by turn: {', '.join(counts)}."
    elif CONSISTENCY in evaluation.terms:
        yield "One consistency score per turn: corpus and per-sample average are the same."
    elif set(PARTS) & set(evaluation.terms):
        yield "No CC, no Overall: the scorer gives parts of consistency, and no consistency."
    if not edit_types:
        yield "The chains name no edit types."


def _checks(
    chains: Sequence[Chain], ways: Sequence[Sequence[str]], judged: Sequence[Sequence[bool]]
) -> dict[str, dict[str, int]]:
    """Count the checks of the judged turns by edit type."""
    if [len(own) for own in ways] != [chain.turns for chain in chains]:
        raise ValueError("ways: expected one for each turn of each chain, got others")
    found: dict[str, Counter[str]] = {}
    for chain, own, counted in zip(chains, ways, judged, strict=True):
        types = chain.task_types or ["unknown"] * len(own)
        for name, way, counts in zip(types, own, counted[: len(own)], strict=True):
            found.setdefault(name, Counter())[way] += counts
    names = (*TASK_TYPES, "unknown")
    # Lost turns add 0 to a check, so that a type without any judged turn leaves no entry.
    judged_counts = {
        name: {k: n for k, n in found[name].most_common() if n} for name in names if name in found
    }
    return {name: counts for name, counts in judged_counts.items() if counts}


def in_words(
    places: Sequence[Place], interval: Interval, counts: Sequence[int]
) -> Iterator[Estimate]:
    """Yield the numbers of a vector as named estimates; NaN becomes ``None``."""
    for place, *values, count in zip(places, *(x.tolist() for x in interval), counts, strict=True):
        estimate, low, high = (None if math.isnan(x) else x for x in values)
        yield Estimate(**place._asdict(), estimate=estimate, low=low, high=high, count=count)


def lost_chains(evaluation: Evaluation) -> dict[str, str]:
    """Return the chains that lost a score, each with the reason of its first loss."""
    lost: dict[str, str] = {}
    for name, term in evaluation.terms.items():
        for (c, n), why in sorted(term.lost.items()):
            lost.setdefault(evaluation.chain_ids[c], f"{name} at turn {n + 1}: {why}")
    return lost
