"""Graceful stop on signals, after the current round and on all ranks together."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from torch import distributed as dist

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


class Termination:
    """Signal handlers that set a flag, which the loop checks between rounds.

    SIGTERM (a scheduler or supervisor), SIGUSR1 (Slurm's warning, ``--signal=USR1@300``) and
    the first SIGINT (Ctrl-C) only set ``requested``; a second SIGINT raises ``KeyboardInterrupt``
    at once. The earlier handlers are restored when the context ends.

    Python runs a handler only between bytecode instructions, so not during a collective call. The
    sender may not wait long: ``torchrun`` kills 30 seconds after it has forwarded SIGTERM.

    Raises:
        RuntimeError: on entry outside of the main thread, where Python cannot set handlers.

    Example:
        >>> with Termination() as termination:
        ...     for round in range(3):
        ...         if round == 1:
        ...             signal.raise_signal(signal.SIGTERM)
        ...         if termination.agreed():
        ...             print(f"stopped by {termination.signal} after round {round}")
        ...             break
        stopped by SIGTERM after round 1
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._interrupted = False
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Return whether this rank received a signal to stop; ``signal`` is its name."""
        return self.signal is not None

    def agreed(self) -> bool:
        """Return whether any rank received a signal.

        This is a collective call where ``torch.distributed`` is initialized. All ranks get the same
        result, and so stop after the same round.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self.requested
        on_cpu = "gloo" in dist.get_backend()
        device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
        flag = torch.tensor(int(self.requested), dtype=torch.int64, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def __enter__(self) -> Termination:
        if threading.current_thread() is not threading.main_thread():
            name = threading.current_thread().name
            raise RuntimeError(f"Termination: expected the main thread, got {name!r}")
        for name in SIGNALS:
            if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: the earlier handler was not set from Python, which cannot restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.signal = self.signal or signal.Signals(number).name
