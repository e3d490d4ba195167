"""Laws of turn aggregators ([B, N] scores to [B] rewards) and of credit ([B, N] to [B, N]).

Source: MT-EditFlow (arXiv 2606.01985), turn aggregation and Eq. 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from mteditflow.testing.expect import expect_array, expect_no_half, expect_pure
from mteditflow.testing.law import (
    Laws,
    call,
    expect_close,
    expect_memory,
    fail,
    other_defaults,
    refuses,
)
from mteditflow.testing.options import Subject, check_choice
from mteditflow.testing.reports import Raised
from mteditflow.testing.strategies import LOST, TurnBatch, turn_batches

#: Usual scores, tried where a function raises on those that it is said to accept.
_SCALES = ((0.0, 1.0), (1.0, 5.0), (0.0, 10.0), (1.0, 10.0), (-1.0, 1.0))


@dataclass(frozen=True)
class TurnFunction(Subject):
    """A function of turn scores under test.

    Attributes:
        function: called as ``function(score [B, N], turn_mask=mask [B, N])``.
        values: scores that the function accepts, at least two.
        tolerance: relative difference that counts as rounding.
    """

    values: Sequence[float] = (0.0, 1.0)
    tolerance: float = 1e-5

    argument: ClassVar[str] = "score"
    axes: ClassVar[int] = 1  # of the result

    def __post_init__(self) -> None:
        super().__post_init__()
        values = self.values if isinstance(self.values, Sequence) else ()
        numbers = {x for x in values if isinstance(x, (int, float)) and math.isfinite(x)}
        if len(numbers) < 2 or len(numbers) < len(set(values)):
            raise ValueError(
                f"values: expected at least two different finite numbers, got {self.values!r}"
            )

    def __call__(self, score: Tensor, turn_mask: Tensor) -> Tensor:
        """Return the result; an exception or invalid result of the function breaks the law."""
        case = {self.argument: score, "turn_mask": turn_mask}
        result = call(self.function, case, score.clone(), turn_mask=turn_mask.clone())
        expect_memory(result, case)
        return expect_array(result, score.shape[: self.axes], case)

    def misfit(self) -> str | None:
        """Return scores that the function accepts if it raises on the stated ones, or ``None``."""
        raised = [self._raises(values) for values in (tuple(self.values), *_SCALES)]
        fitting = [x for x, error in zip(_SCALES, raised[1:], strict=True) if error is None]
        if raised[0] is None or raised[0].of_the_call or not fitting:
            return None
        expected, got = (" ".join(f"{x:g}" for x in values) for values in (fitting[0], self.values))
        return (
            f"values: expected scores that the function accepts, such as {expected}, got {got}, "
            f"which gives {raised[0]}"
        )

    def _raises(self, values: tuple[float, ...]) -> Raised | None:
        """Return the exception on a chain of these scores, or ``None``."""
        score = torch.tensor([values], dtype=torch.float64, device="cpu")
        try:
            self.function(score, turn_mask=torch.ones_like(score, dtype=torch.bool))
        except (Exception, SystemExit) as error:
            return Raised(error)
        return None

    def case(self, batch: TurnBatch, **more: object) -> Mapping[str, object]:
        """Return the arguments by name."""
        return {self.argument: batch.score, "turn_mask": batch.turn_mask, **more}

    def batches(self) -> st.SearchStrategy[TurnBatch]:
        """Return a strategy for scores that the function accepts."""
        return turn_batches(values=tuple(self.values))


@dataclass(frozen=True)
class Aggregator(TurnFunction):
    """An aggregator under test: [B, N] scores to [B].

    Attributes:
        any_order: the order of turns does not matter.
    """

    any_order: bool = True


@dataclass(frozen=True)
class TurnCreditFunction(TurnFunction):
    """A credit under test: [B, N] rewards to [B, N].

    Attributes:
        reads: turns that a turn's credit depends on, besides itself: "later" (such as a return) or
            "earlier" (such as a stop after failure).
        linear: the credit of a sum of rewards is the sum of their credits.
    """

    values: Sequence[float] = (-1.0, 0.0, 0.5, 1.0)
    reads: str = "later"
    linear: bool = True
    argument: ClassVar[str] = "reward"
    axes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reads", self.reads, ("later", "earlier"))


TURNS: Laws[TurnFunction] = Laws("turns", TurnFunction)


@TURNS.law(
    why="Scores are logged and reused after the call, by another credit or for another reward.",
)
def pure(f: TurnFunction, data: DataObject) -> None:
    """Scores and masks are left as they were, and a second call gives the same."""
    batch = data.draw(f.batches())
    case = f.case(batch)

    def result(x: Mapping[str, Tensor]) -> Tensor:
        found = call(f.function, case, x[f.argument], turn_mask=x["turn_mask"])
        return expect_array(found, batch.score.shape[: f.axes], case)

    expect_pure(result, {f.argument: batch.score, "turn_mask": batch.turn_mask}, case)


@TURNS.law(
    why="A batch statistic inside an aggregator makes a reward depend on other prompts of the "
    "round.",
)
def chains_independent(f: TurnFunction, data: DataObject) -> None:
    """A chain has the same result alone and in a batch."""
    batch = data.draw(f.batches())
    whole = f(*batch)
    alone = torch.cat(
        [f(batch.score[i : i + 1], batch.turn_mask[i : i + 1]) for i in range(len(whole))]
    )
    expect_close(whole, alone, f.case(batch), tolerance=f.tolerance)


@TURNS.law(
    why="Padded turns contain NaN or zeros; zeros read as scores punish short chains.",
)
def padding_never_read(f: TurnFunction, data: DataObject) -> None:
    """The values of padded turns do not affect the result."""
    batch = data.draw(f.batches())
    assume(not bool(batch.turn_mask.all()))
    held = batch.score.masked_fill(~batch.turn_mask, data.draw(st.sampled_from(LOST)))
    expect_close(
        f(held, batch.turn_mask),
        f(*batch),
        f.case(batch._replace(score=held)),
        tolerance=f.tolerance,
    )


@TURNS.law(
    why="Otherwise the reward of a chain depends on the longest chain of its batch.",
)
def padding_equals_deletion(f: TurnFunction, data: DataObject) -> None:
    """A padded chain has the same result as without padding."""
    batch = data.draw(f.batches())
    got = f(*batch)
    for chain, length in enumerate(batch.turn_mask.sum(dim=1).tolist()):
        exists = torch.ones(1, length, dtype=torch.bool, device="cpu")
        own = f(batch.score[chain : chain + 1, :length], exists)
        here = got[chain : chain + 1] if got.ndim == 1 else got[chain : chain + 1, :length]
        expect_close(here, own, f.case(batch), tolerance=f.tolerance)


@TURNS.law(
    why="A mean of 1/3 and one of 0.334 are equal in bfloat16: chains of different scores tie.",
)
def precision(f: TurnFunction, data: DataObject) -> None:
    """Float64 scores give a result in no half precision."""
    batch = data.draw(f.batches())
    case = f.case(batch)
    result = call(f.function, case, batch.score.clone(), turn_mask=batch.turn_mask.clone())
    expect_no_half(result, case)


@TURNS.law(
    why="In bfloat16 as default dtype, a mean of three turns has two digits, and ties appear; a "
    "tensor on the default device cannot be combined with the scores.",
)
def default_dtype_and_device(f: TurnFunction, data: DataObject) -> None:
    """The default dtype and device of torch change nothing."""
    batch = data.draw(f.batches())
    expected = f(*batch)
    with other_defaults():
        got = f(*batch)
    expect_close(got, expected, f.case(batch, default_dtype=torch.bfloat16), tolerance=f.tolerance)


#: Laws of turn aggregators, for ``Aggregator``.
AGGREGATOR: Laws[Aggregator] = Laws(
    "aggregator",
    Aggregator,
    TURNS.through(lambda f: f),
    called="fn(score, turn_mask=mask), [B, N] to [B]",
)
#: Laws of credit to turns, for ``TurnCreditFunction``.
CREDIT: Laws[TurnCreditFunction] = Laws(
    "credit",
    TurnCreditFunction,
    TURNS.through(lambda f: f),
    called="fn(reward, turn_mask=mask), [B, N] to [B, N]",
)


@AGGREGATOR.law(
    why="A sum in place of a mean rewards long chains.",
)
def length(f: Aggregator, data: DataObject) -> None:
    """Chains of equal scores have equal rewards, for any length of the chain and its neighbor."""
    score = data.draw(st.sampled_from(list(f.values)))
    turns = data.draw(st.integers(2, 6))
    alone = torch.full((1, 1), score, dtype=torch.float64, device="cpu")
    expected = f(alone, torch.ones_like(alone, dtype=torch.bool))
    chains, mask = _two_lengths((score, score), (1, turns))
    case = {"score": chains, "turn_mask": mask}
    expect_close(f(chains, mask), expected.expand(2), case, tolerance=f.tolerance)


@AGGREGATOR.law(
    why="Otherwise failing a turn is rewarded.",
)
def monotone(f: Aggregator, data: DataObject) -> None:
    """A better score of a turn never lowers the reward of its chain."""
    batch = data.draw(f.batches())
    chain = data.draw(st.integers(0, len(batch.score) - 1))
    turn = data.draw(st.integers(0, int(batch.turn_mask[chain].sum()) - 1))
    better = batch.score.clone()
    better[chain, turn] = max(f.values)
    before, after = f(*batch)[chain], f(better, batch.turn_mask)[chain]
    if not bool(after >= before - f.tolerance):
        fail(
            f.case(batch, better=better),
            f"at least {before.item()} for chain {chain}",
            after.item(),
        )


@AGGREGATOR.law(
    why="A constant reward has no training signal.",
)
def informative(f: Aggregator, data: DataObject) -> None:
    """A chain of the best scores has a larger reward than one of the worst, for any lengths."""
    turns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    score, mask = _two_lengths((max(f.values), min(f.values)), turns)
    best, worst = f(score, mask).tolist()
    if not best > worst:
        case = {"score": score, "turn_mask": mask}
        fail(case, "a larger reward of the first chain", [best, worst])


@AGGREGATOR.law(
    why="A weight by position in the chain should be intended, not an indexing error.",
    skip=lambda f: None if f.any_order else "--no-any-order: the order of turns matters",
    options=("--no-any-order",),
)
def turn_order(f: Aggregator, data: DataObject) -> None:
    """The order of turns changes nothing."""
    batch = data.draw(f.batches())
    order = torch.tensor(
        data.draw(st.permutations(range(batch.score.shape[1]))), dtype=torch.int64, device="cpu"
    )
    got = f(batch.score[:, order], batch.turn_mask[:, order])
    expect_close(got, f(*batch), f.case(batch, order=order), tolerance=f.tolerance)


@AGGREGATOR.law(
    why="Judges return integers; a mean computed in an integer dtype is rounded down.",
    skip=lambda f: None if all(float(x).is_integer() for x in f.values) else "--values: fractions",
)
def whole_numbers(f: Aggregator, data: DataObject) -> None:
    """Integer and boolean scores are refused, or give what the same numbers give as floats."""
    batch = data.draw(f.batches())
    dtypes = [torch.int64, torch.int32]
    dtypes += [torch.bool] * (set(f.values) <= {0.0, 1.0})  # booleans express only 0 and 1
    score = batch.score.to(data.draw(st.sampled_from(dtypes)))
    expected = f(*batch).double()
    if not refuses(f.function, score.clone(), turn_mask=batch.turn_mask.clone()):
        got, case = f(score, batch.turn_mask).double(), f.case(batch._replace(score=score))
        expect_close(got, expected, case, tolerance=f.tolerance)


@CREDIT.law(
    why="A return that includes the past rewards a turn for what happened before it.",
    options=("--reads",),
)
def causal(f: TurnCreditFunction, data: DataObject) -> None:
    """A turn's credit depends only on itself and the turns that it may read."""
    batch = data.draw(f.batches())
    assume(batch.score.shape[1] > 1)
    turns = batch.score.shape[1]
    changed = data.draw(st.integers(0, turns - 1))
    score = batch.score.clone()
    score[:, changed] = data.draw(st.sampled_from(list(f.values)))
    later = torch.arange(turns, device="cpu") > changed
    earlier = torch.arange(turns, device="cpu") < changed
    same = later if f.reads == "later" else earlier
    before, after = f(*batch)[:, same], f(score, batch.turn_mask)[:, same]
    expect_close(after, before, f.case(batch, changed=score), tolerance=f.tolerance)


@CREDIT.law(
    why="Otherwise a sum over turns counts turns that do not exist.",
)
def padding_is_zero(f: TurnCreditFunction, data: DataObject) -> None:
    """A padded turn gets credit 0."""
    batch = data.draw(f.batches())
    got = f(*batch)
    wrong = ~batch.turn_mask & (got != 0)
    if bool(wrong.any()):
        fail(f.case(batch), "0 in padded turns", got, wrong=wrong)


@CREDIT.law(
    why="No turn follows it; other credit trains it toward the results of other turns.",
    skip=lambda f: None if f.reads == "later" else "--reads: a turn reads earlier ones",
    options=("--reads",),
)
def last_turn(f: TurnCreditFunction, data: DataObject) -> None:
    """The credit of a chain's last turn is its own reward."""
    batch = data.draw(f.batches())
    last = batch.turn_mask.sum(dim=1, keepdim=True) - 1
    got, expected = (x.double().gather(1, last) for x in (f(*batch), batch.score))
    expect_close(got, expected, f.case(batch), tolerance=f.tolerance)


@CREDIT.law(
    why="Only then do weights of several rewards mean the same before and after credit assignment.",
    skip=lambda f: None if f.linear else "--no-linear: the credit is not linear",
    options=("--no-linear",),
)
def linear(f: TurnCreditFunction, data: DataObject) -> None:
    """The credit of a sum of rewards is the sum of their credits."""
    batch = data.draw(f.batches())
    other = data.draw(st.sampled_from([-2.0, 0.5, 3.0]))
    got = f(other * batch.score + batch.score.flip(0), batch.turn_mask)
    expected = other * f(*batch) + f(batch.score.flip(0), batch.turn_mask)
    expect_close(got, expected, f.case(batch, factor=other), tolerance=f.tolerance)


def _two_lengths(scores: tuple[float, float], turns: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return a batch of two constant chains, [2, N], padded with 0, and its mask."""
    places = torch.arange(max(turns), device="cpu")
    mask = places < torch.tensor(turns, dtype=torch.int64, device="cpu")[:, None]
    score = torch.tensor(scores, dtype=torch.float64, device="cpu")[:, None]
    return torch.where(mask, score, 0), mask


def check_aggregator(
    function: Callable[..., Any],
    *,
    values: Sequence[float] = (0.0, 1.0),
    any_order: bool = True,
    tolerance: float = 1e-5,
    **search: Any,
) -> None:
    """Check an aggregator of turn scores, called as ``function(score, turn_mask=mask)``.

    Args:
        function: maps scores [B, N] to rewards [B].
        values: scores that the function accepts.
        any_order: the order of turns does not matter.
        tolerance: relative difference that counts as rounding.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.

    Source: MT-EditFlow (arXiv 2606.01985), turn aggregation.

    Example:
        >>> from mteditflow import binary_and
        >>> check_aggregator(binary_and, examples=5)
    """
    AGGREGATOR.check(Aggregator(function, values, tolerance, any_order), **search)


def check_credit(
    function: Callable[..., Any],
    *,
    values: Sequence[float] = (-1.0, 0.0, 0.5, 1.0),
    reads: str = "later",
    linear: bool = True,
    tolerance: float = 1e-5,
    **search: Any,
) -> None:
    """Check a credit assignment to turns, called as ``function(reward, turn_mask=mask)``.

    Args:
        function: maps rewards [B, N] to credits [B, N].
        values: rewards that the function accepts.
        reads: turns that a turn's credit depends on besides itself, "later" or "earlier".
        linear: the credit of a sum of rewards is the sum of their credits.
        tolerance: relative difference that counts as rounding.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 8 and its alternatives.

    Example:
        >>> from mteditflow import reward_to_go
        >>> check_credit(reward_to_go, examples=5)
    """
    CREDIT.check(TurnCreditFunction(function, values, tolerance, reads, linear), **search)
