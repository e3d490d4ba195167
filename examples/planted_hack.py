"""A planted reward hack: a judge that rewards garish colors, without weight on consistency.

    python examples/planted_hack.py runs/hack

Trains the tiny editor of the shapes world with ``GarishJudge`` in place of the exact rewards, and
prints the round of the first drift alarm and of the fall of the true Overall. All evaluations have
the same held-out chains and noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mteditflow._command import OneLineCommand
from mteditflow._exits import refusing
from mteditflow._files import require_folder, write_atomically

SCORER = "mteditflow_examples.shapes.scoring:GarishJudge"
FALL = 5.0  # points of Overall below its best so far: no longer noise

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(cls=OneLineCommand)
def main(
    output: Annotated[Path, typer.Argument(help="Folder of the world and the run.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training.")] = 16,
    every: Annotated[int, typer.Option(min=1, help="Rounds between evaluations.")] = 2,
    chains: Annotated[int, typer.Option(min=1, help="Held-out chains.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Seed of chains, adapters and noise.")] = 0,
) -> None:
    """Train with a hackable judge, and print when the drift alarm comes and when Overall falls."""
    from mteditflow_examples.flux.command_line import parse_or_exit
    from mteditflow_examples.flux.start import main as run_to_the_end
    from mteditflow_examples.shapes.editor import Family
    from mteditflow_examples.shapes.files import write_world
    from mteditflow_examples.train_flux import train

    world, folder = output / "world", output / "run"
    given = {
        "model.path": world / "model",
        "data.chains": world / "train.jsonl",
        "data.held-out": world / "held_out.jsonl",
        "data.groups": 8,
        "data.group-size": 4,
        "rewards.scorer": SCORER,
        "rewards.weights.consistency": 0,
        "training.learning-rate": 3e-3,
        "training.rounds": rounds,
        "training.seed": seed,
        "evaluation.every": every,
        "safety.drift-rounds": 3,  # the hack begins at once
        "output.folder": folder,
        "output.strips-every": 0,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    config = parse_or_exit(["shapes-nft", *words, "--output.trackers"])
    with refusing():
        require_folder("output", output)
        if not (world / "held_out.jsonl").exists():  # written last, so all else is complete
            write_world(world, Family.kontext, seed=seed, counts=(480, chains), turns=3)
    run_to_the_end(train, config)
    print(table(folder))


def table(folder: Path) -> str:
    """Return a table of a run by round with a one-line verdict, and write it to ``hack.md``."""
    from mteditflow.evaluation import Evaluation
    from mteditflow.training import read_metrics

    metrics = {int(line["round"]): line for line in read_metrics(folder / "metrics.jsonl")}
    alarms = json.loads((folder / "report.json").read_text(encoding="utf-8"))["drift_alarms"]
    rows, best, fell = [], -1.0, None
    for path in sorted((folder / "evaluations").glob("round-*.json")):
        evaluation = Evaluation.read(path)
        judged, true = (_overall(evaluation, term) for term in ("following", "honest"))
        best = max(best, true)
        if fell is None and true < best - FALL:
            fell = evaluation.round
        line = metrics.get(evaluation.round, {})
        known = [f"{line[name]:.3f}" if name in line else "" for name in _COLUMNS]
        rows.append([str(evaluation.round), f"{judged:.1f}", f"{true:.1f}", *known])
    head = ["round", "Overall(3) as judged", "true Overall(3)", "reward", "saturation, turn 3"]
    lines = [head, ["--:"] * len(head), *rows]
    text = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    text += f"\n\n{verdict(alarms, fell)}"
    write_atomically(folder / "hack.md", f"{text}\n".encode())
    return text


def verdict(alarms: list[dict[str, Any]], fell: int | None) -> str:
    """Return when the first alarm came, and when the true Overall had fallen."""
    alarm = "No alarm"
    if alarms:
        first = alarms[0]
        low, high = first["low"], first["high"]
        alarm = f"First alarm in round {first['round']}: {first['statistic']} {first['value']:.3f}"
        alarm += f", outside {low:.3f} to {high:.3f}"
    below = f"{FALL:g} points below its best"
    fall = f"is {below} first after round {fell}" if fell else f"never is {below}"
    return f"{alarm}; the true Overall(3) {fall}."


_COLUMNS = ("reward/following", "drift/saturation/turn_3")


def _overall(evaluation: Any, term: str) -> float:
    """Return Overall at the last turn, percent, with another term in place of "following"."""
    from dataclasses import replace

    from mteditflow.evaluation import Provenance

    terms = {"following": evaluation.terms[term], "consistency": evaluation.terms["consistency"]}
    return float(replace(evaluation, terms=terms, provenance=Provenance()).score)


if __name__ == "__main__":
    app()
