"""Losses of the forward process are one family: docs/family.md, proved across methods."""

import pytest
import torch

from mteditflow import (
    clipped_surrogate_loss,
    exact_flow_awr_loss,
    flow_awr_loss,
    group_advantage,
    matching_log_prob,
    nft_loss,
    optimality_probability,
    softmax_advantage,
)
from tests.loops import some

GROUP = torch.tensor([0, 0, 0, 1, 1, 1])


def case(seed=0, dtype=torch.float64, shape=(6, 2, 3)):
    generator = torch.Generator().manual_seed(seed)
    velocity, old, target = torch.randn(3, *shape, generator=generator, dtype=dtype)
    reward = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    return velocity.requires_grad_(), old, target, reward


def awm(velocity, old, target, advantage, **options):
    log_prob, before = (matching_log_prob(v, target, **options) for v in (velocity, old))
    return clipped_surrogate_loss(log_prob, before, advantage, clip_low=0.9, clip_high=99.0)


def nft(velocity, old, target, advantage):
    return nft_loss(velocity, old, target, (1 + advantage) / 2, nft_beta=1.0)


def exact(velocity, old, target, advantage):
    return exact_flow_awr_loss(velocity, target, advantage)


# The advantages lie in [-1, 1], where all of them are defined.
LOSSES = {"nft": nft, "awm": awm, "flow_awr": flow_awr_loss, "exact": exact}


def bounded(reward):
    return softmax_advantage(reward, GROUP, temperature=1.0)


def gradient(loss, velocity):
    return torch.autograd.grad(loss.sum(), velocity)[0]


# NFT is FlowAWR


@pytest.mark.parametrize("seed", range(3))
def test_nft_at_beta_1_is_flow_awr_plus_a_constant(seed):
    velocity, old, target, reward = case(seed)
    advantage = 2 * reward - 1
    constant = (1 - advantage.square()) * (target - old).square().mean(dim=(1, 2))
    expected = flow_awr_loss(velocity, old, target, advantage) + constant
    found = nft(velocity, old, target, advantage)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, velocity), gradient(expected, velocity))


@pytest.mark.parametrize("advantage", [-3.0, -1.0, 0.4, 1.0, 2.5, 23.0])
def test_the_two_branches_of_nft_are_flow_awr_for_any_advantage(advantage):
    """Beyond [-1, 1] r is no probability, and ``nft_loss`` refuses it: the branches by hand."""
    velocity, old, target, _ = case()
    r, branches = (1 + advantage) / 2, (velocity, 2 * old - velocity)
    toward, away = ((v - target).square().mean(dim=(1, 2)) for v in branches)
    constant = (1 - advantage**2) * (target - old).square().mean(dim=(1, 2))
    expected = flow_awr_loss(velocity, old, target, advantage) + constant
    torch.testing.assert_close(r * toward + (1 - r) * away, expected)


@pytest.mark.parametrize("nft_beta", [0.1, 0.5, 2.0])
def test_nft_at_another_beta_is_flow_awr_of_a_larger_or_smaller_advantage(nft_beta):
    velocity, old, target, reward = case()
    advantage = 6 * reward - 3
    r = optimality_probability(advantage, advantage_max=5.0)
    found = gradient(nft_loss(velocity, old, target, r, nft_beta=nft_beta), velocity)
    moved = flow_awr_loss(velocity, old, target, advantage / 5 / nft_beta)
    torch.testing.assert_close(found, nft_beta**2 * gradient(moved, velocity))


# AdvantageFlow's square, A |v - u|^2 + k |v - v_old|^2


def test_flow_awr_is_advantage_flow_of_weight_one():
    velocity, old, target, reward = case()
    advantage = group_advantage(reward, GROUP)
    own, pull = ((velocity - x).square().mean(dim=(1, 2)) for x in (target, old))
    expected = gradient(advantage * own + (1 - advantage) * pull, velocity)
    found = gradient(flow_awr_loss(velocity, old, target, advantage), velocity)
    torch.testing.assert_close(found, expected)


# on-policy


def test_on_policy_awm_nft_and_flow_awr_have_one_gradient():
    _, old, target, reward = case()
    advantage = bounded(reward)
    expected = -2 * advantage[:, None, None] * (target - old) / 6
    for name in ("nft", "awm", "flow_awr"):
        velocity = old.clone().requires_grad_()
        found = gradient(LOSSES[name](velocity, old, target, advantage), velocity)
        torch.testing.assert_close(found, expected)


def test_on_policy_the_exact_form_adds_only_flow_matching():
    """Its expectation is 0 where the old policy is at its optimum: the 1 of 1 + A is variance."""
    _, old, target, reward = case()
    velocity, advantage = old.clone().requires_grad_(), bounded(reward)
    difference = gradient(exact(velocity, old, target, advantage), velocity) - gradient(
        flow_awr_loss(velocity, old, target, advantage), velocity
    )
    torch.testing.assert_close(difference, -2 * (target - old) / 6)


def test_awm_of_the_clean_estimates_error_is_the_adaptive_spaces():
    """``sigma_squared`` is the matching loss of clean estimates, x - sigma v."""
    velocity, _, target, _ = case()
    sigma = torch.linspace(0.1, 1.0, 6, dtype=torch.float64)
    clean_error = sigma[:, None, None] * (velocity - target)
    found = matching_log_prob(velocity, target, weighting="sigma_squared", sigma=sigma)
    torch.testing.assert_close(found, -clean_error.square().mean(dim=(1, 2)))


# laws of all


@pytest.mark.parametrize("name", LOSSES)
def test_at_the_old_policy_equal_rewards_teach_nothing(name):
    _, old, target, _ = case()
    velocity, advantage = old.clone().requires_grad_(), bounded(torch.full((6,), 0.7))
    loss = LOSSES[name](velocity, old, target, advantage)
    if name == "exact":  # plain flow matching of the old policy's own samples
        expected = -2 * (target - old) / 6
        torch.testing.assert_close(gradient(loss, velocity), expected)
    else:
        assert gradient(loss, velocity).abs().max() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_rows_and_members_may_be_permuted_and_rewards_shifted(name):
    velocity, old, target, reward = case()
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    expected = LOSSES[name](velocity, old, target, bounded(reward))
    permuted = softmax_advantage(reward[order], GROUP[order], temperature=1.0)
    found = LOSSES[name](velocity[order], old[order], target[order], permuted)
    torch.testing.assert_close(found, expected[order])
    moved = bounded(reward + torch.where(GROUP == 0, 3.0, -40.0))
    torch.testing.assert_close(LOSSES[name](velocity, old, target, moved), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_but_the_velocity_gets_a_gradient(name):
    velocity, old, target, reward = case()
    constants = [x.detach().clone().requires_grad_() for x in (old, target, bounded(reward))]
    LOSSES[name](velocity, *constants).sum().backward()
    assert velocity.grad.any()
    assert all(x.grad is None for x in some(constants))


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_latents_are_reduced_in_float32(name):
    """4096 elements, whose sum bfloat16 would stop counting at 256."""
    *latents, reward = case(dtype=torch.float32, shape=(6, 4096))
    half, advantage = [x.detach().bfloat16() for x in latents], bounded(reward).float()
    found = LOSSES[name](*half, advantage)
    assert found.dtype == torch.float32
    exactly = LOSSES[name](*(x.double() for x in half), advantage.double())
    torch.testing.assert_close(found.double(), exactly, rtol=1e-5, atol=1e-6)
