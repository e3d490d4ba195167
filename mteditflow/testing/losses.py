"""Laws of losses: any unreduced loss of rows, policy-gradient surrogates, and DiffusionNFT.

Source: MT-EditFlow (arXiv 2606.01985), Eq. 4, 5, 20-25.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from mteditflow.testing.law import Laws, call, expect_close, fail, refuses
from mteditflow.testing.strategies import Number, eighths, tensors

ROWS, LATENT = 2, (2,)
Tensors = Mapping[str, Tensor]


# What an argument holds: its shape after M, and the values it may have.
def _small(byte: int) -> float:
    """Map a byte to a multiple of 1/8 in [-3, 3]."""
    return eighths(byte % 25 if byte < 128 else 81 + byte % 24)


ROLES: Mapping[str, tuple[tuple[int, ...], Number]] = {
    "latent": (LATENT, _small),
    "number": ((), _small),
    "share": ((), lambda byte: byte % 9 / 8),
    "sigma": ((), lambda byte: (1 + byte % 7) / 8),
    "positive": ((), lambda byte: (1 + byte % 16) / 8),
    "log-ratio": ((), lambda byte: _small(byte) / 2 + 1 / 64),  # off the corners of a clip
}


@dataclass(frozen=True)
class Loss:
    """A loss under test.

    Attributes:
        function: called with tensors by name, ``function(**inputs)``; returns [M], or a mean.
        inputs: name of each argument to its role: "latent" [M, ...], or per row [M] a "number", a
            "share" in [0, 1], a "sigma" in (0, 1), a "positive" number, a "log-ratio".
        trained: names that get a gradient; all others are constants.
        reduction: "none" where it returns [M], "mean" where it returns the mean over rows.
        valid: name of the mask argument, boolean [M]; ``None`` where there is none.
        detaches: it detaches its constants itself, so that one with a gradient does no harm.
        tolerance: relative difference that counts as rounding.
    """

    function: Callable[..., Any]
    inputs: Mapping[str, str]
    trained: tuple[str, ...]
    reduction: str = "none"
    valid: str | None = None
    detaches: bool = False
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        unknown = set(self.inputs.values()) - set(ROLES)
        if unknown:
            raise ValueError(f"inputs: expected roles {', '.join(ROLES)}, got {sorted(unknown)}")
        if not self.trained or not set(self.trained) <= set(self.inputs):
            raise ValueError(
                f"trained: expected names in {sorted(self.inputs)}, got {self.trained}"
            )
        if self.reduction not in ("none", "mean"):
            raise ValueError(f"reduction: expected 'none' or 'mean', got {self.reduction!r}")

    def __call__(self, inputs: Tensors, valid: Tensor | None = None) -> Tensor:
        """Return the loss; a failure of the function breaks the law that called it."""
        case = {**inputs, **({} if valid is None else {"valid": valid})}
        result = call(self.function, case, **self.arguments(inputs, valid))
        rows = len(next(iter(inputs.values())))
        shape = (rows,) if self.reduction == "none" else ()
        if not isinstance(result, Tensor) or result.shape != shape:
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            fail(case, f"shape {list(shape)}", got)
        return result

    def arguments(self, inputs: Tensors, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Return all arguments of a call; a mask that is not given is true everywhere."""
        if self.valid is None:
            return dict(inputs)
        rows = len(next(iter(inputs.values())))
        everywhere = torch.ones(rows, dtype=torch.bool, device="cpu")
        return {**inputs, self.valid: everywhere if valid is None else valid}

    def gradient(self, inputs: Tensors, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Return the gradient of the summed loss by each trained argument; zeros if it has none."""
        held = self.leaves(inputs, self.trained)
        total = self(held, valid).sum()
        leaves = [held[name] for name in self.trained]
        if not total.requires_grad:
            return {name: torch.zeros_like(held[name]) for name in self.trained}
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for name, leaf, grad in zip(self.trained, leaves, grads, strict=True)
        }

    def leaves(self, inputs: Tensors, names: Iterable[str]) -> dict[str, Tensor]:
        """Return copies, those of ``names`` with a gradient of their own."""
        return {k: x.detach().clone().requires_grad_(k in names) for k, x in inputs.items()}

    def draw(self, *, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[dict[str, Tensor]]:
        """Return a strategy for the inputs of three rows."""
        parts = {}
        for name, role in self.inputs.items():
            shape, number = ROLES[role]
            parts[name] = tensors((ROWS, *shape), number=number, dtype=dtype)
        return st.fixed_dictionaries(parts)

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        """The function under ``torch.compile``."""
        torch.compiler.reset()
        return torch.compile(self.function, fullgraph=True, backend="aot_eager")


#: Laws of any loss of rows, for ``Loss``.
LOSS: Laws[Loss] = Laws("loss", Loss)


def _needs_valid(f: Loss) -> str | None:
    return None if f.valid is not None else "the loss takes no mask"


@LOSS.law(
    why="A gradient into the old policy, the advantage or the target optimizes something else, or "
    "holds the graph of the rollout in memory.",
    skip=lambda f: None if f.detaches else "the caller detaches the constants",
)
def constants(f: Loss, data: DataObject) -> None:
    """Constants get no gradient, even if the caller forgot to detach them."""
    inputs = data.draw(f.draw())
    held = f.leaves(inputs, inputs)
    total = f(held).sum()
    if not total.requires_grad:
        fail(inputs, f"a gradient to {', '.join(f.trained)}", "a result without gradient")
    names = [name for name in inputs if name not in f.trained]
    if not names:
        return
    grads = torch.autograd.grad(total, [held[name] for name in names], allow_unused=True)
    for name, grad in zip(names, grads, strict=True):
        if grad is not None and bool((grad != 0).any()):
            fail(inputs, f"no gradient to {name}", grad)


@LOSS.law(
    why="Micro-batches and ranks split the rows; statistics over the batch inside a loss change "
    "the gradient with the batch size.",
    skip=lambda f: None if f.reduction == "none" else "the loss is a mean over rows",
)
def slice_equals_whole(f: Loss, data: DataObject) -> None:
    """A row alone gives what it gives in a batch."""
    inputs = data.draw(f.draw())
    row = data.draw(st.integers(0, ROWS - 1))
    alone = f({name: x[row : row + 1] for name, x in inputs.items()})
    expect_close(f(inputs)[row : row + 1], alone, {**inputs, "row": row}, tolerance=f.tolerance)


@LOSS.law(
    why="Rows of lost rewards hold NaN or stale numbers; NaN times a mask of 0 is NaN, and "
    "advantage 0 in place of a mask still pulls toward the old policy under DiffusionNFT.",
    skip=_needs_valid,
)
def mask_equals_deletion(f: Loss, data: DataObject) -> None:
    """A masked row adds nothing to value and gradient, whatever it holds, NaN included."""
    inputs = data.draw(f.draw())
    lost = data.draw(st.integers(0, ROWS - 1))
    valid = torch.arange(ROWS, device="cpu") != lost
    garbage = data.draw(st.sampled_from([None, math.nan, math.inf, 1e30]))
    held = {name: x.clone() for name, x in inputs.items()}
    for x in held.values():
        if garbage is not None:
            x[~valid] = garbage
    kept = {name: x[valid] for name, x in inputs.items()}
    got, expected, case = f(held, valid), f(kept), {**held, "valid": valid}
    if f.reduction == "none":
        if bool((got[~valid] != 0).any()):
            fail(case, "loss 0 in masked rows", got)
        got = got[valid]
    expect_close(got, expected, case, tolerance=f.tolerance)
    gradient, own = f.gradient(held, valid), f.gradient(kept)
    for name in f.trained:
        if bool((gradient[name][~valid] != 0).any()):
            fail(case, f"gradient 0 by {name} in masked rows", gradient[name])
        expect_close(gradient[name][valid], own[name], case, tolerance=f.tolerance)


@LOSS.law(
    why="A detach in the wrong place gives a loss that falls and a gradient that points elsewhere.",
)
def gradient_of_value(f: Loss, data: DataObject) -> None:
    """The gradient is that of the value."""
    inputs = _generic(f, data)
    got = f.gradient(inputs)
    for name in f.trained:
        direction = torch.randn(inputs[name].shape, generator=_generator(data), dtype=torch.float64)
        step, tolerance = _difference_step(f, inputs)
        up = f({**inputs, name: inputs[name] + step * direction}).double().sum()
        down = f({**inputs, name: inputs[name] - step * direction}).double().sum()
        slope = ((up - down) / (2 * step)).detach()
        expect_close((got[name] * direction).sum(), slope, inputs, tolerance=tolerance)


@LOSS.law(
    why="Gauss-Newton and influence estimates use them; the square root inside a norm makes them "
    "NaN, or 0 in silence, at an error of exactly 0, which is the first update after a sync.",
)
def second_derivatives(f: Loss, data: DataObject) -> None:
    """Second derivatives are those of the gradient, also where all latents are equal."""
    inputs = _generic(f, data)
    if data.draw(st.booleans()):
        latents = [name for name, role in f.inputs.items() if role == "latent"]
        inputs |= {name: inputs[latents[0]].clone() for name in latents}
    for name in f.trained:
        direction = torch.randn(inputs[name].shape, generator=_generator(data), dtype=torch.float64)
        step, tolerance = _difference_step(f, inputs)
        up, down = (
            f.gradient({**inputs, name: inputs[name] + s * direction})[name] for s in (step, -step)
        )
        expected = (up - down) / (2 * step)
        twice, forward = _curvature(f, inputs, name, direction)
        case = {**inputs, "direction": direction}
        expect_close(
            twice, expected, {**case, "by": "two backward passes"}, tolerance=10 * tolerance
        )
        expect_close(
            forward, expected, {**case, "by": "func.jvp of func.grad"}, tolerance=10 * tolerance
        )


@LOSS.law(
    why="A loss in bfloat16 has three digits: a ratio of 1.001 is a ratio of 1, and a mean over "
    "rows loses most of them.",
)
def half_precision(f: Loss, data: DataObject) -> None:
    """Half-precision inputs are refused, or give the float32 result of the same numbers."""
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    inputs = data.draw(f.draw(dtype=dtype))
    mixed = {k: x if f.inputs[k] == "latent" else x.float() for k, x in inputs.items()}
    exact = f({k: x.float() for k, x in inputs.items()})
    if not bool(exact.isfinite().all()):
        return
    for case in (inputs, mixed):
        if refuses(f.function, **f.arguments(case)):
            continue
        got = f(case)
        if got.dtype in (torch.bfloat16, torch.float16):
            fail(case, "a loss in float32", f"one in {str(got.dtype).removeprefix('torch.')}")
        expect_close(got.float(), exact, case, tolerance=1e-3)


@LOSS.law(
    why="A constant made without an explicit dtype and device loses digits, or sits on the wrong "
    "device.",
)
def default_dtype_and_device(f: Loss, data: DataObject) -> None:
    """The default dtype and device of torch change nothing."""
    inputs = data.draw(f.draw())
    expected, before = f(inputs), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            got = f(inputs)
    finally:
        torch.set_default_dtype(before)
    if got.is_meta:
        fail(inputs, "a loss on the device of its inputs", "one on the default device")
    expect_close(got, expected, inputs, tolerance=f.tolerance)


@LOSS.law(
    why="A graph break in the loss splits the training step, and a value that was traced as a "
    "constant is wrong from the second call on.",
)
def compiled_equals_eager(f: Loss, data: DataObject) -> None:
    """Compiled it gives what it gives eagerly, without a graph break."""
    inputs = data.draw(f.draw())
    with _torch_own_warnings():
        got = call(f.compiled, inputs, **f.arguments(inputs))
    expect_close(got, f(inputs), inputs, tolerance=f.tolerance)


@dataclass(frozen=True)
class PolicyLoss:
    """A policy-gradient surrogate under test, such as the clipped one.

    Attributes:
        function: called as ``function(log_prob, old_log_prob, advantage)``, all [M].
        reduction: "none" where it returns [M], "mean" where it returns the mean over rows.
        valid: name of the mask argument, ``None`` where there is none.
        clip_low: how far the ratio may fall below 1; ``None``: nothing is clipped.
        clip_high: how far the ratio may rise above 1.
        detaches: it detaches old log-probs and advantages itself.
        tolerance: relative difference that counts as rounding.
    """

    function: Callable[..., Any]
    reduction: str = "none"
    valid: str | None = None
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    detaches: bool = False
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if self.reduction not in ("none", "mean"):
            raise ValueError(f"reduction: expected 'none' or 'mean', got {self.reduction!r}")
        if self.clip_low is not None and not 0 <= self.clip_low < 1:
            raise ValueError(f"clip_low: expected a number in [0, 1), or None, got {self.clip_low}")
        if self.clip_high is not None and not 0 <= self.clip_high < math.inf:
            raise ValueError(f"clip_high: expected a number >= 0, or None, got {self.clip_high}")
        if (self.clip_low is None) != (self.clip_high is None):
            raise ValueError("clip_low, clip_high: expected two numbers, or None for both")

    @cached_property
    def loss(self) -> Loss:
        """The same function, as any loss."""

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
        )

    def gradient(self, log_ratio: Tensor, advantage: Tensor, old: Tensor | None = None) -> Tensor:
        """Return the gradient by the log-probs of the summed loss, [M]."""
        old = torch.zeros_like(log_ratio) if old is None else old
        inputs = {"log_prob": old + log_ratio, "old_log_prob": old, "advantage": advantage}
        rows = len(log_ratio) if self.reduction == "mean" else 1
        return self.loss.gradient(inputs)["log_prob"] * rows


#: Laws of policy-gradient surrogates, for ``PolicyLoss``; those of all losses among them.
POLICY_LOSS: Laws[PolicyLoss] = Laws("policy-loss", PolicyLoss, LOSS.through(lambda f: f.loss))


@POLICY_LOSS.law(
    why="At ratio 1 the surrogate must be the policy gradient; a sign, a missing ratio or a clip "
    "range around the wrong value shows here.",
)
def on_policy_gradient(f: PolicyLoss, data: DataObject) -> None:
    """On-policy, the gradient by the log-prob is minus the advantage."""
    old = data.draw(tensors((ROWS,)))
    advantage = data.draw(tensors((ROWS,), number=_small))
    got = f.gradient(torch.zeros_like(old), advantage, old)
    expect_close(
        got, -advantage, {"old_log_prob": old, "advantage": advantage}, tolerance=f.tolerance
    )


@POLICY_LOSS.law(
    why="The mean over samples must move the policy toward the reward, by the right amount.",
)
def policy_gradient(f: PolicyLoss, data: DataObject) -> None:
    """Its gradient is the policy gradient of a Gaussian policy, known in closed form."""
    from mteditflow.testing.gaussian import GaussianPolicy

    near = st.integers(0, 16).map(lambda byte: eighths(byte % 9 if byte < 9 else 72 + byte))
    policy = GaussianPolicy(data.draw(near), data.draw(st.sampled_from([0.25, 0.5, 1.0])))
    goal = data.draw(near)
    action, weight = policy.quadrature()
    mean = torch.tensor(policy.mean, dtype=torch.float64, requires_grad=True)
    log_prob = GaussianPolicy.log_density(action, mean, policy.std)
    advantage = -0.5 * (action - goal) ** 2 * weight
    rows = len(action) if f.reduction == "mean" else 1
    loss = f.loss({"log_prob": log_prob, "old_log_prob": log_prob.detach(), "advantage": advantage})
    (got,) = torch.autograd.grad(loss.sum() * rows, mean)
    expected = torch.tensor(-policy.gradient(goal), dtype=torch.float64)
    case = {"mean": policy.mean, "std": policy.std, "goal": goal}
    expect_close(got, expected, case, tolerance=max(f.tolerance, 1e-6))


@POLICY_LOSS.law(
    why="Without it one batch moves the policy without bound.",
    skip=lambda f: "nothing is clipped" if f.clip_low is None else None,
)
def clipped_side(f: PolicyLoss, data: DataObject) -> None:
    """Beyond the clip range, on the side already won, the gradient is exactly 0."""
    _clipped(f, data, data.draw(st.sampled_from([0.01, 0.1, 1.0, 10.0])))


@POLICY_LOSS.law(
    why="Log-probs of a whole latent differ by hundreds after one bad update; exp overflows to "
    "infinity, and infinity times a clipped gradient of 0 is NaN in every weight.",
    skip=lambda f: "nothing is clipped" if f.clip_low is None else None,
)
def far_ratios(f: PolicyLoss, data: DataObject) -> None:
    """A ratio that overflows leaves a clipped sample's gradient at 0."""
    _clipped(f, data, data.draw(st.sampled_from([100.0, 1000.0])))


@POLICY_LOSS.law(
    why="Clipping both sides leaves a policy that went wrong where it is.",
)
def wrong_side(f: PolicyLoss, data: DataObject) -> None:
    """A sample that drifted to the wrong side is pulled back with gradient -ratio * advantage."""
    drift = data.draw(st.sampled_from([0.05, 0.25, 0.5]))
    good = data.draw(st.sampled_from([0.5, 1.0, 3.0]))
    log_ratio = torch.tensor([drift, -drift], dtype=torch.float64)
    advantage = torch.tensor([-good, good], dtype=torch.float64)
    got = f.gradient(log_ratio, advantage)
    expected = -log_ratio.exp() * advantage
    case = {"log_ratio": log_ratio, "advantage": advantage}
    expect_close(got, expected, case, tolerance=f.tolerance)


@POLICY_LOSS.law(
    why="Log-probs of a latent are sums over many elements; a ratio of exponentials overflows.",
)
def difference(f: PolicyLoss, data: DataObject) -> None:
    """Only the difference of the log-probs matters."""
    log_ratio = data.draw(tensors((ROWS,), number=ROLES["log-ratio"][1]))
    advantage = data.draw(tensors((ROWS,), number=_small))
    shift = data.draw(st.sampled_from([-1e5, -1000.0, 1000.0, 1e5]))
    got = f.gradient(log_ratio, advantage, torch.full_like(log_ratio, shift))
    expected = f.gradient(log_ratio, advantage)
    case = {"log_ratio": log_ratio, "advantage": advantage, "shift": shift}
    expect_close(got, expected, case, tolerance=max(f.tolerance, 1e-5))


@dataclass(frozen=True)
class NFTLoss:
    """A DiffusionNFT loss under test, in velocity space.

    Attributes:
        function: called as ``function(velocity, old_velocity, target, r, nft_beta=b)`` with latents
            [M, ...] and r [M]; returns [M], each the mean over the elements of a row.
        valid: name of the mask argument, ``None`` where there is none.
        detaches: it detaches old velocity and target itself.
        tolerance: relative difference that counts as rounding.
    """

    function: Callable[..., Any]
    valid: str | None = None
    detaches: bool = False
    tolerance: float = 1e-5

    @cached_property
    def loss(self) -> Loss:
        """The same function, as any loss, at ``nft_beta`` 1/2."""

        def by_name(
            velocity: Tensor, old_velocity: Tensor, target: Tensor, r: Tensor, **mask: Any
        ) -> Any:
            return self.function(velocity, old_velocity, target, r, nft_beta=0.5, **mask)

        roles = {"velocity": "latent", "old_velocity": "latent", "target": "latent", "r": "share"}
        return Loss(
            by_name, roles, ("velocity",), "none", self.valid, self.detaches, self.tolerance
        )

    def gradient(self, inputs: Tensors, b: float) -> Tensor:
        """Return the gradient by the velocity of the summed loss."""
        leaf = inputs["velocity"].clone().requires_grad_()
        case = {**inputs, "nft_beta": b}
        others = [inputs[name] for name in ("old_velocity", "target", "r")]
        mask = {k: x for k, x in self.loss.arguments(inputs).items() if k == self.valid}
        loss = call(self.function, case, leaf, *others, nft_beta=b, **mask)
        return torch.autograd.grad(loss.sum(), leaf)[0]


#: Laws of DiffusionNFT losses, for ``NFTLoss``; those of all losses among them.
NFT_LOSS: Laws[NFTLoss] = Laws("nft-loss", NFTLoss, LOSS.through(lambda f: f.loss))
_BETAS = st.sampled_from([0.1, 0.5, 1.0, 2.0])


@NFT_LOSS.law(
    why="r = 1 must pull toward the sample, r = 0 push away, in proportion to b; the loss of one "
    "branch alone does neither.",
)
def gradient_at_the_old_policy(f: NFTLoss, data: DataObject) -> None:
    """At the old policy the gradient is 2 b (2r - 1) (old velocity - target) per element."""
    inputs, b = data.draw(f.loss.draw()), data.draw(_BETAS)
    inputs["velocity"] = inputs["old_velocity"].clone()
    elements = inputs["target"][0].numel()
    r = inputs["r"][:, None]
    expected = 2 * b * (2 * r - 1) * (inputs["old_velocity"] - inputs["target"]) / elements
    got = f.gradient(inputs, b)
    expect_close(got, expected, {**inputs, "nft_beta": b}, tolerance=f.tolerance)


@NFT_LOSS.law(
    why="This is the policy that DiffusionNFT's Eq. 25 promises; other weights of the two branches "
    "have another one.",
)
def minimum(f: NFTLoss, data: DataObject) -> None:
    """The minimum is the old velocity moved by (1 - 2r) / b times its error."""
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
    """R = 1, b = 1 is flow matching."""
    inputs = data.draw(f.loss.draw())
    inputs["r"] = torch.ones_like(inputs["r"])
    arguments = [inputs[name] for name in ("velocity", "old_velocity", "target", "r")]
    mask = {k: x for k, x in f.loss.arguments(inputs).items() if k == f.valid}
    got = call(f.function, inputs, *arguments, nft_beta=1.0, **mask)
    expected = (inputs["velocity"] - inputs["target"]).square().flatten(1).mean(1)
    expect_close(got, expected, inputs, tolerance=f.tolerance)


def check_loss(
    function: Callable[..., Any],
    *,
    inputs: Mapping[str, str],
    trained: tuple[str, ...],
    reduction: str = "none",
    valid: str | None = None,
    detaches: bool = False,
    tolerance: float = 1e-5,
    **search: Any,
) -> None:
    """Check any loss of rows, called as ``function(**inputs)``.

    Args:
        function: maps tensors by name to [M], or to the mean over rows.
        inputs: name of each argument to its role, as in ``Loss``.
        trained: names that get a gradient; all others are constants.
        reduction: "none" or "mean".
        valid: name of the mask argument; ``None`` where there is none.
        detaches: it detaches its constants itself, so that one with a gradient does no harm.
        tolerance: relative difference that counts as rounding.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.
        ValueError: a role or a name is unknown.

    Source: conventions of losses in this library; see CONTRIBUTING.md.

    Example:
        >>> from mteditflow import velocity_kl
        >>> roles = {"velocity": "latent", "reference_velocity": "latent"}
        >>> check_loss(velocity_kl, inputs=roles, trained=("velocity",), examples=2)
    """
    LOSS.check(Loss(function, inputs, trained, reduction, valid, detaches, tolerance), **search)


def check_policy_loss(
    function: Callable[..., Any],
    *,
    reduction: str = "none",
    valid: str | None = None,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    detaches: bool = False,
    tolerance: float = 1e-5,
    **search: Any,
) -> None:
    """Check a policy-gradient surrogate, called as ``function(log_prob, old_log_prob, advantage)``.

    Args:
        function: maps three tensors [M] to [M], or to the mean over rows.
        reduction: "none" or "mean".
        valid: name of the mask argument; ``None`` where there is none.
        clip_low: how far the ratio may fall below 1; ``None``: nothing is clipped.
        clip_high: how far the ratio may rise above 1.
        detaches: it detaches its constants itself, so that one with a gradient does no harm.
        tolerance: relative difference that counts as rounding.
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
    subject = PolicyLoss(function, reduction, valid, clip_low, clip_high, detaches, tolerance)
    POLICY_LOSS.check(subject, **search)


def check_nft_loss(
    function: Callable[..., Any],
    *,
    valid: str | None = None,
    detaches: bool = False,
    tolerance: float = 1e-5,
    **search: Any,
) -> None:
    """Check a DiffusionNFT loss.

    Args:
        function: called as ``function(velocity, old_velocity, target, r, nft_beta=b)`` with latents
            [M, ...] and r [M]; returns [M].
        valid: name of the mask argument; ``None`` where there is none.
        detaches: it detaches its constants itself, so that one with a gradient does no harm.
        tolerance: relative difference that counts as rounding.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 5, 23-25; DiffusionNFT (arXiv 2509.16117).

    Example:
        >>> from mteditflow import nft_loss
        >>> check_nft_loss(nft_loss, examples=2)
    """
    subject = NFTLoss(function, valid, detaches, tolerance)
    NFT_LOSS.check(subject, **search)


def _clipped(f: PolicyLoss, data: DataObject, over: float) -> None:
    """Expect gradient 0 where the log-ratio is ``over`` the clip range, on the side won."""
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
        fail({"log_ratio": log_ratio, "advantage": advantage}, [0.0, 0.0], got)


def _generic(f: Loss, data: DataObject) -> dict[str, Tensor]:
    """Draw inputs, moved off the points where a clip or a maximum has a corner."""
    inputs = data.draw(f.draw())
    generator = _generator(data)
    for name in f.trained:
        noise = torch.rand(inputs[name].shape, generator=generator, dtype=torch.float64)
        inputs[name] = inputs[name] + 0.01 + 0.01 * noise
    return inputs


def _generator(data: DataObject) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(data.draw(st.integers(0, 99)))


@contextmanager
def _torch_own_warnings() -> Iterator[None]:
    """Ignore what torch says of its own parts, where the caller turns warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _difference_step(f: Loss, inputs: Tensors) -> tuple[float, float]:
    """Step of a central difference and its tolerance, for the dtype that the loss computes in."""
    return (1e-6, 1e-4) if f(inputs).dtype == torch.float64 else (1e-2, 1e-2)


def _curvature(f: Loss, inputs: Tensors, name: str, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Hessian times direction by two backward passes, and forward over reverse."""
    case = {**inputs, "direction": direction}

    def total(x: Tensor) -> Tensor:
        result: Tensor = f.function(**f.arguments({**inputs, name: x})).sum()
        return result

    leaf = inputs[name].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(total, case, leaf), leaf, create_graph=True)
    if gradient.requires_grad:
        (twice,) = torch.autograd.grad((gradient * direction).sum(), leaf, allow_unused=True)
    else:
        twice = None
    twice = torch.zeros_like(leaf) if twice is None else twice
    reverse: Any = torch.func.grad(total)
    with _torch_own_warnings():
        _, forward = call(torch.func.jvp, case, reverse, (inputs[name],), (direction,))
    return twice.detach(), forward.detach()
