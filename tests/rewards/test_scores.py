"""Scores with their validity: a lost one is a reason, never a number, and shares are exact."""

import copy
import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import (
    TrajectoryCredit,
    TurnCredit,
    fuse_advantages,
    likert_average,
    normalize_likert,
    turn_average,
)
from mteditflow.rewards import AnswerError, Fault, InvalidRewardsError, Lost, TurnScores
from tests.loops import some

NAN = math.nan
TIMEOUT = Lost(Fault.timeout, "no answer within 60 s", attempts=4)
REFUSAL = Lost(Fault.refusal, "I'm sorry", attempts=1)
DTYPES = [torch.float32, torch.float64]


def exactly(message):
    return f"^{re.escape(message)}$"


def scores(rows, lost=None, mask=None, dtype=torch.float32):
    score = torch.tensor(rows, dtype=dtype)
    exists = torch.ones_like(score, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return TurnScores(score, exists, lost or {})


# golden values

FOUR = scores(
    [[5, 3, NAN], [4, NAN, 2], [NAN, 2, NAN], [NAN, NAN, NAN]],
    {(1, 1): TIMEOUT},
    [[True, True, False], [True] * 3, [True] * 3, [True, False, False]],
)


def test_what_is_measured_lost_and_neither():
    """Whole; one turn lost; two turns with nothing to measure; nothing measured at all."""
    assert len(FOUR) == 4
    assert FOUR.measured.tolist() == [
        [True, True, False],
        [True, False, True],
        [False, True, False],
        [False] * 3,
    ]
    assert FOUR.unmeasured.nonzero().tolist() == [[2, 0], [2, 2], [3, 0]]
    assert FOUR.lost_mask.nonzero().tolist() == [[1, 1]]
    assert FOUR.valid.tolist() == [True, False, True, True]
    assert (FOUR.invalid_share, FOUR.unmeasured_share) == (0.25, 0.25)
    assert FOUR.reasons == {"time-out": 1}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reward_is_that_of_valid_trajectories_and_measured_turns(dtype):
    reward = dataclasses.replace(FOUR, score=FOUR.score.to(dtype)).reward(likert_average)
    assert reward.valid.tolist() == [True, False, True, True]
    assert reward.measured.tolist() == [True, False, True, False]
    expected = torch.tensor([0.75, NAN, 0.25, NAN], dtype=dtype)
    torch.testing.assert_close(reward.value, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_turn_is_rewarded_as_a_chain_of_its_own(dtype):
    """Also where another turn of its trajectory was lost, which costs that trajectory's reward."""
    reward = dataclasses.replace(FOUR, score=FOUR.score.to(dtype)).turn_reward(normalize_likert)
    expected = [[1.0, 0.5, NAN], [0.75, NAN, 0.25], [NAN, 0.25, NAN], [NAN, NAN, NAN]]
    torch.testing.assert_close(
        reward.value, torch.tensor(expected, dtype=dtype), equal_nan=True, rtol=0, atol=0
    )
    assert torch.equal(reward.measured, FOUR.measured)
    assert torch.equal(reward.valid, FOUR.turn_mask & ~FOUR.lost_mask)


def test_a_reward_with_nothing_valid_asks_no_aggregate():
    def never(score, turn_mask):
        raise AssertionError

    lost = scores([[NAN, 4.0]], {(0, 0): TIMEOUT})
    reward = lost.reward(never)
    assert reward.value.isnan().all()
    assert not reward.valid.any()


def test_only_measured_turns_are_normalized():
    seen = []

    def normalize(score):
        seen.extend(score.tolist())
        return score / 5

    assert FOUR.turn_reward(normalize).value[0].tolist()[:2] == [1.0, pytest.approx(0.6)]
    assert seen == [5.0, 3.0, 4.0, 2.0, 2.0]
    of_turns = scores([[NAN, NAN]], {(0, 0): TIMEOUT}).turn_reward(normalize)
    assert of_turns.value.isnan().all()
    assert of_turns.valid.tolist() == [[False, True]]
    assert not of_turns.measured.any()
    assert len(seen) == 5


def test_reasons_come_most_frequent_first():
    lost = {(0, 0): REFUSAL, (0, 1): TIMEOUT, (1, 0): TIMEOUT}
    assert list(scores([[NAN, NAN], [NAN, 1.0]], lost).reasons.items()) == [
        ("time-out", 2),
        ("refusal", 1),
    ]
    assert scores([[1.0]]).reasons == {}


def test_a_lost_reward_takes_no_part_in_a_group():
    """The same advantages as if the lost member were deleted."""
    group = torch.tensor([0, 0, 0])
    with_lost = scores([[5.0], [NAN], [1.0]], {(1, 0): TIMEOUT}).reward(likert_average)
    without = scores([[5.0], [1.0]]).reward(likert_average)
    lost = fuse_advantages({"if": with_lost.value}, {"if": 1.0}, group, valid=with_lost.valid)
    deleted = fuse_advantages({"if": without.value}, {"if": 1.0}, group[:2], valid=without.valid)
    assert lost.tolist() == [deleted[0], 0.0, deleted[1]]


# the share of invalid rewards


@given(st.integers(1, 300), st.data())
def test_the_share_is_exact(count, data):
    """One in ten is not more than 10%, though 1 - 0.9 is more than 0.1 in float32."""
    invalid = data.draw(st.integers(0, count))
    some = scores(
        [[NAN]] * invalid + [[3.0]] * (count - invalid), {(b, 0): TIMEOUT for b in range(invalid)}
    )
    assert some.invalid_share == invalid / count
    assert some.require(max_invalid_share=invalid / count) is some
    if invalid:
        with pytest.raises(InvalidRewardsError):
            some.require(max_invalid_share=(invalid - 0.5) / count)


def test_too_many_invalid_rewards_stop_the_run_with_reasons():
    message = (
        "50% of 4 rewards are invalid, more than the 10% allowed. Turns by reason: "
        "time-out: 2, refusal: 1. For instance time-out after 4 attempts: no answer within 60 s"
    )
    lost = {(0, 0): TIMEOUT, (1, 0): TIMEOUT, (1, 1): REFUSAL}
    half = scores([[NAN, 1], [NAN, NAN], [NAN, 1], [1, 1]], lost)
    with pytest.raises(InvalidRewardsError, match=exactly(message)):
        half.require(max_invalid_share=0.1)
    assert half.require(max_invalid_share=0.5) is half


def test_nothing_to_measure_is_never_too_much_lost():
    nothing = scores([[NAN, NAN]])
    assert nothing.require(max_invalid_share=0.0) is nothing
    assert (nothing.invalid_share, nothing.unmeasured_share) == (0, 1)


@pytest.mark.parametrize("share", [-0.1, 1.1, NAN])
def test_the_allowed_share_is_checked(share):
    with pytest.raises(
        ValueError, match=r"^max_invalid_share: expected a finite number in \[0, 1\]"
    ):
        scores([[1.0]]).require(max_invalid_share=share)


# properties


@st.composite
def batches(draw, turns=None):
    """Ragged trajectories with scores, turns without measure, and lost ones."""
    longest = draw(st.integers(1, 4)) if turns is None else turns
    rows, mask, lost = [], [], {}
    for b in range(draw(st.integers(1, 6))):
        own = draw(st.integers(1, longest))
        kinds = draw(st.lists(st.sampled_from("sslu"), min_size=own, max_size=own))
        lost |= {
            (b, n): draw(st.sampled_from([TIMEOUT, REFUSAL])) for n in range(own) if kinds[n] == "l"
        }
        row = [draw(st.integers(1, 5)) if kind == "s" else NAN for kind in kinds]
        rows.append(row + [NAN] * (longest - own))
        mask.append([True] * own + [False] * (longest - own))
    return scores(rows, lost, mask)


def reference(batch):
    """Mean of each trajectory's measured turns in plain Python; "gap", or None where lost."""
    result = []
    for b, row in enumerate(batch.score.tolist()):
        found = [x for x in row if not math.isnan(x)]
        whole = not any(b == row for row, _ in batch.lost)
        mean = sum(found) / len(found) if found else "gap"
        result.append(mean if whole else None)
    return result


@given(batches())
def test_rewards_equal_a_plain_loop(batch):
    reward = batch.reward(turn_average)
    expected = reference(batch)
    assert reward.valid.tolist() == [value is not None for value in expected]
    assert reward.measured.tolist() == [value not in (None, "gap") for value in expected]
    numbers = [value for value in expected if value not in (None, "gap")]
    assert reward.value[reward.measured].tolist() == pytest.approx(numbers)
    assert reward.value.isnan().tolist() == (~reward.measured).tolist()
    assert batch.invalid_share == expected.count(None) / len(expected)
    assert batch.unmeasured_share == expected.count("gap") / len(expected)


@given(batches())
def test_rewards_of_turns_are_rewards_of_chains_of_one_turn(batch):
    reward = batch.turn_reward(normalize_likert)
    for b, n in some(batch.turn_mask.nonzero().tolist()):
        lost = {(0, 0): batch.lost[b, n]} if (b, n) in batch.lost else {}
        alone = TurnScores(batch.score[b : b + 1, n : n + 1], torch.ones(1, 1) > 0, lost)
        expected = alone.reward(likert_average)
        assert reward.valid[b, n] == expected.valid[0]
        assert reward.measured[b, n] == expected.measured[0]
        torch.testing.assert_close(reward.value[b, n], expected.value[0], equal_nan=True)
    assert not reward.valid[~batch.turn_mask].any()


@given(batches())
def test_credit_knows_what_was_lost_and_what_there_was_nothing_to_measure_in(batch):
    whole, of_turns = batch.reward(likert_average), batch.turn_reward(normalize_likert)
    value, valid, measured = batch.credited(of_turns.value, TrajectoryCredit())
    for n in some(range(value.shape[1])):
        torch.testing.assert_close(value[:, n], whole.value, equal_nan=True, rtol=0, atol=0)
        assert torch.equal(valid[:, n], whole.valid)
        assert torch.equal(measured[:, n], whole.measured)
    value, valid, measured = batch.credited(of_turns.value, TurnCredit())
    torch.testing.assert_close(value, of_turns.value, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(valid, of_turns.valid)
    assert torch.equal(measured, of_turns.measured)


def test_credit_refuses_rewards_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected shape"):
        FOUR.credited(torch.ones(4, 2), TurnCredit())
    with pytest.raises(ValueError, match=r"finite"):
        FOUR.credited(torch.full_like(FOUR.score, NAN), TurnCredit())


@given(batches(turns=1))
def test_of_one_turn_both_rewards_are_equal(batch):
    whole, of_turns = batch.reward(turn_average), batch.turn_reward(lambda score: score)
    torch.testing.assert_close(of_turns.value[:, 0], whole.value, equal_nan=True)
    assert torch.equal(of_turns.valid[:, 0], whole.valid)


@given(batches())
def test_every_turn_is_in_one_of_three_states(batch):
    assert sum(batch.reasons.values()) == int(batch.lost_mask.sum()) == len(batch.lost)
    states = torch.stack([batch.measured, batch.unmeasured, batch.lost_mask]).long().sum(dim=0)
    assert torch.equal(states, batch.turn_mask.long())


@given(st.lists(batches(), min_size=1, max_size=4))
def test_joined_batches_are_their_parts_in_order(parts):
    whole = TurnScores.concatenate(parts)
    assert len(whole) == sum(map(len, parts))
    assert len(whole.lost) == sum(len(part.lost) for part in parts)
    rewards = [part.reward(turn_average) for part in parts]
    reward = whole.reward(turn_average)
    torch.testing.assert_close(reward.value, torch.cat([r.value for r in rewards]), equal_nan=True)
    assert torch.equal(reward.valid, torch.cat([r.valid for r in rewards]))
    start = len(parts[0])
    assert {k: v for k, v in whole.lost.items() if k[0] < start} == dict(parts[0].lost)


def test_shorter_chains_are_padded_when_joined():
    whole = TurnScores.concatenate([scores([[1.0]]), scores([[1.0, 2.0]])])
    assert whole.turn_mask.tolist() == [[True, False], [True, True]]
    assert whole.score.isnan().tolist() == [[False, True], [False, False]]
    with pytest.raises(ValueError, match=exactly("parts: expected at least one, got none")):
        TurnScores.concatenate([])


# what is refused


NOT_NAN = "score: expected NaN where lost or padded, got"
NO_TURN = "lost: expected (trajectory, turn) that exist, got"
SOME_TURN = "turn_mask: expected at least one turn in each trajectory"
TABLE = "score: expected a non-empty tensor of shape [B, N]"


@pytest.mark.parametrize(
    ("rows", "lost", "mask", "message"),
    [
        (
            [[math.inf]],
            {},
            None,
            "score: expected a finite score, or NaN for none, got inf at index",
        ),
        ([[1.0, 0.5]], {(0, 1): TIMEOUT}, None, f"{NOT_NAN} 0.5 at index [0, 1]"),
        ([[1.0, 0.0]], {}, [[True, False]], f"{NOT_NAN} 0.0 at index [0, 1]"),
        ([[1.0]], {(1, 0): TIMEOUT}, None, f"{NO_TURN} (1, 0)"),
        ([[1.0]], {(0, 1): TIMEOUT}, None, f"{NO_TURN} (0, 1)"),
        ([[1.0]], {(-1, 0): TIMEOUT}, None, f"{NO_TURN} (-1, 0)"),
        ([[1.0, NAN]], {(0, 1): TIMEOUT}, [[True, False]], f"{NO_TURN} (0, 1)"),
        ([[1.0], [NAN]], {}, [[True], [False]], f"{SOME_TURN}, got False at index [1]"),
        ([[1.0]], {}, [[True, True]], "turn_mask: expected shape [B, N] = [1, 1], got [1, 2]"),
        ([1.0], {}, None, f"{TABLE}, got [1]"),
        ([[]], {}, None, f"{TABLE}, got [1, 0]"),
    ],
)
def test_contradictions_are_refused(rows, lost, mask, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        scores(rows, lost, mask)


def test_types_are_checked():
    mask = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"score: expected float32 or float64, got torch\.int64"):
        TurnScores(torch.ones(1, 1, dtype=torch.int64), mask, {})
    with pytest.raises(TypeError, match=r"turn_mask: expected a boolean mask, got torch\.float32"):
        TurnScores(torch.ones(1, 1), mask.float(), {})


# faults


def test_a_lost_answer_says_how_often_it_was_asked_for():
    assert str(TIMEOUT) == "time-out after 4 attempts: no answer within 60 s"
    assert str(REFUSAL) == "refusal after 1 attempt: I'm sorry"


def test_an_answer_error_survives_a_copy():
    """Exceptions are copied when they pass between threads and processes."""
    error = copy.copy(AnswerError(Fault.out_of_range, "expected 1..5, got 7"))
    assert (error.fault, error.detail) == (Fault.out_of_range, "expected 1..5, got 7")
    assert str(error) == "score out of range: expected 1..5, got 7"


def test_each_fault_has_words_of_its_own():
    assert len({fault.value for fault in Fault}) == len(Fault)


def test_scores_are_laid_out_over_longer_chains_with_their_faults():
    """The second turn of the first chain is lost; the second chain has two scored turns less."""
    short = scores(
        [[5, NAN, 1], [2, NAN, NAN]], {(0, 1): TIMEOUT}, [[True] * 3, [True, False, False]]
    )
    where = torch.tensor([[True, False, True, True], [False, False, False, True]])
    spread = short.spread(where)
    expected = torch.tensor([[5, NAN, NAN, 1], [NAN, NAN, NAN, 2]])
    torch.testing.assert_close(spread.score, expected, equal_nan=True)
    assert spread.lost == {(0, 2): TIMEOUT}
    assert spread.turn_mask.all()
    assert spread.unmeasured.tolist() == [[False, True, False, False], [True, True, True, False]]
    with pytest.raises(
        ValueError, match=r"where: expected \[3, 1\] turns of each .*, got \[4, 4\]"
    ):
        short.spread(torch.ones_like(where))
    with pytest.raises(ValueError, match=r"where: expected shape \[B, N\]"):
        short.spread(where[:1])


def test_selected_trajectories_keep_their_lost_scores_wherever_they_go():
    score = torch.tensor([[5.0, 3.0], [4.0, torch.nan], [2.0, torch.nan]])
    exists = torch.tensor([[True, True], [True, True], [True, False]])
    scores = TurnScores(score, exists, {(1, 1): TIMEOUT})
    found = scores.select([1, 2, 1])
    torch.testing.assert_close(found.score, score[[1, 2, 1]], equal_nan=True)
    assert torch.equal(found.turn_mask, exists[[1, 2, 1]])
    assert found.lost == {(0, 1): TIMEOUT, (2, 1): TIMEOUT}
    with pytest.raises(IndexError):
        scores.select([3])
