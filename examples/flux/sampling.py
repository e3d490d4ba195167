"""Rollouts of a round, scored in the background while the next ones are sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
from PIL.Image import Image
from torch import Tensor

from mteditflow import gather_ranks
from mteditflow.chains import Chain, collate_chains
from mteditflow.objectives import Buckets, BucketVelocity, Sampling, Velocity
from mteditflow.pipelines import LoraPolicies, Part, Rollout, RolloutVelocity, Seen
from mteditflow.rewards import TurnScores
from mteditflow.training import gather_scores

from .few_steps import sampling_call
from .run import Run

POLL = 1.0  # s between looks for a signal while scores are waited for

Scores = dict[str, TurnScores]


@dataclass(frozen=True, eq=False)
class RoundChains:
    """This rank's part of a round: one entry per trajectory.

    Attributes:
        chains: records.
        references: images that turn 1 edits; None each for text to image.
        group: integer group id, [B].
        seen: images that each turn is given, as ``Editor.roll_out`` takes them.
    """

    chains: Sequence[Chain]
    references: Sequence[Image | None]
    group: Tensor
    seen: Sequence[Seen]


def next_chains(run: Run) -> RoundChains:
    """Draw this rank's chains of the round."""
    indices = next(run.batches, None)
    if indices is None:
        run.batches = iter(run.sampler)
        indices = next(run.batches)
    batch = collate_chains(run.chains.__getitems__(indices))
    history = run.config.data.history
    seen = {index: run.chains.seen(index, history) for index in dict.fromkeys(indices)}
    return RoundChains(batch.chains, batch.images, batch.group, [seen[index] for index in indices])


def roll_out(
    run: Run,
    references: Sequence[Image | None],
    instructions: Sequence[Sequence[str]],
    group: Tensor,
    how: Sampling,
    *,
    seen: Sequence[Seen] | None = None,
    purpose: str = "noise",
) -> Iterator[Part]:
    """Edit chains part by part with the policy that samples, each from its own noise."""
    editor = run.editor if run.sibling is None else run.sibling.editor
    with run.log.bar("rollout", len(references), unit="chains") as bar:
        for part in editor.roll_out(
            references,
            instructions,
            generators=[run.key.generator(purpose, b) for b in range(len(references))],
            group=group,
            batch=run.config.sampling.batch,
            solver=how.solver,
            stochastic_steps=how.stochastic_steps,
            verify=run.state.done == run.first_round,
            seen=seen,
            call=sampling_call(run.config.sampling, editor.family),
        ):
            yield part
            bar.advance(len(part.images))
            run.stop_if_requested()


def sample(
    run: Run, drawn: RoundChains
) -> tuple[Rollout | Buckets, list[list[Image | None]], Scores]:
    """Roll out this rank's chains; each part is scored while the next one is sampled.

    Returns:
        The record, in buckets where images differ in size; images [reference, turn 1, ..., turn N]
        of each trajectory; scores by term, [B, N] each.
    """
    objective = run.objective
    how = objective.sampling(run.state.done, steps=run.config.sampling.steps)
    parts, waiting = [], []
    images: list[list[Image | None]] = []
    with run.log.stopwatch.phase("sampling"), sampling_as(run, objective.samples_with):
        instructions = [chain.instructions for chain in drawn.chains]
        given = (drawn.references, instructions, drawn.group)
        for part in roll_out(run, *given, how, seen=drawn.seen):
            references = drawn.references[part.rows]
            pairs = zip(references, part.images, strict=True)
            edited: list[list[Image | None]] = [[r, *turns] for r, turns in pairs]
            waiting.append(run.submit(drawn.chains[part.rows], edited))
            parts.append(part.rollout)
            images += edited
    return joined(parts), images, collect(run, waiting)


def sampling_as(run: Run, policy: str) -> AbstractContextManager[None]:
    """Let what samples be a policy: the model in training, or its sibling with a copy of it."""
    few_steps = run.config.sampling.lora is not None
    if run.sibling is None:
        return run.policies.use(policy, few_steps=few_steps)
    return run.sibling.use(run.policies, policy, few_steps=few_steps)


def joined(parts: Sequence[Rollout]) -> Rollout | Buckets:
    """Join rollouts in their order: one where all latents are of one shape, else buckets."""
    shapes = groupby(parts, key=lambda part: part.trajectory.latents.shape[3:])
    buckets = [Rollout.concatenate(list(own)) for _, own in shapes]
    return buckets[0] if len(buckets) == 1 else Buckets(buckets)


def velocity_of(policies: LoraPolicies, samples: Rollout | Buckets) -> Velocity:
    """Return the velocities of the policies on a record."""
    if isinstance(samples, Rollout):
        return RolloutVelocity(policies, samples)
    parts = cast(Sequence[Rollout], samples.parts)
    return BucketVelocity(samples, [RolloutVelocity(policies, part) for part in parts])


def collect(run: Run, waiting: Sequence[Future[Mapping[str, TurnScores]]]) -> Scores:
    """Wait for the scores of every part, on all ranks, and join them; a collective call.

    Raises:
        Stopped: a signal came meanwhile.
    """
    with (
        run.log.stopwatch.phase("scoring"),
        run.log.bar("rewards", len(waiting), unit="parts") as bar,
    ):
        unfinished = True
        while unfinished:
            done, left = wait(waiting, timeout=POLL)
            bar.advance(len(done) - bar.done)
            (lefts,), _ = gather_ranks(torch.tensor([len(left)], device=run.device))
            unfinished = bool(lefts.any())
            run.stop_if_requested()
    scored = [future.result() for future in waiting]
    return {name: TurnScores.concatenate([s[name] for s in scored]) for name in scored[0]}


def gather(run: Run, scores: Scores, group: Tensor) -> tuple[Scores, Tensor, slice]:
    """Join scores and group ids of all ranks; a collective call.

    Returns:
        Scores by term and group ids of all trajectories, and the slice of this rank's.
    """
    joined, own = gather_scores(scores, device=run.device)
    (groups,), _ = gather_ranks(group.to(run.device))
    return joined, groups.cpu(), own
