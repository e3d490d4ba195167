"""Rewards of a round and the numbers of them, by hand."""

import math

import pytest
import torch

from mteditflow import binary_and, normalize_likert
from mteditflow.rewards import Fault, Lost, TurnScores
from mteditflow.training.round_rewards import Aggregation, RoundRewards, lost_reasons
from tests.loops import some
from tests.samples_of_scores import nan, turn_scores

LIKERT, PLAIN = Aggregation(normalize_likert), Aggregation(lambda score: score)


def test_golden_numbers_with_a_lost_trajectory():
    terms = {
        "following": turn_scores([[5, 1], [1, 1], [3, 3], [5, nan]], lost=[(3, 1)]),
        "consistency": turn_scores([[0.5, 0.7], [0.8, 0.8], [0.9, 0.9], [1.0, 1.0]]),
        "looks": turn_scores([[1, 2], [3, 4], [5, 6], [7, 8]]),
    }
    how = {"following": LIKERT, "consistency": PLAIN}
    rewards = RoundRewards(terms, how, torch.tensor([0, 0, 1, 1]))
    found = rewards.numbers()
    assert rewards.names == ["following", "consistency"]
    assert rewards.means == {name: found[f"reward/{name}"] for name in how}
    assert found["reward/following"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert found["reward/consistency"] == pytest.approx((0.6 + 0.8 + 0.9 + 1.0) / 4)
    assert found["score/following/turn_1"] == 3.5
    assert found["score/following/turn_2"] == pytest.approx(5 / 3)
    assert found["score/looks/turn_2"] == 5
    assert found["group/following/std"] == pytest.approx((0.25 + 0.25 + 0) / 3)
    assert found["group/consistency/no_spread"] == 0
    assert found["group/correlation/following/consistency"] == pytest.approx(-1)
    assert found["invalid_share"] == 0.25
    assert found["trajectories"] == 4
    assert found["lost/time-out"] == 1
    assert "reward/looks" not in found
    assert all(isinstance(x, (int, float)) for x in some(found.values()))


def test_a_round_in_which_everything_was_lost_has_no_reward():
    terms = {"following": turn_scores([[nan], [nan]], lost=[(0, 0), (1, 0)])}
    found = RoundRewards(terms, {"following": LIKERT}, torch.tensor([0, 0])).numbers()
    assert math.isnan(found["reward/following"])
    assert found["invalid_share"] == 1
    assert found["lost/time-out"] == 2


def test_a_trajectory_is_counted_once_by_what_it_lost_first():
    def lost(*places):
        mask = torch.ones(3, 2, dtype=torch.bool)
        why = {place: Lost(fault, "", 1) for place, fault in places}
        return TurnScores(torch.full((3, 2), nan), mask, why)

    terms = {
        "following": lost(((0, 1), Fault.refusal), ((0, 0), Fault.timeout)),
        "consistency": lost(((0, 0), Fault.refusal), ((2, 0), Fault.timeout)),
    }
    assert lost_reasons(terms) == {"time-out": 2}


def test_a_chain_has_one_reward_and_each_turn_its_own():
    """The reward of a lost turn is not known, and so is that of its chain."""
    terms = {"following": turn_scores([[5, 1, None], [3, 5, 5], [nan, 5, 1]], lost=[(2, 0)])}
    rewards = RoundRewards(terms, {"following": LIKERT}, torch.tensor([4, 4, 4]))
    turn, whole = rewards.turn["following"], rewards.whole["following"]
    expected = torch.tensor([[1, 0, nan], [0.5, 1, 1], [nan, 1, 0]])
    torch.testing.assert_close(turn.value, expected, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(turn.valid, expected.isfinite())
    mean = torch.tensor([0.5, 2.5 / 3, nan])
    torch.testing.assert_close(rewards.reward("following").value, mean, equal_nan=True)
    assert rewards.reward("following").valid.tolist() == [True, True, False]
    for n in range(2):
        torch.testing.assert_close(whole.value[:, n], mean, equal_nan=True)
    strict = {"following": Aggregation(lambda score: (score >= 5).float(), binary_and)}
    value = RoundRewards(terms, strict, torch.tensor([4, 4, 4])).reward("following").value
    assert value[:2].tolist() == [0, 0]
    assert value[2].isnan()


def test_a_reward_that_is_not_trained_on_is_not_among_the_numbers():
    terms = {
        "following": turn_scores([[5], [1], [5], [5]]),
        "consistency": turn_scores([[0.5], [nan], [0.5], [0.7]], lost=[(1, 0)]),
    }
    how, group = {"consistency": PLAIN, "following": LIKERT}, torch.tensor([0, 0, 1, 1])
    rewards = RoundRewards(terms, how, group, trained=["following"])
    assert rewards.names == ["following"]
    found = rewards.numbers()
    assert "reward/consistency" not in found
    assert not any("correlation" in name for name in some(found))
    assert (found["invalid_share"], found["lost/time-out"]) == (0, 1)
    assert rewards.informative("following").counts["kept"] == 1
    assert rewards.spreads("following") == {0: 0.5, 1: 0.0}
    assert rewards.spreads("consistency") == {1: pytest.approx(0.1)}  # one known member: no spread
    both = RoundRewards(terms, how, group).numbers()
    assert both["invalid_share"] == 0.25


def test_nothing_to_measure_is_counted_apart_and_out_of_no_others_mean():
    """The third has no consistency: its following counts, and nothing is invalid."""
    terms = {
        "following": turn_scores([[5, 1], [1, 1], [3, 3]]),
        "consistency": turn_scores([[0.5, nan], [0.7, 0.9], [nan, nan]]),
    }
    how = {"following": LIKERT, "consistency": PLAIN}
    rewards = RoundRewards(terms, how, torch.tensor([0, 0, 0]))
    found = rewards.numbers()
    assert found["invalid_share"] == 0
    assert (found["unmeasured/following"], found["unmeasured/consistency"]) == (0, 1 / 3)
    assert found["reward/following"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert found["reward/consistency"] == pytest.approx((0.5 + 0.8) / 2)
    assert found["group/consistency/std"] == pytest.approx(0.15)
    assert found["group/correlation/following/consistency"] == pytest.approx(-1)  # of the first two
    assert rewards.spreads("consistency") == {0: pytest.approx(0.15)}
    assert rewards.informative("consistency").keep.tolist() == [True] * 3  # the group's, with it


def test_an_aggregation_without_its_term_is_an_error():
    terms = {"following": turn_scores([[5], [1]])}
    rewards = RoundRewards(terms, {"consistency": PLAIN}, torch.tensor([0, 0]))
    with pytest.raises(KeyError, match="consistency"):
        rewards.numbers()
