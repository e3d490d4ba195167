"""Gallery of chains on one self-contained HTML page: images, instructions and scores.

The page filters by edit type and by failure at a turn. The filter is part of its address
(``gallery.html#type=color_alter&failed=2``), and the page works by keyboard alone.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from PIL import Image

from mteditflow.chains import Chain
from mteditflow.evaluation.evaluation import Evaluation
from mteditflow.rewards.images import to_rgb

SIDE = 256  # maximum side in pixels; the browser enlarges smaller images
Images = Sequence[Image.Image]


class Series(NamedTuple):
    """Edited images and scores of one editor.

    Attributes:
        name: name of the editor.
        evaluation: scores of the chains.
        images: row of the evaluation to [reference, turn 1, ..., turn N]; a mapping may load the
            images of a row on access.
    """

    name: str
    evaluation: Evaluation
    images: Mapping[int, Images]


def gallery(
    series: Sequence[Series], chains: Sequence[Chain], rows: Sequence[int], *, title: str
) -> str:
    """Return the page as HTML.

    Args:
        series: results of editors on the same chains; each chain shows one line of images of each.
        chains: all chains, in the order of the evaluations.
        rows: rows of the chains to show, in the order of the page.
        title: title of the page.

    Returns:
        HTML with embedded images, at most 256 pixels a side.

    Raises:
        ValueError: ``series`` is empty, or a chain does not have one image more than turns.

    Example:
        >>> import torch
        >>> from mteditflow.rewards import TurnScores
        >>> scores = TurnScores(torch.ones(1, 1), torch.ones(1, 1) > 0, {})
        >>> evaluation = Evaluation(0, ["7"], [["Add a dog"]], {"following": scores}, success_at=1)
        >>> chain = Chain(id="7", image="7.png", instructions=("Add a dog",))
        >>> images = {0: [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]}
        >>> page = gallery([Series("mine", evaluation, images)], [chain], [0], title="Mine")
        >>> page.startswith("<!doctype html>"), "Add a dog" in page
        (True, True)
    """
    if not series:
        raise ValueError("series: expected at least one, got none")
    shown = [_chain(series, chains[row], row) for row in rows]
    types = dict.fromkeys(x for chain in shown for x in chain["types"] or ())
    turns = max((len(chain["instructions"]) for chain in shown), default=0)
    sources = [{"name": x.name, **x.evaluation.provenance.stated} for x in series]
    data = {"chains": shown, "types": list(types), "turns": turns, "of": len(chains)}
    data["sources"] = sources
    data["denominators"] = [f"{one.name}: {_denominators(one.evaluation)}" for one in series]
    # Escaped, since text of a chain that holds "</script>" would end the script element.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    page = resources.files(__package__).joinpath("gallery.html").read_text(encoding="utf-8")
    before, _, after = page.partition("{{data}}")
    return before.replace("{{title}}", html.escape(title)) + text + after


def _denominators(evaluation: Evaluation) -> str:
    """Return one line: chains behind each metric by turn, lost scores, turns without a measure."""
    counts = [f"{name} {' / '.join(map(str, n))}" for name, n in evaluation.counts.items()]
    nothing = [f"{name} {count}" for name, count in evaluation.unmeasured.items()]
    lost = int((~evaluation.complete).sum())
    return (
        f"chains by turn: {', '.join(counts)}; {lost} lost a score; turns with nothing to measure: "
        f"{', '.join(nothing) or 'none'}"
    ).replace("_", " ")


def _chain(series: Sequence[Series], chain: Chain, row: int) -> dict[str, Any]:
    """Return the data of a chain for the script of the page."""
    made = []
    for one in series:
        reference, *edited = one.images[row]
        if len(edited) != chain.turns:
            raise ValueError(
                f"images of chain {chain.id!r}: expected {chain.turns} after the reference, "
                f"got {len(edited)}"
            )
        scores = [_turn(one.evaluation, row, n) for n in range(chain.turns)]
        pictures = [_embedded(image) for image in edited]
        made.append({"name": one.name, "images": pictures, "turns": scores})
    return {
        "id": chain.id,
        "reference": _embedded(reference),
        "instructions": chain.instructions,
        "types": chain.task_types,
        "series": made,
    }


def _turn(evaluation: Evaluation, row: int, turn: int) -> dict[str, Any]:
    """Return scores of a turn, reasons of lost ones, and whether it was followed (None: unknown).

    A score is None if it was lost, and "not measured" if there was nothing to measure.
    """
    scores: dict[str, float | str | None] = {}
    lost = []
    for name, term in evaluation.terms.items():
        value = float(term.score[row, turn])
        missing = None if (row, turn) in term.lost else "not measured"
        scores[name] = missing if value != value else round(value, 4)
        if (row, turn) in term.lost:
            lost.append(f"{name}: {term.lost[row, turn]}")
    known = bool(evaluation.terms["following"].measured[row, turn])
    followed = bool(evaluation.success[row, turn]) if known else None
    return {"scores": scores, "followed": followed, "lost": lost}


def _embedded(image: Image.Image) -> str:
    """Return an image as a data URL."""
    small, stream = to_rgb("image", image).copy(), io.BytesIO()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    # Tiny images, such as those of the toy worlds, are shown pixel by pixel: no artifacts there.
    lossless = max(small.size) <= SIDE // 4
    small.save(stream, format="WEBP", lossless=lossless, quality=85)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
