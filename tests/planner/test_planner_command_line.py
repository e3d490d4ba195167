"""The commands of docs/planning.md as they stand there, with the real tiny GroundingDINO."""

import doctest
import os
import re
import shlex
from itertools import chain, repeat
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mteditflow._locks import sole_writer
from mteditflow.chains import read_chains
from mteditflow.planner.__main__ import app
from mteditflow.rewards.consistency.models import GroundingDino
from mteditflow.testing.endpoint import ScriptedServer, good
from tests.planner.scripted_model import ScriptedModel, write_pictures
from tests.rewards.tiny_models import save_grounding_dino

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
COMMANDS = re.findall(
    r"^python -m mteditflow\.planner (.*)$", PAGE.read_text("utf-8"), re.MULTILINE
)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return save_grounding_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    write_pictures(tmp_path / "images", 3)
    return tmp_path


def run(command, **replaced):
    for old, new in replaced.values():
        command = command.replace(old, str(new))
    return CliRunner().invoke(app, shlex.split(command))


def test_the_page_from_images_to_a_plot(folder, detector):
    plan, stats = COMMANDS
    with ScriptedServer(ScriptedModel(nonsense=0.2)) as server:
        result = run(
            plan,
            endpoint=("http://127.0.0.1:8000/v1", server.url),
            detector=("IDEA-Research/grounding-dino-tiny", detector),
        )
    assert result.exit_code == 0, result.output
    chains = read_chains("chains.jsonl").chains
    assert "planned" in result.output
    assert len(chains) == 6
    result = run(stats)
    assert result.exit_code == 0, result.output
    assert "6 chains, 18 steps" in result.output
    with Image.open("statistics.png") as image:
        image.load()


def test_the_examples_of_the_page():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert (failed, tried > 5) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--turns 10", "error: turns: expected at most 9"),
        ("--weight nicer=1", "error: weights: expected one of"),
        ("--weight subject_add", "error: weight: expected TYPE=NUMBER, got subject_add"),
        ("--chains-per-image 0", "error: Invalid value for '--chains-per-image'"),
        ("--endpoint http://127.0.0.1:9", "error: endpoints: expected URLs that end in /v1"),
        ("--detector nowhere/at/all", "error: "),
    ],
)
def test_errors_are_one_line(folder, detector, arguments, message):
    command = (
        f"plan images x.jsonl --model m --endpoint http://127.0.0.1:9/v1 --detector {detector}"
    )
    result = run(f"{command} {arguments}")
    assert result.exit_code == 2
    assert message in result.output


def test_a_second_planner_of_a_file_is_refused_before_it_loads(folder, monkeypatch):
    monkeypatch.setattr(GroundingDino, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with ScriptedServer(ScriptedModel()) as server, sole_writer(folder, "x.jsonl"):
        words = f"--model m --endpoint {server.url} --detector tiny"
        refused = run(f"plan images x.jsonl {words}")
        assert refused.exit_code == 2
        assert re.match(
            rf"error: x\.jsonl: expected no other writer, got process {os.getpid()} \(",
            refused.stderr,
        )
        assert not (folder / "x.jsonl").exists()
        with pytest.raises(pytest.fail.Exception, match="loaded"):  # another file is free
            run(f"plan images x.v2 {words}")


def test_an_endpoint_that_dies_while_chains_are_planned_ends_with_1(folder, detector):
    async def gone(exchange):
        exchange.writer.close()

    with ScriptedServer(ScriptedModel(), chain([good], repeat(gone))) as server:
        words = f"--model m --endpoint {server.url} --detector {detector} --attempts 1"
        ended = run(f"plan images x.jsonl {words}")
    assert ended.exit_code == 1, ended.output
    assert ended.stderr.splitlines()[-1].startswith("error: planning stopped: ")


def test_stats_of_no_file(folder):
    result = run("stats nothing.jsonl")
    assert result.exit_code == 2
    assert "error: " in result.output
