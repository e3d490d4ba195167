"""Hyperparameters of the objectives by one protocol: four tries each, on a seed of their own.

A method is tried with two values of its main hyperparameter, the paper's and one for models this
small, and with each at two learning rates. The try with the highest Overall(3) is what the study of
objectives compares; ties go to the first. The seed of the tries is none of that study's.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mteditflow._files import write_atomically
from mteditflow.training.report import PACKAGES

from .results import at_last
from .running import Ablations
from .study import Finding, Setting, Study

FILE = Path(__file__).with_name("tries.json")
SEED = 10
RATES = (1e-3, 2e-3)
CONSISTENCY = "rewards.weights.consistency"


@dataclass(frozen=True)
class Method:
    """An objective with its options and the values that are tried.

    Attributes:
        label: name in tables.
        values: two values of its main hyperparameter, the paper's first; each a mapping of the
            options that make it up.
        options: options that every try shares.
        preset: name of the preset.
    """

    label: str
    values: tuple[Mapping[str, object], Mapping[str, object]]
    options: Mapping[str, object] = field(default_factory=dict)
    preset: str = "shapes-nft"

    def tries(self) -> tuple[Setting, ...]:
        """Return the settings that are tried, the first value at the lower rate first."""
        found = []
        for value in self.values:
            for rate in RATES:
                own = {**self.options, **value, "training.learning_rate": rate}
                found.append(Setting(_label(value, rate), own, self.preset))
        return tuple(found)


def _label(value: Mapping[str, object], rate: float) -> str:
    named = ", ".join(f"{name.partition('.')[2]} {x}" for name, x in value.items())
    return f"{named}, learning rate {rate:g}"


def _named(objective: str, **options: object) -> dict[str, object]:
    return {"objective": objective, **options}


def _clips(clip: float) -> dict[str, object]:
    return {"objective.clip_low": clip, "objective.clip_high": clip}


# The rewards of the NFT preset and no KL, so that the loss alone differs.
REPLAYED = {CONSISTENCY: 0.5, "objective.kl_coef": 0.0}
GRPO = "shapes-grpo"
METHODS = (
    Method("NFT", ({"objective.nft_beta": 1.0}, {"objective.nft_beta": 0.5})),
    Method("NFT, NormGuard", ({"objective.norm_coef": 1.0}, {"objective.norm_coef": 0.1})),
    Method(
        "FlowAWR",
        ({"objective.temperature": 1.0}, {"objective.temperature": 0.5}),
        _named("flow_awr"),
    ),
    Method(
        "FlowAWR, exact",
        ({"objective.temperature": 1.0}, {"objective.temperature": 0.5}),
        _named("flow_awr", **{"objective.form": "exact"}),
    ),
    Method("AWM", (_clips(1e-4), _clips(1e-3)), _named("awm")),
    Method(
        "AWM, Huber",
        (_clips(1e-4), _clips(1e-3)),
        _named("awm", **{"objective.weighting": "huber"}),
    ),
    Method(  # pairs at four flow times are as many rows as the others have
        "DPO",
        ({"objective.dpo_beta": 2000.0}, {"objective.dpo_beta": 200.0}),
        _named("dpo", **{"objective.renoise.levels": 4}),
    ),
    Method(
        "DGPO",
        ({"objective.dgpo_beta": 100.0}, {"objective.dgpo_beta": 10.0}),
        _named("dgpo"),
    ),
    Method("CRD", ({"objective.crd_beta": 1.0}, {"objective.crd_beta": 0.1}), _named("crd")),
    Method("GRPO", (_clips(1e-4), _clips(1e-3)), REPLAYED, GRPO),
    Method("Guard", (_clips(1e-4), _clips(1e-3)), _named("guard", **REPLAYED), GRPO),
    Method(
        "DPPO",
        ({"objective.threshold": 1e-6}, {"objective.threshold": 1e-5}),
        _named("dppo", **REPLAYED),
        GRPO,
    ),
)
TRIES = Study(
    "objectives_tries",
    "Tries of the objectives' hyperparameters",
    METHODS[0].tries()[0],
    "the first try of NFT",
    tuple(
        Finding(method.label.lower().replace(", ", "_"), method.label, method.tries(), ())
        for method in METHODS
    ),
    seeds=(SEED,),
    chains=256,
    docs=FILE.parent,
)


def write_tries(ablations: Ablations, docs: Path, *, command: str) -> Path:
    """Write the Overall(3) of every try of every method on the first complete seed.

    Args:
        ablations: runs of `TRIES`, all of them done.
        docs: folder of the JSON file.
        command: command line that made the runs.

    Returns:
        The file.
    """
    seed, path = ablations.complete_seeds()[0], docs / FILE.name
    found: dict[str, list[dict[str, Any]]] = {}
    for method in METHODS:
        found[method.label] = [
            {
                "try": setting.label,
                "overall": round(at_last(ablations.result(setting, seed).after, "overall"), 2),
            }
            for setting in method.tries()
        ]
    form = ablations.form
    made = {
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {x: version(x) for x in PACKAGES},
        "command": command,
        "seed": seed,
        "rounds": form.rounds,
        "chains": form.held_out,
        "methods": found,
    }
    write_atomically(path, (json.dumps(made, indent=1) + "\n").encode())
    return path


def read_tries(path: Path = FILE) -> dict[str, Any] | None:
    """Return what `write_tries` wrote; None where the tries have not been run."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def chosen(method: Method, tried: Mapping[str, Any] | None) -> Setting:
    """Return the best try of a method under the method's name; the first where none was run.

    Raises:
        ValueError: the tries on file are others than today's.
    """
    settings = method.tries()
    if tried is None:
        best = settings[0]
    else:
        overall = {row["try"]: row["overall"] for row in tried["methods"].get(method.label, ())}
        if list(overall) != [x.label for x in settings]:
            raise ValueError(f"tries.json: expected today's tries of {method.label}, got others")
        best = max(settings, key=lambda x: overall[x.label])
    return Setting(method.label, best.options, best.preset)


def protocol(tried: Mapping[str, Any] | None) -> str:
    """Describe in Markdown how hyperparameters were chosen, and what each try reached."""
    how = (
        "Each method had four tries: two values of its main hyperparameter, the paper's and one "
        f"for models this small, each at learning rates {RATES[0]:g} and {RATES[1]:g}"
    )
    if tried is None:
        return f"{how}. The tries have not been run: the first of each is compared."
    rows = "; ".join(
        f"{name}: " + ", ".join(f"{row['overall']:.1f} ({row['try']})" for row in own)
        for name, own in tried["methods"].items()
    )
    return (
        f"{how}. The highest Overall(3) on {tried['chains']} chains of seed {tried['seed']}, which "
        f"is none of the table's, was taken (`python examples/ablations.py objectives_tries`, "
        f"{tried['date']}). {rows}."
    )
