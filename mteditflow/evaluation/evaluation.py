"""Scores of held-out chains at one round of a run: metrics with intervals, kept in a file.

``C`` chains of up to ``N`` turns. Every metric has its own denominator at every turn, as in the
official aggregation: IF(t) the chains whose turns 1 to t were all judged, Marginal(t) those judged
at t, CC(t) and any other term those in which it was measured at t. A lost score leaves these
denominators and is counted; nothing takes its place. Where there was nothing to measure, nothing
was lost.
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

FOLLOWING, CONSISTENCY = "following", "consistency"  # the terms that the metrics are made of
PARTS = ("object", "background")  # of the consistency, where they are given apart


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of the chains that a policy edited.

    Two evaluations of the same chains are compared pairwise (``compare``); draw the noise of a
    chain from its own seed, and their images are pairs too.

    Args:
        round: rounds of training before it; 0 is the base model.
        chain_ids: names of the C chains, each once.
        instructions: of each chain, one per turn.
        terms: scores by name, each [C, N] with the same turns. "following" must be there;
            "consistency" gives CC and Overall; where its parts "object" and "background" are there
            too, CC is the corpus average, the mean of the means of both, and the mean of
            "consistency" is reported beside it as the per-sample average. Any other is reported as
            its plain mean, in its own unit; "destroyed", 0 or 1, gives the collapse rate CR too,
            and "wear" is in [0, 1].
        success_at: a turn is followed if its "following" score is at least this: 5 for Likert,
            1 for yes or no.
        provenance: who judged and who made the images. Where the judge's scale is known,
            ``success_at`` is its threshold, and the "following" scores lie on it. "consistency" and
            its parts lie in its ``consistency_range``.

    Raises:
        ValueError: numbers of chains or turns differ, a name occurs twice, "following" is missing,
            a number is out of range, or scores or threshold are off the judge's scales.
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
        """Raise ValueError unless scores and threshold are those of the judge's scale."""
        check_consistency(self.terms, self.provenance.judged_by.consistency_range)
        for name in {DESTROYED, WEAR} & set(self.terms):
            check_range(name, self.terms[name].score, *SHARE, whole=name == DESTROYED)
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
        """Return the evaluation of some of the chains, in their order.

        Raises:
            ValueError: there is no such chain.
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
        """Turns of the longest chain, N."""
        return self.terms[FOLLOWING].score.shape[1]

    @property
    def success(self) -> Tensor:
        """Turns whose instruction was followed, boolean [C, N]; false where there is no score."""
        return self.terms[FOLLOWING].score >= self.success_at

    @property
    def judged(self) -> Tensor:
        """Turns that have a score of following, boolean [C, N]."""
        return self.terms[FOLLOWING].measured

    @property
    def complete(self) -> Tensor:
        """Chains that lost no score of any term, boolean [C]."""
        return torch.stack([scores.valid for scores in self.terms.values()]).all(dim=0)

    @property
    def unmeasured(self) -> dict[str, int]:
        """Number of turns in which there was nothing to measure, by term; they were not lost."""
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
        """Terms that CC is the corpus average of, if they are given apart."""
        return PARTS if {CONSISTENCY, *PARTS} <= set(self.terms) else ()

    @property
    def others(self) -> tuple[str, ...]:
        """Terms that are reported only."""
        return tuple(sorted(set(self.terms) - {FOLLOWING, CONSISTENCY, *self.parts}))

    @property
    def samples(self) -> tuple[Tensor, ...]:
        """Arguments of ``per_turn`` and ``counts_of``: success, judged, the terms, each [C, N]."""
        consistency = (CONSISTENCY,) if CONSISTENCY in self.terms else ()
        scores = (self.terms[name].score for name in (*consistency, *self.parts, *self.others))
        return self.success, self.judged, *scores

    def per_turn(self, *samples: Tensor) -> Tensor:
        """Compute the metrics of some chains: [metrics, N], in the order of ``names``."""
        success, judged, *scores = samples
        following = instruction_following(success, valid=judged)
        shares, others = [following, marginal_success(success, valid=judged)], scores
        if CONSISTENCY in self.terms:
            per_sample, *rest = scores
            parts, others = rest[: len(self.parts)], rest[len(self.parts) :]
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
        """Count the chains that each metric of ``per_turn`` is over: integers [metrics, N].

        Overall has two denominators, those of IF and of CC; the smaller one is given.
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
        """Return the metrics that are a share of one outcome per chain, by name, [C, N] each."""
        return outcomes(*samples[:2]) | self._collapse(*samples)

    def _collapse(self, *samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return whether chains have collapsed, and where that is known, if turns say so."""
        if DESTROYED not in self.terms:
            return {}
        destroyed = samples[len(samples) - len(self.others) + self.others.index(DESTROYED)]
        outcome, known = collapsed(destroyed.nan_to_num(), ~destroyed.isnan())
        return {COLLAPSE: (outcome > 0, known)}

    @cached_property
    def counts(self) -> dict[str, list[int]]:
        """Number of chains that each metric is over, per turn; see ``counts_of``."""
        return dict(zip(self.names, self.counts_of(*self.samples).tolist(), strict=True))

    @cached_property
    def metrics(self) -> dict[str, Interval]:
        """Every metric per turn, [N], with its 95% interval over the chains in ``counts``.

        Wilson's for IF, Marginal and CR, which have one outcome per chain; a bootstrap for the
        others, with a fixed seed. Where all chains are alike, so that a bootstrap has no width,
        that of CC, wear and destroyed is of a bounded mean, that of Overall of its parts (see
        ``evaluation.intervals``), and that of another term NaN. NaN where no chain counts.
        """
        table = torch.stack(interval_of(self.per_turn, self.samples))
        for name, (outcome, counted) in self.outcomes(*self.samples).items():
            _, *ends = wilson_interval((outcome & counted).sum(dim=0), counted.sum(dim=0))
            table[1:, self.names.index(name)] = 100 * torch.stack(ends).float()
        self.intervals.levels(table, self.fewest_of(*self.samples))
        return {name: Interval(*table[:, i]) for i, name in enumerate(self.names)}

    @property
    def intervals(self) -> MetricIntervals:
        """Intervals of tables of these metrics where all chains are alike."""
        return MetricIntervals(self.names, self.provenance.judged_by.consistency_range)

    def fewest_of(self, *samples: Tensor) -> Tensor:
        """Count the chains as ``counts_of``, for CC those of its part that has the fewest."""
        counts = self.counts_of(*samples)
        if self.parts:
            parts = torch.stack(samples[3 : 3 + len(self.parts)])
            there = (~parts.isnan()).sum(dim=1)
            counts[CC] = torch.where(there > 0, there, len(self)).amin(dim=0)
        return counts

    @cached_property
    def estimates(self) -> dict[str, list[float]]:
        """Every metric per turn without its interval, which takes longer."""
        return dict(zip(self.names, self.per_turn(*self.samples).tolist(), strict=True))

    @property
    def score(self) -> float:
        """One number, higher is better: Overall at the last turn, or IF where there is no CC."""
        name = "overall" if CONSISTENCY in self.terms else "instruction_following"
        return self.estimates[name][-1]

    @property
    def numbers(self) -> dict[str, float]:
        """All estimates in the flat form that trackers take, such as "held_out/overall/turn_3"."""
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
        """Write everything to a JSON file, atomically; its folder is made."""
        write_atomically(path, self.encoded)

    @property
    def encoded(self) -> bytes:
        """Content of the file that ``write`` writes."""
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
        """Read what ``write`` has written; every score is bit for bit as it was.

        Raises:
            ValueError: the file holds something else; the message names file and place.
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
    """Raise unless consistency and its parts, where they are given, lie in their range.

    Raises:
        ValueError: a score lies outside; the message names the term and shows the values seen.
    """
    for name in (CONSISTENCY, *PARTS):
        if name in terms:
            check_range(name, terms[name].score, *bounds, slack=ROUNDING)


def outcomes(success: Tensor, judged: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics that are a share of one outcome per chain: outcome and counted, [C, N]."""
    so_far, all_judged = (x.long().cumprod(dim=1).bool() for x in (success, judged))
    return {METRICS[0]: (so_far, all_judged), METRICS[1]: (success, judged)}
