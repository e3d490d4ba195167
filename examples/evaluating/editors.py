"""Editors of chains: the two families by the library's own sampler, any other pipeline as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

from mteditflow.chains import Chain
from mteditflow.pipelines import FAMILIES, Editor
from mteditflow.training import keyed_generator


class Edits(Protocol):
    """Makes every edit of chains: [reference] and [chain] to the images after each turn."""

    def __call__(self, references: Sequence[Image], chains: Sequence[Chain]) -> list[list[Image]]:
        """Edit B chains; what a chain becomes does not depend on the others."""


def load_editor(
    source: str,
    *,
    lora: str | None,
    dtype: torch.dtype,
    device: torch.device,
    call: Mapping[str, Any],
    seed: int,
) -> Edits:
    """Load a pipeline by path or hub id; its class tells how it is called."""
    name = DiffusionPipeline.load_config(source)["_class_name"]
    if name in {family.pipeline.__name__ for family in FAMILIES}:
        editor = Editor.load(source, dtype=dtype, device=device, call=call)
        _add_lora(editor.pipeline, lora)
        return OfFamily(editor, seed)
    pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    _add_lora(pipeline, lora)
    return AnyPipeline(pipeline, call, seed)


def _add_lora(pipeline: Any, lora: str | None) -> None:
    if lora is not None:
        pipeline.load_lora_weights(lora)


class OfFamily:
    """Kontext or klein; chains are edited in one batch where the family can."""

    def __init__(self, editor: Editor, seed: int) -> None:
        self._editor, self._seed = editor, seed

    def __call__(self, references: Sequence[Image], chains: Sequence[Chain]) -> list[list[Image]]:
        """See ``Edits``."""
        return self._editor.edit(
            references,
            [chain.instructions for chain in chains],
            generators=[noise(self._seed, chain) for chain in chains],
            batch=len(chains),
        )


class AnyPipeline:
    """One chain at a time, by the arguments that edit pipelines share."""

    def __init__(self, pipeline: Any, call: Mapping[str, Any], seed: int) -> None:
        self._pipeline, self._call, self._seed = pipeline, call, seed

    def __call__(self, references: Sequence[Image], chains: Sequence[Chain]) -> list[list[Image]]:
        """See ``Edits``."""
        return [self._edit(*pair) for pair in zip(references, chains, strict=True)]

    @torch.inference_mode()
    def _edit(self, image: Image, chain: Chain) -> list[Image]:
        made, generator = [], noise(self._seed, chain)
        for instruction in chain.instructions:
            options = {"image": image, "prompt": instruction, "generator": generator, **self._call}
            image = self._pipeline(**options).images[0]
            made.append(image)
        return made


def noise(seed: int, chain: Chain) -> torch.Generator:
    """Draw a chain's noise from its name, so that batches and ranks do not matter."""
    return keyed_generator(seed, "evaluation", chain.id)


def call_options(given: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value``, the value as JSON where it is, else as text.

    Raises:
        ValueError: one has no "=".
    """
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ValueError(f"call: expected key=value, got {text!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options
