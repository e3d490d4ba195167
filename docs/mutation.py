"""Mutation testing of floors 0 to 3: ``python -m docs.mutation`` runs it, writes mutation.md.

mutmut works on a copy of the core and its tests in ``build/mutation``; a mutant once killed is not
checked again until its function changes. Survivors' reasons are kept by hand in
``mutation_reasons.json``: pairs of a regular expression, matched against the whole of
``function: before -> after``, and a reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import chdir
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant

DOCS = Path(__file__).parent.resolve()
ROOT = DOCS.parent
KILLED, SURVIVED, UNCHECKED = "killed", "survived", "unchecked"
# Verdict by pytest's exit status; any other status is a mutant that hung or crashed: killed.
VERDICTS = {0: SURVIVED, 5: SURVIVED, 33: SURVIVED, None: UNCHECKED, 2: UNCHECKED}
GOAL = 0.9
NO_REASON = "NO REASON GIVEN"

HEADER = """\
# Mutation testing of floors 0 to 3

Made by `make mutation`; do not edit. mutmut changes each line of the core in turn, by all its
operators, and runs the tests that reach that line. Tests that compile and tests of more than a few
seconds are left out, and each property gets 20 fixed examples, so the whole suite kills more than
is counted here. Functions under `@torch.no_grad()`, which mutmut would pass over, are included by
moving the decorator below them in the copy it works on; methods under a decorator are not. Reasons
for survivors are in `mutation_reasons.json`.
"""


def prepare(folder: Path, also: tuple[str, ...] = ()) -> None:
    """Copy what mutmut needs, and move decorators to where mutmut accepts them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("mteditflow", "tests", "pyproject.toml", "README.md", *also):
        source = ROOT / name
        if source.is_dir():
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / source.name, dirs_exist_ok=True, ignore=unwanted)
        else:
            shutil.copy(source, folder)
    for module in (folder / "mteditflow").rglob("*.py"):
        source = module.read_text()
        names = re.findall(r"^@torch\.no_grad\(\)\ndef (\w+)", source, flags=re.MULTILINE)
        below = "".join(f"\n\n{name} = torch.no_grad()({name})\n" for name in names)
        module.write_text(re.sub(r"^@torch\.no_grad\(\)\n", "", source, flags=re.MULTILINE) + below)


def forget_survivors(folder: Path) -> None:
    """Mark survivors as unchecked, and drop the record of which test reaches which function."""
    (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
    for meta in (folder / "mutants").rglob("*.meta"):
        content = json.loads(meta.read_text())
        codes = content["exit_code_by_key"]
        codes.update({name: None for name, code in codes.items() if code in VERDICTS})
        meta.write_text(json.dumps(content))


def mutate(folder: Path, processes: int, only: list[str]) -> None:
    """Run mutmut on the mutants that fit a pattern; it goes on where it was interrupted."""
    environment = os.environ | {"HYPOTHESIS_PROFILE": "mutation", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(processes), *only]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def stamp() -> str:
    """Return today's date and the versions that a result depends on."""
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    versions = ", ".join(f"{name} {version(name)}" for name in ("mutmut", "torch", "hypothesis"))
    return f"{today}; {versions}, python {platform.python_version()}"


def verdicts(folder: Path) -> dict[str, dict[str, str]]:
    """Return verdicts by module and mutant; modules without mutants are left out."""
    found = {}
    for meta in sorted((folder / "mutants").rglob("*.meta")):
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        if codes:
            module = meta.relative_to(folder / "mutants").with_suffix("").as_posix()
            found[module] = {name: VERDICTS.get(code, KILLED) for name, code in codes.items()}
    return found


def change(folder: Path, module: str, mutant: str) -> str:
    """Return a mutant's change, as ``function: before -> after``."""
    with chdir(folder):
        lines = get_diff_for_mutant(mutant, path=Path(module)).splitlines()[3:]
    before, after = (
        " ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+"
    )
    function = mutant.rpartition("__mutmut_")[0].rpartition(".")[2].removeprefix("x_")
    return f"{function.replace('xǁ', '').replace('ǁ', '.')}: {before} -> {after}"


def reason(text: str) -> str:
    """Return why a mutant may survive: the first reason whose pattern matches the change."""
    pairs = json.loads((DOCS / "mutation_reasons.json").read_text())
    return next((why for pattern, why in pairs if re.fullmatch(pattern, text)), NO_REASON)


def render(folder: Path) -> Iterator[str]:
    """Yield the lines of the page."""
    results = verdicts(folder)
    yield HEADER
    yield f"{stamp()}.\n"
    yield "| module | mutants | killed | survived | not checked | killed |"
    yield "|---|--:|--:|--:|--:|--:|"
    for module, found in results.items():
        yield _row(f"`{module}`", Counter(found.values()))
    yield _row("all", _total(folder))
    yield "\n## Survivors"
    for module, found in results.items():
        survivors = [name for name, verdict in found.items() if verdict == SURVIVED]
        if survivors:
            yield f"\n### `{module}`\n"
        for text in sorted({change(folder, module, name) for name in survivors}):
            yield f"- `{text}`\\\n  {reason(text)}"


def _total(folder: Path) -> Counter[str]:
    return Counter(v for found in verdicts(folder).values() for v in found.values())


def _row(name: str, counts: Counter[str]) -> str:
    checked = counts[KILLED] + counts[SURVIVED]
    share = f"{counts[KILLED] / checked:.1%}" if checked else ""
    numbers = (counts.total(), counts[KILLED], counts[SURVIVED], counts[UNCHECKED], share)
    return f"| {name} | {' | '.join(map(str, numbers))} |"


def main() -> bool:
    """Run and write the page; return whether the goal is met and every survivor has a reason."""
    parser = argparse.ArgumentParser(description="Mutation testing of floors 0 to 3.")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutation")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="PATTERN", help="as mteditflow.losses.*"
    )
    parser.add_argument("--page-only", action="store_true", help="write the page, run nothing")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if not options.page_only:
        prepare(folder)
        forget_survivors(folder)
        mutate(folder, options.processes, options.only)
    page = "\n".join(render(folder)) + "\n"
    (DOCS / "mutation.md").write_text(page)
    total = _total(folder)
    sys.stdout.write(f"{total[KILLED]} killed, {total[SURVIVED]} survived: docs/mutation.md\n")
    enough = total[KILLED] >= GOAL * (total[KILLED] + total[SURVIVED])
    return enough and not total[UNCHECKED] and NO_REASON not in page


if __name__ == "__main__":
    raise SystemExit(not main())
