"""Stored costs of known models, and simulation for all others."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mteditflow.budget.costs import Case, Costs, EncoderCosts, ModelCosts, VaeCosts
from mteditflow.budget.inputs import Shape
from mteditflow.budget.models import ENCODERS, MODELS, VAES, Model, Part

STORED = Path(__file__).with_name("costs.json")


@cache
def stored() -> dict[str, Any]:
    """Return the stored costs, which ``python -m docs.render_budget --costs`` writes."""
    values: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return values


def case_of(
    model: Model,
    shape: Shape,
    *,
    rank: int,
    branches: int,
    targets: tuple[str, ...] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """Return the case of a model; by default ``targets`` are those of its pipeline."""
    behavior = model.behavior
    chosen = targets or behavior.targets
    return Case(behavior.transformer, model.config, shape, chosen, rank, branches, dtype)


def key_of(name: str, case: Case) -> str:
    """Return the key under which a model's costs are stored."""
    shape = case.shape
    references = f"{shape.references} x {shape.reference_resolution}" if shape.references else "0"
    return (
        f"{name}, {shape.resolution} px, {shape.text} text tokens, references {references}, "
        f"rank {case.rank}, branches {case.branches}"
    )


def costs_of(model: Model, case: Case) -> ModelCosts:
    """Return the stored costs of a model; parts without any are simulated, in seconds per part.

    Args:
        model: the model.
        case: case of its transformer, from ``case_of``.

    Raises:
        ValueError: a part cannot be built, or cannot be run at these sizes.
    """
    try:
        return ModelCosts(
            _row_costs(model, case),
            _vae_costs(model.vae, case.shape.resolution, case.dtype),
            _encoder_costs(model.encoders, case.dtype),
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"model: {model.name} cannot be run ({error})") from error


def _row_costs(model: Model, case: Case) -> Costs:
    # Costs are stored for default targets and bfloat16 only.
    if case == case_of(model, case.shape, rank=case.rank, branches=case.branches):
        for name, known in MODELS.items():  # a distilled model and its base have one transformer
            alike = (known.pipeline, known.config) == (model.pipeline, model.config)
            alike &= known.token == case.shape.token  # the key has no token size
            found = stored()["rows"].get(key_of(name, case)) if alike else None
            if found is not None:
                return Costs(**found)
    from mteditflow.budget.simulation import simulate

    return simulate(case)


def _vae_costs(part: Part, resolution: int, dtype: torch.dtype) -> VaeCosts:
    name = next((name for name, known in VAES.items() if known == part), None)
    found = stored()["vaes"].get(f"{name}, {resolution} px") if dtype is torch.bfloat16 else None
    if found is not None:
        return VaeCosts(**found)
    from mteditflow.budget.components import simulate_vae

    return simulate_vae(part, resolution=resolution, dtype=dtype)


def _encoder_costs(parts: tuple[Part, ...], dtype: torch.dtype) -> EncoderCosts:
    costs = [_encoder(part, dtype) for part in parts]
    weights, linear = sum(x.weights for x in costs), sum(x.linear for x in costs)
    # All encoders are on the device together, but run one after another.
    return EncoderCosts(weights, linear, max((x.encode for x in costs), default=0))


def _encoder(part: Part, dtype: torch.dtype) -> EncoderCosts:
    name = next((name for name, known in ENCODERS.items() if known == part), None)
    if name is not None and dtype is torch.bfloat16:
        return EncoderCosts(**stored()["encoders"][name])
    from mteditflow.budget.components import simulate_encoder

    return simulate_encoder(part, dtype=dtype)
