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
    interval_difference,
    marginal_success,
    overall,
    paired_difference_interval,
    wilson_interval,
)
from mteditflow.metrics import intervals
from tests.loops import some

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
        TypeError,
        match=exactly(
            "valid: expected a boolean mask, got torch.float32; convert 0 and 1 with .bool()"
        ),
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
    message = "terms[1]: expected a floating-point tensor, got torch.complex64"
    with pytest.raises(TypeError, match=exactly(message)):
        content_consistency(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.complex64))
    whole = content_consistency(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int64))
    assert torch.equal(whole, torch.ones(2))
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_overall_of_half_precision_is_float32(dtype):
    following, consistency = torch.tensor([0.5977, 0.9532], dtype=dtype)
    found = overall(following, consistency)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(math.sqrt(following.item() * consistency.item()))


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
        assert torch.equal(overall(*tensors), torch.ones(2))
        tensors[position] = torch.ones(2, dtype=torch.complex64)
        message = f"{name}: expected a floating-point tensor, got torch.complex64"
        with pytest.raises(TypeError, match=exactly(message)):
            overall(*tensors)


# shares of one outcome per chain


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [  # as published: Newcombe (1998), Table I, the score method without continuity correction
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_golden_wilson(successes, count, low, high):
    estimate, *ends = map(float, wilson_interval(successes, count))
    assert estimate == successes / count
    assert ends == pytest.approx([low, high], abs=5e-5)


def binomial(count, p):
    """Probabilities of 0 to ``count`` successes."""
    k = torch.arange(count + 1, dtype=torch.float64)
    n = torch.tensor(float(count), dtype=torch.float64)
    choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return (choose + torch.xlogy(k, p) + torch.xlogy(n - k, 1 - p)).exp()


@pytest.mark.parametrize("count", [1, 2, 5, 10, 40])
def test_wilsons_coverage_is_right_by_exact_binomial_probabilities(count):
    """95% on average over shares or more, and never below 79%: it is worst for one or two."""
    low, high = wilson_interval(torch.arange(count + 1), torch.tensor(count).expand(count + 1))[1:]
    grid = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    covered = [float(binomial(count, p)[(low <= p) & (p <= high)].sum()) for p in grid]
    assert 0.94 <= sum(covered) / len(covered) <= 0.985
    assert min(covered) > (0.79 if count < 5 else 0.83)
    assert [float(low[0]), float(high[-1])] == [0, 1]


def test_wilsons_interval_solves_the_score_equation():
    """Its ends are the shares p with (estimate - p)^2 = z^2 p (1 - p) / n."""
    for confidence, z in ((0.95, 1.959964), (0.8, 1.281552)):
        found = wilson_interval(torch.tensor([3, 9]), torch.tensor([10, 10]), confidence=confidence)
        for end in some(found[1:]):
            expected = z**2 * end * (1 - end) / 10
            torch.testing.assert_close((found.estimate - end) ** 2, expected, rtol=1e-6, atol=0)


def test_wilson_of_a_tiny_count_and_of_a_confidence_near_1_stays_within_0_and_1():
    # z = 1.96: a count of nearly nothing tells nothing, whatever its share
    assert [x.item() for x in wilson_interval(0.0, 1e-300)] == [0.0, 0.0, 1.0]
    share, low, high = wilson_interval(5e-301, 1e-300)
    assert share == 0.5
    assert (low.item(), high.item()) == pytest.approx((0.0, 1.0), abs=1e-12)
    _, low, high = wilson_interval(1, 3, confidence=1 - 2.0**-53)
    assert 0 < low < 0.02 < 0.9 < high < 1


def test_wilson_of_no_case_is_nan_and_errors_are_named():
    assert all(x.isnan() for x in some(wilson_interval(0, 0)))
    message = "successes: expected a number from 0 to count, got 3.0 at index [0]"
    with pytest.raises(ValueError, match=exactly(message)):
        wilson_interval(torch.tensor([3]), torch.tensor([2]))
    with pytest.raises(ValueError, match="count: expected a number of cases >= 0"):
        wilson_interval(torch.tensor([0]), torch.tensor([-1]))
    with pytest.raises(ValueError, match="successes: expected the shape of count"):
        wilson_interval(torch.tensor([1, 1]), torch.tensor(2))
    with pytest.raises(ValueError, match=r"confidence: expected a finite number in \(0, 1\)"):
        wilson_interval(1, 2, confidence=1.0)


def table(a, b, c, d):
    """Chains with success in both, in the second alone, in the first alone, in neither."""
    rows = [(1, 1)] * a + [(0, 1)] * b + [(1, 0)] * c + [(0, 0)] * d
    return (torch.tensor(column)[:, None] for column in zip(*rows, strict=True))


def newcombe(a, b, c, d, z=1.959963984540054):
    """Method 10 in plain Python."""
    n, p1, p2 = a + b + c + d, (a + b) / (a + b + c + d), (a + c) / (a + b + c + d)

    def score(p):
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return [(p + z * z / (2 * n) + s * half) / (1 + z * z / n) for s in (-1, 1)]

    cross, product = a * d - b * c, (a + b) * (c + d) * (a + c) * (b + d)
    cross = max(cross - n / 2, 0) if cross > 0 else cross
    phi = cross / math.sqrt(product) if product else 0.0
    (l1, u1), (l2, u2) = score(p1), score(p2)
    low, high = (
        math.sqrt(x * x - 2 * phi * x * y + y * y)
        for x, y in ((p1 - l1, u2 - p2), (u1 - p1, p2 - l2))
    )
    return p1 - p2, p1 - p2 - low, p1 - p2 + high


@pytest.mark.parametrize(
    ("counts", "ends"),
    [  # by the formula with a pocket calculator's four digits
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((20, 12, 2, 16), (0.0562, 0.3292)),
        ((2, 0, 0, 0), (-0.6576, 0.6576)),  # nobody changed, of two: not of width 0
        ((0, 0, 0, 2), (-0.6576, 0.6576)),
        ((0, 2, 0, 0), (0.0700, 1.0)),
    ],
)
def test_golden_paired_difference(counts, ends):
    found = paired_difference_interval(*table(*counts))
    assert [float(x) for x in found[1:]] == pytest.approx(ends, abs=1e-4)


@given(st.tuples(*[st.integers(0, 9)] * 4).filter(any))
def test_paired_differences_equal_the_loop_and_turn_over(counts):
    before, after = table(*counts)
    found = [float(x) for x in paired_difference_interval(before, after)]
    assert found == pytest.approx(newcombe(*counts), abs=1e-9)
    estimate, low, high = found
    assert -1 - 1e-12 <= low < estimate + 1e-12
    assert estimate - 1e-12 < high <= 1 + 1e-12
    assert low < high
    back = [float(x) for x in paired_difference_interval(after, before)]
    assert back == pytest.approx([-estimate, -high, -low], abs=1e-9)


def test_paired_differences_are_of_the_valid_chains():
    before, after = torch.tensor([[1], [0], [NAN]]), torch.tensor([[1], [1], [0.0]])
    valid = torch.tensor([[True], [True], [False]])
    found = paired_difference_interval(before, after, valid=valid)
    expected = paired_difference_interval(before[:2], after[:2])
    assert [float(x) for x in found] == [float(x) for x in expected]
    assert all(
        x.isnan() for x in some(paired_difference_interval(before, after, valid=valid & False))
    )
    with pytest.raises(ValueError, match="after: expected the shape of before"):
        paired_difference_interval(before, after[:2])


def test_a_difference_of_unrelated_shares_is_newcombes_too():
    """56/70 and 48/80: 0.0524 to 0.3339, as published for method 10 of unpaired shares."""
    found = interval_difference(wilson_interval(56, 70), wilson_interval(48, 80))
    assert [float(x) for x in found] == pytest.approx([0.2, 0.0524, 0.3339], abs=5e-5)


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


METRICS_OF_BOTH = [
    lambda s, c: overall(instruction_following(s), content_consistency(c)),
    lambda s, c: torch.stack([marginal_success(s), content_consistency(c, c**2)]),
    lambda s, c: (
        conditional_success(s).nan_to_num() - overall(marginal_success(s), content_consistency(c))
    ),
]


@pytest.mark.parametrize("statistic", METRICS_OF_BOTH)
@pytest.mark.parametrize("at_once", [1, 1000, 2**22])
def test_all_resamples_at_once_give_what_each_alone_gives(statistic, at_once, monkeypatch):
    success = torch.rand(30, 3, generator=seeded()) < 0.5
    consistency = torch.rand(30, 3, generator=seeded(1))
    consistency[torch.rand(30, 3, generator=seeded(2)) < 0.3] = NAN
    monkeypatch.setattr(intervals, "_AT_ONCE", at_once)
    alone, together = (
        bootstrap_interval(
            statistic, success, consistency, generator=seeded(), resamples=200, vectorized=how
        )
        for how in (False, True)
    )
    for one, other in some(zip(alone, together, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0, equal_nan=True)


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


def test_resamples_with_an_infinite_statistic_count():
    """1 over the number of successes: infinite in the 1 of 4 resamples of two without one."""
    x = torch.tensor([1.0, 0.0])
    interval = bootstrap_interval(lambda s: 1 / s.sum(), x, generator=seeded(), resamples=200)
    assert [t.item() for t in interval] == [1.0, 0.5, torch.inf]
    least = bootstrap_interval(lambda s: -1 / s.sum(), x, generator=seeded(), resamples=200)
    assert [t.item() for t in least] == [-1.0, -torch.inf, -0.5]
    between = torch.tensor([[1.0], [2.0], [torch.inf], [torch.inf]])
    assert intervals._quantile(between, 0.5).tolist() == [torch.inf]
    assert intervals._quantile(-between, 0.5).tolist() == [-torch.inf]


@pytest.mark.parametrize("vectorized", [False, True])
def test_an_interval_of_nan_is_nan(vectorized):
    """The mean of [NaN, 2, 3] is NaN; that of the resamples without the first is not."""
    x = torch.tensor([[NAN, 1.0], [2.0, 1.0], [3.0, 1.0]])
    interval = bootstrap_interval(mean, x, generator=seeded(), resamples=50, vectorized=vectorized)
    for end in some(interval):
        assert end.isnan().tolist() == [True, False]
        assert end[1] == 1.0


def test_bootstrapped_lists_of_integers_and_booleans_count_as_float32():
    exact = bootstrap_interval(mean, torch.tensor([1.0, 2, 3]), generator=seeded(), resamples=20)
    assert bootstrap_interval(mean, [1, 2, 3], generator=seeded(), resamples=20) == exact
    shares = bootstrap_interval(mean, [True, False], generator=seeded(), resamples=20)
    assert shares.estimate == 0.5
    ids = torch.tensor([0, 1, 1])  # a tensor keeps its dtype: it may index
    counted = lambda x: x.bincount(minlength=2).double()  # noqa: E731
    assert bootstrap_interval(counted, ids, generator=seeded()).estimate.tolist() == [1, 2]


@pytest.mark.parametrize(
    "statistic",
    [lambda x: x.mean() if x[0] > 1 else -x.mean(), lambda x: torch.tensor(x.mean().item()),
     lambda x: x[x > 1].mean(), lambda x: torch.from_numpy(x.numpy()).mean()],
    ids=["a branch", "item", "boolean indexing", "numpy"],
)  # fmt: skip
def test_what_vmap_cannot_run_says_so(statistic):
    x = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(
        ValueError, match=r"^statistic: expected a .* torch\.vmap can run.*use vectorized=False$"
    ):
        bootstrap_interval(statistic, x, generator=seeded(), resamples=2, vectorized=True)
    bootstrap_interval(statistic, x, generator=seeded(), resamples=2)


def test_a_number_out_of_range_has_no_index():
    message = "successes: expected a number from 0 to count, got 11.0"
    with pytest.raises(ValueError, match=exactly(message)):
        wilson_interval(11, 10)


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


def test_a_correlation_lies_within_1():
    interval = wilson_interval([9, 5], [10, 10])
    one = interval_difference(interval, interval, correlation=1.0)
    listed = interval_difference(interval, interval, correlation=[1, 1])
    assert torch.equal(listed.high, one.high)
    with pytest.raises(ValueError, match=r"^correlation: expected values in \[-1, 1\], got 1\.5"):
        interval_difference(interval, interval, correlation=1.5)
    with pytest.raises(TypeError, match=r"^first: expected an Interval, .* got tuple$"):
        interval_difference((0.5, 0.4, 0.6), interval)


def test_a_paired_difference_names_its_arguments():
    right = [[1, 0], [0, 1]]
    for name in ("before", "after"):
        with pytest.raises(
            ValueError, match=rf"^{name}: expected 0 or 1, got 2\.0 at index \[0, 1\]$"
        ):
            paired_difference_interval(**{"before": right, "after": right, name: [[1, 2], [0, 1]]})
    listed = paired_difference_interval(right, right, valid=[[True, True], [True, False]])
    assert listed.estimate.tolist() == [0.0, 0.0]


def test_a_statistic_may_change_its_samples():
    sample = torch.arange(8.0).reshape(4, 2)
    bootstrap_interval(
        lambda x: x.mul_(0).mean(), sample, generator=torch.Generator().manual_seed(0), resamples=3
    )
    assert torch.equal(sample, torch.arange(8.0).reshape(4, 2))


def test_lists_beside_tensors_follow_their_dtype():
    share = torch.tensor([0.5, 1.0])
    assert overall(share, [0.5, 1.0]).dtype == torch.float32
    assert overall([50, 100], share).tolist() == pytest.approx([5.0, 10.0])
    assert content_consistency(share[None], [[0.5, 1.0]]).dtype == torch.float32
    assert wilson_interval([2, 0], torch.tensor([2, 2])).estimate.tolist() == [1.0, 0.0]
