"""The update of the trainer's NFT, written by hand as a plain loop."""

from __future__ import annotations

from typing import Any

import torch

from mteditflow.pipelines import LoraPolicies, Rollout
from mteditflow.pipelines.conditioning import map_leaves, select_rows


class PlainLoop:
    """NFT's update as a loop writes it by hand: current, old and reference, each every time."""

    def __init__(
        self,
        rollout: Rollout,
        policies: LoraPolicies,
        optimizer: torch.optim.Optimizer,
        device: str,
        micro_batch: int,
    ) -> None:
        self.policies, self.size = policies, micro_batch
        self.clean = rollout.trajectory.clean.flatten(0, 1).to(device)
        (stage,) = rollout.conditioning[0].stages
        self.guidance, self.calls = stage.recipe.guidance, stage.calls
        self.constants = [
            (
                select_rows([call.arguments], [0], torch.device(device)),
                None if call.rest is None else call.rest.tensor[:1].to(device),
            )
            for call in stage.calls
        ]
        self.optimizer = optimizer

    def update(self) -> None:
        """One optimizer step on every turn's clean latent."""
        self.optimizer.zero_grad()
        for clean in self.clean.split(self.size):
            sigma = torch.rand(len(clean), device=clean.device)
            noise = torch.randn_like(clean, dtype=torch.float32)
            x_t = torch.lerp(clean.float(), noise, sigma[:, None, None])
            velocity = self.forward(x_t, sigma)
            with torch.no_grad():
                with self.policies.use("old"):
                    old = self.forward(x_t, sigma)
                with self.policies.use("reference"):
                    reference = self.forward(x_t, sigma)
            target = noise - clean.float()
            attracted, repelled = velocity - target, 2 * old - velocity - target
            loss = (attracted.square() + repelled.square()).mean() / 2
            loss = loss + 1e-4 * (velocity - reference).square().mean()
            (loss * len(clean) / len(self.clean)).backward()
        torch.nn.utils.clip_grad_norm_(self.policies.parameters(), 1.0)
        self.optimizer.step()

    def forward(self, x_t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Velocity, by one call of the transformer per branch."""
        outputs = []
        for call, (arguments, rest) in zip(self.calls, self.constants, strict=True):
            sample = x_t.to(call.place.dtype)
            rests = [] if rest is None else [rest.expand(len(x_t), *rest.shape[1:])]
            given = map_leaves(lambda leaf: expanded(leaf, len(x_t)), arguments)
            given[call.place.name] = torch.cat([sample, *rests], dim=1)
            given |= {time.name: sigma.to(time.dtype) for time in call.times}
            outputs.append(self.policies.model(**given)[0][:, : x_t.shape[1]])
        return (outputs[0] if self.guidance is None else self.guidance(outputs)).float()


def expanded(leaf: Any, rows: int) -> Any:
    """An argument of one row as one of several; what all rows share is left."""
    by_row = isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and len(leaf) == 1
    return leaf.expand(rows, *leaf.shape[1:]) if by_row else leaf
