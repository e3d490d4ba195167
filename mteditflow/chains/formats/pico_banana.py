"""Pico-Banana-400K's multi-turn lines: prompts, and a list of files with their ids."""

from __future__ import annotations

from typing import Any

from mteditflow.chains.errors import ChainError
from mteditflow.chains.formats.base import Record, join, json_lines, take, with_id, without
from mteditflow.chains.record import Chain

PROMPTS = "metadata_edit_turn_prompts"
ORIGINAL = "original_input_image"
LOCAL = "local_input_image"  # added by the script that looks the images up on disk; may be null


def _decode(record: Record, number: int) -> Record:
    record = with_id(record, number)
    instructions = take(record, PROMPTS, list, "a list of text")
    files = take(record, "files", list, "a list of {id, url}")
    url = _original(files)
    local = record.pop(LOCAL, None)
    fields: Record = {"image": url if local is None else local, "instructions": instructions}
    if files != _files(fields["image"]):
        fields["files"] = files
    return join(fields, record)


def _encode(chain: Chain) -> Record:
    rest = without(chain, "image", "instructions")
    files = rest.pop("files", _files(chain.image))
    own: Record = {"files": files, PROMPTS: chain.instructions}
    if _original(files) != chain.image:
        own[LOCAL] = chain.image
    return join(own, rest)


def _files(image: str) -> list[dict[str, str]]:
    return [{"id": ORIGINAL, "url": image}]


def _original(files: Any) -> Any:
    entries = files if isinstance(files, (list, tuple)) else ()
    for entry in entries:
        if isinstance(entry, dict) and entry.get("id") == ORIGINAL and "url" in entry:
            return entry["url"]
    raise ChainError(f"files: expected one with id {ORIGINAL!r} and a url, got none")


PICO_BANANA = json_lines(
    "pico-banana",
    about="Pico-Banana-400K's multi-turn JSON Lines",
    keys={PROMPTS},
    decode=_decode,
    encode=_encode,
)
