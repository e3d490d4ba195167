"""Precision, broadcasting and the mean over what counts."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import masked_mean
from mteditflow._reduce import (
    broadcast_rows,
    elements,
    per_row,
    promote,
    row_mean,
    row_mean_absolute,
    row_mean_square,
    row_root_mean_square,
    row_values,
)
from tests.loops import some

# Forward-mode derivatives import torch's decompositions, which torch.jit.script still compiles.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
SHAPES = [(1, 1), (3, 1), (2, 5), (2, 3, 4), (2, 3, 4, 5), (1, 2, 1, 3, 2)]


def exactly(message):
    return f"^{re.escape(message)}$"


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# promote


@pytest.mark.parametrize(
    ("given_dtypes", "expected"),
    [
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float32, torch.bfloat16], torch.float32),
        ([torch.float16, torch.float64], torch.float64),
    ],
)
def test_promotion_goes_to_float32_at_least(given_dtypes, expected):
    promoted = promote(*(torch.ones(2, dtype=dtype) for dtype in given_dtypes))
    assert [x.dtype for x in promoted] == [expected] * len(given_dtypes)
    assert all(x.tolist() == [1.0, 1.0] for x in some(promoted))


def test_promotion_copies_nothing_that_fits():
    x = torch.ones(2)
    assert promote(x)[0] is x


# per_row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_broadcasts_everywhere(dtype):
    value = per_row("sigma", 0.25, torch.zeros(2, 3, 4, dtype=dtype))
    assert value.shape == (1, 1, 1)
    assert value.dtype == dtype
    assert value.flatten().tolist() == [0.25]


def test_a_tensor_gets_trailing_axes_and_the_dtype_of_x():
    x = torch.zeros(2, 3, 4, dtype=torch.float64)
    rows = per_row("sigma", torch.tensor([0.25, 1.0]), x)
    assert rows.shape == (2, 1, 1)
    assert rows.dtype == torch.float64
    assert rows.flatten().tolist() == [0.25, 1.0]
    assert per_row("sigma", torch.full((2, 3), 0.5, dtype=torch.bfloat16), x).shape == (2, 3, 1)
    assert per_row("sigma", torch.tensor(0.0), x).shape == (1, 1, 1)
    assert per_row("sigma", torch.full((2, 3, 4), 0.5), x).shape == (2, 3, 4)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([0.25, 1.0]),
        torch.tensor([[0.25], [1.0]]),
        torch.tensor([0.25, 1.0]).reshape(2, 1, 1, 1, 1),
        [0.25, 1.0],
        np.array([0.25, 1.0], dtype=np.float32),
        np.array([0.25, 1.0]),
    ],
    ids=["[M]", "[M, 1]", "[M, 1, 1, 1, 1]", "list", "numpy", "numpy64"],
)
def test_a_number_per_row_in_every_form(value):
    x = torch.zeros(2, 3, 4)
    assert torch.equal(per_row("sigma", value, x), torch.tensor([[[0.25]], [[1.0]]]))
    assert row_values("sigma", value, x).tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
    "value", [[0, 1], [False, True], np.array([0, 1], np.uint8), torch.tensor([0, 1])]
)
def test_integers_and_booleans_are_numbers_where_exact(value):
    for dtype in (torch.float32, torch.float64):
        rows = broadcast_rows("sigma", value, torch.zeros(2, 3, dtype=dtype))
        assert rows.dtype == dtype
        assert rows.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), torch.tensor(0.5), torch.full((1, 1, 1), 0.5)]
)
def test_one_number_for_all_rows(value):
    assert per_row("sigma", value, torch.zeros(2, 3, 4)).shape == (1, 1, 1)
    assert row_values("sigma", value, torch.zeros(2, 3, 4)).tolist() == [0.5]


def test_more_than_one_number_per_row_is_refused_where_rows_have_one():
    message = (
        "r: expected one value per row, a number, [M] or [M, 1, ...] against [2, 3], got [2, 3]"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        row_values("r", torch.zeros(2, 3), torch.zeros(2, 3))


def test_per_row_refuses_what_does_not_fit():
    x = torch.zeros(2, 3)
    for value, given_shape in [(torch.zeros(3), "[3]"), (torch.zeros(1), "[1]")]:
        message = (
            "sigma: expected a number or a tensor whose shape is a leading part of [2, 3], "
            f"got {given_shape}"
        )
        with pytest.raises(ValueError, match=exactly(message)):
            per_row("sigma", value, x)
    message = "sigma: expected a floating-point tensor, got torch.complex64"
    with pytest.raises(TypeError, match=exactly(message)):
        per_row("sigma", torch.zeros(2, dtype=torch.complex64), x)
    with pytest.raises(
        TypeError, match=exactly("sigma: expected numbers or a torch.Tensor, got str")
    ):
        per_row("sigma", "half", x)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan, math.inf])
def test_per_row_values_lie_between_0_and_1(wrong):
    x = torch.zeros(2, 3, dtype=torch.float64)
    message = f"sigma: expected a finite number in [0, 1], got {wrong!r}"
    with pytest.raises(ValueError, match=exactly(message)):
        per_row("sigma", wrong, x)
    message = f"sigma: expected values in [0, 1], got {wrong} at index [1]"
    with pytest.raises(ValueError, match=exactly(message)):
        per_row("sigma", torch.tensor([0.5, wrong], dtype=torch.float64), x)


# means over a row


@pytest.mark.parametrize("shape", SHAPES)
def test_row_means_are_those_of_a_loop(shape):
    x = random(*shape)
    assert elements(x) == len(x[0].flatten())
    for row, (square, absolute) in some(
        enumerate(zip(row_mean_square(x).tolist(), row_mean_absolute(x).tolist(), strict=True))
    ):
        values = x[row].flatten().tolist()
        assert square == pytest.approx(math.fsum(v * v for v in values) / len(values), rel=1e-14)
        assert absolute == pytest.approx(math.fsum(map(abs, values)) / len(values), rel=1e-14)


LONG = [(1, 2**20 + 3), (2, 5, 40_001), (3, 255), (3, 256), (3, 257)]


def nearly_exact(function, x):
    """The value of float32 rows is that of float64, to what one chunk of 256 loses."""
    got = function(x)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, function(x.double()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("function", [row_mean_square, row_mean_absolute, row_root_mean_square])
@pytest.mark.parametrize("shape", LONG)
def test_long_rows_lose_no_accuracy(function, shape):
    """Neither at random nor where every element is the same and rounding errors add up."""
    nearly_exact(function, random(*shape).float())
    nearly_exact(function, torch.full(shape, 0.1))


def test_the_mean_of_long_rows():
    nearly_exact(row_mean, torch.full((2, 2**17 + 1), 0.1))
    x = random(3, 4, 5)
    torch.testing.assert_close(row_mean(x), x.flatten(1).mean(1))


def test_a_row_in_another_layout_has_the_same_mean():
    """Bit for bit: a replay may hold its latents in another order of strides."""
    x = random(2, 8, 33, 33).float()
    swapped = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(row_mean_square(swapped), row_mean_square(x))


@pytest.mark.parametrize("number", [1e-30, 1e-22, 1e18, 1e19, 3e38])
def test_squares_out_of_the_range_of_float32(number):
    x = torch.zeros(3, 300)
    x[0], x[1] = number, 1.0
    exact = float(x[0, 0])
    for got in (row_mean_square(x), torch.vmap(row_mean_square)(x[None])[0]):
        assert got.tolist() == pytest.approx([exact**2, 1.0, 0.0], rel=1e-6, abs=0)
    assert row_mean_absolute(x).tolist() == pytest.approx([exact, 1.0, 0.0], rel=1e-6, abs=0)


@pytest.mark.parametrize("function", [row_mean_square, row_mean_absolute, row_root_mean_square])
def test_a_nan_in_a_row_stays_in_that_row(function):
    x = torch.ones(2, 300)
    x[0, 7] = math.nan
    first, second = function(x).tolist()
    assert math.isnan(first)
    assert second == pytest.approx(1.0)


def test_row_means_golden():
    x = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[0.0, 0.0], [0.0, -4.0]]])
    assert row_mean_square(x).tolist() == pytest.approx([14 / 4, 16 / 4])
    assert row_mean_absolute(x).tolist() == [6 / 4, 4 / 4]


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_the_mean_square(shape):
    x = random(*shape).requires_grad_()
    row_mean_square(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() / elements(x))
    assert torch.autograd.gradcheck(row_mean_square, x)


def test_gradient_of_the_mean_square_at_zero_is_zero():
    x = torch.zeros(2, 3, 4, requires_grad=True)
    row_mean_square(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3, 4))


def hessian(function, x):
    """Matrix of second derivatives of the sum of ``function``."""
    size = x.numel()
    return torch.func.hessian(lambda x: function(x).sum())(x).reshape(size, size)


@forward_mode
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_second_derivatives_of_the_mean_square(shape, scale):
    """Those of a plain mean of squares, also where a row is exactly 0."""
    x = (scale * random(*shape)).requires_grad_()
    wanted = 2 / elements(x) * torch.eye(x.numel(), dtype=x.dtype)
    torch.testing.assert_close(hessian(row_mean_square, x.detach()), wanted)
    assert torch.autograd.gradcheck(row_mean_square, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(row_mean_square, x, check_fwd_over_rev=True)


@forward_mode
def test_the_mean_square_under_function_transforms():
    x = random(5, 2, 3, 4)
    torch.testing.assert_close(
        torch.vmap(row_mean_square)(x), torch.stack([row_mean_square(part) for part in x])
    )
    gradient = torch.vmap(torch.func.grad(lambda x: row_mean_square(x).sum()))(x)
    torch.testing.assert_close(gradient, 2 * x / 12)
    value, tangent = torch.func.jvp(row_mean_square, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, row_mean_square(x))
    torch.testing.assert_close(tangent, 2 * x.flatten(1).mean(1))


def test_the_mean_square_keeps_nothing_but_its_input():
    x = random(2, 3, 4).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        row_mean_square(x)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]


@pytest.mark.parametrize("shape", SHAPES)
def test_root_mean_square_and_its_derivatives(shape):
    x = random(*shape).requires_grad_()
    torch.testing.assert_close(
        row_root_mean_square(x), torch.linalg.vector_norm(x.flatten(1), dim=1) / elements(x) ** 0.5
    )
    assert torch.autograd.gradcheck(row_root_mean_square, x)
    assert torch.autograd.gradgradcheck(row_root_mean_square, x)


@forward_mode
def test_root_mean_square_at_zero_has_zero_derivatives():
    x = random(3, 2, 2)
    x[1] = 0
    gradient = torch.func.grad(lambda x: row_root_mean_square(x).sum())(x)
    assert torch.equal(gradient[1], torch.zeros(2, 2, dtype=x.dtype))
    second = hessian(row_root_mean_square, x)
    assert second.isfinite().all()
    assert torch.equal(second[4:8], torch.zeros_like(second[4:8]))
    assert second[:4, :4].any()


def test_the_mean_square_of_many_float32_elements_stays_accurate():
    x = random(1, 16, 128, 128, seed=1)
    assert row_mean_square(x.float()).item() == pytest.approx(x.square().mean().item(), rel=1e-6)


def test_strided_rows():
    x = random(4, 3, 5).transpose(0, 2)
    torch.testing.assert_close(row_mean_square(x), x.square().flatten(1).mean(dim=1))
    torch.testing.assert_close(row_mean_absolute(x), x.abs().flatten(1).mean(dim=1))


# masked_mean


def test_masked_mean_golden():
    values = torch.tensor([[1.0, 2.0], [6.0, 100.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert masked_mean(values, mask).item() == 3.0
    assert masked_mean(values).item() == 27.25
    assert masked_mean(torch.tensor(2.0), torch.tensor(True)).item() == 2.0


@given(st.lists(st.tuples(st.integers(-99, 99), st.booleans()), min_size=1, max_size=9))
def test_a_mask_equals_deletion(entries):
    values = torch.tensor([float(value) for value, _ in entries])
    mask = torch.tensor([kept for _, kept in entries])
    kept = values[mask]
    expected = (kept.double().sum() / max(len(kept), 1)).float()
    assert torch.equal(masked_mean(values, mask), expected)
    assert torch.equal(masked_mean(values[mask.argsort()], mask[mask.argsort()]), expected)


def test_nothing_true_is_zero_with_zero_gradient():
    values = torch.tensor([1.0, math.nan], requires_grad=True)
    mean = masked_mean(values, torch.tensor([False, False]))
    mean.backward()
    assert mean.item() == 0.0
    assert values.grad.tolist() == [0.0, 0.0]


def test_a_masked_nan_reaches_neither_value_nor_gradient():
    values = torch.tensor([1.0, math.nan, 4.0, math.inf], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, False, True, False]))
    mean.backward()
    assert mean.item() == 2.5
    assert values.grad.tolist() == [0.5, 0.0, 0.5, 0.0]


def test_gradcheck():
    values, mask = random(3, 4).requires_grad_(), random(3, 4, seed=1) > 0
    assert torch.autograd.gradcheck(lambda x: masked_mean(x, mask), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    values = torch.ones(2, dtype=dtype)
    assert masked_mean(values).dtype == dtype
    assert masked_mean(values, torch.tensor([True, False])).dtype == dtype


def test_masked_mean_errors():
    message = "values: expected a floating-point tensor, got torch.int64"
    with pytest.raises(TypeError, match=exactly(message)):
        masked_mean(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=exactly("mask: expected shape of values = [2], got [3]")):
        masked_mean(torch.ones(2), torch.ones(3, dtype=torch.bool))
    message = "mask: expected a boolean mask, got torch.float32; convert 0 and 1 with .bool()"
    with pytest.raises(TypeError, match=exactly(message)):
        masked_mean(torch.ones(2), torch.ones(2))
    message = "values: expected a non-empty tensor of shape [...], got [0]"
    with pytest.raises(ValueError, match=exactly(message)):
        masked_mean(torch.ones(0))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", [row_mean_square, row_root_mean_square, row_mean_absolute])
def test_compiled_row_means_are_as_accurate_as_eager(function, backend):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    x = torch.cat([random(1, 2**17 + 3, seed=1), torch.full((1, 2**17 + 3), 0.1).double()])
    single = x.float().requires_grad_()
    got = compiled(single)
    torch.testing.assert_close(got, function(single.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(got, function(single), rtol=1e-6, atol=0)
    if not got.requires_grad:
        assert function is row_mean_absolute  # which is a constant to autograd
        return
    (wanted,) = torch.autograd.grad(function(single).sum(), single)
    (given_,) = torch.autograd.grad(compiled(single).sum(), single)
    torch.testing.assert_close(given_, wanted, rtol=1e-5, atol=0)


@pytest.mark.compile
def test_compiled_equals_eager():
    compiled = torch.compile(masked_mean, fullgraph=True, backend="aot_eager")
    values, mask = torch.randn(3, 4), torch.rand(3, 4) > 0.5
    assert torch.equal(compiled(values, mask), masked_mean(values, mask))
    assert torch.equal(compiled(values), masked_mean(values))
