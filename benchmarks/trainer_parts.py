"""Shared parts of the trainer's benchmarks: worlds, runs before their first round, clocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from mteditflow_examples.flux.advantages import round_rewards, turn_advantages, turn_signals
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.inputs import read_inputs
from mteditflow_examples.flux.run import Run
from mteditflow_examples.flux.sampling import next_chains, sample
from mteditflow_examples.flux.scoring import scoring
from mteditflow_examples.flux.start import build
from mteditflow_examples.shapes.editor import Family, build_kontext
from mteditflow_examples.shapes.files import write_world
from mteditflow_examples.shapes.world import IMAGE_SIZE
from PIL import Image

from benchmarks.trainer_batch import Batch
from mteditflow.training import RunLog, Termination

MEDIUM = {  # hidden 512, 8 blocks: arithmetic outweighs Python
    "num_layers": 2,
    "num_single_layers": 6,
    "num_attention_heads": 8,
    "attention_head_dim": 64,
}


def make_world(folder: Path, *, counts: tuple[int, int], turns: int = 3) -> Path:
    """A tiny Kontext and chains."""
    write_world(folder, Family.kontext, seed=0, counts=counts, turns=turns)
    return folder


def make_medium(folder: Path, *, scale: int) -> Path:
    """An untrained Kontext of medium size, and chains whose pictures are enlarged for it."""
    make_world(folder, counts=(8, 1))
    for path in (folder / "images").iterdir():
        picture = Image.open(path, formats=("PNG",))
        picture.resize((scale * picture.width,) * 2, Image.Resampling.NEAREST).save(path)
    build_kontext(image_size=scale * IMAGE_SIZE, **MEDIUM).save_pretrained(folder / "model")
    return folder


@contextmanager
def started(preset: str, world: Path, output: Path, *more: object) -> Iterator[Run]:
    """A run before its first round, without evaluation, pictures and trackers."""
    given = ["--model.path", world / "model", "--data.chains", world / "train.jsonl"]
    given += ["--data.held-out", None, "--output.folder", output, "--output.strips-every", 0, *more]
    config = parse([preset, "--output.trackers", *map(str, given)])
    accelerator = Accelerator(cpu=True)
    inputs = read_inputs(config, accelerator)
    log = RunLog(output, console=False, main=True)
    with Termination() as termination, scoring(config.rewards, output / "cache") as submit:
        yield build(config, accelerator, inputs, log, termination, submit)


@contextmanager
def first_batch(preset: str, world: Path, output: Path, *more: object) -> Iterator[Batch]:
    """The first round of a run, sampled and scored, before its update."""
    with started(preset, world, output, *more) as run:
        run.first_round = 0
        rollout, _, scores = sample(run, next_chains(run))
        config = run.config.rewards
        rewards = round_rewards(config, scores, rollout.trajectory.group)
        signals, weights = turn_signals(config, rewards, {})
        advantage, valid, _ = turn_advantages(config, rewards, signals, weights)
        given = (run.policies, run.objective, rollout, advantage, valid)
        yield Batch(*given, run.config.training, run.key)


class ModelClock:
    """Seconds inside models by kind, the transformer's backward pass among them.

    A backward pass counts from the gradient's arrival at the transformer's output to its end: the
    transformer is the last thing that it goes through.
    """

    def __init__(self, pipeline: Any, encoders: list[Any], clock: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = {}
        self._clock, self._backward_since = clock, -1.0
        self._time(pipeline.transformer, "forward", "transformer, forward")
        self._time(pipeline.vae, "encode", "VAE")
        self._time(pipeline.vae, "decode", "VAE")
        for encoder in encoders:
            self._time(encoder, "forward", "text encoders")

    def _time(self, owner: Any, method: str, kind: str) -> None:
        call = getattr(owner, method)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            output = call(*args, **kwargs)
            self._add(kind, self._clock() - start)
            if kind.startswith("transformer") and output[0].requires_grad:
                output[0].register_hook(self._arrived)
            return output

        setattr(owner, method, timed)

    def _arrived(self, _: torch.Tensor) -> None:
        if self._backward_since < 0:  # the first of two branches under guidance
            self._backward_since = self._clock()
            torch.autograd.Variable._execution_engine.queue_callback(self._left)

    def _left(self) -> None:
        self._add("transformer, backward", self._clock() - self._backward_since)
        self._backward_since = -1.0

    def _add(self, kind: str, seconds: float) -> None:
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
