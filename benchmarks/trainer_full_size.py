"""The real architectures with random weights on one device: rollout and NFT update.

Weights are drawn on the device in the end dtype; prompts are random embeddings, so there is no text
encoder; everything else is the trainer's own: editor, recorder, policies, losses, updater.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
)
from mteditflow_examples.flux.command_line import parse
from peft import LoraConfig
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_nft import PlainLoop
from benchmarks.trainer_batch import Batch, ForwardCounter
from mteditflow.objectives import RoundKey, keyed_generator
from mteditflow.pipelines import FAMILIES, Editor, Instruction, LoraPolicies, Prompts, Rollout
from mteditflow.pipelines.conditioning import map_leaves
from mteditflow.pipelines.editor import COMPILATIONS
from mteditflow.training import Updater


@dataclass(frozen=True)
class Size:
    """An architecture, and what a call of it is given.

    Attributes:
        family: of ``mteditflow.pipelines``.
        transformer: its class and configuration.
        vae: likewise.
        embeddings: shapes of an instruction's embeddings, without the batch.
        resolution: side of the images, pixels.
        rank: of the adapters.
        steps: of a turn.
    """

    family: str
    transformer: tuple[Any, Mapping[str, Any]]
    vae: tuple[Any, Mapping[str, Any]]
    embeddings: tuple[tuple[int, ...], ...]
    resolution: int = 512
    rank: int = 64
    steps: int = 6


_BLOCKS = {f"{way}_block_types": (f"{way.title()}{kind}Block2D",) * 4
           for way, kind in (("down", "Encoder"), ("up", "Decoder"))}  # fmt: skip
SIZES = {
    "kontext": Size(
        "kontext",
        # Layers, heads and widths are the defaults of diffusers' class, which are FLUX.1's.
        (FluxTransformer2DModel, {"guidance_embeds": True}),
        (
            AutoencoderKL,
            {
                **_BLOCKS,
                "block_out_channels": (128, 256, 512, 512),
                "layers_per_block": 2,
                "latent_channels": 16,
                "sample_size": 1024,
                "scaling_factor": 0.3611,
                "shift_factor": 0.1159,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
            },
        ),
        ((512, 4096), (768,)),
    ),
    "klein": Size(
        "klein",
        (
            Flux2Transformer2DModel,
            {
                "num_layers": 8,
                "num_single_layers": 24,
                "num_attention_heads": 32,
                "joint_attention_dim": 12288,
                "guidance_embeds": False,
            },
        ),
        (AutoencoderKLFlux2, {}),
        ((512, 12288),),
    ),
}
TURNS = 3
COLUMNS = ("what", "seconds", "TFLOP", "share of the matrix rate", "peak, GiB", "forwards")


def full_size_rows(
    size: Size,
    *,
    device: str,
    dtype: torch.dtype,
    batch: int,
    micro_batch: int,
    compiled: bool,
    checkpointing: bool,
    rounds: int,
) -> tuple[list[list[Any]], float]:
    """Rows of the table for one way of running, and the device's matrix rate in FLOP/s.

    Every row is the median of ``rounds`` timings after one that is not counted; the rows take
    turns, so that a clock that falls meets all of them.
    """
    editor = build_editor(size, device=device, dtype=dtype, compiled=compiled)
    if checkpointing:
        editor.transformer.enable_gradient_checkpointing()
    policies = LoraPolicies(editor.transformer, editor.lora(rank=size.rank, alpha=2 * size.rank))
    counter, calls = ForwardCounter(editor.transformer), []
    with shapes_of_calls(editor.transformer, calls):
        rollout = roll_out(editor, size, 1)
    per_row, per_trained_row = flops_of(size, calls[0])
    rollout = roll_out(editor, size, batch)
    ours = batch_of(rollout, policies, micro_batch)
    optimizer = torch.optim.AdamW(policies.parameters(), 1e-4)
    updater = Updater(optimizer, policies.parameters, max_grad_norm=1.0)
    plain = PlainLoop(rollout, policies, optimizer, device, micro_batch)

    def update() -> None:
        ours.update(updater)

    work: dict[str, Callable[[], object]] = {
        "rollout, recorded": lambda: roll_out(editor, size, batch),
        "rollout, plain calls": lambda: edit(editor, size, batch),
        "update, old = current": lambda: (policies.update_old(decay=0.0), update()),
        "update, old differs": update,  # since the one before moved the current policy
        "update, plain loop": plain.update,
    }
    found = measure(work, counter, device, rounds)
    rate = matrix_rate(device, dtype)
    table = []
    for name, (seconds, peak, (forwards, trained, others)) in found.items():
        flops = trained * per_trained_row + others * per_row
        share = f"{100 * flops / seconds / rate:.1f}%"
        memory = "-" if math.isnan(peak) else f"{peak / 2**30:.1f}"
        table.append([name, seconds, flops / 1e12, share, memory, forwards])
    return table, rate


def build_editor(size: Size, *, device: str, dtype: torch.dtype, compiled: bool) -> Editor:
    """The pipeline with random weights and without text encoders, frozen."""
    family = next(family for family in FAMILIES if family.name == size.family)
    transformer, vae = (made(*size_of, device, dtype) for size_of in (size.transformer, size.vae))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = {"scheduler": scheduler, "vae": vae, "transformer": transformer}
    pipeline = family.pipeline(**parts, **dict.fromkeys(family.text_parts))
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        torch._dynamo.config.recompile_limit = COMPILATIONS
        transformer.compile_repeated_blocks(fullgraph=True)

    def encode(asked: Instruction) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(len(asked.text))
        return [torch.randn(1, *s, generator=generator).to(dtype) for s in size.embeddings]

    side = {"height": size.resolution, "width": size.resolution}
    call = {**side, "num_inference_steps": size.steps}
    return Editor(pipeline, family, call, Prompts(encode, [], device, capacity=8))


def made(kind: Any, config: Mapping[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A model of this configuration, its random weights drawn on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def chains_of(size: Size, batch: int) -> dict[str, Any]:
    """References, instructions and noise of some trajectories."""
    side = (size.resolution, size.resolution)
    image = Image.linear_gradient("L").resize(side).convert("RGB")
    return {
        "references": [image] * batch,
        "instructions": [["edit" * (turn + 1) for turn in range(TURNS)]] * batch,
        "generators": [keyed_generator(0, "noise", b) for b in range(batch)],
    }


def roll_out(editor: Editor, size: Size, batch: int) -> Rollout:
    """Record as the trainer does."""
    group = torch.arange(batch)
    given = chains_of(size, batch)
    parts = editor.roll_out(**given, group=group, batch=batch, verify=False)
    return Rollout.concatenate([part.rollout for part in parts])


def edit(editor: Editor, size: Size, batch: int) -> object:
    """The same calls of the pipeline, unrecorded."""
    return editor.edit(**chains_of(size, batch), batch=batch)


def batch_of(rollout: Rollout, policies: LoraPolicies, micro_batch: int) -> Batch:
    """The rollout as a round of ``kontext-nft`` with a KL of every row, and made-up advantages."""
    options = ["--rewards.scorer", "none:none", "--training.batch", str(micro_batch)]
    options += ["--objective.kl-share", "1"]
    config = parse(["kontext-nft", *options])
    exists = rollout.trajectory.turn_mask
    advantage = torch.linspace(-1, 1, len(rollout))[:, None].expand(exists.shape)
    given = (policies, config.objective, rollout, advantage, exists)
    return Batch(*given, config.training, RoundKey(seed=0, round=0))


@contextmanager
def shapes_of_calls(model: Any, calls: list[dict[str, Any]]) -> Iterator[None]:
    """Keep the arguments of a model's calls, as tensors without data."""

    def heard(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        calls.append(map_leaves(lambda x: x.to("meta") if torch.is_tensor(x) else x, kwargs))

    hook = model.register_forward_pre_hook(heard, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def flops_of(size: Size, call: dict[str, Any]) -> tuple[int, int]:
    """FLOP of one row: of a forward pass, and of a forward and a backward pass.

    Counted by torch on a model without data: matrix products and attention, adapters included, and
    nothing that is computed a second time.
    """
    model = made(*size.transformer, "meta", torch.float32)
    family = next(family for family in FAMILIES if family.name == size.family)
    with torch.device("meta"):
        model.add_adapter(LoraConfig(r=size.rank, target_modules=family.layers(model, None)))
    given = map_leaves(
        lambda x: x.float() if torch.is_tensor(x) and x.is_floating_point() else x, call
    )
    rows = len(given["hidden_states"])
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(**given)
    with FlopCounterMode(display=False) as both:
        model(**given)[0].sum().backward()
    return forward.get_total_flops() // rows, both.get_total_flops() // rows


def measure(
    work: Mapping[str, Callable[[], object]], counter: ForwardCounter, device: str, rounds: int
) -> dict[str, tuple[float, float, tuple[int, int, int]]]:
    """Seconds, peak bytes on CUDA (nan elsewhere), and forwards of each piece of work."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    peaks, counts = dict.fromkeys(work, math.nan), {}
    cuda = torch.device(device).type == "cuda"
    for number in range(rounds + 1):
        for name, do in work.items():
            counter.lap()
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            do()
            if cuda:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated()
            if number > 0:  # the first one compiles and allocates
                seconds[name].append(time.perf_counter() - start)
            counts[name] = counter.lap()
    return {name: (median(seconds[name]), peaks[name], counts[name]) for name in work}


def matrix_rate(device: str, dtype: torch.dtype, side: int = 8192) -> float:
    """FLOP/s that one large product of matrices reaches: the best of several."""
    side = side if torch.device(device).type == "cuda" else side // 8
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        c = a @ b
        c.flatten()[0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
