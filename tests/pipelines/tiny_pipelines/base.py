"""What every world of tiny pipelines shares: the description of one, its parts, its inputs.

A world is a module of tiny pipelines of the real diffusers classes. It exposes ``FAMILIES`` and,
where options are refused, ``REFUSED``; keys begin with the class's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

Options = dict[str, Any]
Inputs = Callable[[int, int], Options]

PROMPTS = [
    ["Remove the square", "Remove the circle", "Add a blue circle"],
    ["Change the color of circle to red", "Add a red star", "Remove the star"],
]
NEGATIVE = ["Add a red star", "Remove the triangle", "Change the background to white"]
CFG = "classifier-free"
ATTENTION = ("to_q", "to_k", "to_v")
KANDINSKY = ("to_query", "to_key", "to_value")


@dataclass(frozen=True)
class Family:
    """One pipeline of the table.

    Attributes:
        build: makes the tiny pipeline, from the global random state.
        inputs: (turn, batch) to what the call of that turn is given for ``batch`` trajectories;
            turn is 0 or 1. The harness adds ``generator``, ``output_type`` and ``steps``.
        options: of every call.
        guided: kinds of guidance, and the options that ask for them; "none" has the rest.
        text: whether prompts go through real encoders (which), or calls are given embeddings.
        batches: numbers of trajectories per call that are recorded.
        steps: ``num_inference_steps`` of a call; a strength below 1 leaves some of them out.
        model: name of the pipeline's part that is recorded and trained.
        lora: ends of the names of the layers that get LoRA adapters.
        recorder: options of the Recorder, such as ``{"shared": ("name",)}``.
        output: ``output_type`` of the calls whose outputs are compared.
        latent: ``output_type`` of the other calls, whose outputs are not looked at.
    """

    build: Callable[[], DiffusionPipeline]
    inputs: Inputs
    options: Options
    guided: dict[str, Options] = field(default_factory=lambda: {"none": {}})
    text: str = "embeddings"
    batches: tuple[int, ...] = (1, 3)
    steps: int = 2
    model: str = "transformer"
    lora: tuple[str, ...] = ATTENTION
    recorder: Options = field(default_factory=dict)
    output: str = "pt"
    latent: str = "latent"


@dataclass(frozen=True)
class Refused:
    """A pipeline or an option that the recorder refuses, and what its error must contain.

    Attributes:
        build: makes the tiny pipeline, from the global random state.
        options: of the call, inputs included; the harness adds ``num_inference_steps``.
        reason: a part of the error.
        steps: ``num_inference_steps`` of the call.
        model: name of the pipeline's part that is recorded.
    """

    build: Callable[[], DiffusionPipeline]
    options: Options
    reason: str
    steps: int = 4
    model: str = "transformer"


# Inputs.


def normal(*shape: int, seed: int) -> torch.Tensor:
    """A seeded normal tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(size: int = 64, width: int | None = None, seed: int = 0) -> Image.Image:
    """An image of random blocks, ``size`` pixels high."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width or size, size), Image.Resampling.NEAREST)


def half_mask(size: int = 64, width: int | None = None) -> Image.Image:
    """A mask that is white on its right half, which is to be painted anew."""
    pixels = np.zeros((size, width or size), dtype=np.uint8)
    pixels[:, pixels.shape[1] // 2 :] = 255
    return Image.fromarray(pixels)


def prompts(turn: int, batch: int) -> Options:
    """A prompt per trajectory."""
    return {"prompt": PROMPTS[turn][:batch]}


def with_negative(turn: int, batch: int) -> Options:
    """A prompt and a negative prompt per trajectory."""
    return prompts(turn, batch) | {"negative_prompt": NEGATIVE[:batch]}


def embeddings(*, tokens: int = 5, **widths: int) -> Inputs:
    """Embeddings by name: one row per trajectory if "pooled", else rows of tokens."""

    def given(turn: int, batch: int) -> Options:
        lengths = {name: () if "pooled" in name else (tokens,) for name in widths}
        return {
            name: normal(batch, *lengths[name], width, seed=turn + 10 * k)
            for k, (name, width) in enumerate(widths.items())
        }

    return given


def encoded(prompts: str | list[str], tokens: int, width: int) -> torch.Tensor:
    """Embeddings of prompts [B, tokens, width], in the place of those of a big encoder."""
    rows = [prompts] if isinstance(prompts, str) else prompts
    return torch.cat([normal(1, tokens, width, seed=crc32(row.encode())) for row in rows])


def plus(inputs: Inputs, **fixed: Any) -> Inputs:
    """Inputs with more that is the same at every turn, such as an image."""
    return lambda turn, batch: inputs(turn, batch) | fixed


def listed(inputs: Inputs, **fixed: Any) -> Inputs:
    """Inputs with lists of the same thing for each trajectory, where one alone is not repeated."""
    return lambda turn, batch: inputs(turn, batch) | {k: [x] * batch for k, x in fixed.items()}


# Parts.


def make(kind: str, **parts: Any) -> DiffusionPipeline:
    """The pipeline of these parts and none else, quiet, in eval mode and without zero weights."""
    pipeline_class = getattr(diffusers, kind)
    names = pipeline_class._get_signature_keys(pipeline_class)[0]
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)} | parts
    pipeline = pipeline_class(**dict.fromkeys(names) | parts)
    pipeline.set_progress_bar_config(disable=True)
    for seed, part in enumerate(pipeline.components.values()):
        if isinstance(part, torch.nn.Module):
            redraw(part.eval().requires_grad_(False), seed)
    return pipeline


class Processor:
    """Holder for a VLM's processor, which is given where it is not used: it needs torchvision."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__ |= parts


def redraw(module: torch.nn.Module, seed: int, std: float = 0.1) -> None:
    """Draw every parameter that is zero or was never initialized; zero outputs hide faults."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        size = parameter.detach().abs().max() if parameter.numel() else torch.tensor(1.0)
        if not bool((size > 1e-12) & (size < 1e6)):
            drawn = std * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(drawn)


def scheduler(shift: float = 1.0, **more: Any) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a published configuration."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, **more)


def dynamic(shift: float = 3.0, **more: Any) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler that FLUX.1 dev ships: its shift grows with the number of tokens."""
    shipped = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    return FlowMatchEulerDiscreteScheduler(
        shift=shift, **shipped | {"base_image_seq_len": 256, "max_image_seq_len": 4096} | more
    )


def image_vae(channels: int = 4, factor: int = 1, **more: Any) -> torch.nn.Module:
    """AutoencoderKL of a factor that is a power of two."""
    levels = factor.bit_length()
    given = {
        "latent_channels": channels,
        "block_out_channels": (4,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 1,
        "norm_num_groups": 1,
        "shift_factor": 0.1,
        "scaling_factor": 0.36,
    }
    return diffusers.AutoencoderKL(**given | more)
