"""Edit-R2's metadata: one chain per line, lists over turns under names in the singular."""

from __future__ import annotations

from mteditflow.chains.errors import ChainError
from mteditflow.chains.formats.base import Record, join, json_lines, known_types, with_id, without
from mteditflow.chains.record import Chain

NAMES = {
    "instruction": "instructions",
    "task_type": "task_types",
    "formatted_instruction": "formatted_instructions",
    "bg_consistency": "background_consistency",
}
OBJECTS = ("unchanged_objects", "available_objects", "all_objects")


def _decode(record: Record, number: int) -> Record:
    record = with_id(record, number)
    if isinstance(record.get("instruction"), str):  # one turn, written without lists over turns
        record |= {key: [record[key]] for key in (*NAMES, *OBJECTS) if key in record}
    turns = record.pop("turns", None)
    unknown = () if known_types("task_type", record.get("task_type", ())) else ("task_type",)
    own = {key: record.pop(key) for key in NAMES if key in record and key not in unknown}
    instructions = own.get("instruction")
    if turns is not None and isinstance(instructions, list) and turns != len(instructions):
        raise ChainError(f"turns: expected {len(instructions)}, as instructions, got {turns!r}")
    return join({NAMES[key]: value for key, value in own.items()}, record)


def _encode(chain: Chain) -> Record:
    record = chain.to_record()
    own = {key: record[native] for key, native in NAMES.items() if native in record}
    return join({**own, "turns": chain.turns}, without(chain, *NAMES.values()))


EDIT_R2 = json_lines(
    "edit-r2",
    about="Edit-R2's {split}_metadata.jsonl, of one turn or several",
    keys={"instruction", "image"},
    decode=_decode,
    encode=_encode,
)
