"""CR@k and wear: by hand, against loops, what lost turns do, and laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import collapse_rate, instruction_following, wear
from tests.loops import some

NAN = math.nan


@st.composite
def flags(draw, most_turns=5):
    """Flags of chains, and which of them are known, boolean [C, N] each."""
    chains, turns = draw(st.integers(1, 6)), draw(st.integers(1, most_turns))
    size = {"min_size": turns, "max_size": turns}
    rows = st.lists(st.lists(st.booleans(), **size), min_size=chains, max_size=chains)
    return torch.tensor(draw(rows)), torch.tensor(draw(rows))


def test_golden_sr_and_cr_of_lme_bench():
    """A chain that fails at turn 1 gives 0 everywhere; destroyed 3 and 4 count in CR@3."""
    assert instruction_following([[1, 0, 1]]).tolist() == [1, 0, 0]
    assert instruction_following([[0, 1, 1]]).tolist() == [0, 0, 0]
    destroyed = [
        [0, 0, 1, 1, 0],  # begins at turn 3, and stays collapsed
        [1, 0, 1, 0, 1],  # single turns: never
        [0, 0, 0, 0, 1],  # the last turn alone: never
        [1, 1, 0, 0, 0],  # begins at turn 1
    ]
    assert collapse_rate(destroyed).tolist() == [0.25, 0.25, 0.5, 0.5, 0.5]
    assert collapse_rate(torch.ones(2, 10)).tolist() == [1.0] * 10
    assert collapse_rate(torch.ones(2, 1)).tolist() == [0.0]  # no turn after it


def test_a_chain_counts_in_cr_while_the_flag_of_the_next_turn_is_known():
    """Flag 3 lost: the chain counts at k = 1, of which the look-ahead is turn 2, and no further."""
    destroyed = torch.tensor([[1.0, 1.0, NAN, 0.0], [0.0, 0.0, 0.0, 0.0]])
    rate = collapse_rate(destroyed, valid=~destroyed.isnan())
    assert rate.tolist() == [0.5, 0.0, 0.0, 0.0]
    assert collapse_rate([[1, 0]], valid=[[True, False]]).isnan().all()


@given(flags())
def test_cr_equals_the_loop(table):
    destroyed, valid = table
    turns = destroyed.shape[1]

    def onset(row):
        pairs = (t + 1 for t in range(turns - 1) if row[t] and row[t + 1])
        return next(pairs, math.inf)

    expected = []
    for k in range(1, turns + 1):
        known = [row for row, own in zip(destroyed.tolist(), valid.tolist(), strict=True)
                 if all(own[: min(k + 1, turns)])]  # fmt: skip
        expected.append(sum(onset(row) <= k for row in known) / len(known) if known else NAN)
    rate = collapse_rate(destroyed.double(), valid=valid)
    assert rate.dtype == torch.float64
    assert rate.tolist() == pytest.approx(expected, nan_ok=True)


@given(flags())
def test_sr_falls_and_cr_rises_where_nothing_is_lost(table):
    flag, _ = table
    assert (instruction_following(flag).diff() <= 0).all()
    assert (collapse_rate(flag).diff() >= 0).all()


def test_wrong_flags_are_refused():
    with pytest.raises(ValueError, match="destroyed: expected 0 or 1, got 2"):
        collapse_rate([[2.0, 0.0]])
    with pytest.raises(ValueError, match="destroyed: expected a non-empty tensor of shape"):
        collapse_rate([1, 0])
    with pytest.raises(TypeError, match="valid: expected a boolean mask"):
        collapse_rate([[1, 0]], valid=[[1, 0]])


# Wear


def pictures(seed, chains=2, turns=3):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(chains, turns, 3, 4, 5, generator=generator)
    original = torch.rand(chains, 3, 4, 5, generator=generator)
    return images, original, torch.rand(chains, turns, 4, 5, generator=generator) < 0.3


def test_golden_wear():
    """One of four pixels changes by 0.4 in one of two channels: 0.4 / 8; 0 outside of it."""
    original = torch.full((1, 2, 2, 2), 0.5)
    images = original[:, None].repeat(1, 2, 1, 1, 1)
    images[0, 0, 0, 0, 1], images[0, 1, 0, 0, 1] = 0.9, 0.9
    torch.testing.assert_close(wear(images, original), torch.full((1, 2), 0.05))
    edited = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    edited[0, 0, 0, 1] = True  # at turn 1, so at turn 2 too
    assert wear(images, original, edited=edited).tolist() == [[0, 0]]
    edited = edited.flip(1)  # at turn 2 alone
    torch.testing.assert_close(wear(images, original, edited=edited), torch.tensor([[0.05, 0.0]]))


@given(st.integers(0, 50))
def test_wear_equals_the_loop(seed):
    images, original, edited = pictures(seed)
    found = wear(images, original, edited=edited)
    for b, n in some([(b, n) for b in range(2) for n in range(3)]):
        outside = [
            float((images[b, n, c, y, x].double() - original[b, c, y, x].double()).abs())
            for y in range(4) for x in range(5) for c in range(3)
            if not edited[b, : n + 1, y, x].any()
        ]  # fmt: skip
        expected = sum(outside) / len(outside) if outside else NAN
        assert float(found[b, n]) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_nothing_left_and_lost_turns_are_nan_whatever_their_images_hold():
    images, original, edited = pictures(0)
    edited[0, 1] = True
    images[0, 1:], images[1, 2] = NAN, 7.0
    valid = torch.tensor([[True, True, True], [True, True, False]])
    found = wear(images, original, edited=edited, valid=valid)
    assert found.isnan().tolist() == [[False, True, True], [False, False, True]]
    images = images.clone().requires_grad_()
    wear(images, original, edited=edited, valid=valid).nansum().backward()
    assert images.grad.isfinite().all()
    outside = ~(edited.cumsum(1) > 0) & valid[:, :, None, None]
    assert torch.equal(images.grad.abs().sum(2) > 0, outside)


def test_wear_moves_with_the_distance_to_the_original():
    """A step against the gradient brings the image nearer to the original."""
    images, original, _ = pictures(3)
    images = images.double().requires_grad_()
    found = wear(images, original.double())
    assert found.dtype == torch.float64
    found.sum().backward()
    nearer = (images - 1e-3 * images.grad.sign()).clamp(0, 1).detach()
    assert (wear(nearer, original.double()) < found).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.full((2, 3, 3, 4, 5), 255)}, r"images: expected values in \[0, 1\]"),
        ({"original": -torch.ones(2, 3, 4, 5)}, r"original: expected values in \[0, 1\]"),
        ({"images": torch.zeros(2, 3, 4, 5)}, "images: expected a non-empty tensor of shape"),
        ({"original": torch.zeros(2, 3, 4, 4)}, "original: expected shape"),
        ({"edited": torch.zeros(2, 3, 4, 4) > 0}, "edited: expected shape"),
        ({"valid": torch.ones(2, 2) > 0}, "valid: expected shape"),
    ],
)
def test_wrong_pictures_are_refused(changes, message):
    images, original, edited = pictures(0)
    given = {"images": images, "original": original, "edited": edited} | changes
    with pytest.raises(ValueError, match=message):
        wear(given.pop("images"), given.pop("original"), **given)
    with pytest.raises(TypeError, match="edited: expected a boolean mask"):
        wear(images, original, edited=edited.float())
