"""Formats with one JSON object per line: native, Edit-R2, flow_grpo, Pico-Banana."""

from __future__ import annotations

from typing import Any

from mteditflow.chains.formats.base import (
    OBJECTS,
    Record,
    join,
    json_lines,
    known_types,
    single_turn,
    take,
    with_id,
    without,
)
from mteditflow.chains.record import Chain, ChainError

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
    if isinstance(record.get("instruction"), str):  # one turn, written without lists over turns
        record |= {key: [record[key]] for key in (*R2_NAMES, *OBJECTS) if key in record}
    turns = record.pop("turns", None)
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
PICO_LOCAL = "local_input_image"  # added by the script that finds the images; may be null


def _decode_pico_banana(record: Record, number: int) -> Record:
    record = with_id(record, number)
    instructions = take(record, PICO_PROMPTS, list, "a list of text")
    files = take(record, "files", list, "a list of {id, url}")
    url = _original(files)
    local = record.pop(PICO_LOCAL, None)
    fields: Record = {"image": url if local is None else local, "instructions": instructions}
    if files != _files(fields["image"]):
        fields["files"] = files
    return join(fields, record)


def _encode_pico_banana(chain: Chain) -> Record:
    rest = without(chain, "image", "instructions")
    files = rest.pop("files", _files(chain.image))
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
