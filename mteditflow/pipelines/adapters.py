"""Current, old and reference policy as LoRA adapters on one model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from mteditflow._checks import check_choice
from mteditflow.old_policy import update_old_policy

POLICIES = ("current", "old", "reference")


class LoraPolicies:
    r"""Three policies on one model: an adapter in training, one that follows it, and none.

    ``current`` is trained, and is what the model is outside of any ``use``. ``old`` moves only by
    ``update_old``. ``reference`` is the model without adapters. Adapters start as exact no-ops, so
    all three are equal at first. Their weights are float32 even on a half-precision model, where
    small updates and a slow old policy would be rounded away.

    Args:
        model: a diffusers transformer (any module will do) without adapters; its own weights are
            frozen. Fuse or unload other LoRAs first.
        config: rank, scale, dropout and target modules of the adapters.
        seed: of the initial weights; the global generators are left as they were.

    Raises:
        ValueError: the model has adapters already, or no module matches the config.

    Source: DiffusionNFT (arXiv 2509.16117) for the old policy.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> policies = LoraPolicies(model, LoraConfig(r=1, target_modules=["0"]))
        >>> with torch.no_grad():
        ...     _ = policies.parameters()[1].add_(1.0)
        >>> x, current = torch.ones(1, 2), model(torch.ones(1, 2))
        >>> with policies.use("reference"):
        ...     reference = model(x)
        >>> old = policies.old_velocity(current, lambda: model(x))
        >>> bool((old == reference).all()), bool((old == current).all())
        (True, False)
        >>> policies.update_old(decay=0.0)
        >>> policies.old_equals_current
        True
    """

    def __init__(self, model: nn.Module, config: LoraConfig, *, seed: int = 0) -> None:
        if _tuned(model):
            raise ValueError("model: expected one without adapters; fuse or unload them first")
        self.model = model
        self._may_be_equal = True
        model.requires_grad_(False)
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(list(devices)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            torch.manual_seed(seed)
            for name in ("old", "current"):
                if hasattr(model, "add_adapter"):
                    cast(Any, model).add_adapter(config, adapter_name=name)
                else:
                    inject_adapter_in_model(config, model, adapter_name=name)
        self._layers = _tuned(model)
        self._current, self._old = (_weights(self._layers, name) for name in ("current", "old"))
        for weight in (*self._current, *self._old):
            weight.data = weight.data.float()
        for layer in self._layers:
            layer.set_adapter("current")
        self.update_old(decay=0.0)

    def parameters(self) -> list[nn.Parameter]:
        """Weights of the current policy, for the optimiser."""
        return list(self._current)

    def old_parameters(self) -> list[nn.Parameter]:
        """Weights of the old policy, in the order of ``parameters``."""
        return list(self._old)

    @contextmanager
    def use(self, policy: str) -> Iterator[None]:
        """Let the model be another policy inside the context; nests, and restores on exceptions.

        Which weights take gradients does not change. Under gradient checkpointing the backward
        pass runs the model again, as the policy of that moment: leave the context before it.

        Args:
            policy: "current", "old" or "reference".

        Raises:
            ValueError: there is no such policy.
        """
        check_choice("policy", policy, POLICIES)
        before = [(layer, layer.active_adapters, layer.disable_adapters) for layer in self._layers]
        needs = [(weight, weight.requires_grad) for weight in (*self._current, *self._old)]
        active = "current" if policy == "reference" else policy
        try:
            _activate([(layer, [active], policy == "reference") for layer in self._layers], needs)
            yield
        finally:
            _activate(before, needs)

    @property
    def old_equals_current(self) -> bool:
        """Whether both are equal, so that a forward pass of the old policy can be skipped.

        Known without reading the weights once they have differed; only ``update_old`` and
        ``load`` can make them equal again.
        """
        if self._may_be_equal:
            pairs = zip(self._current, self._old, strict=True)
            self._may_be_equal = all(torch.equal(current, old) for current, old in pairs)
        return self._may_be_equal

    def old_velocity(self, velocity: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        """Velocity of the old policy, without gradient, and without a forward pass where equal.

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

        Raises:
            ValueError: the decay is out of range.
        """
        update_old_policy(self._old, self._current, decay=decay)
        self._may_be_equal = True

    def state_dict(self, policy: str = "current") -> dict[str, Tensor]:
        """Weights of the "current" or the "old" policy, named as peft saves them."""
        check_choice("policy", policy, POLICIES[:2])
        return dict(get_peft_model_state_dict(self.model, adapter_name=policy))

    def load_state_dict(self, state: Mapping[str, Tensor], policy: str = "current") -> None:
        """Set the weights of the "current" or the "old" policy, in place.

        Raises:
            ValueError: names or shapes are not those of ``state_dict()``; nothing has changed then.
        """
        expected = {name: list(x.shape) for name, x in self.state_dict(policy).items()}
        given = {name: list(x.shape) for name, x in state.items()}
        if given != expected:
            wrong = _differing(given, expected)
            raise ValueError(f"state: names or shapes are not those of the adapter, as in {wrong}")
        set_peft_model_state_dict(self.model, dict(state), adapter_name=policy)
        self._may_be_equal = True

    def save(self, pipeline: DiffusionPipeline, directory: str | os.PathLike[str]) -> None:
        """Write the current policy as a diffusers LoRA, for ``pipeline.load_lora_weights``.

        Args:
            pipeline: the pipeline whose transformer the model is.
            directory: where to; made if missing.
        """
        type(pipeline).save_lora_weights(
            directory,
            transformer_lora_layers=self.state_dict(),
            transformer_lora_adapter_metadata=cast(Any, self.model)
            .peft_config["current"]
            .to_dict(),
        )

    def load(self, pipeline: DiffusionPipeline, directory: str | os.PathLike[str]) -> None:
        """Set the current policy to what ``save`` wrote; the old one stays as it is.

        Raises:
            ValueError: the file is of an adapter of another rank or of other modules.
        """
        state = type(pipeline).lora_state_dict(directory)
        self.load_state_dict({k.removeprefix("transformer."): x for k, x in state.items()})


def _tuned(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _weights(layers: list[BaseTunerLayer], name: str) -> list[nn.Parameter]:
    """Weights of one adapter, in the order of the model's modules."""
    found: list[nn.Parameter] = []
    for layer in layers:
        for attribute in layer.adapter_layer_names:
            held = getattr(layer, attribute)
            if name in held:
                part = held[name]
                found += [part] if isinstance(part, nn.Parameter) else part.parameters()
    return found


def _activate(
    states: list[tuple[BaseTunerLayer, list[str], bool]], needs: list[tuple[nn.Parameter, bool]]
) -> None:
    """Set which adapters are active or disabled, and undo what peft does to ``requires_grad``."""
    for layer, active, disabled in states:
        layer.set_adapter(active)
        layer.enable_adapters(not disabled)
    for weight, needed in needs:
        weight.requires_grad_(needed)


def _differing(given: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """A few names under which two mappings differ."""
    names = sorted(given.keys() | expected.keys())
    return [name for name in names if given.get(name) != expected.get(name)][:4]
