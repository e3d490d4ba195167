"""What is checked of every pipeline of the table; each check returns a cell, or fails."""

from __future__ import annotations

from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig

import mteditflow as mt
from mteditflow.pipelines import LoraPolicies, Recorder, ReplayError, Rollout
from tests.loops import some

from .base import Family, Options

SOLVER = mt.FlowSDE(0.7)
TURNS = 2
UNLINKED = "without a solver the first and the last are recorded"


def replay(rollout: Rollout, model: Any, solver: Any, rows: Any) -> torch.Tensor:
    """Log-probs of stored steps under the model, as the training loop computes them."""
    trajectory, turn, _ = rows
    steps = rollout.trajectory.steps(*rows)
    velocity = rollout.velocity(model, steps.x_t, steps.sigma, trajectory, turn)
    transition = solver(steps.x_t, velocity, steps.sigma, steps.next_sigma)
    return mt.gaussian_log_prob(steps.next_x, *transition, reduction=rollout.trajectory.reduction)


def tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of what a pipeline returned."""
    if isinstance(output, (list, tuple)):
        return [x for part in output for x in tensors(part)]
    return [torch.as_tensor(output)]


class Case:
    """One pipeline with one kind of guidance; rolled out once per number of trajectories."""

    def __init__(self, family: Family, kind: str) -> None:
        self.family, self.kind = family, kind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.pipeline = family.build()
        self.model = getattr(self.pipeline, family.model)
        self.calls = 0
        self.solver: Any = SOLVER
        self._plain: Any = None
        self._rollouts: dict[int, Rollout] = {}

    def given(self, turn: int, batch: int) -> Options:
        """The options of a turn's call, copied: some pipelines write into what they are given."""
        family = self.family
        given = family.inputs(turn, batch) | family.options | family.guided[self.kind]
        negative = given.get("negative_prompt")
        if isinstance(negative, list):
            given["negative_prompt"] = negative[:batch]
        return deepcopy(given | {"num_inference_steps": family.steps})

    def call(self, turn: int, batch: int, generators: Any, output: str) -> Any:
        """What the pipeline makes of a turn's inputs."""
        given = self.given(turn, batch) | {"output_type": output}
        generators = generators[0] if batch == 1 else generators  # some take no list
        with torch.random.fork_rng(devices=[]):  # some encode pictures from the global state
            torch.manual_seed(turn)
            return self.pipeline(**given, generator=generators)[0]

    def plain(self) -> Any:
        """What the pipeline returns for the largest batch without the recorder."""
        if self._plain is None:
            batch = max(self.family.batches)
            generators = mt.trajectory_generators(0, batch)
            self._plain = self.call(0, batch, generators, self.family.output)
        return self._plain

    def rollout(self, batch: int) -> Rollout:
        """Two turns of as many trajectories."""
        if batch not in self._rollouts:
            self._rollouts[batch] = self._record(batch)
        return self._rollouts[batch]

    def _record(self, batch: int) -> Rollout:
        generators = mt.trajectory_generators(0, batch)
        options = {"generators": generators, "model": self.model} | self.family.recorder
        calls: list[int] = []
        hook = self.model.register_forward_hook(lambda *_: calls.append(1))
        try:
            with Recorder(self.pipeline, self.solver, **options) as recorder:
                for turn in range(TURNS):
                    calls.clear()  # those of the first turn have proofs among them
                    self.call(turn, batch, generators, self.family.latent)
                    self.calls = len(calls)
        finally:
            hook.remove()
        return recorder.rollout(group=list(range(batch)))

    def ratios(self) -> str:
        """Replayed steps have their recorded likelihood, in all numbers of trajectories."""
        if self.solver is None:
            return "none: the pipeline changes latents between steps"
        sampled, mixed = 0.0, 0.0
        for batch in some(self.family.batches):
            rollout = self.rollout(batch)
            assert rollout.trajectory.stochastic.any(), "no step was stochastic"
            rows = torch.stack(rollout.trajectory.step_mask.nonzero(as_tuple=True))
            steps = rows[1:].unique(dim=1).T
            parts = [rows[:, (rows[1:] == step[:, None]).all(0)] for step in steps]
            sampled = max(sampled, self._deviation(rollout, parts))
            order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))
            halves = rows[:, order].tensor_split((max(1, rows.shape[1] * 3 // 5),), dim=1)
            mixed = max(mixed, self._deviation(rollout, [part for part in halves if part.numel()]))
        assert sampled == 0, f"ratios of the batch as sampled differ from 1 by {sampled:.1e}"
        assert mixed <= 1e-5, f"ratios of mixed rows differ from 1 by {mixed:.1e}"
        exact = "1" if sampled == 0 else "1 to 1e-6"
        return f"{exact}; mixed: 1 to {'1e-6' if mixed <= 1e-6 else '1e-5'}"

    @torch.no_grad()
    def _deviation(self, rollout: Rollout, parts: list[torch.Tensor]) -> float:
        """How far ratios of stored steps are from 1 at most."""
        old = rollout.trajectory.log_prob
        ratios = [
            (replay(rollout, self.model, SOLVER, tuple(rows)) - old[tuple(rows)]).exp()
            for rows in parts
        ]
        return float((torch.cat(ratios) - 1).abs().max())

    @cached_property
    def policies(self) -> LoraPolicies:
        """Adapters that start as no-ops, on all attention layers."""
        return LoraPolicies(self.model, LoraConfig(r=4, target_modules=list(self.family.lora)))

    def _descends(self, loss: Any) -> str:
        """Three steps of the optimizer lower a loss, from gradients that are finite and not 0."""
        self.policies.load_state_dict(self.policies.state_dict("old"))
        parameters = list(self.policies.parameters())
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        values, norms = [], []
        for _ in range(4):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            gradients = [p.grad for p in parameters if p.grad is not None]
            norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
            optimizer.step()
            values.append(value.item())
        self.policies.load_state_dict(self.policies.state_dict("old"))  # other checks look, too
        assert 0 < min(norms) <= max(norms) < float("inf"), f"norms of gradients: {norms}"
        assert values[-1] < values[0] - 1e-6, f"loss over three steps: {values}"
        return "loss falls"

    def grpo(self) -> str:
        """GRPO's loss on all recorded steps of the largest batch."""
        if self.solver is None:
            return "refused: no step leads to the next"
        rollout = self.rollout(max(self.family.batches))
        trajectory = rollout.trajectory
        rows = (trajectory.step_mask & trajectory.stochastic).nonzero(as_tuple=True)
        advantage = 1.0 - 2.0 * ((rows[0] + rows[1]) % 2)

        def loss() -> torch.Tensor:
            log_prob, old = replay(rollout, self.model, SOLVER, rows), trajectory.log_prob[rows]
            return mt.clipped_surrogate_loss(
                log_prob, old, advantage, clip_low=0.2, clip_high=0.2
            ).mean()

        return self._descends(loss)

    def nft(self) -> str:
        """DiffusionNFT's loss on re-noised clean latents of the largest batch."""
        rollout = self.rollout(max(self.family.batches))
        trajectory, turn = rollout.trajectory.turn_mask.nonzero(as_tuple=True)
        clean = rollout.trajectory.clean[trajectory, turn]
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.linspace(0.3, 0.9, len(clean))
        x_t, target = mt.interpolate(clean, noise, sigma), mt.velocity_target(clean, noise)
        r = 1.0 * ((trajectory + turn) % 2 == 0)

        def velocity() -> torch.Tensor:
            return rollout.velocity(self.model, x_t, sigma, trajectory, turn)

        def loss() -> torch.Tensor:
            current = velocity()
            old = self.policies.old_velocity(current, velocity)
            return mt.nft_loss(current, old, target, r, nft_beta=1.0).mean()

        return self._descends(loss)

    def same_under_ode(self) -> str:
        """Recorded without noise, the pipeline returns its own bits, and is left as it was."""
        batch, scheduler, plain = max(self.family.batches), self.pipeline.scheduler, self.plain()
        with Recorder(self.pipeline, model=self.model, **self.family.recorder):
            recorded = self.call(0, batch, mt.trajectory_generators(0, batch), self.family.output)
        for one, other in some(zip(tensors(plain), tensors(recorded), strict=True)):
            assert torch.equal(one, other), "other outputs under an ODE"
        assert self.pipeline.scheduler is scheduler
        assert not self.model._forward_hooks
        return "the pipeline's own bits"

    def no_zero_weights(self) -> None:
        """No parameter of the model is all zero, which would hide what it multiplies."""
        zero = [n for n, p in self.model.named_parameters() if not bool(p.detach().abs().max() > 0)]
        assert not zero, f"zero parameters: {zero}"

    def _choose_solver(self) -> None:
        """Record without a solver where masks change latents between steps, as in inpainting."""
        try:
            self.rollout(self.family.batches[0])
        except ReplayError as error:
            if UNLINKED not in str(error):
                raise
            self.solver = None

    def facts(self) -> dict[str, str]:
        """The columns that the rollouts alone give; the first check of a case."""
        self.no_zero_weights()
        self._choose_solver()
        ratio = self.ratios()
        rollout = self.rollout(max(self.family.batches))
        steps = rollout.trajectory.log_prob.shape[-1]
        places = {
            str(call.place): None
            for record in rollout.conditioning
            for stage in record.stages
            for call in stage.calls
        }
        return {
            "batches": ", ".join(map(str, self.family.batches)),
            "steps": f"{steps} of {self.family.steps}",
            "calls": str(self.calls),
            "how the sample lies": "; ".join(places),
            "text": self.family.text,
            "ratio": ratio,
        }

    def trained(self) -> dict[str, str]:
        """The other columns."""
        return {
            "output under an ODE": self.same_under_ode(),
            "GRPO": self.grpo(),
            "NFT": self.nft(),
        }
