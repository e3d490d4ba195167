"""Intervals over seeds and over resampled chains: by hand, by table, by the library's bootstrap."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import bootstrap_interval
from mteditflow.evaluation.seeds import (
    SeedInterval,
    _t_quantile,
    block_error,
    difference_interval,
    mean_interval,
    percentile_ends,
    resampled_means,
    setting_errors,
)
from tests.loops import some


def test_quantiles_are_those_of_the_tables():
    # Student's distribution, two-sided 95%, from any printed table.
    table = {1: 12.706, 2: 4.303, 3: 3.182, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {k: _t_quantile(k) for k in table} == pytest.approx(table, abs=1e-3)


def test_intervals_by_hand():
    # Means 2 and 4; seeds add 1, 0, -1; errors of +-0.5 in two cells of each row.
    values = torch.tensor([[3.5, 1.5, 1.0], [4.5, 4.5, 3.0]], dtype=torch.float64)
    # error: rows minus their means 2, 4, minus columns' 1, 0, -1: +-0.5, -+0.5, 0
    assert block_error(values) == pytest.approx(math.sqrt(4 * 0.25 / 2))
    gain = difference_interval(values, 1, 0)
    half = 4.303 * math.sqrt(0.5) * math.sqrt(2 / 3)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)
    own = mean_interval(torch.tensor([1.0, 2.0, 3.0]))
    half = 4.303 / math.sqrt(3)
    assert (own.mean, own.low, own.high) == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)


def test_errors_of_single_settings_make_up_the_pooled_one():
    # An error of +-3 over two seeds in one of three settings leaves residuals of 2, -1, -1.
    values = torch.tensor([[3.0, -3.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    errors = setting_errors(values)
    assert errors.square().tolist() == pytest.approx([12.0, 3.0, 3.0])
    assert errors.square().mean().sqrt() == pytest.approx(block_error(values))
    assert setting_errors(values[:, :1]).isnan().all()
    assert setting_errors(values[:1]).isnan().all()


@given(st.integers(0, 1000), st.integers(2, 5), st.integers(2, 4))
def test_seeds_and_shifts_do_not_matter_to_differences(seed, settings, seeds):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(settings, seeds, generator=generator, dtype=torch.float64)
    shifted = values + 7 * torch.randn(seeds, generator=generator, dtype=torch.float64)
    for first in some(range(settings)):
        gain = difference_interval(values, first, 0)
        other = difference_interval(shifted, first, 0)
        turned = difference_interval(values, 0, first)
        assert (gain.low, gain.high) == pytest.approx((other.low, other.high))
        assert (gain.low, gain.high) == pytest.approx((-turned.high, -turned.low))


def test_with_two_settings_it_is_the_paired_t_test():
    values = torch.tensor([[3.0, 1.0, 2.5], [1.0, 1.5, 0.0]], dtype=torch.float64)
    own, pooled = mean_interval(values[0] - values[1]), difference_interval(values, 0, 1)
    assert (own.low, own.high) == pytest.approx((pooled.low, pooled.high))


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((0.1, 2.0), "seen"),
        ((-2.0, -0.1), "reversed"),
        ((-0.1, 2.0), "not separated"),
        ((math.nan, math.nan), "no interval from one seed"),
    ],
)
def test_verdicts_follow_from_intervals(ends, verdict):
    assert SeedInterval(1.0, *ends).verdict == verdict


def test_one_seed_gives_no_interval():
    for found, mean in (
        (mean_interval(torch.tensor([3.0])), 3),
        (difference_interval(torch.tensor([[5.0], [3.0]]), 0, 1), 2),
        (difference_interval(torch.tensor([[5.0, 6.0]]), 0, 0), 0),  # one setting has no error
    ):
        ends = pytest.approx([math.nan] * 2, nan_ok=True)
        assert (found.mean, [found.low, found.high]) == (mean, ends)
        assert found.verdict == "no interval from one seed"
    assert f"{SeedInterval(1.25, math.nan, math.nan):+.1f}" == "+1.2"
    assert f"{SeedInterval(1.0, -2.0, 4.0):+.1f}" == "+1.0 [-2.0, +4.0]"


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: mean_interval(torch.ones(2, 2)), ValueError, r"of shape \[S\], got"),
        (lambda: mean_interval(torch.ones(3, dtype=torch.int64)), TypeError, "floating-point"),
        (lambda: block_error(torch.ones(3)), ValueError, "values: expected"),
        (
            lambda: block_error(torch.ones(2, 3, 4)),
            ValueError,
            r"of shape \[K, S\], got \[2, 3, 4\]",
        ),
        (lambda: block_error(torch.ones(0, 3)), ValueError, r"of shape \[K, S\], got \[0, 3\]"),
        (lambda: difference_interval(torch.ones(3), 0, 1), ValueError, "values: expected"),
        (lambda: resampled_means([{"x": torch.ones(2)}], resamples=0), ValueError, "resamples"),
    ],
)
def test_bad_input_is_named(call, error, said):
    with pytest.raises(error, match=said):
        call()


def followed(seed, skill=0.6, chains=60):
    generator = torch.Generator().manual_seed(seed)
    return {
        "passed": (torch.rand(chains, generator=generator) < skill).float(),
        "kept": 0.9 + 0.1 * torch.rand(chains, generator=generator),
    }


def test_one_settings_intervals_are_those_of_the_librarys_bootstrap():
    own = followed(1)
    for name, table in some(resampled_means([own]).items()):
        low, high = percentile_ends(table[:, 0])
        generator = torch.Generator().manual_seed(9)
        known = bootstrap_interval(lambda x: x.mean(), own[name], generator=generator)
        width = float(known.high - known.low)
        assert low == pytest.approx(float(known.low), abs=0.15 * width)
        assert high == pytest.approx(float(known.high), abs=0.15 * width)


def test_resampled_means_follow_from_their_seed_alone():
    known = resampled_means([followed(0)], resamples=20, seed=0)["kept"]
    for torchs_own in some([1, 2]):
        torch.manual_seed(torchs_own)
        assert torch.equal(resampled_means([followed(0)], resamples=20)["kept"], known)


def test_settings_are_resampled_alike():
    first, second = followed(0), followed(2, 0.9)
    tables = resampled_means([first, dict(first), second], resamples=300)
    assert tables["passed"].shape == (300, 3)
    torch.testing.assert_close(tables["passed"][:, 0], tables["passed"][:, 1])
    assert percentile_ends(tables["passed"][:, 2] - tables["passed"][:, 0])[0] > 0


def test_a_sample_of_all_chains_keeps_sums():
    """Weights of a resample add up to one, so that a constant stays what it is."""
    means = resampled_means([{"x": torch.full((7,), 3.0)}], resamples=20, seed=4)["x"]
    torch.testing.assert_close(means, torch.full((20, 1), 3.0, dtype=torch.float64))
    other = resampled_means([followed(0)], resamples=20, seed=4)["kept"]
    assert not torch.equal(other, resampled_means([followed(0)], resamples=20, seed=5)["kept"])
