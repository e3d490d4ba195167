"""Results of the rewards' benchmarks: sections of tables as JSON, and the page made from them.

A section is a mapping: ``about`` (a paragraph), ``environment`` (as of ``report.environment``) and
``tables``, each with ``columns`` and ``rows`` of numbers and words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEADER = """\
# Benchmarks of the rewards

Made by `python -m benchmarks.judge_client` and its like; do not edit. Servers run in processes of
their own on the loopback of the same machine.
"""


def write(
    folder: Path,
    name: str,
    section: Mapping[str, Any],
    *,
    page: str = "rewards",
    header: str = HEADER,
) -> None:
    """Replace one section in the JSON of a page, and render all of them anew as Markdown."""
    path = folder / f"{page}.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[name] = section
    path.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
    (folder / f"{page}.md").write_text(render(everything, header))


def render(everything: Mapping[str, Mapping[str, Any]], header: str = HEADER) -> str:
    """The whole page."""
    return "\n".join([header, *(_section(*item) for item in sorted(everything.items()))])


def _section(name: str, section: Mapping[str, Any]) -> str:
    about = section["environment"]
    lines = [
        f"## {name}",
        "",
        f"{about['date']}; {about['device']}; mteditflow {about['mteditflow']}, python "
        f"{about['python']}. {section['about']}",
        "",
    ]
    for table in section["tables"]:
        lines += [_row(table["columns"]), "|---" + "|--:" * (len(table["columns"]) - 1) + "|"]
        lines += [*(_row(row) for row in table["rows"]), ""]
    return "\n".join(lines)


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(f'{x:.3g}' if isinstance(x, float) else str(x) for x in cells)} |"
