"""What pipelines make of a reference image: its size, its latents, what text encoders see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL.Image import Image
from torch import Tensor

Size = tuple[int, int]  # width and height, pixels


def kontext_size(pipeline: DiffusionPipeline, size: Size, options: Mapping[str, Any]) -> Size:
    """Size at which FLUX.1-Kontext encodes a reference: its own, or the nearest preferred one."""
    width, height = size
    if options["_auto_resize"]:
        ratio = width / height
        _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    multiple = 2 * pipeline.vae_scale_factor
    return width // multiple * multiple, height // multiple * multiple


def kontext_latents(
    pipeline: DiffusionPipeline, image: Image, options: Mapping[str, Any]
) -> Tensor:
    """Latents [1, C, h, w] of a reference, exactly as a call of Kontext's pipeline makes them."""
    processor = pipeline.image_processor
    height, width = processor.get_default_height_width(image)
    width, height = kontext_size(pipeline, (width, height), options)
    pixels = processor.preprocess(processor.resize(image, height, width), height, width)
    vae = pipeline.vae
    mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return cast(Tensor, (mode - vae.config.shift_factor) * vae.config.scaling_factor)


def flux2_size(pipeline: DiffusionPipeline, size: Size, _: Mapping[str, Any]) -> Size:
    """Size at which FLUX.2 encodes a reference: its own up to a megapixel, cropped to tokens."""
    width, height = size
    if width * height > 1024 * 1024:
        scale = (1024 * 1024 / (width * height)) ** 0.5
        width, height = int(width * scale), int(height * scale)
    multiple = 2 * pipeline.vae_scale_factor
    return width // multiple * multiple, height // multiple * multiple


def qwen_edit_size(_: DiffusionPipeline, size: Size, __: Mapping[str, Any]) -> Size:
    """Size at which Qwen-Image-Edit-Plus encodes a reference: a megapixel, whatever it has."""
    area = edit_plus.VAE_IMAGE_SIZE
    return cast(Size, edit_plus.calculate_dimensions(area, size[0] / size[1]))


def qwen_edit_view(pipeline: DiffusionPipeline, image: Image) -> Image:
    """The picture that Qwen-Image-Edit-Plus shows to its text encoder with an instruction."""
    area = edit_plus.CONDITION_IMAGE_SIZE
    width, height = edit_plus.calculate_dimensions(area, image.size[0] / image.size[1])
    return cast(Image, pipeline.image_processor.resize(image, height, width))
