"""Laws of policy-gradient surrogates and of DiffusionNFT losses.

Source: MT-EditFlow (arXiv 2606.01985), Eq. 4, 5, 20-25.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from mteditflow.testing.expect import Tensors, expect_tensor, gradients
from mteditflow.testing.gaussian import GaussianPolicy
from mteditflow.testing.law import Laws, call, expect_close, fail
from mteditflow.testing.losses import LOSS, ROLES, ROWS, Loss, check_mask_name, small
from mteditflow.testing.options import Subject, check_choice, check_number
from mteditflow.testing.strategies import eighths, tensors


@dataclass(frozen=True)
class PolicyLoss(Subject):
    """A policy-gradient surrogate under test, such as the clipped one.

    Attributes:
        function: called as ``function(log_prob, old_log_prob, advantage)``, all [M].
        reduction: "none" if it returns [M], "mean" if it returns the mean over rows.
        valid: name of the mask argument; ``None``: there is no mask.
        clip_low: largest decrease of the ratio below 1; ``None``: no clipping.
        clip_high: largest increase of the ratio above 1; ``None``: no clipping.
        detaches: the function detaches old log-probs and advantages itself.
        tolerance: relative difference that counts as rounding.
        float32: half-precision inputs give the result of float32, in float32.
    """

    reduction: str = "none"
    valid: str | None = None
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    detaches: bool = False
    tolerance: float = 1e-5
    float32: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reduction", self.reduction, ("none", "mean"))
        check_number("clip_low", self.clip_low, high=1, none=True)
        check_number("clip_high", self.clip_high, none=True)
        if (self.clip_low is None) != (self.clip_high is None):
            raise ValueError("clip_low, clip_high: expected two numbers, or None for both")
        check_mask_name(self.valid, ())

    @cached_property
    def loss(self) -> Loss:
        """The same function as a ``Loss``, for the laws of all losses."""

        def by_name(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, **mask: Any) -> Any:
            return self.function(log_prob, old_log_prob, advantage, **mask)

        roles = {"log_prob": "log-ratio", "old_log_prob": "number", "advantage": "number"}
        return Loss(
            by_name,
            roles,
            ("log_prob",),
            self.reduction,
            self.valid,
            self.detaches,
            self.tolerance,
            self.float32,
        )

    def misfit(self) -> str | None:
        """Return which reduction the function has if it is not the stated one, or ``None``."""
        return self.loss.misfit()

    def gradient(self, log_ratio: Tensor, advantage: Tensor, old: Tensor | None = None) -> Tensor:
        """Return the gradient of the summed loss by the log-probs, [M]."""
        old = torch.zeros_like(log_ratio) if old is None else old
        inputs = {"log_prob": old + log_ratio, "old_log_prob": old, "advantage": advantage}
        # A mean divides each row's gradient by the number of rows; undo it.
        rows = len(log_ratio) if self.reduction == "mean" else 1
        return self.loss.gradient(inputs)["log_prob"] * rows


#: Laws of policy-gradient surrogates, for ``PolicyLoss``, including those of all losses.
POLICY_LOSS: Laws[PolicyLoss] = Laws(
    "policy-loss",
    PolicyLoss,
    LOSS.through(lambda f: f.loss),
    called="fn(log_prob, old_log_prob, advantage), rows [M] to [M] or a mean",
)


def _needs_clip(f: PolicyLoss) -> str | None:
    return "--clip-low none: nothing is clipped" if f.clip_low is None else None


@POLICY_LOSS.law(
    why="At ratio 1 the surrogate must be the policy gradient; a sign, a missing ratio or a clip "
    "range around the wrong value shows here.",
)
def on_policy_gradient(f: PolicyLoss, data: DataObject) -> None:
    """On-policy, the gradient by the log-prob is minus the advantage."""
    old = data.draw(tensors((ROWS,)))
    advantage = data.draw(tensors((ROWS,), number=small))
    got = f.gradient(torch.zeros_like(old), advantage, old)
    expect_close(
        got, -advantage, {"old_log_prob": old, "advantage": advantage}, tolerance=f.tolerance
    )


@POLICY_LOSS.law(
    why="The mean over samples must move the policy toward the reward, by the right amount.",
)
def policy_gradient(f: PolicyLoss, data: DataObject) -> None:
    """Its gradient is the policy gradient of a Gaussian policy, known in closed form."""
    # Multiples of 1/8 in [-1, 1]: eighths maps bytes from 81 on to negative numbers.
    near = st.integers(0, 16).map(lambda byte: eighths(byte % 9 if byte < 9 else 72 + byte))
    policy = GaussianPolicy(data.draw(near), data.draw(st.sampled_from([0.25, 0.5, 1.0])))
    goal = data.draw(near)
    action, weight = policy.quadrature()
    mean = torch.tensor(policy.mean, dtype=torch.float64, requires_grad=True, device="cpu")
    log_prob = GaussianPolicy.log_density(action, mean, policy.std)
    # The quadrature's weights make the sum over rows the exact expectation of the policy gradient.
    advantage = -0.5 * (action - goal) ** 2 * weight
    rows = len(action) if f.reduction == "mean" else 1
    loss = f.loss({"log_prob": log_prob, "old_log_prob": log_prob.detach(), "advantage": advantage})
    case = {"mean": policy.mean, "std": policy.std, "goal": goal}
    got = gradients(loss.sum() * rows, {"log_prob": mean}, case)["log_prob"]
    expected = torch.tensor(-policy.gradient(goal), dtype=torch.float64, device="cpu")
    expect_close(got, expected, case, tolerance=max(f.tolerance, 1e-6))


@POLICY_LOSS.law(
    why="Without clipping one batch can move the policy without bound.",
    skip=_needs_clip,
    options=("--clip-low", "--clip-high"),
)
def clipped_side(f: PolicyLoss, data: DataObject) -> None:
    """Beyond the clip range, in the direction that the advantage favors, the gradient is 0."""
    _clipped(f, data, data.draw(st.sampled_from([0.001, 0.1, 1.0, 10.0])))


@POLICY_LOSS.law(
    why="Log-probs of a whole latent differ by hundreds after one bad update; exp overflows to "
    "infinity, and infinity times a clipped gradient of 0 is NaN in every weight.",
    skip=_needs_clip,
    options=("--clip-low", "--clip-high"),
)
def far_ratios(f: PolicyLoss, data: DataObject) -> None:
    """A clipped sample's gradient is 0 even if its ratio overflows."""
    _clipped(f, data, data.draw(st.sampled_from([100.0, 1000.0])))


@POLICY_LOSS.law(
    why="A range tighter than stated stops updates early, so a paper's results are not reproduced.",
    skip=_needs_clip,
    options=("--clip-low", "--clip-high"),
)
def inside_the_range(f: PolicyLoss, data: DataObject) -> None:
    """Inside the clip range, up to its ends, the gradient is -ratio * advantage."""
    assert f.clip_low is not None
    assert f.clip_high is not None
    good = data.draw(st.sampled_from([0.5, 1.0, 3.0]))
    ends = [math.log1p(end * x) for end in (f.clip_high, -f.clip_low) for x in (0.5, 0.9, 0.99)]
    log_ratio = torch.tensor(2 * ends, dtype=torch.float64, device="cpu")
    advantage = torch.tensor(
        [good] * len(ends) + [-good] * len(ends), dtype=torch.float64, device="cpu"
    )
    _unclipped(f, log_ratio, advantage)


@POLICY_LOSS.law(
    why="With clipping on both sides, a sample whose ratio moved against its advantage gets no "
    "gradient back; without the ratio it has the weight of the sampling policy.",
)
def wrong_side(f: PolicyLoss, data: DataObject) -> None:
    """A ratio below 2.9 that moved against its advantage has gradient -ratio * advantage."""
    up = data.draw(st.sampled_from([0.05, 0.25, 0.5, 1.05]))  # a dual clip starts at a ratio of 3
    down = data.draw(st.sampled_from([0.05, 0.25, 0.5, 3.0]))
    good = data.draw(st.sampled_from([0.5, 1.0, 3.0]))
    log_ratio = torch.tensor([up, -down], dtype=torch.float64, device="cpu")
    _unclipped(f, log_ratio, torch.tensor([-good, good], dtype=torch.float64, device="cpu"))


@POLICY_LOSS.law(
    why="Log-probs of a latent are sums over many elements; a ratio of exponentials overflows.",
)
def difference(f: PolicyLoss, data: DataObject) -> None:
    """Only the difference of the log-probs matters."""
    log_ratio = data.draw(tensors((ROWS,), number=ROLES["log-ratio"][1]))
    advantage = data.draw(tensors((ROWS,), number=small))
    shift = data.draw(st.sampled_from([-1e5, -1000.0, 1000.0, 1e5]))
    got = f.gradient(log_ratio, advantage, torch.full_like(log_ratio, shift))
    expected = f.gradient(log_ratio, advantage)
    case = {"log_ratio": log_ratio, "advantage": advantage, "shift": shift}
    expect_close(got, expected, case, tolerance=max(f.tolerance, 1e-5))


@dataclass(frozen=True)
class NFTLoss(Subject):
    """A DiffusionNFT loss under test, in velocity space.

    Attributes:
        function: called as ``function(velocity, old_velocity, target, r, nft_beta=b)`` with latents
            [M, ...] and r [M]; returns [M], each the mean over the elements of a row.
        valid: name of the mask argument; ``None``: there is no mask.
        detaches: the function detaches old velocity and target itself.
        tolerance: relative difference that counts as rounding.
        float32: half-precision inputs give the result of float32, in float32.
    """

    valid: str | None = None
    detaches: bool = False
    tolerance: float = 1e-5
    float32: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mask_name(self.valid, ())

    @cached_property
    def loss(self) -> Loss:
        """The same function as a ``Loss`` with ``nft_beta`` 1/2, for the laws of all losses."""

        def by_name(
            velocity: Tensor, old_velocity: Tensor, target: Tensor, r: Tensor, **mask: Any
        ) -> Any:
            return self.function(velocity, old_velocity, target, r, nft_beta=0.5, **mask)

        roles = {"velocity": "latent", "old_velocity": "latent", "target": "latent", "r": "share"}
        return Loss(
            by_name, roles, ("velocity",), "none", self.valid, self.detaches, self.tolerance,
            self.float32,
        )  # fmt: skip

    def __call__(self, inputs: Tensors, b: float) -> Tensor:
        """Return [M]; an exception or invalid result of the function breaks the law."""
        case = {**inputs, "nft_beta": b}
        arguments = [inputs[name] for name in ("velocity", "old_velocity", "target", "r")]
        mask = {k: x for k, x in self.loss.arguments(inputs).items() if k == self.valid}
        loss = call(self.function, case, *arguments, nft_beta=b, **mask)
        return expect_tensor(loss, inputs["r"].shape, case)

    def gradient(self, inputs: Tensors, b: float) -> Tensor:
        """Return the gradient of the summed loss by the velocity."""
        leaf = {"velocity": inputs["velocity"].clone().requires_grad_()}
        total = self({**inputs, **leaf}, b).sum()
        return gradients(total, leaf, {**inputs, "nft_beta": b})["velocity"]


#: Laws of DiffusionNFT losses, for ``NFTLoss``, including those of all losses.
NFT_LOSS: Laws[NFTLoss] = Laws(
    "nft-loss",
    NFTLoss,
    LOSS.through(lambda f: f.loss),
    called="fn(velocity, old_velocity, target, r, nft_beta=b), to [M]",
)


_BETAS = st.sampled_from([0.1, 0.5, 1.0, 2.0])


@NFT_LOSS.law(
    why="r = 1 must pull toward the sample, r = 0 push away, in proportion to b; one of the two "
    "branches alone cannot do both.",
)
def gradient_at_the_old_policy(f: NFTLoss, data: DataObject) -> None:
    """At the old policy the gradient is 2 b (2r - 1) (old velocity - target) per element."""
    # Branches v+ = (1 - b) v_old + b v and v- = (1 + b) v_old - b v, weighted r and 1 - r: at
    # v = v_old their gradients are +2 b and -2 b times the error.
    inputs, b = data.draw(f.loss.draw()), data.draw(_BETAS)
    inputs["velocity"] = inputs["old_velocity"].clone()
    elements = inputs["target"][0].numel()
    r = inputs["r"][:, None]
    expected = 2 * b * (2 * r - 1) * (inputs["old_velocity"] - inputs["target"]) / elements
    got = f.gradient(inputs, b)
    expect_close(got, expected, {**inputs, "nft_beta": b}, tolerance=f.tolerance)


@NFT_LOSS.law(
    why="This is the optimal policy of DiffusionNFT's Eq. 25; other weights of the two branches "
    "have another optimum.",
)
def minimum(f: NFTLoss, data: DataObject) -> None:
    """The minimum is the old velocity plus (1 - 2r) / b times its error."""
    inputs, b = data.draw(f.loss.draw()), data.draw(_BETAS)
    r = inputs["r"][:, None]
    old, target = inputs["old_velocity"], inputs["target"]
    inputs["velocity"] = old - (2 * r - 1) / b * (old - target)
    got = f.gradient(inputs, b)
    expect_close(got, torch.zeros_like(got), {**inputs, "nft_beta": b}, tolerance=f.tolerance)


@NFT_LOSS.law(
    why="With a perfect sample the loss must reduce to supervised training on it.",
)
def flow_matching(f: NFTLoss, data: DataObject) -> None:
    """With r = 1 and b = 1 the loss is the flow-matching loss."""
    inputs = data.draw(f.loss.draw())
    inputs["r"] = torch.ones_like(inputs["r"])
    expected = (inputs["velocity"] - inputs["target"]).square().flatten(1).mean(1)
    expect_close(f(inputs, 1.0), expected, inputs, tolerance=f.tolerance)


def check_policy_loss(
    function: Callable[..., Any],
    *,
    reduction: str = "none",
    valid: str | None = None,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    detaches: bool = False,
    tolerance: float = 1e-5,
    float32: bool = False,
    **search: Any,
) -> None:
    """Check a policy-gradient surrogate, called as ``function(log_prob, old_log_prob, advantage)``.

    Args:
        function: maps three tensors [M] to [M], or to the mean over rows.
        reduction: "none" or "mean".
        valid: name of the mask argument; ``None``: there is no mask.
        clip_low: largest decrease of the ratio below 1; ``None``: no clipping.
        clip_high: largest increase of the ratio above 1; ``None``: no clipping.
        detaches: the function detaches its constants, so they may require a gradient.
        tolerance: relative difference that counts as rounding.
        float32: half-precision inputs give the result of float32, in float32.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 4, 20-22.

    Example:
        >>> from functools import partial
        >>> from mteditflow import clipped_surrogate_loss
        >>> loss = partial(clipped_surrogate_loss, clip_low=0.2, clip_high=0.2)
        >>> check_policy_loss(loss, examples=2)
    """
    subject = PolicyLoss(
        function, reduction, valid, clip_low, clip_high, detaches, tolerance, float32
    )
    POLICY_LOSS.check(subject, **search)


def check_nft_loss(
    function: Callable[..., Any],
    *,
    valid: str | None = None,
    detaches: bool = False,
    tolerance: float = 1e-5,
    float32: bool = False,
    **search: Any,
) -> None:
    """Check a DiffusionNFT loss.

    Args:
        function: called as ``function(velocity, old_velocity, target, r, nft_beta=b)`` with latents
            [M, ...] and r [M]; returns [M].
        valid: name of the mask argument; ``None``: there is no mask.
        detaches: the function detaches its constants, so they may require a gradient.
        tolerance: relative difference that counts as rounding.
        float32: half-precision inputs give the result of float32, in float32.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 5, 23-25; DiffusionNFT (arXiv 2509.16117).

    Example:
        >>> from mteditflow import nft_loss
        >>> check_nft_loss(nft_loss, examples=2)
    """
    subject = NFTLoss(function, valid, detaches, tolerance, float32)
    NFT_LOSS.check(subject, **search)


def _unclipped(f: PolicyLoss, log_ratio: Tensor, advantage: Tensor) -> None:
    got = f.gradient(log_ratio, advantage)
    case = {"log_ratio": log_ratio, "advantage": advantage}
    expect_close(got, -log_ratio.exp() * advantage, case, tolerance=f.tolerance)


def _clipped(f: PolicyLoss, data: DataObject, over: float) -> None:
    """Expect gradient 0 if the log-ratio exceeds the clip range by ``over`` on the favored side."""
    assert f.clip_low is not None
    assert f.clip_high is not None
    good = data.draw(st.sampled_from([0.5, 1.0, 3.0]))
    log_ratio = torch.tensor(
        [math.log1p(f.clip_high) + over, math.log1p(-f.clip_low) - over],
        dtype=torch.float64,
        device="cpu",
    )
    advantage = torch.tensor([good, -good], dtype=torch.float64, device="cpu")
    got = f.gradient(log_ratio, advantage)
    if not torch.equal(got, torch.zeros_like(got)):
        case = {"log_ratio": log_ratio, "advantage": advantage}
        fail(case, torch.zeros_like(got), got, wrong=got != 0)
