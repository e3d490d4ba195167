"""The native format: one record per line."""

from __future__ import annotations

from mteditflow.chains.formats.base import json_lines
from mteditflow.chains.record import Chain

NATIVE = json_lines(
    "native",
    about="one mteditflow record per line (chain.schema.json)",
    keys={"instructions"},
    decode=lambda record, _: record,
    encode=Chain.to_record,
)
