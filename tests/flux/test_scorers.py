"""Scorers of the user's own: what is wrong with one is a line that names it; its version."""

import asyncio
import dataclasses
import re
import sys
from typing import ClassVar

import anyio
import pytest
import torch
from mteditflow_examples.flux.config import Config, ConfigError, Gate, Rewards
from mteditflow_examples.flux.declared import check_terms
from mteditflow_examples.flux.scorers import ScorerError, named_scorer
from mteditflow_examples.flux.scoring import judged_by, own_scorer
from PIL import Image

from mteditflow.chains import Chain
from mteditflow.evaluation import TurnScorer
from mteditflow.evaluation.code_version import code_version
from mteditflow.objectives import Distillation
from mteditflow.rewards import BINARY, TurnScores

HERE = __name__
CHAINS = [Chain(id=x, image="x.png", instructions=("a", "b")) for x in "12"]
IMAGES = [[Image.new("RGB", (2, 2))] * 3] * 2


def scores(rows, width=2):
    exists = torch.ones(rows, width, dtype=torch.bool)
    return TurnScores(torch.ones(rows, width), exists, {})


class Good:
    scale = BINARY
    returned: ClassVar = {"following": scores(2)}

    async def score(self, chains, images):
        return self.returned


class OfTwoRowsTooFew(Good):
    returned: ClassVar = {"following": scores(1)}


class OfTurnsTooMany(Good):
    returned: ClassVar = {"following": scores(2, 5)}


class OfAList(Good):
    returned: ClassVar = [1]


class OfTensors(Good):
    returned: ClassVar = {"following": torch.ones(2, 2)}


class OfConsistencyAlone(Good):
    returned: ClassVar = {"consistency": scores(2)}


class OfPercent(Good):
    consistent = TurnScores(torch.full((2, 2), 85.0), torch.ones(2, 2) > 0, {})
    returned: ClassVar = {"following": scores(2), "consistency": consistent}


class Declaring(Good):
    terms = ("following", "consistency")


class Undeclaring(Good):
    terms = ("following",)
    returned: ClassVar = {"following": scores(2), "bonus": scores(2)}


class OfLetters(Good):
    terms = "following"


class WithoutFollowing(Good):
    terms = ("consistency",)


class Undeclared(TurnScorer):
    scale = BINARY

    def score_turns(self, turns):
        return []


class Raising(Good):
    async def score(self, chains, images):
        raise RuntimeError("boom")


class InLines(Good):
    async def score(self, chains, images):
        raise RuntimeError("boom\n  and more")


class Cancelled(Good):
    async def score(self, chains, images):
        raise asyncio.CancelledError


class Waiting(Good):
    async def score(self, chains, images):
        await anyio.sleep_forever()


class Ending(Good):
    async def score(self, chains, images):
        sys.exit(0)


class BadlyMade(Good):
    def __init__(self):
        raise OSError("no weights")


class NotAsync(Good):
    def score(self, chains, images):
        return {}


class WithArguments(Good):
    def __init__(self, path):
        self.path = path


class OfAText(Good):
    scale = "binary"


thing = 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nope", "has no 'Nope'"),
        ("thing", "expected a class, got"),
        ("NotAsync", "with the method async def score(self, chains, images), got"),
        ("WithArguments", "takes no arguments, got"),
        ("OfAText", "to be a mteditflow.rewards.Scale, such as BINARY or LIKERT, got 'binary'"),
    ],
)
def test_what_cannot_score_is_refused_before_anything_is_loaded(name, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as found:
        judged_by(Rewards(scorer=f"{HERE}:{name}"))
    assert f"{HERE}:{name}" in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OfTwoRowsTooFew", "expected scores [2, 2] with the turns [2, 2] of each chain, got [1, "),
        ("OfTurnsTooMany", "expected scores [2, 2] with the turns [2, 2] of each chain, got [2, 5"),
        ("OfAList", "expected a dictionary of TurnScores, got list [1]"),
        ("OfTensors", "following: expected TurnScores(score, turn_mask, lost), got Tensor"),
        ("Declaring", "expected those of its terms, ['following', 'consistency'], got ['following"),
        ("Undeclaring", "expected those of its terms, ['following'], got ['following', 'bonus']"),
        ("OfConsistencyAlone", "expected 'following' among them, got ['consistency']"),
        ("OfPercent", "consistency: expected scores in 0..1, got 85"),
        ("Raising", "to score 2 chains, got RuntimeError: boom (test_scorers.py, line "),
        ("InLines", "to score 2 chains, got RuntimeError: boom and more (test_scorers.py, line "),
        ("Cancelled", "to score 2 chains, got CancelledError:  (test_scorers.py, line "),
        ("Ending", "to score 2 chains, got SystemExit: 0 (test_scorers.py, line "),
    ],
)
def test_what_a_scorer_returns_is_checked(name, message):
    scorer = own_scorer(Rewards(), f"{HERE}:{name}")
    with pytest.raises(ScorerError, match=re.escape(message)) as found:
        anyio.run(scorer.score, CHAINS, IMAGES)
    assert f"{HERE}:{name}" in str(found.value)


@pytest.mark.parametrize("name", ["OfLetters", "WithoutFollowing", "Undeclared"])
def test_terms_are_names_with_following_and_a_scorer_of_turns_has_them(name):
    message = f"expected terms of {HERE}:{name} to be the names of its scores, 'following' among"
    with pytest.raises(ConfigError, match=re.escape(message)):
        own_scorer(Rewards(), f"{HERE}:{name}")


@pytest.mark.parametrize(
    ("rewards", "gate", "message"),
    [
        ({}, (), None),
        ({"weights": {"following": 1.0, "consistancies": 0.0, "identity": 1.0}}, (), None),
        (
            {"weights": {"following": 1.0, "consistancies": 0.5}},
            (),
            "rewards.weights.consistancies: expected 0, since {} declares the terms ['following', "
            "'consistency'], got 0.5; give --rewards.weights.consistancies 0, or correct the name",
        ),
        ({}, ("style",), "gate.auxiliary: expected its names, since {} declares the terms"),
    ],
)
def test_rewards_that_a_scorer_does_not_declare_are_refused_at_the_start(rewards, gate, message):
    path = f"{HERE}:Declaring"
    config = Config(rewards=Rewards(scorer=path, **rewards), gate=Gate(auxiliary=gate))
    if message is None:
        check_terms(config)
        return
    with pytest.raises(ConfigError, match=re.escape(message.format(path))):
        check_terms(config)
    check_terms(dataclasses.replace(config, objective=Distillation()))  # which reads no rewards
    check_terms(dataclasses.replace(config, rewards=Rewards(scorer=f"{HERE}:Good", **rewards)))


def test_a_floor_needs_a_declared_consistency():
    rewards = Rewards(scorer=f"{HERE}:Undeclaring", weights={"following": 1.0}, floor=0.9)
    with pytest.raises(ConfigError, match=r"rewards.floor: expected None, since .*, got 0.9"):
        check_terms(Config(rewards=rewards))


def test_a_scorer_is_cancelled_where_its_caller_is():
    async def soon():
        with anyio.move_on_after(0.01) as scope:
            await own_scorer(Rewards(), f"{HERE}:Waiting").score(CHAINS, IMAGES)
        return scope.cancelled_caught

    assert anyio.run(soon)


def test_good_scores_pass_and_a_constructor_that_raises_is_named():
    scorer = own_scorer(Rewards(), f"{HERE}:Good")
    assert anyio.run(scorer.score, CHAINS, IMAGES) is Good.returned
    with pytest.raises(ScorerError, match=r"BadlyMade to be made without .*OSError: no weights"):
        own_scorer(Rewards(), f"{HERE}:BadlyMade")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def (", "got SyntaxError: "),
        ("raise SystemExit(0)", "SystemExit: 0 (broken_{}.py, line 1)"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch, request, text, message):
    name = f"broken_{abs(hash(text)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(
        ConfigError, match=re.escape(f"got '{name}:A': import {name} ends")
    ) as found:
        named_scorer(f"{name}:A")
    number = name.removeprefix("broken_")
    assert message.format(number).removeprefix("got ") in str(found.value)


def test_a_scorer_of_the_current_folder_and_its_version(tmp_path, monkeypatch):
    """A change of a base class, or of what that imports, is another judge; of others it is not."""
    (tmp_path / "own_base.py").write_text("class Base:\n    async def score(self, c, i): ...\n")
    (tmp_path / "own_helper.py").write_text("LEVEL = 1\n")
    (tmp_path / "own_other.py").write_text("LEVEL = 1\n")
    (tmp_path / "own_scorer.py").write_text(
        "from own_base import Base\nclass A(Base):\n    def _f(self):\n        import own_helper\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x])
    for name in ("own_scorer", "own_base", "own_helper"):  # forgotten afterward, so that it reruns
        monkeypatch.setitem(sys.modules, name, sys)
        monkeypatch.delitem(sys.modules, name)
    scorer = named_scorer("own_scorer:A")
    version = code_version(scorer)
    (tmp_path / "own_other.py").write_text("LEVEL = 2\n")
    assert code_version(scorer) == version
    for name in ("own_base", "own_helper", "own_scorer"):
        path = tmp_path / f"{name}.py"
        path.write_text(path.read_text() + "# changed\n")
        assert code_version(scorer) != version, name
        version = code_version(scorer)
