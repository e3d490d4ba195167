"""Laws of losses over rows: constants, masks, derivatives, precision, compilation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from mteditflow.testing.expect import (
    Tensors,
    expect_float32_result,
    expect_pure,
    expect_tensor,
    gradients,
)
from mteditflow.testing.law import (
    Laws,
    call,
    expect_close,
    expect_memory,
    fail,
    other_defaults,
    refuses,
)
from mteditflow.testing.options import NOT_DETACHED, Subject, check_choice
from mteditflow.testing.reports import Raised
from mteditflow.testing.strategies import Number, eighths, tensors

ROWS, LATENT = 2, (2,)


def small(byte: int) -> float:
    """Map a byte to a multiple of 1/8 in [-3, 3]."""
    return eighths(byte % 25 if byte < 128 else 81 + byte % 24)


# Shape after M, and range of values, of an argument by its role.
ROLES: Mapping[str, tuple[tuple[int, ...], Number]] = {
    "latent": (LATENT, small),
    "number": ((), small),
    "share": ((), lambda byte: byte % 9 / 8),
    "sigma": ((), lambda byte: (1 + byte % 7) / 8),
    "positive": ((), lambda byte: (1 + byte % 16) / 8),
    "log-ratio": ((), lambda byte: small(byte) / 2 + 1 / 64),  # off the corners of a clip
}


@dataclass(frozen=True)
class Loss(Subject):
    """A loss under test.

    Attributes:
        function: called with tensors by name, ``function(**inputs)``; returns [M], or a mean.
        inputs: name of each argument to its role: "latent" [M, ...], or per row [M] a "number", a
            "share" in [0, 1], a "sigma" in (0, 1), a "positive" number, a "log-ratio".
        trained: names of arguments that get a gradient; all others are constants.
        reduction: "none" if it returns [M], "mean" if it returns the mean over rows.
        valid: name of the mask argument, boolean [M]; ``None``: there is no mask.
        detaches: the function detaches its constants, so they may require a gradient.
        tolerance: relative difference that counts as rounding.
        float32: half-precision inputs give the result of float32, in float32.
    """

    inputs: Mapping[str, str]
    trained: tuple[str, ...]
    reduction: str = "none"
    valid: str | None = None
    detaches: bool = False
    tolerance: float = 1e-5
    float32: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inputs, Mapping) or not self.inputs:
            raise TypeError(f"inputs: expected a mapping of names to roles, got {self.inputs!r}")
        unknown = set(self.inputs.values()) - set(ROLES)
        if unknown:
            raise ValueError(f"inputs: expected roles {', '.join(ROLES)}, got {sorted(unknown)}")
        if isinstance(self.trained, str):
            raise TypeError(
                f"trained: expected a tuple of names, got {self.trained!r}; "
                f"write ({self.trained!r},)"
            )
        if not self.trained or not set(self.trained) <= set(self.inputs):
            got = self.trained or "none"
            raise ValueError(f"trained: expected names in {sorted(self.inputs)}, got {got}")
        check_choice("reduction", self.reduction, ("none", "mean"))
        check_mask_name(self.valid, self.inputs)

    def __call__(self, inputs: Tensors, valid: Tensor | None = None) -> Tensor:
        """Return the loss; an exception or invalid result of the function breaks the law."""
        case = self.case(inputs, valid)
        result = call(self.function, case, **self.arguments(inputs, valid))
        shape = (_rows(inputs),) if self.reduction == "none" else ()
        return expect_tensor(result, shape, case)

    def case(self, inputs: Tensors, valid: Tensor | None = None) -> dict[str, object]:
        """Return the arguments of a call by name, for messages."""
        return {**inputs, **({} if valid is None else {str(self.valid): valid})}

    def arguments(self, inputs: Tensors, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Return all arguments of a call; a missing mask is all true."""
        if self.valid is None:
            return dict(inputs)
        everywhere = torch.ones(_rows(inputs), dtype=torch.bool, device="cpu")
        return {**inputs, self.valid: everywhere if valid is None else valid}

    def gradient(self, inputs: Tensors, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Return the gradient of the summed loss by each trained argument; none breaks the law."""
        copies = self.leaves(inputs, self.trained)
        leaves = {name: copies[name] for name in self.trained}
        return gradients(self(copies, valid).sum(), leaves, self.case(inputs, valid))

    def leaves(self, inputs: Tensors, names: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of the inputs; those in ``names`` require a gradient."""
        return {k: x.detach().clone().requires_grad_(k in names) for k, x in inputs.items()}

    def draw(self, *, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[dict[str, Tensor]]:
        """Return a strategy for the inputs of two rows."""
        parts = {}
        for name, role in self.inputs.items():
            shape, number = ROLES[role]
            parts[name] = tensors((ROWS, *shape), number=number, dtype=dtype)
        return st.fixed_dictionaries(parts)

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return inputs of two rows from a generator, float64."""
        inputs = {}
        for name, role in self.inputs.items():
            shape, number = ROLES[role]
            drawn = torch.randint(256, (ROWS, *shape), generator=generator, device="cpu")
            numbers = [number(byte) for byte in drawn.flatten().tolist()]
            inputs[name] = torch.tensor(numbers, dtype=torch.float64, device="cpu").view_as(drawn)
        return inputs

    def misfit(self) -> str | None:
        """Return which reduction the function has if it is not the stated one, or ``None``."""
        inputs = self.sample(torch.Generator(device="cpu").manual_seed(0))
        try:
            result = self.function(**self.arguments(inputs))
        except (Exception, SystemExit):  # left to the laws, which show it with its case
            return None
        ranks = {0: "mean", 1: "none"}
        found = ranks.get(result.ndim) if isinstance(result, Tensor) else None
        if found in (None, self.reduction):
            return None
        shape = f"shape {list(getattr(result, 'shape', ()))}"
        return f"reduction: expected {found} for a result of {shape}, got {self.reduction}"

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        """The function under ``torch.compile``."""
        torch.compiler.reset()
        return torch.compile(self.function, fullgraph=True, backend="aot_eager")


#: Laws of any loss of rows, for ``Loss``.
LOSS: Laws[Loss] = Laws("loss", Loss, called="fn(**tensors), to [M] or a mean")


def _needs_valid(f: Loss) -> str | None:
    if f.valid is not None:
        return None
    return "the loss takes no mask; --valid NAME names one, and has it checked"


@LOSS.law(
    why="A gradient into the old policy, the advantage or the target optimizes something else, or "
    "keeps the graph of the rollout in memory.",
    skip=lambda f: None if f.detaches else NOT_DETACHED,
    options=("--no-detaches",),
)
def constants(f: Loss, data: DataObject) -> None:
    """Constants get no gradient, even if the caller did not detach them."""
    inputs = data.draw(f.draw())
    held = f.leaves(inputs, inputs)
    leaves = {name: x for name, x in held.items() if name not in f.trained}
    total = f(held).sum()
    if not total.requires_grad:
        fail(inputs, f"a gradient to {', '.join(f.trained)}", "no gradient")
    for name, grad in (gradients(total, leaves, inputs) if leaves else {}).items():
        if bool((grad != 0).any()):
            fail(inputs, f"no gradient to {name}", grad, wrong=grad != 0)


@LOSS.law(
    why="An advantage or a mask that changes in place is wrong in the next loss, and in the log.",
)
def pure(f: Loss, data: DataObject) -> None:
    """The arguments are left as they were, and a second call gives the same."""
    inputs = data.draw(f.draw())
    lost = data.draw(st.integers(0, ROWS))
    mask = {} if f.valid is None else {f.valid: torch.arange(ROWS, device="cpu") != lost}
    expect_pure(
        lambda x: f({k: x[k] for k in inputs}, x[f.valid] if f.valid else None),
        {**inputs, **mask},
        {**inputs, **mask},
    )


@LOSS.law(
    why="Micro-batches and ranks split the rows; statistics over the batch inside a loss change "
    "the gradient with the batch size.",
    skip=lambda f: None if f.reduction == "none" else "--reduction: the loss is a mean over rows",
    options=("--reduction",),
)
def slice_equals_whole(f: Loss, data: DataObject) -> None:
    """A row has the same loss alone and in a batch."""
    inputs = data.draw(f.draw())
    row = data.draw(st.integers(0, ROWS - 1))
    alone = f({name: x[row : row + 1] for name, x in inputs.items()})
    expect_close(f(inputs)[row : row + 1], alone, {**inputs, "row": row}, tolerance=f.tolerance)


@LOSS.law(
    why="Latents are [M, C, H, W] or [M, tokens, channels]; a mean over one axis, or a sum over "
    "another, is right for flat latents alone.",
    skip=lambda f: None if "latent" in f.inputs.values() else "the loss takes no latents",
)
def latent_shape(f: Loss, data: DataObject) -> None:
    """Latents of another shape with the same elements are refused, or give the same loss."""
    inputs, shape = data.draw(f.draw()), data.draw(st.permutations((1, *LATENT, 1)))
    shaped = {
        k: x.reshape(ROWS, *shape) if f.inputs[k] == "latent" else x for k, x in inputs.items()
    }
    if not refuses(f.function, **f.arguments(shaped)):
        expect_close(f(shaped), f(inputs), shaped, tolerance=f.tolerance)


@LOSS.law(
    why="Rows of lost rewards contain NaN or stale numbers; NaN times a mask of 0 is NaN, and in "
    "DiffusionNFT advantage 0 in place of a mask still pulls toward the old policy.",
    skip=_needs_valid,
)
def mask_equals_deletion(f: Loss, data: DataObject) -> None:
    """A masked row adds nothing to value and gradient, for any content, even if all are masked."""
    inputs = data.draw(f.draw())
    lost = data.draw(st.integers(0, ROWS))  # ROWS stands for all
    valid = (torch.arange(ROWS, device="cpu") != lost) & (lost < ROWS)
    garbage = data.draw(st.sampled_from([None, math.nan, math.inf, 1e30]))
    held = {name: x.clone() for name, x in inputs.items()}
    for x in held.values():
        if garbage is not None:
            x[~valid] = garbage
    kept = {name: x[valid] for name, x in inputs.items()}
    got, case = f(held, valid), f.case(held, valid)
    if lost == ROWS:
        grads = f.gradient(held, valid)
        for what, x in {"loss": got, **{f"gradient by {k}": x for k, x in grads.items()}}.items():
            if not bool((x == 0).all()):  # NaN is not 0
                fail(case, f"{what} 0 where all rows are masked", x, wrong=x != 0)
        return
    expected = f(kept)
    if f.reduction == "none":
        if bool((got[~valid] != 0).any()):
            fail(case, "loss 0 in masked rows", got, wrong=~valid & (got != 0))
        got = got[valid]
    expect_close(got, expected, case, tolerance=f.tolerance)
    gradient, own = f.gradient(held, valid), f.gradient(kept)
    for name in f.trained:
        if bool((gradient[name][~valid] != 0).any()):
            wrong = gradient[name] != 0
            wrong[valid] = False
            fail(case, f"gradient 0 by {name} in masked rows", gradient[name], wrong=wrong)
        expect_close(gradient[name][valid], own[name], case, tolerance=f.tolerance)


@LOSS.law(
    why="One NaN in a gradient is NaN in every weight after the step.",
)
def finite(f: Loss, data: DataObject) -> None:
    """Value and gradient are finite on finite inputs, even if latents of a row are equal."""
    inputs = _equal_latents(f, data.draw(f.draw()), data)
    for what, x in {"loss": f(inputs), **f.gradient(inputs)}.items():
        if not bool(x.isfinite().all()):
            fail(inputs, f"a finite {what}", x, wrong=~x.isfinite())


@LOSS.law(
    why="A misplaced detach gives a gradient that is not that of the reported loss.",
)
def gradient_of_value(f: Loss, data: DataObject) -> None:
    """The gradient equals finite differences of the value."""
    inputs = _generic(f, data)
    got = f.gradient(inputs)
    for name in f.trained:
        direction = _direction(inputs[name], data)
        step, tolerance = _difference_step(f, inputs)
        up = f({**inputs, name: inputs[name] + step * direction}).double().sum()
        down = f({**inputs, name: inputs[name] - step * direction}).double().sum()
        slope = ((up - down) / (2 * step)).detach()
        expect_close((got[name] * direction).sum(), slope, inputs, tolerance=tolerance)


@LOSS.law(
    why="Gauss-Newton and influence estimates use them; the square root inside a norm makes them "
    "NaN, or silently 0, at an error of exactly 0, as in the first update after a sync.",
)
def second_derivatives(f: Loss, data: DataObject) -> None:
    """Second derivatives equal finite differences of the gradient, even if latents are equal."""
    inputs = _equal_latents(f, _generic(f, data), data)
    for name in f.trained:
        direction = _direction(inputs[name], data)
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
    why="After an off-by-one slice, a wrong broadcast or a forgotten channel some weights never "
    "train.",
)
def every_entry(f: Loss, data: DataObject) -> None:
    """Every entry of a trained argument gets a gradient on some inputs."""
    generator = _generator(data)
    inputs = f.sample(generator)
    idle = {name: torch.ones_like(inputs[name], dtype=torch.bool) for name in f.trained}
    for _ in range(64):  # clips and gates have gradient 0 on some inputs
        idle = {name: idle[name] & (grad == 0) for name, grad in f.gradient(inputs).items()}
        if not any(bool(entries.any()) for entries in idle.values()):
            return
        inputs = f.sample(generator)
    for name, entries in idle.items():
        if bool(entries.any()):
            where = entries.nonzero().tolist()[0]
            fail(inputs, f"a gradient to {name}{where} on one of 64 inputs", "0 on each")


@LOSS.law(
    why="Half precision has at most three digits: a ratio of 1.001 may round to 1, and a mean over "
    "rows loses most digits.",
)
def half_precision(f: Loss, data: DataObject) -> None:
    """Half-precision inputs are refused, or give the float32 result within their rounding."""
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    inputs = data.draw(f.draw(dtype=dtype))
    mixed = {k: x if f.inputs[k] == "latent" else x.float() for k, x in inputs.items()}
    for case in (inputs, mixed):
        refused = partial(refuses, f.function, **f.arguments(case))
        expect_float32_result(f, case, case, float32=f.float32, refused=refused)


@LOSS.law(
    why="A constant made without an explicit dtype and device loses digits, or sits on the wrong "
    "device.",
)
def default_dtype_and_device(f: Loss, data: DataObject) -> None:
    """The default dtype and device of torch change nothing."""
    inputs = data.draw(f.draw())
    expected = f(inputs)
    with other_defaults():
        got = f(inputs)
    expect_memory(got, inputs)
    expect_close(got, expected, inputs, tolerance=f.tolerance)


@LOSS.law(
    why="A graph break in the loss splits the training step, and a value traced as a constant is "
    "wrong from the second call on.",
)
def compiled_equals_eager(f: Loss, data: DataObject) -> None:
    """The compiled loss equals the eager one, without a graph break."""
    inputs = data.draw(f.draw())
    with _torch_own_warnings():
        got = call(f.compiled, inputs, **f.arguments(inputs))
    expect_close(got, f(inputs), inputs, tolerance=f.tolerance)


@LOSS.law(
    why="Per-sample gradients and ensembles run a loss under torch.func.vmap, where Python code "
    "cannot read the values of tensors: a check that does so raises.",
)
def under_vmap(f: Loss, data: DataObject) -> None:
    """The loss under ``vmap`` equals that of a loop."""

    def by_name(inputs: Tensors) -> Any:
        return f.function(**f.arguments(inputs))

    problems = [data.draw(f.draw()) for _ in range(2)]
    stacked = {name: torch.stack([inputs[name] for inputs in problems]) for name in f.inputs}
    with _torch_own_warnings():
        got = call(torch.vmap(by_name), stacked, stacked)
    expected = torch.stack([f(inputs) for inputs in problems])
    expect_close(got, expected, stacked, tolerance=f.tolerance)


def check_loss(
    function: Callable[..., Any],
    *,
    inputs: Mapping[str, str],
    trained: tuple[str, ...],
    reduction: str = "none",
    valid: str | None = None,
    detaches: bool = False,
    tolerance: float = 1e-5,
    float32: bool = False,
    **search: Any,
) -> None:
    """Check any loss of rows, called as ``function(**inputs)``.

    Args:
        function: maps tensors by name to [M], or to the mean over rows.
        inputs: name of each argument to its role, as in ``Loss``.
        trained: names of arguments that get a gradient; all others are constants.
        reduction: "none" or "mean".
        valid: name of the mask argument; ``None``: there is no mask.
        detaches: the function detaches its constants, so they may require a gradient.
        tolerance: relative difference that counts as rounding.
        float32: half-precision inputs give the result of float32, in float32.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.
        TypeError: an option has another type, or the function does not take the inputs.
        ValueError: a role or a name is unknown, or no law applies.

    Source: conventions of losses in this library; see CONTRIBUTING.md.

    Example:
        >>> from mteditflow import velocity_kl
        >>> roles = {"velocity": "latent", "reference_velocity": "latent"}
        >>> check_loss(velocity_kl, inputs=roles, trained=("velocity",), examples=2)
    """
    subject = Loss(function, inputs, trained, reduction, valid, detaches, tolerance, float32)
    LOSS.check(subject, **search)


def check_mask_name(valid: object, inputs: Iterable[str]) -> None:
    """Raise unless ``valid`` is ``None`` or an identifier that is not in ``inputs``."""
    if valid is not None and (not isinstance(valid, str) or not valid.isidentifier()):
        raise TypeError(f"valid: expected the name of the mask argument, or None, got {valid!r}")
    if valid is not None and valid in inputs:
        raise ValueError(f"valid: expected a name other than those of the inputs, got {valid!r}")


def _rows(inputs: Tensors) -> int:
    return len(next(iter(inputs.values())))


def _generic(f: Loss, data: DataObject) -> dict[str, Tensor]:
    """Draw inputs, shifted away from the corners of clips and maxima.

    Finite differences across a corner do not equal the gradient; inputs are multiples of 1/8 or
    1/64, so a shift of 0.01 to 0.02 avoids corners at round numbers.
    """
    inputs = data.draw(f.draw())
    generator = _generator(data)
    for name in f.trained:
        shape = inputs[name].shape
        noise = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        inputs[name] = inputs[name] + 0.01 + 0.01 * noise
    return inputs


def _equal_latents(f: Loss, inputs: dict[str, Tensor], data: DataObject) -> dict[str, Tensor]:
    """Make all latents of some rows (none, one or both) equal, so that errors are exactly 0."""
    latents = [name for name, role in f.inputs.items() if role == "latent"]
    equal = [row for row in range(ROWS) if data.draw(st.booleans())]
    made = {name: inputs[name].clone() for name in latents}
    for name in latents[1:]:
        made[name][equal] = inputs[latents[0]][equal]
    return inputs | made


def _direction(like: Tensor, data: DataObject) -> Tensor:
    return torch.randn(like.shape, generator=_generator(data), dtype=torch.float64, device="cpu")


def _generator(data: DataObject) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(data.draw(st.integers(0, 99)))


@contextmanager
def _torch_own_warnings() -> Iterator[None]:
    """Ignore torch's deprecation warnings of its own code, even if warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _difference_step(f: Loss, inputs: Tensors) -> tuple[float, float]:
    """Return step and tolerance of a central difference, by the dtype of the loss."""
    return (1e-6, 1e-4) if f(inputs).dtype == torch.float64 else (1e-2, 1e-2)


def _curvature(f: Loss, inputs: Tensors, name: str, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return Hessian times direction, by two backward passes and by forward over reverse."""
    case = {**inputs, "direction": direction}

    def total(x: Tensor) -> Tensor:
        result: Tensor = f.function(**f.arguments({**inputs, name: x})).sum()
        return result

    leaf = inputs[name].clone().requires_grad_()
    gradient = gradients(call(total, case, leaf), {name: leaf}, case, graph=True)[name]
    twice = torch.zeros_like(leaf)
    if gradient.requires_grad:
        twice = gradients((gradient * direction).sum(), {name: leaf}, case)[name]
    reverse: Any = torch.func.grad(total)
    try:
        with _torch_own_warnings():
            forward = torch.func.jvp(reverse, (inputs[name],), (direction,))[1]
    except Exception as error:
        if not any(words in str(error) for words in ("forward AD", "ZeroTensor")):
            fail(case, "a result", Raised(error))
        forward = twice  # torch lacks forward derivatives of some operations, such as mse_loss
    return twice.detach(), forward.detach()
