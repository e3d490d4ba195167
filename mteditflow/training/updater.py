"""One optimizer step from many small backward passes, taken only if everything is finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from mteditflow._checks import check_count, check_number
from mteditflow.objectives import Output, Units
from mteditflow.training.parallel import sum_gradients


@dataclass(frozen=True)
class Update:
    """Result of an update.

    Attributes:
        outcome: "taken"; "empty", there was nothing to train on; or "skipped", a loss or gradient
            was not finite.
        grad_norm: norm of the summed gradient before clipping; NaN where empty.
        means: mean of each metric over the units of all ranks that were computed, and "loss", the
            mean over all valid ones.
        reason: why the update was skipped; empty otherwise.
    """

    outcome: Literal["taken", "empty", "skipped"]
    grad_norm: float
    means: Mapping[str, float]
    reason: str = ""


class Updater:
    r"""Accumulates gradients over micro-batches and ranks, clips, checks and steps.

    The gradient is that of :math:`\sum_u l_u / \sum_{ranks} count` over the units of all ranks,
    whatever the sizes of the micro-batches and the number of ranks. Memory is that of one
    micro-batch. An update with a loss or a gradient that is not finite is skipped on all ranks.

    Args:
        optimizer: optimizer of ``parameters``.
        parameters: a callable that gives the trained parameters, such as ``model.parameters``; a
            callable, since sharding replaces them.
        max_grad_norm: the gradient is scaled down to this norm, > 0.

    Raises:
        ValueError: the norm is out of range.
        TypeError: ``parameters`` cannot be called.

    Example:
        >>> from mteditflow.objectives import NFT, CleanSamples
        >>> model = nn.Linear(8, 8)
        >>> updater = Updater(
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     lambda: list(model.parameters()),
        ...     max_grad_norm=1.0,
        ... )
        >>> samples, objective = CleanSamples(torch.randn(4, 1, 8), torch.zeros(4).long()), NFT()
        >>> key = torch.Generator().manual_seed(0)
        >>> (units,) = objective.units(samples, torch.tensor([1.0, 0.5, -0.5, -1.0]), key=key)
        >>> update = updater.step(
        ...     units.split(2),
        ...     lambda part: objective(
        ...         lambda policy, x_t, sigma, at: model(x_t), samples, part, old_is_current=True
        ...     ),
        ...     count=units.count,
        ... )
        >>> update.outcome, sorted(update.means)
        ('taken', ['loss', 'old_kl', 'policy_loss'])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Callable[[], Iterable[nn.Parameter]],
        *,
        max_grad_norm: float,
    ) -> None:
        check_number("max_grad_norm", max_grad_norm, low=0.0, open_low=True)
        if not callable(parameters):
            kind = type(parameters).__name__
            raise TypeError(f"parameters: expected a callable such as model.parameters, got {kind}")
        self._optimizer, self._parameters = optimizer, parameters
        self._max_grad_norm = max_grad_norm

    def step(
        self, parts: Iterable[Units], losses: Callable[[Units], Output], *, count: int
    ) -> Update:
        """Take one optimizer step; none where no rank has a part.

        A collective call where ``torch.distributed`` is initialized.

        Args:
            parts: micro-batches; equally many on every rank, filled up with idle units (see
                ``most_parts`` and ``Units.split``).
            losses: computes the output of a part.
            count: valid units of this rank's minibatch, those left out included.

        Returns:
            Update.

        Raises:
            ValueError: ``count`` is below the number of units.
        """
        check_count("count", count, low=0)
        self._optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        computed = 0
        for part in parts:
            output = losses(part)
            total = output.loss.sum()
            torch.autograd.backward(total)
            computed += int(part.mask.any(dim=1).sum())
            for name, x in {"loss": total, **output.metrics}.items():
                totals[name] = totals.get(name, 0.0) + x.detach().sum().double()
        if count < computed:
            raise ValueError(f"count: expected at least the {computed} units given, got {count}")
        if not totals:
            return Update("empty", float("nan"), {})
        return self._finish(totals, computed, count)

    def _finish(self, totals: Mapping[str, Tensor], computed: int, count: int) -> Update:
        """Sum over ranks, divide by the count, check, clip and step."""
        parameters = list(self._parameters())  # a generator would be empty at its second use
        if not parameters:
            raise ValueError("parameters: expected at least one, got none")
        sum_gradients(parameters)
        names, like = list(totals), totals["loss"]
        sums = torch.stack([*totals.values(), like.new_tensor(computed), like.new_tensor(count)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        *values, all_computed, all_count = sums.tolist()
        if all_computed == 0:  # idle units alone, on every rank
            self._optimizer.zero_grad(set_to_none=True)
            return Update("empty", float("nan"), {})
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(all_count)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        means = {name: x / all_computed for name, x in zip(names, values, strict=True)}
        means["loss"] = values[names.index("loss")] / all_count
        finite = {"loss": sums[names.index("loss")], "gradient": norm}
        broken = [name for name, value in finite.items() if not value.isfinite()]
        if broken:
            self._optimizer.zero_grad(set_to_none=True)
            return Update("skipped", float(norm), means, f"not finite: {' and '.join(broken)}")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Update("taken", float(norm), means)


def most_parts(units: Units, size: int, *, device: torch.device | str = "cpu") -> int:
    """Return how many micro-batches of ``size`` the rank with most units needs.

    A collective call where ``torch.distributed`` is initialized.

    Args:
        units: this rank's units.
        size: most units of a micro-batch.
        device: device of the backend: "cpu" for gloo, this rank's device for NCCL.
    """
    own = torch.tensor(len(units.split(size)), dtype=torch.int64, device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(own, dist.ReduceOp.MAX)
    return int(own)
