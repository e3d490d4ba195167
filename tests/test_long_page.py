"""The page of a study of long chains, from made-up evaluations whose measures are known."""

import math

import numpy as np
import pytest
import torch
from mteditflow_examples.findings.long_chains import LONG_CHAINS, STILL, TWENTY
from mteditflow_examples.findings.long_page import BEFORE, TABLES, LongResults, write_long_page
from mteditflow_examples.findings.running import FULL, Ablations, Run
from mteditflow_examples.findings.study import THREE
from PIL import Image

from mteditflow.evaluation import Evaluation
from mteditflow.rewards import TurnScores
from tests.loops import some

CHAINS = 8


def evaluation(held_out, passing, collapsing, wear):
    """8 chains: ``passing`` succeed at all turns, ``collapsing`` are destroyed from turn 5 on."""
    shape = (CHAINS, held_out.turns)
    number = torch.arange(CHAINS)[:, None].expand(shape)
    turn = torch.arange(1, held_out.turns + 1).expand(shape)
    values = {
        "following": 1 + 4.0 * ((number < passing) | (turn < 2)),
        "consistency": torch.where((number < collapsing) & (turn >= 5), 0.4, 0.9),
        "strict": torch.zeros(shape),
        "wear": wear * turn.float(),
    }
    exists = torch.ones(shape, dtype=torch.bool)
    terms = {name: TurnScores(x, exists, {}) for name, x in values.items()}
    names = [f"chain {c}" for c in range(CHAINS)]
    return Evaluation(0, names, [["Do it"] * held_out.turns] * CHAINS, terms, success_at=5)


@pytest.fixture
def ablations(tmp_path, monkeypatch):
    own = Ablations(tmp_path, FULL, LONG_CHAINS)

    def result(_, setting, seed, held_out):
        better = setting.name != LONG_CHAINS.base.name
        after = evaluation(held_out, passing=4 + 2 * better, collapsing=2, wear=0.001 * (seed + 1))
        return Run(evaluation(held_out, passing=2, collapsing=6, wear=0.004), after, ())

    def images(_, setting, seed, held_out, rows):
        color = "gray" if setting is None else "green"
        return [[Image.new("RGB", (64, 64), color)] * (held_out.turns + 1) for _ in rows]

    monkeypatch.setattr(Ablations, "images", images)
    monkeypatch.setattr(Ablations, "complete_seeds", lambda _: [0, 1, 2])
    monkeypatch.setattr(Ablations, "result", result)
    for setting in LONG_CHAINS.settings.values():
        own._after(setting, 0, THREE).parent.mkdir()
        own._after(setting, 0, THREE).touch()
    return own


def test_measures_are_those_of_the_chains(ablations):
    results = LongResults(ablations)
    measures = {measure.title: measure for table in TABLES for measure in table}
    found = {title: results.table(measure) for title, measure in measures.items()}
    assert results.settings[0] is BEFORE
    base = results.row(LONG_CHAINS.base)
    assert results.settings[base] == LONG_CHAINS.base
    for title in ("IF(3)", "SR@10", "SR@20"):
        assert found[title][0].tolist() == [25.0] * 3
        assert found[title][base].tolist() == [50.0] * 3
        assert found[title][-1].tolist() == [75.0] * 3
    assert found["CR@10"][0].tolist() == [75.0] * 3
    assert found["CR@10"][base].tolist() == [25.0] * 3
    for title in ("wear without edits at 10", "wear outside edits at 10"):
        # each turn adds a tenth of a percent, times the seed's number
        assert found[title][base].tolist() == pytest.approx([1.0, 2.0, 3.0], abs=1e-4)
    assert found["CC(3)"][0].tolist() == pytest.approx([90.0] * 3, abs=1e-4)
    assert {measure.held_out for measure in measures.values()} == {THREE, TWENTY, STILL}
    # wear per turn: 0.4 before; 0.1, 0.2, 0.3 after, by seed
    wear = measures["wear outside edits at 10"]
    assert results.level(wear, base) == "2.0 (1.0, 3.0)"
    assert results.level(wear, 0) == "4.0"
    half = 4.303 / math.sqrt(3)
    interval = f"-2.0 [{-2 - half:+.1f}, {-2 + half:+.1f}]"
    assert results.difference(wear, base, 0) == interval
    # 4 and 2 of 8 chains on each of 3 seeds are 18 successes and 30 failures: an interval
    assert results.difference(measures["SR@10"], base, 0) == "+25.0 [+25.0, +25.0]"


@pytest.mark.parametrize(
    ("passing", "seeds", "difference"),
    [
        ((1, 0), 3, "+4.2 (+0.0, +12.5)"),  # 2 of 48 chains, and 46
        ((8, 7), 3, "+4.2 (+0.0, +12.5)"),  # 46 of 48, and 2
        ((5, 3), 3, "+4.2 [-13.8, +22.1]"),
        ((5, 3), 2, "+6.2 (+0.0, +12.5)"),
        ((5, 3), 1, "+12.5"),
    ],
)
def test_shares_of_few_chains_or_seeds_have_no_interval(
    ablations, monkeypatch, passing, seeds, difference
):
    """One chain more succeeds after training, on the first seed alone."""

    def result(_, setting, seed, held_out):
        before = evaluation(held_out, passing[seed > 0] - (seed == 0), 2, 0.001)
        return Run(before, evaluation(held_out, passing[seed > 0], 2, 0.001), ())

    monkeypatch.setattr(Ablations, "result", result)
    monkeypatch.setattr(Ablations, "complete_seeds", lambda _: list(range(seeds)))
    results = LongResults(ablations)
    found = results.difference(TABLES[0][-1], results.row(LONG_CHAINS.base), 0)
    assert found == difference


def test_the_page_has_a_row_for_every_recipe_and_its_figure(ablations, tmp_path):
    page = write_long_page(ablations, tmp_path / "docs", command="make it")
    text = page.read_text()
    for setting in some(LONG_CHAINS.settings.values()):
        # two tables each of levels, changes and differences to the base
        rows = 4 if setting == LONG_CHAINS.base else 6
        assert text.count(f"\n| {setting.label} | ") == rows
    assert text.count("\n| before | ") == 2
    assert "Seeds 0, 1, 2; 20 rounds each" in text
    assert "8 chains of three turns, 8 of twenty" in text
    assert (tmp_path / "docs" / "long_chains.png").stat().st_size > 10_000
    assert "(long_chains.png)" in text
    assert "(long_chains_twenty.png)" in text
    assert (tmp_path / "docs" / "long_chains_chain.png").stat().st_size > 10_000
    with Image.open(tmp_path / "docs" / "long_chains_twenty.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    for color in some(((128, 128, 128), (0, 128, 0))):  # before, and of the best recipe
        assert (pixels == color).all(axis=1).sum() > 10_000
