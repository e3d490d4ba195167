"""The table of predicted costs: ``python -m docs.render_budget`` writes it into training.md.

``--costs`` first simulates the models whose costs are not stored yet, many minutes on one core, and
writes the results into the package (``mteditflow/budget/costs.json``), with the versions of the
libraries that they hold for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mteditflow_examples.budget import plan_of
from mteditflow_examples.flux.command_line import PRESETS, parse
from mteditflow_examples.flux.config import Config
from mteditflow_examples.pictures.editor import build_editor
from mteditflow_examples.shapes.editor import Family
from mteditflow_examples.shapes.files import write_world

from mteditflow.budget import GPUS, least_hours, phases, verdict, work
from mteditflow.budget.models import ENCODERS, MODELS, VAES
from mteditflow.budget.plan import GIB
from mteditflow.budget.stored import STORED, case_of, key_of

SIZES = ((512, 32), (512, 64), (1024, 32))  # pixels, rank of the adapters
GUIDANCE = 4.0
PAGE = Path(__file__).with_name("training.md")
START, END = "<!-- budget: start -->\n", "<!-- budget: end -->\n"
CARDS = (8, 12, 16, 24, 32, 48, 80, 141)  # GiB
COLUMNS = (
    "preset", "text encoders, GiB", "sampling, GiB", "update, GiB", "smallest card, GiB",
    "F a trajectory", "PFLOP a round", "H100 hours per 100 rounds at 40%, at least",
)  # fmt: skip
LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def simulate_missing() -> None:
    """Simulate what is not stored, or everything if a library's version has changed."""
    from mteditflow.budget.components import simulate_encoder, simulate_vae
    from mteditflow.budget.simulation import simulate

    versions = {name: version(name) for name in LIBRARIES}
    values = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    if values.get("versions") != versions:
        values = {"versions": versions, "rows": {}, "vaes": {}, "encoders": {}}

    def add(section: str, key: str, compute: Callable[[], Any]) -> None:
        if key not in values[section]:
            values[section][key] = asdict(compute())
            text = json.dumps(values, indent=1, sort_keys=True)
            STORED.write_text(f"{text}\n", encoding="utf-8")
            sys.stderr.write(f"{key}\n")

    for name, part in ENCODERS.items():
        add("encoders", name, partial(simulate_encoder, part, dtype=torch.bfloat16))
    for resolution, rank in SIZES:
        for name, part in VAES.items():
            run = partial(simulate_vae, part, resolution=resolution, dtype=torch.bfloat16)
            add("vaes", f"{name}, {resolution} px", run)
        for model in MODELS.values():
            shape, branches = model.behavior.shape(resolution), model.branches(GUIDANCE)
            case = case_of(model, shape, rank=rank, branches=branches)
            add("rows", key_of(model.name, case), partial(simulate, case))


def table(world: Callable[[str], Path] | None = None) -> str:
    """Return the table of presets as Markdown.

    Args:
        world: writes the model of a preset whose model is no known one, and returns its folder;
            None leaves such presets out.
    """
    rows = [COLUMNS, ("---", *["--:"] * (len(COLUMNS) - 1))]
    for path in sorted(PRESETS.glob("*.toml")):
        config = parse([path.stem], services=False)
        if config.model.path.startswith("runs/"):
            if world is None:
                continue
            config = parse([path.stem, "--model.path", str(world(path.stem))], services=False)
        rows.append(row(path.stem, config))
    return "".join(f"| {' | '.join(x)} |\n" for x in rows)


def row(preset: str, config: Config) -> tuple[str, ...]:
    """Return the cells of a preset."""
    plan = plan_of(config, gpus=1)
    cost, memory = work(plan), {x.name: x.total / GIB for x in phases(plan)}
    card = next((x for x in CARDS if verdict(plan, x) == "fits"), None)
    numbers = (
        *(_short(memory[name]) for name in ("text encoders", "sampling", "update")),
        "none" if card is None else f"{card}",
        f"{cost.in_forwards:.1f}",
        _short(cost.total * plan.trajectories / 1e15),
        _short(least_hours(plan, GPUS["H100/H200"])),
    )
    return (f"`{preset}`", *numbers)


def _short(value: float) -> str:
    return f"{value:.3g}" if value >= 0.01 else "below 0.01"


def page(text: str, rows: str) -> str:
    """Return training.md with the table.

    Args:
        text: the page with both markers.
        rows: the table.

    Raises:
        ValueError: a marker is missing or there are several.
    """
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{PAGE.name}: expected one {START.strip()} and one {END.strip()}")
    before, _, rest = text.partition(START)
    return before + START + rows + END + rest.partition(END)[2]


def main() -> None:
    """Write the table, after the costs if asked to."""
    if sys.argv[1:] == ["--costs"]:
        simulate_missing()
    with TemporaryDirectory() as folder:

        def world(preset: str) -> Path:
            if preset.startswith("pictures"):
                model = Path(folder) / "pictures"
                if not model.exists():
                    build_editor().save_pretrained(model)
                return model
            family = Family.klein if "klein" in preset else Family.kontext
            place = Path(folder) / family.value
            if not place.exists():
                write_world(place, family, seed=0, counts=(2, 2), turns=1)
            return place / "model"

        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), table(world)), encoding="utf-8")


if __name__ == "__main__":
    main()
