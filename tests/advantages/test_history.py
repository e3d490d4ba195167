"""Rewards of earlier rounds: joined statistics are those of the concatenation, and survive JSON."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import RewardHistory, Signal, TurnCredit, group_advantage, turn_advantage
from tests.loops import some

NAMES = torch.tensor([7, 7, -3, -3])


def signal(rows, valid=None, dtype=torch.float64):
    value = torch.tensor(rows, dtype=dtype)
    return Signal(value, torch.ones_like(value, dtype=torch.bool) if valid is None else valid)


def draw(seed, count=4, turns=2, lost=0.2, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    value = torch.rand(count, turns, generator=random, dtype=torch.float64).to(dtype)
    valid = torch.rand(count, turns, generator=random) >= lost
    return Signal(torch.where(valid, value, torch.nan), valid)


def through_json(history):
    return RewardHistory.from_state(history.rounds, json.loads(json.dumps(history.state_dict())))


# golden values


def test_golden_advantages_by_hand():
    """Remembered 0, 2; now 4, 6: mean 3, std sqrt(5)."""
    history = RewardHistory(rounds=1).updated({"r": signal([[0.0], [2.0]])}, torch.tensor([7, 7]))
    now, group = {"r": signal([[4.0], [6.0]])}, torch.tensor([7, 7])
    joined, groups = history.joined(now, group)
    assert groups.tolist() == [7, 7, 7, 7]
    assert joined["r"].value.flatten().tolist() == [4.0, 6.0, 0.0, 2.0]
    found = turn_advantage(joined, {"r": 1.0}, groups, eps=0.0).value[:2].flatten()
    torch.testing.assert_close(found, torch.tensor([1.0, 3.0], dtype=torch.float64) / 5**0.5)


def test_golden_state():
    valid = torch.tensor([[True, False], [True, True]])
    own = Signal(torch.tensor([[0.5, torch.nan], [0.25, 1.0]]), valid)
    history = RewardHistory(2).updated({"r": own}, torch.tensor([7, -3]))
    assert history.state_dict() == {"7": [{"r": [[0.5, None]]}], "-3": [{"r": [[0.25, 1.0]]}]}


# laws


@given(st.integers(1, 4), st.lists(st.integers(0, 999), max_size=6), st.integers(0, 999))
def test_joined_and_cut_is_the_advantage_over_the_concatenation(rounds, past, now):
    history = RewardHistory(rounds)
    for seed in past:
        history = history.updated({"r": draw(seed)}, NAMES)
    current = draw(now)
    joined, groups = through_json(history).joined({"r": current}, NAMES)
    found = turn_advantage(joined, {"r": 1.0}, groups)
    parts = [current, *(draw(seed) for seed in past[-rounds:])]
    value, valid = (torch.cat([getattr(p, field) for p in parts]) for field in ("value", "valid"))
    expected = group_advantage(value, NAMES.repeat(len(parts)), valid=valid)
    torch.testing.assert_close(found.value[:4], expected[:4])
    assert torch.equal(found.valid[:4], current.valid)


@given(st.integers(0, 99), st.integers(1, 4))
def test_without_history_nothing_is_changed(seed, rounds):
    current = draw(seed)
    joined, groups = RewardHistory(rounds).joined({"r": current}, NAMES)
    assert torch.equal(groups, NAMES)
    assert torch.equal(joined["r"].valid, current.valid)
    assert torch.equal(joined["r"].value[current.valid], current.value[current.valid])
    # Nor by what other chains had.
    other = RewardHistory(rounds).updated({"r": draw(1)}, NAMES + 100)
    assert torch.equal(other.joined({"r": current}, NAMES)[1], NAMES)


def test_equal_rewards_for_ever_give_advantages_of_0():
    history, same = RewardHistory(3), {"r": signal([[0.3, 0.7]] * 4)}
    for _ in range(5):
        joined, groups = history.joined(same, NAMES)
        found = turn_advantage(joined, {"r": 1.0}, groups, eps=0.0)
        assert not bool(found.value.any())
        history = history.updated(same, NAMES)


def test_a_flat_group_is_compared_with_its_past():
    history = RewardHistory(1).updated({"r": signal([[0.0]] * 4)}, NAMES)
    joined, groups = history.joined({"r": signal([[1.0]] * 4)}, NAMES)
    found = turn_advantage(joined, {"r": 1.0}, groups, eps=0.0).value[:4]
    assert found.flatten().tolist() == [1.0] * 4


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=6), st.integers(0, 9))
def test_ids_are_any_integers_and_numbers_survive_json_exactly(ids, seed):
    group = torch.tensor(ids)
    for dtype in (torch.float32, torch.float64):
        own = draw(seed, count=len(ids), dtype=dtype)
        history = RewardHistory(2).updated({"r": own}, group)
        assert through_json(history) == history
        joined, groups = through_json(history).joined({"r": own}, group)
        assert sorted(groups.tolist()) == sorted(ids * 2)
        value, valid, _ = joined["r"]
        assert value.dtype == dtype
        for name in some(set(ids)):
            before, after = (groups[: len(ids)] == name), (groups[len(ids) :] == name)
            past = value[len(ids) :][after], valid[len(ids) :][after]
            torch.testing.assert_close(past[0], own.value[before], rtol=0, atol=0, equal_nan=True)
            assert torch.equal(past[1], own.valid[before])


def test_lost_entries_stay_lost():
    valid = torch.tensor([[True], [False], [True], [True]])
    own = Signal(torch.tensor([[1.0], [99.0], [2.0], [3.0]]), valid)
    history = RewardHistory(1).updated({"r": own}, NAMES)
    joined, groups = through_json(history).joined({"r": signal([[0.0]] * 4)}, NAMES)
    assert joined["r"].valid[4:].flatten().tolist() == [True, False, True, True]
    found = turn_advantage(joined, {"r": 1.0}, groups, std="none").value.flatten()
    assert found[:2].tolist() == pytest.approx([-1 / 3] * 2)  # over 0, 0, 1


def test_what_was_unmeasured_then_is_unmeasured_now_and_not_lost():
    """It costs a remembered chain its consistency, and not its reward for following."""
    value, yes = torch.tensor([[0.5], [torch.nan]], dtype=torch.float64), torch.ones(2, 1) > 0
    before = {"if": signal([[0.0], [4.0]]), "cc": Signal(value, yes, value.isfinite())}
    group = torch.tensor([7, 7])
    history = through_json(RewardHistory(1).updated(before, group))
    assert history.state_dict() == {"7": [{"if": [[0.0], [4.0]], "cc": [[0.5], ["unmeasured"]]}]}
    now = {"if": signal([[1.0], [3.0]]), "cc": signal([[0.0], [1.0]])}
    joined, groups = history.joined(now, group)
    assert joined["cc"].valid.all()
    assert joined["cc"].measured.flatten().tolist() == [True, True, True, False]
    found = turn_advantage(joined, {"if": 1.0, "cc": 1.0}, groups, std="none").value
    assert found[:2].flatten().tolist() == [-1 - 0.5, 1 + 0.5]  # IF over 1, 3, 0, 4


def test_only_the_last_rounds_are_kept():
    history = RewardHistory(2)
    for k in range(5):
        history = history.updated({"r": signal([[float(k)]] * 4)}, NAMES)
    assert [entry["r"][0] for entry in history.entries[7]] == [[3.0], [4.0]]
    shorter = RewardHistory.from_state(1, history.state_dict())
    assert [entry["r"][0] for entry in shorter.entries[7]] == [[4.0]]


def test_a_history_is_not_changed_by_what_follows_it():
    first = RewardHistory(2).updated({"r": draw(0)}, NAMES)
    before = json.dumps(first.state_dict())
    first.updated({"r": draw(1)}, NAMES)
    first.joined({"r": draw(1)}, NAMES)
    assert json.dumps(first.state_dict()) == before


def test_chains_of_another_number_of_turns_or_other_terms_do_not_count():
    history = RewardHistory(3)
    history = history.updated({"r": draw(0, turns=2, lost=0.0)}, NAMES)
    history = history.updated({"r": draw(1, turns=3, lost=0.0)}, NAMES)
    history = history.updated({"other": draw(2, turns=3, lost=0.0)}, NAMES)
    now = draw(3, turns=3, lost=0.0)
    joined, groups = history.joined({"r": now}, NAMES)
    assert (len(groups), joined["r"].value.shape) == (16, (16, 3))
    of_entry = joined["r"].valid[4:].view(2, 3, 2, 3)  # group, entry, member, turn
    assert of_entry.all(dim=(2, 3)).tolist() == [[False, True, False]] * 2
    assert of_entry.any(dim=(2, 3)).tolist() == [[False, True, False]] * 2
    found = turn_advantage(joined, {"r": 1.0}, groups).value[:4]
    both = torch.cat([now.value, draw(1, turns=3, lost=0.0).value])
    torch.testing.assert_close(found, group_advantage(both, NAMES.repeat(2))[:4])


def test_several_terms_line_up():
    now = {"a": draw(0, lost=0.0), "b": draw(1, lost=0.3)}
    past = {"a": draw(2, lost=0.3), "b": draw(3, lost=0.0)}
    joined, groups = RewardHistory(1).updated(past, NAMES).joined(now, NAMES)
    found = turn_advantage(joined, {"a": 1.0, "b": 0.5}, groups)
    valid = torch.cat([now["b"].valid, past["a"].valid])
    both = {name: torch.cat([now[name].value, past[name].value]) for name in now}
    expected = sum(
        weight * group_advantage(both[name], NAMES.repeat(2), valid=valid)
        for name, weight in {"a": 1.0, "b": 0.5}.items()
    )
    torch.testing.assert_close(found.value[:4], expected[:4])


# errors


def test_errors():
    good = {"r": TurnCredit()(torch.zeros(4, 2))}
    with pytest.raises(ValueError, match="rounds: expected an integer >= 1, got 0"):
        RewardHistory(0)
    flat = Signal(torch.zeros(4), torch.ones(4, dtype=torch.bool))
    short = Signal(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool))
    infinite = Signal(torch.full((4, 2), torch.inf), torch.ones(4, 2, dtype=torch.bool))
    for signals, group, error, message in (
        ({}, NAMES, ValueError, "signals: expected at least one, got none"),
        (good, NAMES[:, None], ValueError, "group: expected a non-empty tensor of shape [B]"),
        (good, NAMES.float(), TypeError, "group: expected integer ids, got torch.float32"),
        (good, NAMES.bool(), TypeError, "group: expected integer ids, got torch.bool"),
        ({"r": flat}, NAMES, ValueError, "signals['r']: expected a non-empty tensor of shape"),
        ({"r": short}, NAMES, ValueError, "signals['r']: expected shape [B, N] = [4, 2]"),
        ({**good, "s": short}, NAMES, ValueError, "signals['s']: expected shape [B, N] = [4, 2]"),
        ({"r": torch.zeros(4, 2)}, NAMES, TypeError, "signals['r']: expected a Signal"),
        ({"r": infinite}, NAMES, ValueError, "signals['r']: expected finite values where measured"),
    ):
        for method in (RewardHistory(1).joined, RewardHistory(1).updated):
            with pytest.raises(error, match=f"^{re.escape(message)}"):
                method(signals, group)


def test_ids_of_json_are_refused_by_the_constructor():
    with pytest.raises(TypeError, match="expected integer group ids, got '7'; from_state reads"):
        RewardHistory(rounds=2, entries={"7": []})
