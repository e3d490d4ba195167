"""Laws of group-relative advantages.

Source: MT-EditFlow (arXiv 2606.01985), Eq. 3, and common errors of implementations.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from mteditflow.testing.expect import (
    expect_array,
    expect_float32_result,
    expect_no_half,
    expect_zero_sums,
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
from mteditflow.testing.options import NOT_DETACHED, Subject, check_choice, check_integer
from mteditflow.testing.reports import text
from mteditflow.testing.signatures import Call, Signature, dense_ids, misfit_of, signature_of
from mteditflow.testing.strategies import (
    LOST,
    RewardBatch,
    beside_others,
    far_ids,
    moderate_ids,
    named_anew,
    reward_batches,
    signs,
    tenths,
)

STDS = ("group", "batch", "none")


@dataclass(frozen=True)
class GroupAdvantage(Subject):
    """A group advantage under test.

    Attributes:
        function: function under test, from rewards [B] in groups to advantages [B].
        signature: calling convention: a name in ``SIGNATURES`` or an adapter.
        std: divisor of advantages: std of the "group" or the "batch" (all rewards), or "none".
        ddof: 0 for the population's std, 1 for the sample's.
        eps: upper bound of the constant that the function adds to the std; it shrinks an advantage
            by a relative eps / std at most.
        zero: largest absolute advantage that counts as 0 in a group of equal rewards; 0 requires
            exact zeros, so that ``advantage != 0`` finds informative groups.
        min_members: smallest group that the function accepts.
        tolerance: relative difference that counts as rounding.
        detaches: the function detaches rewards, so they may require a gradient.
        float32: half-precision rewards give the result of float32.
    """

    signature: str | Signature | Call = "mteditflow"
    std: str = "group"
    ddof: int = 0
    eps: float = 1e-3
    zero: float = 1e-6
    min_members: int = 1
    tolerance: float = 1e-3
    detaches: bool = False
    float32: bool = False

    def __post_init__(self) -> None:
        tracker = inspect.isclass(self.function) and hasattr(self.function, "update")
        if tracker and not self.takes_classes:
            name = self.function.__name__
            raise TypeError(
                f"signature: expected flow-grpo for the class {name}, got {self.signature}"
            )
        super().__post_init__()
        check_choice("std", self.std, STDS)
        check_integer("ddof", self.ddof, low=0, high=1)
        check_integer("min_members", self.min_members, low=1, high=4)
        signature_of(self.function, self.signature)

    @property
    def takes_classes(self) -> bool:
        """Whether a class is accepted: trackers are classes, and adapters may take one."""
        return self.signature == "flow-grpo" or not isinstance(self.signature, str)

    def misfit(self) -> str | None:
        """Return which signature fits the function if the stated one does not, or ``None``."""
        return misfit_of(self.function, self.signature)

    @cached_property
    def convention(self) -> Signature:
        """Calling convention of the function."""
        return signature_of(self.function, self.signature)

    def __call__(self, reward: Tensor, group: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return advantages [B]; an exception or invalid result of the function breaks the law."""
        case = {"reward": reward, "group": group}
        if valid is not None:
            case["valid"] = valid
        copies = [x if x is None or x.requires_grad else x.clone() for x in (reward, group, valid)]
        return self.advantages(call(self.convention.call, case, self.function, *copies), case)

    def advantages(self, result: Any, case: Mapping[str, object]) -> Tensor:
        """Return a result of the function as a tensor [B]; an invalid one breaks the law."""
        reward = case["reward"]
        assert isinstance(reward, Tensor)
        return expect_array(result, reward.shape, case)

    def batches(self, **options: Any) -> st.SearchStrategy[RewardBatch]:
        """Return a strategy for batches that the convention can express, with ids in 0..8."""
        own = {"ragged": self.convention.ragged, "lost": False, "min_members": self.min_members,
               "far_ids": False}  # fmt: skip
        return reward_batches(**own | options)


#: Laws of group-relative advantages, for ``GroupAdvantage``.
ADVANTAGE: Laws[GroupAdvantage] = Laws(
    "advantage", GroupAdvantage, called="rewards in groups, as --signature says; advantages [B]"
)


def _needs_lost(subject: GroupAdvantage) -> str | None:
    if subject.convention.lost:
        return None
    return (
        "the signature has no lost rewards; a parameter `valid`, or a signature that has them, "
        "has it checked"
    )


def _needs_tensors(subject: GroupAdvantage) -> str | None:
    return None if subject.convention.tensors else "the function takes no tensors"


def _needs_group_statistics(subject: GroupAdvantage) -> str | None:
    return "--std batch: it needs all ranks' rewards" if subject.std == "batch" else None


def _needs_lost_alone(subject: GroupAdvantage) -> str | None:
    few = None if subject.min_members == 1 else "a group that loses members becomes too small"
    return _needs_lost(subject) or _needs_unequal_groups(subject) or few


def _needs_unequal_groups(subject: GroupAdvantage) -> str | None:
    return None if subject.convention.ragged else "all groups have one size"


def _case(batch: RewardBatch, **more: object) -> Mapping[str, object]:
    lost = {} if bool(batch.valid.all()) else {"valid": batch.valid}
    return {"reward": batch.reward, "group": batch.group, **lost, **more}


@ADVANTAGE.law(
    why="Rewards are logged and reused after the call; statistics kept between calls mix rounds, "
    "and a seed set inside repeats the noise of every rollout.",
)
def pure(f: GroupAdvantage, data: DataObject) -> None:
    """Arguments and global state are left as they were, and a second call gives the same."""
    lost = _needs_lost_alone(f) is None
    batch = data.draw(f.batches(lost=lost))
    given = batch._replace(**{name: x.clone() for name, x in batch._asdict().items()})
    mask = given.valid if lost and not bool(batch.valid.all()) else None
    # Hypothesis seeds both with 0, so a function that does the same would leave the state equal.
    random.random()
    np.random.random()  # noqa: NPY002
    state = _global_state()
    first = call(f.convention.call, _case(batch), f.function, given.reward, given.group, mask)
    changed = [name for name, value in _global_state().items() if value != state[name]]
    if changed:
        fail(_case(batch), "global state as it was", f"another {', '.join(changed)}")
    first = f.advantages(first, _case(batch)).clone()
    for name, before in batch._asdict().items():
        after = getattr(given, name)
        if not torch.equal(before, after):
            fail(
                _case(batch),
                f"{name} unchanged, {text(before)}",
                f"{name} changed in place to {text(after)}",
            )
    again = f(batch.reward, batch.group, None if mask is None else batch.valid)
    expect_close(again, first, _case(batch), tolerance=0.0)


@ADVANTAGE.law(
    why="Data loaders and ranks deliver samples in any order; an advantage given to another sample "
    "trains it toward the wrong image.",
)
def permutation(f: GroupAdvantage, data: DataObject) -> None:
    """Shuffling the trajectories shuffles their advantages."""
    batch = data.draw(f.batches())
    order = torch.tensor(
        data.draw(st.permutations(range(len(batch.reward)))), dtype=torch.int64, device="cpu"
    )
    expected = f(batch.reward, batch.group)
    got = torch.zeros_like(expected)
    got[order] = f(batch.reward[order], batch.group[order]).to(got.dtype)
    expect_close(got, expected, _case(batch, order=order), tolerance=f.tolerance)


def _relabel(
    f: GroupAdvantage,
    data: DataObject,
    ids: Callable[[torch.dtype, int], st.SearchStrategy[list[int]]],
) -> None:
    """Compare ids of a strategy with 0, 1, ..."""
    # Half of the ids are int64: it has those that merge in smaller dtypes.
    dtypes = [x for dtype in f.convention.ids for x in (torch.int64, dtype)]
    dtype = data.draw(st.sampled_from(dtypes if torch.int64 in dtypes[1::2] else dtypes[1::2]))
    batch = data.draw(f.batches(constant=False))
    dense = dense_ids(batch.group)
    relabeled = named_anew(dense, data.draw(ids(dtype, int(dense.max()) + 1)), dtype)
    expected = f(batch.reward, dense)
    got = f(batch.reward, relabeled)
    expect_close(got, expected, _case(batch._replace(group=relabeled)), tolerance=f.tolerance)


@ADVANTAGE.law(
    why="Ids are hashes or dataset indices; ids converted to float32, or used as positions, "
    "merge groups without an error.",
    first=lambda f, data: _relabel(f, data, moderate_ids),
)
def relabeled_groups(f: GroupAdvantage, data: DataObject) -> None:
    """Group ids are names: any other distinct integers give the same advantages."""
    _relabel(f, data, far_ids)


@ADVANTAGE.law(
    why="Only differences within a group carry information; a variance computed as E[x^2] - E[x]^2 "
    "loses them, and may become negative, if rewards are large.",
    options=("--min-members",),
)
def shift(f: GroupAdvantage, data: DataObject) -> None:
    """A constant added to all rewards changes no advantage."""
    batch = data.draw(f.batches())
    by = data.draw(st.integers(-1000, 1000))
    got, expected = f(batch.reward + by, batch.group), f(batch.reward, batch.group)
    expect_close(got, expected, _case(batch, shift=by), tolerance=f.tolerance)


@ADVANTAGE.law(
    why="The unit of a reward must not set the size of the update; a division by the variance, or "
    "a clip of rewards, makes it do so.",
    options=("--std", "--eps"),
)
def scale(f: GroupAdvantage, data: DataObject) -> None:
    """A positive factor on all rewards changes no advantage beyond eps."""
    batch = data.draw(f.batches())
    factor = 2.0 ** data.draw(st.integers(1, 40))
    unit = f(batch.reward, batch.group)
    got = f(batch.reward * factor, batch.group)
    if f.std == "none":
        expect_close(got / factor, unit, _case(batch, factor=factor), tolerance=f.tolerance)
        return
    spread = _spread(f, batch)  # a nonzero std is at least 1/32: rewards are multiples of 1/8
    allowed = f.tolerance + f.eps / spread
    expected = torch.where(spread > 0, unit, 0 * unit)
    near = (got - expected).abs() <= allowed * expected.abs().clamp(min=1)
    wrong = ~near & (spread != 0)  # NaN is not near
    if bool(wrong.any()):
        fail(_case(batch, factor=factor), expected, got, wrong=wrong)


@ADVANTAGE.law(
    why="Otherwise training prefers the worse image.",
)
def monotone(f: GroupAdvantage, data: DataObject) -> None:
    """The better of two members of a group has the larger advantage."""
    batch = data.draw(f.batches())
    advantage = f(batch.reward, batch.group)
    same = batch.group[:, None] == batch.group
    better = same & (batch.reward[:, None] > batch.reward)
    wrong = better & ~(advantage[:, None] > advantage)
    if bool(wrong.any()):
        first, second = wrong.nonzero()[0].tolist()
        expected = f"a larger advantage for entry {first} than for entry {second}"
        fail(_case(batch), expected, advantage, wrong=wrong.any(1))


@ADVANTAGE.law(
    why="What is left over pushes every sample of the group up or down, whatever the policy did.",
    options=("--min-members",),
)
def zero_sum(f: GroupAdvantage, data: DataObject) -> None:
    """The advantages of a group add up to 0."""
    _check_sum(f, data.draw(f.batches()))


@ADVANTAGE.law(
    why="The clip range and the learning rate are tuned for advantages of this size.",
    options=("--std", "--ddof", "--eps"),
)
def size(f: GroupAdvantage, data: DataObject) -> None:
    """Two members' advantages differ by the difference of their rewards over the std."""
    batch = data.draw(f.batches(min_members=max(2, f.min_members), constant=False))
    unit = data.draw(st.sampled_from([1.0, 2.0**-5, 2.0**-7]))  # small stds reveal a large eps
    check_size(f, batch._replace(reward=unit * batch.reward))


@ADVANTAGE.law(
    why="Real groups have 16 to 64 members, and real batches 16 to 128 groups; a function that "
    "reads only the first eight, or normalizes blocks of rows, is right only on small tests, and a "
    "clamp at 5 cuts the only success among 32.",
    options=("--std", "--ddof", "--eps"),
)
def large_groups(f: GroupAdvantage, data: DataObject) -> None:
    """Sum and size of the advantages are right in large groups, and in many groups, too."""
    generator = torch.Generator(device="cpu").manual_seed(data.draw(st.integers(0, 999)))
    sizes = [(16, 5), (24, 3), (48, 2), (64, 1), (64, 3), (96, 1), (8, 16), (4, 64), (3, 128)]
    members, groups = data.draw(st.sampled_from(sizes))
    members = max(members, f.min_members)
    reward = torch.rand(groups * members, generator=generator, dtype=torch.float64, device="cpu")
    if data.draw(st.booleans()):  # one success per group: of 32 members it has advantage 5.6
        reward = (torch.arange(len(reward), device="cpu") < groups).double()
    order = torch.randperm(len(reward), generator=generator, device="cpu")
    batch = RewardBatch(
        reward[order], (torch.arange(len(reward), device="cpu") % groups)[order], order >= 0
    )
    _check_sum(f, batch)
    check_size(f, batch)


@ADVANTAGE.law(
    why="Its std is a rounding error, or 0: divided by it, equal samples get advantages as large "
    "as 1, or NaN. A smaller rest is rounding, and looks like an informative group.",
    options=("--zero",),
)
def constant_group(f: GroupAdvantage, data: DataObject) -> None:
    """A group of equal rewards between other groups has advantage 0."""
    value = data.draw(st.integers(0, 160).map(tenths) | st.floats(-10, 10, width=32))
    size = data.draw(st.integers(2, 9))
    dtype = data.draw(
        st.sampled_from([torch.float64, torch.float32] if f.convention.tensors else [torch.float64])
    )
    batch = beside_others([value] * size, dtype=dtype)
    reward, group = batch.reward, batch.group
    got = f(reward, group)
    wrong = batch.valid & ~(got.abs() <= f.zero)
    if bool(wrong.any()):
        limit = "0" if f.zero == 0 else f"at most {f.zero:g} (option zero) in absolute value"
        fail({"reward": reward, "group": group}, limit, got, wrong=wrong)


@ADVANTAGE.law(
    why="There is nothing to compare with: a sample's std of one number is NaN, and a raw reward "
    "in place of the advantage has another scale.",
    skip=lambda f: None if f.min_members == 1 else "--min-members: no group of one is accepted",
    options=("--min-members",),
)
def one_member(f: GroupAdvantage, data: DataObject) -> None:
    """A group of one has advantage 0, beside larger groups too."""
    batch = data.draw(f.batches(max_members=1))
    if f.convention.ragged and data.draw(st.booleans()):
        batch = beside_others(batch.reward[:1].tolist(), dtype=batch.reward.dtype)
    got, alone = f(batch.reward, batch.group), batch.valid
    wrong = alone & ~(got.abs() <= f.zero)
    if bool(wrong.any()):
        case = {"reward": batch.reward, "group": batch.group}
        fail(case, torch.where(alone, 0, got), got, wrong=wrong)


@ADVANTAGE.law(
    why="A judge that failed says nothing; a placeholder in the mean moves the advantage of every "
    "other member.",
    skip=_needs_lost_alone,
)
def mask_equals_deletion(f: GroupAdvantage, data: DataObject) -> None:
    """An invalid reward takes no part, as if its trajectory were deleted, and gets advantage 0."""
    batch = data.draw(f.batches(lost=True))
    got = f(batch.reward, batch.group, batch.valid)
    expected = torch.zeros_like(got)
    if bool(batch.valid.any()):  # otherwise nothing is left to compare with
        alone = f(batch.reward[batch.valid], batch.group[batch.valid])
        expected[batch.valid] = alone.to(got.dtype)
    expect_close(got, expected, _case(batch), tolerance=f.tolerance)


@ADVANTAGE.law(
    why="Lost rewards are NaN or stale numbers; multiplied by a mask of 0, NaN stays NaN.",
    skip=_needs_lost,
)
def invalid_never_read(f: GroupAdvantage, data: DataObject) -> None:
    """The values of invalid entries do not affect the result."""
    batch = data.draw(f.batches(lost=True))
    assume(not bool(batch.valid.all()))
    placeholder = data.draw(st.sampled_from(LOST))
    reward = batch.reward.masked_fill(~batch.valid, placeholder)
    got = f(reward, batch.group, batch.valid)
    expected = f(batch.reward, batch.group, batch.valid)
    expect_close(got, expected, _case(batch._replace(reward=reward)), tolerance=f.tolerance)


@ADVANTAGE.law(
    why="The advantage of a sample must not depend on the number of GPUs.",
    skip=_needs_group_statistics,
    options=("--std",),
)
def split_equals_whole(f: GroupAdvantage, data: DataObject) -> None:
    """Groups do not see each other: a batch split over ranks by whole groups equals the whole."""
    batch = data.draw(f.batches())
    whole = f(batch.reward, batch.group)
    got = torch.zeros_like(whole)
    for name in set(batch.group.tolist()):
        rank = batch.group == name
        got[rank] = f(batch.reward[rank], batch.group[rank])
    expect_close(got, whole, _case(batch), tolerance=f.tolerance)


@ADVANTAGE.law(
    why="A float16 or bfloat16 intermediate rounds rewards of 4.25 and 4.26 to one number.",
)
def float32_accuracy(f: GroupAdvantage, data: DataObject) -> None:
    """Float32 rewards give results of float32 accuracy."""
    # Averaged votes such as 4.25 and 4.26: distinct in float32, equal in bfloat16.
    batch = data.draw(f.batches(number=_votes))
    exact = f(batch.reward, batch.group)
    case = _case(batch._replace(reward=batch.reward.float()))
    result = call(f.convention.call, case, f.function, batch.reward.float(), batch.group, None)
    expect_no_half(result, case)
    got = f.advantages(result, case)
    spread = _spread(f, batch)
    assume(bool(((spread == 0) | (spread > 2e-3)).all()))
    informative = spread > 0
    differ = (batch.group[:, None] == batch.group) & (batch.reward[:, None] != batch.reward)
    differ &= (got[:, None] != 0) | (got != 0)  # a filter may drop a group
    merged = differ & (got[:, None] == got)
    if bool(merged.any()):
        one, two = merged.nonzero()[0].tolist()
        words = f"different advantages for entries {one} and {two}, of different rewards"
        fail(case, words, got, wrong=merged.any(1))
    expect_close(
        got[informative].double(), exact[informative], case, tolerance=max(f.tolerance, 1e-2)
    )


@ADVANTAGE.law(
    why="Binary rewards arrive as integers; an output made in their dtype truncates advantages.",
)
def whole_numbers(f: GroupAdvantage, data: DataObject) -> None:
    """Integer rewards are refused, or give the same result as equal floats."""
    batch = data.draw(f.batches(number=signs))
    whole, expected = batch.reward.long(), f(batch.reward, batch.group)
    if refuses(f.convention.call, f.function, whole.clone(), batch.group.clone(), None):
        return
    got = f(whole, batch.group)
    rounding = 8 * torch.finfo(torch.float32).eps if got.dtype == torch.float32 else 0.0
    case = _case(batch._replace(reward=whole))
    expect_close(got.double(), expected, case, tolerance=max(f.tolerance, rounding))


@ADVANTAGE.law(
    why="Training code sets them to bfloat16 or to an accelerator; a tensor made inside without an "
    "explicit dtype and device then loses digits or sits on the wrong device.",
    skip=_needs_tensors,
)
def default_dtype_and_device(f: GroupAdvantage, data: DataObject) -> None:
    """The default dtype and device of torch change nothing."""
    batch = data.draw(f.batches(min_members=max(2, f.min_members)))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float64]))
    expected = f(batch.reward, batch.group)
    case = _case(batch, default_dtype=dtype, default_device="meta")
    with other_defaults(dtype):
        result = call(f.convention.call, case, f.function, *batch[:2], None)
    expect_memory(result, case)
    expect_close(f.advantages(result, case), expected, case, tolerance=f.tolerance)


@ADVANTAGE.law(
    why="A differentiable reward would otherwise be optimized directly, past the policy gradient.",
    skip=lambda f: _needs_tensors(f) or (None if f.detaches else NOT_DETACHED),
    options=("--no-detaches",),
)
def no_gradient(f: GroupAdvantage, data: DataObject) -> None:
    """No gradient flows through an advantage."""
    batch = data.draw(f.batches(min_members=max(2, f.min_members)))
    reward = batch.reward.requires_grad_()
    result = call(f.convention.call, _case(batch), f.function, reward, batch.group, None)
    if isinstance(result, Tensor) and result.requires_grad:
        fail(_case(batch), "a result without gradient", "one that requires grad")


def _close_above_four(byte: int) -> float:
    """Map a byte to 4..4.5: a small spread beside the mean, which half precision rounds away."""
    return 4 + byte / 512


@ADVANTAGE.law(
    why="Means and stds accumulated in half precision have two or three digits.",
    skip=_needs_tensors,
)
def half_precision(f: GroupAdvantage, data: DataObject) -> None:
    """Half-precision rewards are refused, or give the float32 result within their rounding."""
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    number = data.draw(st.sampled_from([tenths, _close_above_four]))
    batch = data.draw(
        f.batches(min_members=max(2, f.min_members), max_members=6, number=number, constant=False)
    )
    half = batch.reward.to(dtype)
    rounded, case = batch._replace(reward=half.float()), _case(batch._replace(reward=half))
    assume(bool((_spread(f, rounded) > 0.05).all()))
    refused = partial(refuses, f.convention.call, f.function, half, batch.group, None)
    if not f.float32:
        expect_float32_result(
            lambda inputs: f(inputs["reward"], batch.group), {"reward": half}, case, float32=False,
            refused=refused,
        )  # fmt: skip
        return
    expected = f(*rounded[:2]).float()
    if not refused():  # the result may be in half precision: two digits are enough for it
        expect_close(f(half, batch.group).float(), expected, case, tolerance=2e-2)


def check_group_advantage(
    function: Callable[..., Any],
    *,
    signature: str | Signature | Call = "mteditflow",
    std: str = "group",
    ddof: int = 0,
    eps: float = 1e-3,
    zero: float = 1e-6,
    min_members: int = 1,
    tolerance: float = 1e-3,
    detaches: bool = False,
    float32: bool = False,
    **search: Any,
) -> None:
    """Check a group advantage against every law that applies to its signature.

    Args:
        function: function under test.
        signature: calling convention: a name in ``SIGNATURES``, or an adapter.
        std: divisor of advantages, as in ``GroupAdvantage``.
        ddof: 0 for the population's std, 1 for the sample's.
        eps: upper bound of the constant that the function adds to the std.
        zero: largest absolute advantage that counts as 0 in a group of equal rewards.
        min_members: smallest group that the function accepts.
        tolerance: relative difference that counts as rounding.
        detaches: the function detaches rewards, so they may require a gradient.
        float32: half-precision rewards give the result of float32.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.
        TypeError: an option has another type, or the function does not fit the signature.
        ValueError: an option is out of range, or no law applies.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 3.

    Example:
        >>> from mteditflow import group_advantage
        >>> check_group_advantage(group_advantage, examples=5)
    """
    subject = GroupAdvantage(
        function, signature, std, ddof, eps, zero, min_members, tolerance, detaches, float32
    )
    ADVANTAGE.check(subject, **search)


def _global_state() -> dict[str, object]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "torch random state": torch.get_rng_state().numpy().tobytes(),
        "numpy random state": json.dumps(numpy_state, default=np.ndarray.tolist),
        "state of Python's random": random.getstate(),
    }


def _check_sum(f: GroupAdvantage, batch: RewardBatch) -> None:
    advantage = f(batch.reward, batch.group)
    expect_zero_sums(advantage, batch.group, _case(batch), tolerance=f.tolerance)


def check_size(f: GroupAdvantage, batch: RewardBatch) -> None:
    """Fail unless advantages of a group differ by the difference of their rewards over the std."""
    advantage, spread = f(batch.reward, batch.group).double(), _spread(f, batch)
    same = batch.group[:, None] == batch.group
    expected = (batch.reward[:, None] - batch.reward) / spread[:, None]
    got = advantage[:, None] - advantage
    allowed = (f.tolerance + f.eps / spread[:, None]) * expected.abs().clamp(min=1)
    wrong = ~((got - expected).abs() <= allowed) & same
    if bool(wrong.any()):
        one, two = wrong.nonzero()[0].tolist()
        case = _case(batch, compared=f"entries {one} and {two}, of group {int(batch.group[one])}")
        divided = "" if f.std == "none" else f", over a std ({f.std}, ddof={f.ddof}) of"
        divided += f" {float(spread[one]):.6g}" * bool(divided)
        rewards = f"{text(batch.reward[one])} - {text(batch.reward[two])}"
        fail(
            case,
            f"advantages that differ by {float(expected[one, two]):.6g}: {rewards}{divided}",
            f"{float(got[one, two]):.6g}: {text(advantage[one])} - {text(advantage[two])}",
            wrong=wrong.any(1),
        )


def _votes(byte: int) -> float:
    """Map a byte to an averaged judge score in [4, 4.31], in steps that bfloat16 merges."""
    return 4 + byte % 32 / 100


def _spread(f: GroupAdvantage, batch: RewardBatch) -> Tensor:
    """Return the divisor of each trajectory's deviation, float64 [B]; 0 for a group of one."""
    reward = batch.reward.double()
    if f.std == "batch":
        alone = len(reward) <= f.ddof
        return (
            torch.zeros_like(reward) if alone else reward.std(correction=f.ddof).expand(len(reward))
        )
    spread = torch.zeros_like(reward)
    # Without a std, ddof 1 is the leave-one-out baseline (RLOO): r - mean of the others equals
    # (r - mean) n / (n - 1), a division by 1 - 1 / n.
    if f.std == "none":
        count = (batch.group[:, None] == batch.group).sum(1).double()
        return torch.where(count > 1, 1 - f.ddof / count, 0)
    for name in set(batch.group.tolist()):
        members = batch.group == name
        if int(members.sum()) > 1:
            spread[members] = reward[members].std(correction=f.ddof)
    return spread
