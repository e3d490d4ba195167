"""The page of evidence, from the reports of short runs; and that held-out chains are held out."""

import json

import pytest
from mteditflow_examples import evidence
from mteditflow_examples.evidence import KINDS, Kind, document, draw_summary, folder, run, world_of
from mteditflow_examples.shapes.editor import Family
from mteditflow_examples.shapes.files import LINKED, write_world
from mteditflow_examples.shapes.pretrain import single_edits
from mteditflow_examples.shapes.world import draw_index, make_chains
from PIL import Image

from tests.forked import forking

SHORT = ("--data.groups", "4", "--data.group-size", "2", "--training.batch", "16")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short run of a klein editor, by the very command that makes the evidence."""
    place = tmp_path_factory.mktemp("evidence")
    write_world(world_of(place, Family.klein, 3), Family.klein, seed=3, counts=(4, 4), turns=3)
    return place


@pytest.mark.slow
def test_evidence_is_written_from_runs(runs, tmp_path, monkeypatch):
    kind = Kind("shapes-klein-grpo", options=(*SHORT, "--training.rounds", "2"))
    monkeypatch.setattr(Kind, "rounds", 2)
    with forking(evidence):
        report = run(kind, "klein-grpo", 3, runs, workers=2)
    assert (report["seed"], report["rounds"], report["held_out_chains"]) == (3, 2, 4)
    monkeypatch.setattr(evidence.subprocess, "run", None)
    assert run(kind, "klein-grpo", 3, runs, workers=2) == report  # is there, so nothing runs
    reports = {(name, seed): report for name in KINDS for seed in (0, 1)}
    text = document(reports)
    assert text.count("| seed 0, before |") == len(KINDS)
    assert report["versions"]["torch"] in text
    draw_summary(reports, tmp_path / "summary.png")
    with Image.open(tmp_path / "summary.png") as image:
        assert min(image.size) > 300


def test_evidence_refuses_the_report_of_another_run(tmp_path):
    output = folder(tmp_path, "grpo", 1)
    output.mkdir(parents=True)
    (output / "report.json").write_text(json.dumps({"rounds": 20, "seed": 1}))
    with pytest.raises(ValueError, match=r"expected seed and rounds \(1, 40\)"):
        run(KINDS["grpo"], "grpo", 1, tmp_path, workers=1)


def test_held_out_chains_share_nothing_with_pretraining_or_training():
    """The pictures and chains that the scripts really use, not only the splits they come from."""
    pictures, _ = single_edits(200, seed=0, corruption=0.25)
    seen = {picture.numpy().tobytes() for picture in pictures.flatten(0, 1)}
    options = {"turns": 3, "linked": LINKED}
    training = make_chains(480, seed=0, split="train", **options)
    held_out = make_chains(256, seed=0, split="held_out", **options)
    seen |= {draw_index(state).tobytes() for chain in training for state in chain.states}
    assert not seen & {draw_index(state).tobytes() for c in held_out for state in c.states}
    assert not {(c.initial, *c.instructions) for c in held_out} & {
        (c.initial, *c.instructions) for c in training
    }
