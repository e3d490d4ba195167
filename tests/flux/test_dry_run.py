"""``mteditflow dry-run``: a run is checked without loading its weights, and nothing is written."""

import json
import sys

import pytest

from mteditflow import cli
from tests.flux.worlds import options
from tests.loops import some


@pytest.fixture
def tried(world, tmp_path, capsys, monkeypatch):
    def run(*more):
        monkeypatch.setattr(sys, "argv", sys.argv)
        with pytest.raises(SystemExit) as ended:
            cli.main(["dry-run", *options(world, tmp_path / "run", *more)])
        assert not (tmp_path / "run").exists()
        return ended.value.code, *capsys.readouterr()

    return run


def test_a_sound_run(tried):
    code, out, err = tried("--memory", 8, "--gpus", 2)
    assert (code, err) == (0, "")
    found = dict(line.split(": ", 1) for line in out.splitlines())
    assert list(found) == ["options", "memory", "chains", "instructions", "rewards", "would run"]
    assert found["memory"].endswith("predicted: fits on 8 GiB")
    assert (
        found["chains"] == "16 to train (16 images), 4 held out (4 images); every image is readable"
    )
    assert found["rewards"].endswith("a round has 16 trajectories to score")
    assert found["would run"].startswith("5 rounds of 4 groups of 4, 2 turns each, on 2 GPUs")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--memory", 0.61), "--memory: expected a run that fits 0.61 GiB, got 0."),
        (("--gpus", 3), "--gpus: expected a divisor of the 4 groups"),
        (("--rewards.weights.aesthetics", 1), "rewards.weights.aesthetics: expected 0, since "),
        (
            (
                "--rewards.judge",
                "http://127.0.0.1:9/v1",
                "--rewards.judge-model",
                "x",
                "--rewards.scale",
                "binary",
                "--evaluation.policy",
                "ema",
            ),
            "rewards.scorer: expected no judge and no consistency beside it, got ",
        ),
        (("--memry", 8), "options: expected --memory, --gpus or --SECTION.FIELD of the trainer"),
    ],
)
def test_what_would_fail_later_is_refused(tried, more, expected):
    code, _, err = tried(*more)
    assert code == 2
    assert err.startswith(f"error: {expected}")
    assert err.count("\n") == 1


def test_an_image_that_is_broken_and_instructions_that_are_too_long(tried, world, tmp_path):
    row = json.loads((world / "train.jsonl").read_text().splitlines()[0])
    row["instructions"] = ["red " * 40, *row["instructions"][1:]]
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    image = tmp_path / row["image"]
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes((world / row["image"]).read_bytes())
    more = ("--data.chains", tmp_path / "one.jsonl", "--data.held-out", "None")
    _, out, _ = tried(*more, "--data.groups", 1)
    for tokenizer in some(("tokenizer", "tokenizer_2")):
        said = f"warning: 1 instructions lose their end in {tokenizer}, the longest is 'red red"
        assert said in out
    image.write_bytes(b"no image")
    code, _, err = tried(*more, "--data.groups", 1)
    assert code == 2
    assert row["image"] in err
