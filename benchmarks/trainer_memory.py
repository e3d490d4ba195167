"""Memory of the trainer's updates and trajectories: what grows, and what it depends on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import measure
from benchmarks.trainer_batch import Batch
from benchmarks.trainer_cost import spread
from benchmarks.trainer_parts import first_batch
from mteditflow.pipelines.conditioning import leaves
from mteditflow.training import Updater

MICRO_BATCH = 2  # so that the shortest update has two: the second keeps the gradient of the first
GROWN = 1.02  # the most that counts as not grown: index rows and generators are a few kB
PEAKS = ("objective", "along", "lengths", "rows of an update", "peak, MiB", "largest / smallest",
         "limit", "", "trajectories, MiB", "R² of a line")  # fmt: skip
CHOICES = ("model", "rows", "micro-batch", "peak, MiB", "CPU s", "checkpointing: peak, MiB",
           "checkpointing: CPU s", "time ratio")  # fmt: skip


def peak_row(
    objective: str, along: str, lengths: tuple[int, ...], world: Path, output: Path, *more: object
) -> list[Any]:
    """Peak memory of an update in micro-batches of one size, over lengths of turns or steps.

    Steps are GRPO's stochastic steps, all steps of a turn, or NFT's noise levels.
    """
    rows, peaks, held = [], [], []
    for length in lengths:
        options = {"--data.turns": 2, "--training.batch": MICRO_BATCH, "--training.minibatches": 1}
        options |= {"--data.groups": 1, "--data.group-size": 4}
        steps = {
            "grpo": ("--sampling.steps", "--objective.stochastic-steps"),
            "nft": ("--objective.renoise.levels",),
        }[objective]
        options |= dict.fromkeys(("--data.turns",) if along == "turns" else steps, length)
        given = [x for pair in options.items() for x in pair]
        preset = f"shapes-{objective}"
        with first_batch(preset, world, output / str(length), *given, *more) as batch:
            rows.append(len(batch.units()))
            peaks.append(measure.peak_bytes(updates(batch), device="cpu"))
            held.append(held_bytes(batch))
    grown = max(peaks) / min(peaks)
    growing = max(held) > min(held)  # along noise levels they stay
    straight = measure.straight_line(lengths, held)[1] if growing else "constant"
    verdict = ["MISSED" if grown > GROWN else "met"]
    return [objective, along, listed(lengths), listed(rows), listed(peaks, mebibytes), grown,
            f"{GROWN:g}", *verdict, listed(held, mebibytes), straight]  # fmt: skip


def updates(batch: Batch) -> Callable[[], object]:
    """A whole optimizer step of a batch, to be taken again and again."""
    optimizer = torch.optim.AdamW(batch.policies.parameters(), batch.training.learning_rate)
    updater = Updater(optimizer, batch.policies.parameters, max_grad_norm=1.0)
    return lambda: batch.update(updater)


def held_bytes(batch: Batch) -> int:
    """Bytes of a rollout: states, and conditioning, each storage once."""
    rollout = batch.rollout
    stages = [stage for record in rollout.conditioning for stage in record.stages]
    held = [[call.arguments, call.rest] for stage in stages for call in stage.calls]
    found = [x.tensor if hasattr(x, "tensor") else x for x in leaves(held)]
    tensors = [*rollout.trajectory._tensors().values(), rollout.index, *found]
    storages = [x.untyped_storage() for x in tensors if isinstance(x, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def choice_row(
    name: str, size: int, world: Path, output: Path, *more: object, rounds: int
) -> list[Any]:
    """Time and peak of NFT's update with micro-batches of a size, checkpointing off and on."""
    given = ("--training.minibatches", 1, "--training.batch", size, *more)
    with ExitStack() as stack:
        calls, peaks = {}, {}
        for kind in ("off", "on"):
            flags = ("--model.checkpointing",) if kind == "on" else ()
            batch = stack.enter_context(
                first_batch("shapes-nft", world, output / kind, *given, *flags)
            )
            rows = len(batch.units())
            calls[kind] = updates(batch)
            peaks[kind] = measure.peak_bytes(calls[kind], device="cpu")
        seconds = measure.interleaved_seconds(
            calls, device="cpu", rounds=rounds, sample_seconds=1e-3, clock=time.process_time
        )
    ratio = spread(measure.ratios(seconds["on"], seconds["off"]))
    cells = [x for k in calls for x in (mebibytes(peaks[k]), median(seconds[k]))]
    return [name, rows, size, *cells, ratio]


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.3g}"


def listed(values: Any, form: Callable[[Any], str] = str) -> str:
    return ", ".join(map(form, values))
