"""Messages between the consistency server and its client: JSON, with images as base64.

Bounds that all servers share are part of the messages; configurable ones are in ``Limits``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.config import JsonDict

from mteditflow.rewards.consistency.pairs import Pair, PairScores
from mteditflow.rewards.consistency.regions import SIZE
from mteditflow.rewards.faults import AnswerError, Fault
from mteditflow.rewards.images import png_base64, to_rgb
from mteditflow.rewards.transport.http_client import SHOWN, shorten

MAX_IMAGES = 65  # images of one chain: 64 turns and the reference
MAX_PAIRS = 64  # pairs of one chain
MAX_NAMES = 64  # names in one list
MAX_NAME = 200  # characters of a name

# Pydantic's error types for a number out of range, and for a value that is not a number.
OUT_OF_RANGE = ("greater_than_equal", "less_than_equal")
NOT_A_NUMBER = ("finite_number", "float_type", "float_parsing")

PIXEL = png_base64(Image.new("RGB", (1, 1), (200, 30, 30)))
EXAMPLE_PAIR: JsonDict = {
    "source": 0,
    "edited": 1,
    "unchanged_objects": ["dog"],
    "all_objects": ["dog", "cat"],
    "background": True,
}

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME, pattern=r"\S")]
Names = Annotated[tuple[Name, ...], Field(max_length=MAX_NAMES)]
Index = Annotated[int, Field(ge=0, lt=MAX_IMAGES, strict=True)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PairRequest(Pair):
    """Two images of a chain, with the objects that must look the same in both."""

    source: Annotated[Index, Field(description="Index of the image to compare with.")]
    edited: Annotated[Index, Field(description="Index of the image that is scored.")]
    unchanged_objects: Annotated[
        Names, Field(description="Objects that must look the same; none: no object term.")
    ] = ()
    all_objects: Annotated[
        Names, Field(description="Objects that are not background; none: no background term.")
    ] = ()


class ConsistencyRequest(BaseModel):
    """One chain: its images, and the pairs to score among them.

    Attributes:
        images: base64 of PNG (up to 8 bits a channel) or lossless WebP files; a data URL is not
            accepted.
        pairs: each names two of the images by index.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={"examples": [{"images": [PIXEL, PIXEL], "pairs": [EXAMPLE_PAIR]}]},
    )

    images: Annotated[
        tuple[Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})], ...],
        Field(
            min_length=1,
            max_length=MAX_IMAGES,
            description="Base64 of PNG (up to 8 bits a channel) or lossless WebP files.",
        ),
    ]
    pairs: Annotated[
        tuple[PairRequest, ...],
        Field(
            min_length=1,
            max_length=MAX_PAIRS,
            description="Indices of images to compare, and the objects that must look the same.",
        ),
    ]

    @model_validator(mode="after")
    def _indices_in_range(self) -> ConsistencyRequest:
        for n, pair in enumerate(self.pairs):
            for name in ("source", "edited"):
                if getattr(pair, name) >= len(self.images):
                    raise ValueError(
                        f"pairs[{n}].{name}: expected an index of one of the {len(self.images)} "
                        f"images, got {getattr(pair, name)}"
                    )
        return self


class ConsistencyAnswer(BaseModel):
    """Scores of the pairs, in the order of the request.

    Attributes:
        pairs: one entry for each requested pair.
        scorer: identity of the scorer, as ``GET /v1/info`` returns it.
    """

    model_config = ConfigDict(frozen=True)

    pairs: tuple[PairScores, ...]
    scorer: str


class Limits(BaseModel):
    """Limits of one server.

    Attributes:
        max_body: bytes of a request; a larger one gets 413.
        max_pixels: pixels of one image, by its header; a larger one gets 413.
        max_total_pixels: pixels of all images of a request together, likewise. Decoding time
            depends on pixels, however few bytes they compress to.
        max_requests: requests at once, from the first byte to the answer; more get 503 and
            Retry-After.
        max_batch: chains that are scored together.
        max_wait: longest wait of an idle server for further chains to score together, s.
        read_timeout: longest time for the body of a request to arrive, s; then it gets 408.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_body: Count = 2**25
    max_pixels: Count = 2**24
    max_total_pixels: Count = MAX_IMAGES * 2**20
    max_requests: Count = 256
    max_batch: Count = 8
    max_wait: Seconds = 0.005
    read_timeout: Seconds = 60.0


class Info(BaseModel):
    """Scorer and models of a server.

    Attributes:
        scorer: identity of models and settings, equal for servers whose scores are equal.
        models: classes, settings and weights of the models.
        versions: versions of the libraries.
        limits: limits of requests and batches.
    """

    model_config = ConfigDict(frozen=True)

    scorer: Annotated[str, Field(min_length=1)]
    models: dict[str, Any]
    versions: dict[str, str]
    limits: Limits


class Health(BaseModel):
    """Whether a server can score now."""

    status: Annotated[str, Field(description="loading, ready, stopping or broken")]


class ErrorAnswer(BaseModel):
    """Error message."""

    detail: str


def to_send(name: str, image: Image.Image) -> Image.Image:
    """Convert an image to RGB, and shrink it to the size at which images are compared.

    Scores do not change by a single bit, since a scorer would resample the image in the same way.

    Args:
        name: name of the image in error messages.
        image: image of any 8-bit mode.

    Raises:
        TypeError: it is not a PIL image.
        ValueError: as in ``to_rgb``.

    Example:
        >>> to_send("image", Image.new("L", (1024, 768))).size
        (512, 512)
        >>> to_send("image", Image.new("L", (64, 48))).size
        (64, 48)
    """
    rgb = to_rgb(name, image)
    if rgb.width * rgb.height <= SIZE * SIZE:  # fewer pixels to send; the scorer enlarges them
        return rgb
    return rgb.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def read_answer(body: bytes, pairs: Sequence[Pair], scorer: str) -> tuple[PairScores, ...]:
    """Parse a server's answer about some pairs.

    Args:
        body: JSON of a ``ConsistencyAnswer``.
        pairs: requested pairs.
        scorer: expected identity of the models.

    Raises:
        AnswerError: the answer is malformed, has another number of pairs, a score that is out of
            range, not a number or not requested, or comes from other models.

    Example:
        >>> pair = Pair(source=0, edited=1, unchanged_objects=("dog",))
        >>> read_answer(b'{"scorer": "a", "pairs": [{"object": 0.5}, {}]}', [pair], "a")
        Traceback (most recent call last):
        mteditflow.rewards.faults.AnswerError: wrong number of scores: expected 1 pairs, got 2
    """
    try:
        answer = ConsistencyAnswer.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error, body) from error
    if answer.scorer != scorer:
        raise AnswerError(
            Fault.malformed,
            f"expected scores of the models {shorten(scorer)}, got those of other models, "
            f"{shorten(answer.scorer)}: endpoints must serve the same",
        )
    if len(answer.pairs) != len(pairs):
        raise AnswerError(
            Fault.wrong_count, f"expected {len(pairs)} pairs, got {len(answer.pairs)}"
        )
    for n, (pair, scores) in enumerate(zip(pairs, answer.pairs, strict=True)):
        if extra := _unrequested(pair, scores):
            raise AnswerError(Fault.malformed, f"pairs[{n}]: expected no {extra}, got a score")
    return answer.pairs


def _unrequested(pair: Pair, scores: PairScores) -> str | None:
    """Return a term that has a score and was not requested."""
    terms = scores.model_dump(exclude_none=True)
    requested = {
        "object": bool(pair.unchanged_objects),
        "background": pair.background and bool(pair.all_objects),
    }
    return next((term for term in terms if not requested[term.removesuffix("_l1")]), None)


def _explain(error: ValidationError, body: bytes) -> AnswerError:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] in OUT_OF_RANGE:
        return AnswerError(Fault.out_of_range, f"{place}: {first['msg']}, got {first['input']}")
    if first["type"] in NOT_A_NUMBER:
        came = shorten(repr(first["input"]))
        return AnswerError(Fault.not_a_number, f"{place}: {first['msg']}, got {came}")
    came = shorten(body[:SHOWN].decode(errors="replace")) or "an empty body"
    return AnswerError(Fault.malformed, f"expected scores of pairs, got {came}")
