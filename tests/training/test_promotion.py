"""The promotion of a student to teacher: the paper's rule, and the counts that it compares."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.training import (
    SessionCounts,
    SessionGain,
    count_sessions,
    promotes,
    promotion_at,
    session_gain,
)
from tests.loops import some

MARGINS = {"Qwen": (2, 5), "FLUX": (2, 3), "FireRed": (3, 5)}

# Of one turn: (more successes, fewer collapses) and the verdict, with FLUX's margins 2 and 3.
GOLDEN = {
    (2, -1): "promote",  # successes at their margin, one collapse more is let pass
    (2, -2): "reject",  # two are not
    (1, 2): "inconclusive",  # both just below their margins
    (-1, -1): "inconclusive",  # both at the bottom of the band
    (0, 0): "inconclusive",
    (1, 3): "promote",  # collapses at their margin
    (-1, 3): "promote",
    (-2, 3): "reject",  # two successes fewer
    (-2, 23): "reject",
    (-2, 0): "reject",
    (0, -2): "reject",
    (23, -2): "reject",
    (5, 5): "promote",
}


@pytest.mark.parametrize("gain", GOLDEN)
def test_golden(gain):
    assert promotion_at(SessionGain(*gain), success_margin=2, collapse_margin=3) == GOLDEN[gain]


def test_where_the_public_code_differs():
    """FireRed's margins 3 and 5: the code wants |more successes| <= 1 on the second way."""
    for gain in some([(2, 5), (2, 9)]):
        verdict = promotion_at(SessionGain(*gain), success_margin=3, collapse_margin=5)
        assert verdict == "promote"


def by_the_code(more, fewer, alpha, beta):
    """The public code's rule for one turn, from its description."""
    if -1 <= more < alpha and -1 <= fewer < beta:
        return "inconclusive"
    first, second = more >= alpha and fewer >= -1, fewer >= beta and abs(more) <= 1
    return "promote" if first or second else "reject"


@pytest.mark.parametrize("name", MARGINS)
def test_the_two_rules_differ_nowhere_else(name):
    alpha, beta = MARGINS[name]
    margins = {"success_margin": alpha, "collapse_margin": beta}
    differ = {
        (more, fewer)
        for more, fewer in product(range(-23, 24), repeat=2)
        if promotion_at(SessionGain(more, fewer), **margins)
        != by_the_code(more, fewer, alpha, beta)
    }
    expected = {(more, fewer) for more in range(2, alpha) for fewer in range(beta, 24)}
    assert differ == expected
    assert bool(expected) == (name == "FireRed")


@given(
    more=st.integers(-23, 23),
    fewer=st.integers(-23, 23),
    margins=st.sampled_from(sorted(MARGINS.values())),
)
def test_more_of_either_is_never_worse(more, fewer, margins):
    order = {"reject": 0, "inconclusive": 1, "promote": 2}
    given_ = dict(zip(("success_margin", "collapse_margin"), margins, strict=True))
    here, *better = (
        order[promotion_at(SessionGain(*x), **given_)]
        for x in ((more, fewer), (more + 1, fewer), (more, fewer + 1))
    )
    assert all(x >= here for x in some(better))


@pytest.mark.parametrize(
    ("gains", "promoted"),
    [
        ([(2, 0), (-9, -9), (-9, -9)], True),  # turn 10 decides
        ([(-2, 0), (9, 9), (9, 9)], False),
        ([(0, 0), (2, 0), (-9, -9)], True),  # then turn 8
        ([(0, 0), (0, -2), (9, 9)], False),
        ([(0, 0), (1, 2), (0, 3)], True),  # then turn 5
        ([(0, 0), (1, 2), (-1, -1)], False),  # nowhere
    ],
)
def test_the_first_turn_with_a_verdict_decides(gains, promoted):
    assert promotes([SessionGain(*x) for x in gains]) is promoted


def test_sessions_by_hand():
    """Success: turn 1 alone; all; none. Collapse: from turn 3; a lone spoilt turn; from turn 1."""
    success = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    degraded = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0]]).bool()
    counts = [count_sessions(success, degraded, k) for k in (1, 2, 3, 4)]
    assert counts == [(2, 1), (1, 1), (1, 2), (1, 2)]
    assert session_gain(SessionCounts(9, 2), SessionCounts(7, 5)) == SessionGain(2, 3)


def test_errors():
    ones = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="turn: expected an integer <= 3"):
        count_sessions(ones, ones, 4)
    with pytest.raises(ValueError, match="degraded: expected shape"):
        count_sessions(ones, ones[:, :2], 1)
    with pytest.raises(TypeError, match="success: expected a boolean mask"):
        count_sessions(ones.float(), ones, 1)
    with pytest.raises(ValueError, match="gains: expected one for each turn"):
        promotes([])
    with pytest.raises(ValueError, match="success_margin: expected an integer >= 1"):
        promotion_at(SessionGain(0, 0), success_margin=0)
    with pytest.raises(TypeError, match=r"gain\.successes: expected an integer"):
        promotion_at(SessionGain(0.5, 0))
