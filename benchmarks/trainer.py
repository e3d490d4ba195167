"""``python -m benchmarks.trainer``: what the FLUX trainer adds to its models, in time and memory.

Without options every section of the tiny model is measured and written to ``trainer.json`` and
``trainer.md``; ``--full-size`` measures one real architecture with random weights on one GPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from benchmarks import (
    measure,
    report,
    rewards_page,
    trainer_cost,
    trainer_full_size,
    trainer_memory,
)
from benchmarks.trainer_batch import environment
from benchmarks.trainer_parts import make_medium, make_world

HEADER = """\
# Benchmarks of the trainer

Made by `python -m benchmarks.trainer`; do not edit. Time is CPU time where it says so: of the
calling thread or of the process, with one thread of torch, since other work on the same machine
disturbs that least. Candidates take turns within each round; a ratio is the median over rounds of
the ratio within a round, with its quartiles in brackets. Memory on a CPU is the running sum of the
allocator's events above what was there before, as `torch.profiler` records them, in which host and
device are one; on CUDA it is the allocator's own peak, weights included. Every section says how
busy the machine was: the load average when its measuring began.
"""
ROUND = """\
The shapes world on the tiny FLUX.1-Kontext, presets at their own sizes: 96 trajectories of 3 turns,
sampled and trained in batches of 96, 2 optimizer steps. A round is sampling, advantages and update;
the time that the exact scorer takes is left out (a real judge is elsewhere), and so are log,
checkpoints and pictures between rounds. Models are timed around each call, and the backward pass
from the gradient's arrival at the transformer's output to its end. All that is left, such as the
scheduler, the recorder, images and PIL, noise, losses, the optimizer, is outside. Medians over
rounds after the first; two runs, one on each clock."""
RECORDING = f"""\
A chain of pipeline calls with embeddings and latents of images given, 4 steps a turn, alone and
inside a `Recorder` that keeps its record on the host, with the making of the `Rollout`. Tiny:
hidden 64, 36 + 36 + 10 tokens, a batch of 96. Medium: hidden 512, 8 blocks, 256 + 256 + 10 tokens.
The limit of {trainer_cost.RECORDING:g} is on recording as the trainer does it in every round but
the first. "Proven" is its first round: after the first turn one row goes through the transformer
again, one forward of one row more whatever the batch and the number of turns, which is dear beside
a batch of one and one turn."""
SKIPPING = """\
The gradient of NFT's loss on one micro-batch of 96 rows of the tiny Kontext. Forwards are counted,
and the benchmark fails unless exactly one is saved. With kl_coef > 0 the reference's forward is
among them."""
PEAKS = f"""\
One optimizer step of the tiny Kontext on 4 trajectories in micro-batches of
{trainer_memory.MICRO_BATCH}. Along turns the steps are fixed, along steps there are 2 turns. A step
is a stochastic step of GRPO, all steps of its turn, and a noise level of NFT. Trajectories are what
the host holds of the round: states and conditioning."""
CHOICES = """\
One optimizer step of NFT; both ways take turns. Medium: an untrained Kontext of hidden 512 and 8
blocks, 324 + 324 + 10 tokens."""
FULL = """\
Random weights of the real architecture, bfloat16 unless said otherwise, adapters of rank
{rank} in float32, {resolution} x {resolution}, {steps} steps, 3 turns, {batch} trajectories,
micro-batches of {micro_batch}; {ways}. The losses are the trainer's `kontext-nft`; the plain loop
runs current, old and reference every time. FLOP are the model's, counted by torch on a model
without data: matrix products and attention, adapters included, a recomputed forward and the VAE
not. The matrix rate is what one product of 8192 x 8192 matrices reaches here (1024 on a CPU):
{rate:.0f} TFLOP/s. Kontext's widths are the defaults of diffusers' `FluxTransformer2DModel`, with
guidance embedded, and its VAE is FLUX.1's as public copies of its `config.json` have it;
klein-base-9B is 8 + 24 blocks, 32 heads of 128 and texts of 12288 (3 x 4096 of Qwen3-8B), as public
copies of the reference code's `Klein9BParams` have it, with the default `AutoencoderKLFlux2`. No
configuration was downloaded; a test checks that there are 11.9 and 9.1 billion weights."""

Sections = dict[str, tuple[str, Sequence[str], Callable[[], list[list[Any]]]]]


def sections(folder: Path, *, rounds: int) -> Sections:
    """Name, text and columns of each section of the tiny model, and what measures its rows."""
    fresh = iter(range(1000))

    def output() -> Path:
        return folder / f"run-{next(fresh)}"

    def world(turns: int = 3, counts: tuple[int, int] = (480, 1)) -> Path:
        path = folder / f"world-{turns}"
        return path if path.exists() else make_world(path, counts=counts, turns=turns)

    def round_rows() -> list[list[Any]]:
        presets = ("shapes-nft", "shapes-grpo")
        return [trainer_cost.round_row(p, world(), output(), rounds=rounds) for p in presets]

    def recording_rows() -> list[list[Any]]:
        sizes = [(size, turns) for size in trainer_cost.SIZES for turns in (1, 3)]
        return [trainer_cost.recording_row(*size, rounds=rounds) for size in sizes]

    def skipping_rows() -> list[list[Any]]:
        skip = trainer_cost.skipping_row
        return [skip(kl_coef, world(), output(), rounds=rounds) for kl_coef in (0.0, 1e-4)]

    def peak_rows() -> list[list[Any]]:
        ways = [("turns", (1, 2, 3, 6)), ("steps", (1, 2, 3, 4, 5, 6, 7, 8))]
        return [
            trainer_memory.peak_row(objective, along, lengths, world(6, (16, 1)), output())
            for objective in ("nft", "grpo")
            for along, lengths in ways
        ]

    def choice_rows() -> list[list[Any]]:
        small = ("--data.groups", 4, "--data.group-size", 8)
        large = ("--model.resolution", 36, "--data.groups", 1, "--data.group-size", 8)
        large += ("--data.turns", 1, "--sampling.steps", 1)
        medium = make_medium(folder / "medium", scale=3)
        few = {"tiny": rounds, "medium": max(2, rounds // 3)}  # of many seconds each
        ways = [("tiny", size, world(), small) for size in (1, 2, 8, 96)]
        ways += [("medium", size, medium, large) for size in (1, 2, 8)]
        return [
            trainer_memory.choice_row(name, size, where, output(), *more, rounds=few[name])
            for name, size, where, more in ways
        ]

    cost, memory = trainer_cost, trainer_memory
    return {
        "1 Time outside the models": (ROUND, cost.ROUNDS, round_rows),
        "2 Recording": (RECORDING, cost.RECORDED, recording_rows),
        "3 Old equals current": (SKIPPING, cost.UPDATES, skipping_rows),
        "4 Peak memory": (PEAKS, memory.PEAKS, peak_rows),
        "5 Checkpointing and micro-batches": (CHOICES, memory.CHOICES, choice_rows),
    }


def full_size(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Name and section of one real architecture, run in one way."""
    size, about = trainer_full_size.SIZES[options.full_size], environment(options.device)
    dtype = getattr(torch, options.dtype)
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")  # as the trainer does
    ways = "compiled" if options.compile else "not compiled"
    ways += ", no checkpointing" if options.no_checkpointing else ", gradient checkpointing"
    given = {"batch": options.batch, "micro_batch": options.micro_batch}
    rows, rate = trainer_full_size.full_size_rows(
        size,
        device=options.device,
        dtype=dtype,
        compiled=options.compile,
        checkpointing=not options.no_checkpointing,
        rounds=options.rounds,
        **given,
    )
    text = FULL.format(
        rank=size.rank, resolution=size.resolution, steps=size.steps, ways=ways,
        rate=rate / 1e12, **given,
    )  # fmt: skip
    name = f"6 Full size: {options.full_size} on {options.device}, {ways}"
    return name, section(text, about, trainer_full_size.COLUMNS, rows)


def section(
    text: str, about: dict[str, Any], columns: Sequence[str], rows: list[list[Any]]
) -> dict[str, Any]:
    """As ``rewards_page`` takes it."""
    made = ", ".join(f"{name} {about[name]}" for name in ("torch", "diffusers", "peft"))
    load = f"{about['threads']} thread of torch; load average {about['load']:.1f}"
    return {
        "about": f"{made}; {load}.\n\n{text}",
        "environment": about,
        "tables": [{"columns": columns, "rows": rows}],
    }


def parser() -> argparse.ArgumentParser:
    """Read the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__)
    made.add_argument("--only", default="", help="only sections whose name contains this")
    made.add_argument("--rounds", type=int, default=9, help="samples of each candidate")
    report.add_output(made)
    made.add_argument("--full-size", choices=trainer_full_size.SIZES, help="and only this")
    made.add_argument("--device", default="cuda", help="of full size")
    made.add_argument("--dtype", default="bfloat16", help="of full size")
    made.add_argument("--batch", type=int, default=4, help="trajectories of full size")
    made.add_argument("--micro-batch", type=int, default=2, help="rows of full size")
    made.add_argument("--compile", action="store_true", help="repeated blocks of full size")
    made.add_argument("--no-checkpointing", action="store_true", help="of full size")
    return made


def main() -> bool:
    """Measure, print, and write ``trainer.json`` and ``trainer.md``; whether limits are met."""
    options = parser().parse_args()
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()

    def write(name: str, made: dict[str, Any]) -> bool:
        rewards_page.write(options.output, name, made, page="trainer", header=HEADER)
        print(f"\n{name}", *made["tables"][0]["rows"], sep="\n", flush=True)
        return not any("MISSED" in row for row in made["tables"][0]["rows"])

    if options.full_size:
        return write(*full_size(options))
    torch.set_num_threads(1)
    measure.keep_freed_memory()
    met = []
    with tempfile.TemporaryDirectory() as folder:
        made = sections(Path(folder), rounds=options.rounds)
        for name, (text, columns, rows) in made.items():
            if options.only in name:
                about, start = environment("cpu"), time.perf_counter()
                met.append(write(name, section(text, about, columns, rows())))
                print(f"{time.perf_counter() - start:.0f} s")
    return all(met)


if __name__ == "__main__":
    raise SystemExit(not main())
