"""Evaluation of held-out chains at one round of a run: metrics with intervals, and its file.

``C`` chains of up to ``N`` turns. Every metric has its own denominator at every turn, as in the
official aggregation. IF(t) counts the chains whose turns 1 to t were all judged, Marginal(t) those
judged at turn t, and CC(t) and any other term those in which it was measured at turn t. A lost
score leaves these denominators and is counted as lost; it is never imputed. A turn with nothing to
measure does not count as lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mteditflow._checks import check_count, check_mask, check_number
from mteditflow._files import write_atomically
from mteditflow.evaluation.intervals import (
    CC,
    COLLAPSE,
    DESTROYED,
    METRICS,
    PER_SAMPLE,
    WEAR,
    MetricIntervals,
    interval_of,
)
from mteditflow.evaluation.provenance import Provenance
from mteditflow.evaluation.records import EvaluationRecord, TermRecord
from mteditflow.metrics import (
    Interval,
    collapse_rate,
    content_consistency,
    instruction_following,
    marginal_success,
    overall,
    wilson_interval,
)
from mteditflow.metrics.long_chains import collapsed
from mteditflow.rewards import TurnScores
from mteditflow.rewards.scale import ROUNDING, SHARE, check_range

FOLLOWING, CONSISTENCY = "following", "consistency"  # terms behind IF, Marginal, CC and Overall
CONSECUTIVE = "consecutive"  # consistency with the turn before, if it is scored too
PARTS = ("object", "background")  # parts of the consistency, if they are given separately


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of the chains that a policy edited.

    Two evaluations of the same chains are compared pairwise (``compare``). If the noise of each
    chain comes from its own seed, their images are paired as well.

    Args:
        round: number of training rounds before the evaluation, >= 0; 0 is the base model.
        chain_ids: ids of the C chains, each once.
        instructions: instructions of each chain, one per turn.
        terms: scores by name, each [C, N] with the same turns. "following" is required.
            "consistency" gives CC and Overall. With its parts "object" and "background", CC is the
            corpus average, the mean of both parts' means; the mean of "consistency" is then
            reported as the per-sample average. Any other term is reported as its mean in its own
            unit. "destroyed", 0 or 1, also gives the collapse rate CR, and "wear" is in [0, 1].
        success_at: threshold of the "following" score at and above which a turn is followed: 5 for
            Likert, 1 for yes or no.
        provenance: judge, and origin of the images. If the judge's scale is known, ``success_at``
            must be its threshold and the "following" scores must lie on it. "consistency" and its
            parts must lie in its ``consistency_range``.

    Raises:
        ValueError: numbers of chains or turns differ, an id occurs twice, "following" is missing,
            a number is out of range, or scores or threshold do not fit the judge's scale.
        TypeError: a number is of another type.

    Example:
        >>> scores = TurnScores(torch.tensor([[5.0, 3.0], [5.0, 5.0]]), torch.ones(2, 2) > 0, {})
        >>> evaluation = Evaluation(
        ...     round=0,
        ...     chain_ids=("1", "2"),
        ...     instructions=(("Remove the cat", "Add a dog"), ("Add a tree", "Make it snow")),
        ...     terms={"following": scores},
        ...     success_at=5,
        ... )
        >>> evaluation.metrics["marginal"].estimate
        tensor([100.,  50.])
        >>> evaluation.counts["marginal"]
        [2, 2]
        >>> evaluation.score
        50.0
    """

    round: int
    chain_ids: Sequence[str]
    instructions: Sequence[Sequence[str]]
    terms: Mapping[str, TurnScores]
    success_at: float
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        # Tuples, so that ``compare`` finds a list and a tuple of equal content equal.
        object.__setattr__(self, "chain_ids", tuple(self.chain_ids))
        object.__setattr__(self, "instructions", tuple(tuple(x) for x in self.instructions))
        check_count("round", self.round, low=0)
        check_number("success_at", self.success_at)
        if FOLLOWING not in self.terms:
            raise ValueError(f"terms: expected {FOLLOWING!r} among them, got {list(self.terms)}")
        turns = self.terms[FOLLOWING].turn_mask
        for name, scores in self.terms.items():
            check_mask(f"terms[{name!r}]", scores.turn_mask, turns.shape, "of 'following'")
            if not torch.equal(scores.turn_mask, turns):
                raise ValueError(f"terms[{name!r}]: expected the turns of 'following', got others")
        self._check_scale()
        if len(self.chain_ids) != len(turns) or len(set(self.chain_ids)) != len(turns):
            raise ValueError(
                f"chain_ids: expected {len(turns)} different names, one for each row of scores, "
                f"got {len(self.chain_ids)}, {len(set(self.chain_ids))} of them different"
            )
        lengths, expected = [len(chain) for chain in self.instructions], turns.sum(dim=1).tolist()
        if lengths != expected:
            raise ValueError(
                f"instructions: expected one per turn, {expected} by chain, got {lengths}"
            )

    def _check_scale(self) -> None:
        """Raise ValueError unless scores and threshold fit the judge's scale."""
        check_consistency(self.terms, self.provenance.judged_by.consistency_range)
        scale = self.provenance.judged_by.scale
        if scale is None:
            return
        if self.success_at != scale.success:
            raise ValueError(
                f"success_at: expected {scale.success:g}, the threshold of the judge's scale, got "
                f"{self.success_at:g}"
            )
        scale.check(FOLLOWING, self.terms[FOLLOWING].score)

    def __len__(self) -> int:
        """Return the number of chains, C."""
        return len(self.chain_ids)

    def only(self, chain_ids: Sequence[str]) -> Evaluation:
        """Return the evaluation of some of the chains, in the order of ``chain_ids``.

        Raises:
            ValueError: an id is not of the evaluation.
        """
        if unknown := set(chain_ids) - set(self.chain_ids):
            raise ValueError(f"chain_ids: expected chains of the evaluation, got {min(unknown)!r}")
        places = {name: row for row, name in enumerate(self.chain_ids)}
        rows = [places[name] for name in chain_ids]
        terms = {}
        for name, term in self.terms.items():
            lost = {
                (b, n): term.lost[row, n]
                for b, row in enumerate(rows)
                for n in range(self.turns)
                if (row, n) in term.lost
            }
            terms[name] = TurnScores(term.score[rows], term.turn_mask[rows], lost)
        instructions = [self.instructions[row] for row in rows]
        own = (instructions, terms, self.success_at, self.provenance)
        return Evaluation(self.round, chain_ids, *own)

    @property
    def turns(self) -> int:
        """Number of turns of the longest chain, N."""
        return self.terms[FOLLOWING].score.shape[1]

    @property
    def success(self) -> Tensor:
        """Turns whose instruction was followed, boolean [C, N]; False without a score."""
        # A comparison with NaN is False, so a missing score never counts as success.
        return self.terms[FOLLOWING].score >= self.success_at

    @property
    def judged(self) -> Tensor:
        """Turns with a "following" score, boolean [C, N]."""
        return self.terms[FOLLOWING].measured

    @property
    def complete(self) -> Tensor:
        """Chains that lost no score of any term, boolean [C]."""
        return torch.stack([scores.valid for scores in self.terms.values()]).all(dim=0)

    @property
    def unmeasured(self) -> dict[str, int]:
        """Number of turns with nothing to measure, by term; these are not lost."""
        counts = {name: int(scores.unmeasured.sum()) for name, scores in self.terms.items()}
        return {name: count for name, count in counts.items() if count}

    @property
    def lost(self) -> dict[str, int]:
        """Lost scores of all terms by reason, most frequent first, counted in turns."""
        faults = (lost.fault.value for term in self.terms.values() for lost in term.lost.values())
        return dict(Counter(faults).most_common())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the metrics: IF, Marginal, CC and Overall in percent, other terms, CR."""
        measured = METRICS if CONSISTENCY in self.terms else METRICS[:2]
        per_sample = (PER_SAMPLE,) if self.parts else ()
        collapse = (COLLAPSE,) if DESTROYED in self.terms else ()
        return *measured, *per_sample, *self.others, *collapse

    @property
    def parts(self) -> tuple[str, ...]:
        """Terms whose means CC averages (corpus average); empty unless they are all given."""
        return PARTS if {CONSISTENCY, *PARTS} <= set(self.terms) else ()

    @property
    def others(self) -> tuple[str, ...]:
        """Terms that enter none of IF, Marginal, CC and Overall, in alphabetical order."""
        return tuple(sorted(set(self.terms) - {FOLLOWING, CONSISTENCY, *self.parts}))

    @property
    def samples(self) -> tuple[Tensor, ...]:
        """Arguments of ``per_turn`` and ``counts_of``: success, judged, the terms, each [C, N]."""
        consistency = (CONSISTENCY,) if CONSISTENCY in self.terms else ()
        scores = (self.terms[name].score for name in (*consistency, *self.parts, *self.others))
        return self.success, self.judged, *scores

    def per_turn(self, *samples: Tensor) -> Tensor:
        """Compute the metrics of some chains: [metrics, N], in the order of ``names``.

        Args:
            *samples: as in ``samples``, or the same rows of each, as a bootstrap draws them.
        """
        success, judged, *scores = samples
        # The bootstrap runs this under torch.vmap: NaN and masks here, no boolean indexing.
        following = instruction_following(success, valid=judged)
        shares, others = [following, marginal_success(success, valid=judged)], scores
        if CONSISTENCY in self.terms:
            per_sample, *rest = scores
            parts, others = rest[: len(self.parts)], rest[len(self.parts) :]
            # Corpus average: the mean of both parts' means, not the mean of each turn's mean.
            content = content_consistency(*(parts or [per_sample]))
            shares += [content, overall(following, content)]
            shares += [content_consistency(per_sample)] if parts else []
        means = [x.nanmean(dim=0) for x in others]
        if DESTROYED in self.terms:
            destroyed = others[self.others.index(DESTROYED)]
            rate = collapse_rate(destroyed.nan_to_num(), valid=~destroyed.isnan())
            means.append(100 * rate)
        return torch.stack([*(100 * x for x in shares), *means])

    def counts_of(self, *samples: Tensor) -> Tensor:
        """Count the chains behind each metric of ``per_turn``: integers [metrics, N].

        Overall has two denominators, those of IF and of CC; the smaller one is returned.
        """
        counts = [counted.sum(dim=0) for _, counted in outcomes(*samples[:2]).values()]
        collapse = [known.sum(dim=0) for _, known in self._collapse(*samples).values()]
        others = [~x.isnan() for x in samples[2:]]
        if CONSISTENCY in self.terms:
            per_sample, *rest = others
            parts, others = rest[: len(self.parts)], rest[len(self.parts) :]
            content = torch.stack(parts or [per_sample]).any(dim=0).sum(dim=0)
            counts += [content, torch.minimum(counts[0], content)]
            counts += [per_sample.sum(dim=0)] if parts else []
        return torch.stack([*counts, *(x.sum(dim=0) for x in others), *collapse])

    def outcomes(self, *samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return outcome and counted, [C, N] each, of the metrics that are shares of chains."""
        return outcomes(*samples[:2]) | self._collapse(*samples)

    def _collapse(self, *samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return whether chains have collapsed and where that is known; empty without the term."""
        if DESTROYED not in self.terms:
            return {}
        destroyed = samples[len(samples) - len(self.others) + self.others.index(DESTROYED)]
        outcome, known = collapsed(destroyed.nan_to_num(), ~destroyed.isnan())
        return {COLLAPSE: (outcome > 0, known)}

    @cached_property
    def counts(self) -> dict[str, list[int]]:
        """Number of chains behind each metric, per turn; see ``counts_of``."""
        return dict(zip(self.names, self.counts_of(*self.samples).tolist(), strict=True))

    @cached_property
    def metrics(self) -> dict[str, Interval]:
        """Every metric per turn, [N], with its 95% interval over the chains in ``counts``.

        Wilson's interval for IF, Marginal and CR, which have one outcome per chain; a bootstrap
        with a fixed seed for the others. Where all chains are alike, a bootstrap has no width.
        There CC, wear and destroyed get the interval of a bounded mean, Overall one from its parts
        (see ``evaluation.intervals``), and any other term NaN. NaN where no chain counts.
        """
        # One bootstrap of all metrics; then shares get Wilson's ends, and flat ones a width.
        table = torch.stack(interval_of(self.per_turn, self.samples))
        for name, (outcome, counted) in self.outcomes(*self.samples).items():
            _, *ends = wilson_interval((outcome & counted).sum(dim=0), counted.sum(dim=0))
            table[1:, self.names.index(name)] = 100 * torch.stack(ends).float()
        self.intervals.levels(table, self.fewest_of(*self.samples))
        return {name: Interval(*table[:, i]) for i, name in enumerate(self.names)}

    @property
    def intervals(self) -> MetricIntervals:
        """Replacement of bootstrapped intervals without width, for tables of these metrics."""
        return MetricIntervals(self.names, self.provenance.judged_by.consistency_range)

    def fewest_of(self, *samples: Tensor) -> Tensor:
        """Count the chains as ``counts_of`` does, but for CC in the part with the fewest."""
        counts = self.counts_of(*samples)
        if self.parts:
            parts = torch.stack(samples[3 : 3 + len(self.parts)])
            there = (~parts.isnan()).sum(dim=1)
            # A part without any chain leaves the average, so it must not win the minimum as 0.
            counts[CC] = torch.where(there > 0, there, len(self)).amin(dim=0)
        return counts

    @cached_property
    def estimates(self) -> dict[str, list[float]]:
        """Every metric per turn without its interval, which is slower to compute."""
        return dict(zip(self.names, self.per_turn(*self.samples).tolist(), strict=True))

    @property
    def score(self) -> float:
        """Overall at the last turn, or IF without consistency, in percent; higher is better."""
        name = "overall" if CONSISTENCY in self.terms else "instruction_following"
        return self.estimates[name][-1]

    @property
    def numbers(self) -> dict[str, float]:
        """All estimates by flat names for trackers, such as "held_out/overall/turn_3"."""
        values = {
            f"held_out/{name}/turn_{turn + 1}": value
            for name, estimate in self.estimates.items()
            for turn, value in enumerate(estimate)
        }
        values |= {
            f"held_out/chains/{name}/turn_{turn + 1}": float(count)
            for name, counts in self.counts.items()
            for turn, count in enumerate(counts)
        }
        return values | {"held_out/invalid_share": int((~self.complete).sum()) / len(self)}

    def write(self, path: Path) -> None:
        """Write the evaluation to a JSON file atomically; the folder is created if missing."""
        write_atomically(path, self.encoded)

    @property
    def encoded(self) -> bytes:
        """Content of the file that ``write`` writes, UTF-8 JSON."""
        record = EvaluationRecord(
            round=self.round,
            success_at=self.success_at,
            chain_ids=tuple(self.chain_ids),
            instructions=tuple(tuple(x) for x in self.instructions),
            terms={name: TermRecord.of(scores) for name, scores in self.terms.items()},
            provenance=self.provenance,
        )
        return record.model_dump_json().encode()

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read a file of ``write``; every score is restored exactly.

        Raises:
            ValueError: the file is not an evaluation; the message names file and place.
            OSError: it cannot be read.
        """
        record = EvaluationRecord.parse(path)
        names, words, success_at = record.chain_ids, record.instructions, record.success_at
        try:
            terms = {name: term.scores() for name, term in record.terms.items()}
            return cls(record.round, names, words, terms, success_at, record.provenance)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def check_consistency(terms: Mapping[str, TurnScores], bounds: tuple[float, float]) -> None:
    """Check that every score of consistency, its parts, wear and destroyed is in its range.

    Raises:
        ValueError: a score is outside; the message names the term and shows values.
    """
    for name in (CONSISTENCY, CONSECUTIVE, *PARTS):
        if name in terms:
            check_range(name, terms[name].score, *bounds, slack=ROUNDING)
    for name in (DESTROYED, WEAR):
        if name in terms:
            check_range(name, terms[name].score, *SHARE, whole=name == DESTROYED)


def outcomes(success: Tensor, judged: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return outcome and counted, [C, N] each, of IF and Marginal: one outcome per chain."""
    # IF at t is all of turns 1..t followed, and counts a chain only if all of them were judged.
    so_far, all_judged = (x.long().cumprod(dim=1).bool() for x in (success, judged))
    return {METRICS[0]: (so_far, all_judged), METRICS[1]: (success, judged)}
