"""docs/testing.md: its files run, its commands print what it shows, its tables are complete."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import mteditflow.testing
from mteditflow.testing import FAULTS, KINDS, SIGNATURES
from mteditflow.testing.__main__ import main
from tests.loops import some

pytest_plugins = ["pytester"]

PAGE = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, flags=re.DOTALL))
RUNS = re.findall(
    r"```bash\nmteditflow check (.*?)\n```\n\n```text\n(.*?)```", PAGE, flags=re.DOTALL
)


@pytest.fixture
def folder(pytester, monkeypatch):
    for name, text in FILES.items():
        (pytester.path / name).parent.mkdir(parents=True, exist_ok=True)
        # The page draws 200 examples; what it shows needs no more than a few.
        text = re.sub(r'signature="numpy"\)(?=\n)', 'signature="numpy", examples=10)', text)
        (pytester.path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(pytester.path), *sys.path])
    yield pytester
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, at 0 / 0
@pytest.mark.parametrize(("words", "shown"), RUNS, ids=[words.split()[1] for words, _ in RUNS])
def test_commands_print_what_the_page_shows(folder, capsys, words, shown):
    wrong = "holds" not in shown
    # Of a wrong function the page shows one law; of a right one the table.
    more = ["--only", shown.partition(":")[0]] if wrong else ["--examples", "20"]
    assert main([*shlex.split(words), *more]) == int(wrong)
    printed = capsys.readouterr().out.replace("20 examples", "200 examples")
    for part in some(shown.split("  ...\n")):
        assert part in printed


def test_the_tests_of_the_page_pass(folder):
    result = folder.runpytest_inprocess(
        "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "test_advantages.py", "test_property.py"
    )
    counts = result.parseoutcomes()
    assert (counts["passed"], counts["skipped"]) == (17, 3)
    assert "failed" not in counts
    text = result.stdout.str()
    shown = re.search(r"```text\n(test_advantages.*?)```", PAGE, flags=re.DOTALL)[1]
    for line in some(shown.splitlines()):
        assert line.partition(" SKIPPED")[0] in text


def test_the_call_and_the_adapter_of_the_page_run(folder, capsys):
    runpy.run_path(str(folder.path / "check.py"))
    (folder.path / "by_name.py").write_text(
        "import advantages\n"
        "def f(*, rewards, prompt_ids, ok):\n"
        "    ok = None if ok is None else ok.numpy()\n"
        "    return advantages.group_advantage(rewards.numpy(), prompt_ids.numpy(), ok)\n"
    )
    words = ["advantage", "by_name:f", "--signature", "adapter:by_keywords", "--examples", "10"]
    assert main(words) == 0
    assert "called as by_keywords" in capsys.readouterr().out


def test_the_tables_are_complete():
    assert re.findall(r"^\| `([\w-]+)` \| `(?:fn|Tr)", PAGE, flags=re.MULTILINE) == list(SIGNATURES)
    doors = re.findall(r"^\| `([\w-]+)` \| `(check_\w+)` \|", PAGE, flags=re.MULTILINE)
    assert {kind for kind, _ in doors} == set(KINDS)
    for _, door in some(doors):
        assert door in mteditflow.testing.__all__
    assert int(re.search(r"\[(\d+) ways to lose", PAGE)[1]) == len(FAULTS) + 1


def test_every_name_of_the_page_exists():
    for name in some(re.findall(r"`((?:check_|[A-Z])\w+)[`(]", PAGE)):
        assert name in {*mteditflow.testing.__all__, "AssertionError", "None", "Tracker"}, name
