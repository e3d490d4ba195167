"""MagicBrush's ``edit_sessions.json``: one JSON object that maps an image id to its turns."""

from __future__ import annotations

from itertools import pairwise
from pathlib import PurePosixPath

from mteditflow.chains.formats.base import Record, as_object
from mteditflow.chains.formats.entries import entry_format
from mteditflow.chains.record import Chain, ChainError, shorten

STEP = ("input", "mask", "output", "instruction")  # keys of a turn


def _decode(name: object, session: object) -> Record:
    if not isinstance(session, list) or not session:
        raise ChainError(f"expected a list of turns with {', '.join(STEP)}, got {shorten(session)}")
    turns = [_turn(number, turn) for number, turn in enumerate(session, start=1)]
    for number, (before, after) in enumerate(pairwise(turns), start=2):
        if after["input"] != before["output"]:
            raise ChainError(
                f"input of turn {number}: expected the output of the turn before, "
                f"{before['output']!r}, got {after['input']!r}"
            )
    lists = {f"{key}s": [turn.get(key) for turn in turns] for key in ("mask", "output")}
    image = f"images/{name}/{turns[0]['input']}"
    return {"id": name, "image": image, "instructions": [x["instruction"] for x in turns], **lists}


def _turn(number: int, turn: object) -> Record:
    """Return one turn after a check of its keys; the mask may be missing."""
    record = as_object(turn, ", ".join(STEP))
    for key in ("input", "output", "instruction"):
        if not isinstance(record.get(key), str):
            got = shorten(record.get(key))
            raise ChainError(f"{key} of turn {number}: expected text, got {got}")
    return record


def _encode(chain: Chain) -> list[Record]:
    extra = chain.model_extra or {}
    if (parts := PurePosixPath(chain.reference).parts)[-3:-1] != ("images", chain.id):
        got = "/".join(parts[-3:])
        raise ChainError(f"image: expected a file in 'images/{chain.id}/', got {got!r}")
    for key in ("masks", "outputs"):
        if not isinstance(extra.get(key), (list, tuple)) or len(extra[key]) != chain.turns:
            got = shorten(extra.get(key))
            raise ChainError(f"{key}: expected one for each of {chain.turns} turns, got {got}")
    inputs = [PurePosixPath(chain.reference).name, *extra["outputs"]]
    # ``inputs`` has one entry more: the last output is the input of no turn.
    steps = zip(inputs, extra["masks"], extra["outputs"], chain.instructions, strict=False)
    return [dict(zip(STEP, step, strict=True)) for step in steps]


MAGICBRUSH = entry_format(
    "magicbrush",
    about="MagicBrush's edit_sessions.json; images are images/<id>/<input>",
    keys={"input", "output", "instruction"},
    decode=_decode,
    encode=_encode,
    loses="all but id, instructions, masks, outputs and the name of the image",
    refuses="an image elsewhere; without masks and outputs",
)
