"""Current, old, averaged and reference policy as LoRA adapters on one model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from mteditflow._checks import check_choice
from mteditflow._files import sort_metadata
from mteditflow._sharding import agreed, fill, local, refuse_deepspeed, reshard, whole
from mteditflow.old_policy import update_old_policy
from mteditflow.pipelines.adapters import (
    activate,
    active_names,
    adapter_weights,
    add_adapters,
    check_config,
    check_passes_gradients,
    tuned,
    unwrapped,
)
from mteditflow.pipelines.lora_files import FILE, load_file, read_lora, unit_config, weights_of_file
from mteditflow.pipelines.start import Start, add_lora


class LoraPolicies:
    r"""Policies on one model: an adapter in training, those that follow it, and none.

    ``current`` is trained, and is what the model is outside of any ``use``. ``old`` moves only by
    ``update_old``, ``ema`` (if wanted) only by ``update_ema``. ``reference`` is the model without
    adapters. Adapters start as exact no-ops, so all are equal at first. Their weights are float32
    even on a half-precision model, where small updates and a slow average would be rounded away;
    only those of ``current`` take gradients.

    With ``start`` they begin as a LoRA that there is, not as the base model; see ``Start``.

    Make it before the model goes to DDP or to FSDP2's ``fully_shard`` (by hand, or by accelerate's
    ``prepare``) and go on using it after; there, every rank makes the same calls in the same order.

    Args:
        model: a diffusers transformer (any module will do) without adapters, compiled or not; its
            own weights are frozen. Fuse or unload other LoRAs first, and load none after.
        config: rank, scale, dropout and target modules of the adapters, and biases.
        seed: of the initial weights; the global generators are left as they were.
        ema: whether there is an averaged policy.
        resettable: whether ``reset_reference`` may move the reference, which takes an adapter more.
        start: LoRA to begin with, continued or frozen below the adapters; None: the base model.
        few_steps: weights of a LoRA as ``read_lora`` returns them, such as one distilled for few
            steps, that is active only inside ``use(policy, few_steps=True)``. It is neither trained
            nor saved. Objectives that need no likelihood of the sampler, as NFT, can train without
            it what was sampled with it. None: there is none.

    Raises:
        TypeError: the config is of another method than LoRA.
        ValueError: the model has adapters already or is wrapped by DDP or FSDP, no module matches
            the config, the start or ``few_steps`` does not fit, or policies of such a config
            would not start equal, share the base model or be saved whole; the message has the field
            and the reason.

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

    _in_use: str
    _stack: list[str]

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        *,
        seed: int = 0,
        ema: bool = False,
        resettable: bool = False,
        start: Start | None = None,
        few_steps: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_config(config)
        self._start = start or Start({})
        self._start.check(config)
        self.model, self._bare = model, unwrapped(model)
        if tuned(model):
            raise ValueError("model: expected one without adapters; fuse or unload them first")
        check_passes_gradients(self._bare)
        self._may_be_equal = True
        self._adapters = ("current", "old", *["ema"] * ema, *["reference"] * resettable)
        self._reference_was_reset = False
        model.requires_grad_(False)
        drawn = ("old", "current", *self._adapters[2:])
        self._layers = add_adapters(self._bare, config, drawn, seed)
        self._scales = {name: x.scaling["current"] for name, x in self._layers.items()}
        if self._start.held:
            self._layers = self._start.add_to(self._bare)
        self._frozen = self._start.held
        if few_steps is not None:
            self._layers = add_lora(self._bare, "few_steps", few_steps)
            self._frozen += ("few_steps",)
        for layer in self._layers.values():
            layer.set_adapter("current")
        self._switch("current")
        if start is not None:
            start.begin(self._weights("current"), self._scales)
        for name in self._adapters[1:]:
            self._follow(name, decay=0.0)

    def parameters(self) -> list[nn.Parameter]:
        """Weights of the current policy, for the optimizer: all that is trained, each once.

        Raises:
            RuntimeError: adapters were changed from outside, as by loading another LoRA.
        """
        weights = self._parameters("current")
        if not all(weight.requires_grad for weight in weights):
            raise _changed("weights of the current policy that need gradients", "frozen ones")
        return weights

    def old_parameters(self) -> list[nn.Parameter]:
        """Weights of the old policy, in the order of ``parameters``."""
        return self._parameters("old")

    @contextmanager
    def use(self, policy: str, *, few_steps: bool = False) -> Iterator[None]:
        """Let the model be another policy inside the context; nests, and restores on exceptions.

        Which weights take gradients does not change. Under gradient checkpointing the backward
        pass runs the model again, as the policy of that moment: leave the context before it. It is
        the model that changes: use it in one thread at a time.

        Args:
            policy: "current", "old", "ema" or "reference".
            few_steps: whether the LoRA of that name is active on top.

        Raises:
            ValueError: there is no such policy, or no LoRA for few steps.
            RuntimeError: adapters were changed from outside, as by loading another LoRA.
        """
        if policy != "reference":
            self._check_adapter(policy, "reference")
        if few_steps and "few_steps" not in self._frozen:
            raise ValueError("few_steps: there is no such LoRA; make LoraPolicies with few_steps=")
        self._check_adapters()
        before = self._in_use, self._stack
        try:
            self._switch(policy, few_steps)
            yield
        finally:
            self._in_use, self._stack = before
            activate(self._layers.values(), self._stack)

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

    @property
    def reference_was_reset(self) -> bool:
        """Whether the reference has weights of its own: those of the last ``reset_reference``."""
        return self._reference_was_reset

    def reset_reference(self) -> None:
        """Let the reference be the current policy as it is now; until then it is as at the start.

        Raises:
            ValueError: the policies were made without ``resettable``.
            RuntimeError: the model is another policy than the current one, inside of ``use``.

        Source: the reference's reset of GARDO (arXiv 2512.24138); see ``ReferenceReset``.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 2))
            >>> config = LoraConfig(r=1, target_modules=["0"])
            >>> policies = LoraPolicies(model, config, resettable=True)
            >>> with torch.no_grad():
            ...     _ = policies.parameters()[1].add_(1.0)
            >>> x, distance = torch.ones(1, 2), []
            >>> for reset in (lambda: None, policies.reset_reference):
            ...     reset()
            ...     with policies.use("reference"):
            ...         reference = model(x)
            ...     distance.append(bool((reference != model(x)).any()))
            >>> distance
            [True, False]
        """
        if "reference" not in self._adapters:
            raise ValueError("resettable: expected True, so that the reference has weights to set")
        self.check_current()
        self._follow("reference", decay=0.0)
        self._reference_was_reset = True

    def state_dict(self, policy: str = "current") -> dict[str, Tensor]:
        """Weights of the "current", "old" or "ema" policy, named as peft saves them, and scales.

        Those of "reference", too, once it was reset.

        A layer's scale, alpha / rank, is named ``<layer>.lora_scale``: without it, weights do not
        say what a policy is. Copies on the CPU, whole even where weights are sharded; every rank
        calls it then.

        Raises:
            ValueError: there is no such policy, or the reference was not reset.
        """
        self._check_adapter(policy)
        if policy == "reference" and not self._reference_was_reset:
            raise ValueError("policy: expected a reference that was reset, got it as at the start")
        return {name: whole(x) for name, x in self._named(policy).items()} | self._scale_state()

    def load_state_dict(self, state: Mapping[str, Tensor], policy: str = "current") -> None:
        """Set the weights of the "current", "old" or "ema" policy, in place.

        Args:
            state: what ``state_dict`` returned, on any number of ranks; the same on every rank.
            policy: whose weights to set; with "reference" it counts as reset.

        Raises:
            ValueError: names, shapes or scales are not those of ``state_dict()``; nothing has
                changed then.
        """
        checked = self._checked(state, policy)
        for name, weight in self._named(policy).items():
            fill(weight, checked[name])
        self._may_be_equal = True
        self._reference_was_reset |= policy == "reference"

    def save(
        self,
        pipeline: DiffusionPipeline,
        directory: str | os.PathLike[str],
        *,
        policy: str = "current",
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a policy as a diffusers LoRA, for ``pipeline.load_lora_weights``.

        Equal weights give equal bytes.

        Args:
            pipeline: the pipeline whose transformer the model is.
            directory: where to; made if missing.
            policy: "current", "old" or "ema".
            state: its ``state_dict()``, if at hand. One rank can then call this alone; without,
                every rank where weights are sharded calls it, each with a directory of its own.

        Raises:
            ValueError: ``state`` is not of these adapters.
        """
        state = self.state_dict(policy) if state is None else state
        weights, config = self._checked(state, policy), cast(Any, self._bare).peft_config[policy]
        if self._start.frozen:
            weights = self._start.to_file(weights, self._scales)
            config = unit_config(weights)
        # diffusers leaves dropout of an adapter that it loads on, in eval mode too.
        fields = config.to_dict() | {"lora_dropout": 0.0}
        type(pipeline).save_lora_weights(
            directory,
            transformer_lora_layers=weights,
            transformer_lora_adapter_metadata={  # sets have another order in every process
                name: sorted(x) if isinstance(x, set) else x for name, x in fields.items()
            },
        )
        sort_metadata(Path(directory) / FILE)

    def load(
        self,
        pipeline: DiffusionPipeline,
        directory: str | os.PathLike[str],
        *,
        policy: str = "current",
    ) -> None:
        """Set a policy, "current", "old" or "ema", to a LoRA file; others stay as they are.

        The policy is then what ``pipeline.load_lora_weights`` would give, exactly where the file
        has the scale of these adapters, as one of ``save`` has; where its alpha is another, the
        weights are multiplied, and the velocity is the same up to rounding. So is it where a start
        is frozen, which the file must begin with.

        Raises:
            ValueError: the file is of an adapter of another rank, method or of other modules, or
                does not hold the frozen start.
            OSError: there is no such file.
        """
        if self._start.frozen:
            loaded = read_lora(type(pipeline), directory)
            weights = self._start.from_file(loaded, self._scales)
        else:
            weights = weights_of_file(load_file(type(pipeline), directory), self._scales)
        self.load_state_dict(weights | self._scale_state(), policy)

    def _check_adapter(self, policy: str, *others: str) -> None:
        """Raise ``ValueError`` unless there is such a policy with weights."""
        if policy == "ema" and policy not in self._adapters:
            raise ValueError("policy: there is no 'ema'; make LoraPolicies with ema=True")
        check_choice("policy", policy, (*self._adapters, *others))

    def _check_adapters(self) -> None:
        """Raise ``RuntimeError`` where others have added, dropped, switched or fused adapters."""
        there = getattr(self._bare, "peft_config", {})
        held = {*self._adapters, *self._frozen}
        if set(there) != held:
            raise _changed(f"adapters {sorted(held)}", f"{sorted(there)}")
        active, off = active_names(self._stack), not self._stack
        for name, layer in self._layers.items():
            if layer.active_adapters != active or layer.disable_adapters != off:
                got = f"{layer.active_adapters}{', disabled' * layer.disable_adapters}"
                wanted = " and ".join(map(repr, active))
                raise _changed(f"active adapter {wanted}{', disabled' * off}", got)
            if layer.merged:
                raise _changed("adapters beside the weights", "adapters fused into them")
            for policy, scale in layer.scaling.items():
                wanted_scale = 1.0 if policy in self._frozen else self._scales[name]
                if scale != wanted_scale:
                    raise _changed(f"scale {wanted_scale} in {name}", f"{layer.scaling}")

    def check_current(self) -> None:
        """Raise ``RuntimeError`` unless the model is the current policy, in ``use`` of no other."""
        self._check_adapters()
        if self._in_use != "current" or "few_steps" in self._stack:
            few_steps = ", few_steps=True" * ("few_steps" in self._stack)
            raise RuntimeError(
                f"policy: expected to be outside of use() for 'current', got it inside "
                f"use({self._in_use!r}{few_steps})"
            )

    def _switch(self, policy: str, few_steps: bool = False) -> None:
        self._in_use = policy
        stack = self._start.stack(policy, reset=self._reference_was_reset)
        self._stack = [*stack, *(["few_steps"] if few_steps else [])]
        activate(self._layers.values(), self._stack)

    def _parameters(self, policy: str) -> list[nn.Parameter]:
        return list(self._weights(policy).values())

    def _weights(self, policy: str) -> dict[str, nn.Parameter]:
        """Weights as they are held now, by name: FSDP2 swaps them, so none is kept."""
        self._check_adapter(policy)
        self._check_adapters()
        reshard(self._bare)
        weights = adapter_weights(self._layers, policy)
        dtypes = {weight.dtype for weight in weights.values()}
        if not dtypes <= {torch.float32, torch.float64}:
            raise _changed("float32 weights", f"{sorted(map(str, dtypes))}")
        return weights

    def _named(self, policy: str) -> dict[str, nn.Parameter]:
        """Weights to read or set whole."""
        weights = self._weights(policy)
        refuse_deepspeed(weights.values())
        return weights

    def _scale_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.lora_scale": torch.tensor(scale, dtype=torch.float32, device="cpu")
            for name, scale in self._scales.items()
        }

    def _checked(self, state: Mapping[str, Tensor], policy: str) -> dict[str, Tensor]:
        """Weights of a state without scales, or ``ValueError`` if it is of other adapters."""
        weights, scales = self._named(policy), self._scale_state()
        expected = {name: list(x.shape) for name, x in {**weights, **scales}.items()}
        given = {name: list(x.shape) for name, x in state.items()}
        if given != expected:
            wrong = _differing(given, expected)
            raise ValueError(
                "state: names or shapes are not those of the adapter (its weights, and a "
                f"lora_scale per layer), as in {wrong}"
            )
        for name, scale in scales.items():
            if float(state[name]) != float(scale):
                raise ValueError(
                    f"state: expected {name} {float(scale):g}, got {float(state[name]):g}; make "
                    "LoraPolicies with the rank, alpha and use_rslora of the state"
                )
        return {name: state[name] for name in weights}

    def _follow(self, policy: str, decay: float) -> None:
        followers, current = self._parameters(policy), self._parameters("current")
        update_old_policy(map(local, followers), map(local, current), decay=decay)


def _changed(expected: str, got: str) -> RuntimeError:
    """Error for adapters that were changed by other means than ``LoraPolicies``."""
    return RuntimeError(
        f"model: expected {expected}, got {got}: adapters were changed from outside, as by "
        "load_lora_weights, set_adapters, fuse_lora, delete_adapters, disable_lora or to(dtype); "
        "undo that (pipeline.delete_adapters, set_adapters('current'), unfuse_lora, enable_lora), "
        "or load the pipeline anew and restore state_dict()"
    )


def _differing(given: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """A few names under which two mappings differ."""
    names = sorted(given.keys() | expected.keys())
    return [name for name in names if given.get(name) != expected.get(name)][:4]
