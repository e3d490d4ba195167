import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.shapes.rewards import LIKERT_STEPS, Truth, read, score
from examples.shapes.world import Chain, Edit, Thing, draw, make_chains, paint, random_chain
from examples.shapes.world import State as Picture

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(min_value=0, max_value=2**32)


def pictures(chains):
    return torch.stack([torch.stack([draw(s) for s in c.states[1:]]) for c in chains])


def drawn(seed, turns=3):
    return [random_chain(random.Random(seed), turns, "train")]


@quick
@given(seeds, st.integers(1, 6))
def test_the_true_pictures_get_everything(seed, turns):
    chains = drawn(seed, turns)
    scores = score(pictures(chains), Truth.of(chains))
    assert scores.likert.eq(5).all()
    assert scores.success.all()
    assert scores.strict.all()
    assert scores.consistency.eq(1).all()
    assert scores.consecutive.eq(1).all()


@quick
@given(seeds)
def test_doing_nothing_keeps_everything_and_follows_nothing(seed):
    chains = drawn(seed, turns=1)
    scores = score(draw(chains[0].initial)[None, None], Truth.of(chains))
    assert scores.consistency.eq(1).all()
    assert scores.likert.eq(1).all()
    assert not scores.success.any()
    assert not scores.strict.any()


@quick
@given(seeds, st.integers(0, 2))
def test_spoiling_pixels_never_helps(seed, turn):
    chains = drawn(seed)
    truth, images = Truth.of(chains), pictures(chains)
    generator = torch.Generator().manual_seed(seed)
    before = score(images, truth)
    for _ in range(6):
        spoiled = images.clone()
        spoiled[0, turn, :, torch.rand((12, 12), generator=generator) < 0.3] = 0.3
        images = torch.where(spoiled == 0.3, spoiled, images)
        after = score(images, truth)
        for name in ("likert", "success", "consistency", "strict"):
            assert (getattr(after, name).float() <= getattr(before, name).float()).all()
        before = after
    others = [n for n in range(3) if n != turn]
    assert before.strict[:, others].all()


@quick
@given(seeds)
def test_spoiling_what_must_not_change_costs_consistency_alone(seed):
    chains = drawn(seed)
    truth, images = Truth.of(chains), pictures(chains)
    kept = truth.kept[0, 2].nonzero()[0]
    images[0, 2, :, kept[0], kept[1]] = 0.3
    scores = score(images, truth)
    assert scores.consistency[0, 2].item() == pytest.approx(1 - 1 / truth.kept[0, 2].sum().item())
    others = (~truth.target)[0, 2].sum().item()
    assert scores.consecutive[0, 2].item() == pytest.approx(1 - 1 / others)
    assert scores.likert.eq(5).all()


@quick
@given(seeds)
def test_a_fault_that_stays_costs_the_original_every_turn_and_its_neighbors_one(seed):
    """A judge of neighbors sees the turn that wears a picture, and no later one."""
    chains = drawn(seed)
    truth, images = Truth.of(chains), pictures(chains)
    row, column = truth.kept[0, 2].nonzero()[0]
    images[0, :, :, row, column] = 0.3  # from turn 1 on
    scores = score(images, truth)
    assert (scores.consistency[0] < 1).tolist() == [True] * 3
    assert (scores.consecutive[0] < 1).tolist() == [True, False, False]


@quick
@given(seeds, st.integers(1, 6))
def test_something_must_always_be_kept_and_masks_are_apart(seed, turns):
    truth = Truth.of(drawn(seed, turns))
    assert truth.kept.flatten(2).any(-1).all()
    assert truth.changed.flatten(2).any(-1).all()
    assert not (truth.kept & truth.target).any()
    assert not (truth.changed & ~truth.target).any()
    assert not (truth.kept[:, 1:] & ~truth.kept[:, :-1]).any()


def test_likert_grades_by_hand():
    """A red square turns green: 25 pixels change; the score follows how many are right."""
    things = (Thing("square", "red", "solid", (0,)), Thing("circle", "blue", "solid", (3,)))
    chain = Chain(Picture("white", things), (Edit("color_alter", "red", "square", "green"),))
    truth = Truth.of([chain])
    wanted, initial = draw(chain.states[1]), draw(chain.initial)
    assert LIKERT_STEPS == (0.3, 0.5, 0.7, 0.9)
    for right, likert in {
        0: 1,
        7: 1,
        8: 2,
        12: 2,
        13: 3,
        17: 3,
        18: 4,
        22: 4,
        23: 5,
        25: 5,
    }.items():
        image = initial.clone()
        spots = truth.changed[0, 0].nonzero()[:right]
        image[:, spots[:, 0], spots[:, 1]] = wanted[:, spots[:, 0], spots[:, 1]]
        scores = score(image[None, None], truth)
        assert scores.likert.item() == likert
        assert scores.success.item() == (likert == 5)
        assert scores.strict.item() == (right >= 24)
        assert scores.consistency.item() == 1


def test_a_ruined_chain_cannot_look_obedient():
    """Turn 1 is ignored; turn 2 then acts on the wrong picture, as if it were right."""
    things = (Thing("square", "red", "solid", (0,)), Thing("diamond", "blue", "solid", (3,)))
    chain = Chain(
        Picture("white", things),
        (
            Edit("subject_replace", "red", "square", "circle"),
            Edit("color_alter", "red", "circle", "green"),
        ),
    )
    ignored = chain.initial
    obedient_looking = Edit("color_alter", "red", "square", "green").apply(ignored)
    scores = score(torch.stack([draw(ignored), draw(obedient_looking)])[None], Truth.of([chain]))
    assert scores.likert[0, 0] == 1
    assert not scores.strict.any()


def test_a_batch_equals_its_parts():
    chains = make_chains(8, turns=3, seed=0, split="train")
    truth = Truth.of(chains)
    images = pictures(chains)
    spoiled = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) < 0.05
    images = torch.where(spoiled, 0.3, images)
    whole = score(images, truth)
    for row in range(8):
        part = score(images[row : row + 1], truth.select(torch.tensor([row])))
        for name in ("likert", "success", "consistency", "consecutive", "strict"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[row : row + 1])


def test_small_noise_is_forgiven_and_large_is_not():
    index = torch.arange(9).repeat(16).reshape(12, 12).to(torch.int8)
    noise = torch.randn((3, 12, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(paint(index) + 0.03 * noise), index)
    assert (read(paint(index) + 2.0) == -1).all()


def test_wrong_shapes_are_named():
    truth = Truth.of(make_chains(2, turns=3, seed=0, split="train"))
    with pytest.raises(ValueError, match=r"images: expected shape \(2, 3, 3, 12, 12\), got"):
        score(torch.zeros(2, 2, 3, 12, 12), truth)
