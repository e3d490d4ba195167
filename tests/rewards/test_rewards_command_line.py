"""`python -m mteditflow.rewards check`, and the page docs/rewards.md: what it shows works."""

import itertools
import re
import shlex
import time
from pathlib import Path

import pytest
from consistency_world import ServerProcess, models_server
from mteditflow_examples import score_chains
from typer.testing import CliRunner

from mteditflow.chains.__main__ import app as chains_app
from mteditflow.planner.__main__ import app as planner_app
from mteditflow.rewards import __main__ as command
from mteditflow.rewards.__main__ import app
from mteditflow.rewards.server.__main__ import app as server_app
from mteditflow.testing.endpoint import ScriptedServer, error
from tests.loops import some
from tests.rewards.judge.test_judge import completion, honest, of_the_judge

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
ELSEWHERE = ("vllm", "python examples/train_flux.py")  # not ours; tests/flux/test_training_page.py


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
    assert result.output.count("yes") == 4
    assert re.search(r"reasoning\s+│ off", result.output)
    assert re.search(r"longest answer\s+│ 1 of at most 1,616 tokens", result.output)


def test_a_dead_endpoint_is_named_before_long(monkeypatch):
    assert command.PATIENCE <= 10
    monkeypatch.setattr(command, "PATIENCE", 0.2)
    begun = time.monotonic()
    result = run("check", "http://127.0.0.1:9/v1", "--model", "judge")
    assert time.monotonic() - begun < 60  # the client of a run waits for 300
    assert result.exit_code == 1
    assert result.output.count("no: no connection") >= 1
    assert "yes" not in result.output


def test_what_is_ignored_is_named_and_ends_with_one():
    ignorant = ScriptedServer(lambda request: completion('{"word": "hello"}'))
    with ScriptedServer(honest) as good, ignorant:
        result = run("check", good.url, ignorant.url, "--model", "judge", "--images", "2")
    assert result.exit_code == 1
    assert result.output.count("yes") == 5
    assert "no: server ignored part of the request" in result.output
    assert ignorant.url in result.output


def test_options_of_the_command_are_those_of_the_request():
    words = ["--reasoning-tokens", "4000", "--answer-tokens", "90", "--answer-format", "text"]
    words += [
        "--chat-template-kwargs",
        '{"enable_thinking": false}',
        "--extra-body",
        '{"top_p": 1}',
    ]
    with ScriptedServer(honest) as server:
        result = run("check", server.url, "--model", "judge", "--no-thinking", *words)
        asked = next(r.json for r in server.requests if of_the_judge(r.json))
    assert asked["max_completion_tokens"] == 4090
    assert asked["chat_template_kwargs"] == {"enable_thinking": False}
    assert asked["top_p"] == 1
    assert "response_format" not in asked
    assert result.exit_code == 1  # "ok" is no line of scores


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--extra-body", "{"], "expected a JSON object, got '{'"),
        (["--extra-body", "[1]"], "expected a JSON object"),
        (["--chat-template-kwargs", "enable_thinking=false"], "expected a JSON object"),
        (["--extra-body", '{"messages": []}'], "that the client does not set, got 'messages'"),
        (["--extra-body", '{"top_p": NaN}'], "extra_body: expected JSON values"),
        (["--answer-tokens", "0"], "greater than or equal to"),
        (["--reasoning-tokens", "-1"], "greater than or equal to"),
        (["--images", "0"], "greater than or equal to"),
        (["--answer-format", "xml"], "'xml' is not one of"),
    ],
)
def test_options_that_are_none_end_with_two(words, message):
    result = run("check", "http://127.0.0.1:9/v1", "--model", "judge", *words)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("python -m mteditflow.planner", ["plan", "images", "out.jsonl", "--endpoint"]),
        ("python examples/score_chains.py", ["chains.jsonl", "edited", "--judge"]),
    ],
)
@pytest.mark.parametrize("options", [["--extra-body", '{"n": 2}'], ["--extra-body", "n"]])
def test_other_commands_refuse_them_alike(name, words, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chains.jsonl").write_text("")
    given = [*words, "http://127.0.0.1:9/v1", "--model", "m", *options]
    result = CliRunner().invoke(APPS[name], given)
    assert result.exit_code == 2, result.output
    assert "extra" in result.output


@pytest.mark.parametrize("words", ["[/]", "[link=http://evil]click[/link]", "[bold", "\x1b[31mred"])
def test_a_servers_words_are_shown_as_they_stand(words):
    """No markup is obeyed, and no escape character reaches the terminal."""
    with ScriptedServer(lambda _: completion(words), itertools.repeat(error(400, words))) as server:
        result = run("check", server.url, "--model", "judge")
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    shown = words.replace("\x1b", "\\u001b")  # of the JSON that the server sends
    assert shown in "".join(result.output.split("\n"))


def test_a_bad_url_is_one_line_of_error():
    result = run("check", "127.0.0.1:8000", "--model", "judge")
    assert result.exit_code == 2
    assert "expected http" in result.output


@pytest.mark.parametrize("line", [line for line in BASH if not line.startswith(ELSEWHERE)])
def test_commands_of_the_page_exist_with_their_options(line):
    words = shlex.split(line)
    length = 3 if words[1] == "-m" else 2
    called = [word for word in words[length : length + 1] if word in SUBCOMMANDS]
    helped = CliRunner().invoke(APPS[" ".join(words[:length])], [*called, "--help"])
    assert helped.exit_code == 0, helped.output
    options = {word for word in words if word.startswith("--")}
    assert {option for option in options if option in helped.output} == options


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_the_loop_of_the_page_trains_on_what_was_not_lost(
    tiny_models, tmp_path, monkeypatch, capsys, lost
):
    monkeypatch.chdir(tmp_path)
    [code] = (code for code in PYTHON if "ConsistencyClient(" in code)
    changes = {"if len(units) == 0:": "seen.append(units)\n                if len(units) == 0:"}
    if lost:
        changes |= {"[chain] * 4": "[chain] * 3 + [other]", "=0.2)": "=0.5)"}
    for text, other in some(changes.items()):
        assert code.count(text) == 1
        code = code.replace(text, other)
    code = code.replace(
        "\nmodel =",
        "\nother = chain.model_copy(update={'instructions': ('Lose it', 'Blur')})\nmodel =",
        1,
    )
    thoughts = '{"turns": [{"analysis": "a", "score": 4}, {"analysis": "b", "score": 2}]}'

    def answer(request):
        return completion("none" if "Lose it" in str(request["messages"]) else thoughts)

    judge, server = ScriptedServer(answer), models_server(tiny_models)
    with judge, ServerProcess(server) as consistency:
        code = code.replace("http://127.0.0.1:8000/v1", judge.url)
        code = code.replace("http://127.0.0.1:8200/v1", consistency.url)
        names = {"seen": []}
        exec(compile(code, "docs/rewards.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.count("0.25 {" if lost else "0.0 {} tensor(") == 2
    assert names["model"].weight.grad.any()
    for units in some(names["seen"]):  # a row that lost a score gets no gradient
        assert {*units.rows[:, 0, 0].tolist()} == {*range(3 if lost else 4)}
