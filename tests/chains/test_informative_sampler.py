"""Rounds drawn by what their groups showed: the same on all ranks, resumed exactly."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.chains import GroupSampler, InformativeSampler
from tests.loops import some


def exactly(text):
    return f"^{re.escape(text)}$"


@st.composite
def plans(draw):
    """A number of chains, the options of a sampler, and ranks that divide it in either way."""
    count = draw(st.integers(1, 12))
    groups, size = draw(st.integers(1, count)), draw(st.integers(1, 4))
    split = draw(st.booleans())
    rows = groups * size if split else groups
    ranks = draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0]))
    options = {
        "groups": groups,
        "group_size": size,
        "seed": draw(st.integers(0, 9)),
        "uniform": draw(st.sampled_from([0.1, 1.0])),
        "memory": draw(st.sampled_from([0.0, 0.5])),
    }
    return count, options, {"ranks": ranks, "split_groups": split}


def spread_of(chain, number):
    """What a chain's group shows in a round; now and then its rewards are lost."""
    return None if (chain + number) % 5 == 0 else (7 * chain + 3 * number) % 4 / 4


def play(sampler, numbers, drawn=lambda own: own):
    """Rounds of a sampler; ``drawn`` gives all ranks' indices from its own."""
    rounds, iterator = [], iter(sampler)
    for number in numbers:
        rounds.append(next(iterator))
        shown = {chain: spread_of(chain, number) for chain in set(drawn(rounds[-1]))}
        sampler.step({chain: x for chain, x in shown.items() if x is not None})
    return rounds


@given(plans())
def test_a_round_has_distinct_chains_group_after_group(plan):
    count, options, _ = plan
    for indices in some(play(InformativeSampler(range(count), **options), range(6))):
        assert set(Counter(indices).values()) == {options["group_size"]}
        assert len(set(indices)) == options["groups"]
        assert indices == sorted(indices, key=indices.index)
        assert set(indices) <= set(range(count))


@given(plans(), st.integers(0, 5))
def test_ranks_agree_and_a_resumed_sampler_goes_on_on_any_number_of_them(plan, done):
    count, options, spread = plan
    undisturbed = play(InformativeSampler(range(count), **options), range(6))
    first = InformativeSampler(range(count), **options)
    play(first, range(done))
    state = json.loads(json.dumps(first.state_dict()))
    parts = []
    for rank in range(spread["ranks"]):
        resumed = InformativeSampler(range(count), **options, **spread, rank=rank)
        resumed.load_state_dict(state)
        rest = iter(undisturbed[done:])
        parts.append(play(resumed, range(done, 6), lambda _, rest=rest: next(rest)))
    joined = [[index for own in rounds for index in own] for rounds in zip(*parts, strict=True)]
    assert joined == undisturbed[done:]


GOLDEN = [[2, 1], [1, 3], [2, 0]]


def test_golden_draws():
    # what it gave when it was written; a run that is resumed relies on the draws of a seed
    sampler = InformativeSampler(range(4), groups=2, group_size=1, seed=3)
    assert play(sampler, range(3)) == GOLDEN


def test_chains_that_spread_are_drawn_in_proportion_and_no_other_is_left_out():
    sampler = InformativeSampler(range(4), groups=1, group_size=1, uniform=0.4)
    sampler.step({0: 0.0, 1: 1.0, 2: 3.0, 3: 0.0})
    expected = [0.1, 0.25, 0.55, 0.1]
    assert sampler.probabilities == pytest.approx(expected)
    rounds, times = iter(sampler), Counter()
    for _ in range(3000):
        times[next(rounds)[0]] += 1
        sampler.step({})
    for chain, p in some(enumerate(expected)):
        assert abs(times[chain] / 3000 - p) < 4 * (p * (1 - p) / 3000) ** 0.5


def test_a_chain_that_was_never_drawn_counts_as_the_best_and_the_past_fades():
    sampler = InformativeSampler(range(3), groups=1, group_size=1, uniform=0.5, memory=0.5)
    assert sampler.probabilities == [1 / 3] * 3
    sampler.step({0: 0.25, 1: 0.75})
    assert sampler.state_dict()["spreads"] == [0.25, 0.75, None]
    assert sampler.probabilities == pytest.approx([1 / 6 + x / 14 for x in (1, 3, 3)])
    sampler.step({0: 0.75})
    assert sampler.state_dict()["spreads"] == [0.5, 0.75, None]


def test_a_round_waits_for_what_the_last_one_showed():
    sampler = InformativeSampler(range(4), groups=2, group_size=2)
    rounds = iter(sampler)
    first = next(rounds)
    with pytest.raises(RuntimeError, match="step: expected a call after each round, got none"):
        next(rounds)
    assert next(iter(sampler)) == first  # a round that is done again is the same


def test_errors():
    def build(**options):
        return InformativeSampler(range(4), **{"groups": 2, "group_size": 2, **options})

    for options, message in (
        ({"groups": 5}, "groups: expected at most the 4 chains, got 5"),
        ({"uniform": 0.0}, "uniform: expected a finite number in (0, 1], got 0.0"),
        ({"memory": 1.0}, "memory: expected a finite number in [0, 1), got 1.0"),
        ({"ranks": 3}, "groups: expected a multiple of the 3 ranks, got 2; next: 3"),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            build(**options)
    sampler = build()
    before = sampler.state_dict()
    for spread, message in (
        ({1: 0.5, 4: 0.0}, "spread: expected chains in [0, 4), got 4"),
        ({1: 0.5, 2: -1.0}, "spread[2]: expected a finite number in [0, inf], got -1.0"),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            sampler.step(spread)
    assert sampler.state_dict() == before
    for state, message in (
        (build(seed=1).state_dict(), "state: expected seed = 0, as in this sampler, got 1"),
        (
            build(memory=0.0).state_dict(),
            "state: expected memory = 0.5, as in this sampler, got 0.0",
        ),
        (
            GroupSampler(range(4), groups=2, group_size=2).state_dict(),
            "state: expected uniform = 0.2, as in this sampler, got None",
        ),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            sampler.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": None}, "state: expected a round of at least 0, got None"),
        ({"round": -1}, "state: expected a round of at least 0, got -1"),
        ({"round": True}, "state: expected a round of at least 0, got True"),
        ({"spreads": [0.5] * 3}, "state: expected 4 spreads, one per chain"),
        ({"spreads": None}, "state: expected 4 spreads, one per chain"),
        ({"spreads": [0.5, None, -1.0, 0.0]}, "state: expected spreads of at least 0, or None"),
        ({"spreads": [0.5, None, float("nan"), 0.0]}, "state: expected spreads of at least 0"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change, message):
    sampler = InformativeSampler(range(4), groups=2, group_size=2)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        sampler.load_state_dict(before | change)
    assert sampler.state_dict() == before
