r"""Weights that follow what they weigh: a floor under a reward, a target for the KL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mteditflow._checks import check_named, check_number


@dataclass(frozen=True)
class LagrangeMultiplier:
    r"""Weight that a reward gains while its mean is below a floor, by dual ascent.

    .. math:: \lambda \leftarrow \min(\max(\lambda + \mathrm{rate} \, (\mathrm{floor} -
        \mathrm{mean} R),\, 0),\, \mathrm{maximum})

    once a round. Where the floor holds by itself the multiplier falls to 0 and nothing is changed;
    else it settles where the mean is at the floor. It acts against reward hacking that a fixed
    weight lets pass: one reward bought with another, as backgrounds are with following.

    Args:
        floor: smallest mean of the reward that is wanted, in the reward's units.
        rate: of the ascent, > 0, per round: a mean that is ``1 / rate`` below the floor adds 1 to
            the weight in a round. The policy should answer faster than the multiplier moves.
        maximum: largest value, > 0: where the floor cannot be reached, the others still count.
        value: the multiplier now, in [0, maximum]. A number: all the state there is.

    Raises:
        ValueError: a number is out of range.

    Source: the multiplier's step of RCPO (arXiv 1805.11074), for a floor in place of a ceiling.

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

        Take the mean over the trajectories in which the reward was measured; skip a round without
        any.

        Raises:
            ValueError: the mean is not finite, as where every reward was lost.
        """
        check_number("mean", mean)
        value = self.value + self.rate * (self.floor - mean)
        return replace(self, value=min(max(value, 0.0), self.maximum))


def constrained_weights(
    weights: Mapping[str, float], multipliers: Mapping[str, float]
) -> dict[str, float]:
    r"""Weights of the rewards' sum with multipliers in it.

    .. math:: w'_k = \frac{w_k + \lambda_k}{1 + \sum_j \lambda_j}

    The gradient of the Lagrangian :math:`\sum_k w_k J_k + \sum_k \lambda_k (J_k - f_k)`, divided
    by a positive number: the same direction, in a size that a large multiplier does not blow up.
    All multipliers 0 give the weights as they are. With ``fuse_advantages`` a multiplier is in
    units of normalized advantages, as the weights are: it settles at another number than it would
    beside raw rewards, and where the mean is at the floor all the same.

    Args:
        weights: name to weight w of a reward.
        multipliers: name to multiplier, >= 0, of those that have a floor.

    Returns:
        Name to weight, of all rewards, for ``fuse_advantages`` or ``turn_advantage``.

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
    # In units of a power of two, so that a sum of huge numbers does not overflow.
    largest = max(abs(x) for x in (1.0, *weights.values(), *multipliers.values()))
    unit = 2.0 ** (math.frexp(largest)[1] - 1)
    scale = 1 / unit + sum(multiplier / unit for multiplier in multipliers.values())
    return {
        name: (w / unit + multipliers.get(name, 0.0) / unit) / scale for name, w in weights.items()
    }


@dataclass(frozen=True)
class AdaptiveKL:
    r"""Weight of a KL term that keeps the KL near a target.

    .. math:: c \leftarrow c \, (1 + \mathrm{rate} \cdot
        \mathrm{clip}(\mathrm{KL} / \mathrm{target} - 1,\, -0.2,\, 0.2))

    once a round: at the target the weight stays; it grows while the policy is farther from the
    reference and falls while it is nearer.

    Args:
        target: KL that is wanted, > 0, in the units of the term that is weighed.
        value: the weight now, > 0. A number: all the state there is.
        rate: largest step of the weight is a fifth of this, in (0, 1].
        minimum: smallest weight, > 0.
        maximum: largest weight.

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
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        value = self.value * (1 + self.rate * error)
        return replace(self, value=min(max(value, self.minimum), self.maximum))
