"""Groups that teach: which are dropped and why, and which chains are drawn again."""

import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import draw_probabilities, group_advantage, select_groups

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
NAN = math.nan
OPTIONS = {"top": 1.0, "bottom": 0.0, "spread": 0.1, "members": 3}


def exactly(message):
    return f"^{re.escape(message)}$"


@st.composite
def batches(draw):
    """Rewards with groups of any ids and sizes; what is invalid holds NaN."""
    rows = draw(st.integers(1, 12))
    reward = [draw(st.sampled_from([-0.5, 0.0, 0.1, 0.2, 0.9, 1.0, 1.5])) for _ in range(rows)]
    group = [draw(st.sampled_from([-7, 3, 90])) for _ in range(rows)]
    valid = [draw(st.sampled_from([True, True, False])) for _ in range(rows)]
    reward = torch.tensor(reward, dtype=torch.float64)
    reward[~torch.tensor(valid)] = NAN
    return reward, torch.tensor(group), torch.tensor(valid)


# groups


def test_golden_reasons():
    groups = {
        "kept": [0.0, 1.0, 0.5],
        "short": [1.0, 1.0, NAN],  # two valid members, both at the top
        "saturated": [1.0, 1.0, 1.2],
        "hopeless": [0.0, 0.0, -1.0],
        "flat": [0.5, 0.6, 0.55],
    }
    reward = torch.tensor([x for rows in groups.values() for x in rows])
    group = torch.arange(5).repeat_interleave(3)
    selection = select_groups(reward, group, valid=~reward.isnan(), **OPTIONS)
    assert selection.counts == dict.fromkeys(groups, 1)
    assert selection.keep.tolist() == [True] * 3 + [False] * 12


def test_only_equal_rewards_are_dropped_unless_more_is_asked_for():
    reward = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.3, 0.3 + 1e-6, 1.0])
    selection = select_groups(reward, torch.tensor([0, 0, 1, 1, 2, 2, 3]))
    assert selection.keep.tolist() == [False] * 4 + [True, True, False]
    assert selection.counts == {"kept": 1, "short": 1, "saturated": 0, "hopeless": 0, "flat": 2}


def fate(rewards, *, top, bottom, spread, members):
    """Of the valid rewards of one group, in plain Python."""
    if len(rewards) < members:
        return "short"
    if top is not None and min(rewards) >= top:
        return "saturated"
    if bottom is not None and max(rewards) <= bottom:
        return "hopeless"
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((x - mean) ** 2 for x in rewards) / len(rewards))
    return "flat" if len(set(rewards)) == 1 or std <= spread else "kept"


@given(
    batches(),
    st.sampled_from([None, 0.9]),
    st.sampled_from([None, 0.1]),
    st.sampled_from([0.0, 0.21]),
    st.sampled_from([2, 3]),
)
def test_selection_is_the_explicit_loop(batch, top, bottom, spread, members):
    reward, group, valid = batch
    options = {"top": top, "bottom": bottom, "spread": spread, "members": members}
    selection = select_groups(reward, group, valid=valid, **options)
    fates = {
        name: fate(reward[valid & (group == name)].tolist(), **options)
        for name in group.unique().tolist()
    }
    assert Counter(selection.counts) == Counter(fates.values()) | Counter(kept=0)
    expected = [fates[g] == "kept" and ok for g, ok in zip(group.tolist(), valid, strict=True)]
    assert selection.keep.tolist() == expected


@given(batches(), st.randoms())
def test_order_is_free_and_invalid_members_are_as_if_deleted(batch, rng):
    reward, group, valid = batch
    whole = select_groups(reward, group, valid=valid, **OPTIONS)
    order = rng.sample(range(len(reward)), len(reward))
    moved = select_groups(reward[order], group[order], valid=valid[order], **OPTIONS)
    assert torch.equal(moved.keep, whole.keep[order])
    assert moved.counts == whole.counts
    assert not (whole.keep & ~valid).any()
    if valid.any():
        left = select_groups(reward[valid], group[valid], **OPTIONS)
        assert torch.equal(left.keep, whole.keep[valid])


@given(batches())
def test_kept_groups_learn_what_they_did_before(batch):
    reward, group, valid = batch
    keep = select_groups(reward, group, valid=valid).keep
    before, after = (group_advantage(reward, group, valid=mask) for mask in (valid, keep))
    assert torch.equal(before, after)  # what is dropped by default had advantage 0


@pytest.mark.parametrize("device", DEVICES)
def test_the_mask_is_where_the_rewards_are(device):
    reward = torch.rand(4, device=device)
    assert select_groups(reward, torch.zeros(4, device=device).long()).keep.device == reward.device


def test_large_groups_are_counted_right_whatever_the_default_dtype():
    reward, group = torch.zeros(300), torch.zeros(300, dtype=torch.int64)
    reward[0] = 1
    torch.set_default_dtype(torch.bfloat16)  # counts up to 256
    try:
        assert select_groups(reward, group, members=300).counts["kept"] == 1
        assert select_groups(reward, group, members=301).counts["short"] == 1
    finally:
        torch.set_default_dtype(torch.float32)


def test_errors_of_selection():
    reward, group = torch.tensor([0.0, NAN]), torch.zeros(2).long()
    for arguments, options, message in (
        ((reward[:1], group[:1]), {"spread": -1.0}, "spread: expected a finite number in [0, inf]"),
        ((reward[:1], group[:1]), {"members": 1}, "members: expected an integer >= 2, got 1"),
        ((reward[:1], group[:1]), {"top": NAN}, "top: expected a finite number in [-inf, inf]"),
        (
            (reward[:1], group[:1]),
            {"top": 0.5, "bottom": 0.5},
            "bottom: expected a number below top = 0.5, got 0.5",
        ),
        (
            (reward, group),
            {},
            "reward: expected finite values (mark lost ones in valid, unmeasured ones in measured)",
        ),
        ((reward[None], group), {}, "reward: expected a non-empty tensor of shape [B]"),
        ((reward, group[:1]), {}, "group: expected shape [B] = [2], got [1]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            select_groups(*arguments, **options)
    with pytest.raises(TypeError, match="group: expected integer ids, got"):
        select_groups(reward, group.float())


# draws

spreads = st.lists(st.floats(0, 1e308), min_size=1, max_size=8)


def test_golden_probabilities():
    assert draw_probabilities([0.0, 1.0, 3.0, 0.0], uniform=0.4) == pytest.approx(
        [0.1, 0.25, 0.55, 0.1]
    )
    assert draw_probabilities([0.0, 0.0], uniform=0.4) == [0.5, 0.5]
    assert draw_probabilities([0.0, 9.0], uniform=1.0) == [0.5, 0.5]


@given(spreads, st.floats(0.01, 1), st.randoms())
def test_probabilities_rise_with_the_spread_and_never_fall_to_0(spread, uniform, rng):
    found = draw_probabilities(spread, uniform=uniform)
    assert sum(found) == pytest.approx(1)
    assert min(found) >= uniform / len(spread) * (1 - 1e-12)
    ordered = sorted(zip(spread, found, strict=True))
    assert [p for _, p in ordered] == sorted(found)
    order = rng.sample(range(len(spread)), len(spread))
    moved = draw_probabilities([spread[i] for i in order], uniform=uniform)
    assert moved == pytest.approx([found[i] for i in order])


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1.0, 1e300, 1.7e308])
def test_probabilities_do_not_depend_on_the_scale_of_the_spread(scale):
    assert draw_probabilities([scale], uniform=0.5) == [1.0]
    assert draw_probabilities([scale, scale, 0.0], uniform=0.4) == pytest.approx(
        [0.4 / 3 + 0.3, 0.4 / 3 + 0.3, 0.4 / 3], rel=1e-15
    )


def test_errors_of_draws():
    for spread, uniform, message in (
        ([], 0.2, "spread: expected one for each chain, got none"),
        ([1.0, -1.0], 0.2, "spread[1]: expected a finite number in [0, inf], got -1.0"),
        ([1.0, NAN], 0.2, "spread[1]: expected a finite number in [0, inf], got nan"),
        ([1.0], 0.0, "uniform: expected a finite number in (0, 1], got 0.0"),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            draw_probabilities(spread, uniform=uniform)


@pytest.mark.parametrize("name", ["top", "bottom"])
def test_bounds_are_numbers(name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        select_groups(torch.ones(2), torch.zeros(2, dtype=torch.int64), **{name: float("nan")})


def test_a_fifth_of_draws_is_even_unless_told_otherwise():
    assert draw_probabilities([0.0, 1.0]) == pytest.approx([0.1, 0.9])
