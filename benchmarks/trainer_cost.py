"""Time that the trainer adds to its models: in a round, in a recorded call, in NFT's update."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mteditflow_examples.train_flux import train

from benchmarks import measure, report
from benchmarks.trainer_batch import ForwardCounter
from benchmarks.trainer_parts import (
    MEDIUM,
    ModelClock,
    build_kontext,
    first_batch,
    started,
)
from mteditflow.pipelines import Recorder

OUTSIDE, RECORDING = 0.1, 1.03  # the most that they may be
MODELS = ("transformer, forward", "transformer, backward", "VAE", "text encoders")
ROUNDS = ("preset", "rounds", "CPU s", *MODELS, "outside", "limit", "", "wall s", "outside, wall")


def round_row(preset: str, world: Path, output: Path, *more: object, rounds: int) -> list[Any]:
    """Where the time of rounds goes: medians over all but the first, without scoring."""
    by_cpu, by_wall = (
        measure_rounds(preset, world, output / name, *more, rounds=rounds, clock=clock)
        for name, clock in (("cpu", time.thread_time), ("wall", time.perf_counter))
    )
    shares = [median(r.get(kind, 0.0) / r["round"] for r in by_cpu) for kind in MODELS]
    outside, outside_wall = (median(map(share_outside, found)) for found in (by_cpu, by_wall))
    seconds, seconds_wall = (median(r["round"] for r in found) for found in (by_cpu, by_wall))
    verdict = [percent(OUTSIDE), report.met(outside, OUTSIDE)]
    return [
        *(preset, rounds - 1, seconds, *map(percent, shares), percent(outside), *verdict),
        *(seconds_wall, percent(outside_wall)),
    ]


def measure_rounds(
    preset: str,
    world: Path,
    output: Path,
    *more: object,
    rounds: int,
    clock: Callable[[], float],
) -> list[dict[str, float]]:
    """Seconds of each round but the first: of "round", and of each kind of model in it.

    A round is sampling, advantages and update. By ``time.thread_time`` the scorer's thread does not
    count; by wall clock the time spent waiting for it is taken off.
    """
    found: list[dict[str, float]] = []
    given = ("--training.rounds", rounds, *more)
    with started(preset, world, output, *given) as run:
        models = ModelClock(run.editor.pipeline, run.editor._prompts._encoders, clock)
        begin, update_old, watch = run.begin_round, run.policies.update_old, run.log.stopwatch
        started_at, scoring = 0.0, 0.0

        def begin_round() -> None:
            nonlocal started_at, scoring
            models.seconds, scoring = {}, watch.read().get("scoring", 0.0)
            started_at = clock()
            begin()

        def update_old_and_stop(*, decay: float) -> None:
            """The last call of an update."""
            update_old(decay=decay)
            seconds = clock() - started_at
            if clock is not time.thread_time:
                seconds -= watch.read()["scoring"] - scoring
            found.append({"round": seconds, **models.seconds})

        run.begin_round, run.policies.update_old = begin_round, update_old_and_stop
        train(run)
    return found[1:]


def share_outside(seconds: Mapping[str, float]) -> float:
    """Return the share of a round that no model took."""
    return 1 - sum(seconds.get(kind, 0.0) for kind in MODELS) / seconds["round"]


SIZES = {  # name: build options, image size, batch, steps
    "tiny": ({}, 12, 96, 4),
    "medium": (MEDIUM, 32, 1, 4),
}
RECORDED = ("model", "batch", "turns", "CPU s of plain calls", "recorded / plain", "limit", "",
            "and proven / plain")  # fmt: skip


def recording_row(size: str, turns: int, *, rounds: int) -> list[Any]:
    """A chain of pipeline calls alone, recorded, and recorded with the proof by one more forward.

    Embeddings are computed before, since text encoders would hide the cost; images are PIL.
    """
    build, side, batch, steps = SIZES[size]
    pipeline = build_kontext(image_size=side, **build)
    calls = {
        "plain": partial(edit, pipeline, batch, turns, steps),
        "recorded": partial(record, pipeline, batch, turns, steps, verify=False),
        "proven": partial(record, pipeline, batch, turns, steps, verify=True),
    }
    seconds = measure.interleaved_seconds(
        calls, device="cpu", rounds=rounds, clock=time.process_time
    )
    ratios, proven = (measure.ratios(seconds[x], seconds["plain"]) for x in ("recorded", "proven"))
    verdict = [f"{RECORDING:g}", report.met(ratios[1], RECORDING)]
    plain = median(seconds["plain"])
    return [size, batch, turns, plain, spread(ratios), *verdict, spread(proven)]


def edit(pipeline: Any, batch: int, turns: int, steps: int) -> list[Any]:
    """Some turns of edits of a batch of gray images."""
    side = pipeline.vae.config.sample_size
    generators = [torch.Generator().manual_seed(b) for b in range(batch)]
    images: Any = torch.full((batch, 3, side, side), 0.5)
    tokens, pooled = 10, pipeline.transformer.config.pooled_projection_dim
    width = pipeline.transformer.config.joint_attention_dim
    for turn in range(turns):
        drawn = torch.Generator().manual_seed(turn)
        images = pipeline(
            images,
            prompt_embeds=torch.randn(batch, tokens, width, generator=drawn),
            pooled_prompt_embeds=torch.randn(batch, pooled, generator=drawn),
            generator=generators,
            height=side,
            width=side,
            max_area=side * side,
            _auto_resize=False,
            num_inference_steps=steps,
        ).images
    return images


def record(pipeline: Any, batch: int, turns: int, steps: int, *, verify: bool) -> None:
    """The same as a rollout on the host."""
    with Recorder(pipeline, storage="cpu", verify=verify) as recorder:
        edit(pipeline, batch, turns, steps)
    recorder.rollout(group=list(range(batch)))


UPDATES = ("kl_coef", "rows", "forwards, old = current", "forwards, old differs", "saved",
           "CPU s, old = current", "CPU s, old differs", "ratio")  # fmt: skip


def skipping_row(
    kl_coef: float, world: Path, output: Path, *more: object, rounds: int
) -> list[Any]:
    """NFT's gradient on one micro-batch, with old equal to current or not.

    Raises:
        RuntimeError: not exactly one forward is saved.
    """
    with first_batch("shapes-nft", world, output, "--objective.kl-coef", kl_coef, *more) as batch:
        policies, counter = batch.policies, ForwardCounter(batch.policies.model)
        part = batch.units().split(batch.training.batch)[0]

        def update(equal: bool) -> None:
            if equal != policies.old_equals_current:
                policies.update_old(decay=0.0)
                for weight in policies.old_parameters():
                    weight.data.add_(not equal)
            batch.losses(part).loss.mean().backward()

        counts = []
        for equal in (True, False):
            update(equal)
            counter.lap()
            update(equal)
            counts.append(counter.lap()[0])
        if counts[1] - counts[0] != 1:
            raise RuntimeError(f"expected one forward less, got {counts[0]} and {counts[1]}")
        seconds = measure.interleaved_seconds(
            {"equal": partial(update, True), "differs": partial(update, False)},
            device="cpu",
            rounds=rounds,
            sample_seconds=1e-3,
            clock=time.process_time,
        )
    ratio = spread(measure.ratios(seconds["equal"], seconds["differs"]))
    return [kl_coef, len(part), *counts, 1, *(median(x) for x in seconds.values()), ratio]


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def spread(ratios: tuple[float, float, float]) -> str:
    low, ratio, high = ratios
    return f"{ratio:.3f} ({low:.3f}..{high:.3f})"
