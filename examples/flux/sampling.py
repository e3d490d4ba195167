"""Rollouts of a round; each part is scored in the background while the next is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from random import Random
from typing import TypeVar, cast

import torch
from PIL.Image import Image
from torch import Tensor

from mteditflow import gather_ranks
from mteditflow.chains import Chain, collate_chains
from mteditflow.objectives import Buckets, BucketVelocity, RoundKey, Sampling, Velocity
from mteditflow.pipelines import LoraPolicies, Part, Rollout, RolloutVelocity, Seen
from mteditflow.rewards import TurnScores, pixel_change
from mteditflow.training import gather_scores

from .config import IDENTITY
from .few_steps import sampling_call
from .run import Run
from .scorers import ScorerError
from .scoring import PATIENCE

POLL = 1.0  # seconds between checks for a signal while waiting for scores

Scores = dict[str, TurnScores]
Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class RoundChains:
    """This rank's part of a round: one entry per trajectory.

    Attributes:
        chains: records with the edit turns only; these are what scorers receive.
        references: input images of turn 1; None for text to image.
        group: integer group id, [B].
        seen: input images of each turn, in the form that ``Editor.roll_out`` takes.
        instructions: instruction of each turn, [B][N].
        edits: edit turns, boolean [B, N]; False: an identity turn, which asks for no change.
    """

    chains: Sequence[Chain]
    references: Sequence[Image | None]
    group: Tensor
    seen: Sequence[Seen]
    instructions: Sequence[Sequence[str]]
    edits: Tensor


def next_chains(run: Run) -> RoundChains:
    """Draw this rank's chains of the round, cut to the current number of turns."""
    indices = next(run.batches, None)
    if indices is None:
        run.batches = iter(run.sampler)
        indices = next(run.batches)
    return chains_at(run, indices)


def chains_at(run: Run, indices: Sequence[int]) -> RoundChains:
    """Return the chains at some indices, cut to the round's number of turns."""
    batch = collate_chains(run.chains.__getitems__(indices))
    data, turns = run.config.data, 1 if run.config.drifts else run.turns
    seen = {index: run.chains.seen(index, data.history) for index in dict.fromkeys(indices)}
    edits = edit_turns(run.key, batch.group, turns, data.identity_share)
    counts = edits.sum(dim=1).tolist()
    chains = [chain.first_turns(n) for chain, n in zip(batch.chains, counts, strict=True)]
    rows = range(len(indices))
    texts = [_laid_out(chains[b].instructions, edits[b], data.identity_instruction) for b in rows]
    given = [_laid_out(seen[indices[b]][: counts[b]], edits[b], ["last"]) for b in rows]
    return RoundChains(chains, batch.images, batch.group, given, texts, edits)


def edit_turns(key: RoundKey, group: Tensor, turns: int, identity_share: float) -> Tensor:
    """Draw which turns ask for an edit, boolean [B, N].

    The draw depends only on round and chain, so members of a group agree across ranks. Each chain
    keeps at least one edit turn; without one there would be nothing to score for following.
    """
    drawn: dict[int, list[bool]] = {}
    for chain in dict.fromkeys(group.tolist()):
        numbers = [Random(key.number("identity", chain, n)).random() for n in range(turns)]
        drawn[chain] = [x >= identity_share for x in numbers]
        if not any(drawn[chain]):
            drawn[chain][Random(key.number("edit", chain)).randrange(turns)] = True
    return torch.tensor([drawn[chain] for chain in group.tolist()], dtype=torch.bool)


def _laid_out(values: Sequence[Value], edits: Tensor, other: Value) -> list[Value]:
    """Spread values over the edit turns; all other turns get ``other``."""
    left = iter(values)
    return [next(left) if edit else other for edit in edits.tolist()]


def roll_out(
    run: Run,
    references: Sequence[Image | None],
    instructions: Sequence[Sequence[str]],
    group: Tensor,
    how: Sampling,
    *,
    seen: Sequence[Seen] | None = None,
    purpose: str = "noise",
    places: Sequence[int] | None = None,
) -> Iterator[Part]:
    """Yield rollouts part by part under the sampling policy, each trajectory from its own noise.

    Args:
        run: the run.
        references: input images of turn 1, [B].
        instructions: instructions, [B][N].
        group: integer group id, [B].
        how: solver and stochastic steps.
        seen: input images of each turn; None: the previous result.
        purpose: name of the noise in its random key.
        places: place of each trajectory among this rank's, which keys its noise. None: all
            trajectories of a round, in order. Only then are signals checked between parts: the
            check is collective, and ranks must have equally many parts.
    """
    rows = range(len(references)) if places is None else places
    editor = run.editor if run.sibling is None else run.sibling.editor
    with run.log.bar("rollout", len(references), unit="chains") as bar:
        for part in editor.roll_out(
            references,
            instructions,
            generators=[run.key.generator(purpose, b) for b in rows],
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
            if places is None:
                run.stop_if_requested()


def sample(
    run: Run,
    drawn: RoundChains,
    *,
    purpose: str = "noise",
    places: Sequence[int] | None = None,
) -> tuple[Rollout | Buckets, list[list[Image | None]], Scores]:
    """Roll out this rank's chains; each part is scored while the next is sampled.

    Args:
        run: the run.
        drawn: chains of this rank.
        purpose: name of the noise in its random key.
        places: as in ``roll_out``.

    Returns:
        The rollout, in buckets if latent shapes differ; images [reference, turn 1, ..., turn N] of
        each trajectory; scores by term, [B, N] each.
    """
    objective = run.objective
    how = objective.sampling(run.state.done, steps=run.config.sampling.steps)
    parts, waiting = [], []
    images: list[list[Image | None]] = []
    with run.log.stopwatch.phase("sampling"), sampling_as(run, objective.samples_with):
        given = (drawn.references, drawn.instructions, drawn.group)
        noise = {"purpose": purpose, "places": places}
        for part in roll_out(run, *given, how, seen=drawn.seen, **noise):
            references = drawn.references[part.rows]
            pairs = zip(references, part.images, strict=True)
            edited: list[list[Image | None]] = [[r, *turns] for r, turns in pairs]
            judged = judged_images(edited, drawn.edits[part.rows])
            waiting.append(run.submit(drawn.chains[part.rows], judged))
            parts.append(part.rollout)
            images += edited
    scores = collect(run, waiting)
    if run.config.data.identity_share > 0:
        scores = {name: x.spread(drawn.edits) for name, x in scores.items()}
        scores[IDENTITY] = stillness(images, ~drawn.edits)
    return joined(parts), images, scores


def judged_images(
    images: Sequence[Sequence[Image | None]], edits: Tensor
) -> list[list[Image | None]]:
    """Return reference and results of edit turns, without identity turns, for scorers."""
    return [
        [first, *(image for image, edit in zip(rest, own, strict=True) if edit)]
        for (first, *rest), own in zip(images, edits.tolist(), strict=True)
    ]


def stillness(images: Sequence[Sequence[Image | None]], identity: Tensor) -> TurnScores:
    """Score identity turns: 1 minus the mean absolute pixel change over 255.

    No scorer is needed, since the input image is the exact target.

    Args:
        images: reference and result of each turn, [B][N + 1].
        identity: identity turns, boolean [B, N].

    Returns:
        Scores in [0, 1], float32 [B, N]; NaN (not measured) at edit turns.
    """
    score = torch.full(identity.shape, torch.nan, dtype=torch.float32)
    for b, n in identity.nonzero().tolist():
        before, after = images[b][n : n + 2]
        assert before is not None
        assert after is not None
        score[b, n] = 1 - pixel_change(before, after) / 255
    return TurnScores(score, torch.ones_like(identity), {})


def sampling_as(run: Run, policy: str) -> AbstractContextManager[None]:
    """Return a context in which the trained model, or its sibling, samples with a policy."""
    few_steps = run.config.sampling.lora is not None
    if run.sibling is None:
        return run.policies.use(policy, few_steps=few_steps)
    return run.sibling.use(run.policies, policy, few_steps=few_steps)


def joined(parts: Sequence[Rollout]) -> Rollout | Buckets:
    """Join rollouts in order: one rollout if all latents have one shape, else buckets."""
    # Consecutive parts only: each bucket holds a contiguous range of trajectories.
    shapes = groupby(parts, key=lambda part: part.trajectory.latents.shape[3:])
    buckets = [Rollout.concatenate(list(own)) for _, own in shapes]
    return buckets[0] if len(buckets) == 1 else Buckets(buckets)


def velocity_of(policies: LoraPolicies, samples: Rollout | Buckets) -> Velocity:
    """Return the policies' velocity function on a rollout."""
    if isinstance(samples, Rollout):
        return RolloutVelocity(policies, samples)
    parts = cast(Sequence[Rollout], samples.parts)
    return BucketVelocity(samples, [RolloutVelocity(policies, part) for part in parts])


def collect(run: Run, waiting: Sequence[Future[Mapping[str, TurnScores]]]) -> Scores:
    """Wait for the scores of all parts on all ranks, and join this rank's; a collective call.

    Raises:
        Stopped: a signal arrived while waiting.
    """
    scored = await_all(run, waiting, "rewards")
    return {name: TurnScores.concatenate([s[name] for s in scored]) for name in scored[0]}


def await_all(run: Run, waiting: Sequence[Future[Value]], name: str) -> list[Value]:
    """Wait for a scorer's results of all parts on all ranks; a collective call.

    Raises:
        Stopped: a signal arrived while waiting.
        ScorerError: a scorer failed on some rank.
    """
    with (
        run.log.stopwatch.phase("scoring"),
        run.log.bar(name, len(waiting), unit="sampled batches") as bar,
    ):
        unfinished = True
        while unfinished:
            done, left = wait(waiting, timeout=POLL)
            bar.advance(len(done) - bar.done)
            # Every rank polls until the last is done: stop_if_requested is collective, too.
            (lefts,), _ = gather_ranks(torch.tensor([len(left)], device=run.device))
            unfinished = bool(lefts.any())
            if unfinished and (out := run.submit.out):
                _explain_outage(run, out)
            run.stop_if_requested()
    _raise_together(run, waiting)
    return [future.result() for future in waiting]


def _explain_outage(run: Run, out: Sequence[str]) -> None:
    """Log what follows if a server stays out, once per process."""
    if run.outage_explained:
        return
    run.outage_explained = True
    run.log.message(
        f"waiting for {', '.join(out)}: each request waits up to {PATIENCE:g} s for a server, then "
        f"its score counts as lost; if more than {run.config.rewards.max_invalid:.0%} of a reward "
        "are lost (rewards.max_invalid), the run saves its last whole round and ends with 1. It is "
        "safe to stop it now by SIGTERM; start it again to resume, with the answers so far"
    )


def _raise_together(run: Run, waiting: Sequence[Future[Value]]) -> None:
    """Raise the error of a scorer on every rank, so that all can save; a collective call.

    Raises:
        ScorerError: a scorer failed on some rank.
    """
    faults = [x for x in (future.exception() for future in waiting) if isinstance(x, ScorerError)]
    said = [*f"{faults[0]}\n".encode()] if faults else []
    (told,), _ = gather_ranks(torch.tensor(said, dtype=torch.uint8, device=run.device))
    if not len(told):
        return
    text = told.cpu().numpy().tobytes().decode().splitlines()[0]
    fault = faults[0] if faults else ScorerError(text)  # its own has the traceback as its cause
    fault.everywhere = True
    raise fault


def gather(run: Run, scores: Scores, group: Tensor) -> tuple[Scores, Tensor, slice]:
    """Join scores and group ids of all ranks; a collective call.

    Returns:
        Scores by term and group ids of all trajectories, and the slice that is this rank's.
    """
    joined, own = gather_scores(scores, device=run.device)
    (groups,), _ = gather_ranks(group.to(run.device))
    return joined, groups.cpu(), own
