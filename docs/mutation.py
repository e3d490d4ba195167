"""Write ``mutation.md`` from what ``mutmut run`` left behind: python docs/mutation.py [folder ...].

A folder is one in which mutmut ran (default: this repository); where several hold the same module,
the last one counts. The reasons for survivors are kept by hand in ``mutation_reasons.json``, under
the change that the mutant makes.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import chdir
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant

DOCS = Path(__file__).parent
KILLED, SURVIVED, UNCHECKED = "killed", "survived", "unchecked"
# What pytest's exit status says; anything else is a mutant that hung or crashed: noticed.
VERDICTS = {0: SURVIVED, 5: SURVIVED, 33: SURVIVED, None: UNCHECKED, 2: UNCHECKED}
GOAL = 0.9

HEADER = """\
# Mutation testing of floors 0 to 2

Made by `make mutation` (mutmut breaks every line of the core in turn and runs the tests that reach
it); do not edit. Tests that compile and tests of more than a few seconds are left out, and each
property gets 20 fixed examples, so the whole suite kills more than is counted here. Reasons are in
`mutation_reasons.json`.
"""


def verdicts(folder: Path) -> dict[str, dict[str, str]]:
    """Module -> mutant -> verdict; modules without mutants are left out."""
    found = {}
    for meta in sorted((folder / "mutants").rglob("*.meta")):
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        module = meta.relative_to(folder / "mutants").with_suffix("").as_posix()
        checked = {name: VERDICTS.get(code, KILLED) for name, code in codes.items()}
        if set(checked.values()) - {UNCHECKED}:
            found[module] = checked
    return found


def change(folder: Path, module: str, mutant: str) -> str:
    """What a mutant changes, as ``function: before -> after``."""
    with chdir(folder):
        lines = get_diff_for_mutant(mutant, path=Path(module)).splitlines()[3:]
    sides = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    function = mutant.rpartition("__mutmut_")[0].rpartition(".")[2].removeprefix("x_")
    before, after = sides
    return f"{function.replace('xǁ', '').replace('ǁ', '.')}: {before} -> {after}"


def render(folders: list[Path]) -> Iterator[str]:
    """The page, line by line."""
    reasons = json.loads((DOCS / "mutation_reasons.json").read_text())
    results = {module: (f, found) for f in folders for module, found in verdicts(f).items()}
    yield HEADER
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    versions = ", ".join(f"{name} {version(name)}" for name in ("mutmut", "torch", "hypothesis"))
    yield f"{today}; {versions}, python {platform.python_version()}.\n"
    yield "| module | mutants | killed | survived | not checked | killed |"
    yield "|---|--:|--:|--:|--:|--:|"
    total: Counter[str] = Counter()
    for module, (_, found) in sorted(results.items()):
        counts = Counter(found.values())
        total += counts
        yield _row(f"`{module}`", counts)
    yield _row("all", total)
    yield "\n## Survivors"
    for module, (folder, found) in sorted(results.items()):
        survivors = [name for name, verdict in found.items() if verdict == SURVIVED]
        if survivors:
            yield f"\n### `{module}`\n"
        for text in sorted({change(folder, module, name) for name in survivors}):
            yield f"- `{text}`\\\n  {reasons.get(module, {}).get(text, 'NO REASON GIVEN')}"


def _row(name: str, counts: Counter[str]) -> str:
    checked = counts[KILLED] + counts[SURVIVED]
    share = f"{counts[KILLED] / checked:.1%}" if checked else ""
    numbers = (counts.total(), counts[KILLED], counts[SURVIVED], counts[UNCHECKED], share)
    return f"| {name} | {' | '.join(map(str, numbers))} |"


def main() -> bool:
    """Write the page; return whether enough is killed and every survivor has its reason."""
    folders = [Path(folder).resolve() for folder in sys.argv[1:] or [os.curdir]]
    page = "\n".join(render(folders)) + "\n"
    (DOCS / "mutation.md").write_text(page)
    sys.stdout.write(page)
    total = Counter(v for f in folders for found in verdicts(f).values() for v in found.values())
    return total[KILLED] >= GOAL * (total[KILLED] + total[SURVIVED]) and "NO REASON" not in page


if __name__ == "__main__":
    raise SystemExit(not main())
