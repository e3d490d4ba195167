"""Human preference per turn: PickScore, or any model of the same protocol.

The term is reported beside IF and CC and is no reward by default. ``B`` chains, ``N`` turns. Import
this module by its full name; it loads transformers, which is slow. Needs the extra
``mteditflow[rewards]``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import chain as flatten
from itertools import islice
from typing import Any, Protocol

import anyio
import anyio.to_thread
import torch
from PIL import Image
from torch import Tensor

from mteditflow._checks import check_count, check_full_precision, check_shape, check_values
from mteditflow.chains import Chain
from mteditflow.rewards import TurnScores
from mteditflow.rewards.images import to_rgb
from mteditflow.rewards.judge.judge import check_images, turn_scores

try:
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel
except ImportError as error:
    raise ImportError(
        f"{__name__} needs {error.name}: pip install 'mteditflow[rewards]'"
    ) from error

TERM, BASELINE = "preference", "preference_of_reference"


class PreferenceModel(Protocol):
    """Model of human preference that scores images for prompts."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Score K images, each for the prompt of the same index: [K], float32 or float64."""
        ...


class PickScore:
    """Preference by CLIP: the cosine of image and prompt, times the model's learned logit scale.

    Args:
        model: CLIP model, fine-tuned on human preferences.
        tokenizer: tokenizer of the model.
        processor: image processor of the model.
        batch_size: images in one call of the model.

    Raises:
        ValueError: the batch size is below 1.

    Source: Pick-a-Pic (arXiv 2305.01569).
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: Any,
        processor: CLIPImageProcessorPil,
        *,
        batch_size: int = 16,
    ) -> None:
        check_count("batch_size", batch_size)
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] = "yuvalkirstain/PickScore_v1",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str = "main",
        batch_size: int = 16,
    ) -> PickScore:
        """Load a CLIP model with its tokenizer and processor.

        Args:
            path: hub id or folder.
            device: device of the model.
            dtype: dtype of its weights.
            revision: revision of the hub repository.
            batch_size: images in one call of the model.
        """
        model = CLIPModel.from_pretrained(
            path, revision=revision, dtype=dtype, use_safetensors=True
        )
        return cls(
            model.to(device).eval(),
            AutoTokenizer.from_pretrained(path, revision=revision),
            CLIPImageProcessorPil.from_pretrained(path, revision=revision),
            batch_size=batch_size,
        )

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Score images, each for its prompt.

        Args:
            images: K images of any size.
            prompts: K prompts; tokens beyond the text encoder's limit are cut.

        Returns:
            Scores [K], float32 on the CPU, higher is better; those of PickScore are about 20.

        Raises:
            ValueError: there is no image, the numbers of images and prompts differ, or an image
                cannot be read.
        """
        if not images or len(images) != len(prompts):
            raise ValueError(
                "prompts: expected one for each image, and at least one image, "
                f"got {len(prompts)} for {len(images)} images"
            )
        starts = range(0, len(images), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        return torch.cat([self._score(images[part], prompts[part]) for part in parts])

    def _score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        shown = [to_rgb(f"images[{i}]", image) for i, image in enumerate(images)]
        pixels = self.processor(images=shown, return_tensors="pt")["pixel_values"]
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        found = self.model(
            pixel_values=pixels.to(self.model.device, self.model.dtype),
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
        # CLIPModel returns normalized embeddings, so their inner product is the cosine.
        cosine = (found.image_embeds.float() * found.text_embeds.float()).sum(dim=1)
        score: Tensor = self.model.logit_scale.float().exp() * cosine
        return score.cpu()


class Preference:
    """Scorer of each turn's image, and of the reference image, for the turn's instruction.

    The score of the reference is the baseline: an editor that preserves quality stays near it.

    Args:
        model: preference model, such as ``PickScore.from_pretrained(...)``.

    Example:
        >>> def brightness(images, prompts):
        ...     return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])
        >>> chain = Chain(id="7", image="7.png", instructions=("Make it dark",))
        >>> images = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (200, 30)]
        >>> found = anyio.run(Preference(brightness).score, [chain], [images])
        >>> {name: scores.score.tolist() for name, scores in found.items()}
        {'preference': [[30.0]], 'preference_of_reference': [[200.0]]}
    """

    def __init__(self, model: PreferenceModel) -> None:
        self.model = model

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, TurnScores]:
        """Score every turn of B chains in a worker thread.

        Args:
            chains: B chains with their instructions.
            images: for each chain N + 1 images: the reference, then the result of each turn.

        Returns:
            "preference" and "preference_of_reference", each [B, N], float32.

        Raises:
            ValueError: there is no chain, its images are too few, too many or unreadable, or the
                model did not return one finite score for each image.
            TypeError: an image is not a PIL image.
        """
        shown = await anyio.to_thread.run_sync(check_images, chains, images)
        prompts = list(flatten.from_iterable(chain.instructions for chain in chains))
        made = list(flatten.from_iterable(own[1:] for own in shown))
        references = list(flatten.from_iterable([own[0]] * (len(own) - 1) for own in shown))
        # Results and references in one call, so that the model's batches are full.
        call = partial(self.model, made + references, prompts * 2)
        values = await anyio.to_thread.run_sync(call)
        check_full_precision(preference=values)
        check_shape("preference", values, (2 * len(made),), "one score for each image")
        check_values("preference", values, values.isfinite(), "a finite score")
        halves = zip((TERM, BASELINE), values.chunk(2), strict=True)
        return {name: _by_turn(chains, half.tolist()) for name, half in halves}


def _by_turn(chains: Sequence[Chain], values: Sequence[float]) -> TurnScores:
    """Arrange the values of all turns, chain after chain, as [B, N]."""
    rest = iter(values)
    turns = [range(chain.turns) for chain in chains]
    return turn_scores(chains, [[(own, tuple(islice(rest, len(own))))] for own in turns])
