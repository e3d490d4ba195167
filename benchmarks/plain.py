"""The same formulas as trainers usually write them: what the library is measured against.

One elementwise operation after the other, float64 weights where DiffusionNFT's reference has them,
and a Python loop over the groups, as per-prompt statistics are kept.
"""

import math

import numpy as np
import torch
from torch import Tensor

LATENT_AXES = (1, 2, 3)


def flow_sde_transition(x_t, velocity, sigma, next_sigma, *, noise_level):
    sigma, next_sigma = sigma.view(-1, 1, 1, 1), next_sigma.view(-1, 1, 1, 1)
    dt = next_sigma - sigma
    g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, next_sigma, sigma))) * noise_level
    mean = (
        x_t * (1 + g**2 / (2 * sigma) * dt) + velocity * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    )
    return mean, g * torch.sqrt(-dt)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    log_prob = -((x - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.mean(dim=LATENT_AXES)


def sde_step(x_t, velocity, sigma, next_sigma, noise, *, noise_level):
    mean, std = flow_sde_transition(x_t, velocity, sigma, next_sigma, noise_level=noise_level)
    next_x = mean + std * noise
    return next_x, gaussian_log_prob(next_x, mean, std)


def replay(velocity, x_t, next_x, sigma, next_sigma, *, noise_level):
    mean, std = flow_sde_transition(x_t, velocity, sigma, next_sigma, noise_level=noise_level)
    return gaussian_log_prob(next_x, mean, std)


def _branches(velocity, old_velocity, nft_beta):
    old_velocity = old_velocity.detach()
    positive = nft_beta * velocity + (1 - nft_beta) * old_velocity
    negative = (1 + nft_beta) * old_velocity - nft_beta * velocity
    return positive, negative


def nft_loss(velocity, old_velocity, target, r, *, nft_beta):
    positive, negative = _branches(velocity, old_velocity, nft_beta)
    positive_loss = ((positive - target) ** 2).mean(dim=LATENT_AXES)
    negative_loss = ((negative - target) ** 2).mean(dim=LATENT_AXES)
    return r * positive_loss + (1 - r) * negative_loss


def adaptive_nft_loss(velocity, old_velocity, clean, x_t, r, sigma, *, nft_beta, advantage_max=5.0):
    sigma = sigma.view(-1, 1, 1, 1)
    losses = []
    for branch in _branches(velocity, old_velocity, nft_beta):
        estimate = x_t - sigma * branch
        with torch.no_grad():
            distance = torch.abs(estimate.double() - clean.double())
            weight = distance.mean(dim=LATENT_AXES, keepdim=True).clip(min=1e-5)
        losses.append(((estimate - clean) ** 2 / weight).mean(dim=LATENT_AXES))
    positive_loss, negative_loss = losses
    loss = r * positive_loss / nft_beta + (1 - r) * negative_loss / nft_beta
    return loss * advantage_max


def group_advantage(reward: Tensor, group: Tensor, *, eps: float = 1e-4) -> Tensor:
    rewards, groups = reward.cpu().numpy().astype(np.float64), group.cpu().numpy()
    statistics = {}
    for name in np.unique(groups):
        statistics.setdefault(name, []).extend(rewards[groups == name])
    advantages = np.zeros_like(rewards)
    for name in np.unique(groups):
        members = np.stack(statistics[name])
        mine = groups == name
        advantages[mine] = (rewards[mine] - members.mean()) / (members.std() + eps)
    return torch.from_numpy(advantages).to(reward)
