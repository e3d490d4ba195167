"""Old policy of NFT-type objectives: decay schedules and the EMA update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mteditflow._checks import (
    check_count,
    check_floating,
    check_full_precision,
    check_number,
    check_shape,
)


def old_policy_decay(update: int, *, slope: float, maximum: float, start: int = 0) -> float:
    r"""Share of the old policy kept at update k: :math:`\min(slope\,(k - start)^+, maximum)`.

    DiffusionNFT's three schedules are ``slope=0`` (the old policy is always the current one),
    ``slope=0.001, maximum=0.5``, and ``slope=0.0075, start=75, maximum=0.999``.

    Args:
        update: index k of the update, from 0.
        slope: increase of the decay per update, >= 0.
        maximum: highest decay, in [0, 1].
        start: update at which the rise begins.

    Returns:
        The decay in [0, maximum], for ``update_old_policy``.

    Raises:
        ValueError: an argument is out of range.
        TypeError: ``update`` or ``start`` is not an integer, or another argument not a number.

    Source: DiffusionNFT (arXiv 2509.16117), soft update of the sampling policy.

    Example:
        >>> [old_policy_decay(k, slope=0.001, maximum=0.5) for k in (0, 100, 900)]
        [0.0, 0.1, 0.5]
    """
    check_count("update", update, low=0)
    check_count("start", start, low=0)
    check_number("slope", slope, low=0.0)
    check_number("maximum", maximum, low=0.0, high=1.0)
    return min(slope * max(update - start, 0), maximum)


def ema_decay(update: int, *, maximum: float) -> float:
    r"""EMA decay of an averaged policy at optimizer step k: :math:`\min((1 + k)/(10 + k), d)`.

    The decay is small at first, so that the average quickly forgets the base model.

    Args:
        update: number k of optimizer steps taken, from 0.
        maximum: d, limit of the decay in later steps, in [0, 1].

    Returns:
        The decay in [0, maximum], for ``update_old_policy``.

    Raises:
        ValueError: an argument is out of range.
        TypeError: ``update`` is not an integer, or ``maximum`` not a number.

    Source: the averaged weights of the implementations of DiffusionNFT (arXiv 2509.16117) and
    Edit-R1.

    Example:
        >>> [round(ema_decay(k, maximum=0.9), 2) for k in (0, 8, 80, 800)]
        [0.1, 0.5, 0.9, 0.9]
    """
    check_count("update", update, low=0)
    check_number("maximum", maximum, low=0.0, high=1.0)
    return min((1 + update) / (10 + update), maximum)


@torch.no_grad()
def update_old_policy(old: Iterable[Tensor], current: Iterable[Tensor], *, decay: float) -> None:
    r"""Update the old policy in place as an EMA: :math:`old \gets d\,old + (1 - d)\,current`.

    Args:
        old: parameters of the old policy, changed in place.
        current: parameters of the current policy, in the same order.
        decay: d in [0, 1]; 0 copies exactly, 1 leaves the old policy as it is.

    Raises:
        ValueError: numbers or shapes of parameters differ, the decay is out of range, or one of
            ``old`` cannot be changed in place or is listed twice, as tied weights are in a
            ``state_dict``: the decay would act on it twice.
        TypeError: a parameter is not floating point, or one of ``old`` is half precision and the
            decay is not 0, because small EMA steps would be rounded away.

    All checks run first: if an error is raised, no parameter has changed.

    Source: DiffusionNFT (arXiv 2509.16117), soft update of the sampling policy.

    Example:
        >>> old = [torch.tensor([0.0])]
        >>> update_old_policy(old, [torch.tensor([1.0])], decay=0.75)
        >>> old
        [tensor([0.2500])]
    """
    check_number("decay", decay, low=0.0, high=1.0)
    old, current = list(old), list(current)
    if len(old) != len(current):
        raise ValueError(f"current: expected {len(old)} parameters as in old, got {len(current)}")
    for position, (theirs, ours) in enumerate(zip(old, current, strict=True)):
        check_policy = check_floating if decay == 0 else check_full_precision
        check_policy(**{f"old[{position}]": theirs})
        check_floating(**{f"current[{position}]": ours})
        check_shape(f"current[{position}]", ours, theirs.shape, f"of old[{position}]")
    _check_writable(old)
    for theirs, ours in zip(old, current, strict=True):
        # lerp reads both ends even at weight 0 or 1, so a NaN in the unused one would remain.
        if decay == 0:
            theirs.copy_(ours)
        elif decay < 1:
            theirs.lerp_(ours.to(theirs), 1 - decay)


def _check_writable(old: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` unless all parameters can be changed in place, each once."""
    places: dict[tuple[object, ...], int] = {}
    for position, x in enumerate(old):
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"old[{position}]: expected a tensor that can be changed, got one made in "
                "inference mode; clone it"
            )
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise ValueError(
                f"old[{position}]: expected memory for each element, got an expanded tensor of "
                f"strides {list(x.stride())}; clone it"
            )
        try:
            pointer = x.data_ptr()
        except RuntimeError:  # fake tensors
            pointer = 0
        place = (x.device, pointer, x.shape, x.stride())
        # 0: no memory, as on the meta device or of sharded weights between their uses.
        if pointer and places.setdefault(place, position) != position:
            raise ValueError(
                f"old[{position}]: expected each parameter once, got old[{places[place]}] again; "
                "module.parameters() lists tied weights once"
            )
