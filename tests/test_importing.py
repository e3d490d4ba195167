"""The examples of docs/importing.md: run as they stand, and the page shows them as they stand."""

import itertools
import re
import runpy

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from docs.render_importing import FOLDER, PAGE, TITLES, page, read_printed
from tests.loops import some

ADDED = "  # +"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example in a folder of its own, changed or not: its names, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run_example(name, change=lambda code: code):
        path = tmp_path / f"{name}.py"
        path.write_text(change((FOLDER / path.name).read_text()))
        names = runpy.run_path(str(path), run_name="__main__")
        return names, capsys.readouterr().out

    with torch.random.fork_rng(devices=[]):
        yield run_example
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


def without_the_added(code):
    """The script before: marked lines gone, the loss that they replace back, a few steps of it."""
    lines = [line for line in code.splitlines() if not line.endswith(ADDED)]
    before = "\n".join(lines).replace("# Before: ", "").replace("make_chains(256", "make_chains(4")
    return re.sub(r"(?m)^(EDITS, TRIES, STEPS, BATCH) = .*$", r"\1 = 2, 2, 2, 2", before)


def test_page_shows_every_file_as_it_stands():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(TITLES)
    text = PAGE.read_text()
    assert page(read_printed(text)) == text, "run python -m docs.render_importing"


@pytest.mark.parametrize("name", TITLES)
def test_examples_import_public_names_alone(name):
    code = (FOLDER / f"{name}.py").read_text()
    modules = re.findall(r"^from (mteditflow\b[\w.]*) import", code, flags=re.MULTILINE)
    assert modules
    assert set(modules) <= {"mteditflow", "mteditflow.pipelines"}


def smaller(code):
    """The script with half of its edits, and fewer steps."""
    numbers = r"(?m)^(EDITS, TRIES, STEPS, BATCH) = .*$"
    code, found = re.subn(numbers, r"\1 = 64, 8, 48, 32", code)
    assert found == code.count("make_chains(256") == 1
    return code.replace("make_chains(256", "make_chains(128")


@pytest.mark.slow
@pytest.mark.parametrize("size", [smaller, pytest.param(str, id="whole", marks=pytest.mark.long)])
def test_lora_script_learns(run, size):
    _, printed = run("lora_script", size)
    ((before, after),) = re.findall(r"before (\S+), after (\S+),", printed)
    assert float(after) > float(before) + 0.03


def test_lora_script_without_the_added_lines_is_the_script_before(run):
    code = (FOLDER / "lora_script.py").read_text()
    assert 3 <= code.count(ADDED) <= 10
    names, _ = run("lora_script", without_the_added)
    assert not re.search(r"\bmteditflow\b", without_the_added(code).split('"""')[2])
    assert names["loss"].isfinite()


def test_numpy_advantages_are_those_of_a_plain_loop(run):
    names, printed = run("numpy_advantages")
    assert max(numbers(r"off the loop by (\S+)", printed)) < 1e-12
    assert "lost: reward nan, advantage 0.0, valid False" in printed
    assert "all equal: [0.0]" in printed
    for name, tensor in some(names["tensors"].items()):
        assert np.shares_memory(tensor.numpy(), names["rewards"][name])
    consistency, valid = names["rewards"]["consistency"], names["valid"].numpy()
    following = np.random.default_rng(0).random(24)  # as it was drawn
    expected = np.zeros(24)
    for reward, weight in ((following, 1.0), (consistency, 0.2)):
        for row in np.flatnonzero(valid):
            own = reward[valid & (names["prompts"] == names["prompts"][row])]
            expected[row] += weight * (reward[row] - own.mean()) / (own.std() + 1e-4)
    np.testing.assert_allclose(names["fused"].numpy(), expected, atol=1e-12)


def test_own_log_probs_learn(run):
    _, printed = run("own_log_probs")
    first, *_, last = numbers(r"reward (-\d\.\d+)", printed)
    assert last > first + 1
    assert numbers(r"largest \|ratio - 1\| is (\S+)", printed) == [0.0, 0.0, 0.0]
    assert 0 < numbers(r"and (\d+)% above", printed)[-1] < 50


def test_own_log_probs_stop_where_the_replay_is_not_the_rollout(run):
    def other_reduction(code):
        return code.replace(".flatten(0, 1)).sum(1)", ".flatten(0, 1)).mean(1)")

    with pytest.raises(
        SystemExit, match=r"\|ratio - 1\| is \S+ at step \d; allowed is 0.02. The rep"
    ):
        run("own_log_probs", other_reduction)


def test_sde_sampling_draws_noise_in_the_window_and_shows_it(run, tmp_path):
    names, printed = run("sde_sampling")
    spread = numbers(r"std between tries (\S+),", printed)
    assert spread[0] == 0
    assert spread == sorted(set(spread))
    assert re.findall(r"stochastic steps (\[.*?\])", printed) == ["[]", *["[0, 1, 2, 3]"] * 3]
    steps = names["pipe"].scheduler.steps
    for before, after in some(itertools.pairwise(steps)):
        assert torch.equal(before.next_x, after.x_t)
    assert all(bool((step.log_prob != 0).all()) == step.stochastic for step in some(steps))

    with Image.open(tmp_path / "sde_sampling.png") as picture:
        shown = np.asarray(picture)[:: names["PIXEL"], :: names["PIXEL"]] / 255
    rows = shown.reshape(len(names["LEVELS"]), 14, names["TRIES"] + 1, 14, 3)[:, 1:-1, :, 1:-1]
    pipe = names["pipe"]
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    plain = (
        pipe(
            image=names["source"][:1],
            prompt=names["prompt"][:1],
            latents=names["latents"][:1],
            **names["options"],
        )
        .images[0]
        .movedim(0, -1)
    )
    for attempt in range(1, names["TRIES"] + 1):
        np.testing.assert_allclose(rows[0, :, attempt], plain, atol=0.5 / 255 + 1e-4)
    assert (rows[1:, :, 1] != rows[:-1, :, 1]).any(axis=(1, 2, 3)).all()
