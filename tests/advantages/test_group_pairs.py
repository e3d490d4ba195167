"""Online preference pairs: best against worst, never a tie, never a lost reward."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import group_pairs

MEMBERS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(-2, 2), st.booleans()),
    min_size=1,
    max_size=12,
)


def columns(members):
    reward, group, valid = zip(*members, strict=True)
    return torch.tensor(reward), torch.tensor(group), torch.tensor(valid)


def loop(members):
    """By the definition, over Python lists."""
    pairs = []
    for name in sorted({g for _, g, _ in members}):
        here = [i for i, (_, g, v) in enumerate(members) if g == name and v]
        if not here:
            continue
        winner = max(here, key=lambda i: members[i][0])  # the first of them: max keeps it
        loser = min(here, key=lambda i: members[i][0])
        if members[winner][0] > members[loser][0]:
            pairs.append((winner, loser))
    return pairs


def found(members):
    reward, group, valid = columns(members)
    winner, loser = group_pairs(reward, group, valid=valid)
    return list(zip(winner.tolist(), loser.tolist(), strict=True))


def test_golden():
    #                       group 5: 0.2 .. 0.9    group -1: a tie     group 3: alone
    reward = torch.tensor([0.5, 0.9, 0.2, 0.9, 0.7, 0.7, 1.0])
    group = torch.tensor([5, 5, 5, 5, -1, -1, 3])
    winner, loser = group_pairs(reward, group)
    assert winner.tolist() == [1]
    assert loser.tolist() == [2]


def test_the_lost_reward_is_neither_best_nor_worst():
    reward = torch.tensor([math.nan, 0.1, 0.3, math.inf])
    valid = torch.tensor([False, True, True, False])
    pairs = group_pairs(reward, torch.zeros(4, dtype=torch.int64), valid=valid)
    assert pairs.winner.tolist() == [2]
    assert pairs.loser.tolist() == [1]


@given(MEMBERS)
def test_equals_the_loop(members):
    assert found(members) == loop(members)


@given(MEMBERS, st.randoms(use_true_random=False))
def test_the_order_changes_numbers_but_no_reward(members, random):
    shuffled = random.sample(members, len(members))
    rewards = [[(side[w][0], side[i][0]) for w, i in found(side)] for side in (members, shuffled)]
    assert rewards[0] == rewards[1]


@given(MEMBERS)
def test_a_mask_equals_deletion(members):
    kept = [i for i, (_, _, valid) in enumerate(members) if valid]
    if kept:
        deleted = found([members[i] for i in kept])
        assert found(members) == [(kept[winner], kept[loser]) for winner, loser in deleted]


def test_there_may_be_no_pair():
    reward, group = torch.tensor([0.5, 0.5, 1.0]), torch.tensor([0, 0, 1])
    for valid in (None, torch.zeros(3, dtype=torch.bool)):
        winner, loser = group_pairs(reward, group, valid=valid)
        assert winner.shape == loser.shape == (0,)
        assert winner.dtype == loser.dtype == torch.int64


def test_dtypes_of_rewards_and_groups():
    for dtype in (torch.float32, torch.float64):
        for ids in (torch.int32, torch.int64):
            reward = torch.tensor([0.1, 0.2], dtype=dtype, requires_grad=True)
            winner, loser = group_pairs(reward, torch.zeros(2, dtype=ids))
            assert (winner.tolist(), loser.tolist()) == ([1], [0])


def test_errors():
    reward, group = torch.tensor([0.0, 1.0]), torch.tensor([0, 0])
    with pytest.raises(ValueError, match=re.escape("reward: expected a non-empty tensor of shap")):
        group_pairs(reward[None], group[:1])
    with pytest.raises(TypeError, match=r"^reward: expected float32 or float64, got torch\.float1"):
        group_pairs(reward.half(), group)
    with pytest.raises(ValueError, match=r"^group: expected shape \[B\] = \[2\], got \[1\]"):
        group_pairs(reward, group[:1])
    with pytest.raises(TypeError, match=r"^group: expected integer ids, got torch\.float32"):
        group_pairs(reward, reward)
    with pytest.raises(ValueError, match=r"^reward: expected finite values \(mark lost ones in va"):
        group_pairs(torch.tensor([0.0, math.nan]), group)
    with pytest.raises(TypeError, match=r"^valid: expected a boolean mask, got torch\.int64"):
        group_pairs(reward, group, valid=group)


def test_rewards_have_one_axis():
    with pytest.raises(ValueError, match=r"^reward: .*\[B\]"):
        group_pairs(torch.ones(2, 2), torch.zeros(2, dtype=torch.int64))
