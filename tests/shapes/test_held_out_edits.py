"""Edits of held-out chains: by row, whatever else is edited, and as they are evaluated."""

import asyncio

import numpy as np
import torch
from mteditflow_examples.shapes.editor import Family
from mteditflow_examples.shapes.files import write_world
from mteditflow_examples.shapes.held_out import edit_held_out, evaluate_held_out
from mteditflow_examples.shapes.scoring import ExactRewards

from tests.loops import some


def test_some_rows_are_edited_as_all_are_and_all_as_they_are_evaluated(tmp_path):
    write_world(tmp_path, Family.kontext, seed=0, counts=(1, 4), turns=2)
    given = (tmp_path / "model", tmp_path / "held_out.jsonl")
    records, images = edit_held_out(*given, seed=3)
    chosen, some_images = edit_held_out(*given, seed=3, rows=[2, 0])
    assert [chain.id for chain in chosen] == [records[2].id, records[0].id]
    for row, made in some(zip((2, 0), some_images, strict=True)):
        assert len(made) == 3
        for ours, theirs in some(zip(made, images[row], strict=True)):
            apart = np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)
            assert np.abs(apart).max() <= 1  # batches of other sizes round otherwise
    found = evaluate_held_out(*given, seed=3)
    terms = asyncio.run(ExactRewards().score(records, images))
    assert torch.equal(found.terms["following"].score, terms["following"].score)
    assert list(found.chain_ids) == [chain.id for chain in records]
