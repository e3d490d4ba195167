"""Modular pipelines: blocks of the same parts, and a guider that combines the branches."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    MagnitudeAwareGuidance,
    TangentialClassifierFreeGuidance,
)
from mteditflow_examples.shapes.editor import build_klein, build_kontext

from . import video, video2, video3
from .base import CFG, Family, image_vae, picture, plus, prompts, redraw, scheduler
from .refusals import refused

TEXT = {"max_sequence_length": 10}
IMAGES, LATENTS = {"output": "images"}, {"output": "latents"}


def modular(
    kind: str, whole: DiffusionPipeline, *, without: tuple[str, ...] = (), **parts: Any
) -> Any:
    """The default blocks of a class with the parts of a pipeline.

    Args:
        kind: the class.
        whole: the pipeline, or anything with ``components``.
        without: blocks to leave out; without "text_encoder", calls are given embeddings.
        parts: more parts, such as a guider.
    """
    blocks = getattr(diffusers, kind)()._blocks
    for name in without:
        del blocks.sub_blocks[name]
    pipeline = getattr(diffusers, kind)(blocks=blocks)
    known = pipeline._component_specs
    given = {name: part for name, part in whole.components.items() if part is not None}
    pipeline.update_components(**{k: v for k, v in (given | parts).items() if k in known})
    pipeline.set_progress_bar_config(disable=True)
    for block in blocks.sub_blocks.values():
        silence(block)
    return pipeline


def silence(block: Any) -> None:
    """No progress bar in a block, nor in those within it."""
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for inner in (getattr(block, "sub_blocks", None) or {}).values():
        silence(inner)


def guider(scale: float) -> ClassifierFreeGuidance:
    """Classifier-free guidance as a part; at a scale of 1 it is off."""
    return ClassifierFreeGuidance(guidance_scale=scale, enabled=scale > 1)


def z_image() -> Any:
    """Z-Image of klein's Qwen3 and a transformer of its own."""
    klein = build_klein(image_size=8)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 16, 16],
    )
    redraw(transformer, seed=0)
    klein.register_modules(
        transformer=transformer.eval().requires_grad_(False), vae=image_vae().eval()
    )
    klein.scheduler = scheduler(3.0)
    return klein


def families(build: Any, inputs: Any, options: Any, **more: Any) -> dict[str, Family]:
    """A family without guidance, and one with a guider."""
    return {
        kind: Family(
            lambda scale=scale: build(guider=guider(scale)), inputs, options, {kind: {}}, **more
        )
        for kind, scale in (("none", 1.0), (CFG, 5.0))
    }


def named(name: str, made: dict[str, Family]) -> dict[str, Family]:
    """Families by the name of their class; the guided one says so."""
    return {name if kind == "none" else f"{name}, guided": made[kind] for kind in made}


def klein_base(**parts: Any) -> Any:
    """A modular klein with a guider."""
    return modular("Flux2KleinBaseModularPipeline", build_klein(image_size=8), **parts)


KLEIN = {"height": 64, "width": 64, "text_encoder_out_layers": (1, 2)} | TEXT | IMAGES
# Guiders whose results depend on the branches alone.
GUIDERS = {
    "tangential": lambda: TangentialClassifierFreeGuidance(guidance_scale=4.0),
    "magnitude-aware": lambda: MagnitudeAwareGuidance(guidance_scale=4.0),
    "adaptive projected": lambda: AdaptiveProjectedGuidance(guidance_scale=4.0, eta=0.5),
    "zero-star": lambda: ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=0),
}
STATEFUL = {
    "zero-star from zero": lambda: ClassifierFreeZeroStarGuidance(guidance_scale=4.0),
    "adaptive projected with momentum": lambda: AdaptiveProjectedGuidance(
        guidance_scale=4.0, adaptive_projected_guidance_momentum=-0.5
    ),
}


def guided(guider: Any, kind: str) -> Family:
    """A modular klein with the guider that a function makes."""
    return Family(lambda: klein_base(guider=guider()), prompts, KLEIN, {kind: {}}, text="Qwen3")


FAMILIES = {
    "FluxModularPipeline": Family(
        lambda: modular("FluxModularPipeline", build_kontext(image_size=8)),
        prompts,
        {"height": 8, "width": 8} | TEXT | IMAGES,
        text="CLIP, T5",
    ),
    "Flux2KleinModularPipeline": Family(
        lambda: modular("Flux2KleinModularPipeline", build_klein(image_size=8)),
        plus(prompts, image=picture()),
        KLEIN,
        text="Qwen3",
    ),
    **named(
        "Flux2KleinBaseModularPipeline",
        families(klein_base, prompts, KLEIN, text="Qwen3"),
    ),
    **{
        f"Flux2KleinBaseModularPipeline, {kind}": guided(guider, kind)
        for kind, guider in GUIDERS.items()
    },
    **named(
        "ZImageModularPipeline",
        families(
            lambda **parts: modular("ZImageModularPipeline", z_image(), **parts),
            prompts,
            {"height": 16, "width": 16} | TEXT | IMAGES,
            text="Qwen3",
        ),
    ),
    **named(
        "WanModularPipeline",
        families(
            lambda **parts: modular(
                "WanModularPipeline",
                video.build("WanPipeline", video.transformer()),
                without=("text_encoder", "decode"),
                **parts,
            ),
            video.text,
            video.FRAMES | LATENTS,
        ),
    ),
    **named(
        "LTXModularPipeline",
        families(
            lambda **parts: modular(
                "LTXModularPipeline",
                video2.ltx("LTXPipeline"),
                without=("text_encoder", "decode"),
                **parts,
            ),
            video2.text,
            video2.FRAMES | LATENTS,
        ),
    ),
    **named(
        "HunyuanVideo15ModularPipeline",
        families(
            lambda **parts: modular(
                "HunyuanVideo15ModularPipeline",
                video3.hunyuan_1_5("HunyuanVideo15Pipeline"),
                without=("text_encoder", "decode"),
                **parts,
            ),
            video3.hunyuan_1_5_text,
            video3.BIG | LATENTS,
            output="latent",
        ),
    ),
}

REFUSED = {
    f"Flux2KleinBaseModularPipeline, {kind}": refused(
        guided(guider, kind), "by a guider that depends on the step, or on those before"
    )
    for kind, guider in STATEFUL.items()
}
