"""Chains before and after training: those that gained turns, those that lost some, random ones.

The best and the worst alone would flatter or alarm; chains drawn at random show the typical case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image

from mteditflow.evaluation.comparison import judged_in_both
from mteditflow.evaluation.evaluation import Evaluation
from mteditflow.training.pictures.strips import Strip, draw_strips

Images = Sequence[Sequence[Image.Image]] | Mapping[int, Sequence[Image.Image]]


class Choice(NamedTuple):
    """Rows of held-out chains, and a sentence about how they were chosen."""

    rows: list[int]
    how: str


def risen_and_fallen(before: Evaluation, after: Evaluation, *, count: int) -> Choice:
    """Choose the chains with the largest rise and fall of the number of followed turns.

    Half of them rose and half fell; if there are too few of one kind, more of the other are chosen.
    Only chains judged at every turn in both evaluations count. Among equals the first are chosen.

    Args:
        before: evaluation of the base model.
        after: evaluation of the same chains after training.
        count: largest number of chains to choose.
    """
    counted = judged_in_both(before, after).nonzero().flatten()
    change = (after.success.sum(dim=1) - before.success.sum(dim=1))[counted]
    order = change.argsort(descending=True, stable=True)
    rose = counted[order][change[order] > 0].tolist()
    order = change.argsort(stable=True)
    fell = counted[order][change[order] < 0].tolist()
    falls = min(len(fell), max(count // 2, count - len(rose)))
    rises = min(len(rose), count - falls)
    how = (
        f"Of {len(counted)} held-out chains, {len(rose)} had more turns followed at round "
        f"{after.round} than at round {before.round}, and {len(fell)} had fewer. Shown: "
        f"{_shown(rises, len(rose), 'gained')}, then {_shown(falls, len(fell), 'lost')}."
    )
    return Choice(rose[:rises] + fell[:falls], how)


def random_rows(
    before: Evaluation, after: Evaluation, *, count: int, seed: int, without: Sequence[int] = ()
) -> list[int]:
    """Draw rows of chains judged at every turn in both evaluations, without replacement.

    Args:
        before: evaluation of the base model.
        after: evaluation of the same chains after training.
        count: largest number of rows to draw.
        seed: seed of the draw.
        without: rows that are excluded.
    """
    rows = judged_in_both(before, after).nonzero().flatten().tolist()
    left = [row for row in rows if row not in set(without)]
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(left), generator=generator, device="cpu")
    return [left[i] for i in order[:count].tolist()]


def draw_before_after(
    before: Evaluation,
    after: Evaluation,
    images_before: Images,
    images_after: Images,
    *,
    count: int = 4,
    random: int = 2,
    seed: int = 0,
) -> Figure | None:
    """Draw the chains of ``risen_and_fallen`` and some random ones, before above after.

    Each chain has a label with the reason why it is shown, and the title describes the choice.

    Args:
        before: evaluation of the base model.
        after: evaluation of the same chains after training, from the same noise.
        images_before: images [reference, turn 1, ..., turn N] by row of ``before``; only rows that
            are drawn are looked up.
        images_after: the same for ``after``.
        count: largest number of chains that gained or lost turns.
        random: largest number of chains drawn at random from the others.
        seed: seed of this draw.

    Returns:
        The figure, or ``None`` if no chain was judged at every turn in both evaluations.
    """
    changed, how = risen_and_fallen(before, after, count=count)
    others = random_rows(before, after, count=random, seed=seed, without=changed)
    gain = (after.success.long() - before.success.long()).sum(dim=1).tolist()
    reasons = {row: "gained" if gain[row] > 0 else "lost" for row in changed}
    reasons |= dict.fromkeys(others, "at random")
    if others:
        how += f" Then {len(others)} drawn at random (seed {seed}) of the others."
    strips = [
        Strip(
            f"{why}: chain {evaluation.chain_ids[row]}",
            evaluation.instructions[row],
            images[row],
            evaluation.terms,
            row,
            label,
        )
        for row, why in reasons.items()
        for label, evaluation, images in (
            ("before", before, images_before),
            ("after", after, images_after),
        )
    ]
    return draw_strips(strips, success_at=after.success_at, title=how) if strips else None


def _shown(shown: int, there: int, what: str) -> str:
    if not shown:
        return f"none that {what}"
    most = "all" if shown == there > 1 else "the"
    return f"{most} {shown} that {what}" + ("" if shown == there else " most")
