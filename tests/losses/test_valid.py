"""Every loss takes ``valid``: a false row adds exactly nothing, whatever stands in it."""

import inspect
import math

import numpy as np
import pytest
import torch

import mteditflow as mt
from tests.loops import some

M, SHAPE = 4, (2, 3)
VALID = torch.tensor([True, False, True, False])


def latent(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(M, *SHAPE, generator=generator, dtype=torch.float64)


def number(seed):
    return torch.rand(M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_reduction(function):
    return lambda *args, **options: function(*args, reduction="sum", **options)


def pairs(velocity, reference, target, *, valid=None):
    """Neighboring rows as pairs; a pair is valid where both of its rows are."""
    first = torch.arange(0, len(velocity), 2)
    kept = None
    if valid is not None:
        of_rows = torch.as_tensor(valid)
        kept = of_rows[::2] & of_rows[1::2]
        kept = kept.tolist() if isinstance(valid, list) else kept
    loss = mt.dpo_loss(velocity, reference, target, first, first + 1, dpo_beta=2.0, valid=kept)
    return loss.repeat_interleave(2)


def in_one_group(function, **options):
    def called(velocity, other, target, advantage, **valid):
        ids = torch.zeros(len(velocity), dtype=torch.int64)
        return function(velocity, other, target, advantage, ids, **options, **valid)

    return called


# Name of the public function, how it is called, and what it is given: the first has a gradient.
LOSSES = {
    "nft_loss": (
        lambda *args, **options: mt.nft_loss(*args, nft_beta=0.5, **options),
        (latent(0), latent(1), latent(2), number(3)),
    ),
    "adaptive_nft_loss": (
        lambda *args, **options: mt.adaptive_nft_loss(*args, nft_beta=0.5, **options),
        (latent(0), latent(1), latent(2), number(3), number(4)),
    ),
    "velocity_kl": (mt.velocity_kl, (latent(0), latent(1))),
    "matching_surrogate_loss": (
        lambda *args, **options: mt.matching_surrogate_loss(
            *args, clip_low=0.1, clip_high=0.1, **options
        ),
        (latent(0), latent(1), latent(2), number(3)),
    ),
    "matching_log_prob": (mt.matching_log_prob, (latent(0), latent(1))),
    "flow_awr_loss": (mt.flow_awr_loss, (latent(0), latent(1), latent(2), number(3))),
    "exact_flow_awr_loss": (mt.exact_flow_awr_loss, (latent(0), latent(1), number(2))),
    "crd_loss": (
        in_one_group(mt.crd_loss),
        (latent(0), latent(1), latent(2), number(3) - 0.5),
    ),
    "dgpo_loss": (
        in_one_group(mt.dgpo_loss, dgpo_beta=2.0),
        (latent(0), latent(1), latent(2), number(3) - 0.5),
    ),
    "distillation_loss": (mt.distillation_loss, (latent(0), latent(1))),
    "mt_opsd_loss": (mt.mt_opsd_loss, (latent(0), latent(1), latent(2), number(3) > 0.5)),
    "velocity_norm_hinge": (mt.velocity_norm_hinge, (3 * latent(0), latent(1))),
    "flow_matching_loss": (mt.flow_matching_loss, (latent(0), latent(1), latent(2))),
    "gaussian_log_prob": (
        with_reduction(mt.gaussian_log_prob), (latent(0), latent(1), 0.5 + number(2))
    ),
    "gaussian_kl": (with_reduction(mt.gaussian_kl), (latent(0), latent(1), 0.5 + number(2))),
    "cps_surrogate": (with_reduction(mt.cps_surrogate), (latent(0), latent(1))),
    "guard_log_ratio": (
        lambda mean, x, old, std, **options: mt.guard_log_ratio(
            x, mean, old, std, reduction="mean", **options
        ),
        (latent(0), latent(1), latent(2), 0.5 + number(3)),
    ),
    "clipped_surrogate_loss": (
        lambda *args, **options: mt.clipped_surrogate_loss(
            *args, clip_low=0.2, clip_high=0.2, **options
        ),
        (number(0) / 9, number(0) / 8, number(1) - 0.5),
    ),
    "divergence_gated_loss": (
        lambda *args, **options: mt.divergence_gated_loss(*args, threshold=0.5, **options),
        (number(0), number(1), number(2) - 0.5, number(3)),
    ),
    "truncated_importance_weight": (
        lambda *args, **options: mt.truncated_importance_weight(*args, cap=2.0, **options),
        (number(0), number(1)),
    ),
    "dpo_loss": (pairs, (latent(0), latent(1), latent(2))),
}  # fmt: skip


def test_every_loss_is_here():
    """A public function whose name says loss, divergence, log-prob or hinge takes ``valid``."""
    words = ("loss", "_kl", "log_prob", "log_ratio", "surrogate", "hinge", "importance_weight")
    # A diagnostic is a mean over what is valid; a weight of the grid has no rows to lose.
    others = {"approximate_kl", "step_kl_weight"}
    names = {x for x in mt.__all__ if any(word in x for word in words)} - others
    assert names == set(LOSSES)
    for name in some(names):
        assert "valid" in inspect.signature(getattr(mt, name)).parameters


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e200, None])
@pytest.mark.parametrize("name", LOSSES)
def test_an_invalid_row_adds_nothing(name, garbage):
    function, inputs = LOSSES[name]
    kept = torch.tensor([True, True, False, False]) if name == "dpo_loss" else VALID
    held = [x.clone() for x in inputs]
    if garbage is not None:
        for x in held:
            x[~kept] = garbage
    held[0].requires_grad_()
    loss = function(*held, valid=kept)
    alone = [x[kept] for x in inputs]
    alone[0].requires_grad_()
    expected = function(*alone)
    assert torch.equal(loss[~kept], torch.zeros_like(loss[~kept]))
    torch.testing.assert_close(loss[kept], expected, rtol=1e-12, atol=0)
    if not loss.requires_grad:
        assert name == "truncated_importance_weight"
        return
    (got,) = torch.autograd.grad(loss.sum(), held[0])
    (wanted,) = torch.autograd.grad(expected.sum(), alone[0])
    assert torch.equal(got[~kept], torch.zeros_like(got[~kept]))
    torch.testing.assert_close(got[kept], wanted, rtol=1e-12, atol=1e-15)
    assert wanted.any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_of_another_shape_or_dtype_is_refused(name):
    function, inputs = LOSSES[name]
    if name == "dpo_loss":
        with pytest.raises(ValueError, match=r"^valid: expected shape \[P\] = \[2\], got \[1\]$"):
            function(*inputs, valid=VALID[:2])
        return
    with pytest.raises(ValueError, match=r"^valid: expected shape .* = \[4\], got \[3\]$"):
        function(*inputs, valid=VALID[:3])
    with pytest.raises(TypeError, match=r"^valid: expected a boolean mask, got torch.int64; "):
        function(*inputs, valid=VALID.long())


def test_an_nft_row_of_one_half_pulls_unless_it_is_invalid():
    """Advantage 0 is no mask: the row would still pull to the old policy."""
    velocity = torch.ones(1, 2, requires_grad=True)
    inputs = (torch.zeros(1, 2), torch.zeros(1, 2), 0.5)
    (pull,) = torch.autograd.grad(mt.nft_loss(velocity, *inputs, nft_beta=1.0).sum(), velocity)
    assert pull.tolist() == [[1.0, 1.0]]
    loss = mt.nft_loss(velocity, *inputs, nft_beta=1.0, valid=torch.tensor([False]))
    (nothing,) = torch.autograd.grad(loss.sum(), velocity)
    assert nothing.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_is_a_mask(name):
    function, inputs = LOSSES[name]
    expected = function(*inputs, valid=VALID)
    assert torch.equal(function(*inputs, valid=VALID.tolist()), expected)
    assert torch.equal(function(*inputs, valid=VALID.numpy()), expected)


def test_numbers_beside_tensors_follow_them():
    """Python's floats, and numpy's, make no float64 of a float32 loss; integers are numbers."""
    x, zero = latent(0).float(), torch.zeros(M, *SHAPE)
    log_prob = torch.zeros(M)
    for numbers in ([1.0, 0.0, 1.0, 0.0], np.array([1.0, 0.0, 1.0, 0.0]), [1, 0, 1, 0],
                    torch.tensor([1, 0, 1, 0]), [True, False, True, False]):  # fmt: skip
        same = torch.tensor([1.0, 0.0, 1.0, 0.0])
        for function in (
            lambda r: mt.nft_loss(x, zero, zero, r, nft_beta=0.5),
            lambda r: mt.adaptive_nft_loss(x, zero, zero, 0.5, r, nft_beta=0.5),
            lambda a: mt.clipped_surrogate_loss(log_prob, log_prob, a, clip_low=0.1, clip_high=0.1),
            lambda a: mt.divergence_gated_loss(log_prob, log_prob, a, log_prob, threshold=0.1),
            lambda s: mt.gaussian_log_prob(x, zero, s, reduction="sum"),
            lambda s: mt.guard_log_ratio(x, x, zero, s, reduction="mean"),
            lambda s: mt.interpolate(x, zero, s),
        ):
            assert function(numbers).dtype == torch.float32
            assert torch.equal(function(numbers), function(same))
    assert torch.equal(
        mt.nft_loss(x, zero, zero, np.int64(1), nft_beta=0.5),
        mt.nft_loss(x, zero, zero, 1.0, nft_beta=0.5),
    )
    assert mt.step_kl_weight(mt.DanceSDE(0.5), [1.0, 0.5], [0.5, 0.25]).dtype == torch.float32


@pytest.mark.parametrize(
    "half", [np.float16(0.5), np.full(M, 0.5, np.float16), torch.ones(M).half()]
)
def test_half_precision_is_refused_in_every_form(half):
    x = latent(0).float()
    with pytest.raises(TypeError, match=r"^r: expected float32 or float64, got torch\.float16"):
        mt.nft_loss(x, x, x, half, nft_beta=0.5)


def test_rows_of_pairs_are_integers_of_any_width():
    x, zero = latent(0), torch.zeros(M, *SHAPE, dtype=torch.float64)
    expected = mt.dpo_loss(x, zero, zero, [0, 2], [1, 3], dpo_beta=2.0)
    for dtype in (torch.uint8, torch.int16, torch.int64):
        rows = (torch.tensor(row, dtype=dtype) for row in ([0, 2], [1, 3]))
        assert torch.equal(mt.dpo_loss(x, zero, zero, *rows, dpo_beta=2.0), expected)


def test_a_joint_log_prob_is_exact_to_the_last_bits_of_float32():
    """A log-ratio is a difference of two: 3e5 of 2^18 elements is a float32 to 1/64 at best."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2**18, generator=generator)
    mean = x + 0.1 * torch.randn(1, 2**18, generator=generator)
    got = mt.gaussian_log_prob(x, mean, 0.1, reduction="sum")
    std = torch.tensor(0.1).double()
    exact = torch.distributions.Normal(mean.double(), std).log_prob((x - mean) + mean.double())
    assert abs(got.double() - exact.sum()).item() < 0.04
    assert torch.equal(got, mt.gaussian_log_prob(
        x.view(1, 64, 4096), mean.view(1, 64, 4096), 0.1, reduction="sum"
    ))  # fmt: skip


def test_a_long_constant_difference():
    full = torch.full((1, 2**20), 0.1)
    assert mt.velocity_kl(full, torch.zeros_like(full)).item() == pytest.approx(0.01, rel=1e-6)
