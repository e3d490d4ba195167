r"""GARDO: gated KL on uncertain rewards, resets of the reference, and a diversity bonus.

The proxy reward of a sample is uncertain if it ranks the sample higher than auxiliary rewards do.
Only such rows need a KL to the reference; the others are trained without one::

    uncertainty = rank_uncertainty(reward, {"aesthetic": a, "preference": p})
    gate = uncertainty_gate(uncertainty, share.value)
    advantage = diversity_advantage(group_advantage(reward, group), group_diversity(f, group))
    loss = policy_loss + kl_coef * gate * velocity_kl(velocity, reference_velocity)
    mean = float(uncertainty[uncertainty >= 0].mean())  # of all it is 0 but for ties
    share, reset = share.update(mean), reset.update(mean_kl)

If ``reset.due``, copy the policy's weights to the reference and continue from
``reset.restarted()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_ids,
    as_mask,
    as_real,
    check_count,
    check_floating,
    check_full_precision,
    check_group,
    check_named,
    check_number,
    check_rank,
    check_real,
    check_rewards,
    check_same_shape,
    check_values,
)
from mteditflow._reduce import in_float64


@torch.no_grad()
def rank_uncertainty(
    reward: Numbers, auxiliary: Mapping[str, Numbers], *, valid: Numbers | None = None
) -> Tensor:
    r"""Rank difference of proxy and auxiliary rewards, :math:`W(R) - \mathrm{mean}_k W(R_k)`.

    W is the share of the other valid samples of the batch that a sample beats; ties do not count as
    wins. Only ranks matter: a strictly increasing map of any reward changes nothing.

    Args:
        reward: the proxy reward being optimized, finite where valid; [B], or [B, N] to rank each
            turn on its own. float32 or float64.
        auxiliary: name to an auxiliary reward that is not optimized, of the shape of ``reward``; at
            least one. The paper uses two, of aesthetics and of preference.
        valid: boolean, shape of ``reward``; other entries are never read and get 0.

    Returns:
        Shape and dtype of ``reward``, in [-1, 1], detached: above 0 where the proxy ranks the
        sample higher than the auxiliaries do. 0 where fewer than two samples are valid.

    Raises:
        ValueError: shapes do not match, there is no auxiliary, a valid reward is not finite.
        TypeError: a reward is half precision, or the mask not boolean.

    Source: GARDO (arXiv 2512.24138), with the paper's sign. The released GRPO and NFT scripts use
        descending ranks, which flips it.

    Example:
        >>> rank_uncertainty(torch.tensor([1.0, 2.0, 3.0]), {"a": torch.tensor([5.0, 9.0, 1.0])})
        tensor([-0.5000, -0.5000,  1.0000])
    """
    reward = as_real("reward", reward)
    check_real(reward=reward)
    check_named("auxiliary", auxiliary, "rewards")
    if not auxiliary:
        raise ValueError("auxiliary: expected at least one named reward, got none")
    others = {
        f"auxiliary[{name!r}]": as_real(f"auxiliary[{name!r}]", x, like=reward)
        for name, x in auxiliary.items()
    }
    mask = as_mask("valid", valid, reward, "of reward")
    check_rewards({"reward": reward, **others}, None, mask)
    shares = [_beaten(x, mask) for x in others.values()]
    return (_beaten(reward, mask) - torch.stack(shares).mean(dim=0)).to(reward)


@torch.no_grad()
def uncertainty_gate(uncertainty: Numbers, share: float, *, valid: Numbers | None = None) -> Tensor:
    r"""Mask of samples that get a KL to the reference: :math:`U_i > \mathrm{quantile}_{1 - k}(U)`.

    Args:
        uncertainty: of each sample, [B], or [B, N] with one quantile for each turn.
        share: k in [0, 1], approximately the share of samples in the mask: none at 0, all but the
            least uncertain at 1, and none if all uncertainties are equal.
        valid: boolean, shape of ``uncertainty``; other entries are never read and never in the
            mask.

    Returns:
        Boolean, shape of ``uncertainty``: multiply an unreduced KL by it.

    Raises:
        ValueError: the share is out of range, shapes do not match.
        TypeError: half precision, or the mask not boolean.

    Source: GARDO (arXiv 2512.24138); its public code takes the quantile among U >= 0. Quantiles
        between two samples are interpolated.

    Example:
        >>> uncertainty_gate(torch.tensor([-0.5, 0.1, 0.4, 0.0]), 0.25)
        tensor([False, False,  True, False])
    """
    value = as_real("uncertainty", uncertainty)
    check_full_precision(uncertainty=value)
    check_rank("uncertainty", value, 1, "[B] or [B, N]", maximum=2)
    check_number("share", share, low=0.0, high=1.0)
    mask = as_mask("valid", valid, value, "of uncertainty")
    check_values("uncertainty", value, ~mask | value.isfinite(), "finite values where valid")
    read = torch.where(mask, value, torch.nan)
    return (value > torch.nanquantile(read, 1 - share, dim=0, keepdim=True)) & mask


@torch.no_grad()
def group_diversity(features: Tensor, group: Numbers, *, valid: Numbers | None = None) -> Tensor:
    r"""Cosine distance of each sample to its nearest neighbor in the group.

    .. math:: \delta_i = \min_{j \in g, j \neq i} (1 - \cos(f_i, f_j))

    Args:
        features: image features, such as DINOv3's, [B, F]; rows are nonzero where valid.
        group: integer group id of each sample, [B].
        valid: boolean [B]; other samples are never read, are not neighbors and get 0.

    Returns:
        [B], float32 at least, in [0, 2], detached: 0 for duplicates. A sample that is alone in its
        group gets 1, which leaves its advantage as it is.

    Raises:
        ValueError: shapes do not match, a valid row is zero or not finite.
        TypeError: features are not floating point, ids not integers, or the mask not boolean.

    Source: GARDO (arXiv 2512.24138).

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
        >>> group_diversity(features, [0, 0, 0])
        tensor([0., 0., 1.])
    """
    check_floating(features=features)
    check_rank("features", features, 2, "[B, F]", maximum=2)
    ids = as_ids(group, features.device)
    check_group(ids, features.shape[:1])
    mask = as_mask("valid", valid, features[:, 0], "[B]")
    (exact,) = in_float64(torch.where(mask[:, None], features.detach(), 1))
    size = torch.linalg.vector_norm(exact, dim=1)
    usable = (size > 0) & size.isfinite()
    check_values("features", size, usable, "rows of a finite norm above 0, where valid")
    unit = exact / size[:, None]
    ids, own = ids.to(exact.device), mask.to(exact.device)
    others = (ids[:, None] == ids) & own & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    # Half the squared distance of unit vectors is 1 - cos, and exactly 0 for duplicates: cdist
    # must subtract, since its matrix form |a|^2 + |b|^2 - 2ab rounds.
    distance = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
    nearest = torch.where(others, distance, torch.inf).amin(dim=1)
    found = torch.where(others.any(dim=1), nearest, 1)
    return torch.where(own, found, 0).to(
        features.device, torch.promote_types(features.dtype, torch.float32)
    )


@torch.no_grad()
def diversity_advantage(advantage: Numbers, diversity: Numbers) -> Tensor:
    r"""Positive advantages scaled by diversity, :math:`A_i \delta_i` where :math:`A_i > 0`.

    A good sample that resembles others of its group gets a smaller advantage. Advantages that are
    not positive are unchanged.

    Args:
        advantage: of each sample, [B], or [B, N] for one per turn; float32 or float64. The paper
            reports better results without the division by the std (``group_advantage`` with
            ``std="none"``).
        diversity: of each sample, >= 0, shape of ``advantage``, or [B] for all its turns, such as
            from ``group_diversity``. Public code first divides it by its mean, which preserves the
            scale of the advantages.

    Returns:
        Shape and dtype of ``advantage``, detached.

    Raises:
        ValueError: shapes do not match, a diversity is negative.
        TypeError: half precision.

    Source: GARDO (arXiv 2512.24138).

    Example:
        >>> diversity_advantage(torch.tensor([2.0, 1.0, -3.0]), torch.tensor([0.5, 0.0, 0.0]))
        tensor([ 1.,  0., -3.])
    """
    value = as_real("advantage", advantage)
    weight = as_real("diversity", diversity, like=value)
    check_full_precision(advantage=value, diversity=weight)
    check_rank("advantage", value, 1, "[B] or [B, N]", maximum=2)
    if value.ndim == 2 and weight.ndim == 1:
        weight = weight[:, None].expand(len(weight), value.shape[1])
    check_same_shape(advantage=value, diversity=weight)
    check_values("diversity", weight, ~(weight < 0), "values >= 0")
    return torch.where(value > 0, value * weight.to(value), value)


@dataclass(frozen=True)
class GatedShare:
    r"""Share of gated samples, adapted to the trend of the mean uncertainty.

    The mean runs over the samples of uncertainty at or above 0, as in the public code: over all
    samples it is always 0 without ties, since the ranks of any reward have one mean, and the share
    would never move. If the mean exceeds all of the last ``window`` means, the share is multiplied
    by ``1 + rate``. If it is below all of them, the share is multiplied by ``1 - rate``. The share
    stays constant until ``window`` means have been seen.

    Args:
        value: current share, in [minimum, maximum].
        rate: relative step, in (0, 1).
        window: number of earlier means that a new one is compared with.
        minimum: smallest share, in [0, maximum].
        maximum: largest share, in (0, 1].
        means: the last means, oldest first. With ``value`` it is the whole state.

    Raises:
        ValueError: a number is out of range.

    Source: GARDO (arXiv 2512.24138), whose share starts at 0.1 and is bounded by 1; public code
        keeps it in [0.02, 0.2]. Waiting until the window is full is this library's choice.

    Example:
        >>> share = GatedShare(window=2)
        >>> for mean in (0.1, 0.2, 0.3, 0.25, 0.0):
        ...     share = share.update(mean)
        >>> round(share.value, 6), share.means  # up at 0.3, down at 0
        (0.099, (0.25, 0.0))
    """

    value: float = 0.1
    rate: float = 0.1
    window: int = 20
    minimum: float = 0.0
    maximum: float = 1.0
    means: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_number("maximum", self.maximum, low=0.0, high=1.0, open_low=True)
        check_number("minimum", self.minimum, low=0.0, high=self.maximum)
        check_number("value", self.value, low=self.minimum, high=self.maximum)
        check_number("rate", self.rate, low=0.0, high=1.0, open_low=True, open_high=True)
        check_count("window", self.window)
        if not isinstance(self.means, tuple) or len(self.means) > self.window:
            raise ValueError(f"means: expected a tuple of at most {self.window}, got {self.means}")
        for mean in self.means:
            check_number("means", mean)

    def update(self, mean: float) -> GatedShare:
        """Return the share after a batch.

        Args:
            mean: mean uncertainty of the batch, over its samples at or above 0.

        Raises:
            ValueError: the mean is not finite.
        """
        check_number("mean", mean)
        factor = 1.0
        if len(self.means) == self.window:
            factor += self.rate * ((mean > max(self.means)) - (mean < min(self.means)))
        value = min(max(self.value * factor, self.minimum), self.maximum)
        return replace(self, value=value, means=(*self.means, mean)[-self.window :])


@dataclass(frozen=True)
class ReferenceReset:
    """Condition for copying the current policy's weights to the reference policy.

    Args:
        maximum_kl: mean KL above which a reset is due, > 0, in the units of the KL in the loss.
        maximum_steps: optimizer steps after which a reset is due whatever the KL.
        kl: mean KL of the last step.
        steps: optimizer steps since the last reset.

    Raises:
        ValueError: a number is out of range.

    Source: GARDO (arXiv 2512.24138): 1e-4 and 100 steps; public code has 3e-4 and 15 epochs.

    Example:
        >>> reset = ReferenceReset(maximum_steps=3).update(5e-5)
        >>> reset.due, reset.update(2e-4).due, reset.update(0.0).update(0.0).due
        (False, True, True)
        >>> reset.update(2e-4).restarted().due
        False
    """

    maximum_kl: float = 1e-4
    maximum_steps: int = 100
    kl: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        check_number("maximum_kl", self.maximum_kl, low=0.0, open_low=True)
        check_count("maximum_steps", self.maximum_steps)
        check_number("kl", self.kl, low=0.0)
        check_count("steps", self.steps, low=0)

    @property
    def due(self) -> bool:
        """Whether the reference should be reset now."""
        return self.kl > self.maximum_kl or self.steps >= self.maximum_steps

    def update(self, kl: float) -> ReferenceReset:
        """Return the condition after an optimizer step with this mean KL to the reference.

        Raises:
            ValueError: the KL is negative or not finite.
        """
        return replace(self, kl=kl, steps=self.steps + 1)

    def restarted(self) -> ReferenceReset:
        """Return the condition right after a reset."""
        return replace(self, kl=0.0, steps=0)


def _beaten(reward: Tensor, mask: Tensor) -> Tensor:
    """Share of the other valid samples that each valid one exceeds, float64; 0 if not valid."""
    value, counted = in_float64(reward.detach(), mask)
    wins = (value[:, None] > value) & counted & counted[:, None]
    others = (counted.sum(dim=0) - 1).clamp(min=1)
    # 0, or NaN for a NaN that could not be checked under compilation: comparisons would hide it.
    unread = torch.where(counted, value - value, 0)
    return wins.sum(dim=1, dtype=value.dtype) / others + unread
