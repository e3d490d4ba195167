"""What scheduler and recorder do not support: refused with a reason, never ignored."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

_UNSUPPORTED: dict[str, tuple[float | None, str]] = {
    "s_churn": (0.0, "flow-matching steps do not churn"),
    "s_tmin": (0.0, "flow-matching steps do not churn"),
    "s_tmax": (float("inf"), "flow-matching steps do not churn"),
    "s_noise": (1.0, "the solver decides how much noise a step adds"),
    "generator": (None, "noise comes from the scheduler's generators, one per trajectory"),
    "per_token_timesteps": (None, "a transition needs one flow time per sample"),
}


def check_pipeline(pipeline: Any) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a pipeline whose steps are those of one transformer along a flow."""
    scheduler = getattr(pipeline, "scheduler", None)
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        shift = getattr(scheduler, "config", {}).get("flow_shift", 1.0)
        raise ValueError(
            "pipeline: expected one with a FlowMatchEulerDiscreteScheduler, got "
            f"{type(pipeline).__name__} with {type(scheduler).__name__}; if its model is a flow, "
            "as Wan's is, set pipe.scheduler = FlowMatchEulerDiscreteScheduler("
            f"shift={shift}) first"
        )
    boundary = pipeline.config.get("boundary_ratio")
    if boundary is not None:
        raise ValueError(
            "pipeline: expected one transformer for all steps, but boundary_ratio="
            f"{boundary} hands those below sigma {boundary} to transformer_2 (Wan 2.2 A14B); a "
            "replay calls one model"
        )
    return scheduler


def check_config_source(config: Mapping[str, Any]) -> None:
    """Refuse the configuration of a scheduler that does not integrate dx/dsigma = velocity."""
    ours = ("FlowMatchEulerDiscreteScheduler", "FlowMatchSDEScheduler")
    source = config.get("_class_name")
    if source is None:
        known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        foreign = sorted(key for key in config if key not in known and not key.startswith("_"))
        source = f"scheduler with {', '.join(foreign)}" if foreign else ours[0]
    if source not in ours:
        raise ValueError(
            f"config: expected that of a FlowMatchEulerDiscreteScheduler, got that of a {source}"
        )


def check_config_options(config: Mapping[str, Any]) -> None:
    """Refuse options of the configuration under which a step is not that of a solver."""
    for option in ("stochastic_sampling", "invert_sigmas"):
        if config.get(option, False):
            raise ValueError(
                f"config: {option}=True is not supported: its steps are not those of a solver"
            )


def check_step_options(**options: Any) -> None:
    """Refuse options of ``step`` that would be ignored."""
    for name, value in options.items():
        default, reason = _UNSUPPORTED[name]
        if value is not default and (default is None or value != default):
            raise ValueError(f"{name}: expected its default {default}, because {reason}")
