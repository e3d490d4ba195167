"""The table of objectives: ``python -m docs.render_objectives`` writes it into equations.md.

Rows come from ``mteditflow.objectives.OBJECTIVES`` and the ``card`` of each class; the part of the
page between the two markers is replaced. Only the rows of the regularizers are written here.
"""

from __future__ import annotations

import re
from pathlib import Path

from mteditflow.objectives import OBJECTIVES, Objective

PAGE = Path(__file__).with_name("equations.md")
START, END = "<!-- objectives: start -->\n", "<!-- objectives: end -->\n"
COLUMNS = (
    "objective", "class", "in the trainer", "paper", "needs beside the policy", "forward passes",
    "losses",
)  # fmt: skip
# Regularizers are fields of objectives, not objectives.
REGULARIZERS = (
    ("+ KL to the reference", "", "`--objective.kl-coef`", "", "reference", "+ 1",
     "`gaussian_kl`, `velocity_kl`"),
    ("+ NormGuard", "", "`--objective.norm-coef`", "2606.27771", "reference", "+ 1",
     "`velocity_norm_hinge`"),
)  # fmt: skip
# Objectives without a reward have a program of their own.
DISTILLATION = "[`self_distillation.py`](../examples/self_distillation.py)"


def table() -> str:
    """Return the table of all objectives and regularizers as Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [_row(name, kind) for name, kind in OBJECTIVES.items()]
    rows += [tuple(_linked(cell) for cell in row) for row in REGULARIZERS]
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)


def page(text: str) -> str:
    """Return the page with the table as it is now.

    Args:
        text: page with both markers.

    Raises:
        ValueError: a marker is missing or there are several.
    """
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{PAGE.name}: expected one {START.strip()} and one {END.strip()}")
    before, _, rest = text.partition(START)
    return before + START + table() + END + rest.partition(END)[2]


def _word(name: str, kind: type[Objective]) -> str:
    """Return the words that choose an objective; distillation is its program's own."""
    word = f"`objective:{name}`"
    if kind.card.rewarded:
        return word
    return DISTILLATION if name == "distillation" else f"{DISTILLATION} {word}"


def _row(name: str, kind: type[Objective]) -> tuple[str, ...]:
    card = kind.card
    return (
        card.title,
        f"`objectives.{kind.__name__}`",
        _word(name, kind),
        _linked(", ".join(card.papers)),
        card.needs,
        card.passes,
        ", ".join(f"`{loss}`" for loss in card.losses),
    )


def _linked(text: str) -> str:
    """Link numbers of arXiv."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)


def main() -> None:
    """Write the table into the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
