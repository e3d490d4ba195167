"""GARDO: uncertainty by ranks, gate, diversity, and the two numbers that follow a run."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import (
    GatedShare,
    ReferenceReset,
    diversity_advantage,
    group_diversity,
    rank_uncertainty,
    uncertainty_gate,
)

REWARD = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])
OTHERS = {
    "a": torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]),
    "b": torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0]),
}
VALID = torch.tensor([True, True, False, True, True])


def exactly(message):
    return f"^{re.escape(message)}$"


# uncertainty


def test_golden_uncertainty():
    # shares of four others: of the proxy 4, 1, 2, 2, 0; of a 0..4; of b 4..0, whose mean is 2
    assert rank_uncertainty(REWARD, OTHERS).tolist() == [0.5, -0.25, 0.0, 0.0, -0.5]
    # the sign: the first row is the proxy's best and the auxiliary's worst
    assert rank_uncertainty(REWARD, {"a": OTHERS["a"]})[0] == 1.0


@given(st.lists(st.tuples(*[st.integers(-3, 3)] * 3, st.booleans()), min_size=1, max_size=7))
def test_uncertainty_equals_the_loop(rows):
    def beaten(values, i):
        others = [j for j in range(len(rows)) if j != i and rows[j][3]]
        return sum(values[i] > values[j] for j in others) / max(len(others), 1)

    reward, a, b = ([float(row[k]) for row in rows] for k in range(3))
    expected = [
        (beaten(reward, i) - (beaten(a, i) + beaten(b, i)) / 2) * row[3]
        for i, row in enumerate(rows)
    ]
    valid = [row[3] for row in rows]
    assert rank_uncertainty(reward, {"a": a, "b": b}, valid=valid).tolist() == pytest.approx(
        expected
    )


def test_only_ranks_count_and_equal_ranks_are_certain():
    expected = rank_uncertainty(REWARD, OTHERS)
    moved = {name: x.exp() for name, x in OTHERS.items()}
    assert torch.equal(rank_uncertainty(REWARD**3 + 7, moved), expected)
    same = rank_uncertainty(REWARD, {"a": 2 * REWARD - 1, "b": REWARD.exp()})
    assert not same.any()
    assert not uncertainty_gate(same, 1.0).any()  # nobody is above what all are
    swapped = rank_uncertainty(OTHERS["a"], {"r": REWARD})
    assert torch.equal(swapped, -rank_uncertainty(REWARD, {"a": OTHERS["a"]}))


def test_turns_are_ranked_apart_and_invalid_entries_are_never_read():
    turns = torch.stack([REWARD, OTHERS["b"]], dim=1)
    found = rank_uncertainty(turns, {"a": torch.stack([OTHERS["a"]] * 2, dim=1)})
    for n in (0, 1):
        assert torch.equal(found[:, n], rank_uncertainty(turns[:, n], {"a": OTHERS["a"]}))
    broken = torch.where(VALID, REWARD, torch.nan)
    found = rank_uncertainty(broken, {"a": torch.where(VALID, OTHERS["a"], torch.nan)}, valid=VALID)
    assert torch.equal(found[VALID], rank_uncertainty(REWARD[VALID], {"a": OTHERS["a"][VALID]}))
    assert found[2] == 0
    assert found.dtype == torch.float32
    assert rank_uncertainty([1.0], {"a": [2.0]}).tolist() == [0.0]


def test_errors_of_uncertainty():
    with pytest.raises(ValueError, match=r"^auxiliary: expected at least one named reward, got no"):
        rank_uncertainty(REWARD, {})
    with pytest.raises(
        ValueError, match=r"^auxiliary\['a'\]: expected shape of reward = \[5\], got"
    ):
        rank_uncertainty(REWARD, {"a": REWARD[:4]})
    with pytest.raises(ValueError, match=r"^auxiliary\['a'\]: expected finite"):
        rank_uncertainty(REWARD, {"a": REWARD * math.nan})
    with pytest.raises(
        TypeError, match=r"^reward: expected float32 or float64, got torch\.float16"
    ):
        rank_uncertainty(REWARD.half(), OTHERS)


# gate


def test_the_gate_takes_the_most_uncertain():
    u = torch.tensor([0.3, -0.2, 0.9, 0.0, 0.1])
    assert not uncertainty_gate(u, 0.0).any()
    assert uncertainty_gate(u, 1.0).tolist() == [True, False, True, True, True]  # but the minimum
    # the quantile of 0.75 is the fourth of five, 0.3, and of 0.6 it is 0.1 + 0.4 * 0.2 = 0.18
    assert uncertainty_gate(u, 0.25).nonzero().flatten().tolist() == [2]
    assert uncertainty_gate(u, 0.4).nonzero().flatten().tolist() == [0, 2]
    # without the third row the quantile of 0.6 is 0 + 0.8 * 0.1
    lost = torch.where(VALID, u, torch.nan)
    assert uncertainty_gate(lost, 0.4, valid=VALID).nonzero().flatten().tolist() == [0, 4]
    both = uncertainty_gate(torch.stack([u, -u], dim=1), 0.25)
    assert both.nonzero().tolist() == [[1, 1], [2, 0]]
    nobody = uncertainty_gate(u, 0.5, valid=torch.zeros(5, dtype=torch.bool))
    assert not nobody.any()


def test_errors_of_the_gate():
    message = "share: expected a finite number in [0, 1], got 1.5"
    with pytest.raises(ValueError, match=exactly(message)):
        uncertainty_gate(REWARD, 1.5)
    with pytest.raises(ValueError, match=r"^uncertainty: expected finite values where valid"):
        uncertainty_gate(REWARD * math.nan, 0.5)
    with pytest.raises(
        ValueError, match=r"^uncertainty: expected a non-empty tensor of shape \[B\]"
    ):
        uncertainty_gate(torch.zeros(1, 1, 1), 0.5)


# diversity


def test_duplicates_are_of_no_diversity_and_lose_what_is_positive():
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 1.0], [-2.0, 0.0], [1.0, 0.0]])
    group = torch.tensor([4, 4, 4, 4, -1])
    # cosine distances: rows 0 and 1 are one direction; row 2 is 45 degrees off; row 3 135 from it
    expected = [0.0, 0.0, 1 - 0.5**0.5, 1 + 0.5**0.5, 1.0]
    diversity = group_diversity(features, group)
    assert diversity.tolist() == pytest.approx(expected)
    assert diversity[:2].tolist() == [0.0, 0.0]
    advantage = torch.tensor([2.0, -1.0, 1.0, -1.0, 0.5])
    found = diversity_advantage(advantage, diversity)
    assert found.tolist() == pytest.approx([0.0, -1.0, expected[2], -1.0, 0.5])


def test_diversity_equals_the_loop_in_any_order_and_scale():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, generator=random, dtype=torch.float64)
    group = torch.randint(0, 3, (12,), generator=random)
    valid = torch.rand(12, generator=random) > 0.2
    expected = []
    for i in range(12):
        others = [j for j in range(12) if j != i and group[j] == group[i] and valid[j]]
        cosines = [torch.cosine_similarity(features[i], features[j], dim=0) for j in others]
        nearest = min((1 - float(c) for c in cosines), default=1.0)
        expected.append(nearest if valid[i] else 0.0)
    broken = torch.where(valid[:, None], features, torch.nan)
    found = group_diversity(broken, group, valid=valid)
    assert found.tolist() == pytest.approx(expected)
    order = torch.randperm(12, generator=random)
    scaled = group_diversity(1e-3 * broken[order], group[order] - 2**40, valid=valid[order])
    torch.testing.assert_close(scaled, found[order])
    assert group_diversity(features.bfloat16(), group).dtype == torch.float32


def test_diversity_of_a_trajectory_goes_to_all_its_turns():
    advantage = torch.tensor([[1.0, -1.0], [2.0, 4.0]])
    found = diversity_advantage(advantage, [0.5, 0.25])
    assert found.tolist() == [[0.5, -1.0], [0.5, 1.0]]
    assert torch.equal(diversity_advantage(advantage, torch.ones(2, 2)), advantage)


def test_errors_of_diversity():
    x = torch.ones(3, 2)
    with pytest.raises(
        ValueError, match=r"^features: expected rows of a finite norm above 0, where"
    ):
        group_diversity(torch.zeros(3, 2), [0, 0, 0])
    with pytest.raises(ValueError, match=r"^group: expected shape \[B\] = \[3\], got \[2\]"):
        group_diversity(x, [0, 0])
    with pytest.raises(
        ValueError, match=r"^features: expected a non-empty tensor of shape \[B, F\]"
    ):
        group_diversity(x[0], [0, 0])
    with pytest.raises(TypeError, match=r"^features: expected a floating-point tensor, got"):
        group_diversity(x.long(), [0, 0, 0])
    with pytest.raises(
        ValueError, match=r"^diversity: expected the shape of advantage, \[3\], got"
    ):
        diversity_advantage(x[:, 0], x[:2, 0])
    with pytest.raises(ValueError, match=r"^diversity: expected values >= 0, got -1\.0 at index"):
        diversity_advantage(x[:, 0], -x[:, 0])


# what follows a run


def test_the_share_grows_beyond_all_means_and_falls_below_them():
    share = GatedShare(window=3)
    for mean in (0.1, 0.3, 0.2):  # the window fills: nothing to compare with
        share = share.update(mean)
    assert share == GatedShare(window=3, means=(0.1, 0.3, 0.2))
    assert share.update(0.3).value == share.update(0.1).value == 0.1  # neither above nor below
    assert share.update(0.31).value == pytest.approx(0.11)
    assert share.update(0.09).value == pytest.approx(0.09)
    assert share.update(0.31).means == (0.3, 0.2, 0.31)


def test_the_share_stays_in_its_bounds():
    up, down = (GatedShare(window=1, minimum=0.02, maximum=0.2, means=(0.0,)) for _ in range(2))
    for step in range(1, 40):
        up, down = up.update(float(step)), down.update(-float(step))
    assert (up.value, down.value) == (0.2, 0.02)
    free = GatedShare(window=1, means=(0.0,))
    for step in range(1, 40):
        free = free.update(float(step))
    assert free.value == 1.0


def test_a_reset_is_due_beyond_the_kl_or_after_the_steps():
    reset = ReferenceReset()
    assert not reset.update(1e-4).due  # at the bound, not beyond
    assert reset.update(1.01e-4).due
    for _ in range(99):
        reset = reset.update(0.0)
    assert not reset.due
    assert reset.update(0.0).due
    assert reset.update(1.0).restarted() == ReferenceReset()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GatedShare(value=1.5), "value: expected a finite number in [0, 1], got 1.5"),
        (lambda: GatedShare(rate=1.0), "rate: expected a finite number in (0, 1), got 1.0"),
        (lambda: GatedShare(window=0), "window: expected an integer >= 1, got 0"),
        (
            lambda: GatedShare(minimum=0.5, maximum=0.2),
            "minimum: expected a finite number in [0, 0.2], got 0.5",
        ),
        (lambda: GatedShare(maximum=2.0), "maximum: expected a finite number in (0, 1], got 2.0"),
        (
            lambda: GatedShare(window=1, means=(0.0, 0.1)),
            "means: expected a tuple of at most 1, got (0.0, 0.1)",
        ),
        (lambda: GatedShare().update(math.nan), "mean: expected a finite number in [-inf, inf], "),
        (lambda: ReferenceReset(maximum_kl=0.0), "maximum_kl: expected a finite number in (0, inf"),
        (lambda: ReferenceReset(maximum_steps=0), "maximum_steps: expected an integer >= 1, got 0"),
        (lambda: ReferenceReset(steps=-1), "steps: expected an integer >= 0, got -1"),
        (lambda: ReferenceReset().update(-1.0), "kl: expected a finite number in [0, inf], got"),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()
