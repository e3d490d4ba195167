"""The paper's findings, looked for in the shapes world, and written into ``docs/findings.md``.

    python examples/ablations.py --workers 2
    python examples/ablations.py --short

The table of what is compared is ``findings/settings.py``. Runs that are already there are kept, and
one that was cut off goes on, so it can be stopped and started again. The page is written from the
seeds that are complete.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import diffusers
import torch
import transformers
import typer
from findings.page import write_page
from findings.running import FULL, SHORT, Ablations


def main(
    short: Annotated[bool, typer.Option("--short", help="Minutes: one seed, few rounds.")] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Runs at a time, a thread each; 0: only write the page.")
    ] = 1,
    runs: Annotated[Path | None, typer.Option(help="Where the runs are kept.")] = None,
    docs: Annotated[Path | None, typer.Option(help="Where page and figures go.")] = None,
) -> None:
    """Run what is missing, then write the page and its figures."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    runs = runs or Path("runs/ablations-short" if short else "runs/ablations")
    ablations = Ablations(runs, SHORT if short else FULL)
    failures = ablations.run_all(workers) if workers else []
    if ablations.complete_seeds():
        command = "python examples/ablations.py" + (" --short" if short else "")
        page = write_page(ablations, docs or (runs if short else Path("docs")), command=command)
        print(f"Written: {page}")
    else:
        failures.append(f"{runs}: no seed is complete, so there is no page")
    print(f"Missing: {len(ablations.missing())} of {ablations.total} runs")
    if failures:
        sys.exit("\n".join(f"error: {failure}" for failure in failures))


if __name__ == "__main__":
    typer.run(main)
