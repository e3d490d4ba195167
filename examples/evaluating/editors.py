"""Editors of chains: known families by the library's sampler, other pipelines by their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import httpx2
import torch
from mteditflow_examples.flux.held_out import HELD_OUT
from mteditflow_examples.flux.lora_files import LORA, find_lora
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


HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
Noise = Callable[[Chain], torch.Generator]  # generator of a chain's noise


class Edits(Protocol):
    """Protocol of an editor: maps references and chains to the images after each turn."""

    def __call__(
        self,
        references: Sequence[Image],
        chains: Sequence[Chain],
        seen: Sequence[Seen] | None = None,
    ) -> list[list[Image]]:
        """Edit B chains; the images of a chain do not depend on the others.

        Args:
            references: input images of turn 1, [B].
            chains: records of the chains, [B].
            seen: input images of each turn, as in ``Editor.edit``.

        Returns:
            Images after each turn, [B][N].
        """


@dataclass(frozen=True)
class Model:
    """A pipeline with the options of its calls.

    Attributes:
        editor: path or Hub id of a pipeline in diffusers format.
        lora: path or Hub id of a LoRA to add; None: no LoRA.
        dtype: dtype of all weights.
        call: arguments of every pipeline call.
        resolution: side of the square for references, pixels; None: no change.
        seed: seed of the noise.
        history: input images of turns after the first, unless a chain's record has its own.
        rows: row of each chain by id, which keys its noise as in held-out evaluations of training;
            None: its id does.
    """

    editor: str
    lora: str | None
    dtype: str
    call: Mapping[str, Any]
    resolution: int | None
    seed: int
    history: History = "last"
    rows: Mapping[str, int] | None = None

    @property
    def made_by(self) -> MadeBy:
        """Return the provenance of the images."""
        steps, guidance = "num_inference_steps", self._guidance
        others = {name: x for name, x in self.call.items() if name not in (steps, guidance)}
        if self.history != "last":
            others["history"] = self.history
        if self.rows is not None:
            others["noise"] = "row"
        return MadeBy(
            editor=self.editor,
            editor_hash=_version(self.editor, "model_index.json"),
            lora=self.lora,
            lora_hash=self.lora and _version(self.lora, LORA),
            dtype=self.dtype,
            seed=self.seed,
            steps=self.call.get(steps),
            guidance=self.call.get(guidance),
            resolution=self.resolution,
            call=json.dumps(others, sort_keys=True),
        )

    @property
    def _guidance(self) -> str:
        """Name of the guidance argument: the family's own, else guidance_scale."""
        from diffusers import DiffusionPipeline

        from mteditflow.pipelines import FAMILIES

        try:
            name = DiffusionPipeline.load_config(self.editor)["_class_name"]
        except OSError:  # check() refuses it
            name = ""
        named = {family.pipeline.__name__: family.guidance for family in FAMILIES}
        return named.get(name) or "guidance_scale"

    def check(self, chains: Sequence[Chain]) -> None:
        """Check pipeline, LoRA, resolution and input images, before anything is loaded.

        Args:
            chains: chains to edit.

        Raises:
            ValueError: the source is neither a folder nor a Hub id, the resolution is no multiple
                of a token's side, or a turn has more input images than the pipeline takes.
            OSError: the Hub has no such repository.
        """
        from diffusers import DiffusionPipeline

        from mteditflow.pipelines import FAMILIES

        check_source("--editor", self.editor, "model_index.json")
        index = DiffusionPipeline.load_config(self.editor)  # downloads only this file
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
        if self.lora is not None:
            _local_lora(self.lora)

    def _check_resolution(self, side: int, kind: str) -> None:
        """Refuse a resolution that the pipeline would silently round down.

        Args:
            side: resolution in pixels.
            kind: class name of the autoencoder.

        Raises:
            ValueError: the resolution is no multiple of a token's side.
            OSError: the autoencoder's configuration cannot be downloaded.
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
        """Load the pipeline; its class decides which sampler is used."""
        from diffusers import DiffusionPipeline
        from mteditflow_examples.flux.loading import quiet_libraries

        from mteditflow.pipelines import FAMILIES, Editor

        quiet_libraries()
        name, options = DiffusionPipeline.load_config(self.editor)["_class_name"], self.call
        dtype, side = getattr(torch, self.dtype), self.resolution
        square = {"height": side, "width": side}
        families = {family.pipeline.__name__: family for family in FAMILIES}
        if name in families:
            own = families[name].references != "none"  # then a size of None means the reference's
            call = {**square, **options} if own or side is not None else options
            editor = Editor.load(self.editor, dtype=dtype, device=device, call=call)
            return OfFamily(self._with_lora(editor), self.noise)
        options = options if side is None else {**square, **options}
        pipeline = DiffusionPipeline.from_pretrained(self.editor, dtype=dtype).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return AnyPipeline(self._with_lora(pipeline), options, self.noise)

    def noise(self, chain: Chain) -> torch.Generator:
        """Return a chain's generator, which does not depend on batches and ranks."""
        if self.rows is None:
            return keyed_generator(self.seed, "evaluation", chain.id)
        return keyed_generator(self.seed, HELD_OUT, self.rows[chain.id])

    def _with_lora(self, editor: Any) -> Any:
        if self.lora is not None:
            pipeline = getattr(editor, "pipeline", editor)
            try:
                pipeline.load_lora_weights(_local_lora(self.lora) or self.lora)
            except httpx2.HTTPError as error:  # no OSError, unlike failed downloads of pipelines
                raise ValueError(f"--lora: {self.lora} cannot be downloaded: {error}") from error
            # diffusers only warns of weights of other layers, and then edits without any.
            if not any(getattr(x, "peft_config", None) for x in pipeline.components.values()):
                name = type(pipeline).__name__
                raise ValueError(f"--lora: expected one for layers of a {name}, got {self.lora}")
        return editor


def _local_lora(source: str) -> Path | None:
    """Return the file of a LoRA; None for a Hub id.

    Raises:
        ValueError: it is neither a LoRA nor of the form of a Hub id.
    """
    path = Path(source)
    wanted = f"--lora: expected a LoRA file, a folder with {LORA} or a hub id"
    try:
        if path.exists():
            return find_lora(path)
    except ValueError as error:
        raise ValueError(f"{wanted}, {error}") from error
    if re.fullmatch(HUB_ID, source) is None:
        fix = "mteditflow export RUN --output FILE.safetensors writes one"
        raise ValueError(f"{wanted}, got {source!r}; {fix}")
    return None


def _version(source: str, file: str) -> str | None:
    """Return the hash of a local path, or the commit of a downloaded Hub id; None: unknown."""
    from huggingface_hub import try_to_load_from_cache

    local = content_hash(source)
    if local is not None or source.count("/") != 1:
        return local
    cached = try_to_load_from_cache(source, file)
    return Path(cached).parent.name if isinstance(cached, str) else None


class OfFamily:
    """Editor of a known family; chains are edited in one batch if the pipeline allows."""

    def __init__(self, editor: Editor, noise: Noise) -> None:
        self._editor, self._noise = editor, noise

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
            generators=[self._noise(chain) for chain in chains],
            batch=len(chains),
            seen=seen,
        )


class AnyPipeline:
    """Editor by any pipeline, one chain at a time, with arguments common to editing pipelines."""

    def __init__(self, pipeline: Any, call: Mapping[str, Any], noise: Noise) -> None:
        self._pipeline, self._call, self._noise = pipeline, call, noise

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
        made, generator = [], self._noise(chain)
        for instruction in chain.instructions:
            options = {"image": image, "prompt": instruction, "generator": generator, **self._call}
            image = self._pipeline(**options).images[0]
            made.append(image)
        return made


def rows_of(chains: Sequence[Chain], turns: int | None) -> dict[str, int]:
    """Return the row of each chain by id, with the shorter ones, which training leaves out, last.

    Example:
        >>> chains = [Chain(id=x, image="x.png", instructions=tuple(x)) for x in ("ab", "c", "de")]
        >>> rows_of(chains, 2)
        {'ab': 0, 'de': 1, 'c': 2}
    """
    most = turns or max(chain.turns for chain in chains)
    rows = sorted(chains, key=lambda chain: chain.turns < most)
    return {chain.id: row for row, chain in enumerate(rows)}


def call_options(given: Sequence[str]) -> dict[str, Any]:
    """Parse ``key=value`` arguments; values are JSON if valid, else text.

    Raises:
        ValueError: an argument has no "=".
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
