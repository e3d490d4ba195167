"""Metadata of flow_grpo and Edit-R1: one instruction and one image per line."""

from __future__ import annotations

from mteditflow.chains.formats.base import (
    Record,
    join,
    json_lines,
    single_turn,
    take,
    with_id,
    without,
)
from mteditflow.chains.record import Chain


def _decode(record: Record, number: int) -> Record:
    record = with_id(record, number)
    prompt = take(record, "prompt", str, "text")
    return join({"instructions": [prompt]}, record)


def _encode(chain: Chain) -> Record:
    return join({"prompt": single_turn(chain)}, without(chain, "instructions"))


FLOW_GRPO = json_lines(
    "flow-grpo",
    about="flow_grpo's and Edit-R1's {split}_metadata.jsonl, one turn",
    refuses="several turns",
    keys={"prompt", "image"},
    decode=_decode,
    encode=_encode,
)
