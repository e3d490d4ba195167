"""LoRA adapters on one model as the current, old, averaged and reference policies."""

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
    r"""Current, old, averaged and reference policies on one model, as LoRA adapters.

    ``current`` is trained, and is active outside of any ``use``. ``old`` changes only by
    ``update_old``, ``ema`` (optional) only by ``update_ema``. ``reference`` is the model without
    adapters. Adapters start as exact no-ops, so all policies are equal at first. Their weights are
    float32 even on a half-precision model, where small updates and a slow average would be rounded
    away. Only those of ``current`` take gradients.

    With ``start`` the policies begin at an existing LoRA instead of the base model; see ``Start``.

    Construct it before the model goes to DDP or to FSDP2's ``fully_shard`` (by hand, or by
    accelerate's ``prepare``), and keep using it afterwards. Every rank must then make the same
    calls in the same order.

    Args:
        model: a diffusers transformer (or any other module) without adapters, compiled or not; its
            own weights are frozen. Fuse or unload other LoRAs first, and load none later.
        config: rank, scale, dropout and target modules of the adapters, and biases.
        seed: seed of the initial weights; the global generators do not change.
        ema: whether there is an averaged policy.
        resettable: whether ``reset_reference`` may move the reference, which takes an adapter more.
        start: LoRA to begin with, continued or frozen below the adapters; None: the base model.
        few_steps: weights of a LoRA as ``read_lora`` returns them, such as one distilled for few
            steps, that is active only inside ``use(policy, few_steps=True)``. It is neither trained
            nor saved. An objective that needs no likelihood of the sampler, such as NFT, may sample
            with it and train without it. None: there is none.

    Raises:
        TypeError: the config is of another method than LoRA.
        ValueError: the model has adapters already or is wrapped by DDP or FSDP, no module matches
            the config, the start or ``few_steps`` does not fit, or with a field of the config the
            policies would not start equal, share the base model or be saved whole. The message has
            the field and the reason.

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
        # The order decides which random numbers are current's: changing it changes every run.
        drawn = ("old", "current", *self._adapters[2:])
        self._layers = add_adapters(self._bare, config, drawn, seed)
        self._scales = {name: x.scaling["current"] for name, x in self._layers.items()}
        if self._start.held:
            self._layers = self._start.add_to(self._bare)
        self._frozen = self._start.held
        if few_steps is not None:
            self._layers = add_lora(self._bare, "few_steps", few_steps)
            self._frozen += ("few_steps",)
        for layer in self._layers.values():  # also sets which adapter's weights take gradients
            layer.set_adapter("current")
        self._switch("current")
        if start is not None:
            start.begin(self._weights("current"), self._scales)
        for name in self._adapters[1:]:
            self._follow(name, decay=0.0)

    def parameters(self) -> list[nn.Parameter]:
        """Return the weights of the current policy, for the optimizer: all that is trained.

        Raises:
            RuntimeError: adapters were changed by other means, as by loading another LoRA.
        """
        weights = self._parameters("current")
        if not all(weight.requires_grad for weight in weights):
            raise _changed("weights of the current policy that need gradients", "frozen ones")
        return weights

    def old_parameters(self) -> list[nn.Parameter]:
        """Return the weights of the old policy, in the order of ``parameters``."""
        return self._parameters("old")

    @contextmanager
    def use(self, policy: str, *, few_steps: bool = False) -> Iterator[None]:
        """Switch the model to another policy inside the context.

        Contexts may be nested, and the policy before is restored after exceptions, too. Which
        weights take gradients does not change. Under gradient checkpointing the backward pass runs
        the model again under the policy that is active then: leave the context before it. The model
        itself is switched, so use it in one thread at a time.

        Args:
            policy: "current", "old", "ema" or "reference".
            few_steps: whether the LoRA of that name is active on top of the policy.

        Raises:
            ValueError: there is no such policy, or no LoRA for few steps.
            RuntimeError: adapters were changed by other means, as by loading another LoRA.
        """
        if policy != "reference":
            self._check_adapter(policy, "reference")
        if few_steps and "few_steps" not in self._frozen:
            raise ValueError("few_steps: there is no such LoRA; make LoraPolicies with few_steps=")
        self._check_adapters()
        # The whole stack is kept and restored: in an outer ``use`` few_steps may be active.
        before = self._in_use, self._stack
        try:
            self._switch(policy, few_steps)
            yield
        finally:
            self._in_use, self._stack = before
            activate(self._layers.values(), self._stack)

    @property
    def old_equals_current(self) -> bool:
        """Return whether both are equal, so that a forward pass of the old policy can be skipped.

        Once the weights have differed, they are not compared again before ``update_old``, ``load``
        or ``load_state_dict``. All ranks return the same value where weights are sharded.
        """
        if self._may_be_equal:
            weights = self.parameters()
            pairs = zip(weights, self.old_parameters(), strict=True)
            equal = all(torch.equal(local(current), local(old)) for current, old in pairs)
            self._may_be_equal = agreed(equal, weights)
        return self._may_be_equal

    def old_velocity(self, velocity: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        """Return the old policy's velocity without gradient; no forward pass where both are equal.

        Args:
            velocity: velocity of the current policy, of any shape.
            forward: returns the velocity at the same inputs, such as a lambda around
                ``rollout.velocity``. It is called under the old policy and no_grad, and only where
                the two policies differ.

        Returns:
            The shape of ``velocity``; its detached value if old and current are equal.
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
        """Return the weights of the "current", "old" or "ema" policy, and the scales of its layers.

        Weights have the names that peft saves. A layer's scale, alpha / rank, has the name
        ``<layer>.lora_scale``: weights alone do not determine a policy. All are copies on the CPU,
        and whole; where weights are sharded, every rank must call it.

        "reference" has weights of its own once it was reset.

        Raises:
            ValueError: there is no such policy, or the reference was not reset.
            RuntimeError: DeepSpeed holds the weights, or adapters were changed by other means.
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
            ValueError: there is no such policy, or names, shapes or scales are not those of
                ``state_dict()``; no weight changes then.
            RuntimeError: DeepSpeed holds the weights, or adapters were changed by other means.
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
            directory: output directory, created if missing.
            policy: "current", "old" or "ema".
            state: its ``state_dict()``, with which one rank may call this alone. None: where
                weights are sharded, every rank must call it, each with its own directory.

        Raises:
            ValueError: ``state`` is not of these adapters.
        """
        state = self.state_dict(policy) if state is None else state
        weights, config = self._checked(state, policy), cast(Any, self._bare).peft_config[policy]
        if self._start.frozen:
            weights = self._start.to_file(weights, self._scales)
            config = unit_config(weights)
        # diffusers keeps the dropout of an adapter that it loads active, even in eval mode.
        fields = config.to_dict() | {"lora_dropout": 0.0}
        type(pipeline).save_lora_weights(
            directory,
            transformer_lora_layers=weights,
            transformer_lora_adapter_metadata={  # the order of a set differs between processes
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

        The policy then equals what ``pipeline.load_lora_weights`` gives: exactly if the file has
        the scale of these adapters, as a file of ``save`` has. With another alpha the weights are
        rescaled, and the velocity is equal up to rounding; so it is above a frozen start, with
        which the file must begin.

        Args:
            pipeline: the pipeline whose transformer the model is.
            directory: a directory as ``save`` writes it, or a safetensors file.
            policy: "current", "old" or "ema".

        Raises:
            ValueError: the file is of another method, rank or set of modules, or does not begin
                with the frozen start.
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
        """Raise ``RuntimeError`` if adapters were added, deleted, switched or fused elsewhere."""
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
        """Raise ``RuntimeError`` unless the current policy is active, without few-step LoRA."""
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
        """Return the weights of a policy by name, looked up anew, since FSDP2 replaces them."""
        self._check_adapter(policy)
        self._check_adapters()
        reshard(self._bare)
        weights = adapter_weights(self._layers, policy)
        dtypes = {weight.dtype for weight in weights.values()}
        if not dtypes <= {torch.float32, torch.float64}:
            raise _changed("float32 weights", f"{sorted(map(str, dtypes))}")
        return weights

    def _named(self, policy: str) -> dict[str, nn.Parameter]:
        """Return the weights of a policy that can be read or set as a whole."""
        weights = self._weights(policy)
        refuse_deepspeed(weights.values())
        return weights

    def _scale_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.lora_scale": torch.tensor(scale, dtype=torch.float32, device="cpu")
            for name, scale in self._scales.items()
        }

    def _checked(self, state: Mapping[str, Tensor], policy: str) -> dict[str, Tensor]:
        """Return the weights of a state without its scales.

        Raises:
            ValueError: names, shapes or scales are those of other adapters.
        """
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
    """Return the error for adapters that were changed by other means than ``LoraPolicies``."""
    return RuntimeError(
        f"model: expected {expected}, got {got}: adapters were changed from outside, as by "
        "load_lora_weights, set_adapters, fuse_lora, delete_adapters, disable_lora or to(dtype); "
        "undo that (pipeline.delete_adapters, set_adapters('current'), unfuse_lora, enable_lora), "
        "or load the pipeline anew and restore state_dict()"
    )


def _differing(given: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the first four names under which two mappings differ."""
    names = sorted(given.keys() | expected.keys())
    return [name for name in names if given.get(name) != expected.get(name)][:4]
