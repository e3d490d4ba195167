"""Losses with an advantage of each token: loops, constants, the meaning of gradients, masks."""

import math

import pytest
import torch

from mteditflow import (
    adaptive_nft_loss,
    exact_flow_awr_loss,
    flow_awr_loss,
    matching_surrogate_loss,
    nft_loss,
    token_weights,
)

F64 = torch.float64
M = 3
# Latents, and advantages of tokens laid out on them.
LAYOUTS = {"packed": ((6, 4), (6, 1)), "unpacked": ((4, 2, 3), (1, 2, 3))}
SIGMA = torch.tensor([0.3, 0.6, 0.9], dtype=F64)


def nft(v, old, u, a, **more):
    return nft_loss(v, old, u, a / 2 + 0.5, nft_beta=0.7, **more)


def adaptive(v, old, u, a, **more):
    return adaptive_nft_loss(v, old, u, a / 2 + 0.5, SIGMA, nft_beta=0.7, **more)


def exact(v, old, u, a, **more):
    return exact_flow_awr_loss(v, u, a, **more)


def awm(v, old, u, a, weighting="uniform", **more):
    sigma = None if weighting == "uniform" else SIGMA
    clip = {"clip_low": 0.2, "clip_high": 0.1}
    return matching_surrogate_loss(v, old, u, a, **clip, weighting=weighting, sigma=sigma, **more)


def huber(*given, **more):
    return awm(*given, weighting="huber", **more)


def nft_loop(v, old, u, a, b=0.7):
    r = a / 2 + 0.5
    toward, away = (1 - b) * old + b * v, (1 + b) * old - b * v
    return (r * (toward - u) ** 2 + (1 - r) * (away - u) ** 2).flatten(1).mean(1)


def adaptive_loop(v, old, u, a, b=0.7):
    r, sigma = a / 2 + 0.5, SIGMA.reshape(-1, *(1,) * (v.ndim - 1))
    total = 0
    for weight, branch in ((r, (1 - b) * old + b * v), (1 - r, (1 + b) * old - b * v)):
        error = sigma * (branch - u)
        scale = error.detach().abs().flatten(1).mean(1)
        total = total + (weight * error**2).flatten(1).mean(1) / scale
    return total * 5 / b


def flow_awr_loop(v, old, u, a):
    return ((v - old - a * (u - old)) ** 2).flatten(1).mean(1)


def exact_loop(v, old, u, a):
    return ((1 + a) * (v - u) ** 2).flatten(1).mean(1)


LOOPS = {
    "nft": (nft, nft_loop),
    "adaptive": (adaptive, adaptive_loop),
    "flow_awr": (flow_awr_loss, flow_awr_loop),
    "exact": (exact, exact_loop),
}
ALL = {**{name: pair[0] for name, pair in LOOPS.items()}, "awm": awm, "huber": huber}


def case(layout, *, near=False):
    latent, tokens = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    old, u, move = torch.randn(3, M, *latent, generator=generator, dtype=F64)
    advantage = 2 * torch.rand(M, *tokens, generator=generator, dtype=F64) - 1
    v = old + (0 if near else 0.02) * move
    return v.requires_grad_(), old, u, advantage


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOOPS)
def test_equals_the_formula_token_by_token(name, layout):
    loss, loop = LOOPS[name]
    v, old, u, advantage = case(layout)
    found, expected = loss(v, old, u, advantage), loop(v, old, u, advantage)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.sum(), v)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_one_that_is_equal_over_tokens_is_that_of_the_row(name, layout):
    """Also where AWM's ratio is clipped: rows of either sign, far from the old policy."""
    v, old, u, _ = case(layout)
    for values in ([0.8, -0.6, 0.0], [-0.8, 0.6, 1.0]):
        row = torch.tensor(values, dtype=F64)
        tokens = row.reshape(-1, *(1,) * (v.ndim - 1)).expand(M, *LAYOUTS[layout][1])
        for start in (v, (v + 2 * (u - v)).detach().requires_grad_()):
            both = [ALL[name](start, old, u, a) for a in (row, tokens)]
            torch.testing.assert_close(*both)
            torch.testing.assert_close(*(torch.autograd.grad(x.sum(), start)[0] for x in both))


@pytest.mark.parametrize("name", ALL)
def test_a_token_moves_as_its_own_advantage_says(name):
    """Another token's advantage changes nothing, up to one factor for a row of AWM's ratio."""
    v, old, u, advantage = case("packed", near=True)
    advantage[:, 0] = 0.5
    other = advantage.clone()
    other[:, 1:] = other[:, 1:].flip(1)
    gradients = [
        torch.autograd.grad(ALL[name](v, old, u, a).sum(), v)[0] for a in (advantage, other)
    ]
    torch.testing.assert_close(gradients[0][:, 0], gradients[1][:, 0])
    assert not torch.allclose(gradients[0][:, 1:], gradients[1][:, 1:])
    if name == "exact":
        return  # its weight 1 + A is never negative: all tokens go to the sample, faster or slower
    toward = (-gradients[0] * (u - old)).sum(-1)
    assert torch.equal(toward.sign(), advantage[..., 0].sign())


def test_on_policy_awm_is_the_weighted_matching_loss():
    v, old, u, advantage = case("unpacked", near=True)
    found = torch.autograd.grad(awm(v, old, u, advantage).sum(), v)[0]
    expected = torch.autograd.grad((advantage * (v - u) ** 2).flatten(1).mean(1).sum(), v)[0]
    torch.testing.assert_close(found, expected)


def test_awm_clips_each_sign_by_its_own_side():
    """One row whose ratio is above 1 + high: tokens to be raised stop, the others go on."""
    old, u = torch.ones(1, 4, 1, dtype=F64), torch.zeros(1, 4, 1, dtype=F64)
    v = torch.full((1, 4, 1), 0.5, dtype=F64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 2.0, -3.0], dtype=F64).view(1, 4, 1)
    # losses 0.25 and 1: ratio e^0.75; positive part clipped at 1.1
    loss = matching_surrogate_loss(v, old, u, advantage, clip_low=0.2, clip_high=0.1)
    ratio = math.exp(0.75)
    assert loss.item() == pytest.approx(-(1.1 * 3 / 4 - ratio * 4 / 4))
    loss.sum().backward()
    # d(-ratio * A)/dv = ratio * A * 2 v / 4 of the negative ones alone
    expected = torch.tensor([0.0, -1.0, 0.0, -3.0], dtype=F64) * ratio * 2 * 0.5 / 4
    torch.testing.assert_close(v.grad.flatten(), expected)


@pytest.mark.parametrize("name", [name for name in ALL if name != "exact"])
def test_disjoint_regions_add_up(name):
    """The gradient at a token depends on its own region alone; of exact it has a 1 besides."""
    v, old, u, _ = case("packed", near=True)
    inside = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=F64)
    regions = [token_weights(x, (6, 4), normalization="none") for x in (inside, 1 - inside)]
    parts = [0.8 * regions[0].expand(M, 6, 1), -0.5 * regions[1].expand(M, 6, 1)]
    whole, *own = (
        torch.autograd.grad(ALL[name](v, old, u, a).sum(), v)[0] for a in (sum(parts), *parts)
    )
    torch.testing.assert_close(whole, sum(own))
    assert own[0][:, 2:].abs().max() < 1e-12
    assert own[1][:, :2].abs().max() < 1e-12


@pytest.mark.parametrize("name", ALL)
def test_a_masked_nan_leaks_nowhere(name):
    v, old, u, advantage = case("packed")
    valid = torch.tensor([True, False, True])
    expected = ALL[name](v, old, u, advantage)
    broken, lost = v.detach().clone(), advantage.clone()
    broken[1], lost[1] = math.nan, math.nan
    broken.requires_grad_()
    found = ALL[name](broken, old, u, lost, valid=valid)
    assert found[1] == 0
    torch.testing.assert_close(found[valid], expected[valid])
    (gradient,) = torch.autograd.grad(found.sum(), broken)
    assert gradient[1].eq(0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["nft", "flow_awr", "exact"])
def test_gradcheck(name):
    """Not of what has detached parts: adaptive denominators, and AWM's ratio of a row."""
    v, old, u, advantage = case("packed")
    assert torch.autograd.gradcheck(lambda x: ALL[name](x, old, u, 0.9 * advantage), v)


def test_half_velocities_and_errors():
    v, old, u, advantage = case("packed")
    half = [x.detach().bfloat16() for x in (v, old, u)]
    assert flow_awr_loss(*half, advantage.float()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"^advantage: expected one value per row, or per token"):
        flow_awr_loss(v, old, u, advantage[:, :5])
    with pytest.raises(ValueError, match=r"^advantage: expected one value per row"):
        flow_awr_loss(v, old, u, advantage[..., 0])
    with pytest.raises(ValueError, match=r"^r: expected finite values in \[0, 1\] where valid"):
        nft_loss(v, old, u, advantage - 2, nft_beta=1.0)
    with pytest.raises(ValueError, match=r"^advantage: expected finite values in \[-1, inf\]"):
        exact_flow_awr_loss(v, u, advantage - 2)
    with pytest.raises(TypeError, match=r"^advantage: expected float32 or float64"):
        flow_awr_loss(v, old, u, advantage.half())
