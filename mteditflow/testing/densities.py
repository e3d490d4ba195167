"""Laws of the log-densities of solver steps and of their divergences.

Source: MT-EditFlow (arXiv 2606.01985), stochastic sampler; Flow-GRPO (arXiv 2505.05470).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from mteditflow.testing.expect import Tensors, expect_float32_result, expect_tensor, gradients
from mteditflow.testing.law import Laws, call, expect_close, fail, refuses
from mteditflow.testing.options import Subject, check_choice
from mteditflow.testing.solvers import LATENT, ROWS
from mteditflow.testing.strategies import tensors


@dataclass(frozen=True)
class Density(Subject):
    """A log-density or divergence of Gaussian steps under test.

    Attributes:
        function: called as ``function(mean, reference_mean, std)`` with latents [M, ...] and std
            [M, 1, ...]; returns [M].
        reduction: "mean" or "sum" over the elements of a row.
        tolerance: relative difference that counts as rounding.
        float32: half-precision inputs give the result of float32, in float32.
    """

    reduction: str = "mean"
    tolerance: float = 1e-5
    float32: bool = False
    names: ClassVar[tuple[str, str, str]] = ("mean", "reference_mean", "std")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reduction", self.reduction, ("mean", "sum"))

    def __call__(self, *arguments: Tensor) -> Tensor:
        """Return [M]; an exception or wrong result of the function breaks the current law."""
        case = self.case(*arguments)
        result = call(self.function, case, *arguments)
        return expect_tensor(result, arguments[0].shape[:1], case)

    def case(self, *arguments: Tensor) -> dict[str, Tensor]:
        """Return the arguments by name."""
        return dict(zip(self.names, arguments, strict=True))

    def gradient(self, at: int, *arguments: Tensor) -> Tensor:
        """Return the gradient of the summed result by the argument at a position."""
        inputs = list(arguments)
        inputs[at] = inputs[at].clone().requires_grad_()
        name = self.names[at]
        return gradients(self(*inputs).sum(), {name: inputs[at]}, self.case(*arguments))[name]

    def reduced(self, per_element: Tensor) -> Tensor:
        """Return the mean or sum over the elements of each row, [M]."""
        flat = per_element.flatten(1)
        return flat.mean(1) if self.reduction == "mean" else flat.sum(1)


@dataclass(frozen=True)
class LogProb(Density):
    """A log-density of steps under test, called as ``function(x, mean, std)``; returns [M].

    Attributes:
        deterministic: the function is also called with rows of std 0, such as a solver's last step.
    """

    deterministic: bool = False
    names: ClassVar[tuple[str, str, str]] = ("x", "mean", "std")


#: Reason to skip the law of deterministic rows.
NO_DETERMINISTIC_ROWS = (
    "not checked, since a caller may leave out rows of std 0; --deterministic promises that the "
    "function takes them, and has it checked"
)
DENSITY: Laws[Density] = Laws("density", Density)


def _positive(byte: int) -> float:
    return (1 + byte % 16) / 8


def _draw(data: DataObject) -> tuple[Tensor, Tensor, Tensor]:
    x, mean = data.draw(tensors((ROWS, *LATENT))), data.draw(tensors((ROWS, *LATENT)))
    return x, mean, data.draw(tensors((ROWS, 1), number=_positive))


@DENSITY.law(
    why="The rounding of a mean in half precision is larger than its change by an update.",
)
def half_precision(f: Density, data: DataObject) -> None:
    """Half-precision means are refused, or give the float32 result within their rounding."""
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    half = f.case(*(x.to(dtype) for x in _draw(data)))

    def by_name(inputs: Tensors) -> Tensor:
        return f(*(inputs[name] for name in f.names))

    refused = partial(refuses, f.function, *half.values())
    expect_float32_result(by_name, half, half, float32=f.float32, refused=refused)


#: Laws of log-densities of steps, for ``LogProb``.
LOG_PROB: Laws[LogProb] = Laws(
    "log-prob", LogProb, DENSITY.through(lambda f: f), called="fn(x, mean, std), to [M]"
)


#: Laws of KL divergences of steps, for ``Density``.
KL: Laws[Density] = Laws("kl", Density, DENSITY, called="fn(mean, reference_mean, std), to [M]")


@LOG_PROB.law(
    why="Without -log std or the 1/2 the ratio of two policies of different std is wrong, and the "
    "number is no log-prob.",
)
def log_density(f: LogProb, data: DataObject) -> None:
    """It is the log-density of torch.distributions.Normal."""
    x, mean, std = _draw(data)
    expected = f.reduced(_log_density(x, mean, std))
    expect_close(f(x, mean, std), expected, f.case(x, mean, std), tolerance=f.tolerance)


@LOG_PROB.law(
    why="This is the score that the policy gradient averages.",
)
def score(f: LogProb, data: DataObject) -> None:
    """Its gradient by the mean is (x - mean) / std^2."""
    x, mean, std = _draw(data)
    count = mean[0].numel() if f.reduction == "mean" else 1  # a mean divides the gradient
    expected = (x - mean) / std**2 / count
    got, case = f.gradient(1, x, mean, std), f.case(x, mean, std)
    expect_close(got, expected, case, tolerance=f.tolerance)


@LOG_PROB.law(
    why="The last step of a solver has std 0; one NaN in its gradient makes every weight NaN.",
    skip=lambda f: None if f.deterministic else NO_DETERMINISTIC_ROWS,
    options=("--no-deterministic",),
)
def deterministic_rows(f: LogProb, data: DataObject) -> None:
    """A row of std 0 has a finite value and gradient 0 for any content, and affects no other."""
    x, mean, std = _draw(data)
    row = data.draw(st.integers(0, ROWS - 1))
    others = torch.arange(ROWS, device="cpu") != row
    arguments = x[others], mean[others], std[others]
    own = f(*arguments), f.gradient(1, *arguments)
    std[row] = 0
    garbage = data.draw(st.sampled_from([None, math.nan, math.inf]))
    if garbage is not None:
        x[row], mean[row] = garbage, garbage
    case = f.case(x, mean, std)
    value, got = f(x, mean, std), f.gradient(1, x, mean, std)
    if not bool(value.isfinite().all()) or bool((got[row] != 0).any()):
        fail(
            case, f"a finite value and gradient 0 in row {row}", f"{value.tolist()}, {got.tolist()}"
        )
    for batched, alone in zip((value, got), own, strict=True):  # the other rows are unaffected
        expect_close(batched[others], alone, case, tolerance=f.tolerance)


@KL.law(
    why="A KL without the step size changes the meaning of kl_coef with every grid.",
)
def divergence(f: Density, data: DataObject) -> None:
    """It is the divergence of torch.distributions; the std of a step includes the step size."""
    x, mean, std = _draw(data)
    normal = torch.distributions.Normal
    ours, theirs = normal(x, std.expand_as(x)), normal(mean, std.expand_as(mean))
    expected = f.reduced(torch.distributions.kl_divergence(ours, theirs))
    expect_close(f(x, mean, std), expected, f.case(x, mean, std), tolerance=f.tolerance)


@KL.law(
    why="A KL computed without gradient appears in the log and does not regularize.",
)
def pulls_to_the_reference(f: Density, data: DataObject) -> None:
    """It has a gradient to the policy, and is 0 with gradient 0 at the reference."""
    other, reference, std = _draw(data)
    # d KL / d mean = (mean - reference) / std^2 per element, divided by the count for a mean.
    count = reference[0].numel() if f.reduction == "mean" else 1
    for mean in (other, reference):
        got, case = f.gradient(0, mean, reference, std), f.case(mean, reference, std)
        expect_close(got, (mean - reference) / std**2 / count, case, tolerance=f.tolerance)


def check_log_prob(
    function: Callable[..., Any],
    *,
    reduction: str = "mean",
    deterministic: bool = False,
    tolerance: float = 1e-5,
    float32: bool = False,
    **search: Any,
) -> None:
    """Check the log-density of a step, called as ``function(x, mean, std)``.

    Args:
        function: maps latents [M, ...] and std [M, 1, ...] to [M].
        reduction: "mean" or "sum" over the elements of a row.
        deterministic: the function is also called with rows of std 0, such as a solver's last step.
        tolerance: relative difference that counts as rounding.
        float32: half-precision inputs give the result of float32, in float32.
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
    LOG_PROB.check(LogProb(function, reduction, tolerance, float32, deterministic), **search)


def check_kl(
    function: Callable[..., Any],
    *,
    reduction: str = "mean",
    tolerance: float = 1e-5,
    float32: bool = False,
    **search: Any,
) -> None:
    """Check the KL divergence of two steps, called as ``function(mean, reference_mean, std)``.

    Args:
        function: maps latents [M, ...] and std [M, 1, ...] to [M].
        reduction: "mean" or "sum" over the elements of a row.
        tolerance: relative difference that counts as rounding.
        float32: half-precision inputs give the result of float32, in float32.
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
    KL.check(Density(function, reduction, tolerance, float32), **search)


def _log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    result: Tensor = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x)  # type: ignore[no-untyped-call]
    return result
