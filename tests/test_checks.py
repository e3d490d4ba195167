"""Every check accepts its edge and says what it expected and what came beyond it."""

import math
import re
from array import array
from collections import deque

import numpy as np
import pytest
import torch

from mteditflow import Signal
from mteditflow import _checks as checks
from tests.loops import some

NAN, INF = math.nan, math.inf


def exactly(message):
    return f"^{re.escape(message)}$"


def test_only_tensors_pass():
    checks.check_tensor("x", torch.zeros(1))
    with pytest.raises(
        TypeError,
        match=exactly("x: expected a torch.Tensor, got list; convert it with torch.as_tensor"),
    ):
        checks.check_tensor("x", [1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_floating_takes_every_real_float(dtype):
    checks.check_floating(x=torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_floating_refuses_the_rest(dtype):
    message = f"y: expected a floating-point tensor, got {dtype}"
    with pytest.raises(TypeError, match=exactly(message)):
        checks.check_floating(x=torch.zeros(1), y=torch.zeros(1, dtype=dtype))
    with pytest.raises(TypeError, match=exactly("y: expected a torch.Tensor, got float")):
        checks.check_floating(x=torch.zeros(1), y=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_full_precision_refuses_half_and_integers(dtype):
    checks.check_full_precision(a=torch.zeros(1), b=torch.zeros(1, dtype=torch.float64))
    why = "half precision would silently change the result " if dtype.is_floating_point else ""
    message = f"b: expected float32 or float64, got {dtype}; {why}(convert with .float())"
    with pytest.raises(TypeError, match=exactly(message)):
        checks.check_full_precision(a=torch.zeros(1), b=torch.zeros(1, dtype=dtype))
    with pytest.raises(TypeError, match=exactly("b: expected a torch.Tensor, got int")):
        checks.check_full_precision(a=torch.zeros(1), b=1)


def test_same_shape_compares_with_the_first():
    checks.check_same_shape(a=torch.zeros(2, 3), b=torch.zeros(2, 3), c=torch.ones(2, 3))
    message = "c: expected the shape of a, [2, 3], got [3, 2]"
    with pytest.raises(ValueError, match=exactly(message)):
        checks.check_same_shape(a=torch.zeros(2, 3), b=torch.zeros(2, 3), c=torch.zeros(3, 2))
    for named in ({"a": [1], "b": torch.zeros(1)}, {"b": torch.zeros(1), "a": [1]}):
        with pytest.raises(
            TypeError,
            match=exactly("a: expected a torch.Tensor, got list; convert it with torch.as_tensor"),
        ):
            checks.check_same_shape(**named)


def test_shape():
    checks.check_shape("x", torch.zeros(2, 3), (2, 3), "[B, N]")
    checks.check_shape("x", torch.zeros(2, 3), torch.Size([2, 3]), "[B, N]")
    with pytest.raises(ValueError, match=exactly("x: expected shape [B] = [4], got [2, 3]")):
        checks.check_shape("x", torch.zeros(2, 3), [4], "[B]")
    with pytest.raises(TypeError, match=exactly("x: expected a torch.Tensor, got NoneType")):
        checks.check_shape("x", None, [4], "[B]")


def test_rank():
    checks.check_rank("x", torch.zeros(1, 1), 2, "[B, N]")
    checks.check_rank("x", torch.zeros(1, 1, 1), 2, "[B, N, ...]")
    checks.check_rank("x", torch.zeros(1, 1), 1, "[B] or [B, N]", maximum=2)
    checks.check_rank("x", torch.zeros(()), 0, "any")
    for x, given in [
        (torch.zeros(3), "[3]"),
        (torch.zeros(3, 0), "[3, 0]"),
        (torch.zeros(0, 3), "[0, 3]"),
        (torch.zeros(1, 1, 1), "[1, 1, 1]"),
    ]:
        message = f"x: expected a non-empty tensor of shape [B, N], got {given}"
        with pytest.raises(ValueError, match=exactly(message)):
            checks.check_rank("x", x, 2, "[B, N]", maximum=2)
    with pytest.raises(
        TypeError,
        match=exactly("x: expected a torch.Tensor, got tuple; convert it with torch.as_tensor"),
    ):
        checks.check_rank("x", (1, 2), 1, "[B]")


def test_mask():
    checks.check_mask("valid", torch.ones(2, dtype=torch.bool), (2,), "[B]")
    with pytest.raises(
        TypeError,
        match=exactly(
            "valid: expected a boolean mask, got torch.int64; convert 0 and 1 with .bool()"
        ),
    ):
        checks.check_mask("valid", torch.ones(2, dtype=torch.int64), (2,), "[B]")
    with pytest.raises(ValueError, match=exactly("valid: expected shape [B] = [2], got [3]")):
        checks.check_mask("valid", torch.ones(3, dtype=torch.bool), (2,), "[B]")


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, 0.5])
def test_a_closed_interval_holds_its_ends(value):
    checks.check_number("p", value, low=0.0, high=1.0)


def test_numbers_are_unbounded_by_default():
    for value in (-1e308, 1e308, -3, 7):
        checks.check_number("p", value)


@pytest.mark.parametrize(
    ("value", "options", "interval"),
    [
        (-1e-9, {"low": 0.0, "high": 1.0}, "[0, 1]"),
        (1.5, {"low": 0.0, "high": 1.0}, "[0, 1]"),
        (0.0, {"low": 0.0, "open_low": True}, "(0, inf]"),
        (0, {"low": 0.0, "high": 2.5, "open_low": True}, "(0, 2.5]"),
        (1.0, {"low": 0.0, "high": 1.0, "open_high": True}, "[0, 1)"),
        (NAN, {}, "[-inf, inf]"),
        (INF, {}, "[-inf, inf]"),
        (-INF, {}, "[-inf, inf]"),
    ],
)
def test_a_number_outside_is_refused(value, options, interval):
    message = f"p: expected a finite number in {interval}, got {value!r}"
    with pytest.raises(ValueError, match=exactly(message)):
        checks.check_number("p", value, **options)


def test_open_ends_let_the_inside_pass():
    options = {"low": 0.0, "high": 1.0, "open_low": True, "open_high": True}
    checks.check_number("p", 1e-300, **options)
    checks.check_number("p", 1 - 1e-16, **options)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, "bool"),
        ("1", "str"),
        (None, "NoneType"),
        (torch.tensor(1.0), "Tensor; convert it with float()"),
        (np.float32(1.0), "float32; convert it with float()"),
    ],
)
def test_what_is_no_number_is_refused(value, kind):
    with pytest.raises(TypeError, match=exactly(f"p: expected a number, got {kind}")):
        checks.check_number("p", value)


def test_count():
    checks.check_count("n", 1)
    checks.check_count("n", 0, low=0)
    with pytest.raises(ValueError, match=exactly("n: expected an integer >= 1, got 0")):
        checks.check_count("n", 0)
    with pytest.raises(ValueError, match=exactly("n: expected an integer >= 3, got 2")):
        checks.check_count("n", 2, low=3)
    for value, kind in [(1.0, "float"), (True, "bool"), ("2", "str")]:
        with pytest.raises(TypeError, match=exactly(f"n: expected an integer, got {kind}")):
            checks.check_count("n", value)


def test_choice():
    checks.check_choice("std", "group", ("group", "none"))
    message = "std: expected one of ['group', 'none'], got 'batch'"
    with pytest.raises(ValueError, match=exactly(message)):
        checks.check_choice("std", "batch", ("group", "none"))


@pytest.mark.parametrize("check", [checks.check_values, checks.check_step_values])
def test_values_name_the_first_that_is_wrong(check):
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    check("x", x, x > 0, "positive values")
    with pytest.raises(ValueError, match=exactly("x: expected <= 3, got 4.0 at index [1, 0]")):
        check("x", x, x <= 3, "<= 3")


def test_values_of_a_scalar():
    with pytest.raises(ValueError, match=exactly("x: expected finite, got nan")):
        checks.check_values("x", torch.tensor(NAN), torch.tensor(False), "finite")


def test_step_values_do_not_wait_for_an_accelerator():
    on_device = torch.zeros(2, device="meta")  # any read of a value raises there
    checks.check_step_values("x", on_device, on_device > 1, "whatever")


def test_rewards_return_the_mask():
    reward, group = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    valid = torch.tensor([True, False, True])
    assert torch.equal(checks.check_rewards({"r": reward}, group, None), torch.ones(3).bool())
    assert torch.equal(checks.check_rewards({"r": reward}, group, valid), valid)
    assert torch.equal(checks.check_rewards({"r": reward}, None, valid), valid)
    table = checks.check_rewards({"r": torch.ones(3, 2)}, group, None)
    assert table.shape == (3, 2)
    assert table.dtype == torch.bool


def test_bad_rewards():
    reward, group = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    rank = "r: expected a non-empty tensor of shape [B] or [B, N], got "
    for x, given in [
        (torch.zeros(0), "[0]"),
        (torch.tensor(1.0), "[]"),
        (torch.zeros(1, 1, 1), "[1, 1, 1]"),
    ]:
        with pytest.raises(ValueError, match=exactly(rank + given)):
            checks.check_rewards({"r": x}, group, None)
    with pytest.raises(ValueError, match=exactly("q: expected shape of r = [3], got [2]")):
        checks.check_rewards({"r": reward, "q": torch.ones(2)}, group, None)
    with pytest.raises(TypeError, match=r"^q: expected float32 or float64, got torch\.float16; "):
        checks.check_rewards({"r": reward, "q": torch.ones(3).half()}, group, None)
    with pytest.raises(
        TypeError,
        match=exactly("r: expected a torch.Tensor, got list; convert it with torch.as_tensor"),
    ):
        checks.check_rewards({"r": [1.0, 2.0]}, group, None)
    with pytest.raises(ValueError, match=exactly("valid: expected shape of r = [3], got [2]")):
        checks.check_rewards({"r": reward}, group, torch.ones(2, dtype=torch.bool))
    with pytest.raises(
        TypeError,
        match=exactly(
            "valid: expected a boolean mask, got torch.int64; convert 0 and 1 with .bool()"
        ),
    ):
        checks.check_rewards({"r": reward}, group, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=exactly("group: expected shape [B] = [3], got [2]")):
        checks.check_rewards({"r": reward}, group[:2], None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bool])
def test_group_ids_are_integers(dtype):
    message = f"group: expected integer ids, got {dtype}"
    with pytest.raises(TypeError, match=exactly(message)):
        checks.check_rewards({"r": torch.ones(3)}, torch.zeros(3, dtype=dtype), None)


@pytest.mark.parametrize("lost", [NAN, INF, -INF])
def test_a_lost_reward_is_named_unless_it_is_masked(lost):
    rewards = {"r": torch.ones(3), "q": torch.tensor([1.0, lost, 1.0])}
    group = torch.zeros(3, dtype=torch.int64)
    message = f"q: expected finite values (mark lost ones in valid), got {lost} at index [1]"
    with pytest.raises(ValueError, match=exactly(message)):
        checks.check_rewards(rewards, group, None)
    checks.check_rewards(rewards, group, torch.tensor([True, False, True]))


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: torch.eye(2).to_sparse(), "layout torch.sparse_coo; call .to_dense()"),
        (lambda: torch.eye(2).to_sparse_csr(), "layout torch.sparse_csr; call .to_dense()"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
            "a nested tensor; call .to_padded_tensor()",
        ),
    ],
    ids=["sparse", "rows", "nested"],
)
def test_tensors_are_dense(make, got):
    message = exactly(f"reward: expected a dense tensor, got {got}")
    for check in (checks.check_tensor, checks.as_numbers, checks.as_real):
        with pytest.raises(TypeError, match=message):
            check("reward", make())


NO_NUMBERS = {
    "strings": (["1.0"], "list of strings; convert with np.asarray(r, dtype=float)"),
    "strings in an array": (np.array(["1.0"]), "ndarray of strings; convert with .astype(float)"),
    "objects": (
        np.array([1.0, 2], dtype=object),
        "ndarray of dtype object; convert with .astype(float)",
    ),
    "long doubles": (
        np.ones(2, dtype=np.longdouble),
        f"ndarray of {np.dtype(np.longdouble)}; convert with .astype(float)",
    ),
    "None": ([1.0, None], "list of None; mark what is missing in a mask, as pad_turns does"),
    "large integers": ([2**64], "list of integers that 64 bits do not hold"),
    "dates": (np.array(["2024"], dtype="datetime64[Y]"), "ndarray of datetime64[Y]"),
    "dicts": ([{}], "list of dict"),
}


@pytest.mark.parametrize("content", NO_NUMBERS)
def test_what_is_no_number_comes_with_its_own_fix(content):
    x, got = NO_NUMBERS[content]
    with pytest.raises(TypeError, match=exactly(f"r: expected numbers or booleans, got {got}")):
        checks.as_numbers("r", x)


def test_any_sequence_of_numbers_is_read():
    for x in (range(3), deque([0, 1, 2]), array("q", [0, 1, 2]), (0, 1, 2)):
        got = checks.as_numbers("group", x)
        assert got.dtype == torch.int64
        assert got.tolist() == [0, 1, 2]
    message = "group: expected numbers or a torch.Tensor, got set; give a list or an array of them"
    with pytest.raises(TypeError, match=exactly(message)):
        checks.as_numbers("group", {0, 1})


def test_tensors_in_a_list_are_stacked_with_their_gradient():
    one = torch.tensor(1.0, requires_grad=True)
    got = checks.as_numbers("r", [[one, torch.tensor(2.0)], (torch.tensor(3.0), one)])
    assert got.dtype == torch.float32
    assert got.tolist() == [[1.0, 2.0], [3.0, 1.0]]
    got.sum().backward()
    assert one.grad.item() == 2.0
    assert checks.as_numbers("r", [one, 0.1]).tolist() == [1.0, 0.1]  # exact: float64
    assert checks.as_numbers("r", [torch.tensor(1), True]).dtype == torch.int64
    message = (
        "r: expected tensors of one shape on one device, got [1] on cpu, [] on cpu; "
        "pad_turns takes chains of unequal length"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        checks.as_numbers("r", [one, torch.ones(1)])


def test_booleans_are_no_scores_of_another_scale():
    message = exactly("l: expected scores in 1..5, got booleans, which are 0 and 1")
    booleans = (True, np.True_, [[5, True]], np.array([True]), torch.tensor([True]))
    for x in some(booleans):
        with pytest.raises(TypeError, match=message):
            checks.check_no_booleans("l", x, "scores in 1..5")
    checks.check_no_booleans("l", [[5, 1.0], (torch.ones(1), np.ones(1))], "scores in 1..5")


def test_likely_mistakes_have_their_fix_in_the_error():
    with pytest.raises(ValueError, match=r"group\.repeat_interleave\(6\)$"):
        checks.check_group(torch.arange(4), (24,))
    with pytest.raises(TypeError, match="got dict; give one for all names, such as the product"):
        checks.as_mask("valid", {"if": [True]}, torch.zeros(1), "of reward")
    signal = Signal(torch.zeros(2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="got Signal; give its tensors one by one: value, valid, "):
        checks.check_tensor("advantage", signal)
