"""Signatures: calling conventions for rewards, groups and lost entries.

Every law of advantages uses one form, ``(reward [B], group [B], valid [B] or None)``. A signature
converts it to the function's arguments, and the function's result to [B].
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mteditflow.testing.expect import expect_array, expect_tensor
from mteditflow.testing.law import LawBroken, fail
from mteditflow.testing.reports import Raised

Call = Callable[[Callable[..., Any], Tensor, Tensor, "Tensor | None"], Any]


@dataclass(frozen=True)
class Signature:
    """Calling convention of a group advantage.

    Attributes:
        call: ``(function, reward [B], group [B], valid [B] or None) -> advantage``; the result is
            any array or list of B numbers.
        shown: the call as text, for messages.
        lost: whether the convention can express lost rewards.
        ragged: whether groups may differ in size.
        tensors: whether the function takes torch tensors.
        ids: dtypes of group ids that the convention allows.
    """

    call: Call
    shown: str
    lost: bool = False
    ragged: bool = True
    tensors: bool = False
    ids: tuple[torch.dtype, ...] = (torch.int64, torch.int32, torch.uint8)


def _tensors(function: Callable[..., Any], reward: Tensor, group: Tensor, valid: Any) -> Any:
    return function(reward, group) if valid is None else function(reward, group, valid=valid)


def _numpy(function: Callable[..., Any], reward: Tensor, group: Tensor, valid: Any) -> Any:
    arrays = reward.numpy(), group.numpy()
    return function(*arrays) if valid is None else function(*arrays, valid=valid.numpy())


def _always_masked(call: Call) -> Call:
    """Return a call that passes an all-true mask if no reward is lost."""

    def masked(function: Callable[..., Any], reward: Tensor, group: Tensor, valid: Any) -> Any:
        everywhere = torch.ones(len(reward), dtype=torch.bool, device="cpu")
        return call(function, reward, group, everywhere if valid is None else valid)

    return masked


def _nan(function: Callable[..., Any], reward: Tensor, group: Tensor, valid: Any) -> Any:
    lost = torch.zeros_like(reward, dtype=torch.bool) if valid is None else ~valid
    floats = reward if reward.is_floating_point() else reward.double()
    return function(floats.masked_fill(lost, torch.nan).numpy(), group.numpy())


def _records(function: Callable[..., Any], reward: Tensor, group: Tensor, valid: Any) -> Any:
    rewards: list[float | None] = list(reward.tolist())
    if valid is not None:
        rewards = [r if v else None for r, v in zip(rewards, valid.tolist(), strict=True)]
    records = [{"reward": r, "group": g} for r, g in zip(rewards, group.tolist(), strict=True)]
    result = function(records)
    result = records if result is None else result
    return [x["advantage"] if isinstance(x, dict) else x for x in result]


def _tracker(function: Callable[..., Any], reward: Tensor, group: Tensor, _: Any) -> Any:
    prompts = np.array([f"prompt {name}" for name in group.tolist()])
    return function().update(prompts, reward.numpy())  # a new tracker: it keeps statistics


def _verl(function: Callable[..., Any], reward: Tensor, group: Tensor, _: Any) -> Any:
    """Call with responses of 4, 3, 2, 1, 4, ... tokens, with the reward on the last token."""
    length = 4 - torch.arange(len(reward), device="cpu") % 4
    token = torch.arange(4, device="cpu")
    tokens = torch.where(token == length[:, None] - 1, reward[:, None], 0)
    mask = token < length[:, None]
    index = np.array([str(name) for name in group.tolist()], dtype=object)
    case = {"token_level_rewards": tokens, "response_mask": mask, "index": list(index)}
    result = function(tokens.clone(), mask.to(reward.dtype), index)
    first = result[0] if isinstance(result, (tuple, list)) and result else None
    advantage = expect_tensor(first, tokens.shape, case)
    # NaN in a whole response is left to the laws; here only its layout over tokens is checked.
    row = advantage[:, :1].detach()
    wrong = (advantage != torch.where(mask, row, 0)) & ~(mask & row.isnan() & advantage.isnan())
    if bool(wrong.any()):
        fail(case, "one advantage for all tokens of a response, and 0 in padding", advantage)
    return advantage[:, 0]


def _prompts_samples(function: Callable[..., Any], reward: Tensor, group: Tensor, _: Any) -> Any:
    order = torch.argsort(dense_ids(group), stable=True)
    table = reward[order].reshape(len(set(group.tolist())), -1)
    result = expect_array(function(table), None, {"reward": table}).reshape(-1)
    return torch.empty_like(result).scatter(0, order, result)  # undoes the sort by group


def dense_ids(group: Tensor) -> Tensor:
    """Return ids 0, 1, ... in the sorted order of the given ones, int64 [B]."""
    return torch.from_numpy(np.unique(group.numpy(), return_inverse=True)[1].reshape(-1))


_EVERY_ID = (
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
#: Calling conventions by name.
SIGNATURES = {
    "mteditflow": Signature(
        _tensors, "fn(reward, group, valid=valid), tensors", lost=True, tensors=True, ids=_EVERY_ID
    ),
    "tensors": Signature(_tensors, "fn(reward, group), tensors", tensors=True),
    "numpy": Signature(_numpy, "fn(reward, group), numpy arrays"),
    "nan": Signature(_nan, "fn(reward, group), numpy arrays, NaN where lost", lost=True),
    "records": Signature(
        _records, 'fn([{"reward": 1.0, "group": 0}, ...]), "advantage" in each or a list, '
        "None where lost", lost=True,
    ),
    "flow-grpo": Signature(_tracker, "Tracker().update(prompts, rewards), numpy arrays"),
    "verl": Signature(
        _verl, "fn(token_level_rewards, response_mask, index)[0]", tensors=True
    ),
    "prompts-samples": Signature(
        _prompts_samples, "fn(reward [prompts, samples]), tensors", ragged=False, tensors=True
    ),
}  # fmt: skip


def signature_of(function: Callable[..., Any], signature: str | Signature | Call) -> Signature:
    """Return a signature by name, or that of an adapter.

    "numpy" and "tensors" pass ``valid`` if the function has a parameter of that name. If it has no
    default, it is passed in every call, all true if nothing is lost.

    Args:
        function: function under test.
        signature: a name in ``SIGNATURES``, a ``Signature``, or a bare ``call``, which must also
            accept lost rewards.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(signature, Signature):
        return signature
    if callable(signature):
        return Signature(signature, getattr(signature, "__qualname__", "adapter"), lost=True)
    if not isinstance(signature, str) or signature not in SIGNATURES:
        names = ", ".join(SIGNATURES)
        raise ValueError(
            f"signature: expected one of {names}, or a callable adapter, got {signature!r}"
        )
    chosen = SIGNATURES[signature]
    mask = parameters(function).get("valid")
    if signature not in ("mteditflow", "numpy", "tensors") or mask is None:
        return chosen
    shown = chosen.shown.replace("group)", "group, valid=valid)")
    always = mask.default is inspect.Parameter.empty
    call = _always_masked(chosen.call) if always else chosen.call
    return replace(chosen, call=call, shown=shown, lost=True)


def misfit_of(function: Callable[..., Any], signature: object) -> str | None:
    """Return an error message if a function fits another named signature than the stated one.

    A function that raises under every signature is left to the laws: it is wrong, or needs an
    adapter.

    Args:
        function: function under test.
        signature: the stated signature; one without a name fits any function.
    """
    if not isinstance(signature, str):
        return None
    objection = _objection(function, signature, any_error=False)
    if objection is None:
        return None
    masked = "valid" in parameters(function)  # and so lost rewards are not NaN
    others = [name for name in SIGNATURES if name not in (signature, "nan" * masked)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of calls that the function is not made for
        fitting = [name for name in others if _objection(function, name, any_error=True) is None]
    if not fitting:
        return None
    shown = signature_of(function, signature).shown
    expected = " or ".join(fitting[:2])
    return (
        f"signature: expected {expected} for this function, got {signature} ({shown}), "
        f"which gives {objection}"
    )


def _objection(function: Callable[..., Any], name: str, *, any_error: bool) -> str | None:
    """Return why a call under a signature fails, or ``None``.

    Args:
        function: function under test.
        name: name of the signature.
        any_error: whether any error on lost rewards counts, and NaN, or only a TypeError of the
            call itself.
    """
    convention = signature_of(function, name)
    reward = torch.tensor([1, 0, 2, 0, 0, 3, 0, 1], dtype=torch.float64, device="cpu")
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.int64, device="cpu")
    fits = not any_error and "valid" in parameters(function)
    for valid in (None, reward != 2) if convention.lost and not fits else (None,):
        mask = None if valid is None else valid.clone()
        try:
            result = convention.call(function, reward.clone(), group.clone(), mask)
            array = expect_array(result, reward.shape, {})
        except LawBroken as broken:
            return str(broken.got)
        except (Exception, SystemExit) as error:
            raised = Raised(error)
            if valid is None or any_error or raised.of_the_call:
                return str(raised)
            return None
        if name in ("mteditflow", "tensors") and isinstance(result, np.ndarray):
            return "a numpy array"
        if any_error and not bool(array.isfinite().all()):
            return "NaN"
    return None


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function by name; empty for a builtin without a signature."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
