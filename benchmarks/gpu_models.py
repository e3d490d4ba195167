"""One architecture with random weights on one device: rollout, NFT and GRPO updates, in some time.

Everything but the weights is the trainer's own: editor, recorder, policies, losses, updater.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import Config
from mteditflow_examples.shapes.editor import build_klein, build_kontext

from benchmarks import trainer_full_size
from benchmarks.trainer_batch import Batch, ForwardCounter
from benchmarks.trainer_full_size import SIZES, Size
from mteditflow.objectives import ReplayObjective, RoundKey
from mteditflow.pipelines import Editor, LoraPolicies, Rollout
from mteditflow.training import Updater

NOT_REACHED, OUT_OF_MEMORY = "not reached", "out of memory"
SLOWEST = 0.1  # share of the matrix rate with which the time of work is guessed before it begins
STOCHASTIC_STEPS = 2  # of GRPO: fewer than the preset's 5, so that an update takes less time
#: Dense bf16 products with float32 accumulation, TFLOP/s, by a part of the device's name.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0, "4090": 165.0, "5090": 209.5}
COLUMNS = ("model", "way", "what", "seconds", "TFLOP", "of the matrix rate", "of the stated peak",
           "peak, GiB", "forwards")  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a model is trained.

    Attributes:
        checkpointing: whether activations are computed again in the backward pass.
    """

    checkpointing: bool

    def __str__(self) -> str:
        return "checkpointing" if self.checkpointing else "no checkpointing"


WAYS = (Way(checkpointing=True), Way(checkpointing=False))


class Deadline:
    """A moment after which nothing begins.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until then, negative after it."""
        return self._end - time.monotonic()

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long would end before."""
        return seconds < self.left


def tiny_size(name: str) -> Size:
    """That architecture, shrunk: the same classes and calls."""
    pipeline = {"kontext": build_kontext, "klein": build_klein}[name]()

    def built(model: Any, **changed: Any) -> tuple[Any, dict[str, Any]]:
        config = {k: v for k, v in model.config.items() if not k.startswith("_")}
        return type(model), config | changed

    width = pipeline.transformer.config.joint_attention_dim
    return replace(
        SIZES[name],
        transformer=built(pipeline.transformer, guidance_embeds=name == "kontext"),
        vae=built(pipeline.vae),
        embeddings={"kontext": ((10, width), (32,)), "klein": ((10, width),)}[name],
        resolution=pipeline.vae.config.sample_size,
        rank=2,
        steps=2,
    )


def settings(objective: str, size: Size) -> Config:
    """The trainer's preset for an objective, in micro-batches of one row."""
    config = parse([f"kontext-{objective}", "--rewards.scorer", "none:none"])
    if isinstance(config.objective, ReplayObjective):
        steps = min(STOCHASTIC_STEPS, size.steps)
        config = replace(config, objective=replace(config.objective, stochastic_steps=steps))
    return replace(config, training=replace(config.training, batch=1, minibatches=1))


class Trained:
    """A model with policies, and one trajectory that it has sampled as GRPO does.

    Args:
        size: the architecture.
        device: where it lies.
        dtype: of its weights.
    """

    def __init__(self, size: Size, device: str, dtype: torch.dtype) -> None:
        self.size, self.device = size, device
        given = {"device": device, "dtype": dtype, "compiled": False}
        self.editor: Editor = trainer_full_size.build_editor(size, **given)
        lora = self.editor.lora(rank=size.rank, alpha=2 * size.rank)
        self.policies = LoraPolicies(self.editor.transformer, lora)
        self.counter = ForwardCounter(self.editor.transformer)
        optimizer = torch.optim.AdamW(self.policies.parameters(), 1e-4)
        self._updater = Updater(optimizer, self.policies.parameters, max_grad_norm=1.0)
        calls: list[dict[str, Any]] = []
        with trainer_full_size.shapes_of_calls(self.editor.transformer, calls):
            self.rollout = self.roll_out()
        self.call = calls[0]

    def roll_out(self) -> Rollout:
        """Record one trajectory."""
        sampling = settings("grpo", self.size).objective.sampling(0, steps=self.size.steps)
        parts = self.editor.roll_out(
            **trainer_full_size.chains_of(self.size, 1),
            group=torch.zeros(1, dtype=torch.long),
            batch=1,
            solver=sampling.solver,
            stochastic_steps=sampling.stochastic_steps,
            verify=False,
        )
        return Rollout.concatenate([part.rollout for part in parts])

    def update(self, objective: str) -> None:
        """Take one optimizer step on the trajectory.

        Raises:
            FloatingPointError: it was skipped, since something was not finite.
        """
        config, exists = settings(objective, self.size), self.rollout.trajectory.turn_mask
        advantage = torch.ones(exists.shape)
        given = (self.policies, config.objective, self.rollout, advantage, exists)
        update = Batch(*given, config.training, RoundKey(0, 0)).update(self._updater)
        if update.outcome != "taken":
            raise FloatingPointError(f"{objective}: the update was {update.outcome}")

    def hold(self, way: Way) -> None:
        """Train in that way from here on."""
        model: Any = self.editor.transformer
        if way.checkpointing:
            model.enable_gradient_checkpointing()
        else:
            model.disable_gradient_checkpointing()


def model_rows(
    name: str, size: Size, device: str, dtype: torch.dtype, deadline: Deadline
) -> Iterator[list[Any]]:
    """Yield a row for each way and piece of work; what there is no time for is not reached."""
    rate = trainer_full_size.matrix_rate(device, dtype)
    trained = Trained(size, device, dtype)
    per_row, per_trained_row = trainer_full_size.flops_of(size, trained.call)
    branches = trained.counter.lap()[2] / (size.steps * trainer_full_size.TURNS)
    turns = branches * trainer_full_size.TURNS
    guesses = {  # FLOP of current, old and reference, or of one policy's stochastic steps
        "rollout": size.steps * turns * per_row,
        "nft": turns * (1.5 * per_trained_row + 2 * per_row),
        "grpo": turns * STOCHASTIC_STEPS * 1.5 * per_trained_row,
    }
    work: dict[str, Callable[[], object]] = {
        "rollout": trained.roll_out,
        "nft": lambda: trained.update("nft"),
        "grpo": lambda: trained.update("grpo"),
    }
    for way in WAYS:
        trained.hold(way)
        for what in work:
            if what == "rollout" and way is not WAYS[0]:
                continue  # without gradients nothing is computed again
            title = "rollout, recorded" if what == "rollout" else f"{what.upper()} update"
            head = [name, "any" if what == "rollout" else str(way), title]
            if not deadline.allows(2 * guesses[what] / (SLOWEST * rate)):
                yield [*head, NOT_REACHED, *["-"] * 5]
                continue
            try:
                timed(work[what], device)  # allocates; old differs from current afterwards
                trained.counter.lap()
                seconds, peak = timed(work[what], device)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                yield [*head, OUT_OF_MEMORY, *["-"] * 5]
                continue
            forwards, rows, others = trained.counter.lap()
            flops = rows * per_trained_row + others * per_row
            yield [
                *(*head, seconds, flops / 1e12, percent(flops / seconds / rate)),
                *(of_peak(flops / seconds, device), gibibytes(peak), forwards),
            ]


def family_rows(
    name: str, size: Size, device: str, dtype: torch.dtype, deadline: Deadline, *, rounds: int
) -> Iterator[list[Any]]:
    """Yield seconds of a family's pieces of work, and of a recorded call over the plain one."""
    trained = Trained(size, device, dtype)
    work: dict[str, Callable[[], object]] = {
        "plain calls": lambda: trainer_full_size.edit(trained.editor, size, 1),
        "recorded calls": lambda: trainer_full_size.roll_out(trained.editor, size, 1),
        "NFT update": lambda: trained.update("nft"),
        "GRPO update": lambda: trained.update("grpo"),
    }
    seconds: dict[str, list[float]] = {what: [] for what in work}
    for number in range(rounds + 1):
        for what, do in work.items():
            if not deadline.allows(0):
                break
            taken, _ = timed(do, device)
            if number > 0:  # the first one allocates
                seconds[what].append(taken)
    for what, samples in seconds.items():
        pairs = zip(samples, seconds["plain calls"], strict=False)
        ratios = sorted(ours / plain for ours, plain in pairs)
        ratio = ratios[len(ratios) // 2] if ratios and what.startswith("recorded") else "-"
        median = sorted(samples)[len(samples) // 2] if samples else NOT_REACHED
        yield [name, what, median, ratio, len(samples)]


def timed(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of a call, and on CUDA the allocator's peak in it, bytes; nan elsewhere."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() if cuda else math.nan


def of_peak(rate: float, device: str) -> str:
    """A rate in FLOP/s as a share of what the maker of the device states; "-" if not known."""
    cuda = torch.device(device).type == "cuda"
    called = torch.cuda.get_device_name(device) if cuda else ""
    peak = next((peak for part, peak in PEAKS.items() if part in called), None)
    return "-" if peak is None else percent(rate / (peak * 1e12))


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def gibibytes(size: float) -> str:
    return "-" if math.isnan(size) else f"{size / 2**30:.1f}"
