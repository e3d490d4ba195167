"""Formats with one JSON object per line: native, Edit-R2, flow_grpo, Pico-Banana, SEED-Data-Edit.

Each can also be read from a JSON array of the same objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, BinaryIO

from mteditflow.chains.formats.base import (
    OBJECTS,
    Format,
    Record,
    Row,
    attempt,
    join,
    known_types,
    numbered_lines,
    parse_object,
    single_turn,
    take,
    take_turns,
    with_id,
    with_turns,
    without,
)
from mteditflow.chains.formats.entries import entries
from mteditflow.chains.record import Chain, ChainError, one_line, shorten

ARRAY = re.compile(rb"\s*\[\s*\{")


def is_array(file: BinaryIO) -> bool:
    """Whether an open file is one JSON array of objects, rather than lines; its position is kept.

    A file whose first line is a whole array and is followed by more lines is read as lines.
    """
    start = file.tell()
    try:
        if not ARRAY.match(file.read(4096)):
            return False
        file.seek(start)
        # "[{...}]" alone is an array; followed by further lines, it is a bad first line.
        return not _is_json(file.readline()) or not any(line.strip() for line in file)
    finally:
        file.seek(start)


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def json_lines(
    name: str,
    *,
    about: str,
    keys: Collection[str],
    decode: Callable[[Record, int], Record],
    encode: Callable[[Chain], Record],
    refuses: str = "none",
) -> Format:
    """Return a format with one JSON object per line; it loses nothing, since any key fits.

    Args:
        name: name on the command line.
        about: one-line description.
        keys: keys that identify a line of this format.
        decode: function of a parsed line and its number that returns the native record.
        encode: function of a chain that returns the object of its line; it and ``decode`` raise
            ``ChainError`` for input that they cannot convert.
        refuses: chains that the format cannot hold.
    """

    def encode_line(chain: Chain) -> str:
        return one_line(encode(chain)) + "\n"

    read = partial(_read, decode, keys)
    return Format(name, about, "nothing", refuses, read, encode_line, frozenset(keys), decode)


def _read(
    decode: Callable[[Record, int], Record], keys: Collection[str], file: BinaryIO
) -> Iterator[Row]:
    """Yield rows line by line, or entry by entry; an entry's number is its place in the array."""

    def of_line(raw: bytes, number: int) -> Record:
        return decode(parse_object(raw), number)

    def of_entry(value: object, number: int) -> Record:
        if isinstance(value, ChainError):
            raise value
        if not isinstance(value, dict):
            raise ChainError(f"expected one JSON object, got {shorten(value)}")
        return decode(value, number)

    if is_array(file):
        for number, entry in enumerate(entries(file.read(), "[", keys), start=1):
            yield entry.line, attempt(of_entry, entry.value, number)
    else:
        for number, raw in numbered_lines(file):
            yield number, attempt(of_line, raw, number)


NATIVE = json_lines(
    "native",
    about="one mteditflow record per line (chain.schema.json)",
    keys={"instructions"},
    decode=lambda record, _: record,
    encode=Chain.to_record,
)


R2_NAMES = {
    "instruction": "instructions",
    "task_type": "task_types",
    "formatted_instruction": "formatted_instructions",
    "bg_consistency": "background_consistency",
}


def _decode_edit_r2(record: Record, number: int) -> Record:
    record = with_id(record, number)
    if isinstance(record.get("instruction"), str):  # a single-turn file has no lists over turns
        record |= {key: [record[key]] for key in (*R2_NAMES, *OBJECTS) if key in record}
    turns = record.pop("turns", None)
    # Edit types outside TASK_TYPES stay under their own key, unvalidated, to be written again.
    unknown = () if known_types("task_type", record.get("task_type", ())) else ("task_type",)
    own = {key: record.pop(key) for key in R2_NAMES if key in record and key not in unknown}
    instructions = own.get("instruction")
    if turns is not None and isinstance(instructions, list) and turns != len(instructions):
        raise ChainError(f"turns: expected {len(instructions)}, as instructions, got {turns!r}")
    return join({R2_NAMES[key]: value for key, value in own.items()}, record)


def _encode_edit_r2(chain: Chain) -> Record:
    record = chain.to_record()
    own = {key: record[native] for key, native in R2_NAMES.items() if native in record}
    return join({**own, "turns": chain.turns}, without(chain, *R2_NAMES.values()))


EDIT_R2 = json_lines(
    "edit-r2",
    about="Edit-R2's {split}_metadata.jsonl, of one turn or several",
    keys={"instruction", "image"},
    decode=_decode_edit_r2,
    encode=_encode_edit_r2,
)


def _decode_flow_grpo(record: Record, number: int) -> Record:
    record = with_id(record, number)
    prompt = take(record, "prompt", str, "text")
    return join({"instructions": [prompt]}, record)


def _encode_flow_grpo(chain: Chain) -> Record:
    return join({"prompt": single_turn(chain)}, without(chain, "instructions"))


FLOW_GRPO = json_lines(
    "flow-grpo",
    about="flow_grpo's and Edit-R1's {split}_metadata.jsonl, one turn",
    refuses="several turns",
    keys={"prompt", "image"},
    decode=_decode_flow_grpo,
    encode=_encode_flow_grpo,
)


PICO_PROMPTS = "metadata_edit_turn_prompts"
PICO_ORIGINAL = "original_input_image"
PICO_LOCAL = "local_input_image"  # added by the script that locates the images; may be null


def _decode_pico_banana(record: Record, number: int) -> Record:
    record = with_id(record, number)
    instructions = take(record, PICO_PROMPTS, list, "a list of text")
    files = take(record, "files", list, "a list of {id, url}")
    url = _original(files)
    local = record.pop(PICO_LOCAL, None)
    fields: Record = {"image": url if local is None else local, "instructions": instructions}
    if files != _files(fields["image"]):  # kept only if the image alone cannot restore it
        fields["files"] = files
    return join(fields, record)


def _encode_pico_banana(chain: Chain) -> Record:
    rest = without(chain, "image", "instructions")
    files = rest.pop("files", _files(chain.reference))
    own: Record = {"files": files, PICO_PROMPTS: chain.instructions}
    if _original(files) != chain.image:
        own[PICO_LOCAL] = chain.image
    return join(own, rest)


def _files(image: str) -> list[dict[str, str]]:
    return [{"id": PICO_ORIGINAL, "url": image}]


def _original(files: Any) -> Any:
    entries = files if isinstance(files, (list, tuple)) else ()
    for entry in entries:
        if isinstance(entry, dict) and entry.get("id") == PICO_ORIGINAL and "url" in entry:
            return entry["url"]
    raise ChainError(f"files: expected one with id {PICO_ORIGINAL!r} and a url, got none")


PICO_BANANA = json_lines(
    "pico-banana",
    about="Pico-Banana-400K's multi-turn JSON Lines",
    keys={PICO_PROMPTS},
    decode=_decode_pico_banana,
    encode=_encode_pico_banana,
)


def _decode_seed(record: Record, number: int) -> Record:
    record = with_id(record, number)
    image = take(record, "source_image", str, "the path of an image")
    return join({"image": image, "instructions": take_turns(record, "instruction_")}, record)


def _encode_seed(chain: Chain) -> Record:
    rest = without(chain, "image", "instructions")
    turns = with_turns("instruction_", chain.instructions, rest)
    return join({"source_image": chain.image}, turns)


SEED_DATA_EDIT = json_lines(
    "seed-data-edit",
    about="SEED-Data-Edit's part 3, multi-turn JSON Lines",
    keys={"source_image", "instruction_1"},
    decode=_decode_seed,
    encode=_encode_seed,
)
