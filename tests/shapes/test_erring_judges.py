"""Judges that err: what a lenient look passes, how much bias and noise there is, and repeatably."""

import asyncio
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mteditflow_examples.shapes.rewards import Truth, lenient_likert, score
from mteditflow_examples.shapes.scoring import CarefulJudge, ErringJudge, ExactRewards, HastyJudge
from mteditflow_examples.shapes.served import record_of
from mteditflow_examples.shapes.vision import pixels_of, to_pil
from mteditflow_examples.shapes.world import Chain, Edit, State, Thing, draw, random_chain

from tests.loops import some

quick = settings(max_examples=15, deadline=None)
RED, BLUE = Thing("square", "red", "solid", (0,)), Thing("circle", "blue", "solid", (3,))
START = State("white", (RED, BLUE))
GREEN = Edit("color_alter", "red", "square", "green")


class Lenient(ErringJudge):
    """Bias alone."""

    leniency, spread = 1.0, 0.0


class Faultless(ErringJudge):
    """Neither."""

    leniency, spread = 0.0, 0.0


class Noisy(ErringJudge):
    """Noise alone."""

    leniency, spread = 0.0, 1.0


def drawn(count, turns=3, seed=0):
    rng = random.Random(seed)
    return [random_chain(rng, turns, "train", linked=0.5) for _ in range(count)]


def spoilt(chain, seed):
    """A reference and true pictures, of which some pixels are not right."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.stack([draw(state) for state in chain.states])
    share = 0.5 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    wrong = torch.rand(len(pictures), 1, 12, 12, generator=generator) < share
    wrong[0] = False
    return [to_pil(x) for x in torch.where(wrong, 1 - pictures, pictures)]


def judged(judge, chains, images):
    return asyncio.run(judge().score([record_of(chain) for chain in chains], images))


def lenient(*made):
    """Score pictures as turn 1 of the square turning green."""
    images = torch.stack([draw(state)[None] for state in made])
    return lenient_likert(images, Truth.of([Chain(START, (GREEN,))] * len(made))).flatten().tolist()


# the lenient look


def test_a_lenient_look_passes_right_places_and_right_colours():
    right = GREEN.apply(START)
    yellow = Edit("color_alter", "red", "square", "yellow").apply(START)
    elsewhere = State("white", (Thing("square", "green", "solid", (1,)), BLUE))
    nothing = State("white", (BLUE,))
    assert lenient(right, yellow, elsewhere, nothing) == [5, 5, 5, 1]


def test_a_lenient_look_passes_what_an_exact_one_does_not():
    truth = Truth.of([Chain(START, (GREEN,))])
    images = draw(START)[None, None]
    assert score(images, truth).likert.item() == 1
    assert lenient_likert(images, truth).item() == 5  # something is where something should be
    images[..., images.new_ones(12, 12) > 0] = 0.3  # a color that has no name is nothing
    assert lenient_likert(images, truth).item() == 1


@quick
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_a_lenient_look_never_gives_less(seed, turns):
    chains = drawn(4, turns, seed)
    images = torch.stack([torch.stack([draw(s) for s in c.states[1:]]) for c in chains])
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(4, turns, 1, 12, 12, generator=generator) < 0.2
    images = torch.where(wrong, 1 - images, images)
    truth = Truth.of(chains)
    assert (lenient_likert(images, truth) >= score(images, truth).likert).all()


# judges


@quick
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_a_judge_without_leniency_and_noise_is_exact(seed, turns):
    chains = drawn(4, turns, seed)
    images = [spoilt(chain, seed + b) for b, chain in enumerate(chains)]
    exact, found = (judged(judge, chains, images) for judge in (ExactRewards, Faultless))
    for name, scores in some(exact.items()):
        assert torch.equal(found[name].score, scores.score)


def test_all_leniency_without_noise_is_the_lenient_look():
    chains = drawn(8)
    images = [spoilt(chain, b) for b, chain in enumerate(chains)]
    shown = torch.stack([torch.stack([pixels_of(image) for image in made[1:]]) for made in images])
    expected = lenient_likert(shown / 255, Truth.of(chains)).float()
    assert torch.equal(judged(Lenient, chains, images)["following"].score, expected)


@pytest.mark.parametrize("judge", [HastyJudge, CarefulJudge])
def test_only_following_is_judged_with_errors_and_on_the_scale(judge):
    chains = drawn(64)
    images = [spoilt(chain, b) for b, chain in enumerate(chains)]
    exact, found = judged(ExactRewards, chains, images), judged(judge, chains, images)
    for name in ("consistency", "strict"):
        assert torch.equal(found[name].score, exact[name].score)
    score = found["following"].score
    assert set(score.unique().tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    assert not torch.equal(score, exact["following"].score)
    assert not found["following"].lost


@quick
@given(st.integers(0, 2**32), st.sampled_from([HastyJudge, CarefulJudge]))
def test_the_same_is_judged_alike_whatever_is_judged_beside_it(seed, judge):
    chains = drawn(5, 3, seed)
    images = [spoilt(chain, seed + b) for b, chain in enumerate(chains)]
    whole = judged(judge, chains, images)["following"].score
    order = random.Random(seed).sample(range(5), 3)
    some = judged(judge, [chains[b] for b in order], [images[b] for b in order])
    assert torch.equal(some["following"].score, whole[order])
    first = judged(judge, chains, [made[:2] for made in images])  # a shorter rollout
    assert torch.equal(first["following"].score, whole[:, :1])


def test_noise_is_drawn_anew_for_another_chain_or_turn():
    """The first and the third turn show the same picture."""
    green = State("white", (Thing("square", "green", "solid", (0,)), BLUE))
    back = Edit("color_alter", "green", "square", "red")
    chains = [Chain(START, (GREEN, back, GREEN)) for _ in range(40)]
    pictures = [[to_pil(draw(x)) for x in (START, green, START, green)] for _ in chains]
    records = [record_of(chain).model_copy(update={"id": str(b)}) for b, chain in enumerate(chains)]
    score = asyncio.run(Noisy().score(records, pictures))["following"].score
    assert len(score.unique(dim=0)) > 5  # of 40 chains that differ by name alone
    assert (score[:, 0] != score[:, 2]).any()  # of turns that show the same picture


def test_noise_is_drawn_anew_for_another_picture():
    """Members of a group, which are equally right and differ in one pixel of the background."""
    record, members = record_of(Chain(START, (GREEN,))), []
    for place in range(12):
        made = draw(GREEN.apply(START)).clone()
        made[:, 11, place] = 0.3
        members.append([to_pil(draw(START)), to_pil(made)])
    exact, noisy = (
        asyncio.run(judge().score([record] * 12, members))["following"].score
        for judge in (ExactRewards, Noisy)
    )
    assert exact.eq(5).all()
    assert len(noisy.unique()) > 1


def test_bias_and_variance_are_what_the_judges_stand_for():
    """Of turns that a lenient look overrates: one judge errs more on average, one in spread."""
    chains = drawn(250)
    images = [spoilt(chain, b) for b, chain in enumerate(chains)]
    exact = judged(ExactRewards, chains, images)["following"].score
    look = judged(Lenient, chains, images)["following"].score
    rows = ((exact == 2) | (exact == 3)) & (look > exact)
    assert rows.sum() > 100
    hasty, careful = (
        (judged(judge, chains, images)["following"].score - exact)[rows]
        for judge in (HastyJudge, CarefulJudge)
    )
    assert hasty.mean() > 3 * careful.mean().abs()
    assert careful.std() > hasty.std()
