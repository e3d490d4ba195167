"""`mteditflow check`: a table, the failing case, and exit codes."""

import re
import sys

import pytest

from mteditflow.testing.__main__ import main
from mteditflow.testing.advantage import ADVANTAGE

FUNCTIONS = """
import numpy as np
import torch

def right(reward, group):
    out = np.zeros(len(reward))
    for name in np.unique(group):
        x = reward[group == name]
        out[group == name] = 0 if np.ptp(x) == 0 else (x - x.mean()) / (x.std() + 1e-4)
    return out

def lets_lost_in(reward, group, valid=None):
    return right(np.nan_to_num(reward, posinf=0, neginf=0).clip(-99, 99), group)

def adapter(function, reward, group, valid):
    return function(reward.numpy(), group.numpy())

def velocity_error(velocity, target):
    return (velocity.float() - target.detach().float()).square().flatten(1).mean(1)

def surrogate(log_prob, old_log_prob, advantage):
    return -(log_prob - old_log_prob.detach()).exp() * advantage.detach()

def stops(reward, group):
    raise SystemExit(3)

def counts(reward, group):
    mean = np.bincount(group, reward) / np.maximum(np.bincount(group), 1)
    return reward - mean[group]

def raises(reward, group):
    raise TypeError("inside")

def nothing(reward, group):
    return None

async def asynchronous(reward, group):
    return reward

def yields(reward, group):
    yield from reward

def nullary():
    return 0

def records(items):
    reward, group = np.array([[x["reward"] or 0, x["group"]] for x in items]).T
    return list(right(reward, group))

def in_torch(reward, group):
    return torch.zeros_like(reward)

def mean_surrogate(log_prob, old_log_prob, advantage):
    return surrogate(log_prob, old_log_prob, advantage).mean()

def likert(score, turn_mask):
    if score.min() < 1:
        raise ValueError("likert: expected 1 to 5")
    return Methods.mean(score, turn_mask)

class Tracker:
    def update(self, prompts, rewards):
        return right(rewards, np.unique(prompts, return_inverse=True)[1])

class Methods:
    @staticmethod
    def credit(reward, turn_mask):
        return torch.where(turn_mask, reward, 0)

    @staticmethod
    def mean(score, turn_mask):
        return (torch.where(turn_mask, score, 0).double().sum(1) / turn_mask.sum(1))
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "functions_of_a_user.py").write_text(FUNCTIONS)
    (tmp_path / "broken_module_of_a_user.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("functions_of_a_user", None)


def run(capsys, *words):
    code = main([word.replace("USER", "functions_of_a_user") for word in words])
    return code, capsys.readouterr().out


def test_a_right_function(capsys):
    code, out = run(capsys, "advantage", "USER:right", "--signature", "numpy", "--examples", "5")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == (
        "19 laws of functions_of_a_user:right, called as fn(reward, group), numpy arrays"
    )
    assert "  holds    pure                      Arguments and global state are left" in lines[1]
    assert "(the function takes no tensors)" in out
    assert lines[-1] == "14 hold, 0 broken, 5 skipped; 5 examples each"
    assert len(lines) == len(ADVANTAGE) + 3


def test_a_wrong_function(capsys):
    only = ("--only", "monotone", "--only", "mask-equals-deletion")
    code, out = run(
        capsys, "advantage", "USER:lets_lost_in", "--signature", "numpy", "--examples", "50", *only
    )
    assert out.startswith("2 laws of ")
    assert code == 1
    assert "called as fn(reward, group, valid=valid), numpy arrays" in out
    assert "\n  BROKEN   mask-equals-deletion " in out
    assert "\nmask-equals-deletion: An invalid reward takes no part" in out
    assert "\n  valid = [" in out


def test_a_broken_law_is_printed_before_the_next_one_is_checked(capsys):
    """Ids are positions: no law but that of ids draws one that they do not reach."""
    words = ("USER:counts", "--signature", "numpy", "--examples", "20")
    only = ("--only", "pure", "relabeled-groups", "shift")
    code, out = run(capsys, "advantage", *words, *only)
    assert code == 1
    assert re.search(r"(?s)\n  BROKEN .*\n  group = \[-1\]\n.*\n  holds    shift ", out)
    assert out.endswith("\n\n2 hold, 1 broken, 0 skipped; 20 examples each\n")


def test_an_exception_inside_the_function_breaks_the_laws_and_is_shown_once(capsys):
    code, out = run(capsys, "advantage", "USER:raises", "--signature", "numpy", "--examples", "1")
    assert code == 1
    assert "\n14 laws break in one way: pure, permutation, " in out
    assert out.count("the exception TypeError: inside") == 1
    assert out.count("           as pure, above\n") == 13
    assert out.endswith("\n0 hold, 14 broken, 5 skipped; 1 examples each\n")


@pytest.mark.parametrize(
    "words",
    [
        ("advantage", "USER:right", "--signature", "USER:adapter", "--only", "pure", "shift",
         "--examples", "5"),
        ("aggregator", "USER:Methods.mean", "--values", "0", "0.5", "1", "--examples", "5"),
        ("aggregator", "USER:Methods.mean", "--no-any-order", "--without", "monotone",
         "--examples", "5"),
        ("loss", "USER:velocity_error", "--inputs", "velocity=latent", "target=latent",
         "--trained", "velocity", "--examples", "5", "--without", "compiled-equals-eager"),
        ("policy-loss", "USER:surrogate", "--valid", "none", "--clip-low", "none",
         "--clip-high", "none",
         "--without", "compiled-equals-eager", "--examples", "5"),
    ],
)  # fmt: skip
def test_kinds_and_their_options(capsys, words):
    code, out = run(capsys, *words)
    assert code == 0, out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: KIND"),
        (("advantage",), "the following arguments are required: MODULE:FUNCTION"),
        (("reward", "USER:right"), "argument KIND: invalid choice: 'reward' (choose from "),
        (("advantage", "USER"), "function: expected MODULE:FUNCTION, got 'functions_of_a_user'"),
        (("advantage", "USER:"), "function: expected MODULE:FUNCTION, got "),
        (("advantage", "no_such_module:f"), "function: no_such_module cannot be imported: "),
        (
            ("advantage", "./USER.py:right"),
            "function: expected MODULE:FUNCTION, got './functions_of_a_user.py:right'; write "
            "functions_of_a_user:right",
        ),
        (
            ("advantage", "USER:right", "--signature", "USER:left"),
            "--signature: functions_of_",
        ),
        (
            ("advantage", "USER:Methods"),
            "function: expected a function, got the class Methods; pass an instance",
        ),
        (
            ("advantage", "USER:nullary", "--signature", "verl"),
            "function: a call of the kind advantage raises the exception TypeError: nullary() take",
        ),
        (
            ("advantage", "USER:right", "--signature", "verl"),
            "signature: expected numpy for this function, got verl (fn(token_level_rewards, ",
        ),
        (  # numpy takes tensors, and returns arrays
            ("advantage", "USER:right"),
            "signature: expected numpy for this function, got mteditflow (fn(reward, group, ",
        ),
        (
            ("advantage", "USER:records"),
            "signature: expected records for this function, got mteditflow (fn(reward, group, ",
        ),
        (
            ("advantage", "USER:in_torch"),
            "signature: expected tensors for this function, got mteditflow (fn(reward, group, ",
        ),
        (
            ("advantage", "USER:in_torch", "--signature", "numpy"),
            "signature: expected tensors for this function, got numpy (fn(reward, group), numpy",
        ),
        (
            ("advantage", "USER:Tracker"),
            "signature: expected flow-grpo for the class Tracker, got mteditflow",
        ),
        (
            ("policy-loss", "USER:mean_surrogate", "--clip-low", "none", "--clip-high", "none"),
            "reduction: expected mean for a result of shape [], got none",
        ),
        (
            ("aggregator", "USER:likert"),
            "values: expected scores that the function accepts, such as 1 5, got 0 1, which gives "
            "the exception ValueError: likert: expected 1 to 5",
        ),
        (  # a credit
            ("aggregator", "USER:Methods.credit"),
            "function: expected shape [1], got shape [1, 1]",
        ),
        (
            ("advantage", "USER:nothing", "--signature", "numpy"),
            "function: expected an array of real numbers, got None",
        ),
        (
            ("advantage", "USER:asynchronous", "--signature", "numpy"),
            "function: expected a result, but asynchronous is async and returns a coroutine",
        ),
        (
            ("advantage", "USER:yields", "--signature", "numpy"),
            "function: expected a result, but yields yields and returns a generator",
        ),
        (
            ("advantage", "USER:right", "--signature", "numpy", "--only", "no-gradient"),
            "only, without: expected a law that applies, got no-gradient: the function takes no",
        ),
        (
            ("loss", "USER:right", "--inputs", "x=latent", "x=number", "--trained", "x"),
            "--inputs: expected each name once, got x=latent x=number",
        ),
        (
            ("loss", "USER:right", "--inputs", "x=latent", "--trained", "x", "--valid", "x"),
            "valid: expected a name other than those of the inputs, got 'x'",
        ),
        (
            ("credit", "USER:right", "--values", "nan", "1"),
            "values: expected at least two different finite numbers, got (nan, 1.0)",
        ),
        (
            ("advantage", "broken_module_of_a_user:f"),
            "function: broken_module_of_a_user cannot be imported: ZeroDivisionError: division by",
        ),
        (
            ("advantage", "USER:stops"),
            "function: a call of the kind advantage raises ",
        ),
        (
            ("advantage", "USER:right", "--only", "pure", "--without", "pure"),
            "only, without: ",
        ),
        (
            ("policy-loss", "USER:surrogate", "--reduction", "sum"),
            "reduction: expected ",
        ),
        (
            ("policy-loss", "USER:surrogate", "--clip-low", "1.5"),
            "clip_low: expected ",
        ),
        (("advantage", "USER:left"), "function: functions_of_a_user has no left"),
        (("advantage", "USER:np.pi"), "function: expected a callable, got float"),
        (("advantage", "USER:right", "--signature", "grpo"), "signature: expected one of "),
        (("advantage", "USER:right", "--std", "x"), "std: expected one of group, batch, none"),
        (("advantage", "USER:right", "--ddof", "x"), "argument --ddof: invalid int value: 'x'"),
        (("advantage", "USER:right", "--examples", "0"), "examples: expected an integer >= 1"),
        (("advantage", "USER:right", "--only", "sum"), "law: expected one of pure, "),
        (("advantage", "USER:right", "--level", "x"), "unrecognized arguments: --level x"),
        (
            ("advantage", "USER:right", "--exmaples", "9"),
            "unrecognized arguments: --exmaples 9; perhaps --examples",
        ),
        (("loss", "USER:right"), "the following arguments are required: --inputs, --trained"),
        (
            ("loss", "USER:right", "--inputs", "x", "--trained", "x"),
            "--inputs: expected NAME=ROLE, got x",
        ),
        (
            ("loss", "USER:right", "--inputs", "x=image", "--trained", "x"),
            "inputs: expected roles latent, ",
        ),
        (
            ("policy-loss", "USER:surrogate", "--clip-low", "few"),
            "argument --clip-low: invalid float value: 'few'",
        ),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        run(capsys, *words)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1


def test_help_names_kinds_and_options(capsys):
    for words in (["--help"], ["advantage", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "laws of fn(log_prob, old_log_prob, advantage), rows [M] to [M] or a mean" in out
    assert "flow-grpo" in out
    assert "it detaches constants or rewards itself (no)" in out
