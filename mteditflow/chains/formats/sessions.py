"""Benchmarks of long editing sessions: LME-Bench's ``lme_bench.json``, and rows of MSE-Bench.

The keys of LME-Bench's document are those of the public repository (liangbingzhao/MT-OPSD). Its
``metadata.jsonl`` has the same sessions but was not available, so only the document is a format.
The columns of MSE-Bench are those of the data set's card (leigangqu/MSE-Bench).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from mteditflow.chains.formats.base import (
    Format,
    Record,
    Row,
    as_object,
    attempt,
    join,
    take,
    without,
)
from mteditflow.chains.formats.entries import entries
from mteditflow.chains.formats.lines import json_lines
from mteditflow.chains.record import Chain, ChainError, one_line, shorten

LME_OWN = ("category", "source_prompt", "labels")  # unknown keys of the native record
LME_KEYS = frozenset({"id", "turns", *LME_OWN})
ITEMS = re.compile(rb'"items"\s*:\s*(?=\[)')


def _read_lme(file: BinaryIO) -> Iterator[Row]:
    raw = file.read()
    match = ITEMS.search(raw)
    if match is None:
        yield 1, ChainError('expected an object with the sessions under "items", got none')
        return
    above = raw.count(b"\n", 0, match.end())  # ``entries`` counts lines from its own start
    for line, _, value in entries(raw[match.end() :], "[", LME_KEYS, tail="}"):
        record = value if isinstance(value, ChainError) else attempt(_decode_lme, value)
        yield above + line, record


def _decode_lme(value: object) -> Record:
    item = as_object(value, ", ".join(sorted(LME_KEYS)))
    name = take(item, "id", str, "text")
    turns = take(item, "turns", list, "a list of text")
    labels = item.get("labels", turns)
    if not isinstance(labels, list) or len(labels) != len(turns):
        got = shorten(labels)
        raise ChainError(f"labels: expected one for each of {len(turns)} turns, got {got}")
    image = item.pop("image", _lme_image(name))
    return join({"id": name, "image": image, "instructions": turns}, item)


def _lme_image(name: str) -> str:
    return f"images/{name}.png"


def _encode_lme(chain: Chain) -> str:
    rest = without(chain, "id", "image", "instructions")
    for key in LME_OWN:
        if key not in rest:
            raise ChainError(f"{key}: expected this field, which LME-Bench has, got none")
    own: Record = {"id": chain.id}
    if chain.image != _lme_image(chain.id):
        own["image"] = chain.image
    return "  " + one_line(join({**own, "turns": chain.instructions}, rest))


LME = Format(
    "lme",
    about="LME-Bench's lme_bench.json; images are images/<id>.png",
    loses="nothing",
    refuses="without category, source_prompt and labels",
    read=_read_lme,
    encode=_encode_lme,
    keys=LME_KEYS,
    head='{"items": [\n',
    between=",\n",
    tail="\n]}\n",
)


def _decode_mse(record: Record, _: int) -> Record:
    index = take(record, "index", int, "a whole number")
    context = take(record, "context", list, "a list of text")
    return join({"id": str(index), "instructions": context}, record)


def _encode_mse(chain: Chain) -> Record:
    if not re.fullmatch(r"0|[1-9]\d{0,17}", chain.id):
        raise ChainError(f"id: expected a number, as MSE-Bench's index, got {chain.id!r}")
    rest = without(chain, "id", "instructions")
    return join({"index": int(chain.id), "context": chain.instructions}, rest)


MSE = json_lines(
    "mse",
    about="MSE-Bench's rows, their images written to files",
    keys={"index", "context"},
    decode=_decode_mse,
    encode=_encode_mse,
    refuses="an id that is no number",
)
