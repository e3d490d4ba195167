"""ImgEdit-Bench's ``basic_edit.json``: one JSON object, its keys the ids, one turn each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from mteditflow.chains.formats.base import (
    STRICT,
    Format,
    Record,
    Row,
    attempt,
    decode_text,
    join,
    single_turn,
    take,
    without,
)
from mteditflow.chains.record import Chain, ChainError, one_line, shorten

CATEGORIES = {
    "subject_add": "add",
    "subject_remove": "remove",
    "subject_replace": "replace",
    "background_change": "background",
    "color_alter": "adjust",
    "material_alter": "adjust",
}
# Categories of one edit type alone; "adjust" may be color, material or something else.
TYPES = {
    category: kind
    for kind, category in CATEGORIES.items()
    if list(CATEGORIES.values()).count(category) == 1
}
DECODER = json.JSONDecoder(**STRICT)


def _read(file: BinaryIO) -> Iterator[Row]:
    """Go from entry to entry, so that a bad one costs no other."""
    line, start = 1, 0
    try:
        text = decode_text(file.read())
        position = _pass(text, 0, "{")
        while not text.startswith("}", position):
            line, start = line + text.count("\n", start, position), position
            name, position = _scan(text, position)
            entry, position = _scan(text, _pass(text, position, ":"))
            yield line, attempt(_decode, name, entry)
            if not text.startswith("}", position):
                position = _pass(text, position, ",")
        if text[position + 1 :].strip():
            raise ChainError(f"expected the end, got {shorten(text[position + 1 :][:80])}")
    except ChainError as error:
        yield line, error


def _decode(name: object, entry: object) -> Record:
    if not isinstance(entry, dict):
        raise ChainError(f"expected an object with id, prompt, edit_type, got {shorten(entry)}")
    image = take(entry, "id", str, "the path of an image")
    prompt = take(entry, "prompt", str, "text")
    category = take(entry, "edit_type", str, "text")
    types = entry.pop("task_types", None) or [TYPES.get(category)]
    fields: Record = {"id": name, "image": image, "instructions": [prompt]}
    if types != [None]:
        fields["task_types"] = types
    if CATEGORIES.get(str(types[0])) != category:
        fields["edit_type"] = category
    return join(fields, entry)


def _encode(chain: Chain) -> str:
    prompt, category = single_turn(chain), category_of(chain)
    own = {"id": chain.image, "prompt": prompt, "edit_type": category}
    said = category in TYPES and chain.task_types == (TYPES[category],)
    rest = without(chain, "id", "image", "instructions", "edit_type", *["task_types"] * said)
    return f"    {json.dumps(chain.id, ensure_ascii=False)}: {one_line(join(own, rest))}"


def category_of(chain: Chain) -> str:
    """ImgEdit's category of a chain of one turn: its own word for it, or that of its edit type.

    Raises:
        ChainError: the chain has neither, or its edit type has no category.
    """
    extra = (chain.model_extra or {}).get("edit_type")
    if isinstance(extra, str):
        return extra
    if chain.task_types is None:
        raise ChainError("edit_type: expected this field, or task_types, got none")
    if chain.task_types[0] not in CATEGORIES:
        expected = f"one that ImgEdit has a category for, of {sorted(CATEGORIES)}"
        raise ChainError(f"task_types: expected {expected}, got {chain.task_types[0]!r}")
    return CATEGORIES[chain.task_types[0]]


def _scan(text: str, position: int) -> tuple[object, int]:
    """Parse the value that begins here; return it, and where what follows it begins."""
    try:
        value, end = DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise ChainError(f"expected JSON, got {shorten(text[position:][:80])} ({error})") from error
    return value, _pass(text, end, "")


def _pass(text: str, position: int, character: str) -> int:
    """Go past a character, and the white space around it."""
    match = re.compile(rf"\s*{re.escape(character)}\s*").match(text, position)
    if not match:
        raise ChainError(f"expected {character!r}, got {shorten(text[position:][:80])}")
    return match.end()


IMGEDIT = Format(
    "imgedit",
    about="ImgEdit-Bench's basic_edit.json, one turn",
    loses="nothing",
    refuses="several turns; an edit type without a category",
    read=_read,
    encode=_encode,
    head="{\n",
    between=",\n",
    tail="\n}\n",
)
