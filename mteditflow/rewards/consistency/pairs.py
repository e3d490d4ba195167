"""Pairs of images of a chain that content consistency compares, and their scores.

The scoring server and its client exchange the same classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mteditflow._checks import check_choice, check_full_precision, check_mask, check_rank
from mteditflow.chains import Chain
from mteditflow.rewards.faults import Lost
from mteditflow.rewards.scores import TurnScores, join, join_lost

PAIRINGS = ("reference", "consecutive")
TERMS = ("object", "background", "object_l1", "background_l1")

Index = Annotated[int, Field(ge=0, strict=True)]
Cosine = Annotated[float, Field(ge=-1 - 1e-5, le=1 + 1e-5)]  # tolerates rounding; not clamped
Share = Annotated[float, Field(ge=0, le=1)]


class Pair(BaseModel):
    """Two images of a chain, with the objects that must look the same in both.

    Attributes:
        source: index of the image to compare with, in the chain's N + 1 images.
        edited: index of the image that is scored.
        unchanged_objects: names of the objects that must look the same; if empty, there is no
            object term.
        all_objects: names of the objects that are not background; if empty, there is no background
            term.
        background: whether the background must look the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Index
    edited: Index
    unchanged_objects: tuple[str, ...] = ()
    all_objects: tuple[str, ...] = ()
    background: Annotated[bool, Field(strict=True)] = True


class PairScores(BaseModel):
    """Terms of one pair; ``None`` if a term does not exist.

    Attributes:
        object: similarity of the features of the unchanged objects, a cosine in [-1, 1].
        background: similarity of the features of the background, a cosine in [-1, 1].
        object_l1: 1 - mean absolute difference of the objects' pixels, in [0, 1].
        background_l1: 1 - mean absolute difference of the background's pixels, in [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    object: Cosine | None = None
    background: Cosine | None = None
    object_l1: Share | None = None
    background_l1: Share | None = None


def pairs_of(chain: Chain, *, pairing: str = "reference") -> list[Pair]:
    """Pair the images of a chain, one pair per turn.

    Args:
        chain: a chain with ``unchanged_objects``, ``all_objects`` or both; if one of them is
            missing, its term is left out.
        pairing: "reference" compares the result of each turn with the reference image.
            "consecutive" compares it with the result of the turn before. It uses
            ``turn_unchanged_objects`` if known (otherwise ``unchanged_objects``, a subset of them),
            and omits the background only at the turn that changes it.

    Returns:
        N pairs. If the chain has neither ``background_consistency`` nor ``task_types``, it is
        unknown whether the background must stay, and there is no background term.

    Raises:
        ValueError: the chain has no names of objects at all, or the pairing is unknown.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 13 to 16 and its appendix for consecutive pairs.

    Example:
        >>> chain = Chain(id="7", image="7.png", instructions=("Remove the cat", "Add a hat"),
        ...     unchanged_objects=(("dog",), ("dog",)), all_objects=(("cat", "dog"),) * 2,
        ...     task_types=("subject_remove", "subject_add"))
        >>> [(pair.source, pair.edited) for pair in pairs_of(chain)]
        [(0, 1), (0, 2)]
        >>> [(pair.source, pair.edited) for pair in pairs_of(chain, pairing="consecutive")]
        [(0, 1), (1, 2)]
    """
    check_choice("pairing", pairing, PAIRINGS)
    if chain.unchanged_objects is None and chain.all_objects is None:
        raise ValueError(
            f"chain {chain.id!r}: expected unchanged_objects or all_objects, which content "
            "consistency needs, got neither; plan the chain to find them"
        )
    consecutive = pairing == "consecutive"
    nothing: tuple[tuple[str, ...], ...] = ((),) * chain.turns
    unchanged = chain.unchanged_objects or nothing
    if consecutive:
        unchanged = chain.turn_unchanged_objects or unchanged
    kept = _kept_background(chain, consecutive)
    everything = chain.all_objects if kept is not None and chain.all_objects else nothing
    return [
        Pair(
            source=n if consecutive else 0,
            edited=n + 1,
            unchanged_objects=unchanged[n],
            all_objects=everything[n],
            background=kept is None or kept[n],
        )
        for n in range(chain.turns)
    ]


def _kept_background(chain: Chain, consecutive: bool) -> list[bool] | None:
    """Return for each turn whether its background must equal the source's; None if unknown."""
    types, consistent = chain.task_types, chain.background_consistency
    if types is not None and (consecutive or consistent is None):
        kept = [task_type != "background_change" for task_type in types]
        return kept if consecutive else [all(kept[: n + 1]) for n in range(chain.turns)]
    if consistent is None or not consecutive:
        return None if consistent is None else list(consistent)
    # A flag stays False after the first change: only the turn where it turns False changed it.
    before = (True, *consistent[:-1])
    return [now or not then for now, then in zip(consistent, before, strict=True)]


def image_pairs(
    chains: Sequence[Chain], images: Sequence[Sequence[Image.Image]], *, pairing: str
) -> list[tuple[Sequence[Image.Image], list[Pair]]]:
    """Combine every chain's N + 1 images with its pairs.

    Raises:
        ValueError: the number of lists or of images is wrong, or as in ``pairs_of``.
    """
    if len(images) != len(chains):
        raise ValueError(
            f"images: expected one list for each of {len(chains)} chains, got {len(images)}"
        )
    for chain, shown in zip(chains, images, strict=True):
        if len(shown) != chain.turns + 1:
            raise ValueError(
                f"images: expected {chain.turns + 1} for chain {chain.id!r}, the reference and one "
                f"per turn, got {len(shown)}"
            )
    return [
        (shown, pairs_of(chain, pairing=pairing))
        for chain, shown in zip(chains, images, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class ConsistencyScores:
    """Content consistency of B trajectories of up to N turns, by term.

    Args:
        object: feature similarity of the unchanged objects, [B, N], float32 or float64; NaN where
            there is no such term.
        background: feature similarity of the background, likewise.
        object_l1: pixel similarity of the unchanged objects, likewise.
        background_l1: pixel similarity of the background, likewise.
        turn_mask: turns that exist, boolean [B, N].
        lost: (trajectory, turn) to the reason why its scores were lost; those entries are NaN.

    Raises:
        ValueError: shapes differ.
        TypeError: a dtype is not the one stated.
    """

    object: Tensor
    background: Tensor
    object_l1: Tensor
    background_l1: Tensor
    turn_mask: Tensor
    lost: dict[tuple[int, int], Lost]

    def __post_init__(self) -> None:
        for name in TERMS:
            check_full_precision(**{name: getattr(self, name)})
            check_rank(name, getattr(self, name), 2, "[B, N]", maximum=2)
            check_mask("turn_mask", self.turn_mask, getattr(self, name).shape, "[B, N]")

    @property
    def scores(self) -> TurnScores:
        """Content consistency of each turn: mean of the feature terms that exist, [B, N]."""
        return self._mean(self.object, self.background)

    @property
    def l1_scores(self) -> TurnScores:
        """L1 variant of content consistency: mean of the pixel terms that exist, [B, N]."""
        return self._mean(self.object_l1, self.background_l1)

    def _mean(self, *terms: Tensor) -> TurnScores:
        return TurnScores(torch.stack(terms).nanmean(dim=0), self.turn_mask, self.lost)

    @classmethod
    def concatenate(cls, parts: Sequence[ConsistencyScores]) -> ConsistencyScores:
        """Join batches of trajectories in order; N becomes that of the longest.

        Raises:
            ValueError: there is no part.
        """
        terms = {
            name: join([getattr(part, name) for part in parts], padding=torch.nan) for name in TERMS
        }
        mask = join([part.turn_mask for part in parts], padding=False)
        lost = join_lost([(len(part.turn_mask), part.lost) for part in parts])
        return cls(**terms, turn_mask=mask, lost=lost)

    @classmethod
    def collect(
        cls, answers: Sequence[Sequence[PairScores] | Lost], turns: Sequence[int]
    ) -> ConsistencyScores:
        """Arrange the answers for B chains of any lengths as [B, N].

        Args:
            answers: for each chain the scores of its pairs in order, or their loss.
            turns: number of turns of each chain.

        Raises:
            ValueError: there is no chain, or an answer does not have one entry per turn.
        """
        if not turns or len(answers) != len(turns):
            raise ValueError(
                f"answers: expected one for each of one or more chains, got {len(answers)} "
                f"answers for {len(turns)} chains"
            )
        shape = (len(turns), max(turns))
        mask = (
            torch.arange(shape[1], dtype=torch.int64, device="cpu")
            < torch.tensor(turns, dtype=torch.int64, device="cpu")[:, None]
        )
        terms = {
            name: torch.full(shape, torch.nan, dtype=torch.float32, device="cpu") for name in TERMS
        }
        lost: dict[tuple[int, int], Lost] = {}
        for b, (answer, n) in enumerate(zip(answers, turns, strict=True)):
            if isinstance(answer, Lost):
                lost |= {(b, turn): answer for turn in range(n)}
                continue
            if len(answer) != n:
                raise ValueError(f"answers[{b}]: expected {n} pairs, got {len(answer)}")
            for name in TERMS:
                values = [getattr(scores, name) for scores in answer]
                row = [torch.nan if value is None else value for value in values]
                terms[name][b, :n] = torch.tensor(row, dtype=torch.float32, device="cpu")
        return cls(**terms, turn_mask=mask, lost=lost)
