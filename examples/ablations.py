"""Comparisons in the embedded worlds over seeds; each writes a page in ``docs/``.

    python examples/ablations.py findings --workers 2      # the paper's, docs/findings.md
    python examples/ablations.py objectives_tries          # hyperparameters of the next one
    python examples/ablations.py objectives --workers 2    # all objectives, docs/objectives.md
    python examples/ablations.py credit --workers 2        # credit assignment, docs/credit.md
    python examples/ablations.py credit_apart --workers 2  # the same, turns independent
    python examples/ablations.py regions --workers 2       # rewards by region, docs/regions.md
    python examples/ablations.py cost --workers 2          # fewer forward passes, docs/cost.md
    python examples/ablations.py long_chains --workers 2   # twenty turns, docs/long_chains.md
    python examples/ablations.py competent_start           # the same from a competent editor
    python examples/ablations.py findings_pictures         # the paper's, in the world of pictures
    python examples/ablations.py findings --short

Settings are in ``findings/``: ``settings.py``, ``tries.py``, ``objectives.py``, ``credit.py``,
``regions.py``, ``cost.py`` and ``long_chains.py``. Existing runs are kept and interrupted ones
resumed, so the command can be stopped and started again. A run of other options than the setting's
is an error. The page includes only seeds for which all settings are complete.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Protocol

import diffusers
import torch
import transformers
import typer
from mteditflow_examples.findings.cost import COST
from mteditflow_examples.findings.credit import CREDIT, CREDIT_APART
from mteditflow_examples.findings.long_chains import COMPETENT_START, LONG_CHAINS
from mteditflow_examples.findings.long_page import write_long_page
from mteditflow_examples.findings.objectives import OBJECTIVES
from mteditflow_examples.findings.page import write_page
from mteditflow_examples.findings.regions import REGIONS
from mteditflow_examples.findings.running import FULL, SHORT, Ablations
from mteditflow_examples.findings.settings import PAPER, PAPER_IN_PICTURES
from mteditflow_examples.findings.tries import TRIES, write_tries

from mteditflow._command import program
from mteditflow._exits import refusing
from mteditflow._files import require_folder

ALL = (
    PAPER, PAPER_IN_PICTURES, TRIES, OBJECTIVES, CREDIT, CREDIT_APART, REGIONS, COST, LONG_CHAINS,
    COMPETENT_START,
)  # fmt: skip
STUDIES = {study.name: study for study in ALL}


class Write(Protocol):
    """Function that writes a study's page and figures."""

    def __call__(self, ablations: Ablations, docs: Path, *, command: str) -> Path:
        """Write to a folder from the complete seeds; return the page's path."""


WRITERS: dict[str, Write] = {  # the others: write_page
    TRIES.name: write_tries,
    LONG_CHAINS.name: write_long_page,
    COMPETENT_START.name: write_long_page,
}


def main(
    study: Annotated[
        Literal[
            "findings",
            "findings_pictures",
            "objectives_tries",
            "objectives",
            "credit",
            "credit_apart",
            "regions",
            "cost",
            "long_chains",
            "competent_start",
        ],
        typer.Argument(help="Study to run."),
    ],
    short: Annotated[bool, typer.Option("--short", help="Minutes: one seed, few rounds.")] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Concurrent runs, one thread each; 0: only write the page.")
    ] = 1,
    runs: Annotated[Path | None, typer.Option(help="Folder of the runs.")] = None,
    docs: Annotated[Path | None, typer.Option(help="Folder of the page and its figures.")] = None,
) -> None:
    """Run missing settings, then write the page and its figures."""
    chosen = STUDIES[study]
    runs = runs or Path("runs", study + ("-short" if short else ""))
    docs = docs or (runs if short else chosen.docs)
    with refusing():
        require_folder("runs", runs)
        require_folder("docs", docs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    full = {"seeds": chosen.seeds, "rounds": chosen.rounds, "held_out": chosen.chains}
    form = SHORT if short else replace(FULL, **full)
    ablations = Ablations(runs, form, chosen)
    failures = ablations.run_all(workers) if workers else ablations.other_runs()
    if ablations.complete_seeds():
        command = f"python examples/ablations.py {study}" + (" --short" if short else "")
        with refusing():
            page = WRITERS.get(study, write_page)(ablations, docs, command=command)
        print(f"Written: {page}")
    else:
        failures.append(f"{runs}: no seed is complete, so there is no page")
    print(f"Missing: {len(ablations.missing())} of {ablations.total} runs")
    if failures:
        sys.exit("\n".join(f"error: {failure}" for failure in failures))


app = program(main)

if __name__ == "__main__":
    app()
