"""Laws of the selection of groups.

Source: dynamic sampling of DAPO (arXiv 2503.14476).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from mteditflow.testing.expect import expect_array, expect_pure
from mteditflow.testing.law import Laws, call, expect_memory, fail, other_defaults
from mteditflow.testing.options import Subject
from mteditflow.testing.signatures import dense_ids
from mteditflow.testing.strategies import (
    RewardBatch,
    far_ids,
    moderate_ids,
    named_anew,
    reward_batches,
    signs,
)


@dataclass(frozen=True)
class Selection(Subject):
    """A selection of groups under test.

    Attributes:
        function: called as ``function(reward [B], group [B], valid=valid [B])``; returns the mask
            of trajectories to train on, boolean [B].
    """

    def __call__(self, reward: Tensor, group: Tensor, valid: Tensor) -> Tensor:
        """Return the mask of kept trajectories, [B]; an invalid result breaks the law."""
        case = {"reward": reward, "group": group, "valid": valid}
        kept = call(self.function, case, reward, group, valid=valid)
        expect_memory(kept, case)
        return expect_array(kept, reward.shape, case, of="booleans").bool()


#: Laws of the selection of groups, for ``Selection``.
SELECTION: Laws[Selection] = Laws(
    "selection", Selection, called="fn(reward, group, valid=valid), returns booleans"
)


def _rows(batch: RewardBatch, **more: object) -> Mapping[str, object]:
    return {"reward": batch.reward, "group": batch.group, "valid": batch.valid, **more}


@SELECTION.law(
    why="Rewards and masks are reused for the advantages of the selected groups.",
)
def pure(f: Selection, data: DataObject) -> None:
    """The arguments are left as they were, and a second call gives the same."""
    batch = data.draw(reward_batches(number=signs, far_ids=False))
    expect_pure(lambda x: f(**x), batch._asdict(), _rows(batch))


@SELECTION.law(
    why="A group that lost its worst members has another mean: its advantages are biased.",
)
def whole_groups(f: Selection, data: DataObject) -> None:
    """The valid members of a group are kept or dropped together."""
    batch = data.draw(reward_batches(number=signs, far_ids=False))
    kept = f(*batch)
    same = (batch.group[:, None] == batch.group) & batch.valid[:, None] & batch.valid
    wrong = same & (kept[:, None] != kept)
    if bool(wrong.any()):
        fail(_rows(batch), "one verdict in each group", kept, wrong=wrong.any(1))


@SELECTION.law(
    why="Such a group has cost but no gradient; rounding of its mean can make it look informative.",
)
def flat_groups_dropped(f: Selection, data: DataObject) -> None:
    """A group of equal rewards between other groups is dropped, for any value."""
    value, size = data.draw(st.integers(-80, 80)) / 10, data.draw(st.integers(1, 300))
    reward = torch.full((2 + size + 2,), value, dtype=torch.float64, device="cpu")
    reward[[1, 2 + size]] = value + 1  # beside the flat group
    group = torch.tensor([6] * 2 + [4] * size + [9] * 2, dtype=torch.int64, device="cpu")
    got, flat = f(reward, group, torch.ones_like(group, dtype=torch.bool)), group == 4
    if bool(got[flat].any()):
        case = {"reward": reward, "group": group}
        words = f"{int(got[flat].sum())} members kept"
        fail(case, "no member of group 4 kept", words, wrong=got & flat)


@SELECTION.law(
    why="Dropping informative groups wastes rollouts, and a lost reward trains on noise.",
)
def informative_groups_kept(f: Selection, data: DataObject) -> None:
    """Valid members of a group of different rewards are kept, and invalid ones are not."""
    batch = data.draw(reward_batches(number=signs, far_ids=False))
    same = (batch.group[:, None] == batch.group) & batch.valid[:, None] & batch.valid
    differs = (same & (batch.reward[:, None] != batch.reward)).any(dim=1)
    got = f(*batch)
    if not torch.equal(got, differs):
        fail(_rows(batch), differs, got, wrong=got != differs)


@SELECTION.law(
    why="Not every data loader delivers the members of a group as neighbors.",
)
def permutation(f: Selection, data: DataObject) -> None:
    """Shuffling the trajectories changes no verdict."""
    batch = data.draw(reward_batches(number=signs, far_ids=False))
    order = torch.tensor(
        data.draw(st.permutations(range(len(batch.reward)))), dtype=torch.int64, device="cpu"
    )
    expected = f(*batch)
    got = torch.zeros_like(expected)
    got[order] = f(batch.reward[order], batch.group[order], batch.valid[order])
    if not torch.equal(got, expected):
        fail(_rows(batch, order=order), expected, got, wrong=got != expected)


def _relabel(
    f: Selection, data: DataObject, ids: Callable[[torch.dtype, int], st.SearchStrategy[list[int]]]
) -> None:
    """Compare ids of a strategy with 0, 1, ..."""
    batch = data.draw(reward_batches(number=signs, far_ids=False))
    dense = dense_ids(batch.group)
    names = data.draw(ids(torch.int64, int(dense.max()) + 1))
    relabeled = batch._replace(group=named_anew(dense, names, torch.int64))
    got, expected = f(*relabeled), f(*batch._replace(group=dense))
    if not torch.equal(got, expected):
        fail(_rows(relabeled), expected, got, wrong=got != expected)


@SELECTION.law(
    why="Ids are hashes or dataset indices; ids converted to float32, or used as positions, "
    "merge groups without an error.",
    first=lambda f, data: _relabel(f, data, moderate_ids),
)
def relabeled_groups(f: Selection, data: DataObject) -> None:
    """Group ids are names: any other distinct integers give the same verdicts."""
    _relabel(f, data, far_ids)


@SELECTION.law(
    why="Counting in bfloat16 stops at 256, in float16 at 2048.",
)
def default_dtype_and_device(f: Selection, data: DataObject) -> None:
    """The default dtype and device of torch change nothing, also in large groups."""
    size, wrong = data.draw(st.sampled_from([2, 3, 257, 300])), data.draw(st.integers(1, 3))
    reward = torch.zeros(2 * size, dtype=torch.float64, device="cpu")
    reward[:wrong] = 1.0
    group = torch.arange(2 * size, device="cpu") // size
    valid = torch.ones_like(group, dtype=torch.bool)
    expected = f(reward, group, valid)
    with other_defaults():
        got = f(reward, group, valid)
    if not torch.equal(got, expected):
        case = {"reward": reward, "group": group, "members of each": size}
        kept = f"{int(expected.sum())} members kept", f"{int(got.sum())} members kept"
        fail(case, *kept, wrong=got != expected)


def check_selection(function: Callable[..., Any], **search: Any) -> None:
    """Check a selection of groups, called as ``function(reward, group, valid=valid)``.

    Args:
        function: maps rewards [B] in groups to the mask of kept trajectories, boolean [B].
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.

    Source: dynamic sampling of DAPO (arXiv 2503.14476).

    Example:
        >>> from mteditflow import select_groups
        >>> def kept(reward, group, valid):
        ...     return select_groups(reward, group, valid=valid).keep
        >>> check_selection(kept, examples=5)
    """
    SELECTION.check(Selection(function), **search)
