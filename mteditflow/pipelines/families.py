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

# Arguments of a call that the editor sets itself, so that they are no options.
_GIVEN_BY_EDITOR = {
    *("self", "image", "prompt", "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3"),
    *("generator", "latents", "num_images_per_prompt", "output_type", "return_dict"),
}
_NO_TARGET = re.compile("norm|mod|ada|emb|time")  # modulation, embedders and norms of a block


@dataclass(frozen=True)
class Family:
    """Calling convention of the pipelines of one class.

    ``describe`` derives the fields from the signatures of the class.

    Attributes:
        name: short name, such as "kontext"; the class name for a class that is not listed.
        pipeline: the diffusers class.
        references: number of reference images of one edit: "none" (text to image), "one", or
            "several", where a list of images belongs to one edit.
        takes_batch: whether one call makes several images, each by its own instruction.
        embeddings: names of the call's arguments for the embeddings of an instruction; those of a
            negative prompt have the prefix ``negative_``. (): the call takes the text itself.
        text_parts: components that the sampling pipeline does without, since they only embed.
        guidance: name of the call's guidance scale; None if it has none.
        defaults: call options that differ from the pipeline's own defaults.
        view: returns the image that the text encoder reads with an instruction, for a reference;
            None: it reads the instruction alone.
        latents: encodes a reference once for several calls, [1, C, h, w]; None: every call does.
        reference_size: returns width and height, in pixels, at which a reference is encoded; None:
            unknown, or there is no reference.
        assumptions: assumptions about a class that is not listed, as sentences.

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
        """Return all options of a call: ``given`` over the family's defaults.

        If ``height`` and ``width`` are both None, they are the reference's, rounded down to whole
        tokens. Kontext's ``max_area``, which takes precedence over them, defaults to their product.

        Raises:
            ValueError: an option is unknown to the pipeline or set by the editor itself, only one
                side is None, or ``true_cfg_scale`` is above 1 without a negative prompt.
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
        """Raise ``ValueError`` unless the output size can be that of the reference."""
        if self.references == "none" or sides != [None, None] or "max_area" in options:
            raise ValueError(
                "call: expected height and width as numbers, or both None where there is a "
                f"reference whose size to take, and no max_area then, got {sides} for a "
                f"{self.pipeline.__name__}"
            )

    def own_size(self, pipeline: DiffusionPipeline, size: Size) -> dict[str, int]:
        """Return height and width of a call that takes them from a reference of this size.

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
        """Return the call options that affect the embeddings, with the call's defaults."""
        known, call = self._known_options(), call_parameters(self.pipeline)
        return {
            name: options.get(name, call[name].default)
            for name in text_parameters(self.pipeline)
            if name in known and name != "negative_prompt"
        }

    def negative_prompt(
        self, pipeline: DiffusionPipeline, options: Mapping[str, Any]
    ) -> str | None:
        """Return the negative prompt of calls with these options; None if they use none."""
        call = call_parameters(self.pipeline)
        if not self.embeddings:  # the call embeds it itself
            return None
        if "true_cfg_scale" in call:
            default = call["true_cfg_scale"].default
            given = options.get("negative_prompt")
            return given if options.get("true_cfg_scale", default) > 1 else None
        if not tells_guidance(self.pipeline):
            return None
        # The property reads an attribute that a call sets; a copy leaves the pipeline unchanged.
        seen = copy.copy(pipeline)
        seen._guidance_scale = options.get("guidance_scale", call["guidance_scale"].default)
        guided = self.pipeline.do_classifier_free_guidance.fget(seen)
        return (options.get("negative_prompt") or "") if guided else None

    def layers(self, model: nn.Module, targets: Sequence[str] | None) -> list[str]:
        """Return the names of the linear layers whose names end in one of the targets.

        None: attention and feed-forward of all blocks, including fused projections, without norms,
        modulation and embedders.

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
        """Return the options of the pipeline's call that the editor does not set itself."""
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
    """Return the distinct names of layers below their numbered blocks, in order.

    Example:
        >>> endings(["blocks.0.attn.to_q", "blocks.0.ff.net.2", "blocks.1.attn.to_q"])
        ['attn.to_q', 'ff.net.2']
    """
    return list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name, count=1) for name in layers))


def _in_blocks(model: nn.Module, linear: Sequence[str]) -> list[str]:
    """Return the attention and feed-forward layers of the repeated blocks, by name."""
    kinds = {
        kind
        for attribute in ("_repeated_blocks", "_no_split_modules")
        for kind in getattr(model, attribute, None) or ()
    }
    named = model.named_modules()
    blocks = [f"{name}." for name, part in named if type(part).__name__ in kinds]
    if not blocks:  # a class that names no kind of block: take its lists of modules
        lists = [name for name, part in model.named_children() if isinstance(part, nn.ModuleList)]
        blocks = [f"{name}." for name in lists]
    found = []
    for name in linear:
        block = next((block for block in blocks if name.startswith(block)), None)
        if block is not None and not _NO_TARGET.search(name.removeprefix(block).lower()):
            found.append(name)
    return found


def describe(pipeline: type[DiffusionPipeline], **known: Any) -> Family:
    """Describe a pipeline class by its signatures, and by fields that are given.

    Args:
        pipeline: a diffusers class whose calls take prompts, or images and prompts.
        known: fields of ``Family`` that replace those derived from the signatures.

    Raises:
        ValueError: it takes an input that a chain of edits cannot provide, such as a mask or a
            video, or it has no transformer.

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


#: Families with explicit support; every other class is described by its signatures.
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
    """Return the family of a pipeline class, by its name in ``model_index.json``.

    A class that is not listed is described by its signatures; ``Family.assumptions`` lists what
    that assumes.

    Raises:
        ValueError: diffusers has no such pipeline, or it takes an input that a chain of edits
            cannot provide.
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
    if found.references != "none":  # its encoders may read the image outside of encode_prompt
        found = replace(found, embeddings=(), text_parts=())
    return replace(found, assumptions=_assumptions(found))


def _assumptions(family: Family) -> tuple[str, ...]:
    """Return the assumptions of a description by signatures alone, as sentences."""
    reference = (
        "an edit takes one reference image, whose size in the model is unknown"
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
        "a call makes one image, independent of the batch",
        f"the guidance scale is {family.guidance}",
    )
