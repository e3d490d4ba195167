"""Optimizer step with gradient accumulation over micro-batches and ranks, if all is finite."""

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
        outcome: "taken"; "empty" if there was nothing to train on; "flat" if the gradient was
            exactly 0; or "skipped" if a loss or gradient was not finite. Only a taken update steps
            the optimizer, and so changes weights.
        grad_norm: norm of the gradient over all ranks before clipping; NaN if the update is empty.
        means: mean of each metric over the computed units of all ranks, and "loss", the mean over
            all valid units.
        reason: reason for which the update was skipped; otherwise empty.
    """

    outcome: Literal["taken", "empty", "flat", "skipped"]
    grad_norm: float
    means: Mapping[str, float]
    reason: str = ""


class Updater:
    r"""Optimizer step: accumulate gradients over micro-batches and ranks, check, clip and step.

    The gradient is that of :math:`\sum_u l_u / \sum_{ranks} count` over the units u of all ranks,
    independent of the sizes of micro-batches and of the number of ranks. Memory is that of one
    micro-batch. An update with a loss or gradient that is not finite is skipped on all ranks. One
    without a gradient makes no optimizer step either: momentum and weight decay would move the
    weights by nothing that was learned.

    Args:
        optimizer: optimizer of ``parameters``.
        parameters: callable that returns the trained parameters, such as ``model.parameters``. It
            is called at every step, since sharding replaces parameters.
        max_grad_norm: norm to which larger gradients are scaled down, > 0.

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
        """Take one optimizer step; none if no rank has a part.

        This is a collective call where ``torch.distributed`` is initialized.

        Args:
            parts: micro-batches, the same number on every rank, padded with idle units (see
                ``most_parts`` and ``Units.split``).
            losses: returns the output of a part, with losses [U] that have a gradient.
            count: number of valid units of this rank's minibatch, including dropped ones.

        Returns:
            Outcome, gradient norm and means of the update.

        Raises:
            ValueError: ``count`` is below the number of computed units, or there are no parameters.
        """
        check_count("count", count, low=0)
        self._optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        computed = 0
        for part in parts:
            output = losses(part)
            # The sum, not the mean: division by the count of all ranks follows in ``_finish``.
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
        """Sum over ranks, divide by the count, clip, check and step."""
        parameters = list(self._parameters())  # a generator would be empty at its second use
        if not parameters:
            raise ValueError("parameters: expected at least one, got none")
        sum_gradients(parameters)
        names, like = list(totals), totals["loss"]
        # One collective for all numbers; all ranks then decide alike whether to step.
        sums = torch.stack([*totals.values(), like.new_tensor(computed), like.new_tensor(count)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        *values, all_computed, all_count = sums.tolist()
        if all_computed == 0:  # only idle units on every rank
            self._optimizer.zero_grad(set_to_none=True)
            return Update("empty", float("nan"), {})
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:  # before clipping, whose norm is that of the mean gradient
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
        if float(norm) == 0:
            self._optimizer.zero_grad(set_to_none=True)
            return Update("flat", 0.0, means)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Update("taken", float(norm), means)


def most_parts(units: Units, size: int, *, device: torch.device | str = "cpu") -> int:
    """Return the number of micro-batches of ``size`` on the rank with the most units.

    This is a collective call where ``torch.distributed`` is initialized.

    Args:
        units: this rank's units.
        size: most units of a micro-batch.
        device: device of the backend: "cpu" for gloo, this rank's device for NCCL.
    """
    own = torch.tensor(len(units.split(size)), dtype=torch.int64, device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(own, dist.ReduceOp.MAX)
    return int(own)
