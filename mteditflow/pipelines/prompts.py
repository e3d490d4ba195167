"""Embeddings of instructions: computed once each, by encoders that visit the device."""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Generic, TypeVar, cast

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn

from mteditflow._checks import check_count
from mteditflow.pipelines.families import Family
from mteditflow.pipelines.signatures import returned_names, text_parameters

Embedding = Tensor | Sequence[Tensor] | None
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Instruction:
    """An instruction as text encoders read it; equal ones have equal embeddings.

    Attributes:
        text: the words.
        negative: whether it is a negative prompt.
        image: picture that is read with it, compared by ``content``; None where there is none.
        content: digest of the picture.
    """

    text: str
    negative: bool = False
    image: Image | None = field(default=None, compare=False, repr=False)
    content: str = ""

    @classmethod
    def about(cls, text: str, image: Image, *, negative: bool = False) -> Instruction:
        """Return an instruction that is read with a picture."""
        digest = blake2b(image.tobytes(), digest_size=16).hexdigest()
        return cls(text, negative, image, f"{image.mode} {image.size} {digest}")


class Prompts(Generic[_Key]):
    """Looks up the embeddings of instructions, and computes those that are new.

    Each instruction is embedded alone: in another batch its embedding could differ in the last
    bits, and then a trajectory would depend on its neighbours. All new ones of a call share one
    stay of the encoders on the device.

    Args:
        encode: the embeddings of one instruction: of each kind a tensor of one row, a list of one
            tensor, or None. An editor asks for an ``Instruction``.
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
        encode: Callable[[_Key], Sequence[Embedding]],
        encoders: Iterable[nn.Module],
        device: torch.device | str,
        *,
        capacity: int,
    ) -> None:
        check_count("capacity", capacity)
        self._encode, self._encoders, self._device = encode, list(encoders), torch.device(device)
        self._capacity = capacity
        self._kept: OrderedDict[_Key, list[Embedding]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, instructions: Iterable[_Key]) -> dict[_Key, list[Embedding]]:
        """Embeddings of each instruction, on the host, however many there are."""
        wanted = list(dict.fromkeys(instructions))
        found = {text: self._kept[text] for text in wanted if text in self._kept}
        new = [text for text in wanted if text not in found]
        if new:
            with working_on(self._encoders, self._device):
                for text in new:
                    found[text] = [_moved(x, "cpu") for x in self._encode(text)]
        for text in wanted:
            self._kept[text] = found[text]
            self._kept.move_to_end(text)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return found


def _moved(embedding: Embedding, device: torch.device | str) -> Embedding:
    if embedding is None or isinstance(embedding, Tensor):
        return None if embedding is None else embedding.to(device)
    return [x.to(device) for x in embedding]


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


def load_prompts(
    source: str | os.PathLike[str],
    family: Family,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    options: Mapping[str, Any],
    capacity: int,
) -> Prompts[Instruction]:
    """The text parts alone, on the host, with a cache of ``capacity`` embeddings.

    They encode as a call of the full pipeline with these call options does.
    """
    texts = family.pipeline.from_pretrained(source, dtype=dtype, transformer=None, vae=None)
    encoders = modules_of(texts)
    for module in encoders:
        module.eval().requires_grad_(False)
    given: dict[str, Any] = {**family.text_options(options), "device": torch.device(device)}
    parameters = text_parameters(family.pipeline)
    for name, parameter in parameters.items():  # such as prompt_2, which a call leaves None
        if parameter.default is inspect.Parameter.empty and name not in ("self", "prompt"):
            given.setdefault(name, None)
    pairs = "negative_prompt" in parameters  # it embeds prompt and negative prompt together
    returned = returned_names(family.pipeline.encode_prompt)

    def encode(asked: Instruction) -> Sequence[Embedding]:
        mine: dict[str, Any] = {"prompt": asked.text}
        if pairs:
            mine |= {"negative_prompt": asked.text, "do_classifier_free_guidance": asked.negative}
        if asked.image is not None:
            mine |= {"image": [asked.image]}
        embeddings = texts.encode_prompt(**given | mine)
        if len(returned) == 1:
            embeddings = (embeddings,)
        named = dict(zip(returned, embeddings, strict=True))
        prefix = "negative_" if pairs and asked.negative else ""
        return [_or_ones(prefix + name, named) for name in family.embeddings]

    return Prompts(encode, encoders, device, capacity=capacity)


def _or_ones(name: str, embeddings: Mapping[str, Any]) -> Embedding:
    """An embedding by name; a mask that is None, since no token is padding, as one of ones."""
    found = embeddings[name]
    if found is not None or not name.endswith("_mask"):
        return cast(Embedding, found)
    tokens = embeddings[name.removesuffix("_mask")]
    return torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)


def modules_of(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The modules of a pipeline."""
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
