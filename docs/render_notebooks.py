"""Execute the notebooks and store what they print and draw: ``python -m docs.render_notebooks``.

The cells of a notebook run in one namespace, from the root of the repository. That needs no kernel,
no server and no package; Jupyter runs the same files. Outputs are stored, so that GitHub and the
site show them without executing anything, and pictures are drawn small. A test executes the cells
again.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from PIL import Image

FOLDER = Path(__file__).parent / "notebooks"
DPI, COLORS = 80, 96


def notebooks() -> list[Path]:
    """All notebooks, by name."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(notebook: dict[str, Any], *, name: str = "notebook") -> dict[str, Any]:
    """Run all code cells of a notebook, in order, and return it with their outputs.

    A cell's outputs are what it printed, its figures, which are closed then, and the value of its
    last expression. The backend of matplotlib becomes ``agg``.

    Raises:
        Exception: what a cell raises; its traceback names the notebook and the cell.
    """
    plt.switch_backend("agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells, number = [], 0
    with torch.random.fork_rng(devices=[]):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                number += 1
                outputs = _run("".join(cell["source"]), namespace, f"{name}[{number}]")
                cell = cell | {"execution_count": number, "outputs": outputs}
                for output in outputs:
                    if output["output_type"] == "execute_result":
                        output["execution_count"] = number
            cells.append(cell)
    return notebook | {"cells": cells}


def _run(source: str, namespace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    body = ast.parse(source, name).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    figures = [plt.figure(number) for number in plt.get_fignums()]
    plt.close("all")
    if isinstance(value, Figure):
        figures.append(value)
    elif value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"output_type": "execute_result", "data": data, "metadata": {}})
    outputs += [{"output_type": "display_data", "data": _png(x), "metadata": {}} for x in figures]
    return outputs


def _png(figure: Figure) -> dict[str, str]:
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(COLORS).save(small, format="png", optimize=True)
    return {"image/png": base64.b64encode(small.getvalue()).decode("ascii")}


def main() -> None:
    """Execute all notebooks and write them back."""
    for file in notebooks():
        done = execute(json.loads(file.read_text(encoding="utf-8")), name=file.name)
        file.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
