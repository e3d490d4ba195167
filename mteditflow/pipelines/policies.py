"""Current, old, averaged and reference policy as LoRA adapters on one model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from mteditflow._checks import check_choice
from mteditflow._sharding import agreed, fill, local, refuse_deepspeed, reshard, whole
from mteditflow.old_policy import update_old_policy


class LoraPolicies:
    r"""Policies on one model: an adapter in training, those that follow it, and none.

    ``current`` is trained, and is what the model is outside of any ``use``. ``old`` moves only by
    ``update_old``, ``ema`` (if wanted) only by ``update_ema``. ``reference`` is the model without
    adapters. Adapters start as exact no-ops, so all are equal at first. Their weights are float32
    even on a half-precision model, where small updates and a slow average would be rounded away;
    only those of ``current`` take gradients.

    Make it before the model goes to DDP or to FSDP2's ``fully_shard`` (by hand, or by accelerate's
    ``prepare``) and go on using it after; there, every rank makes the same calls in the same order.

    Args:
        model: a diffusers transformer (any module will do) without adapters; its own weights are
            frozen. Fuse or unload other LoRAs first.
        config: rank, scale, dropout and target modules of the adapters.
        seed: of the initial weights; the global generators are left as they were.
        ema: whether there is an averaged policy.

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

    def __init__(
        self, model: nn.Module, config: LoraConfig, *, seed: int = 0, ema: bool = False
    ) -> None:
        if tuned(model):
            raise ValueError("model: expected one without adapters; fuse or unload them first")
        self.model = model
        self._may_be_equal = True
        self._adapters = ("current", "old", "ema") if ema else ("current", "old")
        model.requires_grad_(False)
        self._layers = add_adapters(model, config, ("old", "current", *self._adapters[2:]), seed)
        for layer in self._layers:
            layer.set_adapter("current")
        for name in self._adapters[1:]:
            self._follow(name, decay=0.0)

    def parameters(self) -> list[nn.Parameter]:
        """Weights of the current policy, for the optimizer."""
        return self._parameters("current")

    def old_parameters(self) -> list[nn.Parameter]:
        """Weights of the old policy, in the order of ``parameters``."""
        return self._parameters("old")

    @contextmanager
    def use(self, policy: str) -> Iterator[None]:
        """Let the model be another policy inside the context; nests, and restores on exceptions.

        Which weights take gradients does not change. Under gradient checkpointing the backward
        pass runs the model again, as the policy of that moment: leave the context before it.

        Args:
            policy: "current", "old", "ema" or "reference".

        Raises:
            ValueError: there is no such policy.
        """
        if policy != "reference":
            self._check_adapter(policy, "reference")
        before = [(layer, layer.active_adapters, layer.disable_adapters) for layer in self._layers]
        active = "current" if policy == "reference" else policy
        try:
            activate([(layer, [active], policy == "reference") for layer in self._layers])
            yield
        finally:
            activate(before)

    @property
    def old_equals_current(self) -> bool:
        """Whether both are equal, so that a forward pass of the old policy can be skipped.

        Known without reading the weights once they have differed; only ``update_old`` and
        ``load`` can make them equal again. One answer for all ranks where weights are sharded.
        """
        if self._may_be_equal:
            weights = self.parameters()
            pairs = zip(weights, self.old_parameters(), strict=True)
            equal = all(torch.equal(local(current), local(old)) for current, old in pairs)
            self._may_be_equal = agreed(equal, weights)
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
        self._follow("old", decay)
        self._may_be_equal = True

    def update_ema(self, *, decay: float) -> None:
        """Move the averaged policy toward the current one, as ``update_old`` does the old one.

        Args:
            decay: share of the averaged policy that is kept, in [0, 1]; 0 copies exactly.

        Raises:
            ValueError: there is no averaged policy, or the decay is out of range.
        """
        self._follow("ema", decay)

    def state_dict(self, policy: str = "current") -> dict[str, Tensor]:
        """Weights of the "current", "old" or "ema" policy, named as peft saves them.

        Copies on the CPU, whole even where weights are sharded; every rank calls it then.
        """
        return {name: whole(x) for name, x in self._named(policy).items()}

    def load_state_dict(self, state: Mapping[str, Tensor], policy: str = "current") -> None:
        """Set the weights of the "current", "old" or "ema" policy, in place.

        Args:
            state: what ``state_dict`` returned, on any number of ranks; the same on every rank.
            policy: whose weights to set.

        Raises:
            ValueError: names or shapes are not those of ``state_dict()``; nothing has changed then.
        """
        weights = self._named(policy)
        expected = {name: list(x.shape) for name, x in weights.items()}
        given = {name: list(x.shape) for name, x in state.items()}
        if given != expected:
            wrong = _differing(given, expected)
            raise ValueError(f"state: names or shapes are not those of the adapter, as in {wrong}")
        for name, weight in weights.items():
            fill(weight, state[name])
        self._may_be_equal = True

    def save(
        self,
        pipeline: DiffusionPipeline,
        directory: str | os.PathLike[str],
        *,
        policy: str = "current",
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a policy as a diffusers LoRA, for ``pipeline.load_lora_weights``.

        Args:
            pipeline: the pipeline whose transformer the model is.
            directory: where to; made if missing.
            policy: "current", "old" or "ema".
            state: its ``state_dict()``, if at hand. One rank can then call this alone; without,
                every rank where weights are sharded calls it, each with a directory of its own.
        """
        type(pipeline).save_lora_weights(
            directory,
            transformer_lora_layers=self.state_dict(policy) if state is None else dict(state),
            transformer_lora_adapter_metadata=cast(Any, self.model).peft_config[policy].to_dict(),
        )

    def load(
        self,
        pipeline: DiffusionPipeline,
        directory: str | os.PathLike[str],
        *,
        policy: str = "current",
    ) -> None:
        """Set a policy, "current", "old" or "ema", to what ``save`` wrote; others stay as they are.

        Raises:
            ValueError: the file is of an adapter of another rank or of other modules.
        """
        state = type(pipeline).lora_state_dict(directory)
        named = {k.removeprefix("transformer."): x for k, x in state.items()}
        self.load_state_dict(named, policy)

    def _check_adapter(self, policy: str, *others: str) -> None:
        """Raise ``ValueError`` unless there is such a policy with weights."""
        if policy == "ema" and policy not in self._adapters:
            raise ValueError("policy: there is no 'ema'; make LoraPolicies with ema=True")
        check_choice("policy", policy, (*self._adapters, *others))

    def _parameters(self, policy: str) -> list[nn.Parameter]:
        """Weights as they are held now: FSDP2 swaps them, so no list is kept."""
        self._check_adapter(policy)
        reshard(self.model)
        return adapter_weights(self._layers, policy)

    def _named(self, policy: str) -> dict[str, Tensor]:
        """Weights under peft's names, sharing memory with the model."""
        refuse_deepspeed(self._parameters(policy))
        return dict(get_peft_model_state_dict(self.model, adapter_name=policy))

    def _follow(self, policy: str, decay: float) -> None:
        followers, current = self._parameters(policy), self.parameters()
        update_old_policy(map(local, followers), map(local, current), decay=decay)


def _differing(given: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """A few names under which two mappings differ."""
    names = sorted(given.keys() | expected.keys())
    return [name for name in names if given.get(name) != expected.get(name)][:4]


def add_adapters(
    model: nn.Module, config: LoraConfig, names: Sequence[str], seed: int
) -> list[BaseTunerLayer]:
    """Give a model float32 adapters, drawn in this order; the global generators are left alone."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.manual_seed(seed)
        for name in names:
            if hasattr(model, "add_adapter"):
                cast(Any, model).add_adapter(config, adapter_name=name)
            else:
                inject_adapter_in_model(config, model, adapter_name=name)
    layers = tuned(model)
    for name in names:
        for weight in adapter_weights(layers, name):
            weight.data = weight.data.float()
    return layers


def tuned(model: nn.Module) -> list[BaseTunerLayer]:
    """Layers of a model that hold adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapter_weights(layers: list[BaseTunerLayer], name: str) -> list[nn.Parameter]:
    """Weights of one adapter, in the order of the model's modules."""
    found: list[nn.Parameter] = []
    for layer in layers:
        for attribute in layer.adapter_layer_names:
            held = getattr(layer, attribute)
            if name in held:
                part = held[name]
                found += [part] if isinstance(part, nn.Parameter) else part.parameters()
    return found


def activate(states: list[tuple[BaseTunerLayer, list[str], bool]]) -> None:
    """Set which adapters are active or disabled, and nothing else.

    peft's own ``set_adapter`` and ``enable_adapters`` also turn ``requires_grad`` on and off, which
    would have to be undone for every weight at every switch; these two fields are what its forward
    passes read.
    """
    for layer, active, disabled in states:
        layer._active_adapter, layer._disable_adapters = active, disabled
