r"""Credit assignment over turns: the rewards each turn answers for, and its advantage.

There are two steps. A ``Credit`` maps per-turn rewards [B, N] to per-turn credit: the turn's own
reward, the rewards from that turn on, or the reward of the whole chain. ``turn_advantage`` fuses
the resulting signals turn by turn within groups. To mix several credits, give each of their signals
a weight. To stop after the first failure, pass a mask of the turns to ``keep``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_ids,
    as_mask,
    as_numbers,
    as_real,
    check_callable,
    check_choice,
    check_full_precision,
    check_kind,
    check_mask,
    check_named,
    check_number,
    check_rank,
    check_rewards,
    check_shape,
    check_values,
)
from mteditflow._reduce import in_float64
from mteditflow.advantages.group import STDS, all_alone, fuse_advantages
from mteditflow.advantages.turns import reward_to_go, turn_average

Mask = Numbers | None  # boolean [B, N]


class _Signal(NamedTuple):
    value: Tensor
    valid: Tensor
    measured: Tensor


class Signal(_Signal):
    """Values whose entries are measured, unmeasured or lost.

    A signal holds one reward per trajectory or one credit per turn. An entry is one of:

    - measured: it has a number;
    - unmeasured: there was nothing to measure, so the entry is valid and has no number;
    - lost: the number was requested and did not arrive, or the turn does not exist. The entry is
      not valid.

    Attributes:
        value: [B] or [B, N]; never read where not measured, so NaN or any other number there.
        valid: boolean, shape of ``value``: entries that exist and were not lost, whether measured
            or not. (``PaddedTurns.valid`` means "has a score", which is ``measured`` here.)
        measured: boolean, shape of ``value``: valid entries that have a number. If it is omitted,
            every valid entry has one.

    Example:
        >>> signal = Signal(torch.tensor([0.5, torch.nan]), torch.tensor([True, False]))
        >>> signal.measured
        tensor([ True, False])
    """

    __slots__ = ()

    def __new__(cls, value: Numbers, valid: Numbers, measured: Numbers | None = None) -> Signal:
        """Create a signal; if ``measured`` is ``None``, every valid entry is measured.

        Raises:
            ValueError: shapes differ, or a measured entry is not valid.
            TypeError: ``value`` is half precision, or a mask is not boolean.
        """
        number = as_real("value", value)
        check_full_precision(value=number)
        mask = as_numbers("valid", valid, device=number.device)
        check_mask("valid", mask, number.shape, "of value")
        has = (
            mask.clone() if measured is None else as_mask("measured", measured, number, "of value")
        )
        check_values("measured", has, mask | ~has, "no measured entry that is not valid")
        return super().__new__(cls, number, mask, has)


class Credit(Protocol):
    """Mapping of per-turn rewards to per-turn credit.

    If any reward that a turn answers for was lost, the turn's credit is not valid: a mean of the
    remaining rewards would not be comparable with the other members of the group. Turns in which
    there was nothing to measure do not invalidate the credit; the measured ones are averaged. If
    none of them was measured, the credit is valid and unmeasured.
    """

    def __call__(
        self, reward: Numbers, *, turn_mask: Mask = None, unmeasured: Mask = None, lost: Mask = None
    ) -> Signal:
        """Return the credit of every turn.

        Args:
            reward: float32 or float64 [B, N], or numbers as in ``group_advantage``; finite where
                the turn exists and its reward was measured and not lost. Other entries are never
                read.
            turn_mask: turns that exist, boolean [B, N]; ``None`` means all.
            unmeasured: turns in which there was nothing to measure, boolean [B, N]; ``None`` means
                none.
            lost: turns whose reward was requested and did not arrive, boolean [B, N]; ``None``
                means none.

        Returns:
            Signal in the dtype of ``reward``, NaN where not measured.

        Raises:
            ValueError: shapes do not match, or a reward to be read is not finite.
            TypeError: a dtype is not the one stated.
        """


@dataclass(frozen=True)
class TrajectoryCredit:
    r"""Credit of every turn with the whole chain's reward, :math:`\mathrm{mean}_m\, r_m`.

    Padded turns carry the signal too, so that a chain is compared with every other chain of its
    group, whatever their lengths. ``turn_advantage`` masks the turns that do not exist.

    Args:
        aggregate: reduction of the per-turn rewards to one per chain, such as ``turn_average`` or
            ``binary_and``: maps [B', N] and a ``turn_mask`` to [B'], where B' counts the chains
            with a measured reward.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 8.

    Example:
        >>> TrajectoryCredit()(torch.tensor([[1.0, 0.5]])).value
        tensor([[0.7500, 0.7500]])
    """

    aggregate: Callable[..., Tensor] = turn_average

    def __call__(
        self, reward: Numbers, *, turn_mask: Mask = None, unmeasured: Mask = None, lost: Mask = None
    ) -> Signal:
        """See ``Credit``."""
        reward, exists, has, lost = _parts(reward, turn_mask, unmeasured, lost)
        valid = exists.any(dim=1) & ~lost.any(dim=1)
        measured = valid & has.any(dim=1)
        value = torch.full_like(reward[:, 0], torch.nan)
        if bool(measured.any()):
            # Chains without a measured turn are left out: aggregators refuse an empty row.
            rows = reward[measured], has[measured]
            value[measured] = self.aggregate(rows[0], turn_mask=rows[1]).to(value.dtype)
        turns = has.shape[1]
        return Signal(*(x[:, None].repeat(1, turns) for x in (value, valid, measured)))


@dataclass(frozen=True)
class RewardToGo:
    r"""Credit of a turn with its own reward and the discounted rewards of later turns.

    .. math:: \frac{\sum_{m \ge n} \gamma^{m-n} r_m}{\sum_{m \ge n} \gamma^{m-n}}

    over the turns m that have a reward. It is a mean rather than a sum, so that the signal does not
    grow with the number of turns left. With discount 1 the first turn answers for the whole chain,
    as under ``TrajectoryCredit``. With discount 0 each turn answers for itself, as under
    ``TurnCredit``.

    Args:
        discount: gamma in [0, 1].

    Raises:
        ValueError: the discount is out of range.

    Source: the return of each turn (``reward_to_go``), divided by the return of a constant reward
        of 1.

    Example:
        >>> RewardToGo(discount=0.5)(torch.tensor([[0.0, 0.0, 1.0]])).value
        tensor([[0.1429, 0.3333, 1.0000]])
    """

    discount: float = 1.0

    def __post_init__(self) -> None:
        check_number("discount", self.discount, low=0.0, high=1.0)

    def __call__(
        self, reward: Numbers, *, turn_mask: Mask = None, unmeasured: Mask = None, lost: Mask = None
    ) -> Signal:
        """See ``Credit``."""
        reward, exists, has, lost = _parts(reward, turn_mask, unmeasured, lost)

        def to_go(x: Tensor) -> Tensor:
            return reward_to_go(in_float64(x)[0].to(torch.float64), discount=self.discount)

        # In float64, and huge rewards in units of 2^64: a sum may overflow where the mean does not.
        exact = in_float64(torch.where(has, reward, 0))[0]
        unit = torch.where(exact.abs().amax(dim=1, keepdim=True) > 2.0**900, 2.0**-64, 1.0)
        weight, lost_to_go = to_go(has), to_go(lost)
        mean = to_go(exact * unit) / torch.where(weight > 0, weight, 1) / unit
        valid = exists & (lost_to_go == 0).to(exists.device)
        measured = valid & (weight > 0).to(exists.device)
        return Signal(torch.where(measured, mean.to(reward), torch.nan), valid, measured)


@dataclass(frozen=True)
class TurnCredit:
    """Credit of a turn with its own reward alone.

    Source: an alternative to MT-EditFlow's broadcast (arXiv 2606.01985, Eq. 8).

    Example:
        >>> TurnCredit()(torch.tensor([[1.0, 0.5]])).value
        tensor([[1.0000, 0.5000]])
    """

    def __call__(
        self, reward: Numbers, *, turn_mask: Mask = None, unmeasured: Mask = None, lost: Mask = None
    ) -> Signal:
        """See ``Credit``."""
        reward, exists, has, lost = _parts(reward, turn_mask, unmeasured, lost)
        return Signal(torch.where(has, reward, torch.nan), exists & ~lost, has)


def turn_advantage(
    signals: Mapping[str, Signal],
    weights: Mapping[str, float],
    group: Numbers,
    *,
    turn_mask: Mask = None,
    keep: Mask = None,
    fuse: Callable[..., Tensor] = fuse_advantages,
    std: str = "group",
    eps: float = 1e-4,
) -> Signal:
    r"""Advantage of each turn from the signals of several rewards and credits.

    Each turn is compared with the same turn of the other chains of its group that lost no signal
    there. If the chains of a group differ in length, later turns are compared among the longer
    chains only, and a turn that no other chain has gets advantage 0. ``TrajectoryCredit`` is the
    exception: its signal extends to padded turns, so with it alone every chain is compared with
    all others.

    The treatment of a signal that is unmeasured at a turn depends on ``fuse``: it adds 0 under
    ``fuse_advantages`` and counts as its group's mean under ``fuse_rewards``. A turn at which no
    signal with a nonzero weight was measured carries no information and is not trained.

    Args:
        signals: name to signal, each [B, N], as a ``Credit`` returns it. To mix two credits of one
            reward, give both signals, each with its own name and weight.
        weights: name to weight, the same names as ``signals``. A signal of weight 0 is ignored,
            also where it was lost.
        group: integer group id of each chain, [B].
        turn_mask: turns that exist, boolean [B, N]; ``None`` means all.
        keep: turns that are compared and trained, boolean [B, N], such as
            ``stop_after_failure(success).bool()``; ``None`` means all.
        fuse: ``fuse_advantages`` or ``fuse_rewards``; the latter raises if a signal was measured
            in no member of a group (see ``group_measured``).
        std: as in ``group_advantage``.
        eps: as in ``group_advantage``.

    Returns:
        Signal [B, N] of advantages, detached and finite, 0 where not valid. Valid (and measured)
        are the kept turns that exist, lost no signal and have at least one measured. Give the
        others weight 0 in the loss.

    Raises:
        ValueError: names differ, every weight is 0, shapes do not match, a measured signal is not
            finite, or ``fuse`` raises one.
        TypeError: as in ``group_advantage``, or a signal is no ``Signal``.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 3 and 7, turn by turn.

    Example:
        >>> reward, group = torch.tensor([[1.0, 0.0], [0.0, 0.5]]), torch.tensor([0, 0])
        >>> signals = {"own": TurnCredit()(reward), "chain": TrajectoryCredit()(reward)}
        >>> turn_advantage(signals, {"own": 0.5, "chain": 0.5}, group, eps=0.0).value
        tensor([[ 1.,  0.],
                [-1.,  0.]])
    """
    check_named("signals", signals, "signals")
    check_named("weights", weights, "numbers")
    check_callable("fuse", fuse)
    for name, signal in signals.items():
        check_kind(f"signals[{name!r}]", signal, Signal, "a Signal, as a Credit returns it")
        check_number(f"weights[{name!r}]", weights.get(name, 0.0))
    if set(signals) != set(weights):
        raise ValueError(
            f"weights: expected one weight for each signal in {sorted(signals)}, "
            f"got {sorted(weights)}"
        )
    used = {name: signal for name, signal in signals.items() if weights[name] != 0}
    if not used:
        raise ValueError(f"weights: expected one other than 0, got {dict(weights)}")
    first, signal = next(iter(used.items()))
    for name, other in used.items():
        check_rank(f"signals[{name!r}]", other.value, 2, "[B, N]", maximum=2)
        check_shape(f"signals[{name!r}]", other.value, signal.value.shape, f"of {first!r}")
    ids = as_ids(group, signal.value.device)
    exists = as_mask("turn_mask", turn_mask, signal.value, "[B, N]")
    # ``turn_mask`` is applied at the end only: TrajectoryCredit needs padded turns in the groups.
    valid = torch.stack([signal.valid for signal in used.values()]).all(dim=0)
    valid = valid & as_mask("keep", keep, signal.value, "[B, N]")
    values = {name: signal.value for name, signal in used.items()}
    measured = {name: signal.measured for name, signal in used.items()}
    own = {name: weights[name] for name in used}
    check_rewards(
        {f"signals[{n!r}]": x for n, x in values.items()},
        ids,
        valid,
        {f"signals[{n!r}]": mask for n, mask in measured.items()},
    )
    # Groups of one: [B, N] signals are legal here, and ``fuse`` would refuse their layout.
    if all_alone(ids):
        check_choice("std", std, STDS)
        check_number("eps", eps, low=0.0)
        advantage = torch.zeros_like(signal.value)
    else:
        advantage = fuse(values, own, ids, valid=valid, measured=measured, std=std, eps=eps)
    valid = valid & torch.stack(list(measured.values())).any(dim=0) & exists
    return Signal(torch.where(valid, advantage, 0), valid)


def _parts(
    reward: Numbers, turn_mask: Mask, unmeasured: Mask, lost: Mask
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return checked rewards and the masks of turns that exist, have a reward, or lost theirs."""
    reward = as_real("reward", reward)
    check_full_precision(reward=reward)
    check_rank("reward", reward, 2, "[B, N]", maximum=2)
    none = torch.zeros_like(reward, dtype=torch.bool)
    exists = as_mask("turn_mask", turn_mask, reward, "[B, N]")
    empty = as_mask("unmeasured", none if unmeasured is None else unmeasured, reward, "[B, N]")
    gone = as_mask("lost", none if lost is None else lost, reward, "[B, N]")
    has = exists & ~empty & ~gone
    check_values("reward", reward, ~has | reward.isfinite(), "finite rewards (mark lost ones)")
    return reward, exists, has, exists & gone
