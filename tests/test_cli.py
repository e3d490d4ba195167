"""The ``mteditflow`` command: help is quick, wrong words are one line, every program has help."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mteditflow
from mteditflow import cli
from tests.processes import ended

ROOT = Path(__file__).parents[1]
HEAVY = ["accelerate", "diffusers", "matplotlib", "peft", "transformers"]
QUICK = """
import io, json, sys
from contextlib import redirect_stdout
from mteditflow import cli

def code(call, *arguments):
    sys.argv = [*arguments]
    with redirect_stdout(io.StringIO()) as told:
        try:
            call()
        except SystemExit as ended:
            heavy = sorted({name.partition(".")[0] for name in sys.modules} & set(%r))
            return [ended.code, bool(told.getvalue()), heavy]

bare = [code(cli.main, "mteditflow", *words) for words in (["--help"], [], ["--version"])]
bare.append([name for name in ("torch", "numpy", "typer", "tyro") if name in sys.modules])
import mteditflow_examples.self_distillation, mteditflow_examples.train_flux as train_flux
train = ("train_flux.py", "shapes-nft", "--help")
print(json.dumps([
    bare,
    *(code(cli.main, "mteditflow", name, "--help") for name in cli.COMMANDS),
    code(train_flux.main, "train_flux.py", "--help"),
    code(train_flux.main, "train_flux.py"),
    code(train_flux.main, *train),
    code(train_flux.main, *train, "objective"),
    code(mteditflow_examples.self_distillation.main, "self_distillation.py", "--help"),
]))
"""


def exit_code(*words):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return ended.value.code


def test_help_imports_none_of_the_heavy_libraries():
    command = [sys.executable, "-c", QUICK % HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    bare, *others = json.loads(done.stdout)
    assert bare == [[0, True, []], [2, True, []], [0, True, []], []]
    codes = [*(0 for _ in cli.COMMANDS), 0, 2, 0, 0, 0]
    assert others == [[code, True, []] for code in codes]


def test_a_wrong_word_is_one_line(tmp_path, capsys):
    done = ended(["-m", "mteditflow", "nope"], tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    words = ", ".join(cli.COMMANDS)
    assert done.err == f"error: command: expected one of {words}, got 'nope'\n"
    with pytest.raises(SystemExit, match="2"):
        cli.main(["judgd"])
    assert capsys.readouterr().err.endswith("got 'judgd'; perhaps judge\n")


def test_without_words_the_commands_are_listed(capsys):
    for words, code in (([], 2), (["--help"], 0), (["-h"], 0)):
        assert exit_code(*words) == code
        told = capsys.readouterr().out.splitlines()
        assert told[0] == cli.USAGE
        listed = [line.split()[0] for line in told[1:] if line]
        assert listed == list(cli.COMMANDS)
        assert max(map(len, told)) <= 100


def test_version(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"mteditflow {mteditflow.__version__}\n"


def test_help_is_wrapped_to_the_terminal_and_not_to_the_source(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    for words, line in (
        (["chains", "convert"], r"Stop at the first bad line .* write no file\. With --lenient"),
        (["evaluate"], r"are not made again, and stored answers are not requested again\. "),
    ):
        monkeypatch.setattr(sys, "argv", sys.argv)  # the command sets it
        assert exit_code(*words, "--help") == 0
        assert re.search(line, capsys.readouterr().out)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)  # the command sets it
    assert exit_code(name, "--help") == 0
    told = capsys.readouterr().out
    assert f"mteditflow {name}" in told
    assert "python -m" not in told.splitlines()[0]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch, capsys):
    def importing(module):
        assert module == cli.COMMANDS[name].module
        raise ModuleNotFoundError("No module named 'tyro.conf'", name="tyro.conf")

    monkeypatch.setattr(cli.importlib, "import_module", importing)
    assert exit_code(name) == 2
    expected = f"error: mteditflow {name} needs tyro: "
    expected += f"pip install 'mteditflow[{cli.COMMANDS[name].extra}]'\n"
    assert capsys.readouterr().err == expected


def test_arguments_reach_the_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert exit_code("train", "nft") == 2
    assert capsys.readouterr().err.startswith("error: preset: expected one of ['flux2-")
    assert exit_code("train", "kontext-ntf") == 2
    assert capsys.readouterr().err.endswith("got 'kontext-ntf'; perhaps kontext-nft\n")


def test_what_a_package_says_of_a_missing_extra_is_one_line(monkeypatch, capsys):
    def importing(module):
        raise ImportError("mteditflow.pipelines needs peft: pip install 'mteditflow[diffusers]'")

    monkeypatch.setattr(cli.importlib, "import_module", importing)
    assert exit_code("train") == 2
    assert capsys.readouterr().err == (
        "error: mteditflow.pipelines needs peft: pip install 'mteditflow[diffusers]'\n"
    )


def test_a_fault_of_the_package_itself_is_not_called_a_missing_package(monkeypatch):
    def importing(name):
        raise ModuleNotFoundError("no module", name="mteditflow_examples.flux.nothing")

    monkeypatch.setattr(cli.importlib, "import_module", importing)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train"])
