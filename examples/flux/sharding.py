"""Sharding of the weights over ranks, by ``model.shard`` or accelerate's launch configuration."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from accelerate import DeepSpeedPlugin

from mteditflow.pipelines import Editor
from mteditflow.training import partition_model, shard_model
from mteditflow.training.parallel import require_deepspeed

from .config import ConfigError, Model

# Set by accelerate launch. On CPUs accelerate itself ignores them; this program does not.
LAUNCHED: dict[str, Literal["fsdp2", "zero3"]] = {
    "ACCELERATE_USE_FSDP": "fsdp2",
    "ACCELERATE_USE_DEEPSPEED": "zero3",
}
# Entries of DeepSpeed's configuration that only its engine reads; the engine is never built here.
ENGINE = {"train_batch_size", "train_micro_batch_size_per_gpu", "steps_per_print"}
OFF = (None, False, "auto")


@dataclass(frozen=True)
class Sharding:
    """Sharding of the model's weights over ranks.

    Attributes:
        how: "none", a full copy on every rank; "fsdp2"; or "zero3".
        zero: entries of DeepSpeed's ``zero_optimization``, in addition to those that
            ``partition_model`` sets.
    """

    how: Literal["none", "fsdp2", "zero3"]
    zero: dict[str, Any] = field(default_factory=dict)

    def before_adapters(self, editor: Editor) -> None:
        """Partition the base model (ZeRO-3) before it has adapters, which stay whole."""
        if self.how == "zero3":
            # DeepSpeed calls a function by the name that torch has deprecated.
            warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated")
            partition_model(editor.transformer, self.zero)

    def after_adapters(self, editor: Editor) -> None:
        """Shard the blocks of the model, adapters included (FSDP2)."""
        if self.how == "fsdp2":
            # The velocity is a view of the output; nothing here changes it in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            shard_model(editor.transformer, blocks=editor.transformer._no_split_modules)


def sharding(model: Model, ranks: int) -> Sharding:
    """Return the sharding of a run.

    Args:
        model: its ``shard`` decides if accelerate was launched with neither FSDP nor DeepSpeed.
        ranks: number of processes.

    Raises:
        ConfigError: ``model.shard`` and the launch contradict each other, or the sharding does not
            work with the configuration, the launch or the installed packages.
    """
    launched = [
        how for name, how in LAUNCHED.items() if os.environ.get(name, "false").lower() == "true"
    ]
    if launched and model.shard not in ("none", *launched):
        raise ConfigError(
            f"model.shard: expected none or {launched[0]}, which accelerate was launched with, got "
            f"{model.shard}"
        )
    how = launched[0] if launched else model.shard
    check_sharding(model, how, ranks)
    if how != "zero3":
        return Sharding(how)
    try:
        require_deepspeed()
    except ImportError as error:
        raise ConfigError(f"model.shard: zero3: {error}") from error
    return Sharding(how, _launched_zero() if launched else {})


def check_sharding(model: Model, how: str, ranks: int) -> None:
    """Refuse options that sharded weights do not support; needs no launched processes.

    Args:
        model: options of the model.
        how: "none", "fsdp2" or "zero3".
        ranks: number of processes.

    Raises:
        ConfigError: there is only one process, or an option is not supported.
    """
    if how != "none" and ranks == 1:
        raise ConfigError(
            f"model.shard: expected none in one process, got {how}; start several with accelerate "
            "launch or torchrun"
        )
    if how != "none" and model.quantize != "none":
        raise ConfigError(
            f"model.quantize: expected none under {how}, since packed weights and their scales do "
            f"not follow the shards, got {model.quantize}"
        )
    if how == "zero3" and model.compile:
        raise ConfigError(
            "model.compile: expected False under zero3, which gathers weights inside the blocks"
        )


def _launched_zero() -> dict[str, Any]:
    """Return the entries of ``zero_optimization`` that accelerate was launched with.

    Raises:
        ConfigError: the stage is not 3, or DeepSpeed should do more than partition weights.
    """
    config = DeepSpeedPlugin().deepspeed_config
    zero = {name: x for name, x in config.pop("zero_optimization").items() if x != "auto"}
    if (stage := zero.get("stage")) != 3:
        raise ConfigError(
            f"zero_stage: expected 3, got {stage}; ZeRO-2 needs DeepSpeed's own optimizer, which "
            "saves at most 3 GiB of a LoRA's training and keeps the adapters in private copies"
        )
    if (device := (zero.get("offload_optimizer") or {}).get("device", "none")) != "none":
        raise ConfigError(
            f"offload_optimizer_device: expected none, since the optimizer is not DeepSpeed's, got "
            f"{device}"
        )
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT") == "true":
        raise ConfigError(
            "zero3_init_flag: expected false, got true; the model is partitioned once it is loaded"
        )
    for name, value in config.items():
        off = not value.get("enabled", True) if isinstance(value, dict) else value in OFF
        if name not in ENGINE and not off and (name, value) != ("gradient_accumulation_steps", 1):
            raise ConfigError(
                f"{name}: expected none of DeepSpeed's, got {value!r}; the trainer's options decide"
            )
    return zero


@contextmanager
def without_engine() -> Iterator[None]:
    """Hide a DeepSpeed launch from accelerate inside the block.

    Otherwise transformers partitions the text encoders on loading, for a DeepSpeed engine that is
    never built here.
    """
    launched = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        if launched is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = launched
