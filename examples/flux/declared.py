"""Class attributes of a custom scorer: scale, terms, range of consistency; read at the start."""

from __future__ import annotations

from collections.abc import Iterable

from mteditflow.evaluation import TurnScorer
from mteditflow.evaluation.evaluation import FOLLOWING
from mteditflow.rewards import Scale

from .config import IDENTITY, Config, ConfigError
from .scorers import named_scorer

TERMS = (None, "features", "l1")


def declared_scale(path: str) -> Scale | None:
    """Return the class attribute ``scale`` of a scorer; None if it has none.

    Raises:
        ConfigError: the class does not exist, or the attribute is no ``Scale``.
    """
    scale = getattr(named_scorer(path), "scale", None)
    if scale is not None and not isinstance(scale, Scale):
        raise ConfigError(
            f"rewards.scorer: expected the scale of {path} to be a mteditflow.rewards.Scale, such "
            f"as BINARY or LIKERT, got {scale!r}"
        )
    return scale


def consistency_terms(path: str) -> str | None:
    """Return the class attribute ``consistency_terms`` of a scorer; None if it has none.

    Raises:
        ConfigError: the class does not exist, or the attribute is not in ``TERMS``.
    """
    terms = getattr(named_scorer(path), "consistency_terms", None)
    if terms not in TERMS:
        raise ConfigError(
            f"rewards.scorer: expected consistency_terms of {path} to be one of {list(TERMS)}, "
            f"got {terms!r}"
        )
    return terms


def declared_terms(path: str) -> tuple[str, ...] | None:
    """Return the class attribute ``terms`` of a scorer; None if it has none.

    Raises:
        ConfigError: the class does not exist, the attribute is no sequence of names with
            "following", or a ``TurnScorer`` lacks it.
    """
    scorer = named_scorer(path)
    terms = getattr(scorer, "terms", None)
    if terms is None and not issubclass(scorer, TurnScorer):
        return None
    names = tuple(terms) if isinstance(terms, Iterable) and not isinstance(terms, str) else ()
    if FOLLOWING not in names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"rewards.scorer: expected terms of {path} to be the names of its scores, "
            f"{FOLLOWING!r} among them, got {terms!r}"
        )
    return names


def check_terms(config: Config) -> None:
    """Refuse rewards that the scorer does not declare, if it declares any.

    Raises:
        ConfigError: a reward with weight above 0, with a floor, or of the gate is not among them.
    """
    scorer, rewards = config.rewards.scorer, config.rewards
    terms = None if scorer is None else declared_terms(scorer)
    if terms is None or not config.objective.card.rewarded:
        return
    declared = f"since {scorer} declares the terms {list(terms)}"
    for name, weight in rewards.weights.items():
        if weight > 0 and name not in (*terms, IDENTITY):
            fix = f"--rewards.weights.{name} 0"
            raise ConfigError(
                f"rewards.weights.{name}: expected 0, {declared}, got {weight:g}; give {fix}, or "
                "correct the name"
            )
    if rewards.floor is not None and "consistency" not in terms:
        raise ConfigError(f"rewards.floor: expected None, {declared}, got {rewards.floor:g}")
    for name in config.gate.auxiliary:
        if name not in terms:
            raise ConfigError(f"gate.auxiliary: expected its names, {declared}, got {name!r}")
