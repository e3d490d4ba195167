"""Current, old and reference policy as LoRA adapters on one model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from mteditflow._checks import check_choice
from mteditflow.old_policy import update_old_policy

POLICIES = ("current", "old", "reference")


class LoraPolicies:
    r"""Three policies on one model: a trained adapter, a slowly following one, and none.

    ``current`` is the adapter that is trained and active by default; ``old`` is a second one that
    ``update_old`` moves; ``reference`` is the model without adapters. Adapters start as exact
    no-ops, so all three are equal at first.

    Args:
        model: a diffusers model; its own weights are frozen.
        config: rank, scale, dropout and target modules of both adapters.
        names: adapter names of the current and of the old policy.

    Raises:
        ValueError: the model has an adapter of one of these names already, or no module matches.

    Source: DiffusionNFT (arXiv 2509.16117) for the old policy.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> policies = LoraPolicies(model, LoraConfig(r=1, target_modules=["0"]))
        >>> policies.old_equals_current
        True
        >>> with torch.no_grad():
        ...     _ = policies.parameters()[1].add_(1.0)
        >>> policies.old_equals_current
        False
        >>> x = torch.ones(1, 2)
        >>> with policies.use("old"):
        ...     old = model(x)
        >>> policies.update_old(decay=0.0)
        >>> policies.old_equals_current
        True
    """

    def __init__(
        self, model: nn.Module, config: LoraConfig, *, names: tuple[str, str] = ("current", "old")
    ) -> None:
        taken = {name for layer in _layers(model) for name in layer.r}
        if taken & set(names) or names[0] == names[1]:
            raise ValueError(f"names: expected two new adapter names, got {names}, has {taken}")
        self.model, self.names = model, names
        model.requires_grad_(False)
        for name in reversed(names):
            if hasattr(model, "add_adapter"):
                model.add_adapter(config, adapter_name=name)  # type: ignore[operator]
            else:
                inject_adapter_in_model(config, model, adapter_name=name)
        self._layers = _layers(model)
        for layer in self._layers:
            layer.set_adapter(names[0])
        self._parameters = {name: _parameters(model, name) for name in names}
        self.update_old(decay=0.0)

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the current policy, for the optimiser."""
        return list(self._parameters[self.names[0]])

    def old_parameters(self) -> list[nn.Parameter]:
        """Parameters of the old policy, in the order of ``parameters``."""
        return list(self._parameters[self.names[1]])

    @contextmanager
    def use(self, policy: str) -> Iterator[None]:
        """Let the model be another policy inside the context; nests, and restores on exceptions.

        Under gradient checkpointing the backward pass runs the model again, as the policy of that
        moment: leave the context before.

        Args:
            policy: "current", "old" or "reference".

        Raises:
            ValueError: there is no such policy.
        """
        check_choice("policy", policy, POLICIES)
        before = [(layer, layer.active_adapters, layer.disable_adapters) for layer in self._layers]
        gradients = [(p, p.requires_grad) for ps in self._parameters.values() for p in ps]
        try:
            for layer in self._layers:
                if policy == "reference":
                    layer.enable_adapters(False)
                else:
                    layer.set_adapter(self.names[policy == "old"])
                    layer.enable_adapters(True)
            for parameter, needed in gradients:
                parameter.requires_grad_(needed)
            yield
        finally:
            for layer, active, disabled in before:
                layer.set_adapter(active)
                layer.enable_adapters(not disabled)
            for parameter, needed in gradients:
                parameter.requires_grad_(needed)

    @property
    def old_equals_current(self) -> bool:
        """Whether the adapters are equal, so that a forward pass of the old one can be skipped.

        Free once an optimiser has stepped since they were last equal; else the adapters are read.
        """
        pairs = list(zip(*self._parameters.values(), strict=True))
        if self._equal_at is not None and self._equal_at != self._versions():
            return False
        return all(torch.equal(current, old) for current, old in pairs)

    def old_velocity(self, velocity: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        """Velocity of the old policy, without gradient and without a forward pass where equal.

        Args:
            velocity: of the current policy.
            forward: computes the velocity at the same inputs, such as a lambda around
                ``rollout.velocity``; called as the old policy, under no_grad, where the two differ.

        Returns:
            Shape of ``velocity``; its detached value if old and current are equal.
        """
        if self.old_equals_current:
            return velocity.detach()
        with torch.no_grad(), self.use("old"):
            return forward()

    def update_old(self, *, decay: float) -> None:
        """Move the old policy toward the current one; see ``mteditflow.update_old_policy``.

        Args:
            decay: share of the old policy that is kept, in [0, 1]; 0 copies exactly.
        """
        current, old = self._parameters.values()
        update_old_policy(old, current, decay=decay)
        self._equal_at = self._versions() if decay == 0 else None

    def state_dict(self) -> dict[str, Tensor]:
        """The current policy's adapter, named as peft saves it."""
        return dict(get_peft_model_state_dict(self.model, adapter_name=self.names[0]))

    def save(self, pipeline: DiffusionPipeline, directory: str | os.PathLike[str]) -> None:
        """Write the current policy for ``pipeline.load_lora_weights``, as diffusers saves a LoRA.

        Args:
            pipeline: the pipeline whose transformer the model is.
            directory: where to; made if missing.
        """
        config = cast(Any, self.model).peft_config[self.names[0]]
        type(pipeline).save_lora_weights(
            directory,
            transformer_lora_layers=self.state_dict(),
            transformer_lora_adapter_metadata=config.to_dict(),
        )

    def _versions(self) -> list[int]:
        return [p._version for ps in self._parameters.values() for p in ps]


def _layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _parameters(model: nn.Module, name: str) -> Sequence[nn.Parameter]:
    """Parameters of one adapter in the order of the model's modules."""
    return [
        parameter
        for key, parameter in model.named_parameters()
        if f".{name}." in key or key.endswith(f".{name}")
    ]
