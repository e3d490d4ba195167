"""docs/families.md: every preset and objective has its cell, as the command finds it."""

import json

import pytest
from mteditflow_examples.flux.command_line import PRESETS as PRESET_FILES

from docs import render_presets
from mteditflow.objectives import OBJECTIVES
from tests.loops import some

FOUND = json.loads(render_presets.PAGE.with_suffix(".json").read_text())


def test_every_preset_and_objective_has_a_cell_whose_sign_is_right():
    shipped = {path.stem for path in PRESET_FILES.glob("*.toml")}
    named = {name for names in render_presets.PRESETS.values() for name in names.split(", ")}
    assert named == {name for name in shipped if not name.startswith(("pictures-", "shapes-"))}
    rewarded = {c.__name__ for c in OBJECTIVES.values() if c.card.rewarded}
    assert {type(x).__name__ for x in render_presets.OBJECTIVES.values()} == rewarded
    assert FOUND.keys() == render_presets.PRESETS.keys()
    for cells in some(FOUND.values()):
        assert cells.keys() == render_presets.OBJECTIVES.keys()
        for values in some(cells.values()):
            assert len(values) == render_presets.SEEDS
            assert render_presets.interval(values).verdict == "seen"


def test_the_page_is_that_of_the_numbers():
    table = render_presets.page(FOUND).split("|---")[1]
    assert render_presets.PAGE.read_text().split("|---")[1] == table


@pytest.mark.parametrize("family", ["kontext", "sd3.5"])
def test_cells_are_what_the_command_finds(tmp_path, family):
    world = render_presets.make_world(family, tmp_path)
    for name in ("NFT", "GRPO"):
        found = render_presets.cell(world, render_presets.OBJECTIVES[name], seed=1)
        assert found == pytest.approx(FOUND[family][name][1], abs=0.02)
