"""Laws of fusion: several rewards fused into one advantage.

Source: MT-EditFlow (arXiv 2606.01985), Eq. 6, 7, 17-19.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from mteditflow.testing.advantage import GroupAdvantage, check_size
from mteditflow.testing.expect import (
    expect_array,
    expect_no_half,
    expect_pure,
    expect_zero_sums,
)
from mteditflow.testing.law import (
    Laws,
    call,
    expect_close,
    expect_memory,
    fail,
    other_defaults,
)
from mteditflow.testing.options import Subject, check_choice, check_integer
from mteditflow.testing.signatures import dense_ids, parameters
from mteditflow.testing.strategies import (
    LOST,
    RewardBatch,
    beside_others,
    far_ids,
    moderate_ids,
    named_anew,
    named_rewards,
    tenths,
)

NAMES = ("a", "b", "c")


@dataclass(frozen=True)
class Fusion(Subject):
    """A fusion under test.

    Attributes:
        function: called as ``function(rewards, weights, group, valid=valid)`` with rewards [B] and
            weights by name; returns advantages [B]. If it has a parameter ``measured``, it is also
            called with masks [B] by name, False if there was nothing to measure.
        level: "advantage" normalizes each reward separately, "reward" their weighted sum.
        zero: largest absolute advantage that counts as 0 if all rewards of a group are equal.
        eps: upper bound of the constant that the function adds to a std.
        tolerance: relative difference that counts as rounding.
        std: divisor of advantages: std of the "group", or of the "batch" (all rewards).
        ddof: 0 for the population's std, 1 for the sample's.
    """

    level: str = "advantage"
    zero: float = 1e-6
    eps: float = 1e-3
    tolerance: float = 1e-3
    std: str = "group"
    ddof: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("ddof", self.ddof, low=0, high=1)
        check_choice("level", self.level, ("advantage", "reward"))
        check_choice("std", self.std, ("group", "batch"))

    def __call__(
        self,
        rewards: Mapping[str, Tensor],
        weights: Mapping[str, float],
        group: Tensor,
        valid: Tensor | None = None,
        measured: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return advantages [B]; an exception or invalid result of the function breaks the law."""
        if valid is None and self.requires_valid:
            valid = torch.ones_like(group, dtype=torch.bool)
        case = {**rewards, "weights": weights, "group": group, "valid": valid}
        more = {} if measured is None else {"measured": measured}
        case |= {f"measured {name}": mask for name, mask in (measured or {}).items()}
        result = call(self.function, case, rewards, weights, group, valid=valid, **more)
        expect_memory(result, case)
        return expect_array(result, group.shape, case)

    @cached_property
    def requires_valid(self) -> bool:
        """Whether a call needs a mask even if no reward is lost."""
        mask = parameters(self.function).get("valid")
        return mask is not None and mask.default is inspect.Parameter.empty

    @property
    def takes_measured(self) -> bool:
        """Whether the function has the parameter ``measured``."""
        return "measured" in parameters(self.function)


#: Laws of fusion, for ``Fusion``.
FUSION: Laws[Fusion] = Laws(
    "fusion", Fusion, called="fn(rewards, weights, group, valid=valid), rewards and weights by name"
)
WEIGHTS = st.lists(st.sampled_from([0.0, 0.15, 0.5, 1.0, 2.0]), min_size=3, max_size=3).map(
    lambda w: dict(zip(NAMES, w, strict=True))
)


def _at_advantage_level(f: Fusion) -> str | None:
    return None if f.level == "advantage" else "--level reward: rewards are summed first"


def _case(rewards: Mapping[str, Tensor], **more: object) -> Mapping[str, object]:
    return {**rewards, **more}


@FUSION.law(
    why="Rewards and weights are logged and reused after the call.",
)
def pure(f: Fusion, data: DataObject) -> None:
    """Rewards, weights, ids and masks are left as they were, and a second call gives the same."""
    rewards, group, valid = data.draw(named_rewards(NAMES, far_ids=False))
    weights = data.draw(WEIGHTS)
    case = _case(rewards, weights=weights, group=group, valid=valid)

    def fused(x: Mapping[str, Tensor]) -> Tensor:
        given = dict(weights)
        result = f({name: x[name] for name in NAMES}, given, x["group"], x["valid"])
        if given != weights:
            fail(case, f"weights unchanged, {weights}", f"weights changed in place to {given}")
        return result

    expect_pure(fused, {**rewards, "group": group, "valid": valid}, case)


@FUSION.law(
    why="Weights matched by position apply to the wrong reward after a config is reordered.",
)
def order_of_names(f: Fusion, data: DataObject) -> None:
    """The order of the names changes nothing."""
    rewards, group, _ = data.draw(named_rewards(NAMES, far_ids=False, lost=False))
    weights = data.draw(WEIGHTS)
    order = data.draw(st.permutations(NAMES))
    reordered = {name: weights[name] for name in order}
    got, expected = f(rewards, reordered, group), f(rewards, weights, group)
    expect_close(
        got, expected, _case(rewards, weights=reordered, group=group), tolerance=f.tolerance
    )


def _relabel(
    f: Fusion, data: DataObject, ids: Callable[[torch.dtype, int], st.SearchStrategy[list[int]]]
) -> None:
    """Compare ids of a strategy with 0, 1, ..."""
    rewards, group, _ = data.draw(
        named_rewards(NAMES, far_ids=False, lost=False, constant=False, min_members=2)
    )
    weights, dense = data.draw(WEIGHTS) | {"a": 1.0}, dense_ids(group)
    names = data.draw(ids(torch.int64, int(dense.max()) + 1))
    relabeled = named_anew(dense, names, torch.int64)
    got, expected = f(rewards, weights, relabeled), f(rewards, weights, dense)
    case = _case(rewards, weights=weights, group=relabeled)
    expect_close(got, expected, case, tolerance=f.tolerance)


@FUSION.law(
    why="Ids are hashes or dataset indices; ids converted to float32, or used as positions, "
    "merge groups without an error.",
    first=lambda f, data: _relabel(f, data, moderate_ids),
)
def relabeled_groups(f: Fusion, data: DataObject) -> None:
    """Group ids are names: any other distinct integers give the same advantages."""
    _relabel(f, data, far_ids)


@FUSION.law(
    why="An ablation that sets a weight to 0 must remove the reward completely, with its scale.",
)
def zero_weight(f: Fusion, data: DataObject) -> None:
    """A reward of weight 0 has no influence."""
    rewards, group, _ = data.draw(named_rewards(NAMES, far_ids=False, lost=False))
    weights = data.draw(WEIGHTS) | {"b": 0.0, "c": 1.0}
    other = rewards["b"].flip(0) * 3 + 1
    case = _case(rewards, weights=weights, group=group, other_b=other)
    got, expected = f({**rewards, "b": other}, weights, group), f(rewards, weights, group)
    expect_close(got, expected, case, tolerance=f.tolerance)


@FUSION.law(
    why="What is left over pushes every sample of the group up or down.",
)
def zero_sum(f: Fusion, data: DataObject) -> None:
    """The fused advantages of a group add up to 0."""
    rewards, group, _ = data.draw(named_rewards(NAMES, far_ids=False, lost=False))
    weights = data.draw(WEIGHTS)
    case = _case(rewards, weights=weights, group=group)
    expect_zero_sums(f(rewards, weights, group), group, case, tolerance=f.tolerance)


@FUSION.law(
    why="Samples that do not differ must not move the policy.",
    options=("--zero",),
)
def constant_group(f: Fusion, data: DataObject) -> None:
    """A group whose rewards are all equal, between other groups, has advantage 0."""
    size = data.draw(st.integers(2, 6))
    values = st.integers(0, 160).map(tenths)
    batches = {
        name: beside_others([data.draw(values)] * size, dtype=torch.float64) for name in NAMES
    }
    rewards = {name: batch.reward for name, batch in batches.items()}
    weights, (_, group, flat) = data.draw(WEIGHTS), batches["a"]
    got = f(rewards, weights, group)
    wrong = flat & ~(got.abs() <= f.zero)
    if bool(wrong.any()):
        case = _case(rewards, weights=weights, group=group)
        fail(case, torch.where(flat, 0, got), got, wrong=wrong)


@FUSION.law(
    why="The advantage of a sample must not depend on the number of GPUs.",
    skip=lambda f: "--std batch: it needs all ranks' rewards" if f.std == "batch" else None,
    options=("--std",),
)
def split_equals_whole(f: Fusion, data: DataObject) -> None:
    """Groups do not see each other: a batch split over ranks by whole groups equals the whole."""
    rewards, group, _ = data.draw(named_rewards(NAMES, far_ids=False, lost=False))
    weights = data.draw(WEIGHTS)
    whole = f(rewards, weights, group)
    got = torch.zeros_like(whole)
    for name in set(group.tolist()):
        rank = group == name
        got[rank] = f({k: x[rank] for k, x in rewards.items()}, weights, group[rank])
    expect_close(got, whole, _case(rewards, weights=weights, group=group), tolerance=f.tolerance)


@FUSION.law(
    why="A lost sign or weight prefers the worse image.",
)
def monotone(f: Fusion, data: DataObject) -> None:
    """With a single weighted reward the better member has the larger advantage."""
    rewards, group, _ = data.draw(named_rewards(NAMES, far_ids=False, lost=False))
    weights = {"a": 1.0, "b": 0.0, "c": 0.0}
    advantage, a = f(rewards, weights, group), rewards["a"]
    better = (group[:, None] == group) & (a[:, None] > a)
    wrong = better & ~(advantage[:, None] > advantage)
    if bool(wrong.any()):
        first, second = wrong.nonzero()[0].tolist()
        expected = f"a larger advantage for entry {first} than for entry {second}, by a"
        case = _case(rewards, weights=weights, group=group)
        fail(case, expected, advantage, wrong=wrong.any(1))


@FUSION.law(
    why="The clip range and the learning rate are tuned for advantages of this size.",
    options=("--std", "--ddof", "--eps"),
)
def size(f: Fusion, data: DataObject) -> None:
    """With a single reward of weight 1, advantages differ by its difference over the std."""
    rewards, group, valid = data.draw(
        named_rewards(NAMES, far_ids=False, lost=False, constant=False, min_members=2)
    )

    def by_one(reward: Tensor, group: Tensor) -> Tensor:
        return f({**rewards, "a": reward}, {"a": 1.0, "b": 0.0, "c": 0.0}, group)

    alone = GroupAdvantage(by_one, "tensors", f.std, f.ddof, f.eps, tolerance=f.tolerance)
    check_size(alone, RewardBatch(rewards["a"], group, valid))


@FUSION.law(
    why="Training code sets them to bfloat16 or to an accelerator; a tensor made inside without an "
    "explicit dtype and device then loses digits or sits on the wrong device.",
)
def default_dtype_and_device(f: Fusion, data: DataObject) -> None:
    """The default dtype and device of torch change nothing."""
    rewards, group, _ = data.draw(named_rewards(NAMES, far_ids=False, lost=False))
    weights = data.draw(WEIGHTS)
    case, expected = _case(rewards, weights=weights, group=group), f(rewards, weights, group)
    with other_defaults():
        got = f(rewards, weights, group)
    expect_close(got, expected, case, tolerance=f.tolerance)


@FUSION.law(
    why="A float16 or bfloat16 intermediate rounds rewards of 4.25 and 4.26 to one number.",
)
def float32_accuracy(f: Fusion, data: DataObject) -> None:
    """Float32 rewards give the result of float64, and in no half precision."""
    rewards, group, _ = data.draw(
        named_rewards(NAMES, far_ids=False, lost=False, constant=False, min_members=2)
    )
    weights = {"a": 1.0, "b": 0.5, "c": 2.0}  # exact: sums that tie in float64 tie in float32
    single = {name: x.float() for name, x in rewards.items()}
    case = _case(single, weights=weights, group=group)
    got, expected = f(single, weights, group), f(rewards, weights, group)
    expect_no_half(got, case)
    expect_close(got, expected, case, tolerance=max(f.tolerance, 1e-3))


@FUSION.law(
    why="Only then is a weight the reward's share of the update.",
    skip=_at_advantage_level,
    options=("--level",),
)
def linear_in_weights(f: Fusion, data: DataObject) -> None:
    """The fused advantage is linear in the weights."""
    rewards, group, _ = data.draw(named_rewards(NAMES, far_ids=False, lost=False))
    one, two = data.draw(WEIGHTS), data.draw(WEIGHTS)
    total = {name: one[name] + two[name] for name in NAMES}
    got = f(rewards, total, group)
    expected = f(rewards, one, group) + f(rewards, two, group)
    expect_close(got, expected, _case(rewards, weights=total, group=group), tolerance=f.tolerance)


@FUSION.law(
    why="Advantage-level fusion prevents a reward of large spread from dominating the others.",
    skip=_at_advantage_level,
    options=("--level",),
)
def unit_free(f: Fusion, data: DataObject) -> None:
    """The unit of a reward changes nothing beyond eps."""
    rewards, group, _ = data.draw(
        named_rewards(NAMES, far_ids=False, lost=False, constant=False, min_members=2)
    )
    weights = data.draw(WEIGHTS)
    other = {**rewards, "a": 1024 * rewards["a"]}  # a power of 2, so scaling rounds nothing
    got, expected = f(other, weights, group), f(rewards, weights, group)
    tolerance = f.tolerance + 2 * f.eps * 32  # a nonzero std of multiples of 1/8 is at least 1/32
    expect_close(got, expected, _case(other, weights=weights, group=group), tolerance=tolerance)


@FUSION.law(
    why="The fused reward is normalized once more, so a common factor must cancel.",
    skip=lambda f: None if f.level == "reward" else "--level advantage: each is normalized alone",
    options=("--level",),
)
def common_factor(f: Fusion, data: DataObject) -> None:
    """Only the ratio of the weights matters beyond eps."""
    rewards, group, _ = data.draw(named_rewards(NAMES, far_ids=False, lost=False))
    weights = {"a": 1.0, "b": 0.5, "c": 2.0}
    doubled = {name: 1024 * weight for name, weight in weights.items()}
    got, expected = f(rewards, doubled, group), f(rewards, weights, group)
    tolerance = f.tolerance + 2 * f.eps * 64  # sums are multiples of 1/16: a std is at least 1/64
    expect_close(got, expected, _case(rewards, weights=doubled, group=group), tolerance=tolerance)


@FUSION.law(
    why="Otherwise its other rewards are compared as if the lost one had been 0.",
)
def mask_equals_deletion(f: Fusion, data: DataObject) -> None:
    """A trajectory that lost a reward takes no part, as if deleted, and gets advantage 0."""
    rewards, group, valid = data.draw(named_rewards(NAMES, far_ids=False))
    assume(not bool(valid.all()))
    weights, lost = data.draw(WEIGHTS), data.draw(st.sampled_from(LOST))
    held = {name: reward.masked_fill(~valid, lost) for name, reward in rewards.items()}
    got = f(held, weights, group, valid)
    expected = torch.zeros_like(got)
    if bool(valid.any()):  # otherwise nothing is left to compare with
        kept = {name: reward[valid] for name, reward in rewards.items()}
        expected[valid] = f(kept, weights, group[valid]).to(got.dtype)
    case = _case(held, weights=weights, group=group, valid=valid)
    expect_close(got, expected, case, tolerance=f.tolerance)


@FUSION.law(
    why="Consistency cannot be measured after a change of background, which is neither a failure "
    "nor a reason to drop the sample's other rewards.",
    skip=lambda f: None if f.takes_measured else "the function takes no parameter `measured`",
)
def unmeasured(f: Fusion, data: DataObject) -> None:
    """A reward with nothing to measure adds 0, or counts as the mean of its group in a sum."""
    rewards, group, _ = data.draw(named_rewards(NAMES, far_ids=False, lost=False))
    flags = data.draw(st.lists(st.booleans(), min_size=len(group), max_size=len(group)))
    has = torch.tensor(flags, dtype=torch.bool, device="cpu")
    same = (group[:, None] == group).double()
    some = (same @ has.double()) > 0
    # A sum cannot replace a reward that no member of the group has.
    has = has | ~some if f.level == "reward" else has
    assume(bool(has.any()) and not bool(has.all()))
    weights = data.draw(WEIGHTS) | {"a": 1.0}
    held = {**rewards, "b": rewards["b"].masked_fill(~has, data.draw(st.sampled_from(LOST)))}
    got = f(held, weights, group, measured={"b": has})
    if f.level == "reward":
        # The group's mean of b adds a constant to the sum, which normalization removes.
        mean = (same @ torch.where(has, rewards["b"], 0)) / (same @ has.double())
        expected = f({**rewards, "b": torch.where(has, rewards["b"], mean)}, weights, group)
    else:
        alone = f({n: x[has] for n, x in rewards.items()}, _only("b", weights), group[has])
        others = f(rewards, weights | {"b": 0.0}, group)
        expected = others + torch.zeros_like(others).masked_scatter(has, alone.to(others.dtype))
    case = _case(held, weights=weights, group=group, measured_b=has)
    expect_close(got, expected, case, tolerance=f.tolerance)


def _only(name: str, weights: Mapping[str, float]) -> dict[str, float]:
    return dict.fromkeys(weights, 0.0) | {name: weights[name]}


def check_fusion(
    function: Callable[..., Any],
    *,
    level: str = "advantage",
    zero: float = 1e-6,
    eps: float = 1e-3,
    tolerance: float = 1e-3,
    std: str = "group",
    ddof: int = 0,
    **search: Any,
) -> None:
    """Check a fusion, called as ``function(rewards, weights, group, valid=valid)``.

    Args:
        function: maps rewards [B] and weights, by name, to advantages [B]. If it has a parameter
            ``measured`` (masks [B] by name), the law of unmeasured rewards is checked, too.
        level: "advantage" or "reward", as in ``Fusion``.
        zero: largest absolute advantage that counts as 0 if all rewards of a group are equal.
        eps: upper bound of the constant that the function adds to a std.
        tolerance: relative difference that counts as rounding.
        std: divisor of advantages: std of the "group" or of the "batch".
        ddof: 0 for the population's std, 1 for the sample's.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 6, 7.

    Example:
        >>> from mteditflow import fuse_advantages
        >>> check_fusion(fuse_advantages, examples=5)
    """
    FUSION.check(Fusion(function, level, zero, eps, tolerance, std, ddof), **search)
