"""Families of editing and text-to-image pipelines, and the differences between them."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import diffusers
from diffusers import (
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxKontextPipeline,
    QwenImageEditPlusPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from PIL.Image import Image
from torch import Tensor, nn

from mteditflow.pipelines.references import (
    Size,
    flux2_size,
    kontext_latents,
    kontext_size,
    qwen_edit_size,
    qwen_edit_view,
)
from mteditflow.pipelines.signatures import (
    call_parameters,
    embedding_names,
    foreign_inputs,
    guidance_argument,
    tells_guidance,
    text_components,
    text_parameters,
)

_GIVEN_BY_EDITOR = {
    *("self", "image", "prompt", "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3"),
    *("generator", "latents", "num_images_per_prompt", "output_type", "return_dict"),
}
_NO_TARGET = re.compile("norm|mod|ada|emb|time")  # modulation, embedders and norms of a block


@dataclass(frozen=True)
class Family:
    """How the pipelines of one class are called, and what is done once instead of in every call.

    ``describe`` fills in what the class says of itself.

    Attributes:
        name: short, such as "kontext"; of a class that is not listed its own name.
        pipeline: the diffusers class.
        references: how many reference images one edit takes: "none" is text to image, "one", or
            "several", where a list of images is one edit's.
        takes_batch: whether one call makes several images, each by its own instruction.
        embeddings: names under which a call takes those of an instruction; those of a negative
            prompt have ``negative_`` before. (): instructions are given to the call as they are.
        text_parts: components that the sampling pipeline has not, since they only embed.
        guidance: name of the call's scale of guidance, None if it has none.
        defaults: call options where the pipeline's own defaults are not those of training.
        view: returns the picture of a reference that the text encoder is shown with an instruction;
            None: it reads the instruction alone.
        latents: encodes a reference once for several calls, [1, C, h, w]; None: every call does.
        reference_size: returns width and height, pixels, at which a reference is encoded; None:
            not known, or there is none.
        assumptions: what was assumed of a class that is not listed.

    Source: Flow-GRPO (arXiv 2505.05470) and Edit-R1 for Kontext at 512 x 512 with guidance 2.5;
    the signatures of diffusers.
    """

    name: str
    pipeline: type[DiffusionPipeline]
    references: Literal["none", "one", "several"]
    takes_batch: bool
    embeddings: tuple[str, ...]
    text_parts: tuple[str, ...]
    guidance: str | None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    view: Callable[[DiffusionPipeline, Image], Image] | None = None
    latents: Callable[[DiffusionPipeline, Image, Mapping[str, Any]], Tensor] | None = None
    reference_size: Callable[[DiffusionPipeline, Size, Mapping[str, Any]], Size] | None = None
    assumptions: tuple[str, ...] = ()

    def call_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options of a call: ``given`` over the family's defaults.

        ``height`` and ``width`` may both be None: the reference's own, down to whole tokens.
        ``max_area`` of Kontext, which overrules them, is their product if not given.

        Raises:
            ValueError: an option is unknown to the pipeline, or set by the editor itself; or
                ``true_cfg_scale`` is given above 1 without the negative prompt that it needs.
        """
        known = self._known_options()
        for name in given:
            if name not in known:
                raise ValueError(
                    f"call: expected options among {sorted(known)} of a {self.pipeline.__name__}, "
                    f"got {name!r}"
                )
        options = {**self.defaults, **given}
        if options.get("true_cfg_scale", 1.0) > 1 and options.get("negative_prompt") is None:
            raise ValueError(
                f"call: expected a negative_prompt (such as ' ') beside true_cfg_scale "
                f"{options['true_cfg_scale']}, without which a {self.pipeline.__name__} is not "
                "guided, got none"
            )
        sides = [options[side] for side in ("height", "width") if side in options]
        if None in sides:
            self._check_own_size(sides, options)
        elif "max_area" in known and len(sides) == 2:
            options.setdefault("max_area", sides[0] * sides[1])
        return options

    def _check_own_size(self, sides: Sequence[int | None], options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless the size of an image can be that of its reference."""
        if self.references == "none" or sides != [None, None] or "max_area" in options:
            raise ValueError(
                "call: expected height and width as numbers, or both None where there is a "
                f"reference whose size to take, and no max_area then, got {sides} for a "
                f"{self.pipeline.__name__}"
            )

    def own_size(self, pipeline: DiffusionPipeline, size: Size) -> dict[str, int]:
        """Height and width of a call that takes them from a reference of this size.

        Raises:
            ValueError: the reference is smaller than a token.
        """
        multiple = 2 * pipeline.vae_scale_factor
        width, height = (side // multiple * multiple for side in size)
        if not width or not height:
            raise ValueError(
                f"references: expected images of at least {multiple} pixels a side, got "
                f"{size[0]} x {size[1]}"
            )
        found = {"height": height, "width": width}
        if "max_area" in call_parameters(self.pipeline):
            found["max_area"] = height * width
        return found

    def text_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the call options that act on the embeddings, with the call's defaults."""
        known, call = self._known_options(), call_parameters(self.pipeline)
        return {
            name: options.get(name, call[name].default)
            for name in text_parameters(self.pipeline)
            if name in known and name != "negative_prompt"
        }

    def negative_prompt(
        self, pipeline: DiffusionPipeline, options: Mapping[str, Any]
    ) -> str | None:
        """The negative prompt of calls with these options; None if they are not guided by one."""
        call = call_parameters(self.pipeline)
        if not self.embeddings:  # the call embeds it itself
            return None
        if "true_cfg_scale" in call:
            default = call["true_cfg_scale"].default
            given = options.get("negative_prompt")
            return given if options.get("true_cfg_scale", default) > 1 else None
        if not tells_guidance(self.pipeline):
            return None
        seen = copy.copy(pipeline)
        seen._guidance_scale = options.get("guidance_scale", call["guidance_scale"].default)
        guided = self.pipeline.do_classifier_free_guidance.fget(seen)
        return (options.get("negative_prompt") or "") if guided else None

    def layers(self, model: nn.Module, targets: Sequence[str] | None) -> list[str]:
        """Names of the linear layers whose names end in one of the targets.

        None are attention and feed-forward of all blocks, fused projections included, without
        norms, modulation and embedders.

        Raises:
            ValueError: a target matches no layer, or none are given and the model has no blocks.
        """
        linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        own = _in_blocks(model, linear)
        if targets is None and not own:
            raise ValueError(
                f"targets: expected some for a {type(model).__name__}, in which no blocks with "
                "linear layers were found"
            )
        if targets is None:
            return own
        found: list[str] = []
        for target in targets:
            matched = [name for name in linear if name.endswith(f".{target}")]
            if not matched:
                raise ValueError(
                    f"targets: expected endings of linear layers below the top level of a "
                    f"{type(model).__name__}, such as {endings(own or linear)[0]!r}, got {target!r}"
                )
            found += matched
        return found

    def _known_options(self) -> list[str]:
        """Options of the pipeline's call without those that the editor gives."""
        embeddings = {x for name in self.embeddings for x in (name, f"negative_{name}")}
        return [
            name
            for name in call_parameters(self.pipeline)
            if name not in _GIVEN_BY_EDITOR | embeddings
            and not name.endswith(("_embeds", "_embeds_mask"))
            and "callback" not in name
            and "ip_adapter" not in name
        ]


def endings(layers: Sequence[str]) -> list[str]:
    """Names of layers below their numbered blocks, each once, in order.

    Example:
        >>> endings(["blocks.0.attn.to_q", "blocks.0.ff.net.2", "blocks.1.attn.to_q"])
        ['attn.to_q', 'ff.net.2']
    """
    return list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name, count=1) for name in layers))


def _in_blocks(model: nn.Module, linear: Sequence[str]) -> list[str]:
    """Layers of attention and feed-forward among linear layers: those of the repeated blocks."""
    kinds = {
        kind
        for attribute in ("_repeated_blocks", "_no_split_modules")
        for kind in getattr(model, attribute, None) or ()
    }
    named = model.named_modules()
    blocks = [f"{name}." for name, part in named if type(part).__name__ in kinds]
    if not blocks:
        lists = [name for name, part in model.named_children() if isinstance(part, nn.ModuleList)]
        blocks = [f"{name}." for name in lists]
    found = []
    for name in linear:
        block = next((block for block in blocks if name.startswith(block)), None)
        if block is not None and not _NO_TARGET.search(name.removeprefix(block).lower()):
            found.append(name)
    return found


def describe(pipeline: type[DiffusionPipeline], **known: Any) -> Family:
    """Describe a class by its signatures, and by what is known of it.

    Args:
        pipeline: a diffusers class whose calls take prompts, or images and prompts.
        known: fields of ``Family``, over those found.

    Raises:
        ValueError: it takes what a chain of edits has not, such as a mask or a video.

    Example:
        >>> family = describe(StableDiffusion3Pipeline)
        >>> family.references, family.embeddings, family.guidance
        ('none', ('prompt_embeds', 'pooled_prompt_embeds'), 'guidance_scale')
    """
    name, foreign = pipeline.__name__, foreign_inputs(pipeline)
    if foreign:
        raise ValueError(
            f"source: expected a pipeline that edits an image by an instruction, or makes one from "
            f"a text, got a {name}, which takes {' and '.join(foreign)}"
        )
    if "transformer" not in inspect.signature(pipeline.__init__).parameters:
        raise ValueError(f"source: expected a pipeline with a transformer, got a {name}")
    takes_image = "image" in call_parameters(pipeline)
    reads_image = "image" in text_parameters(pipeline) and "view" not in known
    embeddings = () if reads_image else embedding_names(pipeline)
    found = {
        "name": name,
        "references": "one" if takes_image else "none",
        "takes_batch": False,
        "embeddings": embeddings,
        "text_parts": text_components(pipeline) if embeddings else (),
        "guidance": guidance_argument(pipeline),
    }
    return Family(pipeline=pipeline, **{**found, **known})


#: Families that are known by name; every other class is described by its signatures.
FAMILIES = (
    describe(
        FluxKontextPipeline,
        name="kontext",
        takes_batch=True,
        latents=kontext_latents,
        reference_size=kontext_size,
        defaults={"height": 512, "width": 512, "guidance_scale": 2.5, "_auto_resize": False},
    ),
    describe(
        Flux2KleinPipeline,
        name="klein",
        references="several",
        reference_size=flux2_size,
        defaults={"height": 512, "width": 512, "guidance_scale": 4.0},
    ),
    describe(
        Flux2Pipeline,
        name="flux2",
        references="several",
        reference_size=flux2_size,
        defaults={"height": 512, "width": 512, "guidance_scale": 4.0},
    ),
    describe(
        QwenImageEditPlusPipeline,
        name="qwen-edit",
        references="several",
        view=qwen_edit_view,
        reference_size=qwen_edit_size,
        defaults={"height": 512, "width": 512, "true_cfg_scale": 4.0, "negative_prompt": " "},
    ),
    describe(
        ZImagePipeline,
        name="z-image",
        takes_batch=True,
        defaults={"height": 512, "width": 512},
    ),
    describe(
        StableDiffusion3Pipeline,
        name="sd3.5",
        takes_batch=True,
        defaults={"height": 512, "width": 512, "guidance_scale": 4.5},
    ),
)


def find_family(class_name: str) -> Family:
    """The family of a pipeline class, by the name that ``model_index.json`` gives.

    A class that is not listed is described by its signatures; ``Family.assumptions`` says how.

    Raises:
        ValueError: diffusers has no such pipeline, or it takes what a chain of edits has not.
    """
    for family in FAMILIES:
        if family.pipeline.__name__ == class_name:
            return family
    pipeline = getattr(diffusers, class_name, None)
    if not (isinstance(pipeline, type) and issubclass(pipeline, DiffusionPipeline)):
        raise ValueError(
            f"source: expected a pipeline of diffusers {diffusers.__version__} in "
            f"model_index.json, got {class_name}"
        )
    found = describe(cast("type[DiffusionPipeline]", pipeline))
    if found.references != "none":  # its encoders may be shown the image by another method
        found = replace(found, embeddings=(), text_parts=())
    return replace(found, assumptions=_assumptions(found))


def _assumptions(family: Family) -> tuple[str, ...]:
    """Assumptions of a description by signatures alone, in words."""
    reference = (
        "an edit takes one reference image, of whose size in the model nothing is known"
        if family.references == "one"
        else "it makes an image from a text, in one turn"
    )
    names = " and ".join(family.embeddings)
    texts = (
        f"instructions are embedded once each, by encode_prompt, and given as {names}"
        if names
        else "every call embeds its instruction, and the text encoders stay on the device"
    )
    return (
        f"{family.name} is not a listed family",
        reference,
        texts,
        "a call makes one image, whatever the batch",
        f"the scale of guidance is {family.guidance}",
    )
