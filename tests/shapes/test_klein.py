"""Klein's pipeline takes one chain at a time: rolled out together or alone, they are the same."""

import torch
from shapes.editor import build_klein
from shapes.evaluate import edit_chains
from shapes.world import make_chains


def test_klein_edits_chains_one_by_one():
    pipeline = build_klein(seed=0)
    chains = make_chains(2, turns=2, seed=0, split="train")
    pictures = edit_chains(pipeline, chains, torch.Generator().manual_seed(0), steps=2)
    assert pictures.shape == (2, 2, 3, 12, 12)
    generator = torch.Generator().manual_seed(0)
    parts = [edit_chains(pipeline, [chain], generator, steps=2) for chain in chains]
    assert torch.equal(pictures, torch.cat(parts))
