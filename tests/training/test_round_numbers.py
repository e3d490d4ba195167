"""The numbers of a round, by hand."""

import math

import pytest
import torch

from mteditflow import likert_average, turn_average
from mteditflow.rewards import Fault, Lost, TurnScores
from mteditflow.training import round_numbers
from mteditflow.training.round_numbers import lost_reasons
from tests.samples_of_scores import nan, turn_scores


def test_golden_numbers_with_a_lost_trajectory():
    terms = {
        "following": turn_scores([[5, 1], [1, 1], [3, 3], [5, nan]], lost=[(3, 1)]),
        "consistency": turn_scores([[0.5, 0.7], [0.8, 0.8], [0.9, 0.9], [1.0, 1.0]]),
        "looks": turn_scores([[1, 2], [3, 4], [5, 6], [7, 8]]),
    }
    rewards = {
        "following": terms["following"].reward(likert_average),
        "consistency": terms["consistency"].reward(turn_average),
    }
    found = round_numbers(terms, rewards, torch.tensor([0, 0, 1, 1]))
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
    assert all(isinstance(x, (int, float)) for x in found.values())


def test_a_round_in_which_everything_was_lost_has_no_reward():
    terms = {"following": turn_scores([[nan], [nan]], lost=[(0, 0), (1, 0)])}
    rewards = {"following": terms["following"].reward(likert_average)}
    found = round_numbers(terms, rewards, torch.tensor([0, 0]))
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
