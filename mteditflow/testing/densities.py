"""Laws of the log-densities of solver steps and of their divergences.

Source: MT-EditFlow (arXiv 2606.01985), stochastic sampler; Flow-GRPO (arXiv 2505.05470).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from mteditflow.testing.law import Laws, call, expect_close, fail, refuses
from mteditflow.testing.solvers import LATENT, ROWS
from mteditflow.testing.strategies import tensors


@dataclass(frozen=True)
class Density:
    """A log-density or divergence of Gaussian steps under test.

    Attributes:
        function: called as ``function(x, mean, std)`` with latents [M, ...] and std [M, 1, ...];
            returns [M]. For a divergence ``x`` is the other mean.
        reduction: "mean" or "sum" over the elements of a row.
        tolerance: relative difference that counts as rounding.
    """

    function: Callable[..., Any]
    reduction: str = "mean"
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: expected 'mean' or 'sum', got {self.reduction!r}")

    def __call__(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return [M]; a failure of the function breaks the law that called it."""
        case = {"x": x, "mean": mean, "std": std}
        result: Tensor = call(self.function, case, x, mean, std)
        if result.shape != x.shape[:1]:
            fail(case, f"shape {list(x.shape[:1])}", f"shape {list(result.shape)}")
        return result

    def reduced(self, per_element: Tensor) -> Tensor:
        """Reduce the elements of each row."""
        flat = per_element.flatten(1)
        return flat.mean(1) if self.reduction == "mean" else flat.sum(1)


@dataclass(frozen=True)
class LogProb(Density):
    """A log-density of steps under test, called as ``function(x, mean, std)``.

    Attributes:
        deterministic: it is given rows of std 0, as the last step of a solver has.
    """

    deterministic: bool = False


DENSITY: Laws[Density] = Laws("density", Density)


def _positive(byte: int) -> float:
    return (1 + byte % 16) / 8


def _draw(data: DataObject) -> tuple[Tensor, Tensor, Tensor]:
    x, mean = data.draw(tensors((ROWS, *LATENT))), data.draw(tensors((ROWS, *LATENT)))
    return x, mean, data.draw(tensors((ROWS, 1), number=_positive))


@DENSITY.law(
    why="The rounding of a bfloat16 mean is larger than what an update moves it.",
)
def half_precision(f: Density, data: DataObject) -> None:
    """Half-precision means are refused, or give the float32 result of the same numbers."""
    x, mean, std = _draw(data)
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    half = x.to(dtype), mean.to(dtype), std.to(dtype)
    if refuses(f.function, *half):
        return
    case = dict(zip(("x", "mean", "std"), half, strict=True))
    got, expected = f(*half), f(*(t.float() for t in half))
    if got.dtype in (torch.bfloat16, torch.float16):
        fail(case, "a result in float32", f"one in {str(got.dtype).removeprefix('torch.')}")
    expect_close(got.float(), expected, case, tolerance=1e-3)


#: Laws of log-densities of steps, for ``LogProb``.
LOG_PROB: Laws[LogProb] = Laws("log-prob", LogProb, DENSITY.through(lambda f: f))


#: Laws of KL divergences of steps, for ``Density``.
KL: Laws[Density] = Laws("kl", Density, DENSITY)


@LOG_PROB.law(
    why="Without -log std or the 1/2 the ratio of two policies of different std is wrong, and the "
    "number is no log-prob.",
)
def log_density(f: LogProb, data: DataObject) -> None:
    """It is the log-density of torch.distributions.Normal."""
    x, mean, std = _draw(data)
    expected = f.reduced(_log_density(x, mean, std))
    expect_close(
        f(x, mean, std), expected, {"x": x, "mean": mean, "std": std}, tolerance=f.tolerance
    )


@LOG_PROB.law(
    why="This is the score that the policy gradient averages.",
)
def score(f: LogProb, data: DataObject) -> None:
    """Its gradient by the mean is (x - mean) / std^2."""
    x, mean, std = _draw(data)
    leaf = mean.clone().requires_grad_()
    (got,) = torch.autograd.grad(f(x, leaf, std).sum(), leaf)
    count = mean[0].numel() if f.reduction == "mean" else 1
    expected = (x - mean) / std**2 / count
    expect_close(got, expected, {"x": x, "mean": mean, "std": std}, tolerance=f.tolerance)


@LOG_PROB.law(
    why="The last step of a solver has std 0; one NaN in its gradient makes every weight NaN.",
    skip=lambda f: None if f.deterministic else "it is not given deterministic rows",
)
def deterministic_rows(f: LogProb, data: DataObject) -> None:
    """A deterministic row, std 0, has a finite value and gradient 0, whatever it holds."""
    x, mean, std = _draw(data)
    row = data.draw(st.integers(0, ROWS - 1))
    std[row] = 0
    garbage = data.draw(st.sampled_from([None, math.nan, math.inf]))
    if garbage is not None:
        x[row], mean[row] = garbage, garbage
    leaf, case = mean.clone().requires_grad_(), {"x": x, "mean": mean, "std": std}
    value = f(x, leaf, std)
    (got,) = torch.autograd.grad(value.sum(), leaf)
    if not bool(value.isfinite().all()) or bool((got[row] != 0).any()):
        fail(
            case, f"a finite value and gradient 0 in row {row}", f"{value.tolist()}, {got.tolist()}"
        )
    if not bool(got.isfinite().all()):
        fail(case, "finite gradients in the other rows", got)


@KL.law(
    why="A KL without the step size makes kl_coef mean another thing on every grid.",
)
def divergence(f: Density, data: DataObject) -> None:
    """It is the divergence of torch.distributions: the std of the step has the step size in it."""
    x, mean, std = _draw(data)
    normal = torch.distributions.Normal
    ours, theirs = normal(x, std.expand_as(x)), normal(mean, std.expand_as(mean))
    expected = f.reduced(torch.distributions.kl_divergence(ours, theirs))
    expect_close(
        f(x, mean, std), expected, {"x": x, "mean": mean, "std": std}, tolerance=f.tolerance
    )


@KL.law(
    why="A KL computed without gradient is logged and holds nothing.",
)
def pulls_to_the_reference(f: Density, data: DataObject) -> None:
    """It has a gradient to the policy, and is 0 with gradient 0 at the reference."""
    x, mean, std = _draw(data)
    case = {"x": x, "mean": mean, "std": std}
    for at in (x, mean):
        leaf = at.clone().requires_grad_()
        value = f(leaf, mean, std).sum()
        if not value.requires_grad:
            fail(case, "a gradient to the policy's mean", "a result without gradient")
        (got,) = torch.autograd.grad(value, leaf)
        count = mean[0].numel() if f.reduction == "mean" else 1
        expect_close(got, (at - mean) / std**2 / count, case, tolerance=f.tolerance)


def check_log_prob(
    function: Callable[..., Any],
    *,
    reduction: str = "mean",
    deterministic: bool = False,
    tolerance: float = 1e-5,
    **search: Any,
) -> None:
    """Check the log-density of a step, called as ``function(x, mean, std)``.

    Args:
        function: maps latents [M, ...] and std [M, 1, ...] to [M].
        reduction: "mean" or "sum" over the elements of a row.
        deterministic: it is given rows of std 0, as the last step of a solver has.
        tolerance: relative difference that counts as rounding.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.

    Source: Flow-GRPO (arXiv 2505.05470).

    Example:
        >>> from functools import partial
        >>> from mteditflow import gaussian_log_prob
        >>> check_log_prob(partial(gaussian_log_prob, reduction="mean"), examples=2)
    """
    LOG_PROB.check(LogProb(function, reduction, tolerance, deterministic), **search)


def check_kl(
    function: Callable[..., Any],
    *,
    reduction: str = "mean",
    tolerance: float = 1e-5,
    **search: Any,
) -> None:
    """Check the KL divergence of two steps, called as ``function(mean, reference_mean, std)``.

    Args:
        function: maps latents [M, ...] and std [M, 1, ...] to [M].
        reduction: "mean" or "sum" over the elements of a row.
        tolerance: relative difference that counts as rounding.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.

    Source: Flow-GRPO (arXiv 2505.05470).

    Example:
        >>> from functools import partial
        >>> from mteditflow import gaussian_kl
        >>> check_kl(partial(gaussian_kl, reduction="mean"), examples=2)
    """
    KL.check(Density(function, reduction, tolerance), **search)


def _log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    result: Tensor = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x)  # type: ignore[no-untyped-call]
    return result
