"""ImgEdit-Bench's files: one JSON object whose keys are the ids, of one or several turns."""

from __future__ import annotations

from mteditflow.chains.formats.base import (
    Record,
    as_object,
    join,
    single_turn,
    take,
    take_turns,
    with_turns,
    without,
)
from mteditflow.chains.formats.entries import entry_format
from mteditflow.chains.record import Chain, ChainError

CATEGORIES = {
    "subject_add": "add",
    "subject_remove": "remove",
    "subject_replace": "replace",
    "background_change": "background",
    "color_alter": "adjust",
    "material_alter": "adjust",
}
# Categories with a single edit type; "adjust" is ambiguous (color, material or other).
TYPES = {
    category: kind
    for kind, category in CATEGORIES.items()
    if list(CATEGORIES.values()).count(category) == 1
}


def _decode(name: object, entry: object) -> Record:
    entry = as_object(entry, "id, prompt, edit_type")
    image = take(entry, "id", str, "the path of an image")
    prompt = take(entry, "prompt", str, "text")
    if "edit_type" not in entry:  # as in UGE_edit.json
        return join({"id": name, "image": image, "instructions": [prompt]}, entry)
    category = take(entry, "edit_type", str, "text")
    types = entry.pop("task_types", None) or [TYPES.get(category)]
    fields: Record = {"id": name, "image": image, "instructions": [prompt]}
    if types != [None]:
        fields["task_types"] = types
    # The category is kept unless the edit type gives it back, so that a file survives a round trip.
    if CATEGORIES.get(str(types[0])) != category:
        fields["edit_type"] = category
    return join(fields, entry)


def _encode(chain: Chain) -> Record:
    prompt, category = single_turn(chain), category_of(chain)
    own = {"id": chain.image, "prompt": prompt}
    if category is None:
        return join(own, without(chain, "id", "image", "instructions"))
    said = category in TYPES and chain.task_types == (TYPES[category],)
    rest = without(chain, "id", "image", "instructions", "edit_type", *["task_types"] * said)
    return join({**own, "edit_type": category}, rest)


def category_of(chain: Chain) -> str | None:
    """Return ImgEdit's category of a single-turn chain: its ``edit_type``, else by its task type.

    ``None`` if the chain has neither, so that its category is unknown.

    Raises:
        ChainError: ImgEdit has no category for the task type.
    """
    extra = (chain.model_extra or {}).get("edit_type")
    if isinstance(extra, str):
        return extra
    if chain.task_types is None:
        return None
    if chain.task_types[0] not in CATEGORIES:
        expected = f"one that ImgEdit has a category for, of {sorted(CATEGORIES)}"
        raise ChainError(f"task_types: expected {expected}, got {chain.task_types[0]!r}")
    return CATEGORIES[chain.task_types[0]]


IMGEDIT = entry_format(
    "imgedit",
    about="ImgEdit-Bench's basic_edit.json and UGE_edit.json, one turn",
    keys={"id", "prompt"},
    decode=_decode,
    encode=_encode,
    refuses="several turns; an edit type without a category",
)


def _decode_turns(name: object, entry: object) -> Record:
    record = as_object(entry, "id, turn1, turn2, ...")
    image = take(record, "id", str, "the path of an image")
    return join({"id": name, "image": image, "instructions": take_turns(record, "turn")}, record)


def _encode_turns(chain: Chain) -> Record:
    rest = without(chain, "id", "image", "instructions")
    return join({"id": chain.image}, with_turns("turn", chain.instructions, rest))


IMGEDIT_MULTI_TURN = entry_format(
    "imgedit-multi-turn",
    about="ImgEdit-Bench's multi-turn instructions, one file for each category",
    keys={"id", "turn1"},
    decode=_decode_turns,
    encode=_encode_turns,
)
