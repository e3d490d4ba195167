"""DiffusionNFT as an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mteditflow._checks import check_choice, check_number
from mteditflow.losses.nft import (
    adaptive_nft_loss,
    nft_loss,
    optimality_probability,
    velocity_kl,
)
from mteditflow.objectives.base import Card, Output, Velocity
from mteditflow.objectives.forward import ForwardObjective
from mteditflow.objectives.samples import Samples
from mteditflow.objectives.units import Units, member_advantages, member_mask


@dataclass(frozen=True, kw_only=True)
class NFT(ForwardObjective):
    r"""DiffusionNFT: pull velocities toward good rollouts and push them away from bad ones.

    Rows of advantage 0 (r = 1/2) still pull to the old policy, so they are trained. Invalid rows
    are left out. A row takes one forward pass if the old policy is the current one, else two.

    Args:
        nft_beta: mixing weight of current and old policy, > 0; smaller values take larger steps.
        loss: "adaptive", the clean-space error normalized by its own size, or "plain", the velocity
            error.
        advantage_max: advantage at which the optimality probability saturates, > 0.

    The other fields are those of every objective of the forward process: ``renoise``, ``kl_coef``,
    ``kl_share``, ``norm_coef``, ``old_slope`` and ``old_maximum``.

    Metrics: "policy_loss", "old_kl" (velocity KL to the old policy), "kl", "norm_hinge".

    Raises:
        ValueError: a number is out of range.

    Source: DiffusionNFT (arXiv 2509.16117); MT-EditFlow (arXiv 2606.01985), Eq. 5, 23-25.

    Example:
        >>> from mteditflow.objectives import CleanSamples
        >>> model = torch.nn.Linear(8, 8)
        >>> samples = CleanSamples(torch.randn(4, 1, 8), group=torch.tensor([0, 0, 1, 1]))
        >>> advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])
        >>> objective = NFT(nft_beta=1.0, loss="plain")
        >>> key = torch.Generator().manual_seed(0)
        >>> (units,) = objective.units(samples, advantage, key=key)
        >>> output = objective(
        ...     lambda policy, x_t, sigma, at: model(x_t), samples, units, old_is_current=True
        ... )
        >>> (output.loss.sum() / units.count).backward()
        >>> output.loss.shape, bool(model.weight.grad.any())
        (torch.Size([4]), True)
    """

    card = Card(
        title="DiffusionNFT",
        papers=("2509.16117",),
        losses=("nft_loss", "adaptive_nft_loss"),
        needs="old policy",
        passes="1 + 1 (0)",
        tokens=True,
    )

    nft_beta: float = 1.0
    """Mixing weight of current and old policy; smaller values take larger steps."""
    loss: Literal["adaptive", "plain"] = "adaptive"
    """adaptive: clean-space error normalized by its own size; plain: velocity error."""
    advantage_max: float = 5.0
    """Advantage at which the optimality probability saturates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("nft_beta", self.nft_beta, low=0.0, open_low=True)
        check_choice("loss", self.loss, ("adaptive", "plain"))
        check_number("advantage_max", self.advantage_max, low=0.0, open_low=True)

    @property
    def zero_matters(self) -> bool:
        """True: at r = 1/2 the pull to the old policy remains."""
        return True

    def __call__(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool = False
    ) -> Output:
        """See ``Objective``."""
        states, at = self.states(velocity, samples, units, old_is_current=old_is_current)
        current, old, target = at.current, at.old, states.target
        exists = member_mask(units, current)
        with torch.no_grad():
            old_kl = velocity_kl(current, old, valid=exists)
        advantage = member_advantages(units, old_kl)  # in full precision, unlike some velocities
        r = optimality_probability(advantage, advantage_max=self.advantage_max)
        if self.loss == "adaptive":
            loss = adaptive_nft_loss(
                current,
                old,
                target,
                r,
                states.sigma,
                nft_beta=self.nft_beta,
                advantage_max=self.advantage_max,
                valid=exists,
            )
        else:
            loss = nft_loss(current, old, target, r, nft_beta=self.nft_beta, valid=exists)
        return self.output(units, loss, at, {"old_kl": old_kl})
