"""Group-relative advantages and fusion: golden values, plain loops, and the laws they obey."""

import math
import re
import statistics

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mteditflow import (
    _reduce,
    clamp_advantage,
    fuse_advantages,
    fuse_rewards,
    group_advantage,
    group_ids,
    group_measured,
    group_std,
    renormalize_advantage,
)
from mteditflow.testing import SIGNATURES
from mteditflow.testing.strategies import as_ids
from tests.loops import some

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
NAN, INF = math.nan, math.inf
STDS = ["group", "batch", "none"]
fusions = pytest.mark.parametrize("fuse", [fuse_advantages, fuse_rewards])
stds = pytest.mark.parametrize("std", STDS)


def exactly(message):
    return f"^{re.escape(message)}$"


def ids(*group):
    return torch.tensor(group, dtype=torch.int64)


def loop(reward, group, valid, std, eps):
    """Eq. 3 in plain Python, for one column of rewards."""
    everyone = [r for r, v in zip(reward, valid, strict=True) if v]
    result = []
    for r, g, v in zip(reward, group, valid, strict=True):
        members = [r for r, h, w in zip(reward, group, valid, strict=True) if w and h == g]
        if not v or len(members) < 2 or min(members) == max(members):
            result.append(0.0)
            continue
        spread = {
            "group": statistics.pstdev(members) + eps,
            "batch": statistics.pstdev(everyone) + eps,
            "none": 1.0,
        }[std]
        result.append((r - statistics.fmean(members)) / spread)
    return result


@st.composite
def batches(draw, extra=0):
    """Rewards (exact in binary), ragged groups of arbitrary ids in any order, a mask."""
    rows = draw(st.integers(1, 12))
    ids = st.one_of(st.integers(-2, 2), st.integers(-(2**62), 2**62))  # dense or far apart
    names = draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    group = [draw(st.sampled_from(names)) for _ in range(rows)]
    valid = [draw(st.booleans()) for _ in range(rows)]
    eighths = st.integers(-800, 800).map(lambda k: k / 8)
    rewards = [[draw(eighths) for _ in range(rows)] for _ in range(1 + extra)]
    return (
        *(torch.tensor(reward, dtype=torch.float64) for reward in rewards),
        torch.tensor(group),
        torch.tensor(valid),
    )


# golden values


def test_golden_group_std():
    # mean 2, population std 2: deviations -2, 2 over 2 + 0.5
    reward, group = torch.tensor([0.0, 9.0, 4.0, 0.0, 4.0]), ids(3, -1, 3, 3, 3)
    advantage = group_advantage(reward, group, eps=0.5)
    assert advantage.tolist() == pytest.approx([-0.8, 0, 0.8, -0.8, 0.8])
    assert group_std(reward, group).tolist() == [2, 0, 2, 2, 2]


def test_golden_batch_std():
    # group means 1 and 5; all of 0, 2, 4, 6 have mean 3 and variance (9 + 1 + 1 + 9) / 4 = 5
    advantage = group_advantage(
        torch.tensor([0.0, 2.0, 4.0, 6.0]), ids(0, 0, 1, 1), std="batch", eps=0.25
    )
    assert advantage.tolist() == pytest.approx([x / (math.sqrt(5) + 0.25) for x in (-1, 1, -1, 1)])


def test_golden_no_std():
    advantage = group_advantage(torch.tensor([0.0, 1.0, 5.0]), ids(0, 0, 0), std="none", eps=99.0)
    assert advantage.tolist() == [-2, -1, 3]


def test_golden_invalid():
    # the lost 100 takes no part: mean 2, std 1 over the first and the last
    reward, valid = torch.tensor([1.0, 100.0, 3.0]), torch.tensor([True, False, True])
    assert group_advantage(reward, ids(5, 5, 5), valid=valid, eps=0.0).tolist() == [-1, 0, 1]
    assert group_std(reward, ids(5, 5, 5), valid=valid).tolist() == [1, 1, 1]


def test_the_default_eps_is_1e_4():
    reward = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    expected = pytest.approx([-1 / 1.0001, 1 / 1.0001], rel=1e-12)
    assert group_advantage(reward, ids(0, 0)).tolist() == expected
    assert renormalize_advantage(reward).tolist() == expected
    assert fuse_advantages({"a": reward}, {"a": 1.0}, ids(0, 0)).tolist() == expected
    assert fuse_rewards({"a": reward}, {"a": 1.0}, ids(0, 0)).tolist() == expected


# the loop


@stds
@given(batch=batches(), eps=st.sampled_from([0.0, 1e-4, 0.5]))
def test_advantages_equal_the_loop(std, batch, eps):
    reward, group, valid = batch
    expected = loop(reward.tolist(), group.tolist(), valid.tolist(), std, eps)
    advantage = group_advantage(reward, group, valid=valid, std=std, eps=eps)
    assert advantage.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(batches())
def test_group_std_equals_the_loop(batch):
    reward, group, valid = batch
    columns = list(zip(reward.tolist(), group.tolist(), valid.tolist(), strict=True))
    expected = [
        statistics.pstdev([r for r, h, w in columns if w and h == g] or [0.0])
        for _, g, _ in columns
    ]
    assert group_std(reward, group, valid=valid).tolist() == pytest.approx(expected)


@stds
def test_each_turn_is_normalised_on_its_own(std):
    generator = torch.Generator().manual_seed(0)
    reward, group = torch.randn(9, 3, generator=generator), ids(0, 1, 0, 1, 2, 0, 1, 2, 7)
    valid = torch.rand(9, 3, generator=generator) > 0.2
    table = group_advantage(reward, group, valid=valid, std=std)
    spread = group_std(reward, group, valid=valid)
    for turn in range(3):
        column = reward[:, turn], group
        expected = group_advantage(*column, valid=valid[:, turn], std=std)
        assert torch.equal(table[:, turn], expected)
        assert torch.equal(spread[:, turn], group_std(*column, valid=valid[:, turn]))


# laws


# exact zeros


@stds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    value=st.one_of(
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
        st.integers(-100, 100).map(lambda k: 0.1 * k),
    ),
    size=st.integers(1, 9),
    eps=st.sampled_from([0.0, 1e-4]),
)
def test_a_constant_group_is_exactly_zero(std, dtype, value, size, eps):
    reward = torch.tensor([value] * size + [1.0, -2.0] * 2, dtype=dtype)
    group = torch.tensor([7] * size + [8] * 4)
    order = torch.randperm(len(reward), generator=torch.Generator().manual_seed(size))
    reward, group = reward[order], group[order]
    advantage = group_advantage(reward, group, std=std, eps=eps)
    assert torch.equal(advantage[group == 7], torch.zeros(size, dtype=dtype))
    assert (advantage[group == 8] != 0).all()
    assert torch.equal(group_std(reward, group)[group == 7], torch.zeros(size, dtype=dtype))
    constant = torch.full((size,), value, dtype=dtype)
    alone = group_advantage(constant, torch.zeros(size, dtype=torch.int64), std=std, eps=eps)
    assert torch.equal(alone, torch.zeros(size, dtype=dtype))
    assert torch.equal(renormalize_advantage(constant, eps=eps), torch.zeros(size, dtype=dtype))


@stds
def test_a_group_of_one_and_a_group_with_one_valid_member_give_zero(std):
    reward = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])
    valid = torch.tensor([True, True, False, True, True])
    advantage = group_advantage(reward, ids(0, 1, 1, 2, 2), valid=valid, std=std)
    assert advantage[:3].tolist() == [0, 0, 0]
    assert advantage[3] < 0 < advantage[4]


@stds
def test_a_group_without_valid_members_gives_zero(std):
    reward = torch.tensor([NAN, INF, 2.0, 4.0])
    valid = torch.tensor([False, False, True, True])
    assert group_advantage(reward, ids(0, 0, 1, 1), valid=valid, std=std)[:2].tolist() == [0, 0]
    nothing = torch.zeros(4, dtype=torch.bool)
    for advantage in (
        group_advantage(reward, ids(0, 0, 1, 1), valid=nothing, std=std, eps=0.0),
        group_std(reward, ids(0, 0, 1, 1), valid=nothing),
        renormalize_advantage(reward, valid=nothing),
    ):
        assert advantage.tolist() == [0, 0, 0, 0]


def test_ids_above_2_to_the_53_do_not_collide():
    big = 2**53
    reward, group = torch.tensor([0.0, 2.0, 10.0, 30.0]), ids(big, big, big + 1, big + 1)
    assert group_advantage(reward, group, eps=0.0).tolist() == [-1, 1, -1, 1]
    edges = ids(2**63 - 1, 2**63 - 1, 2**63 - 2, -(2**63))
    assert group_advantage(reward, edges, eps=0.0).tolist() == [-1, 1, 0, 0]


@pytest.mark.parametrize("dtype", SIGNATURES["mteditflow"].ids, ids=str)
def test_ids_may_be_any_integers(dtype):
    end = torch.iinfo(dtype).max
    group = as_ids([end, end - 1, end, end - 1], dtype)
    advantage = group_advantage(torch.tensor([0.0, 0.0, 2.0, 4.0]), group, eps=0.0)
    assert advantage.tolist() == [-1, -1, 1, 1]


def test_many_groups_stay_apart():
    """2,500 groups of 8 in random order: each has mean 0 and std 1."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randperm(20_000, generator=generator) % 2500
    reward = torch.rand(20_000, generator=generator) + group
    advantage = group_advantage(reward, group, eps=0.0)[group.argsort()].reshape(2500, 8)
    torch.testing.assert_close(advantage.mean(dim=1), torch.zeros(2500), atol=1e-5, rtol=0)
    torch.testing.assert_close(advantage.std(dim=1, unbiased=False), torch.ones(2500))


# fusion


def test_golden_fusion():
    rewards = {
        "following": torch.tensor([0.0, 4.0, 1.0, 1.0]),
        "consistency": torch.tensor([0.75, 0.25, 0.5, 1.0]),
    }
    weights, group = {"consistency": 0.5, "following": 1.0}, ids(0, 0, 1, 1)
    # advantages: -1, 1, 0, 0 and 1, -1, -1, 1
    fused = fuse_advantages(rewards, weights, group, eps=0.0)
    assert fused.tolist() == [-0.5, 0.5, -0.5, 0.5]
    # rewards: 0.375, 4.125, 1.25, 1.5
    fused = fuse_rewards(rewards, weights, group, eps=0.0, std="none")
    assert fused.tolist() == [-1.875, 1.875, -0.125, 0.125]


def test_the_levels_differ_where_variances_do():
    """Var(IF) 5.8 times Var(CC), at odds: at reward level IF wins, at advantage level the weight.

    IF = -+a, CC = +-b with a / b = sqrt(5.8) and weight 2 on CC: the sum of rewards has the sign of
    a - 2 b > 0 and normalizes to -+1; the sum of advantages is -+1 +- 2.
    """
    a, b = math.sqrt(5.8), 1.0
    rewards = {"if": torch.tensor([-a, a]), "cc": torch.tensor([b, -b])}
    weights = {"if": 1.0, "cc": 2.0}
    of_rewards = fuse_rewards(rewards, weights, ids(0, 0), eps=0.0)
    of_advantages = fuse_advantages(rewards, weights, ids(0, 0), eps=0.0)
    assert of_rewards.tolist() == [-1, 1]
    assert of_advantages.tolist() == [1, -1]


@stds
@given(batch=batches(extra=2), w=st.tuples(*[st.integers(-3, 3)] * 3))
def test_fusion_equals_the_loop(std, batch, w):
    *columns, group, valid = batch
    rewards = dict(zip("abc", columns, strict=True))
    weights = dict(zip("abc", map(float, w), strict=True))
    args = group.tolist(), valid.tolist(), std, 1e-4
    advantages = [loop(column.tolist(), *args) for column in columns]
    expected = [
        sum(x * y for x, y in zip(w, row, strict=True)) for row in zip(*advantages, strict=True)
    ]
    fused = fuse_advantages(rewards, weights, group, valid=valid, std=std)
    assert fused.tolist() == pytest.approx(expected, abs=1e-9)
    total = [
        sum(x * y for x, y in zip(w, row, strict=True)) for row in torch.stack(columns, 1).tolist()
    ]
    fused = fuse_rewards(rewards, weights, group, valid=valid, std=std)
    assert fused.tolist() == pytest.approx(loop(total, *args), abs=1e-9)


@fusions
@stds
@given(batch=batches(extra=2), order=st.permutations("abc"))
def test_the_order_of_names_changes_no_bit(fuse, std, batch, order):
    *columns, group, valid = batch
    rewards = dict(zip("abc", columns, strict=True))
    weights = {"a": 0.1, "b": 0.2, "c": 0.7}
    assert torch.equal(
        fuse(rewards, weights, group, valid=valid, std=std),
        fuse({name: rewards[name] for name in order}, weights, group, valid=valid, std=std),
    )


@fusions
@stds
@given(batch=batches())
def test_one_reward_is_its_group_advantage(fuse, std, batch):
    reward, group, valid = batch
    assert torch.equal(
        fuse({"only": reward}, {"only": 1.0}, group, valid=valid, std=std, eps=0.5),
        group_advantage(reward, group, valid=valid, std=std, eps=0.5),
    )


# unmeasured rewards


def test_golden_unmeasured():
    """The third has no consistency; nobody of group 1 has any."""
    following = torch.tensor([0.0, 4.0, 2.0, 1.0, 3.0])
    rewards = {"if": following, "cc": torch.tensor([1.0, 0.5, NAN, INF, NAN])}
    measured = {"cc": torch.tensor([True, True, False, False, False])}
    weights, group = {"if": 1.0, "cc": 0.5}, ids(0, 0, 0, 1, 1)
    fused = fuse_advantages(rewards, weights, group, measured=measured, std="none")
    assert fused.tolist() == [-2 + 0.125, 2 - 0.125, 0, -1, 1]
    # fused rewards: 0.5, 4.25, and 2 + 0.5 times the mean 0.75; their mean is 7.125 / 3 = 2.375
    first = {name: reward[:3] for name, reward in rewards.items()}
    fused = fuse_rewards(first, weights, group[:3], measured={"cc": measured["cc"][:3]}, std="none")
    assert fused.tolist() == [-1.875, 1.875, 0]


@stds
@given(batch=batches(extra=2), data=st.data())
def test_fusion_of_unmeasured_rewards_equals_the_loop(std, batch, data):
    *columns, group, valid = batch
    rows, flags = len(group), st.sampled_from([True, True, False])
    measured = {
        name: torch.tensor([data.draw(flags) for _ in range(rows)]) for name in data.draw(
            st.sampled_from(["", "b", "abc"])
        )
    }  # fmt: skip
    weights = {"a": 1.0, "b": data.draw(st.sampled_from([0.0, 0.5])), "c": -2.0}
    has = {n: (valid & measured.get(n, valid)).tolist() for n in "abc"}
    rewards = {
        n: column.masked_fill(~torch.tensor(has[n]), NAN)
        for n, column in zip("abc", columns, strict=True)
    }
    listed = {n: column.tolist() for n, column in zip("abc", columns, strict=True)}
    options = {"valid": valid, "measured": measured, "std": std}

    own = [loop(listed[n], group.tolist(), has[n], std, 1e-4) for n in "abc"]
    expected = [
        sum(w * a for w, a in zip(weights.values(), row, strict=True))
        for row in zip(*own, strict=True)
    ]
    fused = fuse_advantages(rewards, weights, group, **options)
    assert fused.tolist() == pytest.approx(expected, abs=1e-9)

    used = [n for n in "abc" if weights[n]]
    part = [any(has[n][b] for n in used) for b in range(rows)]
    totals, whole = [], True
    for b in range(rows):
        total = 0.0
        for n in used:
            members = [listed[n][c] for c in range(rows) if has[n][c] and group[c] == group[b]]
            whole &= bool(members) or not part[b]
            mean = statistics.fmean(members) if members else 0.0
            total += weights[n] * (listed[n][b] if has[n][b] else mean)
        totals.append(total)
    if whole:
        fused = fuse_rewards(rewards, weights, group, **options)
        expected = loop(totals, group.tolist(), part, std, 1e-4)
        assert fused.tolist() == pytest.approx(expected, abs=1e-7)
    else:
        with pytest.raises(ValueError, match="expected a measured reward in every group, got none"):
            fuse_rewards(rewards, weights, group, **options)


@fusions
def test_a_group_that_measured_nothing_teaches_nothing(fuse):
    reward = torch.tensor([NAN, NAN, 1.0, 3.0])
    measured = {"a": torch.tensor([False, False, True, True])}
    fused = fuse({"a": reward}, {"a": 1.0}, ids(0, 0, 1, 1), measured=measured, eps=0.0)
    assert fused.tolist() == [0, 0, -1, 1]


@fusions
def test_an_unmeasured_member_of_a_constant_group_is_exactly_zero(fuse):
    reward = torch.full((5,), 0.1)
    measured = {"b": torch.tensor([True, False, True, True, False])}
    rewards, weights = {"a": reward, "b": reward}, {"a": 1.0, "b": 0.3}
    fused = fuse(rewards, weights, ids(0, 0, 0, 0, 0), measured=measured, eps=0.0)
    assert fused.tolist() == [0] * 5


def test_reward_fusion_refuses_a_group_without_the_reward_and_says_what_to_do():
    rewards = {"if": torch.tensor([1.0, 2.0]), "cc": torch.tensor([NAN, NAN])}
    measured, group = {"cc": torch.tensor([False, False])}, ids(-4, -4)
    message = (
        "rewards['cc']: expected a measured reward in every group, got none in group -4; leave the "
        "group out (group_measured), or use fuse_advantages, where an unmeasured reward adds 0"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        fuse_rewards(rewards, {"if": 1.0, "cc": 0.2}, group, measured=measured)
    without = fuse_rewards(rewards, {"if": 1.0, "cc": 0.0}, group, measured=measured, eps=0.0)
    assert without.tolist() == [-1, 1]  # of weight 0 it is not needed
    lost = torch.tensor([False, False])
    nobody = fuse_rewards(rewards, {"if": 1.0, "cc": 0.2}, group, valid=lost, measured=measured)
    assert nobody.tolist() == [0, 0]


def test_golden_group_measured():
    measured = torch.tensor([[True, False], [False, False], [False, True]])
    found = group_measured(measured, ids(9, 9, -1))
    assert found.tolist() == [[True, False], [True, False], [False, True]]
    with pytest.raises(
        TypeError,
        match=exactly(
            "measured: expected a boolean mask, got torch.float32; convert 0 and 1 with .bool()"
        ),
    ):
        group_measured(measured.float(), ids(9, 9, -1))
    with pytest.raises(ValueError, match=r"^group: expected shape \[B\] = \[3\], got \[2\]"):
        group_measured(measured, ids(9, 9))


@fusions
def test_errors_of_measured(fuse):
    rewards, weights, group = {"a": torch.ones(2)}, {"a": 1.0}, ids(0, 0)
    message = "measured: expected names among ['a'], got ['b']"
    with pytest.raises(ValueError, match=exactly(message)):
        fuse(rewards, weights, group, measured={"b": torch.ones(2) > 0})
    with pytest.raises(
        ValueError, match=r"^measured\['a'\]: expected shape of rewards\['a'\] = \[2\]"
    ):
        fuse(rewards, weights, group, measured={"a": torch.ones(3) > 0})
    with pytest.raises(TypeError, match=r"^measured\['a'\]: expected a boolean mask, got torch"):
        fuse(rewards, weights, group, measured={"a": torch.ones(2)})


@fusions
def test_fusion_errors(fuse):
    reward, group = torch.tensor([1.0, 2.0, NAN]), ids(0, 0, 0)
    with pytest.raises(
        ValueError, match=exactly("rewards: expected at least one named reward, got none")
    ):
        fuse({}, {}, group)
    message = "weights: expected one weight for each reward in ['a', 'b'], got ['a', 'c']"
    with pytest.raises(ValueError, match=exactly(message)):
        fuse({"b": reward, "a": reward}, {"c": 1.0, "a": 1.0}, group)
    message = "weights['a']: expected a finite number in [-inf, inf], got nan"
    with pytest.raises(ValueError, match=exactly(message)):
        fuse({"a": torch.ones(3)}, {"a": NAN}, group)
    message = (
        "rewards['cc']: expected finite values (mark lost ones in valid, unmeasured ones in "
        "measured), got nan at index [2]"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        fuse({"if": torch.ones(3), "cc": reward}, {"if": 1.0, "cc": 1.0}, group)
    message = "rewards['cc']: expected shape of rewards['if'] = [3], got [2]"
    with pytest.raises(ValueError, match=exactly(message)):
        fuse({"if": torch.ones(3), "cc": torch.ones(2)}, {"if": 1.0, "cc": 1.0}, group)
    with pytest.raises(TypeError, match=exactly("group: expected integer ids, got torch.float32")):
        fuse({"a": torch.ones(3)}, {"a": 1.0}, group.float())
    message = "std: expected one of ['group', 'batch', 'none'], got 'global'"
    with pytest.raises(ValueError, match=exactly(message)):
        fuse({"a": torch.ones(3)}, {"a": 1.0}, group, std="global")


# clamp and renormalise


def test_golden_clamp():
    advantage = torch.tensor([-9.0, -5.0, 0.5, 5.0, 9.0])
    assert clamp_advantage(advantage).tolist() == [-5, -5, 0.5, 5, 5]
    assert clamp_advantage(advantage, limit=0.25).tolist() == [-0.25, -0.25, 0.25, 0.25, 0.25]
    with pytest.raises(
        ValueError, match=exactly("limit: expected a finite number in (0, inf], got 0")
    ):
        clamp_advantage(advantage, limit=0)
    with pytest.raises(
        TypeError, match=r"^advantage: expected float32 or float64, got torch\.float16"
    ):
        clamp_advantage(advantage.half())


def test_golden_renormalize():
    # mean 1, std 2 over the valid ones: -2 / 2.5 and 2 / 2.5
    advantage = torch.tensor([-1.0, 3.0, NAN])
    valid = torch.tensor([True, True, False])
    result = renormalize_advantage(advantage, valid=valid, eps=0.5)
    assert result.tolist() == pytest.approx([-0.8, 0.8, 0.0])
    table = torch.tensor([[0.0, 1.0], [4.0, 1.0]])
    assert renormalize_advantage(table, eps=0.0).tolist() == [[-1, 0], [1, 0]]


@given(batches())
def test_renormalising_makes_mean_0_and_std_1_and_twice_is_once(batch):
    advantage, _, valid = batch
    once = renormalize_advantage(advantage, valid=valid, eps=0.0)
    kept = once[valid]
    assume(len(kept) > 1 and kept.any())
    assert kept.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert kept.std(unbiased=False).item() == pytest.approx(1.0)
    torch.testing.assert_close(renormalize_advantage(once, valid=valid, eps=0.0), once)


def test_renormalize_errors():
    message = "advantage: expected finite values (mark lost ones in valid), got nan at index [0]"
    with pytest.raises(ValueError, match=exactly(message)):
        renormalize_advantage(torch.tensor([NAN, 1.0]))
    message = "advantage: expected a non-empty tensor of shape [B] or [B, N], got [0]"
    with pytest.raises(ValueError, match=exactly(message)):
        renormalize_advantage(torch.zeros(0))
    with pytest.raises(
        TypeError, match=r"^advantage: expected float32 or float64, got torch\.float16"
    ):
        renormalize_advantage(torch.zeros(2).half())


# what all share


FUNCTIONS = {
    "group_advantage": group_advantage,
    "group_std": group_std,
    "fuse_advantages": lambda reward, group, **options: fuse_advantages(
        {"a": reward, "b": reward * reward}, {"a": 1.0, "b": 0.5}, group, **options
    ),
    "fuse_rewards": lambda reward, group, **options: fuse_rewards(
        {"a": reward, "b": reward * reward}, {"a": 1.0, "b": 0.5}, group, **options
    ),
    "renormalize": lambda reward, group, **options: renormalize_advantage(reward, **options),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


@functions
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_shape_dtype_and_device_are_kept_and_nothing_carries_a_gradient(name, device, dtype, shape):
    reward = torch.rand(shape, dtype=dtype, device=device, requires_grad=True)
    result = FUNCTIONS[name](reward, ids(0, 0, 1, 1).to(device))
    assert result.shape == shape
    assert result.dtype == dtype
    assert result.device.type == device
    assert not result.requires_grad


@pytest.mark.parametrize("function", [group_advantage, group_std])
def test_errors(function):
    reward, group = torch.tensor([1.0, 2.0, 3.0]), ids(0, 0, 1)
    for dtype in (torch.float16, torch.bfloat16, torch.complex64):
        pattern = rf"^reward: expected float32 or float64, got {re.escape(str(dtype))}"
        with pytest.raises(TypeError, match=pattern):
            function(reward.to(dtype), group)
    with pytest.raises(TypeError, match=exactly("group: expected integer ids, got torch.float32")):
        function(reward, group.float())
    with pytest.raises(ValueError, match=exactly("group: expected shape [B] = [3], got [2]")):
        function(reward, group[:2])
    with pytest.raises(ValueError, match=exactly("valid: expected shape of reward = [3], got [1]")):
        function(reward, group, valid=torch.ones(1, dtype=torch.bool))
    with pytest.raises(
        TypeError,
        match=exactly(
            "valid: expected a boolean mask, got torch.float32; convert 0 and 1 with .bool()"
        ),
    ):
        function(reward, group, valid=torch.ones(3))
    message = "reward: expected a non-empty tensor of shape [B] or [B, N], got [0]"
    with pytest.raises(ValueError, match=exactly(message)):
        function(torch.zeros(0), ids())
    message = "reward: expected finite values (mark lost ones in valid), got inf at index [1]"
    with pytest.raises(ValueError, match=exactly(message)):
        function(torch.tensor([1.0, INF, 3.0]), group)


def test_option_errors():
    reward, group = torch.tensor([1.0, 2.0]), ids(0, 0)
    message = "std: expected one of ['group', 'batch', 'none'], got 'global'"
    with pytest.raises(ValueError, match=exactly(message)):
        group_advantage(reward, group, std="global")
    message = "eps: expected a finite number in [0, inf], got -0.1"
    for function in (group_advantage, lambda r, g, eps: renormalize_advantage(r, eps=eps)):
        with pytest.raises(ValueError, match=exactly(message)):
            function(reward, group, eps=-0.1)


@pytest.mark.compile
@functions
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager(name):
    function = FUNCTIONS[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    reward, group = torch.rand(12), torch.arange(12) % 5
    valid = torch.arange(12) % 4 != 0
    for options in ({}, {"valid": valid}, {"valid": ~valid}):
        assert torch.equal(compiled(reward, group, **options), function(reward, group, **options))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
@fusions
def test_compiled_fusion_of_unmeasured_rewards_equals_eager(fuse):
    torch.compiler.reset()
    compiled = torch.compile(fuse, fullgraph=True, backend="aot_eager")
    reward, group = torch.rand(12), torch.arange(12) % 5
    rewards, weights = {"a": reward, "b": reward * reward}, {"a": 1.0, "b": 0.5}
    options = {"valid": reward < 2, "measured": {"b": torch.arange(12) < 6}}
    args = rewards, weights, group
    assert torch.equal(compiled(*args, **options), fuse(*args, **options))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_by_inductor_with_changing_options():
    torch.compiler.reset()
    compiled = torch.compile(group_advantage, fullgraph=True)
    reward, group = torch.rand(12), torch.arange(12) % 5
    for eps in (1e-4, 1e-3, 0.5):
        torch.testing.assert_close(
            compiled(reward, group, eps=eps), group_advantage(reward, group, eps=eps)
        )


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_clamp_equals_eager():
    compiled = torch.compile(clamp_advantage, fullgraph=True, backend="aot_eager")
    advantage = torch.randn(9)
    for limit in (5.0, 0.5, 0.25):
        assert torch.equal(
            compiled(advantage, limit=limit), clamp_advantage(advantage, limit=limit)
        )


# layouts and forms of rewards


def test_prompts_by_samples_with_an_id_per_prompt_is_refused():
    """Peers' layout: without a word every advantage would be 0."""
    reward = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    message = (
        r"^reward: expected \[B, N\], trajectories by turns, .* \[8, 4\] with 8 different ids.*"
        r"group_advantage\(reward.flatten\(\), group_ids\(8, 4\)\).view\(8, 4\)$"
    )
    for function in (group_advantage, group_std):
        with pytest.raises(ValueError, match=message):
            function(reward, torch.arange(8))
    advantage = group_advantage(reward.flatten(), group_ids(8, 4)).view(8, 4)
    for row, own in some(zip(advantage, reward, strict=True)):
        assert torch.equal(row, group_advantage(own, torch.zeros(4, dtype=torch.int64)))
    assert advantage.all()


@pytest.mark.parametrize(
    ("reward", "group"),
    [
        (torch.rand(8), torch.arange(8)),  # groups of one: documented to be 0
        (torch.rand(8, 1), torch.arange(8)),  # chains of one turn
        (torch.rand(1, 4), torch.arange(1)),
        (torch.rand(3, 4), torch.tensor([5, 9, 5])),  # turns, in groups
    ],
    ids=["one axis", "one turn", "one trajectory", "a shared id"],
)
def test_other_layouts_are_taken(reward, group):
    advantage = group_advantage(reward, group)
    shared = len(set(group.tolist())) < len(group)
    assert bool((advantage != 0).any()) == shared


def test_group_ids():
    assert group_ids(2, 3).tolist() == [0, 0, 0, 1, 1, 1]
    assert group_ids(2, 3).dtype == torch.int64
    assert group_ids(1, 2, device="meta").device.type == "meta"
    with pytest.raises(ValueError, match=exactly("groups: expected an integer >= 1, got 0")):
        group_ids(0, 2)
    message = "members: expected an integer, got int64; convert it with int()"
    with pytest.raises(TypeError, match=exactly(message)):
        group_ids(2, np.int64(2))


@pytest.mark.parametrize(
    ("reward", "dtype"),
    [
        ([True, False, True], torch.float32),
        ([3, 1, 2], torch.float32),
        (np.array([3, 1, 2], dtype=np.uint8), torch.float32),
        (torch.tensor([3, 1, 2]), torch.float32),
        (torch.tensor([True, False, True]), torch.float32),
        ([0.3, 0.1, 0.2], torch.float64),
        (np.array([0.3, 0.1, 0.2], dtype=np.float32), torch.float32),
        (np.array([0.3, 0.1, 0.2], dtype=">f8"), torch.float64),
    ],
    ids=str,
)
def test_rewards_in_every_form(reward, dtype):
    group, valid = [4, 4, 4], [True, True, False]
    exact = torch.as_tensor(np.asarray(reward).astype(float))
    expected = group_advantage(exact, torch.tensor(group), valid=torch.tensor(valid))
    got = group_advantage(reward, np.array(group), valid=valid)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype))
    assert got[0] > 0 > got[1]
    spread = group_std(reward, group, valid=valid)
    torch.testing.assert_close(
        spread, group_std(exact, torch.tensor(group), valid=torch.tensor(valid)).to(dtype)
    )


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (
            [2**24, 0],
            ValueError,
            r"^reward: expected integers below 16777216.*give .* as float64",
        ),
        (
            [0.5, None],
            TypeError,
            r"^reward: expected numbers or booleans, got list of None; mark",
        ),
        ([[0.5], [1.0, 2.0]], ValueError, r"^reward: expected .* of one length.*pad_turns"),
        (["a", "b"], TypeError, r"^reward: expected numbers or booleans, got list of strings"),
        ({0.5}, TypeError, r"^reward: expected numbers or a torch.Tensor, got set; give a list"),
        (
            torch.tensor([1j, 0]),
            TypeError,
            r"^reward: expected float32 or float64, got torch.comple",
        ),
    ],
    ids=["large", "None", "ragged", "text", "set", "complex"],
)
def test_what_is_not_exact_is_refused_with_the_fix(reward, error, message):
    with pytest.raises(error, match=message):
        group_advantage(reward, [0, 0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_ids(dtype):
    group = torch.tensor([0, 0, 9, 9]).to(dtype)
    reward = torch.tensor([0.0, 1.0, 1.0, 3.0])
    assert group_advantage(reward, group, eps=0.0).tolist() == [-1.0, 1.0, -1.0, 1.0]


def test_statistics_on_the_cpu_where_a_device_has_no_float64(monkeypatch):
    """Apple's devices have none; here the CPU is said to be such a device."""
    casts, reward, has_float64 = [], torch.rand(6), _reduce.has_float64
    expected = group_advantage(reward, ids(0, 0, 0, 1, 1, 1), std="batch")
    monkeypatch.setattr(_reduce, "has_float64", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: casts.append(x) or x.clone())
    got = group_advantage(reward, ids(0, 0, 0, 1, 1, 1), std="batch")
    assert torch.equal(got, expected)
    assert (got.dtype, got.device) == (reward.dtype, reward.device)
    assert casts
    assert not has_float64(torch.device("mps"))
    assert has_float64(torch.device("cuda"))


@pytest.mark.parametrize("fuse", [fuse_advantages, fuse_rewards])
def test_fusions_refuse_prompts_by_samples_with_an_id_per_prompt(fuse):
    with pytest.raises(ValueError, match=r"group_ids\(2, 3\)"):
        fuse({"a": [[0.0, 1.0, 2.0], [5.0, 1.0, 0.0]]}, {"a": 1.0}, [0, 1])


def test_messages_say_how_to_mend_the_call():
    reward = torch.rand(2, 3)
    for call, message in (
        (lambda: group_advantage([1.0, 2.0], ["a", "b"]), r"^group: .*strings; .*np\.unique\("),
        (lambda: group_advantage(reward, [0, 0, 0, 1, 1, 1]), "^group: .*; flatten the reward and"),
        (lambda: group_advantage([2**24 + 1, 0], [0, 0]), "^reward: .*larger ones as float64"),
        (lambda: group_advantage([1.0], [0], valid=[1]), r"^valid: .*; convert .*\.bool\(\)"),
        (
            lambda: fuse_rewards({"a": reward}, {"a": 1.0}, [0, 1], measured=reward > 0),
            "^measured: expected a mapping of names to masks, got Tensor",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_listed_rewards_beside_tensors_follow_their_dtype():
    rewards, weights = {"a": torch.tensor([0.0, 1.0]), "b": [0.5, 0.25]}, {"a": 1.0, "b": 0.5}
    for fuse in (fuse_advantages, fuse_rewards):
        assert fuse(rewards, weights, [0, 0]).dtype == torch.float32


def test_a_list_of_tensors_with_gradient_and_a_range_of_ids():
    reward = [torch.tensor(1.0, requires_grad=True), torch.tensor(2.0)]
    got = group_advantage(reward, [0, 0], eps=0.0)
    assert got.tolist() == [-1.0, 1.0]
    assert not got.requires_grad
    assert group_advantage([1.0, 2.0], range(2)).tolist() == [0.0, 0.0]
