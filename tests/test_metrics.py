"""Benchmark metrics against loops and the paper's printed numbers; intervals against known laws."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import (
    bootstrap_interval,
    conditional_success,
    content_consistency,
    instruction_following,
    marginal_success,
    overall,
)

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
NAN = math.nan
shares = pytest.mark.parametrize(
    "metric", [instruction_following, marginal_success, conditional_success]
)


def exactly(message):
    return f"^{re.escape(message)}$"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def tables(draw):
    chains, turns = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    size = {"min_size": turns, "max_size": turns}
    rows = st.lists(st.lists(st.booleans(), **size), min_size=chains, max_size=chains)
    return torch.tensor(draw(rows)), torch.tensor(draw(rows))


def share(kept):
    return sum(kept) / len(kept) if kept else NAN


# IF and marginal


def test_golden_shares():
    success = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
    assert instruction_following(success).tolist() == [0.75, 0.5, 0.25]
    assert marginal_success(success).tolist() == [0.75, 0.75, 0.75]


def test_golden_shares_of_what_is_valid():
    success = torch.tensor([[1.0, NAN, 1.0], [0.0, NAN, 1.0], [1.0, 1.0, 0.0], [NAN, 1.0, NAN]])
    valid = ~success.isnan()
    # turn 1: 1, 0, 1; from turn 2 on only the third chain has all its turns
    torch.testing.assert_close(
        instruction_following(success, valid=valid), torch.tensor([2 / 3, 1.0, 0.0])
    )
    # turn 2: the third and fourth; turn 3: all but the fourth
    torch.testing.assert_close(
        marginal_success(success, valid=valid), torch.tensor([2 / 3, 1.0, 2 / 3])
    )


def test_a_turn_without_valid_chains_is_nan():
    success, valid = torch.ones(2, 2), torch.tensor([[True, False], [True, False]])
    for metric in (instruction_following, marginal_success, conditional_success):
        first, second = metric(success, valid=valid).tolist()
        assert first == 1.0
        assert math.isnan(second)


@given(tables())
def test_shares_equal_the_loop(table):
    success, valid = table
    rows = list(zip(success.tolist(), valid.tolist(), strict=True))
    turns = range(success.shape[1])
    following = [share([all(s[: t + 1]) for s, v in rows if all(v[: t + 1])]) for t in turns]
    marginal = [share([s[t] for s, v in rows if v[t]]) for t in turns]
    double = success.double()
    result = instruction_following(double, valid=valid).tolist()
    assert result == pytest.approx(following, nan_ok=True)
    result = marginal_success(double, valid=valid).tolist()
    assert result == pytest.approx(marginal, nan_ok=True)


@pytest.mark.parametrize(
    ("success", "ratio", "given_first"),
    [
        ([[1, 0], [0, 1], [0, 1]], 2.0, 0.0),  # Marginal 1/3, 2/3; the one success is lost
        ([[1, 1], [1, 0], [0, 1], [0, 0]], 1.0, 0.5),  # 2/4, 2/4; one of two
        ([[1, 1], [1, 1], [1, 0], [1, 0]], 0.5, 0.5),  # alike where all succeed at turn 1
    ],
)
def test_golden_conditional_success_is_not_the_ratio_of_marginals(success, ratio, given_first):
    success = torch.tensor(success)
    first, second = marginal_success(success).tolist()
    assert second / first == pytest.approx(ratio)
    assert conditional_success(success).tolist() == [1.0, given_first]


def test_golden_conditional_success_of_what_is_valid():
    success = torch.tensor([[1.0, NAN, 0.0], [1.0, 1.0, NAN], [NAN, 1.0, 1.0], [0.0, 1.0, 1.0]])
    # turn 2: the second chain alone, the first has no score; turn 3: the first alone
    assert conditional_success(success, valid=~success.isnan()).tolist() == [1.0, 1.0, 0.0]


def test_conditional_success_is_nan_where_no_chain_succeeded_at_turn_1():
    assert conditional_success(torch.tensor([[0, 1, 1], [0, 0, 1]])).isnan().all()


@given(tables())
def test_conditional_success_equals_the_loop(table):
    success, valid = table
    rows = list(zip(success.tolist(), valid.tolist(), strict=True))
    expected = [
        share([s[t] for s, v in rows if v[0] and v[t] and s[0]]) for t in range(success.shape[1])
    ]
    result = conditional_success(success.double(), valid=valid)
    assert result.tolist() == pytest.approx(expected, nan_ok=True)
    assert ((result >= 0) & (result <= 1) | result.isnan()).all()


@given(tables())
def test_success_at_both_turns_is_following_at_turn_2(table):
    """P(1 and 2) = P(2 | 1) P(1)."""
    success = table[0].double()
    first, second = marginal_success(success)[0], conditional_success(success)[1:2]
    if first > 0:
        torch.testing.assert_close(first * second, instruction_following(success)[1:2])


@given(tables())
def test_following_falls_and_stays_below_marginal(table):
    success, _ = table
    following, marginal = instruction_following(success), marginal_success(success)
    assert (following <= marginal).all()
    assert (following.diff() <= 0).all()
    assert following[0] == marginal[0]


@shares
@given(tables())
def test_chains_may_come_in_any_order(metric, table):
    success, valid = table
    torch.testing.assert_close(
        metric(success.flip(0), valid=valid.flip(0)), metric(success, valid=valid), equal_nan=True
    )


@shares
def test_share_errors(metric):
    for wrong in (0.5, NAN):
        message = f"success: expected 0 or 1, got {wrong} at index [0, 1]"
        with pytest.raises(ValueError, match=exactly(message)):
            metric(torch.tensor([[1.0, wrong]]))
    for shape in [(3,), (1, 2, 3), (0, 2)]:
        message = f"success: expected a non-empty tensor of shape [C, N], got {list(shape)}"
        with pytest.raises(ValueError, match=exactly(message)):
            metric(torch.ones(shape))
    with pytest.raises(
        TypeError, match=exactly("valid: expected a boolean mask, got torch.float32")
    ):
        metric(torch.ones(1, 2), valid=torch.ones(1, 2))
    with pytest.raises(ValueError, match=exactly("valid: expected shape [C, N] = [1, 2], got [2]")):
        metric(torch.ones(1, 2), valid=torch.ones(2, dtype=torch.bool))


@shares
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bool, torch.float32),
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_and_device(metric, dtype, expected, device):
    result = metric(torch.ones(2, 3, dtype=dtype, device=device))
    assert result.dtype == expected
    assert result.device.type == device


# CC


def test_golden_consistency():
    things = torch.tensor([[0.5, 1.0], [0.75, NAN], [NAN, NAN]])
    background = torch.tensor([[1.0, 0.5], [0.5, 0.25], [0.75, NAN]])
    # turn 1: (0.625 + 0.75) / 2; turn 2: (1 + 0.375) / 2
    assert content_consistency(things, background).tolist() == [0.6875, 0.6875]
    assert content_consistency(things).tolist() == [0.625, 1.0]
    # not the per-sample average, which would be (0.75 + 0.625 + 0.75) / 3 at turn 1
    per_sample = torch.stack([things, background]).nanmean(dim=0)
    assert content_consistency(per_sample)[0].item() == pytest.approx(2.125 / 3)


def test_a_term_that_no_chain_has_is_left_out():
    nothing = torch.full((2, 1), NAN)
    assert content_consistency(torch.tensor([[0.25], [0.75]]), nothing).tolist() == [0.5]
    assert math.isnan(content_consistency(nothing).item())


def test_consistency_types_and_errors():
    assert content_consistency(torch.ones(1, 1).half()).dtype == torch.float32
    assert content_consistency(torch.ones(1, 1).double(), torch.ones(1, 1)).dtype == torch.float64
    with pytest.raises(ValueError, match=exactly("terms: expected at least one tensor, got none")):
        content_consistency()
    message = "terms[1]: expected the shape of terms[0], [1, 2], got [2, 1]"
    with pytest.raises(ValueError, match=exactly(message)):
        content_consistency(torch.ones(1, 2), torch.ones(2, 1))
    message = "terms[1]: expected a floating-point tensor, got torch.int64"
    with pytest.raises(TypeError, match=exactly(message)):
        content_consistency(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int64))
    for shape in [(2,), (1, 2, 3)]:
        message = f"terms[0]: expected a non-empty tensor of shape [C, N], got {list(shape)}"
        with pytest.raises(ValueError, match=exactly(message)):
            content_consistency(torch.ones(shape))


# Overall


@pytest.mark.parametrize(
    ("following", "consistency", "printed"),
    [
        # EdiVal, FLUX.1-Kontext turn by turn, before and after NFT
        (59.97, 95.32, 75.61),
        (32.69, 92.24, 54.91),
        (16.61, 90.22, 38.71),
        (62.24, 95.75, 77.20),
        (38.99, 92.47, 60.04),
        (22.90, 90.62, 45.56),
        # weight of content consistency: base, 0.1, 0.15, 0.2, 0.5, 1.0
        (56.07, 90.85, 71.37),
        (61.72, 90.09, 74.57),
        (67.60, 85.59, 76.07),
        (64.22, 88.66, 75.46),
        (61.85, 89.61, 74.45),
        (50.44, 91.72, 68.02),
        # group of 8, 16, 64 (32 is the weight of 0.2 above)
        (64.64, 87.72, 75.30),
        (68.54, 87.81, 77.58),
        (67.66, 82.14, 74.55),
    ],
)
def test_overall_is_what_the_paper_prints(following, consistency, printed):
    """All three were rounded to two digits: half a unit each, carried through the root."""
    ratio = math.sqrt(following / consistency)
    tolerance = 0.005 * (1 + (ratio + 1 / ratio) / 2)
    following, consistency = torch.tensor([following, consistency], dtype=torch.float64)
    assert overall(following, consistency).item() == pytest.approx(printed, abs=tolerance)
    of_shares = overall(following / 100, consistency / 100)
    assert 100 * of_shares.item() == pytest.approx(printed, abs=tolerance)


def test_golden_overall():
    following, consistency = torch.tensor([0.25, 0.0, 0.5]), torch.tensor([1.0, 0.5, -0.1])
    assert overall(following, consistency).tolist() == [0.5, 0.0, 0.0]
    assert math.isnan(overall(torch.tensor(NAN), torch.tensor(1.0)).item())


def test_overall_errors():
    with pytest.raises(
        ValueError, match=r"^following: expected values >= 0, got -0\.5 at index \[1\]$"
    ):
        overall(torch.tensor([0.5, -0.5]), torch.ones(2))
    message = "consistency: expected the shape of following, [2], got [1]"
    with pytest.raises(ValueError, match=exactly(message)):
        overall(torch.ones(2), torch.ones(1))
    for position, name in enumerate(["following", "consistency"]):
        tensors = [torch.ones(2), torch.ones(2)]
        tensors[position] = torch.ones(2, dtype=torch.int64)
        message = f"{name}: expected a floating-point tensor, got torch.int64"
        with pytest.raises(TypeError, match=exactly(message)):
            overall(*tensors)


# bootstrap


def mean(x):
    return x.mean(dim=0)


def test_the_interval_is_that_of_a_loop():
    """The same draws, the statistic in plain Python, and the percentile by sorting."""
    x = torch.randn(7, generator=seeded(1), dtype=torch.float64)
    interval = bootstrap_interval(mean, x, generator=seeded(), resamples=101, confidence=0.9)
    draws = torch.randint(7, (101, 7), generator=seeded()).tolist()
    means = sorted(sum(x[i].item() for i in draw) / 7 for draw in draws)
    # 101 sorted values: the 5 % quantile is number 5, the 95 % quantile number 95
    assert interval.low.item() == pytest.approx(means[5])
    assert interval.high.item() == pytest.approx(means[95])
    assert interval.estimate.item() == pytest.approx(x.mean().item())


def test_the_defaults_are_2000_resamples_and_95_percent():
    x = torch.randn(20, generator=seeded(1))
    assert [t.item() for t in bootstrap_interval(mean, x, generator=seeded())] == [
        t.item()
        for t in bootstrap_interval(mean, x, generator=seeded(), resamples=2000, confidence=0.95)
    ]
    calls = []
    bootstrap_interval(lambda y: calls.append(1) or y.mean(), x, generator=seeded())
    assert len(calls) == 2001  # the samples as they are, too


def test_the_seed_decides():
    x = torch.randn(20, generator=seeded(1))
    first, again, other = (bootstrap_interval(mean, x, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(first.low, other.low)
    assert torch.equal(first.estimate, other.estimate)


def test_the_width_is_that_of_the_normal_approximation():
    x = torch.randn(400, generator=seeded(1), dtype=torch.float64)
    interval = bootstrap_interval(mean, x, generator=seeded())
    error = 1.96 * x.std().item() / 20
    assert (interval.estimate - interval.low).item() == pytest.approx(error, rel=0.1)
    assert (interval.high - interval.estimate).item() == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_coverage(confidence):
    """Of 300 experiments with a known share of 0.6, about that part of the intervals holds it."""
    generator = seeded(2)
    covered = 0
    for _ in range(300):
        success = (torch.rand(80, 1, generator=generator) < 0.6).float()
        _, low, high = bootstrap_interval(
            mean, success, generator=generator, resamples=150, confidence=confidence
        )
        covered += bool(low <= 0.6 <= high)
    assert covered / 300 == pytest.approx(confidence, abs=0.05)


def test_a_difference_on_the_same_chains_is_paired():
    """A gain of 1/10 on every chain, however hard it is, has no spread; unpaired it drowns."""
    before = torch.randn(50, 1, generator=seeded(1), dtype=torch.float64)
    after = before + 0.1

    def gain(a, b):
        return b.mean(dim=0) - a.mean(dim=0)

    paired = bootstrap_interval(gain, before, after, generator=seeded())
    assert paired.low.item() == pytest.approx(0.1)
    assert paired.high.item() == pytest.approx(0.1)
    alone = bootstrap_interval(mean, after, generator=seeded())
    assert alone.low.item() < 0 < alone.high.item()


def test_metrics_over_turns_keep_their_shape():
    success = torch.rand(40, 3, generator=seeded()) < 0.5
    consistency = torch.rand(40, 3, generator=seeded())

    def score(s, c):
        return overall(instruction_following(s), content_consistency(c))

    estimate, low, high = bootstrap_interval(
        score, success, consistency, generator=seeded(), resamples=200
    )
    assert estimate.shape == low.shape == high.shape == (3,)
    assert ((low <= estimate) & (estimate <= high)).all()
    assert low.dtype == high.dtype == torch.float32


def test_resamples_without_a_value_are_left_out():
    """One chain of three has a score; draws that miss it are NaN."""
    x = torch.tensor([[0.5], [NAN], [NAN]])
    interval = bootstrap_interval(content_consistency, x, generator=seeded())
    assert [t.item() for t in interval] == [0.5, 0.5, 0.5]


def test_bootstrap_errors():
    x = torch.ones(3, 1)
    with pytest.raises(
        ValueError, match=exactly("samples: expected at least one tensor, got none")
    ):
        bootstrap_interval(mean, generator=seeded())
    message = "samples[1]: expected 3 chains like samples[0], got 2"
    with pytest.raises(ValueError, match=exactly(message)):
        bootstrap_interval(mean, x, x[:2], generator=seeded())
    message = "samples[0]: expected a non-empty tensor of shape [C, ...], got [0, 1]"
    with pytest.raises(ValueError, match=exactly(message)):
        bootstrap_interval(mean, x[:0], generator=seeded())
    for confidence in (0.0, 1.0, 95):
        message = f"confidence: expected a finite number in (0, 1), got {confidence}"
        with pytest.raises(ValueError, match=exactly(message)):
            bootstrap_interval(mean, x, generator=seeded(), confidence=confidence)
    with pytest.raises(ValueError, match=exactly("resamples: expected an integer >= 1, got 0")):
        bootstrap_interval(mean, x, generator=seeded(), resamples=0)
    message = "statistic: expected a floating-point tensor, got torch.int64"
    with pytest.raises(TypeError, match=exactly(message)):
        bootstrap_interval(lambda s: s.long().sum(), x, generator=seeded())
