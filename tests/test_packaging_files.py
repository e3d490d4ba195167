"""Files beside the code: containers, the release, hooks, issue forms, what make says of itself."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from mteditflow_examples.demo import point_to_pictures
from mteditflow_examples.flux.command_line import parse_or_exit

from mteditflow import cli
from mteditflow.rewards.server.__main__ import app as server
from release.matrix import PYTHONS, pinned, quick_tests
from tests.loops import some
from tests.refusals import call

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
CONTAINERS = sorted((ROOT / "containers").glob("*.Containerfile"))
INSTRUCTIONS = {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "EXPOSE", "ENTRYPOINT", "CMD"}


def instructions(file):
    """Pairs of an instruction and its text, comments left out and continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]


def targets():
    return {
        name: words.split()
        for name, words in re.findall(r"^([a-z-]+):(.*)$", MAKEFILE, re.MULTILINE)
    }


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda file: file.name)
def test_a_container_file_names_files_and_commands_that_exist(file):
    steps = instructions(file)
    assert steps[0][0] == "FROM"
    assert {name for name, _ in steps} <= INSTRUCTIONS
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".containerignore").read_text(), re.MULTILINE)
    for source in some(x for name, text in steps if name == "COPY" for x in text.split()[:-1]):
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in allowed, source
    for text in some(text for name, text in steps if name == "RUN"):
        done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
        assert all(shlex.split(text))
    for text in some(text for name, text in steps if name in ("ENTRYPOINT", "CMD")):
        assert all(isinstance(word, str) for word in some(json.loads(text)))
    extras = re.findall(r"'/src\[(\w+)\]'", file.read_text())
    for extra in some(extras):
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_the_command_of_the_trainers_container_parses():
    words = dict(instructions(ROOT / "containers/trainer.Containerfile"))
    assert json.loads(words["ENTRYPOINT"]) == ["mteditflow"]
    with pytest.raises(SystemExit) as end:
        cli.main(json.loads(words["CMD"]))
    assert end.value.code == 0
    text = (ROOT / "containers/trainer.Containerfile").read_text()
    (shown,) = re.findall(r"mteditflow-trainer (train .*) \.\.\.", text)
    config = parse_or_exit([*shown.split()[1:], "--rewards.scorer", "json:loads"])
    assert config.data.chains == Path("train.jsonl")


@pytest.fixture
def served(tmp_path):
    """Run serve.sh with programs that print their words in place of the installed ones."""
    text = (ROOT / "containers/serve.sh").read_text().replace("/opt/", f"{tmp_path}/")
    (tmp_path / "serve.sh").write_text(text)
    for name in ("judge/bin/vllm", "consistency/bin/mteditflow"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)

    def run(*words):
        command = ["sh", str(tmp_path / "serve.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run


def test_the_services_start_as_the_pages_say(served):
    judge = served("judge", "--seed", "0").stdout.splitlines()
    page = (ROOT / "docs/training.md").read_text()
    (line,) = re.findall(r"vllm (serve .*)$", page, re.MULTILINE)
    assert judge == [
        *shlex.split(line)[:2],
        "--host",
        "0.0.0.0",
        *shlex.split(line)[2:],
        "--seed",
        "0",
    ]
    command, *words = served("consistency").stdout.splitlines()
    assert command == "serve"
    assert call(server, [*words, "--help"]).code == 0
    assert call(server, [*words, "--no-such-option", "--help"]).code == 2
    for word in ([], ["nothing"]):
        done = served(*word)
        assert done.returncode == 2
        assert (
            done.stderr == f"error: service: expected judge or consistency, got '{''.join(word)}'\n"
        )
    (services,) = (
        json.loads(text)
        for name, text in instructions(ROOT / "containers/rewards.Containerfile")
        if name == "CMD"
    )
    assert served(*services).stdout == served("judge").stdout


def test_the_release_builds_checks_and_publishes_without_a_token():
    text = (ROOT / ".github/workflows/release.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads "on" as true
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"}
    runs = [step["run"] for step in build["steps"] if "run" in step]
    made = [word for run in runs for word in re.findall(r"make (\w+)", run)]
    assert made == ["test", "dist"]
    assert set(made) <= set(targets())
    assert not re.search(r"secrets\.|password|token:(?! write)", text)


def test_hooks_are_steps_of_the_test_command():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    made = [hook["entry"].split()[-1] for hook in repository["hooks"]]
    assert made
    assert set(made) <= set(targets()["checks"])
    for hook in some(repository["hooks"]):
        assert hook["entry"].split()[:2] == ["make", "--silent"]
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)


def test_the_citation_has_what_the_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    project = (ROOT / "pyproject.toml").read_text()
    assert f'license = "{citation["license"]}"' in project
    (name,) = (author["name"] for author in citation["authors"])
    assert f'name = "{name}"' in project


def test_issue_forms_ask_for_something():
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"))
    for file in some(forms):
        form = yaml.safe_load(file.read_text())
        assert {"name", "description", "body"} <= form.keys()
        ids = [field["id"] for field in some(form["body"])]
        assert len(ids) == len(set(ids))
        assert any(field.get("validations", {}).get("required") for field in some(form["body"]))
        for field in some(form["body"]):
            assert field["type"] in ("input", "textarea", "dropdown", "checkboxes")
            assert field["attributes"]["label"]


def test_make_help_gives_the_time_of_every_target():
    listed = dict(re.findall(r'@echo "make ([a-z-]+) +(\S+(?: \S+)?) {2,}', MAKEFILE))
    internal = {"help", "lint", "types", "layers", "pytest", "clean"}
    assert listed.keys() == targets().keys() - internal
    for name, time in some(listed.items()):
        assert re.fullmatch(r"\d+ (min|h)|minutes|hours", time), name
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == targets().keys()


def test_the_demo_installs_the_trainer_alone_and_the_tests_everything():
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "--editable '.[train]'" in done.stdout
    assert ".[dev]" not in done.stdout
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "--editable '.[dev]'" in done.stdout
    assert "touch .venv/.installed-demo .venv/.installed" in done.stdout


def test_the_demo_ends_with_the_pictures_that_are_there(tmp_path, capsys):
    point_to_pictures(tmp_path)
    assert capsys.readouterr().out == ""
    for name in ("chains.png", "curves.png"):
        (tmp_path / name).touch()
    point_to_pictures(tmp_path)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"Open {tmp_path / 'chains.png'}: held-out chains before and after training"
    assert second.startswith(f"Open {tmp_path / 'curves.png'}: ")


def test_the_matrix_reads_the_makefile_and_the_constraints():
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", pinned("torch"))
    files = quick_tests()
    assert ROOT / "tests/losses/test_nft.py" in files
    assert all(file.is_file() for file in some(files))
    assert f">={PYTHONS[0]}" in (ROOT / "pyproject.toml").read_text()
