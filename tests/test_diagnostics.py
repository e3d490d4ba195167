"""Numbers that say whether a run is sound: each against a loop, and each told apart from health."""

import math
import re
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import (
    advantage_correlation,
    approximate_kl,
    check_ratio,
    clip_fraction,
    variance_ratio,
    zero_variance_share,
)
from tests.loops import some

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
NAN, INF = math.nan, math.inf
ADVICE = (
    ". The replay is not the rollout: look for another solver, noise level or reduction, "
    "latents rounded after the log-prob, another dtype or attention kernel, dropout, another batch "
    "composition, a missing guidance branch, or weights changed since the rollout"
)


def exactly(message):
    return f"^{re.escape(message)}$"


def ids(*group):
    return torch.tensor(group, dtype=torch.int64)


# check_ratio


def test_a_fresh_rollout_passes():
    stored = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    check = check_ratio(stored, stored, clip=1e-4)
    assert check.ok
    assert check.deviation.tolist() == [0.0] * 5
    assert check.tolerance == pytest.approx(1e-5)
    assert check.verdict == "largest |ratio - 1| is 0 at step 0; allowed is 1e-05"


def test_golden_deviation():
    stored = torch.zeros(2, 3, dtype=torch.float64)
    replayed = torch.tensor([[0.5, 0.0, -2.0], [-0.25, 0.0, 1.0]], dtype=torch.float64)
    check = check_ratio(replayed, stored, clip=0.2, share=0.5)
    expected = [math.exp(0.5) - 1, 0.0, math.e - 1]
    assert check.deviation.tolist() == pytest.approx(expected)
    assert not check.ok
    assert check.tolerance == pytest.approx(0.1)
    assert check.verdict == "largest |ratio - 1| is 1.72 at step 2; allowed is 0.1" + ADVICE


def test_the_tolerance_is_a_share_of_the_clip_range():
    stored, replayed = torch.zeros(1, 1).double(), torch.full((1, 1), 1e-3).double()
    assert check_ratio(replayed, stored, clip=0.0101).ok  # a tenth by default
    assert not check_ratio(replayed, stored, clip=0.0099).ok
    assert check_ratio(replayed, stored, clip=0.0011, share=1.0).ok
    assert not check_ratio(replayed, stored, clip=1.0, share=0.0).ok
    assert check_ratio(stored, stored, clip=1.0, share=0.0).ok


def test_small_deviations_are_measured_in_float64():
    stored, replayed = torch.zeros(1, 1), torch.full((1, 1), 1e-9)
    deviation = check_ratio(replayed, stored, clip=1e-4).deviation
    assert deviation.dtype == torch.float64
    assert deviation.item() == pytest.approx(1e-9)


@pytest.mark.parametrize(("log_prob", "shown"), [(NAN, "inf"), (INF, "inf"), (-INF, "1")])
def test_what_is_not_finite_fails(log_prob, shown):
    replayed = torch.tensor([[0.0, log_prob]])
    check = check_ratio(replayed, torch.zeros(1, 2), clip=1e-4)
    assert not check.ok
    assert check.deviation.tolist() == [0.0, float(shown)]
    assert check.verdict.startswith(f"largest |ratio - 1| is {shown} at step 1; allowed is 1e-05. ")


def test_masked_steps_are_not_there():
    replayed = torch.tensor([[0.0, NAN, 3.0], [0.0, 9.0, 0.0]])
    valid = torch.tensor([[True, False, False], [True, False, True]])
    check = check_ratio(replayed, torch.zeros(2, 3), clip=1e-4, valid=valid)
    assert check.ok
    first, second, third = check.deviation.tolist()
    assert (first, third) == (0.0, 0.0)
    assert math.isnan(second)


def test_check_ratio_errors():
    x = torch.zeros(2, 3)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=exactly("valid: expected at least one valid entry, got none")
    ):
        check_ratio(x, x, clip=0.1, valid=nothing)
    message = "log_prob: expected a non-empty tensor of shape [..., S], got []"
    with pytest.raises(ValueError, match=exactly(message)):
        check_ratio(torch.tensor(0.0), torch.tensor(0.0), clip=0.1)
    with pytest.raises(
        ValueError, match=exactly("clip: expected a finite number in (0, inf], got 0.0")
    ):
        check_ratio(x, x, clip=0.0)
    with pytest.raises(
        ValueError, match=exactly("share: expected a finite number in [0, inf], got -1")
    ):
        check_ratio(x, x, clip=0.1, share=-1)


# clip_fraction


def test_golden_clip_fraction():
    # ratios 0.7, 0.81, 1, 1.29, 1.31, 2 against 0.8 .. 1.3
    log_prob = torch.tensor([0.7, 0.81, 1.0, 1.29, 1.31, 2.0]).log() + 3
    old = torch.full((6,), 3.0)
    below, above = clip_fraction(log_prob, old, clip_low=0.2, clip_high=0.3)
    assert (below.item(), above.item()) == pytest.approx((1 / 6, 2 / 6))
    valid = torch.tensor([True, True, True, False, False, True])
    below, above = clip_fraction(log_prob, old, clip_low=0.2, clip_high=0.3, valid=valid)
    assert (below.item(), above.item()) == (0.25, 0.25)


@given(st.lists(st.floats(-2, 2), min_size=1), st.floats(0, 0.9), st.floats(0, 2))
def test_clip_fraction_equals_the_loop(log_ratios, low, high):
    x = torch.tensor(log_ratios, dtype=torch.float64)
    below, above = clip_fraction(x, torch.zeros_like(x), clip_low=low, clip_high=high)
    count = len(log_ratios)
    assert below.item() == pytest.approx(sum(v < math.log1p(-low) for v in log_ratios) / count)
    assert above.item() == pytest.approx(sum(v > math.log1p(high) for v in log_ratios) / count)


def test_a_ratio_on_the_edge_or_at_1_is_not_clipped():
    x = torch.zeros(3)
    assert [t.item() for t in clip_fraction(x, x, clip_low=0.0, clip_high=0.0)] == [0.0, 0.0]
    nothing = torch.zeros(3, dtype=torch.bool)
    fractions = clip_fraction(x + 9, x, clip_low=0.1, clip_high=0.1, valid=nothing)
    assert [t.item() for t in fractions] == [0.0, 0.0]


def test_tiny_clip_ranges_are_resolved():
    """1e-5 is 84 units in the last place of a float32 ratio; the difference is what counts."""
    x = torch.tensor([1.1e-5, 0.9e-5, -1.1e-5, -0.9e-5])
    below, above = clip_fraction(x, torch.zeros(4), clip_low=1e-5, clip_high=1e-5)
    assert (below.item(), above.item()) == (0.25, 0.25)


def test_clip_fraction_errors():
    x = torch.zeros(2)
    for low in (1.0, -0.1):
        message = f"clip_low: expected a finite number in [0, 1), got {low}"
        with pytest.raises(ValueError, match=exactly(message)):
            clip_fraction(x, x, clip_low=low, clip_high=0.1)
    message = "clip_high: expected a finite number in [0, inf], got -0.1"
    with pytest.raises(ValueError, match=exactly(message)):
        clip_fraction(x, x, clip_low=0.1, clip_high=-0.1)


# approximate_kl


def test_golden_kl():
    # e - 2 at a log-ratio of 1, 1/e at -1, 0 at 0
    log_prob = torch.tensor([1.0, 3.0, 5.0, NAN], dtype=torch.float64)
    old = torch.tensor([0.0, 4.0, 5.0, 0.0], dtype=torch.float64)
    valid = torch.tensor([True, True, True, False])
    expected = (math.e - 2 + 1 / math.e) / 3
    assert approximate_kl(log_prob, old, valid=valid).item() == pytest.approx(expected)
    nothing = torch.zeros(4, dtype=torch.bool)
    assert approximate_kl(log_prob, old, valid=nothing).item() == 0.0


@given(st.lists(st.floats(-3, 3), min_size=1))
def test_kl_is_never_negative_and_equals_the_loop(log_ratios):
    x = torch.tensor(log_ratios, dtype=torch.float64)
    kl = approximate_kl(x, torch.zeros_like(x)).item()
    assert kl >= 0
    expected = [math.exp(v) - 1 - v for v in log_ratios]
    assert kl == pytest.approx(math.fsum(expected) / len(expected), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1e-5, -1e-5, 1e-7])
def test_the_kl_of_tiny_ratios_is_half_their_square(size):
    """The log-ratios of mean-reduced log-probs; in float32 the terms would cancel to noise."""
    x = torch.full((4,), size)
    assert approximate_kl(x, torch.zeros(4)).item() == pytest.approx(size**2 / 2, rel=1e-3)


def test_kl_estimates_the_divergence_of_two_gaussians():
    """KL(N(0, 1) || N(0.5, 1)) = 0.125, from samples of the old one."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old, new = -(x**2) / 2, -((x - 0.5) ** 2) / 2
    assert approximate_kl(new, old).item() == pytest.approx(0.125, rel=0.02)


# what the three that read log-probs share


READERS = {
    "check_ratio": lambda *x, **k: check_ratio(*x, clip=0.1, **k).deviation,
    "clip_fraction": lambda *x, **k: clip_fraction(*x, clip_low=0.1, clip_high=0.1, **k)[0],
    "approximate_kl": approximate_kl,
}


@pytest.mark.parametrize("name", READERS)
def test_log_prob_errors(name):
    read, x = READERS[name], torch.zeros(2, 3)
    for position, argument in enumerate(["log_prob", "old_log_prob"]):
        tensors = [x, x]
        tensors[position] = x.bfloat16()
        pattern = rf"^{argument}: expected float32 or float64, got torch\.bfloat16"
        with pytest.raises(TypeError, match=pattern):
            read(*tensors)
    message = "old_log_prob: expected the shape of log_prob, [2, 3], got [2]"
    with pytest.raises(ValueError, match=exactly(message)):
        read(x, torch.zeros(2))
    message = "valid: expected shape of log_prob = [2, 3], got [2]"
    with pytest.raises(ValueError, match=exactly(message)):
        read(x, x, valid=torch.ones(2, dtype=torch.bool))
    with pytest.raises(
        TypeError,
        match=exactly(
            "valid: expected a boolean mask, got torch.float32; convert 0 and 1 with .bool()"
        ),
    ):
        read(x, x, valid=x)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_device_and_no_gradient(name, device, dtype):
    x = torch.zeros(2, 3, dtype=dtype, device=device, requires_grad=True)
    result = READERS[name](x, x)
    assert result.dtype == (torch.float64 if name == "check_ratio" else dtype)
    assert result.device.type == device
    assert not result.requires_grad


# group spread


def test_golden_zero_variance_share():
    reward = torch.tensor([1.0, 1.0, 0.0, 1.0, 5.0])
    group = ids(0, 0, 1, 1, 2)  # constant, varied, alone
    assert zero_variance_share(reward, group).item() == pytest.approx(3 / 5)
    valid = torch.tensor([True, True, False, True, True])
    assert zero_variance_share(reward, group, valid=valid).item() == 1.0
    valid = torch.tensor([True, False, True, True, False])
    assert zero_variance_share(reward, group, valid=valid).item() == pytest.approx(1 / 3)
    assert zero_variance_share(reward, group, valid=torch.zeros(5).bool()).item() == 0.0
    assert zero_variance_share(reward.double(), group).dtype == torch.float64


def test_golden_variance_ratio():
    # within groups: variances 4, 0 over three and one members, against 1, 0
    reward = torch.tensor([0.0, 4.0, 9.0, 100.0])
    other = torch.tensor([3.0, 1.0, 5.0, NAN])
    valid = torch.tensor([True, True, True, False])
    assert variance_ratio(reward, other, ids(0, 0, 1, 0), valid=valid).item() == 4.0
    # and not between groups: group means far apart change nothing
    far = reward + torch.tensor([0.0, 0.0, 1000.0, 0.0])
    assert variance_ratio(far, other, ids(0, 0, 1, 0), valid=valid).item() == 4.0


def test_the_papers_variance_ratio_shows():
    generator = torch.Generator().manual_seed(0)
    following, consistency = torch.randn(2, 4000, generator=generator)
    group = torch.arange(4000) // 40
    ratio = variance_ratio(math.sqrt(5.8) * following, consistency, group)
    assert ratio.item() == pytest.approx(5.8, rel=0.1)


@given(st.lists(st.tuples(*[st.integers(-9, 9)] * 2, st.integers(0, 2)), min_size=1, max_size=9))
def test_variance_ratio_and_correlation_equal_the_loop(rows):
    reward, other = (torch.tensor([float(r[k]) for r in rows], dtype=torch.float64) for k in (0, 1))
    group = ids(*(r[2] for r in rows))

    def centered(k):
        return [r[k] - statistics.fmean(q[k] for q in rows if q[2] == r[2]) for r in rows]

    a, b = centered(0), centered(1)
    top, bottom = math.fsum(x * x for x in a), math.fsum(x * x for x in b)
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    ratio = variance_ratio(reward, other, group).item()
    correlation = advantage_correlation(reward, other, group).item()
    if bottom > 1e-12:
        assert ratio == pytest.approx(top / bottom, abs=1e-9)
    else:
        assert math.isnan(ratio) if top < 1e-12 else ratio == INF
    if min(top, bottom) > 1e-12:
        assert correlation == pytest.approx(product / math.sqrt(top * bottom), abs=1e-9)
    else:
        assert math.isnan(correlation)


def test_golden_correlation():
    reward, group = torch.tensor([0.0, 1.0, 10.0, 11.0]), ids(0, 0, 1, 1)
    assert advantage_correlation(reward, reward * 3, group).item() == pytest.approx(1.0)
    traded = torch.tensor([0.9, 0.7, 0.9, 0.7])
    assert advantage_correlation(reward, traded, group).item() == pytest.approx(-1.0)
    # 0, 1 with 0, 1 in one group and with 1, 0 in the other cancel
    assert advantage_correlation(reward, torch.tensor([0.0, 1.0, 1.0, 0.0]), group).item() == 0.0
    valid = torch.tensor([True, True, True, False])
    mixed = torch.tensor([0.0, 1.0, 1.0, NAN])
    correlation = advantage_correlation(reward, mixed, group, valid=valid)
    assert correlation.item() == pytest.approx(1.0)
    assert correlation.dtype == torch.float32


@pytest.mark.parametrize("compare", [variance_ratio, advantage_correlation])
def test_two_reward_errors_name_the_reward(compare):
    reward, group = torch.ones(3), ids(0, 0, 0)
    message = "other: expected finite values (mark lost ones in valid), got nan at index [1]"
    with pytest.raises(ValueError, match=exactly(message)):
        compare(reward, torch.tensor([1.0, NAN, 1.0]), group)
    message = "reward: expected finite values (mark lost ones in valid), got nan at index [1]"
    with pytest.raises(ValueError, match=exactly(message)):
        compare(torch.tensor([1.0, NAN, 1.0]), reward, group)
    with pytest.raises(ValueError, match=exactly("other: expected shape of reward = [3], got [2]")):
        compare(reward, torch.ones(2), group)
    with pytest.raises(TypeError, match=r"^other: expected float32 or float64, got torch\.float16"):
        compare(reward, reward.half(), group)


def test_zero_variance_errors():
    with pytest.raises(ValueError, match=exactly("group: expected shape [B] = [3], got [2]")):
        zero_variance_share(torch.ones(3), ids(0, 0))


def test_variance_ratio_weighs_groups_by_their_valid_members():
    reward = torch.tensor([0.0, 2.0, 0.0, 4.0, 9.0])
    other = torch.tensor([0.0, 1.0, 0.0, 1.0, 9.0])
    group = torch.tensor([0, 0, 1, 1, 1])
    valid = torch.tensor([True, True, True, True, False])
    # Variances 1 and 4 over 1/4 and 1/4, each for two valid trajectories.
    assert variance_ratio(reward, other, group, valid=valid) == 10
    assert variance_ratio(reward[:4], other[:4], group[:4]) == 10


def test_ratios_of_one_trajectory_need_no_batch_axis():
    check = check_ratio(torch.zeros(3), torch.zeros(3), clip=1e-4)
    assert check.ok
    assert check.deviation.tolist() == [0, 0, 0]


def test_a_nan_log_prob_makes_the_clip_fraction_nan():
    log_prob, valid = torch.tensor([0.5, torch.nan]), torch.tensor([True, False])
    for share in some(clip_fraction(log_prob, torch.zeros(2), clip_low=0.1, clip_high=0.1)):
        assert share.isnan()
    below, above = clip_fraction(log_prob, torch.zeros(2), clip_low=0.1, clip_high=0.1, valid=valid)
    assert (below.item(), above.item()) == (0.0, 1.0)
