"""Kaplan-Meier with Greenwood's interval, and turns survived: closed forms, loops, coverage."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import instruction_following, survival_curve, turns_survived, wilson_interval
from mteditflow.metrics.survival import chains_at_risk
from tests.loops import some

NAN = math.nan
# Of ten chains by turn: at risk 10, 8 (one lost), 5 (one lost); failed 1, 2, 1.
LENGTHS = [(0, True), (1, False), (1, True), (1, True), (2, False), (2, True), *[(3, False)] * 4]


def table(lengths, turns):
    """Chains that survive so many turns, and then fail or lose the next score."""
    success = torch.zeros(len(lengths), turns)
    valid = torch.ones(len(lengths), turns, dtype=torch.bool)
    for c, (survived, fails) in enumerate(lengths):
        success[c, :survived] = 1
        if not fails:
            valid[c, survived:] = False
    return success, valid


def test_golden_kaplan_meier_with_greenwoods_interval():
    """S = 9/10, * 6/8, * 4/5; v = 1/(10 * 9) + 2/(8 * 6) + 1/(5 * 4)."""
    success, valid = table(LENGTHS, 3)
    assert chains_at_risk(success, valid).tolist() == [10, 8, 5]
    curve = survival_curve(success, valid=valid)
    assert curve.estimate.tolist() == pytest.approx([0.9, 0.675, 0.54])
    variance = [1 / 90, 1 / 90 + 2 / 48, 1 / 90 + 2 / 48 + 1 / 20]
    for share, v, low, high in zip(
        [0.9, 0.675, 0.54], variance, curve.low.tolist(), curve.high.tolist(), strict=True
    ):
        half = 1.959964 * math.sqrt(v) / abs(math.log(share))
        center = math.log(-math.log(share))
        ends = [math.exp(-math.exp(center + sign * half)) for sign in (1, -1)]
        assert [low, high] == pytest.approx(ends, abs=1e-6)


def test_without_loss_it_is_instruction_following_and_the_mean_that_of_the_chains():
    """Greenwood's variance of the mean is then the variance of the chains' turns over C."""
    generator = torch.Generator().manual_seed(0)
    success = torch.rand(40, 6, generator=generator, dtype=torch.float64) < 0.8
    curve, (mean, median) = survival_curve(success), turns_survived(success)
    torch.testing.assert_close(curve.estimate, instruction_following(success.double()))
    turns = success.long().cumprod(dim=1).sum(dim=1).double()
    assert float(mean.estimate) == pytest.approx(float(turns.mean()))
    half = 1.959964 * float(turns.var(unbiased=False) / 40) ** 0.5
    assert float(mean.high - mean.estimate) == pytest.approx(half, rel=1e-5)
    assert float(mean.estimate - mean.low) == pytest.approx(half, rel=1e-5)
    ranked = turns.sort(descending=True).values
    assert float(median.estimate) == float(ranked[19])  # 20 of 40 survive it
    assert median.low <= median.estimate <= median.high


@st.composite
def tables(draw):
    chains, turns = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    size = {"min_size": turns, "max_size": turns}
    rows = st.lists(st.lists(st.booleans(), **size), min_size=chains, max_size=chains)
    return torch.tensor(draw(rows)), torch.tensor(draw(rows))


@given(tables())
def test_the_curve_equals_the_loop(given_table):
    success, valid = given_table
    share, expected = 1.0, []
    alive = set(range(len(success)))
    for t in range(success.shape[1]):
        alive = {c for c in alive if valid[c, t]}
        failed = {c for c in alive if not success[c, t]}
        if alive:
            share *= 1 - len(failed) / len(alive)
        elif share > 0:
            share = NAN
        expected.append(share)
        alive -= failed
    curve = survival_curve(success, valid=valid)
    assert curve.estimate.tolist() == pytest.approx(expected, nan_ok=True)
    known = ~curve.estimate.isnan()
    assert torch.equal(known, ~curve.low.isnan())
    assert torch.equal(known, ~curve.high.isnan())
    estimate, low, high = (x[known] for x in curve)
    assert (low <= estimate + 1e-12).all()
    assert (estimate <= high + 1e-12).all()
    assert (low < high).all()  # there is no certainty at 0 and 1


def test_ends_have_wilsons_interval_and_the_mean_keeps_a_width():
    curve, found = survival_curve(torch.ones(8, 2)), turns_survived(torch.ones(8, 2))
    torch.testing.assert_close(curve.low, wilson_interval(8, 8).low.expand(2))
    assert curve.high.tolist() == [1, 1]
    assert 0 < float(found.mean.low) < float(found.mean.high) == 2
    curve, found = survival_curve(torch.zeros(8, 2)), turns_survived(torch.zeros(8, 2))
    torch.testing.assert_close(curve.high, wilson_interval(0, 8).high.expand(2))
    assert [float(x) for x in found.median] == [0, 0, 0]
    assert 0 == float(found.mean.low) < float(found.mean.high) < 2


def test_what_is_not_known_is_nan_and_not_a_number_of_turns():
    """All chains lose turn 2 while 3 of 4 are alive: the median is 1 or more, nobody knows."""
    success, valid = table([(1, False)] * 3 + [(0, True)], 2)
    curve, (mean, median) = (
        survival_curve(success, valid=valid),
        turns_survived(success, valid=valid),
    )
    assert curve.estimate.tolist() == pytest.approx([0.75, NAN], nan_ok=True)
    assert all(bool(x.isnan()) for x in some([*mean, median.estimate]))
    success, valid = table([(1, False)] + [(0, True)] * 3, 2)
    assert float(turns_survived(success, valid=valid).median.estimate) == 0  # 1/4 < 1/2 already


def test_the_interval_covers_the_share_under_random_loss():
    """95% +- 4 standard deviations of the 95% intervals over 400 tables of 60 chains cover."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
    covered = torch.zeros(3)
    for _ in range(400):
        success = torch.rand(60, 3, generator=generator) < torch.tensor([0.9, 0.8, 0.7])
        valid = torch.rand(60, 3, generator=generator) < 0.85
        _, low, high = survival_curve(success, valid=valid)
        covered += (low <= truth) & (truth <= high)
    assert ((covered / 400 - 0.95).abs() < 4 * (0.95 * 0.05 / 400) ** 0.5).all()


def test_wrong_calls_are_refused():
    for function in (survival_curve, turns_survived):
        with pytest.raises(ValueError, match="success: expected 0 or 1"):
            function([[0.5]])
        with pytest.raises(ValueError, match="confidence: expected"):
            function([[1.0]], confidence=1.0)
        with pytest.raises(TypeError, match="valid: expected a boolean mask"):
            function([[1.0]], valid=[[1.0]])


def test_the_median_is_right_where_exactly_half_survive():
    """The product of conditional shares is 1/2 but for its rounding."""
    for chains in range(4, 27, 2):
        for early in some(range(chains // 2)):
            success = torch.ones(chains, 3, dtype=torch.int64)
            success[:early, 0] = 0
            success[early : chains // 2, 2] = 0
            assert turns_survived(success).median.estimate == 3, (chains, early)
