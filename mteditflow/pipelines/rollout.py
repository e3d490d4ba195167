"""Recorded rollouts of a pipeline: trajectories, and replayed velocities with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mteditflow._checks import check_floating, check_rank, check_shape, check_step_values
from mteditflow.flow.trajectory import Steps, Trajectory
from mteditflow.pipelines.conditioning import (
    Conditioning,
    map_tensors,
    replay_rows,
    share_equal_tensors,
)
from mteditflow.pipelines.model_state import caches, is_group_offloaded
from mteditflow.pipelines.policies import LoraPolicies


@dataclass(frozen=True, eq=False)
class Rollout:
    """Trajectories of a diffusers pipeline with the conditioning of each of their turns.

    ``Recorder.rollout`` returns it. ``velocity`` serves both kinds of training: at stored states it
    replays the rollout for the clipped surrogate, at re-noised clean latents it is the forward pass
    of NFT. The tensors may enter autograd even if they were recorded under inference mode.

    Args:
        trajectory: B trajectories of N turns of S steps.
        conditioning: the recorded pipeline calls.
        index: for each trajectory and turn the index of its call in ``conditioning`` and its row
            there, int64 [B, N, 2] on the CPU; -1 where the turn does not exist.

    Raises:
        ValueError: the index has not one entry per trajectory and turn.
    """

    trajectory: Trajectory
    conditioning: tuple[Conditioning, ...]
    index: Tensor

    def __post_init__(self) -> None:
        expected = (*self.trajectory.turn_mask.shape, 2)
        check_shape("index", self.index, expected, "[B, N, 2]")

    def __len__(self) -> int:
        return len(self.trajectory)

    @property
    def group(self) -> Tensor:
        """Integer group id of each trajectory, [B]."""
        return self.trajectory.group

    @property
    def turn_mask(self) -> Tensor:
        """Turns that exist, boolean [B, N]."""
        return self.trajectory.turn_mask

    @property
    def step_mask(self) -> Tensor:
        """Steps that exist and have a density, boolean [B, N, S]."""
        return self.trajectory.step_mask

    @property
    def reduction(self) -> str:
        """Reduction of the stored log-probs over elements, "mean" or "sum"."""
        return self.trajectory.reduction

    def clean_at(self, at: Tensor) -> Tensor:
        """Final latents of any turns, [M, ...]; ``at`` [M, 2] as in ``Trajectory.clean_at``."""
        return self.trajectory.clean_at(at)

    def steps_at(self, rows: Tensor) -> Steps:
        """Stored steps as M rows; ``rows`` [M, 3] as in ``Trajectory.steps_at``."""
        return self.trajectory.steps_at(rows)

    def reference_at(self, at: Tensor) -> Tensor:
        """Return the latents of each turn's reference image, as the model reads them.

        This is for pipelines that concatenate one reference with the sample, such as Kontext,
        FLUX.2 and Qwen-Image-Edit. Layout and units are those of the clean latents.

        Args:
            at: trajectory and turn of each row, integer [M, 2].

        Returns:
            [M, ...], on the device of the record, in the dtype of the transformer's argument.

        Raises:
            ValueError: there is no row, a turn does not exist in its trajectory, or what is
                concatenated with a sample is not one reference of its size.
        """
        check_shape("at", at, (len(at), 2), "[M, 2]")
        if not len(at):
            raise ValueError("at: expected at least one row, got none")
        calls, rows = self.index[at[:, 0].cpu(), at[:, 1].cpu()].unbind(-1)
        if bool((calls < 0).any()):
            raise ValueError("at: expected turns that exist, got some that turn_mask excludes")
        latent = self.trajectory.latents.shape[3:]
        found = []
        for call, row in zip(calls.tolist(), rows.tolist(), strict=True):
            records = self.conditioning[call].stages[0].calls
            rest = next(record.rest for record in records if record.module is None)
            given = None if rest is None else rest.tensor.select(rest.axis, row)
            if given is None or given.shape != latent:
                got = "nothing" if given is None else list(given.shape)
                raise ValueError(
                    f"at: expected turns whose sample has one reference of its size, "
                    f"{list(latent)}, beside it, got {got}"
                )
            found.append(given)
        return torch.stack(found)

    def velocity(
        self, model: nn.Module, x_t: Tensor, sigma: Tensor, trajectory: Tensor, turn: Tensor
    ) -> Tensor:
        r"""Return the velocity of ``model`` at any states, under their recorded conditioning.

        Rows of different trajectories, turns and steps share one call of the model (one per branch
        under classifier-free guidance) wherever their conditioning has the same shapes; otherwise
        there is one call per shape. On the states of a fresh rollout, in the batch in which it was
        sampled, the result is the velocity that the scheduler received, bit for bit where kernels
        are deterministic. Keep indices on the CPU: indices on a device cost a transfer per call.

        Args:
            model: the transformer, or a wrapper with the same forward arguments.
            x_t: noisy latents, [M, ...], in the layout of ``trajectory.latents`` and any precision.
            sigma: flow time of each row, [M], in [0, 1].
            trajectory: trajectory of each row, integer [M].
            turn: turn of each row, integer [M].

        Returns:
            [M, ...], float32 at least; for guided pipelines the combined velocity. Gradient flows
            to the model's parameters and to ``x_t``.

        Raises:
            ValueError: shapes differ, there is no row, sigma lies outside [0, 1], a turn does not
                exist in its trajectory, or the model has an enabled cache, or group offload under
                gradients.
            IndexError: an index is out of range.
            TypeError: ``x_t`` or ``sigma`` is not floating point.

        Source: MT-EditFlow (arXiv 2606.01985), Eq. 4-5: the velocity in both objectives.

        Example:
            For NFT, on one noisy version of the clean latent of every turn::

                trajectory, turn = rollout.trajectory.turn_mask.nonzero(as_tuple=True)
                clean = rollout.trajectory.clean[trajectory, turn]
                noise, sigma = torch.randn_like(clean), torch.rand(len(clean))
                velocity = rollout.velocity(
                    model, interpolate(clean, noise, sigma), sigma, trajectory, turn
                )
        """
        check_floating(x_t=x_t, sigma=sigma)
        check_rank("x_t", x_t, 2, "[M, ...]")
        latent = self.trajectory.latents.shape[3:]
        check_shape("x_t", x_t, (len(x_t), *latent), "[M, ...] with the axes of a latent")
        for name, x in (("sigma", sigma), ("trajectory", trajectory), ("turn", turn)):
            check_shape(name, x, x_t.shape[:1], "[M]")
        check_step_values("sigma", sigma, (sigma >= 0) & (sigma <= 1), "values in [0, 1]")
        calls, rows = self.index[trajectory.cpu(), turn.cpu()].unbind(-1)
        if bool((calls < 0).any()):
            raise ValueError("turn: expected turns that exist, got some that turn_mask excludes")
        if caches(model):
            raise ValueError(
                "model: expected one without an enabled cache, whose outputs depend on the calls "
                "before; call disable_cache() after sampling"
            )
        if torch.is_grad_enabled() and is_group_offloaded(model):
            raise ValueError(
                "model: expected weights that stay until the backward pass, but group offload "
                "removes them after each forward pass; use it for sampling only"
            )
        records = [self.conditioning[call] for call in calls.tolist()]
        # Reading sigma waits for the device: only where guidance depends on the flow time.
        several = any(len(record.stages) > 1 for record in self.conditioning)
        times = sigma.tolist() if several else [1.0] * len(records)
        found = [record.at(time) for record, time in zip(records, times, strict=True)]
        # Rows of equal signatures share one call of the model.
        groups: dict[Any, list[int]] = {}
        for position, (_, signature) in enumerate(found):
            groups.setdefault(signature, []).append(position)
        if len(groups) == 1:
            stages = [stage for stage, _ in found]
            return replay_rows(model, stages, rows.tolist(), x_t, sigma)
        parts, order = [], []
        for positions in groups.values():
            here = torch.tensor(positions, dtype=torch.int64, device=x_t.device)
            stages = [found[position][0] for position in positions]
            taken = [int(rows[position]) for position in positions]
            parts.append(replay_rows(model, stages, taken, x_t[here], sigma[here]))
            order += positions
        # ``argsort`` inverts the permutation that sorted the rows by shape.
        return torch.cat(parts)[
            torch.tensor(order, dtype=torch.int64, device="cpu").argsort().to(x_t.device)
        ]

    @torch.inference_mode(False)
    def select(self, index: Tensor | slice) -> Rollout:
        """Select trajectories by an integer index tensor, a boolean mask [B] or a slice.

        Conditioning that no selected trajectory uses is dropped.
        """
        at = index.cpu() if isinstance(index, Tensor) else index
        return _compact(self.trajectory.select(index), self.conditioning, self.index[at])

    @torch.inference_mode(False)
    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Rollout:
        """Return a copy on another device; dtypes stay, shared tensors stay shared."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        moved = map_tensors(self.conditioning, move)
        trajectory = self.trajectory.to(device, non_blocking=non_blocking)
        return Rollout(trajectory, moved, self.index)

    @classmethod
    @torch.inference_mode(False)
    def concatenate(cls, parts: Sequence[Rollout]) -> Rollout:
        """Concatenate rollouts along the batch, as for pipelines that take one reference per call.

        Chains may differ in their number of turns: shorter ones are padded with turns that
        ``turn_mask`` excludes.

        Args:
            parts: at least one rollout; all of one latent shape, grid, stochastic steps and
                reduction.

        Raises:
            ValueError: there is none, or they differ in latent shape, grid, stochastic steps or
                reduction.
        """
        if not parts:
            raise ValueError("parts: expected at least one Rollout, got none")
        longest = max(parts, key=lambda part: part.index.shape[1])
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + len(part.conditioning))
        indices = []
        for part, offset in zip(parts, offsets[:-1], strict=True):
            shift = torch.tensor([offset, 0], dtype=torch.int64, device=part.index.device)
            index = torch.where(part.index < 0, -1, part.index + shift)
            indices.append(_pad(index, 1, longest.index.shape[1], -1))
        return cls(
            Trajectory.concatenate([_fill_up(p.trajectory, longest.trajectory) for p in parts]),
            share_equal_tensors([record for part in parts for record in part.conditioning]),
            torch.cat(indices),
        )


class RolloutVelocity:
    """Velocity of any policy at any state of a recorded rollout, for the objectives to call.

    The current policy is the model outside of any ``LoraPolicies.use``, so that gradient
    checkpointing recomputes the right policy in the backward pass. All others run without gradient.

    Args:
        policies: policies on the model of the rollout.
        rollout: the recorded rollout of the samples.
        teacher: policy ("current", "old", "ema" or "reference") and rollout of a teacher, such as
            ("reference", the same edits of clean images) for self-distillation. Trajectory and turn
            indices are those of ``rollout``. None: there is no policy "teacher".

    Raises:
        ValueError: there is no such policy, or the teacher's rollout has another number of
            trajectories or turns.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 4-5: the velocity in both objectives.

    Example:
        NFT on one noisy version of the clean latent of every turn::

            velocity = RolloutVelocity(policies, rollout)
            at = rollout.turn_mask.nonzero()
            clean = rollout.clean_at(at)
            noise, sigma = torch.randn_like(clean), torch.rand(len(clean))
            x_t = interpolate(clean, noise, sigma)
            current, old = velocity("current", x_t, sigma, at), velocity("old", x_t, sigma, at)
    """

    def __init__(
        self,
        policies: LoraPolicies,
        rollout: Rollout,
        *,
        teacher: tuple[str, Rollout] | None = None,
    ) -> None:
        self._policies, self._rollout, self._teacher = policies, rollout, teacher
        if teacher is not None:
            policy, taught = teacher
            with policies.use(policy):  # raises for an unknown policy
                shape = rollout.turn_mask.shape
                check_shape("teacher: turn_mask", taught.turn_mask, shape, "[B, N] of the rollout")

    def __call__(self, policy: str, x_t: Tensor, sigma: Tensor, at: Tensor) -> Tensor:
        """Return the velocity of a policy under the recorded conditioning of each row.

        Args:
            policy: "current", "old", "reference", "ema" if there is one, or "teacher" if given.
            x_t: noisy latents, [M, ...], in the layout of the rollout's latents; on any device.
            sigma: flow time of each row, [M], in [0, 1]; on any device.
            at: trajectory and turn of each row, integer [M, 2], on the CPU.

        Returns:
            [M, ...] on the model's device, float32 at least, as ``Rollout.velocity``. Gradient
            flows to the adapter of "current" and to ``x_t`` under that policy only.

        Raises:
            ValueError: there is no such policy, shapes differ, sigma lies outside [0, 1], or a turn
                does not exist in its trajectory.
            RuntimeError: "current" is requested inside ``LoraPolicies.use`` of another policy, or
                adapters were changed by other means than ``LoraPolicies``.
            IndexError: an index is out of range.
            TypeError: ``x_t`` or ``sigma`` is not floating point.
        """
        check_shape("at", at, (len(x_t), 2), "[M, 2]")
        rollout, model = self._rollout, self._policies.model
        device = next(model.parameters()).device
        x_t, sigma = x_t.to(device), sigma.to(device)
        if policy == "current":
            self._policies.check_current()
            return rollout.velocity(model, x_t, sigma, *at.unbind(1))
        if policy == "teacher":
            if self._teacher is None:
                raise ValueError(
                    "policy: there is no 'teacher'; make RolloutVelocity with teacher=(policy, "
                    "rollout)"
                )
            policy, rollout = self._teacher
        with torch.no_grad(), self._policies.use(policy):
            return rollout.velocity(model, x_t, sigma, *at.unbind(1))


def _compact(
    trajectory: Trajectory, conditioning: tuple[Conditioning, ...], index: Tensor
) -> Rollout:
    """Return a rollout without the conditioning that its index does not refer to."""
    used = sorted({call for call in index[..., 0].flatten().tolist() if call >= 0})
    number = torch.full(
        (len(conditioning) + 1,), -1, dtype=torch.int64, device=index.device
    )  # the last entry is where -1 points
    number[used] = torch.arange(len(used), dtype=torch.int64, device=index.device)
    renumbered = torch.stack([number[index[..., 0]], index[..., 1]], dim=-1)
    return Rollout(trajectory, tuple(conditioning[call] for call in used), renumbered)


def _pad(x: Tensor, dim: int, length: int, value: float) -> Tensor:
    """Pad an axis to ``length`` with a constant."""
    shape = list(x.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([x, x.new_full(shape, value)], dim=dim) if shape[dim] else x


def _fill_up(trajectory: Trajectory, longest: Trajectory) -> Trajectory:
    """Pad a trajectory with masked turns on the grid of ``longest``."""
    turns = trajectory.turn_mask.shape[1]
    total = longest.turn_mask.shape[1]
    if turns == total:
        return trajectory
    return Trajectory(
        latents=_pad(trajectory.latents, 1, total, 0),
        sigmas=torch.cat([trajectory.sigmas, longest.sigmas[turns:].to(trajectory.sigmas)]),
        log_prob=_pad(trajectory.log_prob, 1, total, 0),
        stochastic=torch.cat(
            [trajectory.stochastic, longest.stochastic[turns:].to(trajectory.stochastic.device)]
        ),
        group=trajectory.group,
        turn_mask=_pad(trajectory.turn_mask, 1, total, False),
        reduction=trajectory.reduction,
    )
