"""One architecture with random weights on one device: rollout, NFT and GRPO updates, in some time.

Everything but the weights is the trainer's own: editor, recorder, policies, losses, updater.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from mteditflow_examples.budget import plan_of
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import Config
from mteditflow_examples.shapes.editor import build_klein, build_kontext

from benchmarks import trainer_full_size
from benchmarks.trainer_batch import Batch, ForwardCounter
from benchmarks.trainer_full_size import SIZES, Size
from mteditflow.budget import GPUS, phases
from mteditflow.objectives import ReplayObjective, RoundKey
from mteditflow.pipelines import Editor, LoraPolicies, Rollout, shared_casts
from mteditflow.pipelines.quantization import QUANTIZATIONS, quantize
from mteditflow.training import Updater

NOT_REACHED, OUT_OF_MEMORY, NOT_INSTALLED = "not reached", "out of memory", "not installed"
# Of kernels, packages and updates; torch's and its compiler's errors are RuntimeErrors.
FAILURES = (AssertionError, FloatingPointError, ImportError, RuntimeError)
SLOWEST = 0.1  # share of the matrix rate with which the time of work is guessed before it begins
STOCHASTIC_STEPS = 2  # of GRPO: fewer than the preset's 5, so that an update takes less time
PRESETS = {"kontext": "kontext-nft", "klein": "klein-nft"}  # whose memory is predicted
# Checkpointing and work; the rollout after an update, so that the optimizer has its state.
PIECES = (
    *(("on", "NFT update"), ("on", "GRPO update"), ("-", "rollout, recorded")),
    *(("off", "NFT update"), ("off", "GRPO update")),
)
COLUMNS = ("model", "weights", "checkpointing", "what", "seconds", "TFLOP", "of the matrix rate",
           "of the stated peak", "peak, GiB", "predicted, GiB", "forwards")  # fmt: skip


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
        kind: how the linear layers of its blocks are quantized, or "none".
    """

    def __init__(self, size: Size, device: str, dtype: torch.dtype, kind: str = "none") -> None:
        self.size, self.device = size, device
        given = {"device": device, "dtype": dtype, "compiled": False}
        self.editor: Editor = trainer_full_size.build_editor(size, **given)
        if kind != "none":
            quantize(self.editor.transformer, kind, torch.device(device))
        lora = self.editor.lora(rank=size.rank, alpha=2 * size.rank)
        self.policies = LoraPolicies(self.editor.transformer, lora, ema=True)
        self.counter = ForwardCounter(self.editor.transformer)
        optimizer = torch.optim.AdamW(self.policies.parameters(), 1e-4)
        self._updater = Updater(optimizer, self.policies.parameters, max_grad_norm=1.0)
        calls: list[dict[str, Any]] = []
        with trainer_full_size.shapes_of_calls(self.editor.transformer, calls):
            self.rollout = self.roll_out()
        self.call = calls[0]
        sampled = trainer_full_size.TURNS * size.steps
        self.branches = self.counter.lap()[2] // sampled

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
        with shared_casts(self.editor.transformer):  # as the trainer does, and the budget assumes
            update = Batch(*given, config.training, RoundKey(0, 0)).update(self._updater)
        # A second update of one trajectory may be flat, all its ratios clipped: equal work.
        if update.outcome not in ("taken", "flat"):
            raise FloatingPointError(f"{objective}: the update was {update.outcome}")

    def rows(self, what: str) -> tuple[int, int]:
        """Rows of a piece of work: with a graph, and without one."""
        each = self.branches * trainer_full_size.TURNS
        if what.startswith("rollout"):
            return 0, each * self.size.steps
        return (each, 2 * each) if what.startswith("NFT") else (each * STOCHASTIC_STEPS, 0)

    def checkpoint(self, on: bool) -> None:
        """Compute activations again in the backward pass from here on, or keep them."""
        model: Any = self.editor.transformer
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()


def model_rows(
    name: str, size: Size, device: str, dtype: torch.dtype, deadline: Deadline
) -> Iterator[list[Any]]:
    """Yield a row for each way of holding weights and activations and each piece of work.

    What there is no time, memory or package for says so.
    """
    rate = trainer_full_size.matrix_rate(device, dtype)
    flops: tuple[int, int] | None = None
    building = 0.0
    for kind in ("none", "nf4", "int8"):
        label = str(dtype).removeprefix("torch.") if kind == "none" else kind
        missing = None if deadline.allows(building) else NOT_REACHED
        if kind != "none" and find_spec(QUANTIZATIONS[kind]) is None:
            missing = NOT_INSTALLED
        if missing is not None:
            yield from ([name, label, *piece, *without(missing)] for piece in PIECES)
            continue
        start = time.monotonic()
        try:
            trained = Trained(size, device, dtype, kind)
        except FAILURES as error:
            reason = failed(error)
            yield from ([name, label, *piece, *without(reason)] for piece in PIECES)
            continue
        building = time.monotonic() - start
        if flops is None:
            flops = trainer_full_size.flops_of(size, trained.call)
        for checkpointing, what in PIECES:
            trained.checkpoint(checkpointing == "on")
            cells = measured(trained, what, flops, rate, deadline)
            if size == SIZES[name] and dtype is torch.bfloat16:
                cells[-2] = f"{predicted(name, kind, checkpointing, what) / 2**30:.1f}"
            yield [name, label, checkpointing, what, *cells]
        del trained
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()


def measured(
    trained: Trained, what: str, flops: tuple[int, int], rate: float, deadline: Deadline
) -> list[Any]:
    """Measure a piece of work; the cells of its row, from seconds on, without the prediction."""
    per_row, per_trained_row = flops
    rows, others = trained.rows(what)
    guess = (1.5 * rows * per_trained_row + others * per_row) / (SLOWEST * rate)
    if not deadline.allows(2 * guess):
        return without(NOT_REACHED)
    work: dict[str, Callable[[], object]] = {
        "rollout, recorded": trained.roll_out,
        "NFT update": lambda: trained.update("nft"),
        "GRPO update": lambda: trained.update("grpo"),
    }
    try:
        timed(work[what], trained.device)  # allocates; old differs from current afterwards
        trained.counter.lap()
        seconds, peak = timed(work[what], trained.device)
    except FAILURES as error:
        return without(failed(error))
    forwards, rows, others = trained.counter.lap()
    total = rows * per_trained_row + others * per_row
    shares = percent(total / seconds / rate), of_peak(total / seconds, trained.device)
    return [seconds, total / 1e12, *shares, gibibytes(peak), "-", forwards]


def failed(error: Exception) -> str:
    """Print why something failed; return the word for its row, so that the others go on."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return f"failed: {type(error).__name__}"


def without(reason: str) -> list[Any]:
    """Return the cells of a row that was not measured."""
    return [reason, *["-"] * (len(COLUMNS) - 5)]


def predicted(name: str, kind: str, checkpointing: str, what: str) -> float:
    """Bytes that the budget predicts for the peak of this work, the CUDA context not among them."""
    size = SIZES[name]
    words = [PRESETS[name], "--rewards.scorer", "none:none", "--model.quantize", kind]
    words += ["--model.lora-rank", str(size.rank), "--model.resolution", str(size.resolution)]
    words += ["--training.batch", "1", "--sampling.batch", "1"]
    words += ["--model.no-checkpointing"] if checkpointing == "off" else []
    phase = "sampling" if what.startswith("rollout") else "update"
    plan = plan_of(parse(words), gpus=1)
    return max(found.total for found in phases(plan) if found.name.startswith(phase))


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
    peak = next(
        (peak for names, peak in GPUS.items() if any(n in called for n in names.split("/"))), None
    )
    return "-" if peak is None else percent(rate / (peak * 1e12))


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def gibibytes(size: float) -> str:
    return "-" if math.isnan(size) else f"{size / 2**30:.1f}"
