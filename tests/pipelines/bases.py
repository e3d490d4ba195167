"""Rollouts, replays and gradients on base models that save memory, beside those on plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline
from peft import LoraConfig
from tiny import batches_of_rollout, roll_out
from tiny_pipelines.checks import replay
from torch import Tensor

from mteditflow import FlowSDE
from mteditflow.pipelines import LoraPolicies, Rollout
from tests.loops import some

SOLVER = FlowSDE(0.7)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def policies_on(pipeline: DiffusionPipeline, by: float = 0.1) -> LoraPolicies:
    """Policies whose current one differs from the reference, alike on every model of a family."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    policies = LoraPolicies(pipeline.transformer, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policies.parameters():
            weight.add_(by * torch.randn(weight.shape, generator=generator))
    return policies


def hooks_of(model: torch.nn.Module) -> dict[str, Any]:
    """All that recording might leave behind, by module."""
    return {
        name: (
            [*module._forward_hooks.values()],
            [*module._forward_pre_hooks.values()],
            module.__dict__.get("forward"),
            module.training,
        )
        for name, module in model.named_modules()
    }


class Replayed(NamedTuple):
    """One recorded rollout and its replay."""

    rollout: Rollout
    deviation: float  # of the ratio from 1, in the batches as sampled
    gradients: list[Tensor]


def replayed(pipeline: DiffusionPipeline, policies: LoraPolicies) -> Replayed:
    """Record two chains of two turns; replay them, and differentiate one shuffled batch."""
    model = pipeline.transformer
    before = hooks_of(model)
    rollout = roll_out(pipeline, SOLVER)
    assert hooks_of(model) == before
    stored, deviation = rollout.trajectory.log_prob, 0.0
    with torch.no_grad():
        for rows in batches_of_rollout(rollout, isinstance(pipeline, FluxKontextPipeline)):
            log_ratio = replay(rollout, model, SOLVER, rows) - stored[rows]
            deviation = max(deviation, log_ratio.exp().sub(1).abs().max().item())
    return Replayed(rollout, deviation, gradients_of(rollout, policies))


def gradients_of(rollout: Rollout, policies: LoraPolicies) -> list[Tensor]:
    """Gradients of a weighted sum of log-probs, in one batch of some rows of all turns."""
    rows = [index[::3] for index in rollout.step_mask.nonzero(as_tuple=True)]
    log_prob = replay(rollout, policies.model, SOLVER, rows)
    weight = torch.linspace(-1, 1, len(log_prob))
    return list(torch.autograd.grad((weight * log_prob).sum(), policies.parameters()))


def falls(loss: Callable[[], Tensor], policies: LoraPolicies) -> bool:
    """Whether three steps of Adam lower a loss; every adapter weight must get a gradient."""
    optimizer = torch.optim.Adam(policies.parameters(), lr=3e-3)
    first = loss()
    value = first
    for _ in range(3):
        optimizer.zero_grad()
        value.backward()
        for weight in some(policies.parameters()):
            assert weight.grad is not None
            assert weight.grad.isfinite().all()
            assert weight.grad.abs().sum() > 0
        optimizer.step()
        value = loss()
    return bool(value < first)
