"""LoRA from which policies start: continued by the current policy, or frozen below adapters."""

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
    """LoRA from which ``LoraPolicies`` starts instead of the base model.

    If it is continued, the current, old and averaged policies begin with its weights, and training
    changes them. If it is frozen, it stays as it is below new adapters that start as no-ops; a file
    then holds both as one LoRA, with the sum of their ranks.

    Attributes:
        weights: weights at scale 1, as ``read_lora`` returns them.
        frozen: whether it is frozen; if not, it must have the layers and ranks of the new adapters.
        reference: "base", the model without adapters, or "start", the model with this LoRA alone.

    Raises:
        ValueError: ``reference`` is neither "base" nor "start".

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
        """Return the name of its own adapter, if it needs one besides those of the policies."""
        return ("start",) if self.frozen or self.reference == "start" else ()

    def stack(self, policy: str, *, reset: bool = False) -> list[str]:
        """Return the adapters that are active in a policy; an empty list is the base model.

        ``reset``: whether the reference has an adapter of its own, as the other policies have.
        """
        if policy == "reference" and not reset:
            return ["start"] if self.reference == "start" else []
        return ["start", policy] if self.frozen else [policy]

    def check(self, config: LoraConfig) -> None:
        """Raise ``ValueError`` if a file could not hold both it and adapters of a config."""
        if self.frozen and config.lora_bias:
            raise ValueError(
                "config.lora_bias: expected False above a frozen start, got True: one adapter "
                "cannot hold the biases of both"
            )

    def add_to(self, model: nn.Module) -> dict[str, LoraLayer]:
        """Add it to a model as a separate adapter; return all layers with adapters by name.

        Raises:
            ValueError: the model has no layers of these names and shapes.
        """
        return add_lora(model, "start", self.weights)

    def begin(self, current: Mapping[str, nn.Parameter], scales: Mapping[str, float]) -> None:
        """Copy it into the weights of the current policy, unless it is frozen.

        Args:
            current: weights of the current policy, changed in place.
            scales: scale alpha / rank of each layer's adapter.

        Raises:
            ValueError: layers, ranks or shapes differ.
        """
        if not self.frozen:
            _check_alike("start", self.weights, current)
            # The adapter multiplies by its scale, and these weights are at scale 1: divide by it.
            _fill(current, scaled(self.weights, {name: 1 / x for name, x in scales.items()}))

    def to_file(
        self, weights: Mapping[str, Tensor], scales: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Return it and an adapter above it as one LoRA at scale 1."""
        return joined(self.weights, scaled(weights, scales))

    def from_file(
        self, weights: Mapping[str, Tensor], scales: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Return the adapter above it from a file's weights at scale 1: inverse of ``to_file``.

        Raises:
            ValueError: the file does not begin with it.
        """
        own = without(weights, self.weights)
        return scaled(own, {name: 1 / scale for name, scale in scales.items()})


def add_lora(model: nn.Module, name: str, weights: Mapping[str, Tensor]) -> dict[str, LoraLayer]:
    """Add a LoRA at scale 1 to a model as an adapter; return all layers with adapters by name.

    Raises:
        ValueError: the model has no layers of these names and shapes; the message begins with the
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
