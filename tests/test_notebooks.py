"""The notebooks run from top to bottom, and hold the outputs that they were committed with."""

import json
import re

import matplotlib.pyplot as plt
import pytest

from docs.render_notebooks import execute, notebooks
from tests.loops import some

STALE = "run python -m docs.render_notebooks"


@pytest.fixture(scope="module", params=notebooks(), ids=lambda x: x.stem)
def executed(request):
    """A notebook as it is stored, and as it is after running again."""
    stored = json.loads(request.param.read_text(encoding="utf-8"))
    return request.param, stored, execute(stored, name=request.param.name)


def texts(output):
    text = "".join(output.get("text", output.get("data", {}).get("text/plain", ())))
    return re.sub(r"-?\d[\d.]*", "N", text)  # numbers differ with the machine


def test_outputs_are_those_of_the_cells(executed):
    file, stored, again = executed
    pairs = zip(stored["cells"], again["cells"], strict=True)
    code = [(old, new) for old, new in pairs if old["cell_type"] == "code"]
    for number, (old, new) in enumerate(some(code), start=1):
        assert old["execution_count"] == number, STALE
        kinds = [
            [(x["output_type"], sorted(x.get("data", ()))) for x in y["outputs"]]
            for y in (old, new)
        ]
        assert kinds[0] == kinds[1], STALE
        assert [texts(x) for x in old["outputs"]] == [texts(x) for x in new["outputs"]], STALE
    assert sum("image/png" in x.get("data", ()) for _, new in code for x in new["outputs"]) >= 2
    assert file.stat().st_size < 300_000


def test_is_a_notebook_of_format_4_5(executed):
    _, stored, _ = executed
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5)
    cells = stored["cells"]
    assert len({x["id"] for x in cells}) == len(cells)
    keys = {"id", "cell_type", "metadata", "source"}
    for cell in some(cells):
        more = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert set(cell) == keys | more


def book(*sources):
    return {"cells": [{"cell_type": "code", "source": [x]} for x in sources]}


def test_a_cell_gives_what_it_prints_and_draws_and_its_last_value():
    draws = "import matplotlib.pyplot as plt\nprint('drawn')\nfigure, axes = plt.subplots()\n6 * 7"
    made = "import matplotlib.figure\nmatplotlib.figure.Figure()"
    first, second, third, fourth = execute(book(draws, "x = 1", made, "x"))["cells"]
    assert [x["output_type"] for x in first["outputs"]] == [
        "stream",
        "execute_result",
        "display_data",
    ]
    assert first["outputs"][0]["text"] == ["drawn\n"]
    assert first["outputs"][1]["data"] == {"text/plain": ["42"]}
    assert second["outputs"] == []
    assert list(third["outputs"][0]["data"]) == ["image/png"]
    assert fourth["outputs"][0]["execution_count"] == fourth["execution_count"] == 4
    assert plt.get_fignums() == []


def test_a_cell_that_fails_is_named():
    with pytest.raises(ZeroDivisionError) as caught:
        execute(book("x = 1", "x / 0"), name="some.ipynb")
    assert caught.tb.tb_next.tb_next.tb_next.tb_frame.f_code.co_filename == "some.ipynb[2]"
