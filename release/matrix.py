"""Lowest declared versions, installed and tested; syntax and types of Python 3.10 to 3.14.

python -m release.matrix [TORCH]

uv resolves the lowest versions that pyproject.toml allows and that go together; a direct bound
that another package raises is printed. torch is the one of constraints.txt unless TORCH, such as
2.6.0, is given: on Linux x86-64 the registry has older versions for CUDA alone, about 5 GB
installed. Everything lies below ``build/matrix``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from .dist import TINY
from .steps import ROOT, Steps, fresh_environment, pip

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILD = ROOT / "build" / "matrix"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PACKAGES = ("mteditflow", "examples", "release", "tests", "benchmarks", "docs")
EXTRAS = ("train", "testing", "ocr", "arrow")
UV = "uv==0.13.9"
CONSTRAINTS = ROOT / "constraints.txt"
NOT_ON_A_CPU = re.compile(r"^(torch|nvidia-[\w-]+|cuda-[\w-]+|triton)==")
# Packages of a test file that has to be left out where the core is installed alone.
BEYOND_THE_CORE = re.compile(
    r"^ *(?:from|import) (?:diffusers|mteditflow_examples|peft|PIL|transformers|tests\.tiny)",
    re.MULTILINE,
)
TESTS = [
    "-q",
    "-p",
    "no:cacheprovider",
    "-m",
    "not long and not bases and not slow and not compile",
]


def main() -> None:
    """Do all steps, and print them as a table."""
    torch = f"torch=={sys.argv[1]}" if len(sys.argv) > 1 else pinned("torch")
    steps = Steps()
    for version in PYTHONS:
        check_python(steps, version)
    tools = fresh_environment(BUILD / "tools")
    if steps.run("install uv", pip(tools, UV)) is not None:
        quick = quick_tests()
        python = install_lowest(steps, tools, "core", ("testing",), torch)
        if python is not None:
            alone = [x for x in quick if not BEYOND_THE_CORE.search(x.read_text("utf-8"))]
            test(steps, python, "tests of the core, without extras", alone, torch)
        python = install_lowest(steps, tools, "extras", EXTRAS, torch)
        if python is not None:
            test(steps, python, "tests of the core, with extras", quick, torch)
            train_tiny(steps, python, torch)
    steps.end()


def check_python(steps: Steps, version: str) -> None:
    """Check syntax and types for a version, and start the command where its interpreter exists."""
    own = f"py{version.replace('.', '')}"
    ruff = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "E9",
        "--target-version",
    ]
    steps.run(f"Python {version}: syntax", [*ruff, own, *PACKAGES], using="ruff")
    mypy = [
        sys.executable,
        "-m",
        "mypy",
        "--python-version",
        version,
        "--cache-dir",
        BUILD / f"mypy-{version}",
    ]
    steps.run(f"Python {version}: types", mypy, using="mypy")
    python = interpreter(version)
    if python is None:
        steps.note(f"Python {version}: bytecode, command", "", "no interpreter here")
        return
    cache = {"PYTHONPYCACHEPREFIX": str(BUILD / f"bytecode-{version}")}
    compiling = [python, "-m", "compileall", "-q", "-f", *PACKAGES]
    steps.run(f"Python {version}: bytecode", compiling, using="compileall", env=cache)
    helping = [python, "-m", "mteditflow", "--help"]
    steps.run(f"Python {version}: command", helping, using="no package installed", env=cache)


def interpreter(version: str) -> Path | None:
    """Return an interpreter of a version, if the machine has one."""
    found = [shutil.which(f"python{version}")]
    if (pyenv := shutil.which("pyenv")) is not None:
        root = Path(subprocess.check_output([pyenv, "root"], text=True).strip())
        found += map(str, sorted(root.glob(f"versions/{version}.*/bin/python")))
    for python in found:
        if (
            python is not None
            and subprocess.run([python, "-V"], capture_output=True).returncode == 0
        ):
            return Path(python)
    return None


def pinned(name: str) -> str:
    """Return the line of constraints.txt that pins a package."""
    (line,) = re.findall(rf"^{name}==\S+$", CONSTRAINTS.read_text("utf-8"), re.MULTILINE)
    return str(line)


def quick_tests() -> list[Path]:
    """Return the test files of ``make quick``."""
    text = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", " ")
    (words,) = re.findall(r"^QUICK := (.*)$", text, re.MULTILINE)
    paths = [ROOT / word for word in words.split()]
    return [
        file
        for path in paths
        for file in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])
    ]


def install_lowest(
    steps: Steps, tools: Path, name: str, extras: tuple[str, ...], torch: str
) -> Path | None:
    """Install the lowest versions of dependencies into an environment of their own."""
    wanted = [word for extra in extras for word in ("--extra", extra)]
    version = ".".join(map(str, sys.version_info[:2]))
    resolving = [
        tools.parent / "uv", "pip", "compile", "--quiet", "pyproject.toml", *wanted, "--resolution",
        "lowest-direct", "--no-annotate", "--no-header", "--python-version", version,
    ]  # fmt: skip
    lines = steps.run(f"lowest of {name}: resolved", resolving, using=UV)
    if lines is None:
        return None
    versions = [line for line in lines.splitlines() if line and not NOT_ON_A_CPU.match(line)]
    if torch != pinned("torch"):
        versions = [line for line in lines.splitlines() if line and not line.startswith("torch==")]
    tell_raised(versions)
    versions = [line for line in versions if not line.startswith("sympy==")]  # torch pins it
    python = fresh_environment(BUILD / name)
    runner = [pinned("pytest")]
    command = pip(python, torch, *versions, *runner)
    if steps.run(f"lowest of {name}: installed", command, using=torch) is None:
        return None
    return python


def tell_raised(versions: list[str]) -> None:
    """Print which direct dependencies other packages need in versions above their bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = dict(line.partition(" ")[0].split("==") for line in versions)
    for text in sorted({text for group in groups for text in group}):
        requirement = Requirement(text)
        bound = next((x.version for x in requirement.specifier if x.operator == ">="), None)
        got = found.get(requirement.name)
        if bound and got and Version(got) > Version(bound):
            print(f"    {requirement.name}: {bound} is declared, others need {got}")


def test(steps: Steps, python: Path, name: str, files: list[Path], torch: str) -> None:
    """Run tests in an environment; warnings that only old versions give are no errors."""
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", *TESTS, "-W", "default", *files]
    said = steps.run(f"{name}: {len(files)} files", command, using=torch, env=env)
    if said is not None:
        steps.note("", "", said.splitlines()[-1])


def train_tiny(steps: Steps, python: Path, torch: str) -> None:
    """Train one round in the shapes world, with the lowest versions."""
    folder = BUILD / "run"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "path").mkdir(parents=True)
    (folder / "path" / "mteditflow_examples").symlink_to(ROOT / "examples")
    env = {"PYTHONPATH": f"{ROOT}:{folder / 'path'}", "OMP_NUM_THREADS": "1"}
    world = [python, "-m", "mteditflow_examples.shapes.files", "runs/shapes"]
    steps.run("lowest of extras: write a world", world, using=torch, folder=folder, env=env)
    words = [str(word) for k, v in TINY.items() for word in (f"--{k}", v)]
    command = [python, "-m", "mteditflow", "train", "shapes-nft", *words, "--output.folder", "run"]
    steps.run("lowest of extras: one round", command, using=torch, folder=folder, env=env)


if __name__ == "__main__":
    main()
