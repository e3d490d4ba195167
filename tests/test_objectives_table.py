"""The table of objectives: current, and of names that exist."""

import importlib

import pytest

from docs.render_objectives import END, PAGE, START, page, table
from mteditflow.objectives import OBJECTIVES
from tests.loops import some

TEXT = PAGE.read_text(encoding="utf-8")


def test_table_is_current():
    assert page(TEXT) == TEXT, "run python -m docs.render_objectives"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_row_and_losses_that_exist(name):
    card = OBJECTIVES[name].card
    (row,) = (line for line in table().splitlines() if line.startswith(f"| {card.title} |"))
    assert f"`objectives.{OBJECTIVES[name].__name__}`" in row
    assert (f"`objective:{name}`" in row) == (name != "distillation")  # what its program does
    for loss in some(card.losses):  # a public name, or a path under mteditflow
        module, _, function = f"mteditflow.{loss}".rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))


def test_rows_have_as_many_cells_as_the_header():
    assert len({line.count("|") for line in table().splitlines()}) == 1


@pytest.mark.parametrize("text", ["", START, END, START + END + START])
def test_a_readme_without_its_markers_is_refused(text):
    with pytest.raises(ValueError, match=r"equations\.md: expected one <!-- objectives: start -->"):
        page(text)


def test_the_rest_of_the_page_is_kept():
    assert page(f"a\n{START}old\n{END}b\n") == f"a\n{START}{table()}{END}b\n"
