"""Misspelled fields: the hint names what was meant, on the command line and in a file."""

import pytest
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import Config, ConfigError
from mteditflow_examples.flux.config_values import field_names, typed
from mteditflow_examples.flux.spelling import USUAL, hint

from mteditflow.objectives import GRPO
from tests.flux.test_config import SOUND
from tests.loops import some


def test_usual_names_are_none_of_ours_and_lead_to_fields():
    known = {*field_names(Config()), *field_names(Config(objective=GRPO()))}
    own = {name.rpartition(".")[2] for name in known if name.count(".") == 1}
    for name, field in some(USUAL.items()):
        assert field in known
        assert name not in own


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("training.lr", "training.learning_rate"),
        ("lr", "training.learning_rate"),
        ("model.rounds", "training.rounds"),
        ("training.roundz", "training.rounds"),
        ("trainig", "training"),
        ("trainig.rounds", "training.rounds"),
        ("num_epochs", "training.rounds"),
        ("batch", "evaluation.batch or sampling.batch or training.batch"),
        ("objective.kl", "objective.kl_coef"),
        ("objective.renoise.level", "objective.renoise.levels"),
    ],
)
def test_the_field_that_was_meant(name, meant):
    assert hint(name, field_names(Config())) == f"; perhaps {meant}"


def test_nothing_is_guessed_from_afar():
    assert hint("training.zebra", field_names(Config())) == ""
    assert hint("clip_range", field_names(Config())) == ""  # a usual name; nft has no such field


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--training.lr", "3"], "--training.lr, 3; perhaps --training.learning-rate"),
        (["--lr", "3"], "--lr, 3; perhaps --training.learning-rate"),
        (["--model.gradient-checkpointing"], None),
        (["--evaluation.rounds", "3"], "--evaluation.rounds, 3; perhaps --training.rounds"),
    ],
)
def test_on_the_command_line(words, line):
    with pytest.raises(ConfigError) as refused:
        parse(["shapes-nft", *words])
    line = line or "--model.gradient-checkpointing; perhaps --model.checkpointing"
    assert str(refused.value) == f"Unrecognized options: {line}"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"training": {"lr": 1}},
            "training.lr: unexpected keyword argument, got 1; perhaps training.learning_rate",
        ),
        ({"lr": 1}, "lr: unexpected keyword argument, got 1; perhaps training.learning_rate"),
        ({"trainig": {}}, "trainig: unexpected keyword argument, got {}; perhaps training"),
        (
            {"objective": {"name": "grpo", "clip_range": 1}},
            "objective.clip_range: grpo has no such field; perhaps objective.clip_high",
        ),
        ({"training": {"zebra": 1}}, "training.zebra: unexpected keyword argument, got 1"),
    ],
)
def test_in_a_file(values, line):
    with pytest.raises(ConfigError) as refused:
        typed(SOUND | values)
    assert str(refused.value) == line
