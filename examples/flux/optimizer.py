"""The optimizer of a run, with 32-bit or 8-bit state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .config import ConfigError, Training


def check_optimizer(training: Training, *, sharded: bool) -> None:
    """Refuse an 8-bit optimizer whose package is missing, or with sharded weights.

    Raises:
        ConfigError: adamw_8bit is configured, and bitsandbytes cannot be imported or weights are
            sharded.
    """
    if training.optimizer != "adamw_8bit":
        return
    if sharded:
        raise ConfigError(
            "training.optimizer: expected adamw where weights are sharded, got adamw_8bit, whose "
            "blocks of quantized state do not follow the shards"
        )
    _bitsandbytes()


def make_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters.

    Raises:
        ConfigError: adamw_8bit is configured, and bitsandbytes cannot be imported.
    """
    kind = torch.optim.AdamW
    if training.optimizer == "adamw_8bit":
        kind = _bitsandbytes().optim.AdamW8bit
    return kind(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)


def _bitsandbytes() -> Any:
    """Import bitsandbytes.

    Raises:
        ConfigError: bitsandbytes is not installed, or does not support this machine.
    """
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            "training.optimizer: adamw_8bit needs bitsandbytes (pip install 'mteditflow[quantized]'"
            f"), got: {error}"
        ) from error
    return bitsandbytes
