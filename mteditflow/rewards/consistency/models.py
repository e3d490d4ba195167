"""Published models for consistency: GroundingDINO and DINOv3, with the classes of transformers.

Weights are loaded from safetensors only. Neither needs torchvision.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mteditflow._checks import check_number
from mteditflow.rewards.consistency.similarity import Features

try:
    from transformers import (
        AutoTokenizer,
        DINOv3ViTModel,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
    )
except ImportError as error:
    raise ImportError(
        f"{__name__} needs {error.name}: pip install 'mteditflow[rewards]'"
    ) from error

IMAGE_SIZE = 224  # height and width of DINOv3's input
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, RGB


class GroundingDino:
    """Detector of objects by name that keeps all boxes above the threshold.

    Names are joined to one prompt, "a cat . a dog .". Names beyond the limit of the text encoder go
    into further prompts, whose boxes are concatenated; nothing is truncated. Boxes are not assigned
    to names.

    Args:
        model: the detector, in evaluation mode.
        tokenizer: tokenizer of the model.
        processor: image processor of the model.
        threshold: score in [0, 1] above which boxes are kept.

    Raises:
        ValueError: the threshold is out of range.

    Source: Grounding DINO (arXiv 2303.05499).
    """

    def __init__(
        self,
        model: GroundingDinoForObjectDetection,
        tokenizer: Any,
        processor: GroundingDinoImageProcessorPil,
        *,
        threshold: float = 0.35,
    ) -> None:
        check_number("threshold", threshold, low=0.0, high=1.0)
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.threshold = threshold

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] = "IDEA-Research/grounding-dino-tiny",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str = "main",
        threshold: float = 0.35,
    ) -> GroundingDino:
        """Load a detector.

        Args:
            path: hub id or folder.
            device: device of the model.
            dtype: dtype of its weights.
            revision: revision of the hub's repository.
            threshold: score in [0, 1] above which boxes are kept.
        """
        model = GroundingDinoForObjectDetection.from_pretrained(
            path, revision=revision, dtype=dtype, use_safetensors=True
        )
        return cls(
            model.to(device).eval(),
            AutoTokenizer.from_pretrained(path, revision=revision),
            GroundingDinoImageProcessorPil.from_pretrained(path, revision=revision),
            threshold=threshold,
        )

    def __call__(self, images: Sequence[Tensor], names: Sequence[Sequence[str]]) -> list[Tensor]:
        """Return the boxes of ``detect`` at the detector's own threshold, without scores."""
        return [boxes for boxes, _ in self.detect(images, names, threshold=self.threshold)]

    @torch.inference_mode()
    def detect(
        self, images: Sequence[Tensor], names: Sequence[Sequence[str]], *, threshold: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Find objects by name, with scores.

        Args:
            images: RGB images, uint8 [3, H, W], all of one size, since padding would change boxes.
            names: names to look for in each image, at least one each, without full stops.
            threshold: score in [0, 1] above which boxes are kept.

        Returns:
            For each image boxes, float32 [K, 4], absolute (x1, y1, x2, y2) in pixels, and their
            scores, float32 [K].

        Raises:
            ValueError: numbers of images and lists of names differ, image sizes differ, an image
                has no names, a single name exceeds the limit of the text encoder, or the threshold
                is out of range.
        """
        check_number("threshold", threshold, low=0.0, high=1.0)
        if not images or len(images) != len(names) or not all(names):
            raise ValueError(
                "names: expected one or more for each of one or more images, got "
                f"{[len(each) for each in names]} for {len(images)} images"
            )
        if len({image.shape for image in images}) > 1:
            shapes = [list(image.shape) for image in images]
            raise ValueError(f"images: expected all of one size, got {shapes}")
        prompts = [(n, prompt) for n, each in enumerate(names) for prompt in self.prompts(each)]
        text = self.tokenizer([prompt for _, prompt in prompts], padding=True, return_tensors="pt")
        inputs = self.processor([images[n] for n, _ in prompts], return_tensors="pt")
        outputs = self.model(
            **text.to(self.model.device),
            pixel_values=inputs.pixel_values.to(self.model.device, self.model.dtype),
            pixel_mask=inputs.pixel_mask.to(self.model.device),
        )
        # Before boxes are scaled to pixels: bfloat16 rounds 511 to 512.
        outputs.pred_boxes = outputs.pred_boxes.float()
        outputs.logits = outputs.logits.float()
        results = self.processor.post_process_object_detection(
            outputs, threshold, [images[0].shape[1:]] * len(prompts)
        )
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in images]
        for (n, _), each in zip(prompts, results, strict=True):
            found[n].append((each["boxes"], each["scores"]))
        joined = (zip(*own, strict=True) for own in found)
        return [(torch.cat(boxes), torch.cat(scores)) for boxes, scores in joined]

    def prompts(self, names: Sequence[str]) -> list[str]:
        """Join names, in order, to the fewest prompts within the limit of the text encoder.

        Each name ends with a full stop. Without it the words of the last name would not attend to
        each other.

        Raises:
            ValueError: a single name exceeds the limit.
        """
        limit = self.model.config.max_text_len - 2  # the first and the last token are special
        tokens = self.tokenizer(list(names), add_special_tokens=False).input_ids
        joined: list[str] = []
        room = 0
        for name, ids in zip(names, tokens, strict=True):
            length = len(ids) + 1  # with its full stop
            if length > limit:
                raise ValueError(
                    f"names: expected at most {limit - 1} tokens each, got {len(ids)} "
                    f"in {name[:40]!r}..."
                )
            if length > room:
                joined.append("")
                room = limit
            joined[-1] += f" {name} ."
            room -= length
        return [prompt.strip() for prompt in joined]


class DinoV3:
    """Feature extractor: tokens of DINOv3 for images scaled to 224 x 224.

    Args:
        model: the vision transformer, in evaluation mode.

    Source: DINOv3 (arXiv 2508.10104).
    """

    def __init__(self, model: DINOv3ViTModel) -> None:
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] = "facebook/dinov3-vitb16-pretrain-lvd1689m",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str = "main",
    ) -> DinoV3:
        """Load the model.

        Args:
            path: hub id or folder. The published weights need their license accepted on the hub.
            device: device of the model.
            dtype: dtype of its weights.
            revision: revision of the hub's repository.
        """
        model = DINOv3ViTModel.from_pretrained(
            path, revision=revision, dtype=dtype, use_safetensors=True
        )
        return cls(model.to(device).eval())

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> Features:
        """Compute the float32 tokens of RGB images, uint8 [3, H, W] of any sizes."""
        tokens = self.model(pixel_values=self.prepare(images)).last_hidden_state.float()
        # The sequence is CLS, registers, patches row by row.
        first = 1 + self.model.config.num_register_tokens
        side = IMAGE_SIZE // self.model.config.patch_size
        return Features(
            cls=tokens[:, 0],
            registers=tokens[:, 1:first],
            patches=tokens[:, first:],
            grid=(side, side),
            size=(IMAGE_SIZE, IMAGE_SIZE),
        )

    def prepare(self, images: Sequence[Tensor]) -> Tensor:
        """Return the model's input [K, 3, 224, 224], normalized by ImageNet's mean and std."""
        scaled = torch.cat([_resize(image.to(self.model.device)) for image in images])
        mean, std = (scaled.new_tensor(value)[:, None, None] for value in (MEAN, STD))
        return ((scaled - mean) / std).to(self.model.dtype)


def _resize(image: Tensor) -> Tensor:
    return functional.interpolate(
        image[None] / 255, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True
    )
