"""Embeddings of instructions, computed once each by encoders that are moved to the device."""

from __future__ import annotations

import inspect
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn

from mteditflow._checks import check_count
from mteditflow._hashes import content_hash
from mteditflow.pipelines.embedding_store import Embedding, EmbeddingStore
from mteditflow.pipelines.families import Family
from mteditflow.pipelines.quantization import is_quantized, quantize
from mteditflow.pipelines.signatures import returned_names, text_parameters

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Instruction:
    """Instruction with all inputs of the text encoders; equal ones have equal embeddings.

    Attributes:
        text: text of the instruction.
        negative: whether it is a negative prompt.
        images: images that the encoder reads with it, in order; compared by ``content``.
        content: digests of the images.
    """

    text: str
    negative: bool = False
    images: tuple[Image, ...] = field(default=(), compare=False, repr=False)
    content: str = ""

    @classmethod
    def about(cls, text: str, *images: Image, negative: bool = False) -> Instruction:
        """Return an instruction that the encoder reads together with images."""
        return cls(text, negative, images, ", ".join(map(_digest, images)))


def _digest(image: Image) -> str:
    digest = blake2b(image.tobytes(), digest_size=16).hexdigest()
    return f"{image.mode} {image.size} {digest}"


class Prompts(Generic[_Key]):
    """Cache of the embeddings of instructions, which computes missing ones.

    Each instruction is embedded alone: in another batch its embedding could differ in the last
    bits, and a trajectory would depend on the others of its batch. The encoders are moved to the
    device once for all new instructions of a call.

    Args:
        encode: returns the embeddings of one instruction, each a tensor of one row, a list of one
            tensor, or None. An editor passes an ``Instruction``.
        encoders: modules that ``encode`` calls, on the host.
        device: device on which they run.
        capacity: number of instructions whose embeddings stay on the host, the most recently used.
        store: store of embeddings on disk; None: evicted embeddings are computed again.

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
        store: EmbeddingStore | None = None,
    ) -> None:
        check_count("capacity", capacity)
        self._encode, self._encoders, self._device = encode, list(encoders), torch.device(device)
        self._capacity, self._store = capacity, store
        self._kept: OrderedDict[_Key, list[Embedding]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, instructions: Iterable[_Key]) -> dict[_Key, list[Embedding]]:
        """Return the embeddings of each instruction, on the host, even beyond the capacity.

        Raises:
            OSError: the store cannot be read or written.
        """
        wanted = list(dict.fromkeys(instructions))
        found = {text: self._kept[text] for text in wanted if text in self._kept}
        for text in [text for text in wanted if text not in found]:
            stored = None if self._store is None else self._store.read(text)
            if stored is not None:
                found[text] = stored
        found |= dict(self._each_encoded([text for text in wanted if text not in found]))
        for text in wanted:
            self._kept[text] = found[text]
            self._kept.move_to_end(text)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return found

    @torch.no_grad()
    def prepare(self, instructions: Iterable[_Key]) -> int:
        """Store the embeddings of instructions that are not stored yet, and return their number.

        The encoders are moved to the device once, and no embedding is kept on the host. Of an
        existing file only the header is read: a file with damaged values is detected when its
        embeddings are looked up, and computed again then.

        Raises:
            ValueError: there is no store.
            OSError: it cannot be read or written.
        """
        store = self._store
        if store is None:
            raise ValueError("prompts: expected a store for the embeddings, got none")
        new = [text for text in dict.fromkeys(instructions) if not store.has(text)]
        for _ in self._each_encoded(new):
            pass
        return len(new)

    def _each_encoded(self, new: Sequence[_Key]) -> Iterator[tuple[_Key, list[Embedding]]]:
        """Encode and store instructions one by one, while the encoders are on the device."""
        if not new:
            return
        with working_on(self._encoders, self._device):
            for text in new:
                embeddings = [_moved(x, "cpu") for x in self._encode(text)]
                if self._store is not None:
                    self._store.write(text, embeddings)
                yield text, embeddings


def _moved(embedding: Embedding, device: torch.device | str) -> Embedding:
    if embedding is None or isinstance(embedding, Tensor):
        return None if embedding is None else embedding.to(device)
    return [x.to(device) for x in embedding]


@contextmanager
def working_on(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Move modules to a device inside the context.

    On exit their weights are the same host tensors as before: frozen weights need no copy back, and
    the device's memory is freed. Quantized modules, whose scales are not in ``parameters()``, are
    moved there and back.
    """
    quantized = [module for module in modules if is_quantized(module)]
    plain = [module for module in modules if not is_quantized(module)]
    tensors = [x for module in plain for x in (*module.parameters(), *module.buffers())]
    home = [x.data for x in tensors]
    try:
        for x in tensors:
            x.data = x.data.to(device, non_blocking=True)
        for module in quantized:
            module.to(device)
        yield
    finally:
        for x, data in zip(tensors, home, strict=True):
            x.data = data
        for module in quantized:
            module.to("cpu")


def check_text_options(
    family: Family, device: Any, folder: Any, ahead: Sequence[Instruction]
) -> None:
    """Raise ``ValueError`` if an option of text encoding would be ignored.

    Args:
        family: family of the pipeline.
        device: device of the text encoders, if not that of the transformer.
        folder: folder of stored embeddings, if any.
        ahead: instructions to embed before the run.
    """
    name = family.pipeline.__name__
    if not family.embeddings and (device, folder) != (None, None):
        option = "encoder_device" if folder is None else "prompt_folder"
        raise ValueError(f"{option}: expected None for a {name}, whose calls embed instructions")
    if family.view is not None and folder is not None:
        raise ValueError(
            f"prompt_folder: expected None for a {name}, whose text encoder reads each turn's "
            "image, too; encoder_device='cpu' keeps it off the transformer's device"
        )
    if ahead and folder is None:
        raise ValueError(
            f"prompt_folder: expected a folder for the {len(ahead)} instructions to embed ahead, "
            "got None"
        )


def load_prompts(
    source: str | os.PathLike[str],
    family: Family,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    options: Mapping[str, Any],
    capacity: int,
    quantize_to: str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Prompts[Instruction]:
    """Load the text components alone, on the host, with a cache of ``capacity`` embeddings.

    Embeddings equal those of a call of the full pipeline with these options, apart from the effect
    of quantized weights.

    Args:
        source: a directory or hub id in diffusers format.
        family: family of the pipeline.
        dtype: dtype of the encoders' weights.
        device: device on which they run.
        options: call options, as ``Family.call_options`` returns them.
        capacity: number of instructions whose embeddings stay on the host.
        quantize_to: "int8" or "nf4"; None: no quantization.
        folder: folder of stored embeddings; None: none are stored.
    """
    texts = family.pipeline.from_pretrained(source, dtype=dtype, transformer=None, vae=None)
    encoders = modules_of(texts)
    for module in encoders:
        module.eval().requires_grad_(False)
        if quantize_to is not None:
            quantize(module, quantize_to, torch.device("cpu"))
    store = None
    if folder is not None:
        # All that decides on an embedding besides the instruction: it is part of a file's name.
        made_by = [
            *(family.pipeline.__name__, diffusers.__version__, transformers.__version__),
            *(str(dtype), quantize_to, torch.device(device).type),
            _parts_hash(source, family),
            json.dumps(family.text_options(options), sort_keys=True, default=repr),
        ]
        store = EmbeddingStore(folder, json.dumps(made_by))
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
        if asked.images:
            mine |= {"image": list(asked.images)}
        embeddings = texts.encode_prompt(**given | mine)
        if len(returned) == 1:
            embeddings = (embeddings,)
        named = dict(zip(returned, embeddings, strict=True))
        prefix = "negative_" if pairs and asked.negative else ""
        return [_or_ones(prefix + name, named) for name in family.embeddings]

    return Prompts(encode, encoders, device, capacity=capacity, store=store)


def _parts_hash(source: str | os.PathLike[str], family: Family) -> str:
    """Return a hash of the files of the text components, on disk or in the hub's cache."""
    folder = Path(source) if Path(source).exists() else Path(DiffusionPipeline.download(source))
    return " ".join(str(content_hash(folder / part)) for part in family.text_parts)


def _or_ones(name: str, embeddings: Mapping[str, Any]) -> Embedding:
    """Return an embedding by name; a mask of None, which means no padding, becomes all ones."""
    found = embeddings[name]
    if found is not None or not name.endswith("_mask"):
        return cast(Embedding, found)
    tokens = embeddings[name.removesuffix("_mask")]
    return torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)


def modules_of(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """Return the modules among a pipeline's components."""
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
