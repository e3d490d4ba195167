"""Few-step sampling, by a distilled sibling of the trained model or with a few-step LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mteditflow._hub import HubError, explaining_hub
from mteditflow.pipelines import Editor, Family, LoraPolicies, Start, load_sibling, read_lora

from .config import Config, ConfigError, Model, Sampling


@dataclass(frozen=True, eq=False)
class Sibling:
    """Distilled editor that samples in place of the trained one.

    Attributes:
        editor: the distilled editor.
        policies: its adapters; ``use`` copies the sampling policy into the current one.
    """

    editor: Editor
    policies: LoraPolicies

    @contextmanager
    def use(self, trained: LoraPolicies, policy: str, *, few_steps: bool) -> Iterator[None]:
        """Copy a trained policy's current weights, and sample with them inside the block."""
        # Copied for every rollout, since each update changes the trained policy.
        self.policies.load_state_dict(trained.state_dict(policy))
        with self.policies.use("current", few_steps=few_steps):
            yield


def load_sampler(config: Config, editor: Editor) -> Sibling | None:
    """Load the sibling of ``sampling.model``; None if the editor samples itself.

    Raises:
        ConfigError: the model is no sibling, or cannot sample as configured.
    """
    model, sampling = config.model, config.sampling
    if sampling.few_steps is None:
        return None
    try:
        editor.options_with(sampling_call(sampling, editor.family))
    except ValueError as error:
        raise ConfigError(f"sampling.{error}") from error
    if sampling.model is None:
        return None
    try:
        with explaining_hub("sampling.model", sampling.model):
            sibling = load_sibling(
                editor,
                sampling.model,
                compile_blocks=model.compile,
                quantize=None if model.quantize == "none" else model.quantize,
            )
        policies = LoraPolicies(
            sibling.transformer,
            sibling.lora(
                rank=model.lora_rank, alpha=model.lora_alpha, targets=model.lora_targets or None
            ),
            start=start_of(model, sibling),
            few_steps=lora_for_few_steps(sampling, sibling),
        )
    except ConfigError:
        raise
    except HubError as error:
        raise ConfigError(str(error)) from error
    except (OSError, ValueError) as error:
        raise ConfigError(with_field("sampling.model", error)) from error
    return Sibling(sibling, policies)


def refuse_sharded(sampling: Sampling, how: str) -> None:
    """Refuse few-step samplers under sharding.

    Raises:
        ConfigError: a few-step sampler is configured and weights are sharded.
    """
    if sampling.few_steps is not None and how != "none":
        raise ConfigError(
            f"{sampling.few_steps}: expected None under {how}, where no sampler for few steps has "
            "been tested; every rank must hold the model whole"
        )


def lora_for_few_steps(sampling: Sampling, editor: Editor) -> dict[str, Tensor] | None:
    """Read the few-step LoRA of ``sampling.lora``; None if none is configured.

    Raises:
        ConfigError: the file is not a LoRA of the transformer.
    """
    if sampling.lora is None:
        return None
    try:
        return read_lora(type(editor.pipeline), sampling.lora)
    except (OSError, ValueError) as error:
        raise ConfigError(f"sampling.lora: {error}") from error


def start_of(model: Model, editor: Editor) -> Start | None:
    """Return the LoRA that policies start from; None: they start from the base model."""
    if model.lora is None:
        return None
    weights = read_lora(type(editor.pipeline), model.lora)
    return Start(weights, frozen=model.lora_start == "freeze", reference=model.lora_reference)


def with_field(field: str, error: Exception) -> str:
    """Prefix an error's message with the field at fault, ``field`` or ``sampling.lora``."""
    prefix, _, rest = str(error).partition(": ")
    return f"sampling.lora: {rest}" if prefix == "few_steps" else f"{field}: {error}"


def guidance_call(scale: float, family: Family) -> dict[str, float]:
    """Return the guidance scale as an argument of the pipeline call.

    Raises:
        ValueError: the pipeline has no guidance, and the scale is not 1.
    """
    if family.guidance is None and scale != 1:
        raise ValueError(
            f"guidance: expected 1 for a {family.pipeline.__name__}, which has no scale of "
            f"guidance, got {scale}"
        )
    return {} if family.guidance is None else {family.guidance: scale}


def sampling_call(sampling: Sampling, family: Family) -> dict[str, Any]:
    """Return the pipeline arguments that rollouts override.

    Raises:
        ValueError: the pipeline has no guidance, and the scale is not 1.
    """
    return {} if sampling.guidance is None else guidance_call(sampling.guidance, family)
