"""Scorers of the user's own: how one is found, and what it has to return.

A scorer is a class that ``--scorer module:name`` (of a trainer ``--rewards.scorer``) names; its
module is looked for in the current folder, too. What it must be is checked before anything is
loaded, what it returns whenever it is asked:

    import torch
    from mteditflow.rewards import BINARY, TurnScores

    class Scorer:
        scale = BINARY  # or LIKERT, or Scale(0, 10, success=8)

        async def score(self, chains, images):
            '''images[b] is [reference, turn 1, ..., turn N] of chains[b], RGB.'''
            turns = torch.tensor([len(own) - 1 for own in images])
            exists = torch.arange(int(turns.max())) < turns[:, None]
            following = torch.where(exists, 1.0, torch.nan)  # [B, N], NaN where there is no score
            return {"following": TurnScores(following, exists, {})}

For ``--rewards.regions`` it has the method ``regions`` of ``RegionScorer``, too.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from mteditflow.chains import Chain
from mteditflow.evaluation.evaluation import FOLLOWING, check_consistency
from mteditflow.rewards import Scale, TurnScores

from .config import ConfigError

TERMS = (None, "features", "l1")
PROGRAM_ENDS = (Exception, SystemExit)  # of a user's code, which must not end a command


class ScorerError(ValueError):
    """A scorer fails, or does not return what it has to."""


class Scorer(Protocol):
    """Scorer of chains; ``--rewards.scorer module:name`` names a class of it.

    The class takes no arguments. It declares the scale of its "following" scores as ``scale``, such
    as ``mteditflow.rewards.LIKERT``, ``BINARY`` or ``Scale(0, 10, success=8)``. It is a class
    attribute, so that the threshold of success is checked before anything is loaded. "consistency",
    and its parts "object" and "background", are in [0, 1]; a class that declares
    ``consistency_terms = "features"`` gives cosines in [-1, 1].

    A class that knows where edits are may have the static method ``edited_pixels(chain,
    reference)``: pixels that each turn of a chain may change, boolean [N, H, W]. The trainer then
    watches the change of the others; it never trains.
    """

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image | None]]
    ) -> Mapping[str, TurnScores]:
        """Score every turn of B chains.

        Args:
            chains: their records.
            images: of each the reference and what each turn made, RGB; the reference is None for
                text to image.

        Returns:
            Scores by name, each [B, N], N turns of the longest; "following" among them. The
            ``turn_mask`` holds the turns that were made.
        """


def named_scorer(path: str) -> type[Scorer]:
    """Import the scorer's class that a path names, from the current folder if it is nowhere else.

    Raises:
        ConfigError: there is none, its module cannot be imported, or it is no such class.
    """
    name, colon, attribute = path.partition(":")
    if not (name and colon and attribute) or name.startswith("."):
        raise ConfigError(f"rewards.scorer: expected module:name, got {path!r}")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # last, so that it hides nothing that is installed
    try:
        module = importlib.import_module(name)
    except PROGRAM_ENDS as error:
        raise ConfigError(
            f"rewards.scorer: expected module:name, got {path!r}: import {name} ends in "
            f"{_described(error)}"
        ) from error
    scorer = getattr(module, attribute, None)
    if scorer is None:
        raise ConfigError(
            f"rewards.scorer: expected module:name, got {path!r}: {name} has no {attribute!r}"
        )
    _check_class(path, scorer)
    return scorer  # type: ignore[no-any-return]  # checked above


def make_scorer(path: str) -> Scorer:
    """Make the scorer that a path names; what it returns is not checked yet.

    Raises:
        ConfigError: there is none.
        ScorerError: its constructor raises.
    """
    try:
        return named_scorer(path)()
    except ConfigError:
        raise
    except PROGRAM_ENDS as error:
        raise ScorerError(
            f"rewards.scorer: expected {path} to be made without arguments, got {_described(error)}"
        ) from error


def declared_scale(path: str) -> Scale | None:
    """Return the scale that a scorer's class declares, if it does.

    Raises:
        ConfigError: there is no such class, or it declares something else.
    """
    scale = getattr(named_scorer(path), "scale", None)
    if scale is not None and not isinstance(scale, Scale):
        raise ConfigError(
            f"rewards.scorer: expected the scale of {path} to be a mteditflow.rewards.Scale, such "
            f"as BINARY or LIKERT, got {scale!r}"
        )
    return scale


def consistency_terms(path: str) -> str | None:
    """Return what a scorer's class declares its consistency to compare, if it does.

    Raises:
        ConfigError: there is no such class, or it declares something else.
    """
    terms = getattr(named_scorer(path), "consistency_terms", None)
    if terms not in TERMS:
        raise ConfigError(
            f"rewards.scorer: expected consistency_terms of {path} to be one of {list(TERMS)}, "
            f"got {terms!r}"
        )
    return terms


class RegionScorer(Scorer, Protocol):
    """Scorer that says where in a picture its rewards are decided, for ``--rewards.regions``."""

    async def regions(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image | None]]
    ) -> Mapping[str, Tensor]:
        """Find the regions of every turn of B chains.

        Args:
            chains: as in ``score``.
            images: as in ``score``, all of one size, H x W pixels.

        Returns:
            Name of a reward to the share of each pixel that lies in its region, [B, N, H, W] in
            [0, 1], or booleans. A turn without any pixel counts everywhere, as does a reward
            without an entry. ``mteditflow.box_coverage(boxes, (H, W), 1)`` makes them of boxes.
        """


def edited_pixels(path: str | None, chain: Chain, reference: Image) -> Tensor | None:
    """Return the pixels that each turn of a chain may change, as a scorer's class gives them.

    Args:
        path: import path of the scorer; None: there is none.
        chain: record of N turns.
        reference: image of H x W pixels that the first one edits.

    Returns:
        Boolean [N, H, W]; None where the class has no method ``edited_pixels``.

    Raises:
        ScorerError: the method raises, or returns something else.
    """
    method = None if path is None else getattr(named_scorer(path), "edited_pixels", None)
    if method is None:
        return None
    expected = (chain.turns, reference.height, reference.width)
    try:
        masks = torch.as_tensor(method(chain, reference), device="cpu")
    except PROGRAM_ENDS as error:
        raise ScorerError(
            f"rewards.scorer: expected masks of {path}.edited_pixels, got {_described(error)}"
        ) from error
    if masks.dtype != torch.bool or tuple(masks.shape) != expected:
        raise ScorerError(
            f"rewards.scorer: expected {path}.edited_pixels to return booleans {list(expected)}, "
            f"got {masks.dtype} {list(masks.shape)}"
        )
    return masks


class CheckedScorer:
    """A scorer of the user's own, whose scores are refused where they are none.

    Args:
        path: its import path, for messages.
        scale: of "following".
        bounds: range of consistency, as ``JudgedBy.consistency_range`` returns it.
    """

    def __init__(self, path: str, scale: Scale, bounds: tuple[float, float]) -> None:
        self._path, self._scale, self._bounds = path, scale, bounds
        self._scorer = make_scorer(path)

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image]]
    ) -> Mapping[str, TurnScores]:
        """See ``Scorer``.

        Raises:
            ScorerError: the scorer raises, "following" is missing, a score is off its scale, or
                they are not scores of these chains and turns.
        """
        found = await self._asked("score", "score", chains, images)
        try:
            self._check(found, [len(own) - 1 for own in images])
        except (ValueError, TypeError) as error:
            raise ScorerError(f"rewards.scorer: {self._path} returned {error}") from error
        checked: Mapping[str, TurnScores] = found
        return checked

    async def regions(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image]]
    ) -> Mapping[str, Tensor]:
        """See ``RegionScorer``.

        Raises:
            ScorerError: the scorer raises, or does not return regions of these pictures.
        """
        found = await self._asked("find regions of", "regions", chains, images)
        width, height = images[0][-1].size
        expected = (len(images), max(map(len, images)) - 1, height, width)
        try:
            _check_regions(found, expected)
        except (ValueError, TypeError) as error:
            raise ScorerError(f"rewards.scorer: {self._path} returned {error}") from error
        return {name: region.float() for name, region in found.items()}

    async def _asked(
        self,
        what: str,
        method: str,
        chains: Sequence[Chain],
        images: Sequence[Sequence[Image]],
    ) -> Any:
        """Return what a method of the scorer returns.

        Raises:
            ScorerError: it raises.
        """
        try:
            return await getattr(self._scorer, method)(chains, images)
        except (*PROGRAM_ENDS, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _told_to_stop():
                raise
            raise ScorerError(
                f"rewards.scorer: expected {self._path} to {what} {len(chains)} chains, got "
                f"{_described(error)}"
            ) from error

    def _check(self, found: object, turns: Sequence[int]) -> None:
        """Raise unless these are scores by name, each of those turns, on their scales."""
        if not isinstance(found, Mapping):
            raise TypeError(f"scores: expected a dictionary of TurnScores, got {_kind(found)}")
        if FOLLOWING not in found:
            raise ValueError(f"scores: expected {FOLLOWING!r} among them, got {list(found)}")
        count = torch.tensor(turns, device="cpu")
        expected = torch.arange(max(turns), device="cpu") < count[:, None]
        for name, scores in found.items():
            if not isinstance(scores, TurnScores):
                raise TypeError(f"{name}: expected TurnScores(score, turn_mask, lost), got "
                                f"{_kind(scores)}")  # fmt: skip
            if not torch.equal(scores.turn_mask.cpu(), expected):
                shape = list(scores.turn_mask.shape)
                raise ValueError(
                    f"{name}: expected scores {list(expected.shape)} with the turns "
                    f"{_short(turns)} of each chain, got {shape} with "
                    f"{_short(scores.turn_mask.sum(dim=1).tolist())}"
                )
        try:
            self._scale.check(FOLLOWING, found[FOLLOWING].score)
        except ValueError as error:
            name = self._path.partition(":")[2]
            raise ValueError(f"{error}; {name} declares the scale {self._scale}") from error
        check_consistency(found, self._bounds)


def require_regions(path: str) -> None:
    """Refuse a scorer's class without the method that ``rewards.regions`` calls.

    Raises:
        ConfigError: there is no such class, or it has no such method.
    """
    method = inspect.unwrap(getattr(named_scorer(path), "regions", None) or _kind)
    if not inspect.iscoroutinefunction(method):
        raise ConfigError(
            f"rewards.regions: expected a scorer with the method async def regions(self, chains, "
            f"images), got {path} without"
        )


def _check_regions(found: object, expected: tuple[int, ...]) -> None:
    """Raise unless these are regions by name, of pictures of the expected shape [B, N, H, W]."""
    if not isinstance(found, Mapping) or not found:
        raise TypeError(f"regions: expected a dictionary of tensors, got {_kind(found)}")
    for name, region in found.items():
        if not isinstance(region, Tensor) or region.is_complex():
            raise TypeError(f"regions[{name!r}]: expected a tensor, got {_kind(region)}")
        if tuple(region.shape) != expected:
            shapes = f"{list(expected)}, got {list(region.shape)}"
            raise ValueError(f"regions[{name!r}]: expected [B, N, H, W] = {shapes}")
        if not bool(((region >= 0) & (region <= 1)).all()):
            raise ValueError(f"regions[{name!r}]: expected shares in [0, 1], got others")


def _check_class(path: str, scorer: object) -> None:
    """Raise ConfigError unless this is a class that can be made and has an async method score."""
    if not isinstance(scorer, type):
        raise ConfigError(f"rewards.scorer: expected a class, got {path}, {_kind(scorer)}")
    method = inspect.unwrap(getattr(scorer, "score", None) or _kind)
    if not inspect.iscoroutinefunction(method):
        raise ConfigError(
            f"rewards.scorer: expected a class with the method async def score(self, chains, "
            f"images), got {path} without"
        )
    try:
        inspect.signature(scorer).bind()
    except TypeError as error:
        raise ConfigError(
            f"rewards.scorer: expected a class that takes no arguments, got {path}: {error}"
        ) from error
    except ValueError:  # it has no signature to look at
        return


def _described(error: BaseException) -> str:
    """Name an exception of a user's code, and the place of that code that raised it."""
    if isinstance(error, SyntaxError):  # says its place itself
        return f"SyntaxError: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    place = next((x for x in reversed(frames) if not x.filename.startswith("<")), None)
    where = "" if place is None else f" ({Path(place.filename).name}, line {place.lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _told_to_stop() -> bool:
    """Whether a cancellation is asked of this task, not raised by the code that runs in it."""
    task = asyncio.current_task()
    return not hasattr(task, "cancelling") or bool(task.cancelling())  # Python 3.10: not known


def _kind(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:60]}"


def _short(turns: Sequence[int], most: int = 8) -> str:
    return f"[{', '.join(map(str, turns[:most]))}{', ...' * (len(turns) > most)}]"
