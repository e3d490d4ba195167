"""``python -m benchmarks.recording``: what recording adds to a pipeline's call, in CPU time."""

from __future__ import annotations

import argparse
import cProfile
import inspect
import pstats
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from mteditflow_examples.shapes.editor import build_kontext, call_options
from PIL import Image

from benchmarks import measure, report, rewards_page
from mteditflow import FlowSDE, Solver, trajectory_generators
from mteditflow.pipelines import FlowMatchSDEScheduler, Recorder

LIMIT = 1.03  # of the recorded call over the plain one; the proof's rows are added
IMAGES = 2  # edited in one call
COLUMNS = ("call", "over", "clock", "seconds", "ratio", "95 % interval", "limit", "", "forwards")
HEADER = """\
# Benchmarks of recording

Made by `python -m benchmarks.recording`; do not edit.
"""
ABOUT = """\
A FLUX.1 Kontext of the real class ({parameters:.0f} million parameters in the transformer, two
images of {tokens} tokens with their references, {steps} steps, one thread) edits two images at
once, plain and recorded. `ODE` is the pipeline's own deterministic sampler, `SDE` the stochastic
one of `FlowSDE`; the same sampler without a recorder is what the cost of recording alone is held
against. Calls take turns in {rounds} rounds, in an order drawn anew each time; a ratio is the
median of the ratios within a round with its bootstrap interval, whose upper end is compared with
the limit. `proven` calls replay three rows of the first turn in one more forward pass; their share
of the call's rows, 3 / (2 x {steps}), is added to the limit.

Ratios of whole calls carry the noise of the machine. The last row does not: a profile of recorded
calls, over the same calls less the time in frames of the recorder with all that they call. A
profiler slows Python down more than kernels, so that it is an upper bound."""
Seconds = dict[str, dict[str, list[float]]]


def build(*, layers: int, heads: int, image_size: int) -> FluxKontextPipeline:
    """A Kontext whose call takes long enough to be that of a model."""
    pipeline = build_kontext(
        image_size=image_size,
        num_layers=layers,
        num_single_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=64,
    )
    pipeline.transformer.requires_grad_(False)
    return pipeline


class Calls:
    """One edit of two images, plain and recorded.

    Attributes:
        forwards: calls of the transformer so far.
        rows: their rows.
    """

    def __init__(self, pipeline: FluxKontextPipeline, *, steps: int) -> None:
        size = pipeline.vae.config.sample_size
        self._pipeline, self.forwards, self.rows = pipeline, 0, 0
        self._options = call_options(pipeline, steps=steps) | {"output_type": "latent"}
        self._image = Image.new("RGB", (size, size), (200, 30, 90))
        pipeline.transformer.register_forward_hook(self._count)

    def _count(self, _model: Any, _arguments: Any, output: Any) -> None:
        self.forwards += 1
        self.rows += len(output[0])

    def plain(self) -> None:
        self._edit(nullcontext())

    def stochastic(self) -> None:
        own = self._pipeline.scheduler
        self._pipeline.scheduler = FlowMatchSDEScheduler.from_config(
            own.config, solver=FlowSDE(0.7), generators=trajectory_generators(0, IMAGES)
        )
        try:
            self._edit(nullcontext())
        finally:
            self._pipeline.scheduler = own

    def recorded(self, solver: Solver | None, *, verify: bool = False, turns: int = 1) -> None:
        generators = trajectory_generators(0, IMAGES)
        recorder = Recorder(self._pipeline, solver, generators=generators, verify=verify)
        self._edit(recorder, turns)
        recorder.rollout(group=[0, 1])

    def _edit(self, context: Any, turns: int = 1) -> None:
        with context:
            for _ in range(turns):
                self._pipeline(
                    [self._image] * IMAGES,
                    ["Remove the square", "Remove the circle"],
                    generator=trajectory_generators(0, IMAGES),
                    **self._options,
                )


def passes_of(calls: Calls, call: Callable[[], None]) -> tuple[int, int]:
    """Forward passes of the transformer in one call, and their rows."""
    calls.forwards = calls.rows = 0
    call()
    return calls.forwards, calls.rows


def take_turns(ways: Mapping[str, Callable[[], None]], rounds: int) -> Seconds:
    """Seconds of each call by clock and way, in an order drawn anew each round."""
    clocks = {"CPU time": time.process_time, "wall clock": time.perf_counter}
    seconds: Seconds = {clock: {name: [] for name in ways} for clock in clocks}
    order, shuffler = list(ways), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            starts = {clock: read() for clock, read in clocks.items()}
            ways[name]()
            for clock, read in clocks.items():
                seconds[clock][name].append(read() - starts[clock])
    return seconds


def compare(calls: Calls, *, steps: int, rounds: int) -> list[list[Any]]:
    """Rows of the table."""
    ways: dict[str, Callable[[], None]] = {
        "plain ODE": calls.plain,
        "plain SDE": calls.stochastic,
        "ODE": partial(calls.recorded, None),
        "SDE": partial(calls.recorded, FlowSDE(0.7)),
        "SDE, proven": partial(calls.recorded, FlowSDE(0.7), verify=True),
    }
    passes = {name: passes_of(calls, call) for name, call in ways.items()}  # warms up, too
    seconds = take_turns(ways, rounds)
    rows: list[list[Any]] = []
    pairs = [("ODE", "plain ODE"), *product(("SDE", "SDE, proven"), ("plain SDE", "plain ODE"))]
    for clock, (way, base) in product(seconds, pairs):
        plain, (forwards, sampled) = seconds[clock][base], passes[base]
        low, ratio, high = measure.median_interval(seconds[clock][way], plain)
        limit = LIMIT + (passes[way][1] - sampled) / sampled
        interval = f"{low:.4f}..{high:.4f}"
        cells = [statistics.median(plain), f"{ratio:.4f}", interval, limit]
        counts = f"{forwards} + {passes[way][0] - forwards}"
        rows.append([way, base, clock, *cells, report.met(high, limit), counts])
        print(*rows[-1], flush=True)
    rows.append(profiled(ways["SDE"], rounds=rounds, steps=steps))
    print(*rows[-1], flush=True)
    return rows


def profiled(recorded: Callable[[], None], *, rounds: int, steps: int) -> list[Any]:
    """Row of the table: a recorded call over the same call less the recorder's frames."""
    whole: list[float] = []
    without: list[float] = []
    for _ in range(rounds):
        profile = cProfile.Profile(time.process_time)
        profile.runcall(recorded)
        total, inside = frames_of(profile, inspect.getfile(Recorder))
        whole.append(total)
        without.append(total - inside)
    low, ratio, high = measure.median_interval(whole, without)
    cells = [statistics.median(without), f"{ratio:.4f}", f"{low:.4f}..{high:.4f}", LIMIT]
    what = ["SDE", "itself less recorder", "CPU, profiled"]
    return [*what, *cells, report.met(high, LIMIT), f"{steps} + 0"]


def frames_of(profile: cProfile.Profile, file: str) -> tuple[float, float]:
    """Seconds of all frames, and of those of a file with all that they call."""
    total, inside = 0.0, 0.0
    stats: dict[Any, Any] = vars(pstats.Stats(profile))["stats"]
    for (path, *_), (_, _, own, _, callers) in stats.items():
        total += own
        if path == file:
            inside += sum(times[3] for (by, *_), times in callers.items() if by != file)
    return total, inside


def main() -> None:
    """Measure, print, and write ``recording.json`` and ``recording.md``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recording", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="calls of each kind")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps of a call")
    parser.add_argument("--layers", type=int, default=1, help="blocks of each of the two kinds")
    parser.add_argument("--heads", type=int, default=8, help="attention heads of width 64")
    parser.add_argument("--image-size", type=int, default=20, help="pixels; (size / 2)^2 tokens")
    report.add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure.keep_freed_memory()
    pipeline = build(layers=options.layers, heads=options.heads, image_size=options.image_size)
    parameters = sum(weight.numel() for weight in pipeline.transformer.parameters()) / 1e6
    rows = compare(Calls(pipeline, steps=options.steps), steps=options.steps, rounds=options.rounds)
    about = ABOUT.format(
        parameters=parameters,
        tokens=(options.image_size // 2) ** 2,
        steps=options.steps,
        rounds=options.rounds,
    )
    table = {"columns": COLUMNS, "rows": rows}
    section = {"about": about, "environment": report.environment("cpu"), "tables": [table]}
    rewards_page.write(options.output, "Recorder", section, page="recording", header=HEADER)
    print(f"Written to {options.output / 'recording.md'}")


if __name__ == "__main__":
    main()
