"""The lint of prose: ``python -m docs.check_prose``, a part of ``make lint``.

Docstrings begin with a verb or a noun, and pages use the field's words. Spelling is codespell's.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("mteditflow", "examples", "benchmarks", "docs")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "examples/**/*.md")
START = re.compile(r"(Of|What|Who)\b")
COINED = {  # a coined phrase, and the field's
    r"\bas it came\b": "untrained",
    r"\bmade anew\b": "sampled",
    r"\bgroups that teach\b": "informative groups",
    r"\bis told of\b": "is documented",
    r"\bhears\b": "receives",
    r"\bno matter for\b": "independent of",
}


def faults(root: Path = ROOT) -> Iterator[str]:
    """Yield one line for each docstring or phrase to rewrite: file, line and what is wrong."""
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            name = path.relative_to(root)
            for line, words in docstrings(text):
                if START.match(words):
                    yield f"{name}:{line}: expected a verb or a noun first, got {words[:40]!r}"
            if path != Path(__file__).resolve():
                yield from _coined(str(name), text)
    for pattern in PAGES:
        for path in sorted(root.glob(pattern)):
            yield from _coined(str(path.relative_to(root)), path.read_text(encoding="utf-8"))


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and words of each docstring of a module, those after fields included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            words = node.value.value
            if isinstance(words, str) and words.strip():
                yield node.lineno, words.strip()


def _coined(name: str, text: str) -> Iterator[str]:
    for line, words in enumerate(text.splitlines(), start=1):
        for phrase, better in COINED.items():
            if found := re.search(phrase, words, re.IGNORECASE):
                yield f"{name}:{line}: expected {better!r} in place of {found[0]!r}"


if __name__ == "__main__":
    found = list(faults())
    sys.stdout.writelines(f"{line}\n" for line in found)
    sys.exit(bool(found))
