"""The trainer's scorer gives the exact rewards of the pictures that it is shown."""

import asyncio
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mteditflow_examples.shapes import scoring
from mteditflow_examples.shapes.editor import enlarge
from mteditflow_examples.shapes.rewards import Truth, lenient_likert, score
from mteditflow_examples.shapes.scoring import (
    ExactRewards,
    NeighborRewards,
    ShortSightedJudge,
)
from mteditflow_examples.shapes.served import record_of
from mteditflow_examples.shapes.vision import pixels_of, to_pil
from mteditflow_examples.shapes.world import draw, random_chain

from tests.loops import some

quick = settings(max_examples=15, deadline=None)


def drawn(count, turns=3, seed=0):
    rng = random.Random(seed)
    return [random_chain(rng, turns, "train", linked=0.5) for _ in range(count)]


def edited(chain, seed):
    """A reference and true pictures, some of them spoilt, 8 bits a channel."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.stack([draw(state) for state in chain.states])
    spoilt = torch.rand(len(pictures), 1, 12, 12, generator=generator) < 0.3
    spoilt &= torch.rand(len(pictures), 1, 1, 1, generator=generator) < 0.6
    spoilt[0] = False
    return torch.where(spoilt, torch.rand(pictures.shape, generator=generator), pictures)


def ask(scorer, chains, images):
    return asyncio.run(scorer.score([record_of(chain) for chain in chains], images))


@quick
@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from([1, 8]))
def test_equal_to_the_rewards_of_the_same_pictures(seed, turns, scale):
    chains = drawn(3, turns, seed)
    chains.append(chains[0])  # a group shares its chain
    images = [
        [to_pil(enlarge(picture, scale)) for picture in edited(chain, seed + b)]
        for b, chain in enumerate(chains)
    ]
    shown = [torch.stack([pixels_of(image) for image in made[1:]]) for made in images]
    exact = score(torch.stack(shown)[..., ::scale, ::scale] / 255, Truth.of(chains))
    terms = ask(ExactRewards(), chains, images)
    assert list(terms) == ["following", "consistency", "consecutive", "strict"]
    assert torch.equal(terms["following"].score, exact.likert.float())
    assert torch.equal(terms["consistency"].score, exact.consistency)
    assert torch.equal(terms["consecutive"].score, exact.consecutive)
    assert torch.equal(terms["strict"].score, exact.strict.float())
    for scores in some(terms.values()):
        assert scores.turn_mask.all()
        assert not scores.lost


def test_perfect_edits_earn_everything_and_ignored_instructions_little():
    chains = drawn(4)
    perfect = [[to_pil(draw(state)) for state in chain.states] for chain in chains]
    terms = ask(ExactRewards(), chains, perfect)
    assert [float(terms[name].score.min()) for name in terms] == [5, 1, 1, 1]
    ignored = [made[:1] * 4 for made in perfect]
    terms = ask(ExactRewards(), chains, ignored)
    assert float(terms["following"].score[:, 0].max()) == 1  # a later turn may undo an earlier one
    assert float(terms["strict"].score[:, 0].max()) == 0
    assert float(terms["consistency"].score.min()) == 1
    assert float(terms["consecutive"].score.min()) == 1


def test_a_judge_of_neighbors_is_blind_to_what_an_earlier_turn_spoiled():
    """A block outside all edits, spoiled in turn 1 and left so, costs that turn alone."""
    chains = drawn(8)
    truth = Truth.of(chains)
    images = torch.stack([torch.stack([draw(s) for s in c.states]) for c in chains])
    images[:, 1:] = torch.where(truth.kept[:, -1][:, None, None], 0.3, images[:, 1:])
    shown = [[to_pil(picture) for picture in made] for made in images]
    exact, seen = ask(ExactRewards(), chains, shown), ask(NeighborRewards(), chains, shown)
    assert (exact["consistency"].score[:, -1] == 0).all()
    assert (seen["consistency"].score[:, 0] < 0.9).all()
    assert (seen["consistency"].score[:, 1:] == 1).all()
    assert (exact["strict"].score == 0).all()
    assert (seen["following"].score == 5).all()
    # What the turn changes must be right for both; doing nothing is not to follow.
    still = [made[:1] * 4 for made in shown]
    assert float(ask(NeighborRewards(), chains, still)["following"].score[:, 0].max()) == 1


@quick
@given(st.integers(0, 2**32))
def test_a_judge_of_neighbors_passes_what_exact_rewards_pass(seed):
    chains = drawn(4, seed=seed)
    shown = [[to_pil(picture) for picture in edited(chain, seed)] for chain in chains]
    exact, seen = ask(ExactRewards(), chains, shown), ask(NeighborRewards(), chains, shown)
    assert (seen["following"].score >= exact["following"].score).all()
    assert torch.equal(seen["consistency"].score, exact["consecutive"].score)


def test_a_short_sighted_judge_looks_closely_at_the_last_turn_alone():
    chains = drawn(32)
    shown = [[to_pil(picture) for picture in edited(chain, b)] for b, chain in enumerate(chains)]
    exact, short = ask(ExactRewards(), chains, shown), ask(ShortSightedJudge(), chains, shown)
    pixels = torch.stack([torch.stack([pixels_of(x) for x in made[1:]]) for made in shown])
    lenient = lenient_likert(pixels / 255, Truth.of(chains)).float()
    assert torch.equal(short["following"].score[:, :-1], lenient[:, :-1])
    assert torch.equal(short["following"].score[:, -1], exact["following"].score[:, -1])
    assert (lenient > exact["following"].score).any()
    for name in ("consistency", "consecutive", "strict"):
        assert torch.equal(short[name].score, exact[name].score)


def test_fewer_turns_than_instructions_are_scored_as_the_first_ones():
    chains = drawn(3)
    images = [[to_pil(picture) for picture in edited(chain, 1)] for chain in chains]
    full = ask(ExactRewards(), chains, images)
    cut = ask(ExactRewards(), chains, [made[: 2 + b] for b, made in enumerate(images)])
    for name, scores in some(cut.items()):
        assert scores.turn_mask.tolist() == [
            [True, False, False],
            [True, True, False],
            [True, True, True],
        ]
        assert torch.equal(scores.score[scores.turn_mask], full[name].score[scores.turn_mask])
        assert scores.score[~scores.turn_mask].isnan().all()


def test_a_chain_is_read_back_once(monkeypatch):
    [chain] = drawn(1)
    images = [[to_pil(draw(state)) for state in chain.states]]
    scorer, read = ExactRewards(), []
    real = scoring.chain_of
    monkeypatch.setattr(scoring, "chain_of", lambda *given: read.append(1) or real(*given))
    for _ in range(2):
        ask(scorer, [chain, chain], images * 2)
    assert read == [1]


@pytest.mark.parametrize("size", [(12, 24), (16, 16)])
def test_an_image_of_another_size_is_refused(size):
    [chain] = drawn(1)
    images = [[to_pil(draw(state)) for state in chain.states]]
    images[0][2] = images[0][2].resize(size)
    with pytest.raises(ValueError, match=f"multiple of 12 pixels, got {size[0]} x {size[1]}"):
        ask(ExactRewards(), [chain], images)


def test_a_picture_of_another_world_is_refused():
    [chain] = drawn(1)
    images = [[to_pil(torch.rand(3, 12, 12)) for _ in chain.states]]
    with pytest.raises(ValueError, match="expected a picture of the shapes world"):
        ask(ExactRewards(), [chain], images)


@pytest.mark.parametrize("scale", [1, 8])
def test_regions_are_the_masks_of_the_rewards_at_the_size_of_the_pictures(scale):
    chains = [*drawn(2, 3), *drawn(1, 2, seed=5)]
    images = [
        [to_pil(enlarge(picture, scale)) for picture in edited(chain, b)]
        for b, chain in enumerate(chains)
    ]
    records = [record_of(chain) for chain in chains]
    found, boxes = (
        asyncio.run(scorer().regions(records, images))
        for scorer in (ExactRewards, scoring.BoxedRewards)
    )
    for b, chain in some(enumerate(chains)):
        truth, turns = Truth.of([chain]), len(chain.edits)
        masks = {
            "following": truth.target[0],
            "consistency": truth.kept[0],
            "consecutive": ~truth.target[0],
        }
        for name, mask in some(masks.items()):
            expected = enlarge(mask[:, None].float(), scale)[:, 0]
            assert torch.equal(found[name][b, :turns], expected)
            assert not found[name][b, turns:].any()
    assert (boxes["following"] >= found["following"]).all()
    assert (boxes["consistency"] <= found["consistency"]).all()
    assert boxes["following"].sum() > found["following"].sum()
