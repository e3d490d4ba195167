"""Chains of edits as calls of a pipeline: which rows share a call, and what it is given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL.Image import Image
from torch import Tensor, nn

from mteditflow._checks import check_count
from mteditflow.pipelines.families import Family


class Prompts:
    """Looks up the embeddings of instructions, and computes those that are new.

    Each instruction is embedded alone: in another batch its embedding could differ in the last
    bits, and then a trajectory would depend on its neighbours. All new ones of a call share one
    stay of the encoders on the device.

    Args:
        encode: the embeddings of one instruction, tensors with one row each.
        encoders: the modules that ``encode`` uses, on the host.
        device: where they work.
        capacity: embeddings of how many instructions are kept on the host, the last used.

    Raises:
        ValueError: the capacity is below 1.

    Example:
        >>> prompts = Prompts(lambda p: [torch.full((1, 2), float(len(p)))], [], "cpu", capacity=8)
        >>> prompts(["Remove it", "Add", "Add"])["Add"]
        [tensor([[3., 3.]])]
    """

    def __init__(
        self,
        encode: Callable[[str], Sequence[Tensor]],
        encoders: Iterable[nn.Module],
        device: torch.device | str,
        *,
        capacity: int,
    ) -> None:
        check_count("capacity", capacity)
        self._encode, self._encoders, self._device = encode, list(encoders), torch.device(device)
        self._capacity = capacity
        self._kept: OrderedDict[str, list[Tensor]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, instructions: Iterable[str]) -> dict[str, list[Tensor]]:
        """Embeddings of each instruction, on the host, however many there are."""
        wanted = list(dict.fromkeys(instructions))
        found = {text: self._kept[text] for text in wanted if text in self._kept}
        new = [text for text in wanted if text not in found]
        if new:
            with working_on(self._encoders, self._device):
                for text in new:
                    found[text] = [x.cpu() for x in self._encode(text)]
        for text in wanted:
            self._kept[text] = found[text]
            self._kept.move_to_end(text)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return found


@contextmanager
def working_on(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Let modules be on a device inside the context.

    Afterwards their weights are the very tensors that they were before: frozen weights need no copy
    back, and the device's memory is free.
    """
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    home = [x.data for x in tensors]
    try:
        for x in tensors:
            x.data = x.data.to(device, non_blocking=True)
        yield
    finally:
        for x, data in zip(tensors, home, strict=True):
            x.data = data


class ChainCalls:
    """B chains of edits, ready to be sampled row by row or several rows at a time.

    Instructions are embedded, and for Kontext references encoded, once each at construction.

    Args:
        pipeline: without text encoders.
        family: its family.
        options: of every call, as ``Family.call_options`` returns them.
        prompts: embeds instructions.
        references: RGB images, [B].
        instructions: [B][N]; chains may differ in length.
        generators: [B].

    Raises:
        ValueError: lengths differ, or a chain is empty.
        TypeError: a reference is no RGB image.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        family: Family,
        options: Mapping[str, Any],
        prompts: Prompts,
        references: Sequence[Image],
        instructions: Sequence[Sequence[str]],
        generators: Sequence[torch.Generator],
    ) -> None:
        _check_chains(references, instructions, generators)
        self._pipeline, self._family = pipeline, family
        self._options = {k: v for k, v in options.items() if k != "negative_prompt"}
        self._instructions, self._generators = list(instructions), list(generators)
        negative = family.negative_prompt(pipeline, options)
        wanted = [text for chain in instructions for text in chain]
        self._embedded = prompts([*wanted, *([] if negative is None else [negative])])
        self._negative = None if negative is None else self._embedded[negative]
        self._images: list[Any] = list(references)
        if family.takes_batch:
            self._images = _encoded_once(pipeline, references, options)
        self._kinds = [
            (image.size, len(chain)) for image, chain in zip(references, instructions, strict=True)
        ]

    def parts(self, batch: int) -> Iterator[slice]:
        """Slices of at most ``batch`` rows in order, each of one image size and chain length."""
        check_count("batch", batch)
        start = 0
        for stop in range(1, len(self._kinds) + 1):
            full = stop - start == batch or stop == len(self._kinds)
            if full or self._kinds[stop] != self._kinds[start]:
                yield slice(start, stop)
                start = stop

    def calls(self, rows: slice) -> list[slice]:
        """The slices of a part that one pipeline call per turn serves."""
        if self._family.takes_batch:
            return [rows]
        return [slice(row, row + 1) for row in range(rows.start, rows.stop)]

    def sample(self, rows: slice) -> list[list[Image]]:
        """Edit the chains of one slice of ``calls``: images after each turn, [b][N]."""
        images: Any = self._images[rows]
        if self._family.takes_batch:
            images = torch.cat(images)
        turns = []
        with _evaluating(self._pipeline.transformer):
            for texts in zip(*self._instructions[rows], strict=True):
                images = self._pipeline(
                    image=images,
                    generator=self._generators[rows],
                    **self._embeddings(texts),
                    **self._options,
                ).images
                turns.append(images)
        return [list(chain) for chain in zip(*turns, strict=True)]

    def _embeddings(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of one instruction per row, and of the negative prompt, as a call has them."""
        found = {"": [self._embedded[text] for text in texts]}
        if self._negative is not None:
            found["negative_"] = [self._negative] * len(texts)
        return {
            prefix + name: torch.cat(rows).to(self._pipeline.device)
            for prefix, texts_ in found.items()
            for name, rows in zip(self._family.embeddings, zip(*texts_, strict=True), strict=True)
        }


def kontext_latents(
    pipeline: DiffusionPipeline, image: Image, options: Mapping[str, Any]
) -> Tensor:
    """Latents [1, C, h, w] of a reference, exactly as a call of Kontext's pipeline makes them."""
    processor, multiple = pipeline.image_processor, 2 * pipeline.vae_scale_factor
    height, width = processor.get_default_height_width(image)
    if options["_auto_resize"]:
        ratio = width / height
        _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    height, width = (side // multiple * multiple for side in (height, width))
    pixels = processor.preprocess(processor.resize(image, height, width), height, width)
    vae = pipeline.vae
    mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return cast(Tensor, (mode - vae.config.shift_factor) * vae.config.scaling_factor)


@torch.no_grad()
def _encoded_once(
    pipeline: DiffusionPipeline, references: Sequence[Image], options: Mapping[str, Any]
) -> list[Tensor]:
    """Latents of each reference; equal images share theirs."""
    keys = [(image.size, image.tobytes()) for image in references]
    distinct = dict(zip(keys, references, strict=True))
    latents = {key: kontext_latents(pipeline, image, options) for key, image in distinct.items()}
    return [latents[key] for key in keys]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_chains(
    references: Sequence[Image],
    instructions: Sequence[Sequence[str]],
    generators: Sequence[torch.Generator],
) -> None:
    for name, given in (("instructions", instructions), ("generators", generators)):
        if len(given) != len(references):
            raise ValueError(
                f"{name}: expected one entry per reference, {len(references)}, got {len(given)}"
            )
    for row, (image, chain) in enumerate(zip(references, instructions, strict=True)):
        if not isinstance(image, Image) or image.mode != "RGB":
            got = getattr(image, "mode", type(image).__name__)
            raise TypeError(f"references: expected RGB images of PIL, got {got} in row {row}")
        if not chain or isinstance(chain, str):
            raise ValueError(
                f"instructions: expected a list of at least one instruction per row, got {chain!r} "
                f"in row {row}"
            )
