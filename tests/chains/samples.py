"""Chains drawn at random, and small files in the shape of the public formats (``data``).

The files have the columns, keys and oddities of the public ones, not their content: in EdiVal's,
stray double quotes, an apostrophe within a text, a full stop at the end; in Edit-R2's, a line of
one turn without lists over turns; in Pico-Banana's, a chain with a local image and one without.
"""

import struct
import zlib
from pathlib import Path

from hypothesis import strategies as st

from mteditflow.chains import TASK_TYPES, Chain

DATA = Path(__file__).parent / "data"
FILES = {
    "native": DATA / "native.jsonl",
    "edival": DATA / "edival.csv",
    "edit-r2": DATA / "edit_r2.jsonl",
    "pico-banana": DATA / "pico_banana.jsonl",
    "flow-grpo": DATA / "flow_grpo.jsonl",
    "seed-data-edit": DATA / "seed_data_edit.jsonl",
    "imgedit": DATA / "imgedit.json",
    "imgedit-multi-turn": DATA / "imgedit_multi_turn.json",
    "magicbrush": DATA / "magicbrush.json",
    "lme": DATA / "lme.json",
    "mse": DATA / "mse.jsonl",
}

texts = st.text(min_size=1, max_size=12).filter(str.strip)
leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
values = st.recursive(
    leaves | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
unknown_keys = st.text(min_size=1, max_size=8).filter(lambda key: key not in TAKEN)
TAKEN = {
    *Chain.model_fields,
    *("instruction", "task_type", "formatted_instruction", "bg_consistency", "turns", "prompt"),
    *("files", "metadata_edit_turn_prompts", "local_input_image", "edit_type", "source_image"),
    *("context", "index"),
}


@st.composite
def chains(draw, most_turns=3, types=TASK_TYPES, text=texts, complete=False, extra=True):
    """Chains with any of the optional fields, or with all of them."""
    count = draw(st.integers(1, most_turns))

    def per_turn(entries):
        lists = st.lists(entries, min_size=count, max_size=count)
        return draw(lists if complete else st.none() | lists)

    names = st.lists(text, max_size=2)
    fields = {
        "task_types": per_turn(st.sampled_from(types)),
        "formatted_instructions": per_turn(text),
        "unchanged_objects": per_turn(names),
        "all_objects": per_turn(names),
        "available_objects": per_turn(names),
        "background_consistency": per_turn(st.booleans()),
    }
    if extra:
        fields["turn_unchanged_objects"] = per_turn(names)
        fields["references"] = per_turn(st.sampled_from([["last"], ["last", "x.png"]]))
        fields |= draw(st.dictionaries(unknown_keys, values, max_size=3))
    instructions = draw(st.lists(text, min_size=count, max_size=count))
    return Chain(id=draw(texts), image=draw(texts), instructions=instructions, **fields)


def files_of_chains(**options):
    """Lists of chains whose ids differ."""
    return st.lists(chains(**options), min_size=1, max_size=3, unique_by=lambda chain: chain.id)


def png_header(width, height):
    """A PNG of that size with no pixels in it: 45 bytes that ask for up to gigabytes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(b""), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(x) - 4) + x + struct.pack(">I", zlib.crc32(x)) for x in chunks
    )
