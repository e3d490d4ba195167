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
    """Return all that an optimizer's next step depends on, apart from weights and gradients.

    Every rank calls it where parameters are sharded (FSDP2's ``fully_shard``).

    Args:
        optimizer: any ``torch.optim.Optimizer`` that keeps tensors, numbers, strings and None, as
            all but LBFGS do; or accelerate's wrapper of one.

    Returns:
        Tensors (copies, whole, on the CPU) named by the position of their parameter, such as
        ``"12.exp_avg"``; and a JSON-able dictionary of everything else. Both are the same whatever
        the number of ranks, and ``load_optimizer_state`` takes them on any number.

    Raises:
        TypeError: the state holds something else, or is sharded otherwise than its parameter; or
            it is DeepSpeed's optimizer, which holds this rank's part alone.

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

    Options of the parameter groups (the learning rate and all others) become the stored ones, as
    in ``Optimizer.load_state_dict``; unlike there, dtypes stay as stored. The optimizer need not
    have stepped yet. Every rank calls this where parameters are sharded.

    Args:
        optimizer: over parameters of the same order and shapes, sharded or not.
        tensors: the first part of the state, the same on every rank.
        values: the second.

    Raises:
        ValueError: groups or shapes of parameters differ, or tensors are missing or left over;
            nothing has changed then.
    """
    optimizer = _unwrapped(optimizer)
    if (shapes := _shapes(optimizer)) != values["shapes"]:
        raise ValueError(
            f"values: expected the state of parameters {shapes}, got that of {values['shapes']}"
        )
    if differing := set(tensors) ^ set(values["names"]):
        raise ValueError(f"tensors: missing or left over are {sorted(differing)[:4]}")
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
    """The optimizer inside accelerate's wrapper, which is a ``torch.optim.Optimizer`` too."""
    accelerate = sys.modules.get("accelerate.optimizer")  # a wrapper exists only once imported
    if accelerate is not None and isinstance(optimizer, accelerate.AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {kind}")
    return optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """Every parameter with its group, in the optimizer's order."""
    return [(p, group) for group in optimizer.param_groups for p in group["params"]]


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    """Whole shapes of the parameters of every group."""
    return [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]


def _sharded_alike(x: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor of the state is laid out over ranks as its parameter is."""
    return (
        isinstance(parameter, DTensor)
        and isinstance(x, DTensor)
        and x.shape == parameter.shape
        and x.placements == parameter.placements
    )


def _pack(prefix: str, entries: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, object]:
    """Put tensors among the others under ``prefix.name``; return the JSON-able rest."""
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
    """Undo ``_pack``; JSON's lists are tuples again."""
    entries = {name: tuple(x) if isinstance(x, list) else x for name, x in plain.items()}
    held = {
        name.split(".", 1)[1]: x for name, x in tensors.items() if name.startswith(f"{prefix}.")
    }
    return entries | held


def _placed(name: str, x: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A copy of a whole tensor where the optimizer wants it: torch keeps step counts on the CPU."""
    if name == "step" and not (group.get("capturable") or group.get("fused")):
        return x.to("cpu", copy=True)
    if isinstance(parameter, DTensor) and x.shape == parameter.shape and x.ndim > 0:
        return distribute_tensor(x.clone(), parameter.device_mesh, parameter.placements)
    return x.to(parameter.device, copy=True)
