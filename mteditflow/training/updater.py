"""One optimiser step from many small backward passes, taken only if everything is finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from mteditflow._checks import check_number
from mteditflow.training.parallel import sum_gradients


@dataclass(frozen=True)
class Update:
    """What an update did.

    Attributes:
        taken: whether the optimiser stepped.
        grad_norm: norm of the summed gradient before clipping.
        means: weighted mean of each quantity over all rows and ranks, "loss" among them.
        reason: why the update was skipped; empty if it was taken.
    """

    taken: bool
    grad_norm: float
    means: Mapping[str, float]
    reason: str


class Updater:
    r"""Accumulates gradients over micro-batches and ranks, clips, checks and steps.

    The gradient is that of :math:`\sum_m w_m l_m / \sum_m w_m` over all rows of all ranks, whatever
    the sizes of the micro-batches and the number of ranks. Memory is that of one micro-batch. An
    update with a loss or a gradient that is not finite is skipped on all ranks alike.

    Args:
        optimizer: of ``parameters``.
        parameters: a callable that gives the trained parameters, since sharding replaces them.
        max_grad_norm: the gradient is scaled down to this norm, > 0.

    Raises:
        ValueError: the norm is out of range.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> updater = Updater(optimizer, lambda: [weight], max_grad_norm=10.0)
        >>> x = torch.tensor([1.0, 2.0, 9.0])
        >>> w = torch.tensor([1.0, 1.0, 0.0])
        >>> update = updater.step(
        ...     torch.arange(3).split(2), lambda rows: ({"loss": weight * x[rows]}, w[rows]))
        >>> update.taken, update.means["loss"], weight.item()
        (True, 1.5, 0.25)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Callable[[], list[nn.Parameter]],
        *,
        max_grad_norm: float,
    ) -> None:
        check_number("max_grad_norm", max_grad_norm, low=0.0, open_low=True)
        self._optimizer, self._parameters = optimizer, parameters
        self._max_grad_norm = max_grad_norm

    def step(
        self,
        parts: Iterable[Tensor],
        losses: Callable[[Tensor], tuple[Mapping[str, Tensor], Tensor]],
    ) -> Update:
        """Take one optimiser step.

        Args:
            parts: rows of each micro-batch; the same number of parts on every rank if the model is
                sharded.
            losses: of a part returns quantities per row, each [M], of which "loss" is minimised
                and the others are reported; and the weight of each row, [M], 0 for rows that do
                not count, which must be finite all the same.

        Returns:
            Update.
        """
        self._optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        weight_sum: Tensor | float = 0.0
        for part in parts:
            quantities, weight = losses(part)
            counted = {name: (weight * values).sum() for name, values in quantities.items()}
            torch.autograd.backward(counted["loss"])
            weight_sum = weight_sum + weight.detach().double().sum()
            for name, total in counted.items():
                totals[name] = totals.get(name, 0.0) + total.detach().double()
        return self._finish(totals, torch.as_tensor(weight_sum))

    def _finish(self, totals: Mapping[str, Tensor], weight_sum: Tensor) -> Update:
        """Sum over ranks, divide by the weight, check, clip and step."""
        parameters = self._parameters()
        sum_gradients(parameters)
        names = list(totals)
        sums = torch.stack([*totals.values(), weight_sum.to(totals["loss"].device)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        weight = float(sums[-1])
        if weight == 0:
            self._optimizer.zero_grad(set_to_none=True)
            return Update(False, float("nan"), {}, "no row has a weight")
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(weight)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        means = dict(zip(names, (sums[:-1] / weight).tolist(), strict=True))
        values = {"loss": sums[names.index("loss")], "gradient": norm}
        broken = [name for name, value in values.items() if not value.isfinite()]
        if broken:
            self._optimizer.zero_grad(set_to_none=True)
            return Update(False, float(norm), means, f"not finite: {' and '.join(broken)}")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Update(True, float(norm), means, "")
