"""The table of supported pipelines: ``python -m docs.render_support`` writes support.md.

It runs tests/pipelines/test_support.py and writes what those tests reported; where one fails,
nothing is written.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import diffusers

PAGE = Path(__file__).parent / "support.md"
TESTS = "tests/pipelines/test_support.py"

INTRODUCTION = """\
# Pipelines that are supported

Made by `python -m docs.render_support` with diffusers {version}; do not edit. It runs
`tests/pipelines/test_support.py` and writes down what those tests saw.

Nothing is patched, and nothing is known of a pipeline's class: `Recorder` recognises by equality of
tensors where a call holds the noisy sample, how it tells the time, and how the outputs become the
scheduler's velocity (`mteditflow/pipelines/`: `recognize.py`, `guidance.py`). Other
pipelines that talk to their transformer in one of these ways are supported without being listed;
all others are refused with the reason.

Each row is a tiny, randomly initialised pipeline of the real classes, float32 on a CPU: two
trajectories, two turns, two stochastic steps each. Every form that differs from FLUX's is recorded
in bfloat16 and in inference mode too, and must be refused when velocity, sample or prompts are
changed at a late step (`tests/pipelines/test_forms.py`).

- **calls per step**: forward passes per denoising step, in the rollout as in a replay.
- **how the sample lies**: the argument of the transformer that holds the noisy sample.
- **text**: the real encoders that prompts go through, or embeddings given to the call.
- **ratio**: of the replayed to the recorded likelihood of every step, exactly 1 in the batch in
  which it was sampled; then with rows of all trajectories, turns and steps mixed.
- **GRPO, NFT**: three optimiser steps on LoRA adapters, on the rows of one rollout.
- **output under an ODE**: the recorded call's image or video beside the plain call's.

"""

REFUSALS = """
## Refused, with the reason as the error

"""


def main() -> None:
    """Run the tests and write the page."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-k", "not page", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", TESTS, *options], check=True)
        seen = read_report(report)
    refused = {name: told for name, told in seen.items() if "error" in told}
    cases = {tuple(name.split("-", 1)): told for name, told in seen.items() if name not in refused}
    columns = list(dict.fromkeys(column for told in cases.values() for column in told))
    rows = [[f"`{name}`", kind, *told.values()] for (name, kind), told in cases.items()]
    page = INTRODUCTION.format(version=diffusers.__version__)
    page += markdown(["pipeline", "guidance", *columns], rows) + REFUSALS
    page += markdown(["what", "error"], [[name, told["error"]] for name, told in refused.items()])
    PAGE.write_text(page, encoding="utf-8")


def read_report(report: Path) -> dict[str, dict[str, str]]:
    """What the tests told of each of their cases, by its id, in the order of the tests."""
    told: dict[str, dict[str, str]] = {}
    for test in ElementTree.parse(report).iter("testcase"):
        case = re.search(r"\[(.*)\]", test.attrib["name"])
        if case:
            facts = {p.attrib["name"]: p.attrib["value"] for p in test.iter("property")}
            told.setdefault(case[1], {}).update(facts)
    return told


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
