"""Chains before and after training: those that gained turns, and those that lost some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


def draw_before_after(
    before: Evaluation,
    after: Evaluation,
    images_before: Images,
    images_after: Images,
    *,
    count: int = 4,
) -> Figure | None:
    """Draw the chains of ``risen_and_fallen``, before above after; its words are the title.

    Args:
        before: evaluation of the base model.
        after: evaluation of the same chains, from the same noise.
        images_before: [reference, turn 1, ..., turn N] by row of ``before``; only the rows that
            ``risen_and_fallen`` names are looked up.
        images_after: the same of ``after``.
        count: chains to draw, at most.

    Returns:
        The figure, or ``None`` if no chain changed.
    """
    rows, how = risen_and_fallen(before, after, count=count)
    strips = [
        Strip(
            *(f"chain {evaluation.chain_ids[row]}", evaluation.instructions[row], images[row]),
            *(evaluation.terms, row, label),
        )
        for row in rows
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
