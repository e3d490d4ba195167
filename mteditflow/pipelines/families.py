"""Families of editors that can be loaded by name, and the differences between them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline, Flux2KleinPipeline, FluxKontextPipeline
from torch import nn

_GIVEN_BY_EDITOR = {
    *("self", "image", "prompt", "prompt_2", "negative_prompt_2", "generator", "latents"),
    *("num_images_per_prompt", "output_type", "return_dict"),
}


@dataclass(frozen=True)
class Family:
    """One family of editing pipelines.

    Attributes:
        name: "kontext" or "klein".
        pipeline: its diffusers class.
        text_parts: its components that only turn an instruction into embeddings.
        embeddings: names under which a call takes them, in the order of ``encode_prompt``; those of
            a negative prompt have ``negative_`` before.
        negative_prompt: returns the negative prompt of call options, None without guidance by one.
        lora_targets: how the names of adapted layers end: attention and feed-forward of both kinds
            of blocks, fused projections included, without modulation, embedders and head.
        takes_batch: whether one call edits several images, each by its own instruction, and takes
            latents for an image; klein takes a list of images for several references of one edit.
        defaults: call options where the pipeline's own defaults are not those of training.

    Source: Flow-GRPO (arXiv 2505.05470) and Edit-R1 for Kontext at 512 x 512 with guidance 2.5.
    """

    name: str
    pipeline: type[DiffusionPipeline]
    text_parts: tuple[str, ...]
    embeddings: tuple[str, ...]
    negative_prompt: Callable[[DiffusionPipeline, Mapping[str, Any]], str | None]
    lora_targets: tuple[str, ...]
    takes_batch: bool
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def call_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options of a call: ``given`` over the family's defaults.

        ``max_area`` of Kontext, which overrules height and width, is their product if not given.

        Raises:
            ValueError: an option is unknown to the pipeline, or set by the editor itself.
        """
        known = self._known_options()
        for name in given:
            if name not in known:
                raise ValueError(
                    f"call: expected options among {sorted(known)} of a {self.pipeline.__name__}, "
                    f"got {name!r}"
                )
        options = {**self.defaults, **given}
        if "max_area" in known:
            options.setdefault("max_area", options["height"] * options["width"])
        return options

    def text_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the call options that act on the embeddings."""
        names = inspect.signature(self.pipeline.encode_prompt).parameters
        return {name: value for name, value in options.items() if name in names}

    def layers(self, model: nn.Module, targets: Sequence[str] | None) -> list[str]:
        """Names of the linear layers whose names end in one of the targets; None is the family's.

        Raises:
            ValueError: a target matches no layer.
        """
        linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        found: list[str] = []
        for target in self.lora_targets if targets is None else targets:
            matched = [name for name in linear if name.endswith(f".{target}")]
            if not matched:
                raise ValueError(
                    f"targets: expected endings of linear layers below the top level of a "
                    f"{type(model).__name__}, such as {self.lora_targets[0]!r}, got {target!r}"
                )
            found += matched
        return found

    def _known_options(self) -> list[str]:
        """Options of the pipeline's call without those that the editor gives."""
        return [
            name
            for name in inspect.signature(self.pipeline.__call__).parameters
            if name not in _GIVEN_BY_EDITOR
            and not name.endswith("_embeds")
            and "callback" not in name
            and "ip_adapter" not in name
        ]


def _kontext_negative_prompt(_: DiffusionPipeline, options: Mapping[str, Any]) -> str | None:
    return options.get("negative_prompt") if options.get("true_cfg_scale", 1.0) > 1 else None


def _klein_negative_prompt(pipeline: DiffusionPipeline, options: Mapping[str, Any]) -> str | None:
    guided = options["guidance_scale"] > 1 and not pipeline.config.is_distilled
    return "" if guided else None


_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)

#: Families of editors that can be loaded by name.
FAMILIES = (
    Family(
        name="kontext",
        pipeline=FluxKontextPipeline,
        text_parts=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        embeddings=("prompt_embeds", "pooled_prompt_embeds"),
        negative_prompt=_kontext_negative_prompt,
        lora_targets=(
            *_ATTENTION,
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
            *("proj_mlp", "proj_out"),
        ),
        takes_batch=True,
        defaults={"height": 512, "width": 512, "guidance_scale": 2.5, "_auto_resize": False},
    ),
    Family(
        name="klein",
        pipeline=Flux2KleinPipeline,
        text_parts=("text_encoder", "tokenizer"),
        embeddings=("prompt_embeds",),
        negative_prompt=_klein_negative_prompt,
        lora_targets=(
            *_ATTENTION,
            *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
            *("attn.to_qkv_mlp_proj", "attn.to_out"),
        ),
        takes_batch=False,
        defaults={"height": 512, "width": 512, "guidance_scale": 4.0},
    ),
)


def find_family(class_name: str) -> Family:
    """The family of a pipeline class, by the name that ``model_index.json`` gives.

    Raises:
        ValueError: there is none.
    """
    for family in FAMILIES:
        if family.pipeline.__name__ == class_name:
            return family
    names = " or ".join(f"{family.pipeline.__name__} ({family.name})" for family in FAMILIES)
    raise ValueError(f"source: expected a {names} in model_index.json, got {class_name}")
