"""The package as a user gets it: the core alone, its documentation, the README, the built files."""

import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mteditflow
from tests.loops import some

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PUBLIC = {name: getattr(mteditflow, name) for name in mteditflow.__all__}
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel built from it: what is missing in the one breaks the other.

    Not isolated: `make` has installed this folder by an isolated build, which needs the registry.
    """
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder with what the wheel installs."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-compile", "--target", str(target), str(built[1])]
    subprocess.run(command, check=True, timeout=300)
    return target


@pytest.fixture(scope="module")
def report(installed, tmp_path_factory):
    """Output of the installed core where nothing but its dependencies can be imported."""
    folder = tmp_path_factory.mktemp("core")
    finished = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "core_alone.py"), str(folder / "t.safetensors")],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.slow
def test_core_needs_torch_einops_numpy_and_safetensors_alone(report):
    third_party = set(report["imported"]) - set(sys.stdlib_module_names) - {"mteditflow"}
    assert third_party <= {"einops", "numpy", "safetensors", "torch"}
    assert set(report["loaded"]) <= set(report["present"])
    failed, tried = report["doctests"]
    assert failed == 0
    assert tried >= len(FUNCTIONS)
    # Processor time of the import beyond torch's own: a busy machine does not count.
    assert report["seconds"] < 1


@pytest.mark.slow
def test_wheel_works_outside_the_repository(report, installed):
    assert Path(report["file"]).is_relative_to(installed)


def test_all_is_complete_and_importable():
    """Nothing else of the core is public here, once every name has been loaded."""
    assert set(mteditflow.__all__) == {
        name
        for name, thing in vars(mteditflow).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    } - {"TYPE_CHECKING", "lazy"}
    assert len(mteditflow.__all__) == len(set(mteditflow.__all__))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name):
    thing = PUBLIC[name]
    assert inspect.getdoc(thing), name
    if name in FUNCTIONS:
        for section in ("Args:", "Example:", ">>> "):
            assert section in thing.__doc__, f"{name}: no {section}"
        signature = inspect.signature(thing)
        if signature.return_annotation not in (None, "None"):
            assert "Returns:" in thing.__doc__, f"{name}: no Returns:"
        for parameter in some(signature.parameters):
            assert re.search(rf"^ +\*?{parameter}:", thing.__doc__, flags=re.MULTILINE), (
                f"{name}: argument {parameter} is not documented"
            )
        assert "Raises:" in thing.__doc__, f"{name}: no Raises:"


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_hyperparameters_come_after_the_star(name):
    """A tensor may be given by position, a number or a choice with a default only by name."""
    for parameter in some(inspect.signature(FUNCTIONS[name]).parameters.values()):
        if parameter.default not in (inspect.Parameter.empty, None):
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter.name


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


LOSS, OBJECTIVE = blocks(README)  # one of each: a fresh reader's first two programs
LOOPS = blocks((ROOT / "docs" / "loop.md").read_text())
LOOP, OWN_MODEL, TRANSFORMER, STOCHASTIC, OWN_SAMPLER, OWN_SCORES = LOOPS


def run_block(block, *more):
    namespace = {"__name__": "__page__"}
    exec(compile("\n".join([block, *more]), "page", "exec"), namespace)
    return namespace


def test_the_loss_of_the_readme_is_that_of_its_formula_and_trains():
    torch.manual_seed(0)
    found = run_block(LOSS)
    v, old, target, r = (found[x].detach() for x in ("velocity", "old_velocity", "target", "r"))
    assert torch.equal(v, old)  # on policy: both branches predict the same velocity
    error = (v - target).square()
    plain = r[:, None] * error + (1 - r[:, None]) * error
    torch.testing.assert_close(found["loss"].detach(), plain.mean())
    # Equation 3 and r = (1 + A / 5) / 2, cut to [0, 1].
    reward = found["reward"].view(2, 4)
    advantage = (reward - reward.mean(1, keepdim=True)) / reward.std(1, keepdim=True, correction=0)
    expected = ((advantage.clamp(-5, 5) / 5).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(r.view(2, 4), expected, rtol=1e-3, atol=1e-3)
    # The gradient weighs each sample by 2 r - 1: half of what doubles a loss cancels.
    sigma, clean, noise = found["sigma"][:, None], found["clean"], found["noise"]
    x_t = (1 - sigma) * clean + sigma * noise
    residual = 2 * (2 * r[:, None] - 1) * (v - target) / v.numel()
    torch.testing.assert_close(found["model"].weight.grad, residual.T @ x_t)


def test_the_objective_of_the_readme_trains_on_the_advantage_of_its_own_samples():
    torch.manual_seed(0)
    weights = "before = [p.detach().clone() for p in model.parameters()]"
    found = run_block(OBJECTIVE.replace("\nfor units", f"\n{weights}\nfor units"))
    assert torch.equal(found["samples"].group, torch.arange(8) // 4)
    rows = found["units"].rows[..., 0].flatten()
    assert sorted(rows.tolist()) == list(range(8))
    assert torch.equal(found["units"].advantage.flatten(), found["advantage"][rows])
    pairs = zip(found["model"].parameters(), found["before"], strict=True)
    assert all((p != b).any() for p, b in some(pairs))


OWN = {"nft": OWN_MODEL, "rollout": STOCHASTIC, "sampler": OWN_SAMPLER}
SCORED, SKIP, ROUNDS = "    valid = reward.isfinite()", "if len(units) == 0:", "range(200)"


def run_loop(block, rounds, score="pass"):
    """Run a loop of a page over an own model: rewards replaced, rewards and units listed."""
    assert all(block.count(x) == 1 for x in (SCORED, SKIP, ROUNDS))
    block = block.replace(ROUNDS, f"range({rounds})")
    block = block.replace(SCORED, f"    {score}\n    rewards.append(reward)\n{SCORED}")
    block = block.replace(SKIP, f"seen.append(units)\n        {SKIP}")
    torch.manual_seed(0)
    return run_block("rewards, seen = [], []\n" + block)


def gradient_of(found, valid, *, moved=None):
    """Gradient of a pass over a loop's samples, of which a trajectory may be moved."""
    samples, objective, model = (found[x] for x in ("samples", "objective", "model"))
    if moved is not None:
        name = "latents" if hasattr(samples, "latents") else "clean"
        states = getattr(samples, name).clone()
        states[moved] += 1
        samples = replace(samples, **{name: states})
    key = torch.Generator().manual_seed(1)
    (units,) = objective.units(samples, found["advantage"], valid, key=key)
    model.zero_grad()
    output = objective(found["velocity"], samples, units)
    (output.loss.sum() / units.count).backward()
    return model.weight.grad.clone()


@pytest.mark.parametrize("name", OWN)
def test_loops_over_an_own_model_learn(name):
    """From about -1.2 to -0.4, as the page states."""
    found = run_loop(OWN[name], 200)
    mean = torch.stack(found["rewards"]).mean(dim=1)
    assert -1.4 < mean[:20].mean() < -1.0
    assert -0.5 < mean[-20:].mean() < -0.2
    rows = found["seen"][-1].rows[..., 0]
    assert torch.equal(found["seen"][-1].advantage, found["advantage"][rows])


@pytest.mark.parametrize("name", OWN)
def test_a_lost_row_of_these_loops_gets_no_gradient(name):
    found = run_loop(OWN[name], 3, "reward[5] = torch.nan")
    trained = {int(row) for units in some(found["seen"]) for row in units.rows[..., 0].flatten()}
    assert trained == {*range(8)} - {5}
    torch.nn.init.normal_(found["model"].weight)  # current and old policy differ
    gradient = gradient_of(found, found["valid"])
    assert gradient.any()
    assert torch.equal(gradient, gradient_of(found, found["valid"], moved=5))
    others = (gradient_of(found, found["valid"], moved=b) for b in range(8) if b != 5)
    assert any(not torch.equal(gradient, other) for other in others)  # some steps are clipped
    if name == "nft":  # advantage 0 alone would pull the row to the old policy
        assert not torch.equal(gradient_of(found, None), gradient_of(found, None, moved=5))


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("score", ["reward[:] = 0.5", "reward[:] = torch.nan"])
def test_these_loops_pass_over_a_round_without_units(name, score):
    found = run_loop(OWN[name], 2, score)
    without = [len(units) == 0 for units in some(found["seen"])]
    assert all(without) or (name == "nft" and "0.5" in score and not any(without))
    assert bool(found["model"].weight.isfinite().all())


def test_the_velocity_over_a_diffusers_transformer_is_its_output_at_thousandths():
    torch.manual_seed(0)
    found = run_block(TRANSFORMER)
    model, velocity, at = found["model"], found["velocity"], torch.tensor([[5, 0], [2, 0]])
    assert found["output"].loss.dtype == torch.float32
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all()) for p in some(model.parameters())
    )
    seen = []
    model.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
    assert velocity("current", torch.zeros(2, 4, 8, 8), torch.tensor([0.5, 1]), at).shape[0] == 2
    ((x_t,), given), prompts = seen[0], found["prompts"]
    assert x_t.dtype == model.dtype == torch.bfloat16
    assert given["timestep"].tolist() == [500, 1000]
    assert torch.equal(given["encoder_hidden_states"], prompts[[5, 2]].bfloat16())


def test_an_own_sampler_of_another_noise_level_is_noticed():
    with pytest.raises(AssertionError, match="ratio"):
        run_loop(OWN_SAMPLER.replace("g = 0.7 *", "g = 0.6 *"), 1)


def test_the_route_from_own_scores_leaves_lost_ones_out():
    found = run_block(OWN_SCORES)
    value, valid = found["advantage"].value, found["advantage"].valid
    assert valid.tolist() == [[True, True], [True, True], [False, False], [True, False]]
    assert found["units"].rows[:, 0, :2].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [3, 0]]
    # Following 7/8, 1/8 and 3/4 of chains 0, 1 and 3; consistency 0.9 and 0.75 of 0 and 1.
    following = torch.tensor([0.875, 0.125, 0.75])
    expected = (following - following.mean()) / (following.std(correction=0) + 1e-4)
    expected += 0.2 * torch.tensor([1.0, -1.0, 0.0]) * 0.075 / (0.075 + 1e-4)
    torch.testing.assert_close(value[[0, 1, 3], 0], expected)
    torch.testing.assert_close(value[:2, 1], expected[:2])


@pytest.mark.parametrize("objective", ["NFT", "GRPO"])
def test_the_loop_trains_by_either_objective(tmp_path, monkeypatch, objective):
    """One line is changed, and a round is enough; the advantage is that of the trained rollout."""
    monkeypatch.chdir(tmp_path)
    lines = LOOP
    if objective == "GRPO":
        lines = lines.replace("objective = NFT(", "_ = NFT(").replace("# objective", "objective")
        lines = lines.replace("range(2)", "range(1)")
    lost = "valid = torch.ones(len(batch), dtype=torch.bool)"
    assert lines.count(lost) == lines.count(SKIP) == 1
    nan = "rewards['following'][5] = torch.nan"
    lines = lines.replace(lost, f"valid = torch.arange(len(batch)) != 5\n    {nan}")
    lines = lines.replace(SKIP, f"seen.append(units)\n        {SKIP}")
    found = run_block("seen = []\n" + lines)
    rows = torch.cat([units.rows[:, 0] for units in found["seen"]])
    assert 5 not in rows[:, 0]  # no gradient of the trajectory that lost a score
    if objective == "NFT":
        assert {*rows[:, 0].tolist()} == {*range(32)} - {5}
    assert type(found["objective"]).__name__ == objective
    assert len(found["rollout"]) == len(found["advantage"]) == 32
    assert torch.equal(found["rollout"].group, found["group"])
    assert any(bool(weight.any()) for weight in found["policies"].parameters()[1::2])
    assert bool(found["output"].loss.isfinite().all())
    assert found["output"].loss.any()


PAGES = {
    page: (ROOT / page).read_text() for page in ("README.md", "docs/loop.md", "docs/equations.md")
}


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_is_python_or_shell(page):
    languages = re.findall(r"^```(\w*)\n.*?^```", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    assert set(languages) <= {"python", "bash"}


def test_the_readme_is_short():
    assert len(README.split()) <= 1200


def test_the_page_of_equations_names_only_what_exists_and_every_function():
    text = PAGES["docs/equations.md"]
    cells = [cell for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named <= set(mteditflow.__all__)
    missing = set(FUNCTIONS) - set(re.findall(r"\w+", text))
    assert not missing, f"functions that the page leaves out: {sorted(missing)}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_of_pages_exist(page):
    paths = re.findall(r"`((?:tests|examples|benchmarks|docs|mteditflow)/[\w./]*)`", PAGES[page])
    links = re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", PAGES[page])
    paths += [((ROOT / page).parent / link).resolve() for link in links]
    for path in some(paths):
        assert (ROOT / path).exists(), path


def test_readme_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)|`(?:\w+=\S+ )*make (\w+)`", README, flags=re.MULTILINE)
    assert targets
    for target in some(map("".join, targets)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.slow
def test_sdist_has_all_that_git_has(built):
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive}
    for folder in ("mteditflow", "tests", "examples", "benchmarks", "release"):
        for source in some((ROOT / folder).rglob("*.py")):
            assert source.relative_to(ROOT).as_posix() in names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt"} <= names


@pytest.mark.slow
def test_wheel_has_both_packages_and_is_typed(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        description = archive.read(metadata).decode()
    assert "mteditflow/py.typed" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "mteditflow",
        "mteditflow_examples",
    }
    assert "mteditflow_examples/flux/presets/kontext-nft.toml" in names
    assert "mteditflow_examples/shapes/weights/kontext.safetensors" in names
    required = re.findall(r"^Requires-Dist: (\w+)[^;\n]*$", description, flags=re.MULTILINE)
    assert set(required) == {"torch", "einops", "numpy", "safetensors"}
    assert f"Version: {mteditflow.__version__}" in description
    assert "License-Expression: Apache-2.0" in description


def test_the_version_is_in_one_place():
    """Setuptools reads it from the package; no other file of the package's metadata has it."""
    text = (ROOT / "pyproject.toml").read_text()
    assert '\nversion = { attr = "mteditflow.__version__" }\n' in text
    for file in ("pyproject.toml", "CITATION.cff"):
        for line in some((ROOT / file).read_text().splitlines()):
            assert not re.search(r'^version\W+["\d]', line), f"{file}: {line}"


def test_every_package_is_installed():
    """Setuptools takes the list in pyproject.toml; a folder that it lacks is not in the wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[\n(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)[1]
    expected = {
        ".".join((name, *file.parent.relative_to(ROOT / folder).parts))
        for folder, name in (("mteditflow", "mteditflow"), ("examples", "mteditflow_examples"))
        for file in (ROOT / folder).rglob("__init__.py")
    }
    assert set(re.findall(r'"([\w.]+)"', listed)) == expected
