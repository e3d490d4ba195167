"""Editors of chains: named families by the library's own sampler, other pipelines as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL.Image import Image

from mteditflow._text import parse_json
from mteditflow.budget import pixels_of_latent
from mteditflow.chains import Chain, History
from mteditflow.evaluation import MadeBy
from mteditflow.evaluation.provenance import content_hash
from mteditflow.objectives import keyed_generator
from mteditflow.rewards.command_line import check_source

if TYPE_CHECKING:
    from mteditflow.pipelines import Editor, Seen

LORA_FILE = "pytorch_lora_weights.safetensors"  # of a hub id, by diffusers' name


class Edits(Protocol):
    """Makes every edit of chains: [reference] and [chain] to the images after each turn."""

    def __call__(
        self,
        references: Sequence[Image],
        chains: Sequence[Chain],
        seen: Sequence[Seen] | None = None,
    ) -> list[list[Image]]:
        """Edit B chains; what a chain becomes does not depend on the others.

        Args:
            references: [B].
            chains: [B].
            seen: what each turn is given, as ``Editor.edit`` takes it.
        """


@dataclass(frozen=True)
class Model:
    """A pipeline by path or hub id, and how it is called.

    Attributes:
        editor: of the pipeline, in diffusers format.
        lora: weights to add, path or hub id.
        dtype: of all weights.
        call: options of every call.
        resolution: side of the square that references are fitted into; None leaves them.
        seed: of the noise.
        history: what turns after the first are given, unless a chain says so itself.
    """

    editor: str
    lora: str | None
    dtype: str
    call: Mapping[str, Any]
    resolution: int | None
    seed: int
    history: History = "last"

    @property
    def made_by(self) -> MadeBy:
        """Return what makes the images, for the record."""
        steps, guidance = "num_inference_steps", self._guidance
        others = {name: x for name, x in self.call.items() if name not in (steps, guidance)}
        if self.history != "last":
            others["history"] = self.history
        return MadeBy(
            editor=self.editor,
            editor_hash=_version(self.editor, "model_index.json"),
            lora=self.lora,
            lora_hash=self.lora and _version(self.lora, LORA_FILE),
            dtype=self.dtype,
            seed=self.seed,
            steps=self.call.get(steps),
            guidance=self.call.get(guidance),
            resolution=self.resolution,
            call=json.dumps(others, sort_keys=True),
        )

    @property
    def _guidance(self) -> str:
        """Name of the scale of guidance: true_cfg_scale where the model has no other."""
        from diffusers import DiffusionPipeline

        from mteditflow.pipelines import FAMILIES

        try:
            name = DiffusionPipeline.load_config(self.editor)["_class_name"]
        except OSError:  # check() refuses it
            name = ""
        named = {family.pipeline.__name__: family.guidance for family in FAMILIES}
        return named.get(name) or "guidance_scale"

    def check(self, chains: Sequence[Chain]) -> None:
        """Refuse what is no pipeline or no LoRA, before anything is loaded.

        Args:
            chains: to edit.

        Raises:
            ValueError: it is neither there nor a hub id, the resolution is no multiple of its
                tokens, or a turn is given more than it takes.
            OSError: a hub has none of that id.
        """
        from diffusers import DiffusionPipeline

        from mteditflow.pipelines import FAMILIES

        check_source("--editor", self.editor, "model_index.json")
        index = DiffusionPipeline.load_config(self.editor)  # fetches this file alone
        name = index["_class_name"]
        takes = {x.pipeline.__name__: x.references for x in FAMILIES}.get(name)
        if takes is not None and self.resolution is not None:
            self._check_resolution(self.resolution, index["vae"][1])
        if takes != "several":
            for chain in chains:
                if other := [x for x in chain.seen(self.history) if x != ("last",)]:
                    raise ValueError(
                        f"--history, references: expected ['last'] for a {name}, which is given "
                        f"one image, got {list(other[0])} in chain {chain.id!r}"
                    )
        if self.lora is not None and not Path(self.lora).exists():
            check_source("--lora", self.lora, LORA_FILE)

    def _check_resolution(self, side: int, kind: str) -> None:
        """Refuse a side that the pipeline would round down.

        Args:
            side: pixels.
            kind: class of the autoencoder.

        Raises:
            ValueError: it is no multiple of a token's side.
            OSError: the autoencoder's configuration cannot be fetched.
        """
        import diffusers

        config = getattr(diffusers, kind).load_config(self.editor, subfolder="vae")
        multiple = 2 * pixels_of_latent(config)
        if side % multiple:
            raise ValueError(
                f"--resolution: expected a multiple of {multiple} pixels for {self.editor}, got "
                f"{side}"
            )

    def load(self, device: torch.device) -> Edits:
        """Load it; its class tells how it is called."""
        from diffusers import DiffusionPipeline
        from mteditflow_examples.flux.loading import quiet_libraries

        from mteditflow.pipelines import FAMILIES, Editor

        quiet_libraries()
        name, options = DiffusionPipeline.load_config(self.editor)["_class_name"], self.call
        dtype, side = getattr(torch, self.dtype), self.resolution
        square = {"height": side, "width": side}
        families = {family.pipeline.__name__: family for family in FAMILIES}
        if name in families:
            own = families[name].references != "none"  # a size of None is then the reference's
            call = {**square, **options} if own or side is not None else options
            editor = Editor.load(self.editor, dtype=dtype, device=device, call=call)
            return OfFamily(self._with_lora(editor), self.seed)
        options = options if side is None else {**square, **options}
        pipeline = DiffusionPipeline.from_pretrained(self.editor, dtype=dtype).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return AnyPipeline(self._with_lora(pipeline), options, self.seed)

    def _with_lora(self, editor: Any) -> Any:
        if self.lora is not None:
            getattr(editor, "pipeline", editor).load_lora_weights(self.lora)
        return editor


def _version(source: str, file: str) -> str | None:
    """Return the hash of a local file or folder, or the commit of a hub id once it is here."""
    from huggingface_hub import try_to_load_from_cache

    local = content_hash(source)
    if local is not None or source.count("/") != 1:
        return local
    cached = try_to_load_from_cache(source, file)
    return Path(cached).parent.name if isinstance(cached, str) else None


class OfFamily:
    """A family that is known by name; chains are edited in one batch where it can."""

    def __init__(self, editor: Editor, seed: int) -> None:
        self._editor, self._seed = editor, seed

    def __call__(
        self,
        references: Sequence[Image],
        chains: Sequence[Chain],
        seen: Sequence[Seen] | None = None,
    ) -> list[list[Image]]:
        """See ``Edits``."""
        return self._editor.edit(
            references,
            [chain.instructions for chain in chains],
            generators=[noise(self._seed, chain) for chain in chains],
            batch=len(chains),
            seen=seen,
        )


class AnyPipeline:
    """One chain at a time, by the arguments that edit pipelines share."""

    def __init__(self, pipeline: Any, call: Mapping[str, Any], seed: int) -> None:
        self._pipeline, self._call, self._seed = pipeline, call, seed

    def __call__(
        self,
        references: Sequence[Image],
        chains: Sequence[Chain],
        seen: Sequence[Seen] | None = None,
    ) -> list[list[Image]]:
        """See ``Edits``."""
        if any(images != ["last"] for chain in seen or () for images in chain):
            raise ValueError(
                "seen: expected ['last'] at each turn of a pipeline that is not listed"
            )
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
            options[key] = parse_json(value)
        except ValueError:
            options[key] = value
    return options
