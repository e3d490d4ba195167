"""The pytest plugin: one test per law, ids that one can read, messages without a traceback."""

import pytest

pytest_plugins = ["pytester"]

CONFTEST = 'pytest_plugins = ["mteditflow.testing.plugin"]\n'
FUNCTIONS = """
import numpy as np

def right(reward, group):
    out = np.zeros(len(reward))
    for name in np.unique(group):
        x = reward[group == name]
        out[group == name] = 0 if np.ptp(x) == 0 else (x - x.mean()) / (x.std() + 1e-4)
    return out

def wrong(reward, group):
    return right(reward, group) + reward.mean()
"""
TESTS = """
import pytest
from functions import right, wrong

@pytest.mark.laws("advantage", right, signature="numpy", examples=5)
def test_right(law):
    law()

@pytest.mark.laws("advantage", wrong, signature="numpy", only=["zero-sum", "pure"])
def test_wrong(law):
    law()
"""


@pytest.fixture
def project(pytester, monkeypatch):
    monkeypatch.syspath_prepend(pytester.path)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(functions=FUNCTIONS)
    return pytester


def run(project, *arguments):
    return project.runpytest_inprocess(
        "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", *arguments
    )


def test_one_test_per_law(project):
    project.makepyfile(TESTS)
    result = run(project, "-v", "-rs", "--strict-markers")
    counts = result.parseoutcomes()
    assert counts["failed"] == 1
    assert counts["skipped"] == 5
    assert counts["passed"] == 15
    result.stdout.fnmatch_lines(
        [
            "*::test_right?constant-group? PASSED*",
            "*::test_right?no-gradient? SKIPPED*",
            "*::test_wrong?zero-sum? FAILED*",
            "E * mteditflow.testing.law.LawBroken: zero-sum: The advantages of a group add up*",
            "E *  reward = *",
            "E *  Why it matters: *",
        ]
    )
    result.stdout.no_fnmatch_line("*hypothesis*given*")


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ('"advantages", right', "mark `laws`: kind: expected one of advantage, "),
        ('"advantage", right, signature="grpo"', "mark `laws`: signature: expected one of "),
        ('"advantage", right, only=["sum"]', "mark `laws`: law: expected one of "),
        ('"advantage", right, std=1, ddof=3', "mark `laws`: std: expected one of "),
        ('"advantage", right, shape=3', "mark `laws`: options: expected some of signature, std, "),
        (
            '"advantage", right, examples=0',
            "mark `laws`: examples: expected ",
        ),
        ('"advantage"', "mark `laws`: expected a kind and a function, got 1 arguments"),
    ],
)
def test_bad_marks_are_usage_errors(project, mark, message):
    project.makepyfile(
        f"import pytest\nfrom functions import right\n"
        f"@pytest.mark.laws({mark})\ndef test_it(law):\n    law()\n"
    )
    result = run(project)
    assert result.ret != 0
    result.stdout.fnmatch_lines([f"*test_it: {message}*"])


def test_a_mark_without_its_argument_is_a_usage_error(project):
    project.makepyfile(
        "import pytest\nfrom functions import right\n"
        '@pytest.mark.laws("advantage", right)\ndef test_it():\n    pass\n'
    )
    run(project).stdout.fnmatch_lines(["*test_it: expected an argument `law`*"])


def test_a_law_that_was_not_called_is_no_passed_test(project):
    project.makepyfile(
        "import pytest\nfrom functions import right\n"
        '@pytest.mark.laws("advantage", right, signature="numpy", only="pure")\n'
        "def test_it(law):\n    pass\n"
    )
    result = run(project)
    assert result.parseoutcomes() == {"failed": 1}
    result.stdout.fnmatch_lines(["*the law was not checked: call law()*"])
