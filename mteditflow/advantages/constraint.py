r"""Adaptive weights: a Lagrange multiplier for a reward floor, a controller for a KL target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mteditflow._checks import check_named, check_number


@dataclass(frozen=True)
class LagrangeMultiplier:
    r"""Extra weight of a reward that keeps its mean above a floor, updated by dual ascent.

    .. math:: \lambda \leftarrow \min(\max(\lambda + \mathrm{rate} \, (\mathrm{floor} -
        \mathrm{mean} R),\, 0),\, \mathrm{maximum})

    once a round. If the mean stays above the floor without help, the multiplier falls to 0 and the
    weights are unchanged. Otherwise it settles where the mean is at the floor. Use it against
    reward hacking in which one reward rises at the expense of another, such as instruction
    following at the expense of background consistency.

    Args:
        floor: smallest acceptable mean of the reward, in the reward's units.
        rate: step size of the ascent per round, > 0: a mean that is ``1 / rate`` below the floor
            adds 1 to the multiplier in one round. The policy should react faster than the
            multiplier moves.
        maximum: upper bound of the multiplier, > 0, so that the other rewards still count when the
            floor cannot be reached.
        value: current multiplier, in [0, maximum]. It is the whole state.

    Raises:
        ValueError: a number is out of range.

    Source: the multiplier update of RCPO (arXiv 1805.11074), with a floor in place of a ceiling.

    Example:
        >>> multiplier = LagrangeMultiplier(floor=0.9, rate=10.0)
        >>> multiplier = multiplier.update(0.85)
        >>> round(multiplier.value, 6)
        0.5
        >>> multiplier.update(0.99).value
        0.0
    """

    floor: float
    rate: float = 1.0
    maximum: float = 10.0
    value: float = 0.0

    def __post_init__(self) -> None:
        check_number("floor", self.floor)
        check_number("rate", self.rate, low=0.0, open_low=True)
        check_number("maximum", self.maximum, low=0.0, open_low=True)
        check_number("value", self.value, low=0.0, high=self.maximum)

    def update(self, mean: float) -> LagrangeMultiplier:
        """Return the multiplier after a round in which the reward had this mean.

        Take the mean over the trajectories in which the reward was measured. Skip rounds in which
        it was measured nowhere.

        Raises:
            ValueError: the mean is not finite, for example because every reward was lost.
        """
        check_number("mean", mean)
        value = self.value + self.rate * (self.floor - mean)
        return replace(self, value=min(max(value, 0.0), self.maximum))


def constrained_weights(
    weights: Mapping[str, float], multipliers: Mapping[str, float]
) -> dict[str, float]:
    r"""Fusion weights of the rewards, with Lagrange multipliers added and the sum rescaled.

    .. math:: w'_k = \frac{w_k + \lambda_k}{1 + \sum_j \lambda_j}

    These are the weights in the gradient of the Lagrangian
    :math:`\sum_k w_k J_k + \sum_k \lambda_k (J_k - f_k)`, divided by a positive number. The
    direction is the same, and a large multiplier does not inflate the step. If all multipliers are
    0, the weights are unchanged. With ``fuse_advantages`` a multiplier is in units of normalized
    advantages, like the weights. It then settles at a different value than with raw rewards, but
    still where the mean is at the floor.

    Args:
        weights: name to weight w of a reward.
        multipliers: name to multiplier, >= 0, of each reward that has a floor.

    Returns:
        Name to weight for all rewards, as ``fuse_advantages`` and ``turn_advantage`` take it.

    Raises:
        ValueError: a multiplier is negative or has no weight, a number is not finite.

    Example:
        >>> constrained_weights({"if": 1.0, "cc": 0.5}, {"cc": 1.0})
        {'if': 0.5, 'cc': 0.75}
    """
    check_named("weights", weights, "numbers")
    check_named("multipliers", multipliers, "numbers")
    for name, weight in weights.items():
        check_number(f"weights[{name!r}]", weight)
    for name, multiplier in multipliers.items():
        check_number(f"multipliers[{name!r}]", multiplier, low=0.0)
        if name not in weights:
            raise ValueError(f"multipliers: expected names among {sorted(weights)}, got {name!r}")
    # In units of a power of two, which rescales without rounding: a sum of huge numbers must not
    # overflow.
    largest = max(abs(x) for x in (1.0, *weights.values(), *multipliers.values()))
    unit = 2.0 ** (math.frexp(largest)[1] - 1)
    scale = 1 / unit + sum(multiplier / unit for multiplier in multipliers.values())
    return {
        name: (w / unit + multipliers.get(name, 0.0) / unit) / scale for name, w in weights.items()
    }


@dataclass(frozen=True)
class AdaptiveKL:
    r"""Adaptive weight of a KL term that keeps the KL near a target.

    .. math:: c \leftarrow c \, (1 + \mathrm{rate} \cdot
        \mathrm{clip}(\mathrm{KL} / \mathrm{target} - 1,\, -0.2,\, 0.2))

    once a round. The weight grows while the KL is above the target and falls while it is below.

    Args:
        target: desired KL, > 0, in the units of the weighted term.
        value: current weight, in [minimum, maximum]. It is the whole state.
        rate: gain of the controller, in (0, 1]. The clip limits one relative step to a fifth of it.
        minimum: smallest weight, > 0.
        maximum: largest weight, >= ``minimum``.

    Raises:
        ValueError: a number is out of range.

    Source: the proportional controller of Ziegler et al. (arXiv 1909.08593).

    Example:
        >>> controller = AdaptiveKL(target=0.01, value=1.0, rate=0.5)
        >>> controller.update(0.02).value, controller.update(0.01).value
        (1.1, 1.0)
    """

    target: float
    value: float
    rate: float = 0.5
    minimum: float = 1e-8
    maximum: float = 1e8

    def __post_init__(self) -> None:
        check_number("minimum", self.minimum, low=0.0, open_low=True)
        check_number("maximum", self.maximum, low=self.minimum)
        check_number("target", self.target, low=0.0, open_low=True)
        check_number("value", self.value, low=self.minimum, high=self.maximum)
        check_number("rate", self.rate, low=0.0, high=1.0, open_low=True)

    def update(self, kl: float) -> AdaptiveKL:
        """Return the controller after a round with this mean KL.

        Raises:
            ValueError: the KL is negative or not finite.
        """
        check_number("kl", kl, low=0.0)
        error = min(max(kl / self.target - 1, -0.2), 0.2)  # clip of Ziegler et al.
        value = self.value * (1 + self.rate * error)
        return replace(self, value=min(max(value, self.minimum), self.maximum))
