"""A short run of klein's classes: rolled out one by one, replayed in batches, both objectives."""

import pytest
import torch
from shapes.editor import build_klein
from shapes.evaluate import edit_chains
from shapes.rewards import exact_rewards
from shapes.world import make_chains
from test_demo import Silent
from train_shapes import Objective, Recipe, train

pytestmark = pytest.mark.slow
RECIPE = Recipe(updates=1, learning_rate=1e-2, consistency_weight=0.5, chains=2, group=2, steps=3)


@pytest.mark.parametrize("objective", list(Objective))
def test_a_short_run_of_klein(objective):
    pipeline, log = build_klein(seed=0), Silent()
    with torch.no_grad():  # an untrained editor of no colour at all gets equal rewards: make some
        pipeline.transformer.proj_out.weight.mul_(0.1)
    train(objective, RECIPE, 0, pipeline, log, exact_rewards)
    weights = [w for name, w in pipeline.transformer.named_parameters() if ".current." in name]
    assert all(weight.isfinite().all() for weight in weights)
    assert log.scores[0].following.score.shape == (4, 3)


def test_klein_edits_chains_one_by_one():
    pipeline = build_klein(seed=0)
    chains = make_chains(2, turns=2, seed=0, split="train")
    pictures = edit_chains(pipeline, chains, torch.Generator().manual_seed(0), steps=2)
    assert pictures.shape == (2, 2, 3, 12, 12)
    generator = torch.Generator().manual_seed(0)
    parts = [edit_chains(pipeline, [chain], generator, steps=2) for chain in chains]
    assert torch.equal(pictures, torch.cat(parts))
