"""Custom scorers: how a class is imported, and what its methods must return.

A scorer is a class named by ``--scorer module:name`` (in a trainer ``--rewards.scorer``); modules
in the current folder are found, too. The class is checked before models are loaded, and its
results after each call. A minimal scorer:

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

``--rewards.regions`` also needs the method ``regions`` of ``RegionScorer``.
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

PROGRAM_ENDS = (Exception, SystemExit)  # a custom scorer must not end the program by sys.exit


class ScorerError(ValueError):
    """A scorer raises, or returns invalid scores.

    Attributes:
        everywhere: whether every rank raises it, so that collective calls may follow.
    """

    everywhere = False


class Scorer(Protocol):
    """Protocol of a custom scorer, whose class is given by ``--rewards.scorer module:name``.

    The class takes no arguments. Its class attribute ``scale`` is the scale of its "following"
    scores, such as ``mteditflow.rewards.LIKERT``, ``BINARY`` or ``Scale(0, 10, success=8)``; the
    threshold of success is checked against it before models are loaded. "consistency", and its
    parts "object" and "background", are in [0, 1], or cosines in [-1, 1] if the class has
    ``consistency_terms = "features"``.

    A class may declare the names of its scores as the class attribute ``terms``. Weights of other
    names are then refused before models are loaded, and other scores when they are returned. A
    ``mteditflow.evaluation.TurnScorer`` has to declare them.

    A class that can locate edits may have the static method ``edited_pixels(chain, reference)``,
    which returns the pixels that each turn of a chain may change, boolean [N, H, W]. The trainer
    then monitors changes of all other pixels; they do not affect training.
    """

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image | None]]
    ) -> Mapping[str, TurnScores]:
        """Score every turn of B chains.

        Args:
            chains: records of the chains.
            images: reference and result of each turn, RGB, for each chain; the reference is None
                for text to image.

        Returns:
            Scores by name, "following" among them, each [B, N] with N turns of the longest chain.
            ``turn_mask`` marks the turns that exist.
        """


def named_scorer(path: str) -> type[Scorer]:
    """Import the scorer class ``module:name``; installed modules precede the current folder.

    Raises:
        ConfigError: the module cannot be imported, or has no such scorer class.
    """
    name, colon, attribute = path.partition(":")
    if not (name and colon and attribute) or name.startswith("."):
        raise ConfigError(f"rewards.scorer: expected module:name, got {path!r}")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # last, so that local files shadow no installed module
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
    """Return an instance of the scorer class ``module:name``, without checks of its results.

    Raises:
        ConfigError: the class does not exist.
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


class RegionScorer(Scorer, Protocol):
    """Scorer that also locates its rewards in the image, for ``--rewards.regions``."""

    async def regions(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image | None]]
    ) -> Mapping[str, Tensor]:
        """Return the regions of every turn of B chains.

        Args:
            chains: as in ``score``.
            images: as in ``score``, all of one size, H x W pixels.

        Returns:
            Regions by reward name: share of each pixel inside the region, [B, N, H, W] in [0, 1],
            or booleans. An empty region counts as the whole image, and so does a reward without an
            entry. ``mteditflow.box_coverage(boxes, (H, W), 1)`` converts boxes.
        """


def edited_pixels(path: str | None, chain: Chain, reference: Image) -> Tensor | None:
    """Return the pixels that each turn of a chain may change, from the scorer's class.

    Args:
        path: import path of the scorer; None: no custom scorer.
        chain: record of N turns.
        reference: input image of turn 1, H x W pixels.

    Returns:
        Boolean [N, H, W]; None if the class has no method ``edited_pixels``.

    Raises:
        ScorerError: the method raises, or returns another shape or dtype.
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
    """Custom scorer with checked results.

    Args:
        path: import path of the scorer's class, also used in messages.
        scale: scale of "following".
        bounds: range of consistency, as returned by ``JudgedBy.consistency_range``.
        terms: names of the scores; None: any, with "following" among them.
    """

    def __init__(
        self,
        path: str,
        scale: Scale,
        bounds: tuple[float, float],
        terms: Sequence[str] | None = None,
    ) -> None:
        self._path, self._scale, self._bounds, self._terms = path, scale, bounds, terms
        self._scorer = make_scorer(path)

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image]]
    ) -> Mapping[str, TurnScores]:
        """See ``Scorer``.

        Raises:
            ScorerError: the scorer raises, "following" is missing, a score is outside its scale,
                or the scores are not of these chains and turns.
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
            ScorerError: the scorer raises, or its regions do not fit these images.
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
        """Await a method of the scorer and return its result.

        Raises:
            ScorerError: the method raises.
        """
        try:
            return await getattr(self._scorer, method)(chains, images)
        except (*PROGRAM_ENDS, asyncio.CancelledError) as error:
            # A cancellation of this task must propagate; one that the scorer's code raises itself
            # would pass as a cancelled future, and hide the scorer's error.
            if isinstance(error, asyncio.CancelledError) and _told_to_stop():
                raise
            raise ScorerError(
                f"rewards.scorer: expected {self._path} to {what} {len(chains)} chains, got "
                f"{_described(error)}"
            ) from error

    def _check(self, found: object, turns: Sequence[int]) -> None:
        """Raise unless ``found`` has scores by name, for exactly these turns, within their scales.

        Raises:
            TypeError: ``found`` is no dictionary of ``TurnScores``.
            ValueError: "following" is missing, names are not those of ``terms``, turns differ, or a
                score is outside its scale.
        """
        if not isinstance(found, Mapping):
            raise TypeError(f"scores: expected a dictionary of TurnScores, got {_kind(found)}")
        if FOLLOWING not in found:
            raise ValueError(f"scores: expected {FOLLOWING!r} among them, got {list(found)}")
        if self._terms is not None and set(found) != set(self._terms):
            raise ValueError(
                f"scores: expected those of its terms, {list(self._terms)}, got {list(found)}"
            )
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
    """Refuse a scorer class without the async method ``regions``.

    Raises:
        ConfigError: the class does not exist, or lacks the method.
    """
    method = inspect.unwrap(getattr(named_scorer(path), "regions", None) or _kind)
    if not inspect.iscoroutinefunction(method):
        raise ConfigError(
            f"rewards.regions: expected a scorer with the method async def regions(self, chains, "
            f"images), got {path} without"
        )


def _check_regions(found: object, expected: tuple[int, ...]) -> None:
    """Raise unless ``found`` has regions by name, of shape [B, N, H, W] and values in [0, 1]."""
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
    """Raise ConfigError unless ``scorer`` is a class without arguments, with an async ``score``."""
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
    except ValueError:  # classes in C may have no signature to inspect
        return


def _described(error: BaseException) -> str:
    """Return type, message and source line of an exception raised by a custom scorer."""
    if isinstance(error, SyntaxError):  # its message already has the line
        return f"SyntaxError: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    place = next((x for x in reversed(frames) if not x.filename.startswith("<")), None)
    where = "" if place is None else f" ({Path(place.filename).name}, line {place.lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _told_to_stop() -> bool:
    """Whether this task was cancelled, rather than the code in it raising CancelledError."""
    task = asyncio.current_task()
    # Python 3.10 has no Task.cancelling: there every cancellation counts as one of the task.
    return not hasattr(task, "cancelling") or bool(task.cancelling())


def _kind(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:60]}"


def _short(turns: Sequence[int], most: int = 8) -> str:
    return f"[{', '.join(map(str, turns[:most]))}{', ...' * (len(turns) > most)}]"
