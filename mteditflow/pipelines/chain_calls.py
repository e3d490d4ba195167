"""Chains of edits as calls of a pipeline: batches of rows, and the arguments of each call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn

from mteditflow._checks import check_count
from mteditflow.pipelines.embedding_store import Embedding
from mteditflow.pipelines.families import Family
from mteditflow.pipelines.prompts import Instruction, Prompts

#: Input images of each turn of a chain: "original", "last" or further images, [N][number].
Seen = Sequence[Sequence[str | Image]]
WORDS = ("original", "last")


class ChainCalls:
    """B chains of edits, to be sampled row by row or several rows at a time.

    Construction embeds every instruction once, and for Kontext encodes every reference once. Where
    the text encoder also reads the image, instructions of later turns are embedded at their turn.

    Args:
        pipeline: the pipeline, without text encoders unless its calls embed instructions.
        family: family of the pipeline.
        options: options of every call, as ``Family.call_options`` returns them.
        prompts: embeds instructions; None where the calls do.
        references: RGB images, [B]; None each for text to image.
        instructions: instructions, [B][N]; chains may differ in length.
        generators: generators of initial and step noise, [B].
        seen: input images of each turn, [B]; None: the image of the turn before.

    Raises:
        ValueError: lengths differ, a chain is empty, text to image has several turns, or a turn
            has other input images than the pipeline can take.
        TypeError: a reference is no RGB image, or text to image has a reference.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        family: Family,
        options: Mapping[str, Any],
        prompts: Prompts[Instruction] | None,
        references: Sequence[Image | None],
        instructions: Sequence[Sequence[str]],
        generators: Sequence[torch.Generator],
        seen: Sequence[Seen] | None = None,
    ) -> None:
        _check_chains(family, references, instructions, generators)
        if seen is not None:
            _check_seen(family, seen, instructions)
        self._seen = seen or [[["last"]] * len(chain) for chain in instructions]
        self._pipeline, self._family, self._prompts = pipeline, family, prompts
        self._negative = family.negative_prompt(pipeline, options)
        embedded = {"negative_prompt"} if prompts is not None else set()
        self._options = {k: v for k, v in options.items() if k not in embedded}
        self._instructions, self._generators = list(instructions), list(generators)
        self._images: list[Any] = list(references)
        self._embedded: dict[Instruction, list[Embedding]] = {}
        if prompts is not None:
            # An encoder that also reads the image can embed only turn 1 before anything is sampled.
            ahead = slice(1 if family.view else None)
            wanted = [
                self._wanted(self._given(row, turn, references[row]), text)
                for row, chain in enumerate(instructions)
                for turn, text in enumerate(chain[ahead])
            ]
            self._embedded = prompts([x for found in wanted for x in found])
        if family.latents is not None:
            self._images = self._encoded_once(references, options)
        self._kinds = [
            (image and image.size, len(chain))
            for image, chain in zip(references, instructions, strict=True)
        ]

    def parts(self, batch: int) -> Iterator[slice]:
        """Yield slices of at most ``batch`` rows in order, each of one image size and length.

        Raises:
            ValueError: ``batch`` is below 1.
        """
        check_count("batch", batch)
        start = 0
        for stop in range(1, len(self._kinds) + 1):
            full = stop - start == batch or stop == len(self._kinds)
            if full or self._kinds[stop] != self._kinds[start]:
                yield slice(start, stop)
                start = stop

    def calls(self, rows: slice) -> list[slice]:
        """Return the slices of a part, each of which takes one pipeline call per turn."""
        if self._family.takes_batch:
            return [rows]
        return [slice(row, row + 1) for row in range(rows.start, rows.stop)]

    def sample(self, rows: slice) -> list[list[Image]]:
        """Edit the chains of one slice of ``calls``; return the images after each turn, [b][N].

        Raises:
            ValueError: a call returns no images.
        """
        images: Any = self._images[rows]
        numbers = range(len(self._images))[rows]
        options, size = self._options, self._kinds[rows.start][0]
        # None asks for the reference's size; a call without such an option gives 0 here.
        if size is not None and options.get("height", 0) is None:
            options = options | self._family.own_size(self._pipeline, size)
        turns = []
        with _evaluating(self._pipeline.transformer):
            for turn, texts in enumerate(zip(*self._instructions[rows], strict=True)):
                generators = self._generators[rows]
                pairs = zip(numbers, images, strict=True)
                given = [self._given(row, turn, last) for row, last in pairs]
                output = self._pipeline(
                    generator=generators[0] if self._singly else generators,
                    **self._references(given),
                    **self._texts(texts, given),
                    **options,
                )
                images = getattr(output, "images", None)
                if not isinstance(images, list) or len(images) != len(texts):
                    raise ValueError(
                        f"pipeline: expected {len(texts)} images of a call of a "
                        f"{self._family.pipeline.__name__}, got {type(output).__name__}"
                    )
                turns.append(images)
        return [list(chain) for chain in zip(*turns, strict=True)]

    @property
    def _singly(self) -> bool:
        """Return whether a call takes one image, text and generator rather than lists of them."""
        return not self._family.takes_batch and self._family.references != "several"

    def _given(self, row: int, turn: int, last: Any) -> list[Any]:
        """Return the input images of a turn; ``last`` is the image of the turn before."""
        named = {"original": self._images[row], "last": last}
        return [named[x] if isinstance(x, str) else x for x in self._seen[row][turn]]

    def _references(self, given: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Return the keyword argument of a call for the images of all rows."""
        images = [image for row in given for image in row]
        if self._family.references == "none":
            return {}
        if isinstance(images[0], Tensor):
            return {"image": torch.cat(images)}
        return {"image": images[0] if self._singly else images}

    def _wanted(self, images: Sequence[Any], text: str) -> list[Instruction]:
        """Return an instruction, and the negative prompt if any, with the images they refer to."""
        texts = [(text, False), *([] if self._negative is None else [(self._negative, True)])]
        view = self._family.view
        shown = [] if view is None else [view(self._pipeline, image) for image in images]
        return [Instruction.about(words, *shown, negative=negative) for words, negative in texts]

    def _texts(self, texts: Sequence[str], given: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Return the keyword arguments of a call for one instruction per row.

        These are embeddings, with those of the negative prompt, or texts where calls embed.
        """
        family, prompts = self._family, self._prompts
        if prompts is None:
            return {"prompt": texts[0] if self._singly else list(texts)}
        wanted = [self._wanted(*pair) for pair in zip(given, texts, strict=True)]
        new = [x for row in wanted for x in row if x not in self._embedded]
        found = self._embedded if not new else self._embedded | prompts(new)
        options: dict[str, Any] = {}
        # Not strict: without a negative prompt ``wanted`` has one instruction per row.
        for prefix, row in zip(("", "negative_"), zip(*wanted, strict=True), strict=False):
            kinds = zip(*(found[x] for x in row), strict=True)
            for name, kind in zip(family.embeddings, kinds, strict=True):
                options[prefix + name] = _joined(kind, self._pipeline.device)
        return options

    @torch.no_grad()
    def _encoded_once(
        self, references: Sequence[Image | None], options: Mapping[str, Any]
    ) -> list[Tensor]:
        """Return the latents of each reference; equal images share one tensor."""
        encode = self._family.latents
        assert encode is not None
        images = [image for image in references if image is not None]
        keys = [(image.size, image.tobytes()) for image in images]
        distinct = dict(zip(keys, images, strict=True))
        latents = {key: encode(self._pipeline, image, options) for key, image in distinct.items()}
        return [latents[key] for key in keys]


def _joined(rows: Sequence[Embedding], device: torch.device) -> Embedding:
    """Concatenate the rows' embeddings of one kind: tensors along the batch, lists as lists."""
    first = rows[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat([x for x in rows if isinstance(x, Tensor)]).to(device)
    return [x.to(device) for row in rows if row is not None for x in row]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_chains(
    family: Family,
    references: Sequence[Image | None],
    instructions: Sequence[Sequence[str]],
    generators: Sequence[torch.Generator],
) -> None:
    for name, given in (("instructions", instructions), ("generators", generators)):
        if len(given) != len(references):
            raise ValueError(
                f"{name}: expected one entry per reference, {len(references)}, got {len(given)}"
            )
    makes, kind = family.references == "none", family.pipeline.__name__
    for row, (image, chain) in enumerate(zip(references, instructions, strict=True)):
        got = getattr(image, "mode", type(image).__name__)
        if makes and image is not None:
            raise TypeError(
                f"references: expected None for a {kind}, which makes images from texts alone, "
                f"got {got} in row {row}"
            )
        if not makes and (not isinstance(image, Image) or image.mode != "RGB"):
            raise TypeError(f"references: expected RGB images of PIL, got {got} in row {row}")
        if not chain or isinstance(chain, str):
            raise ValueError(
                f"instructions: expected a list of at least one instruction per row, got {chain!r} "
                f"in row {row}"
            )
        if makes and len(chain) > 1:
            raise ValueError(
                f"instructions: expected one turn for a {kind}, which edits no image, got "
                f"{len(chain)} in row {row}"
            )


def _check_seen(
    family: Family, seen: Sequence[Seen], instructions: Sequence[Sequence[str]]
) -> None:
    if len(seen) != len(instructions):
        raise ValueError(
            f"seen: expected one entry per reference, {len(instructions)}, got {len(seen)}"
        )
    for row, (turns, chain) in enumerate(zip(seen, instructions, strict=True)):
        if len(turns) != len(chain):
            raise ValueError(
                f"seen: expected one list for each of {len(chain)} turns, got {len(turns)} in row "
                f"{row}"
            )
        for turn, images in enumerate(turns, start=1):
            _check_turn(family, images, f"at turn {turn} in row {row}")


def _check_turn(family: Family, images: Sequence[str | Image], where: str) -> None:
    if not images or isinstance(images, str):
        raise ValueError(f"seen: expected a list of at least one image, got {images!r} {where}")
    for image in images:
        if isinstance(image, str) and image not in WORDS:
            raise ValueError(f"seen: expected 'original' or 'last', got {image!r} {where}")
        if not isinstance(image, str) and getattr(image, "mode", None) != "RGB":
            got = getattr(image, "mode", type(image).__name__)
            raise TypeError(f"seen: expected 'original', 'last' or RGB images, got {got} {where}")
    if family.references != "several" and list(images) != ["last"]:
        takes = "one reference image" if family.references == "one" else "no reference image"
        shown = [x if isinstance(x, str) else "an image" for x in images]
        raise ValueError(
            f"seen: expected ['last'] for a {family.pipeline.__name__}, which takes {takes}, got "
            f"{shown} {where}"
        )
