"""Predicted cost of a training run: memory by phase, FLOPs, least hours, and how to make it fit.

Transformers with adapters are run on fake tensors (``simulate``), which needs neither weights nor a
GPU. ``mteditflow budget PRESET`` does it for a preset of the trainer. Each name is imported on its
own, on first use. Stored costs of known models need only torch, simulation needs
``mteditflow[diffusers]``.
"""

from typing import TYPE_CHECKING

from mteditflow._lazy import lazy

if TYPE_CHECKING:
    from mteditflow.budget.advice import Alternative, alternatives
    from mteditflow.budget.compute import GPUS, Work, least_hours, work
    from mteditflow.budget.costs import Case, Costs, ModelCosts
    from mteditflow.budget.inputs import Shape
    from mteditflow.budget.local import find_model, pixels_of_latent
    from mteditflow.budget.models import MODELS, PIPELINES, Model
    from mteditflow.budget.passes import Passes, count_passes
    from mteditflow.budget.plan import Phase, Plan, Sampler, peak, phases, verdict
    from mteditflow.budget.report import Budget
    from mteditflow.budget.samplers import count_lora, find_sibling
    from mteditflow.budget.simulation import count_blocks, simulate
    from mteditflow.budget.stored import case_of, costs_of
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "Alternative": ".advice",
            "Budget": ".report",
            "Case": ".costs",
            "Costs": ".costs",
            "GPUS": ".compute",
            "MODELS": ".models",
            "PIPELINES": ".models",
            "Model": ".models",
            "ModelCosts": ".costs",
            "Passes": ".passes",
            "Phase": ".plan",
            "Plan": ".plan",
            "Sampler": ".plan",
            "Shape": ".inputs",
            "Work": ".compute",
            "alternatives": ".advice",
            "case_of": ".stored",
            "costs_of": ".stored",
            "count_passes": ".passes",
            "find_model": ".local",
            "least_hours": ".compute",
            "peak": ".plan",
            "phases": ".plan",
            "pixels_of_latent": ".local",
            "count_blocks": ".simulation",
            "count_lora": ".samplers",
            "find_sibling": ".samplers",
            "simulate": ".simulation",
            "verdict": ".plan",
            "work": ".compute",
        },
        "diffusers",
    )

__all__ = [
    "GPUS",
    "MODELS",
    "PIPELINES",
    "Alternative",
    "Budget",
    "Case",
    "Costs",
    "Model",
    "ModelCosts",
    "Passes",
    "Phase",
    "Plan",
    "Sampler",
    "Shape",
    "Work",
    "alternatives",
    "case_of",
    "costs_of",
    "count_blocks",
    "count_lora",
    "count_passes",
    "find_model",
    "find_sibling",
    "least_hours",
    "peak",
    "phases",
    "pixels_of_latent",
    "simulate",
    "verdict",
    "work",
]
