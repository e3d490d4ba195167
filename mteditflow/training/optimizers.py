"""State of an optimizer as plain tensors and JSON, independent of the number of ranks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mteditflow._sharding import whole


def optimizer_state(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return everything on which an optimizer's next step depends, except weights and gradients.

    Where parameters are sharded (FSDP2's ``fully_shard``), every rank must call it.

    Args:
        optimizer: any ``torch.optim.Optimizer`` whose state holds tensors, numbers, strings and
            None, as all of torch's but LBFGS; or accelerate's wrapper of one.

    Returns:
        Tensors (whole copies on the CPU) named by the position of their parameter, such as
        ``"12.exp_avg"``, and a dictionary of JSON values with the rest. Both are independent of the
        number of ranks, and ``load_optimizer_state`` accepts them on any number.

    Raises:
        TypeError: the state holds another type, or is not sharded like its parameter; or it is
            DeepSpeed's optimizer, which holds only this rank's part.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> tensors, values = optimizer_state(optimizer)
        >>> tensors
        {'0.momentum_buffer': tensor([1., 1.])}
        >>> fresh = torch.optim.SGD([weight], lr=1.0)
        >>> load_optimizer_state(fresh, tensors, values)
        >>> fresh.param_groups[0]["lr"], fresh.state[weight]["momentum_buffer"]
        (0.1, tensor([1., 1.]))
    """
    optimizer, tensors = _unwrapped(optimizer), dict[str, Tensor]()
    state: list[dict[str, object]] = []
    groups: list[dict[str, object]] = []
    for parameter, _ in _parameters(optimizer):
        held = optimizer.state.get(parameter, {})
        for name, x in held.items():
            if isinstance(x, DTensor) and not _sharded_alike(x, parameter):
                raise TypeError(f"{len(state)}.{name}: expected it to be sharded as its parameter")
        state.append(_pack(str(len(state)), held, tensors))
    for group in optimizer.param_groups:
        options = {name: x for name, x in group.items() if name != "params"}
        groups.append(_pack(f"group{len(groups)}", options, tensors))
    values = {"shapes": _shapes(optimizer), "names": sorted(tensors)}
    return tensors, values | {"groups": groups, "state": state}


def load_optimizer_state(
    optimizer: Any, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Set an optimizer to what ``optimizer_state`` returned; its next step is bit-identical.

    All options of the parameter groups, such as the learning rate, become the stored ones, as in
    ``Optimizer.load_state_dict``; unlike there, dtypes stay as stored. The optimizer need not have
    taken a step. Where parameters are sharded, every rank must call this.

    Args:
        optimizer: optimizer of parameters in the same order and of the same shapes, sharded or not.
        tensors: the tensors that ``optimizer_state`` returned, the same on every rank.
        values: the dictionary that it returned.

    Raises:
        ValueError: groups or shapes of parameters differ, or tensors are missing or superfluous;
            nothing changes then.
        TypeError: it is no ``torch.optim.Optimizer``.
    """
    optimizer = _unwrapped(optimizer)
    if (shapes := _shapes(optimizer)) != values["shapes"]:
        raise ValueError(
            f"values: expected the state of parameters {shapes}, got that of {values['shapes']}"
        )
    if differing := set(tensors) ^ set(values["names"]):
        raise ValueError(f"tensors: missing or left over are {sorted(differing)[:4]}")
    # All checks are done: nothing has changed until here.
    for index, group in enumerate(optimizer.param_groups):
        stored = _unpack(f"group{index}", values["groups"][index], tensors)
        for name in group.keys() - stored.keys() - {"params"}:
            del group[name]
        group.update(stored)
    optimizer.state.clear()
    for index, (parameter, group) in enumerate(_parameters(optimizer)):
        stored = _unpack(str(index), values["state"][index], tensors)
        if stored:
            optimizer.state[parameter] = {
                name: _placed(name, x, parameter, group) if isinstance(x, Tensor) else x
                for name, x in stored.items()
            }


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's wrapper, which also is an ``Optimizer``."""
    accelerate = sys.modules.get("accelerate.optimizer")  # a wrapper exists only once imported
    if accelerate is not None and isinstance(optimizer, accelerate.AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {kind}")
    return optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return every parameter with its group, in the optimizer's order."""
    return [(p, group) for group in optimizer.param_groups for p in group["params"]]


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    """Return the unsharded shapes of the parameters of every group."""
    return [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]


def _sharded_alike(x: Tensor, parameter: Tensor) -> bool:
    """Return whether a tensor of the state is distributed over ranks like its parameter."""
    return (
        isinstance(parameter, DTensor)
        and isinstance(x, DTensor)
        and x.shape == parameter.shape
        and x.placements == parameter.placements
    )


def _pack(prefix: str, entries: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, object]:
    """Add the tensors to ``tensors`` under ``prefix.name``; return the rest as JSON values."""
    plain = {}
    for name, x in entries.items():
        if isinstance(x, Tensor):
            tensors[f"{prefix}.{name}"] = whole(x)
            continue
        for part in x if isinstance(x, (tuple, list)) else [x]:
            if not isinstance(part, (bool, int, float, str, type(None))):
                raise TypeError(f"{prefix}.{name}: cannot store {type(part).__name__}")
        plain[name] = list(x) if isinstance(x, tuple) else x
    return plain


def _unpack(prefix: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Invert ``_pack``; lists become tuples again, such as Adam's betas."""
    entries = {name: tuple(x) if isinstance(x, list) else x for name, x in plain.items()}
    held = {
        name.split(".", 1)[1]: x for name, x in tensors.items() if name.startswith(f"{prefix}.")
    }
    return entries | held


def _placed(name: str, x: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return a copy of a whole tensor on the device, and with the sharding, of its parameter.

    Step counts stay on the CPU, where torch keeps them unless an optimizer is capturable or fused.
    """
    if name == "step" and not (group.get("capturable") or group.get("fused")):
        return x.to("cpu", copy=True)
    if isinstance(parameter, DTensor) and x.shape == parameter.shape and x.ndim > 0:
        return distribute_tensor(x.clone(), parameter.device_mesh, parameter.placements)
    return x.to(parameter.device, copy=True)
