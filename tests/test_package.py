"""The package as a user gets it: the core alone, its documentation, the README, the built files."""

import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
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


BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
(LOOP,) = (block for block in BLOCKS if "RolloutVelocity(" in block)


def run_block(block):
    namespace = {"__name__": "__readme__"}
    exec(compile(block, "README.md", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("block", [block for block in BLOCKS if block != LOOP])
def test_readme_blocks_run_alone(tmp_path, monkeypatch, block):
    monkeypatch.chdir(tmp_path)
    run_block(block)


@pytest.mark.parametrize("objective", ["NFT", "GRPO"])
def test_the_loop_of_the_readme_trains_by_either_objective(tmp_path, monkeypatch, objective):
    """One line is changed, and a round is enough; the advantage is that of the trained rollout."""
    monkeypatch.chdir(tmp_path)
    lines = LOOP
    if objective == "GRPO":
        lines = lines.replace("objective = NFT(", "_ = NFT(").replace("# objective", "objective")
        lines = lines.replace("range(2)", "range(1)")
    found = run_block(lines)
    assert type(found["objective"]).__name__ == objective
    assert len(found["rollout"]) == len(found["advantage"]) == 32
    assert torch.equal(found["rollout"].group, found["group"])
    assert any(bool(weight.any()) for weight in found["policies"].parameters()[1::2])
    assert bool(found["output"].loss.isfinite().all())
    assert found["output"].loss.any()


def test_every_fence_of_the_readme_is_python_or_shell():
    languages = re.findall(r"^```(\w*)\n.*?^```", README, flags=re.MULTILINE | re.DOTALL)
    assert set(languages) <= {"python", "bash"}


def table_cells():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    return [cell for row in rows for cell in row.split("|")]


def test_readme_names_only_what_exists_and_every_function():
    named = {name for cell in table_cells() for name in re.findall(r"`(\w+)`", cell)}
    assert named <= set(mteditflow.__all__)
    missing = set(FUNCTIONS) - set(re.findall(r"\w+", README))
    assert not missing, f"functions that the README's map leaves out: {sorted(missing)}"


def test_readme_paths_exist():
    paths = re.findall(r"`((?:tests|examples|benchmarks|docs|mteditflow)/[\w./]*)`", README)
    paths += re.findall(r"\]\(([\w./]+)\)", README)
    assert paths
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
