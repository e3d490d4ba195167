"""`python -m mteditflow.rewards check`, and the page docs/rewards.md: what it shows works."""

import re
import shlex
from pathlib import Path

import pytest
from consistency_world import ServerProcess, models_server
from mteditflow_examples import score_chains
from typer.testing import CliRunner

from mteditflow.chains.__main__ import app as chains_app
from mteditflow.planner.__main__ import app as planner_app
from mteditflow.rewards.__main__ import app
from mteditflow.rewards.server.__main__ import app as server_app
from mteditflow.testing.endpoint import ScriptedServer
from tests.rewards.judge.test_judge import completion, honest

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text("utf-8")
BASH = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


APPS = {
    "python -m mteditflow.rewards": app,
    "python -m mteditflow.rewards.server": server_app,
    "python -m mteditflow.chains": chains_app,
    "python -m mteditflow.planner": planner_app,
    "python examples/score_chains.py": score_chains.app,
}
SUBCOMMANDS = ("check", "plan")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_an_endpoint_that_honours_everything():
    with ScriptedServer(honest) as server:
        result = run("check", server.url, "--model", "judge")
    assert result.exit_code == 0, result.output
    assert result.output.count("yes") == 3


def test_what_is_ignored_is_named_and_ends_with_one():
    ignorant = ScriptedServer(lambda request: completion('{"word": "hello"}'))
    with ScriptedServer(honest) as good, ignorant:
        result = run("check", good.url, ignorant.url, "--model", "judge", "--images", "2")
    assert result.exit_code == 1
    assert result.output.count("yes") == 4
    assert "no: server ignored part of the request" in result.output
    assert ignorant.url in result.output


def test_a_bad_url_is_one_line_of_error():
    result = run("check", "127.0.0.1:8000", "--model", "judge")
    assert result.exit_code == 2
    assert "expected http" in result.output


@pytest.mark.parametrize("line", [line for line in BASH if not line.startswith("vllm")])
def test_commands_of_the_page_exist_with_their_options(line):
    words = shlex.split(line)
    length = 3 if words[1] == "-m" else 2
    called = [word for word in words[length : length + 1] if word in SUBCOMMANDS]
    helped = CliRunner().invoke(APPS[" ".join(words[:length])], [*called, "--help"])
    assert helped.exit_code == 0, helped.output
    options = {word for word in words if word.startswith("--")}
    assert {option for option in options if option in helped.output} == options


@pytest.mark.slow
def test_the_loop_of_the_page_runs(tiny_models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [code] = PYTHON
    thoughts = '{"turns": [{"analysis": "a", "score": 4}, {"analysis": "b", "score": 2}]}'
    judge, server = ScriptedServer(lambda _: completion(thoughts)), models_server(tiny_models)
    with judge, ServerProcess(server) as consistency:
        code = code.replace("http://127.0.0.1:8000/v1", judge.url)
        code = code.replace("http://127.0.0.1:8200/v1", consistency.url)
        exec(compile(code, "docs/rewards.md", "exec"), {})
    assert capsys.readouterr().out.count("0.0 {} tensor(") == 2
