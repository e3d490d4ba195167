"""Reference images: aspect-ratio buckets, and how each pipeline resizes and encodes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL import ImageOps
from PIL.Image import Image, Resampling
from torch import Tensor

from mteditflow._checks import check_count, check_number

Size = tuple[int, int]  # width and height, pixels


def aspect_buckets(area: int, multiple: int, *, widest: float = 2.0) -> tuple[Size, ...]:
    """Return sizes of about one area, with aspect ratios between tall and wide.

    For each width or height that is a multiple, the other side is the multiple that brings the
    product closest to the area.

    Args:
        area: target area in pixels, such as 512 * 512.
        multiple: divisor of both sides in pixels; 64 is usual.
        widest: largest ratio of the longer side to the shorter, at least 1.

    Returns:
        Width and height of each size, in pixels, from tall to wide.

    Raises:
        ValueError: a number is out of range, or the multiple is more than a third of a side.

    Example:
        >>> aspect_buckets(512 * 512, 64)
        ((384, 704), (384, 640), (448, 576), (512, 512), (576, 448), (640, 384), (704, 384))
    """
    check_count("area", area)
    check_count("multiple", multiple)
    check_number("widest", widest, low=1.0)
    if 3 * multiple > area**0.5:
        raise ValueError(
            f"multiple: expected at most a third of the side of {area} pixels, for sizes of about "
            f"that area, got {multiple}"
        )
    longest = int((area * widest) ** 0.5) + multiple
    sides = [
        (side, max(round(area / (side * multiple)), 1) * multiple)
        for side in range(multiple, longest, multiple)
    ]
    sizes = {
        size for pair in sides for size in (pair, pair[::-1]) if max(pair) <= widest * min(pair)
    }
    return tuple(sorted(sizes, key=lambda size: size[0] / size[1]))


def fit_to_bucket(image: Image, buckets: Sequence[Size]) -> Image:
    """Resize an image to the bucket of the nearest aspect ratio, with a centered crop.

    The nearest bucket is that of diffusers' training scripts: it minimizes
    ``abs(height * bucket_width - width * bucket_height)``.

    Args:
        image: image of any size.
        buckets: widths and heights in pixels, as ``aspect_buckets`` returns them.

    Raises:
        ValueError: there is no bucket.

    Example:
        >>> from PIL.Image import new as new_image
        >>> fit_to_bucket(new_image("RGB", (900, 600)), aspect_buckets(512 * 512, 64)).size
        (640, 384)
    """
    if not buckets:
        raise ValueError("buckets: expected at least one size, got none")
    width, height = image.size
    nearest = min(buckets, key=lambda size: abs(height * size[0] - width * size[1]))
    return ImageOps.fit(image, nearest, Resampling.LANCZOS)


def kontext_size(pipeline: DiffusionPipeline, size: Size, options: Mapping[str, Any]) -> Size:
    """Return the size at which FLUX.1-Kontext encodes a reference, in pixels.

    It is the reference's own, or the nearest preferred one under ``_auto_resize``, rounded down to
    whole tokens.
    """
    width, height = size
    if options["_auto_resize"]:
        ratio = width / height
        _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    multiple = 2 * pipeline.vae_scale_factor
    return width // multiple * multiple, height // multiple * multiple


def kontext_latents(
    pipeline: DiffusionPipeline, image: Image, options: Mapping[str, Any]
) -> Tensor:
    """Return the latents [1, C, h, w] of a reference, equal to those of a call of Kontext."""
    processor = pipeline.image_processor
    height, width = processor.get_default_height_width(image)
    width, height = kontext_size(pipeline, (width, height), options)
    pixels = processor.preprocess(processor.resize(image, height, width), height, width)
    vae = pipeline.vae
    mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return cast(Tensor, (mode - vae.config.shift_factor) * vae.config.scaling_factor)


def flux2_size(pipeline: DiffusionPipeline, size: Size, _: Mapping[str, Any]) -> Size:
    """Return the size at which FLUX.2 encodes a reference: up to a megapixel, whole tokens."""
    width, height = size
    if width * height > 1024 * 1024:
        scale = (1024 * 1024 / (width * height)) ** 0.5
        width, height = int(width * scale), int(height * scale)
    multiple = 2 * pipeline.vae_scale_factor
    return width // multiple * multiple, height // multiple * multiple


def qwen_edit_size(_: DiffusionPipeline, size: Size, __: Mapping[str, Any]) -> Size:
    """Return the size at which Qwen-Image-Edit-Plus encodes a reference: always a megapixel."""
    area = edit_plus.VAE_IMAGE_SIZE
    return cast(Size, edit_plus.calculate_dimensions(area, size[0] / size[1]))


def qwen_edit_view(pipeline: DiffusionPipeline, image: Image) -> Image:
    """Return the image that Qwen-Image-Edit-Plus's text encoder reads with an instruction."""
    area = edit_plus.CONDITION_IMAGE_SIZE
    width, height = edit_plus.calculate_dimensions(area, image.size[0] / image.size[1])
    return cast(Image, pipeline.image_processor.resize(image, height, width))
