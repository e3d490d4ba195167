"""A LoRA that policies start from: continued as the current one, or frozen below new adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mteditflow._checks import check_choice
from mteditflow.pipelines.adapters import adapter_weights, add_adapters
from mteditflow.pipelines.lora_files import joined, rank_axis, scaled, unit_config, without


@dataclass(frozen=True)
class Start:
    """A LoRA for ``LoraPolicies`` to start from, in place of the base model.

    Continued, it is what current, old and averaged policy begin with, and it is trained on. Frozen,
    it stays as it is below new adapters that start as no-ops on it; a file then holds both as one
    LoRA, with the sum of their ranks.

    Attributes:
        weights: at scale 1, as ``read_lora`` returns them.
        frozen: whether it is frozen; else it must have the layers and ranks of the new adapters.
        reference: "base", the model without adapters, or "start", the model with this LoRA alone.

    Raises:
        ValueError: there is no such reference.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> a, b = torch.ones(1, 2), torch.ones(2, 1)
        >>> start = Start({"0.lora_A.weight": a, "0.lora_B.weight": b}, frozen=True)
        >>> from mteditflow.pipelines import LoraPolicies
        >>> x, base = torch.ones(1, 2), model(torch.ones(1, 2))
        >>> config = LoraConfig(r=3, target_modules=["0"])
        >>> policies = LoraPolicies(model, config, start=start)
        >>> torch.allclose(model(x), base + 2), len(policies.parameters())
        (True, 2)
    """

    weights: Mapping[str, Tensor]
    frozen: bool = False
    reference: Literal["base", "start"] = "base"

    def __post_init__(self) -> None:
        check_choice("reference", self.reference, ("base", "start"))

    @property
    def held(self) -> tuple[str, ...]:
        """Name of its own adapter, if it has one beside those of the policies."""
        return ("start",) if self.frozen or self.reference == "start" else ()

    def stack(self, policy: str, *, reset: bool = False) -> list[str]:
        """Return the adapters that are active in a policy; none: the base model.

        ``reset``: whether the reference has an adapter of its own, as the other policies have.
        """
        if policy == "reference" and not reset:
            return ["start"] if self.reference == "start" else []
        return ["start", policy] if self.frozen else [policy]

    def check(self, config: LoraConfig) -> None:
        """Raise ``ValueError`` where a file could not hold both it and adapters of a config."""
        if self.frozen and config.lora_bias:
            raise ValueError(
                "config.lora_bias: expected False above a frozen start, got True: one adapter has "
                "no place for both"
            )

    def add_to(self, model: nn.Module) -> dict[str, LoraLayer]:
        """Add it to a model as an adapter of its own; return all layers with adapters by name.

        Raises:
            ValueError: the model has no layers of its names and shapes.
        """
        return add_lora(model, "start", self.weights)

    def begin(self, current: Mapping[str, nn.Parameter], scales: Mapping[str, float]) -> None:
        """Let the current policy begin with it, unless it is frozen.

        Raises:
            ValueError: layers, ranks or shapes are others.
        """
        if not self.frozen:
            _check_alike("start", self.weights, current)
            _fill(current, scaled(self.weights, {name: 1 / x for name, x in scales.items()}))

    def to_file(
        self, weights: Mapping[str, Tensor], scales: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Return it and an adapter above it as one, at scale 1."""
        return joined(self.weights, scaled(weights, scales))

    def from_file(
        self, weights: Mapping[str, Tensor], scales: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Return the adapter above it, from the weights of a file at scale 1.

        Raises:
            ValueError: the file does not begin with it.
        """
        own = without(weights, self.weights)
        return scaled(own, {name: 1 / scale for name, scale in scales.items()})


def add_lora(model: nn.Module, name: str, weights: Mapping[str, Tensor]) -> dict[str, LoraLayer]:
    """Add a LoRA at scale 1 to a model as an adapter; return all layers with adapters by name.

    Raises:
        ValueError: the model has no layers of its names and shapes; the message begins with the
            adapter's name.
    """
    try:
        layers = add_adapters(model, unit_config(weights), [name], seed=0)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    held = adapter_weights(layers, name)
    _check_alike(name, weights, held)
    _fill(held, weights)
    return layers


@torch.no_grad()
def _fill(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(values[name])


def _check_alike(what: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless a LoRA has the layers, ranks and shapes of an adapter."""
    if wrong := sorted(given.keys() ^ expected.keys()):
        raise ValueError(f"{what}: expected the layers of the adapter, got others, as {wrong[:4]}")
    for name, x in expected.items():
        rank, got = x.shape[rank_axis(name)], given[name].shape[rank_axis(name)]
        if got != rank:
            raise ValueError(f"{what}: expected rank {rank} of the adapter, got {got} in {name}")
        if given[name].shape != x.shape:
            shape = list(given[name].shape)
            raise ValueError(f"{what}: expected shape {list(x.shape)} of {name}, got {shape}")
