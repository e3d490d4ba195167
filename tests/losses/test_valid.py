"""Every loss takes ``valid``: a false row adds exactly nothing, whatever stands in it."""

import inspect
import math

import pytest
import torch

import mteditflow as mt

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
    """Neighbouring rows as pairs; a pair is valid where both of its rows are."""
    first = torch.arange(0, len(velocity), 2)
    kept = None if valid is None else valid[::2] & valid[1::2]
    loss = mt.dpo_loss(velocity, reference, target, first, first + 1, dpo_beta=2.0, valid=kept)
    return loss.repeat_interleave(2)


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
    "matching_log_prob": (mt.matching_log_prob, (latent(0), latent(1))),
    "distillation_loss": (mt.distillation_loss, (latent(0), latent(1))),
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
    for name in names:
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
    with pytest.raises(TypeError, match=r"^valid: expected a boolean mask, got torch.int64$"):
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
