"""Sphinx extension: a notebook is a page, with the outputs that it holds.

Nothing is executed: ``python -m docs.render_notebooks`` did.
"""

from __future__ import annotations

import json
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser


class NotebookParser(MystParser):
    """Parses a notebook as the Markdown page that ``page_of`` makes of it."""

    supported = ("ipynb",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Called by Sphinx."""
        super().parse(page_of(json.loads(inputstring)), document)


def page_of(notebook: dict[str, Any]) -> str:
    """Return a notebook as Markdown: code and text in fences, pictures as data addresses."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _fence("python", source))
        parts += [_shown(output) for output in cell.get("outputs", ())]
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return _fence("text", "".join(output.get("text", data.get("text/plain", ()))).rstrip("\n"))


def _fence(language: str, text: str) -> str:
    return f"````{language}\n{text}\n````"


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_source_suffix(".ipynb", "ipynb")
    app.add_source_parser(NotebookParser)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
