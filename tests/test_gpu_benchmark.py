"""The benchmarks for one GPU on a CPU, tiny: their rows, their time, and the script around them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_models, trainer_full_size
from benchmarks.cases import cases
from benchmarks.gpu_models import (
    COLUMNS,
    NOT_INSTALLED,
    NOT_REACHED,
    OUT_OF_MEMORY,
    PIECES,
    Deadline,
    tiny_size,
)
from tests.loops import some

SCRIPT = Path(gpu.__file__).with_name("gpu.sh")
TURNS = 1
SECONDS = 20.0  # less than what compiling wants, so that nothing compiles


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """Sections of both parts, by the first word of their names."""
    folder = tmp_path_factory.mktemp("gpu")
    given = ["--tiny", "--device", "cpu", "--seconds", str(SECONDS), "--output", str(folder)]
    few = ("NFT loss, forward and backward", "group advantages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "cases", lambda *a, **k: [x for x in cases(*a, **k) if x.name in few])
        patch.setattr(trainer_full_size, "TURNS", TURNS)
        for part, *more in (("functions",), ("models", "--dtype", "float32")):
            patch.setattr(sys, "argv", ["gpu", part, *more, *given])
            gpu.main()
    page = (folder / "gpu.md").read_text()
    found = json.loads((folder / "gpu.json").read_text())
    assert all(name in page for name in some(found))
    return {name.split(",")[0]: section for name, section in found.items()}


@pytest.mark.slow
def test_a_page_names_the_device_and_the_versions(sections):
    for section in some(sections.values()):
        assert section["environment"]["device"]
        assert f"torch {torch.__version__}, diffusers " in section["about"]
        assert "says nothing of a GPU" in section["about"]


@pytest.mark.slow
def test_functions_are_measured_in_both_precisions_and_families_beside_plain_calls(sections):
    functions, families, compiled = (table["rows"] for table in sections["functions"]["tables"])
    loss = "NFT loss, forward and backward"
    expected = [(loss, "float32"), (loss, "bfloat16"), ("group advantages", "float32")]
    assert [tuple(row[:2]) for row in functions] == expected
    assert all(min(row[2:5]) > 0 for row in some(functions))
    assert {(row[0], row[1]) for row in families} == {
        (family, what)
        for family in ("kontext", "klein")
        for what in ("plain calls", "recorded calls", "NFT update", "GRPO update")
    }
    reached = [row for row in families if row[-1]]
    for family, what, seconds, ratio, _ in some(reached):
        assert seconds > 0
        assert (what == "recorded calls") == (ratio != "-"), family
    assert len(compiled) == 6
    assert {row[1] for row in compiled} == {NOT_REACHED}


@pytest.mark.slow
def test_models_are_measured_in_each_way_of_holding_weights_and_activations(sections):
    (table,) = sections["models"]["tables"]
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table["rows"]]
    expected = [
        (name, weights, *piece)
        for name in ("kontext", "klein")
        for weights in ("float32", "nf4", "int8")
        for piece in PIECES
    ]
    assert [tuple(row[name] for name in COLUMNS[:4]) for row in rows] == expected
    measured = [row for row in rows if isinstance(row["seconds"], float)]
    assert {row["weights"] for row in measured} >= {"float32"}
    steps = 2
    for row in some(measured):
        branches = 1 if row["model"] == "kontext" else 2
        passes = {"rollout, recorded": steps, "NFT update": 3, "GRPO update": steps}[row["what"]]
        assert row["forwards"] == passes * TURNS * branches, row
        assert row["seconds"] > 0
        assert row["TFLOP"] > 0
        assert row["of the matrix rate"].endswith("%")
        assert row["predicted, GiB"] == "-"  # for the models at full size alone
    said = {row["seconds"] for row in rows if row not in measured}
    assert said <= {NOT_REACHED, NOT_INSTALLED}


@pytest.mark.slow
def test_what_there_is_no_time_or_memory_for_is_said(monkeypatch):
    monkeypatch.setattr(trainer_full_size, "TURNS", TURNS)
    given = ("kontext", tiny_size("kontext"), "cpu", torch.float32)
    rows = list(gpu_models.model_rows(*given, Deadline(0)))
    assert len(rows) == 3 * len(PIECES)
    assert {row[4] for row in rows} <= {NOT_REACHED, NOT_INSTALLED}
    assert {tuple(row[5:]) for row in rows} == {("-",) * 6}
    monkeypatch.setattr(gpu_models, "timed", exhausted)
    monkeypatch.setattr(gpu_models, "find_spec", lambda name: None)
    rows = list(gpu_models.model_rows(*given, Deadline(1000)))
    assert [row[4] for row in rows] == [OUT_OF_MEMORY] * 5 + [NOT_INSTALLED] * 10


def test_memory_is_predicted_by_the_budget_of_the_same_work():
    """In GiB: weights in bf16 and nf4, and what checkpointing saves in an update of one row."""

    def gib(*way):
        return gpu_models.predicted(*way) / 2**30

    whole, packed = (gib("kontext", kind, "on", "NFT update") for kind in ("none", "nf4"))
    assert whole == pytest.approx(29.7, abs=0.1)
    assert 15 < whole - packed < 16  # of 11.9e9 weights
    assert gib("kontext", "none", "off", "GRPO update") - whole == pytest.approx(20.6, abs=0.5)
    assert gib("klein", "none", "-", "rollout, recorded") < gib("klein", "none", "on", "NFT update")


def test_a_failure_is_named_in_its_row_and_the_others_go_on(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_models, "Trained", fails)
    monkeypatch.setattr(gpu_models, "find_spec", lambda name: name)
    given = ("kontext", trainer_full_size.SIZES["kontext"], "cpu", torch.float32)
    rows = list(gpu_models.model_rows(*given, Deadline(1000)))
    assert [row[4] for row in rows] == ["failed: RuntimeError"] * 3 * len(PIECES)
    assert "RuntimeError: no kernel image" in capsys.readouterr().err


def exhausted(call, device):
    raise torch.OutOfMemoryError("out of memory")


def test_a_rate_is_a_share_of_what_the_maker_states(monkeypatch):
    assert gpu_models.of_peak(1e12, "cpu") == "-"
    names = {"NVIDIA H200": "10.0%", "NVIDIA A100-SXM4-80GB": "31.7%", "Another": "-"}
    for name, share in some(names.items()):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert gpu_models.of_peak(98.9e12, "cuda") == share


def test_a_device_that_is_not_there_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "models", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "--device: expected one that torch finds, got cuda" in capsys.readouterr().err


def test_the_script_installs_what_is_missing_and_runs_the_program(tmp_path):
    """With a Python that lacks tyro and pip: it says what it was called with."""
    assert subprocess.run(["bash", "-n", str(SCRIPT)], timeout=60).returncode == 0
    root = tmp_path / "root"
    for folder in ("benchmarks", "build/gpu-wheels", "examples"):
        (root / folder).mkdir(parents=True)
    for file in ("gpu.sh", "gpu_wheels.txt"):
        (root / "benchmarks" / file).write_text(SCRIPT.with_name(file).read_text())
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\nif [ "$1" = - ]; then echo tyro; else echo "$PYTHONPATH: $*"; fi\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(root / "benchmarks" / "gpu.sh"), "models", "--tiny"],
        env={"PATH": os.environ["PATH"], "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    site, wheels = root / "build" / "gpu-site", root / "build" / "gpu-wheels"
    assert done.stdout.splitlines() == [
        f"{root}:{site}: -m pip install --quiet --no-deps --no-index --find-links {wheels} "
        f"--target {site} --upgrade tyro",
        f"{root}:{site}: -m benchmarks.gpu models --tiny",
    ]
    assert (site / "mteditflow_examples").resolve() == (root / "examples").resolve()
