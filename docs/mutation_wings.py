"""Mutation testing of the wings: ``python -m docs.mutation_wings rewards`` checks a sample of one.

A seeded sample of the mutants of a wing is run, one at a time, against that wing's tests. A wing's
result is kept in ``mutation_wings.json``, from which the page of all wings is made, so that wings
can be checked one by one. Reasons for survivors: see ``docs/mutation.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.mutation import (
    DOCS,
    GOAL,
    KILLED,
    NO_REASON,
    ROOT,
    SURVIVED,
    UNCHECKED,
    change,
    mutate,
    prepare,
    reason,
    stamp,
    verdicts,
)

# Wing -> the tests that are to notice its mutants.
TESTS = {
    "chains": ["tests/chains", "tests/test_image_files.py"],
    "evaluation": ["tests/evaluation", "tests/test_evaluate.py", "tests/flux/test_scorers.py"],
    "pipelines": ["tests/pipelines"],
    "planner": ["tests/planner"],
    "rewards": ["tests/rewards"],
    "training": ["tests/training", "tests/flux/test_updating.py"],
}
# uvicorn takes what mutmut puts around an application's own async call for none.
UNTOUCHED = {"rewards": ["mteditflow/rewards/server/guarding.py"]}
# schemathesis keeps a thread for all its calls; a process forked from one with it waits for ever.
WITHOUT = {
    "rewards": [
        "tests/rewards/server/test_server_fuzz.py::test_what_the_schema_says_is_what_the_server_does"
    ]
}
QUICK_TESTS = "not compile and not slow and not long"
READ_BY_TESTS = ("examples", "benchmarks", "docs", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile")
RECORD = DOCS / "mutation_wings.json"
PAGE = DOCS / "mutation_wings.md"

HEADER = """\
# Mutation testing of the wings

Made by `make mutation-of WING=rewards` and the like, one wing at a time; do not edit. A seeded
sample of the mutants of a wing is run, one at a time, against the wing's own tests. Tests of more
than a few seconds are left out: the trainer's long tests, which kill more, do not count. Reasons
for survivors are in `mutation_reasons.json`.
"""
MAKE_MUTANTS = """\
from mutmut import __main__ as mutmut
mutmut.makedirs("mutants", exist_ok=True)
mutmut.copy_src_dir(), mutmut.copy_also_copy_files(), mutmut.setup_source_paths()
mutmut.create_mutants(1)
"""


def configure(folder: Path, wing: str) -> None:
    """Give the copy of the project mutmut's settings for one wing."""
    settings = {
        "source_paths": ["mteditflow"],
        "only_mutate": [f"mteditflow/{wing}/*"],
        "do_not_mutate": UNTOUCHED.get(wing, []),
        "also_copy": [*READ_BY_TESTS, "README.md"],
        "pytest_add_cli_args_test_selection": TESTS[wing],
        "pytest_add_cli_args": [
            "-m",
            QUICK_TESTS,
            "-pno:cacheprovider",
            *(f"--deselect={test}" for test in WITHOUT.get(wing, [])),
        ],
        "timeout_multiplier": 30,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    project = (ROOT / "pyproject.toml").read_text().partition("[tool.mutmut]")[0]
    (folder / "pyproject.toml").write_text("\n".join([project + "[tool.mutmut]", *lines, ""]))


def sample(folder: Path, count: int, seed: int) -> list[str]:
    """Write all mutants of the wing; return the sorted names of a random sample."""
    subprocess.run(
        [sys.executable, "-c", MAKE_MUTANTS], cwd=folder, check=True, capture_output=True
    )
    names = sorted(name for found in verdicts(folder).values() for name in found)
    return sorted(random.Random(seed).sample(names, min(count, len(names))))


def result(folder: Path, drawn: list[str]) -> dict[str, Any]:
    """Return counts of verdicts on the sampled mutants, and the changes of the survivors."""
    found = {
        name: (module, verdict)
        for module, of_module in verdicts(folder).items()
        for name, verdict in of_module.items()
    }
    counts = {
        verdict: sum(found[name][1] == verdict for name in drawn)
        for verdict in (KILLED, SURVIVED, UNCHECKED)
    }
    survivors = [(found[name][0], name) for name in drawn if found[name][1] == SURVIVED]
    changes = {f"{module}: {change(folder, module, name)}" for module, name in survivors}
    return {"mutants": len(found), "drawn": len(drawn), **counts, "survivors": sorted(changes)}


def render(record: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the page of all wings checked so far."""
    yield HEADER
    columns = ("mutants", "drawn", KILLED, SURVIVED, UNCHECKED)
    yield f"| wing | {' | '.join(columns)} | seed | checked |"
    yield "|---|--:|--:|--:|--:|--:|--:|---|"
    for wing, kept in record.items():
        numbers = " | ".join(str(kept[column]) for column in (*columns, "seed"))
        yield f"| `{wing}` | {numbers} | {kept['checked']} |"
    for wing, kept in record.items():
        yield f"\n## Survivors in `{wing}`\n"
        for text in kept["survivors"] or ["none"]:
            yield f"- `{text}`\\\n  {why(text)}" if kept["survivors"] else "None."


def why(survivor: str) -> str:
    """Return why a mutant may survive; reasons match its change without the module's name."""
    return reason(survivor.partition(": ")[2])


def main() -> bool:
    """Check a wing; return whether the goal is met and every survivor has a reason."""
    parser = argparse.ArgumentParser(description="Mutation testing of a wing.")
    parser.add_argument("wing", choices=sorted(TESTS))
    parser.add_argument("--sample", type=int, default=100, help="mutants drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--page-only", action="store_true", help="write the page, run nothing")
    options = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if not options.page_only:
        folder = ROOT / "build" / f"mutation-{options.wing}"
        prepare(folder, READ_BY_TESTS)
        configure(folder, options.wing)
        drawn = sample(folder, options.sample, options.seed)
        mutate(folder, options.processes, drawn)
        checked = {"seed": options.seed, "checked": stamp()}
        record[options.wing] = result(folder, drawn) | checked
        RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=2) + "\n")
    PAGE.write_text("\n".join(render(record)) + "\n")
    kept = record[options.wing]
    reasons = NO_REASON not in [why(text) for text in kept["survivors"]]
    return kept[KILLED] >= GOAL * kept["drawn"] and not kept[UNCHECKED] and reasons


if __name__ == "__main__":
    raise SystemExit(not main())
