"""Provenance of an evaluation: the judge and its settings, and the origin of the images.

Numbers of different judges are not comparable, since another model, prompt or scale gives other
values to the same images. So every report names its judge, and ``compare`` refuses evaluations of
different judges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict

from mteditflow._hashes import DIGITS
from mteditflow._hashes import content_hash as content_hash
from mteditflow._text import parse_json
from mteditflow.rewards.scale import COSINE, SHARE, Scale

if TYPE_CHECKING:
    from mteditflow.rewards.judge.prompts import Prompt, Request

UNKNOWN, NONE = "unknown", "none"
LATE = ("judge_server", "consistency_server", "editor_hash", "lora_hash")  # may be filled in later


class JudgedBy(BaseModel):
    """Judge and settings: everything that a score depends on, apart from the images.

    A field is ``None`` if it does not apply, or if a server does not report its identity. If none
    of ``judge``, ``scorer`` and ``terms`` is set, the judge is unknown.

    Attributes:
        scorer: import path of the user's own scorer, with a hash of its code.
        judge: name of the judge's model on its endpoints.
        judge_server: identity that the server reports, as ``judge_identity`` returns it.
        prompt: version of the judge's prompt, a hash of its text, as ``prompt_version`` returns it.
        request: options of the requests that differ from their defaults, as JSON.
        scope: extent of one call of the judge, "turn" or "trajectory".
        scale: range of the scores and threshold of success.
        checks: kind of the check of success: "question", or "edival" by edit type.
        detector: detector of objects for these checks.
        text_reader: reader of text for these checks; ``None`` is the judge.
        consistency_server: identity that the server of content consistency reports.
        terms: quantity that consistency compares: "features", whose cosine is in [-1, 1], or "l1";
            for a user's scorer, its ``consistency_terms``.
        pairing: choice of the image that a turn's image is compared with.
        preference: model of human preference.
        destroyed_below: consistency below which a turn counts as destroyed.

    Example:
        >>> JudgedBy(judge="a", scope="turn").differences(JudgedBy(judge="b", scope="turn"))
        ["judge: 'a' and 'b'"]
        >>> JudgedBy().known
        False
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scorer: str | None = None
    judge: str | None = None
    judge_server: str | None = None
    prompt: str | None = None
    request: str | None = None
    scope: str | None = None
    scale: Scale | None = None
    checks: str | None = None
    detector: str | None = None
    text_reader: str | None = None
    consistency_server: str | None = None
    terms: str | None = None
    pairing: str | None = None
    preference: str | None = None
    destroyed_below: float | None = None

    @property
    def known(self) -> bool:
        """Whether the judge is known."""
        return any(x is not None for x in (self.judge, self.scorer, self.terms))

    @property
    def consistency_range(self) -> tuple[float, float]:
        """Range of content consistency and its parts, [low, high].

        [-1, 1] for features, whose cosines may be negative, and for an unknown judge; else [0, 1].

        Example:
            >>> JudgedBy(scorer="mine:Scorer").consistency_range
            (0.0, 1.0)
        """
        return COSINE if self.terms == "features" or not self.known else SHARE

    def differences(self, other: JudgedBy) -> list[str]:
        """Return one text for each field that differs, with both values."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in _names(self))
        return [f"{name}: {_quoted(a)} and {_quoted(b)}" for name, a, b in pairs if a != b]

    def __str__(self) -> str:
        stated = {name: value for name, value in _stated(self).items() if value != NONE}
        return ", ".join(f"{name} {value}" for name, value in stated.items()) or UNKNOWN


class MadeBy(BaseModel):
    """Origin of the images; a field is ``None`` if it does not apply or is unknown.

    Attributes:
        editor: path or hub id of the pipeline.
        editor_hash: hash of its files, as ``content_hash`` returns it.
        lora: path or hub id of the LoRA.
        lora_hash: hash of its files.
        dtype: dtype of the weights.
        seed: seed of the noise.
        steps: denoising steps of a turn.
        guidance: guidance scale.
        resolution: side of the square that references are fitted into, in pixels.
        call: further options of every call, as JSON.
        images: folder of images that came from another program.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    editor: str | None = None
    editor_hash: str | None = None
    lora: str | None = None
    lora_hash: str | None = None
    dtype: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    resolution: int | None = None
    call: str | None = None
    images: str | None = None


class Provenance(BaseModel):
    """Judge of an evaluation, and origin of its images.

    Example:
        >>> Provenance(judged_by=JudgedBy(judge="m"), made_by=MadeBy(seed=3)).stated["seed"]
        '3'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    judged_by: JudgedBy = JudgedBy()
    made_by: MadeBy = MadeBy()

    def agreed(self, other: Provenance) -> Provenance:
        """Merge two records of the same evaluation; see the function ``agreed``.

        Raises:
            ValueError: a field differs; the message has its name and both values.
        """
        return Provenance(
            judged_by=agreed(self.judged_by, other.judged_by),
            made_by=agreed(self.made_by, other.made_by),
        )

    @property
    def stated(self) -> dict[str, str]:
        """Every field as text: "unknown" if nothing is known, "none" if it has no value."""
        return _stated(self.judged_by) | _stated(self.made_by)


def require_same_judge(before: JudgedBy, after: JudgedBy, *, known: bool) -> None:
    """Check that two evaluations have the same judge.

    Args:
        before: judge of the first evaluation.
        after: judge of the second evaluation.
        known: whether to refuse two unknown judges as well.

    Raises:
        ValueError: the judges differ, only one of them is known, or neither is and ``known`` is
            set; the message names every field that differs.
    """
    if before == after and (before.known or not known):  # two unknown judges may differ
        return
    if before.known and after.known:
        differ = "; ".join(before.differences(after))
    else:
        differ = " and ".join(str(x) if x.known else UNKNOWN for x in (before, after))
    raise ValueError(
        f"judged_by: expected evaluations of one judge, got {differ}. Numbers of different judges "
        "cannot be compared; --across-judges (across_judges=True) does it all the same"
    )


def noise_of_both(before: MadeBy, after: MadeBy) -> str:
    """Return text on whether two evaluations edited each chain from the same seed of the noise.

    Example:
        >>> noise_of_both(MadeBy(editor="a", seed=0), MadeBy(editor="b", seed=0))
        'from the same seeds of the noise'
        >>> noise_of_both(MadeBy(editor="a", seed=0), MadeBy(images="made"))
        'without a record of common noise'
    """
    if before.images is not None and before.images == after.images:
        return "on the same images"
    if None in (before.editor, after.editor):
        return "without a record of common noise"
    # The trainer's key of the noise is an option of the call.
    keys = [(x.seed, '"noise": "row"' in (x.call or "")) for x in (before, after)]
    return f"from {'the same' if keys[0] == keys[1] else 'other'} seeds of the noise"


def prompt_version(prompt: Prompt) -> str:
    """Return a hash of a prompt's full text, rendered for two turns of a fixed chain.

    Example:
        >>> from mteditflow.rewards import JudgePrompt
        >>> prompt_version(JudgePrompt(scale="likert")) == prompt_version(JudgePrompt())
        True
        >>> prompt_version(JudgePrompt(scale="binary")) == prompt_version(JudgePrompt())
        False
    """
    words, images = ("Instruction A", "Instruction B"), ("image:0", "image:1", "image:2")
    spans = prompt.spans(len(words))
    return version_of(
        prompt.request(words[x.start : x.stop], images[x.start : x.stop + 1]) for x in spans
    )


def version_of(requests: Iterable[Request]) -> str:
    """Return a hash of the text, schema and number of log-probabilities of requests."""
    return json_hash([(x.content, x.schema, x.top_logprobs) for x in requests])


def json_hash(said: object) -> str:
    """Return a hash of a value of JSON types, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:DIGITS]


Record = TypeVar("Record", JudgedBy, MadeBy)


def agreed(old: Record, new: Record) -> Record:
    """Merge two records of the same judge or images.

    Only the fields of ``LATE``, which a server or a hub supplies, may be missing in one of them.

    Args:
        old: the first record.
        new: the second record.

    Raises:
        ValueError: a field differs; the message has its name and both values.

    Example:
        >>> found = agreed(JudgedBy(judge="m"), JudgedBy(judge="m", judge_server="vllm 1"))
        >>> found.judge_server
        'vllm 1'
        >>> agreed(MadeBy(seed=0), MadeBy(seed=1))
        Traceback (most recent call last):
        ValueError: seed = '0', got '1'
    """
    late = {}
    for name in _names(old):
        before, value = getattr(old, name), getattr(new, name)
        # A server that was down, or a hub that was not reached, leaves its field empty.
        if name in LATE and None in (before, value):
            late[name] = before or value
        elif before != value:
            raise ValueError(f"{name} = {_quoted(before)}, got {_quoted(value)}")
    return old.model_copy(update=late)


def same_judge(path: Path, judge: JudgedBy) -> JudgedBy:
    """Return the judge, with the identity that an earlier file of its scores records.

    Args:
        path: JSON file whose key "judged_by" holds a ``JudgedBy``; it need not exist.
        judge: the present judge.

    Raises:
        ValueError: the scores of the file are of another or an unknown judge.

    Example:
        >>> same_judge(Path("none.json"), JudgedBy(judge="m")).judge
        'm'
    """
    if not path.exists():
        return judge
    try:
        old = JudgedBy.model_validate(parse_json(path.read_bytes())["judged_by"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: by an unknown judge: choose another --output") from error
    try:
        return agreed(old, judge)
    except ValueError as error:
        raise ValueError(f"{path}: scores of {error}: choose another --output") from error


def _names(record: BaseModel) -> Sequence[str]:
    return tuple(type(record).model_fields)


def _stated(record: JudgedBy | MadeBy) -> dict[str, str]:
    """Return the values of a record as text."""
    values = {name: getattr(record, name) for name in _names(record)}
    known = (
        record.known
        if isinstance(record, JudgedBy)
        else any(x is not None for x in values.values())
    )
    absent = NONE if known else UNKNOWN
    return {name: absent if x is None else str(x) for name, x in values.items()}


def _quoted(value: object) -> str:
    return NONE if value is None else repr(str(value))
