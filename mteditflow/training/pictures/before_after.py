"""Chains before and after training: those that gained turns, those that lost some, and others.

The best and the worst alone flatter or alarm; chains drawn at random show what is usual.
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
    """Rows of held-out chains, and how they were chosen."""

    rows: list[int]
    how: str


def risen_and_fallen(before: Evaluation, after: Evaluation, *, count: int) -> Choice:
    """Choose the chains whose number of followed turns rose most, and as many that fell most.

    Where fewer fell, more that rose take their place, and the other way round. Only chains judged
    at every turn in both evaluations are looked at; of equals the first ones are taken.

    Args:
        before: evaluation of the base model.
        after: evaluation of the same chains.
        count: how many to choose, at most.
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
    """Draw rows of chains judged at every turn in both evaluations, each at most once.

    Args:
        before: evaluation of the base model.
        after: evaluation of the same chains.
        count: how many to draw, at most.
        seed: of the draw.
        without: rows that are not drawn.
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
    """Draw the chains of ``risen_and_fallen`` and some at random, before above after.

    Each is labeled by why it is shown, and the title says how all were chosen.

    Args:
        before: evaluation of the base model.
        after: evaluation of the same chains, from the same noise.
        images_before: [reference, turn 1, ..., turn N] by row of ``before``; only the rows that
            are drawn are looked up.
        images_after: the same of ``after``.
        count: chains that gained or lost turns, at most.
        random: chains drawn at random of all others that count, at most.
        seed: of this draw.

    Returns:
        The figure, or ``None`` if no chain counts in both.
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
