"""The command line: presets are sound, fields are explained, what is wrong is refused."""

import dataclasses
import re

import pytest
from mteditflow_examples.flux.config import PRESETS, Config, ConfigError, checked, parse

SERVICES = ["--rewards.judge", "http://judge/v1", "--rewards.judge-model", "judge"]
SERVICES += ["--rewards.consistency", "http://scores/v1"]


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_presets_are_sound(preset):
    config = parse([preset, *([] if preset.startswith("shapes") else SERVICES)])
    assert config.objective == preset.rpartition("-")[2]
    assert parse([preset, *([] if preset.startswith("shapes") else SERVICES)]) == config


def test_fields_go_over_the_preset():
    config = parse(["shapes-nft", "--training.rounds", "3", "--rewards.weights.consistency", "2"])
    preset = parse(["shapes-nft"])
    assert config.training == dataclasses.replace(preset.training, rounds=3)
    assert config.rewards.weights == {"following": 1.0, "consistency": 2.0, "strict": 0.0}
    assert config.model == preset.model


def test_a_file_is_a_preset(tmp_path):
    file = tmp_path / "mine.toml"
    text = (PRESETS / "shapes-grpo.toml").read_text()
    file.write_text(text.replace("rounds = 40", "rounds = 7"))
    assert parse([str(file)]).training.rounds == 7
    assert parse([str(file), "--training.rounds", "8"]).training.rounds == 8


def test_every_field_says_what_it_is(capsys):
    with pytest.raises(SystemExit) as done:
        parse(["kontext-nft", "--help"])
    assert done.value.code == 0
    told = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    for section in dataclasses.fields(Config):
        if not dataclasses.is_dataclass(section.default_factory):
            continue
        for field in dataclasses.fields(section.default_factory):
            option = f"--{section.name}.{field.name.replace('_', '-')}"
            if option != "--model.options":  # of preset files alone
                assert re.search(rf"{option}\b.{{20}}", told), option
    assert len(re.findall(r"\(default: ", told)) > 70


def test_without_a_preset_they_are_listed(capsys):
    with pytest.raises(SystemExit):
        parse([])
    told = capsys.readouterr().out
    assert all(path.stem in told for path in PRESETS.glob("*.toml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {"rounds": 0}},
            "training.rounds: input should be greater than or equal to 1",
        ),
        ({"training": {"round": 3}}, "training.round: unexpected keyword argument, got 3"),
        ({"trainig": {}}, "trainig: unexpected keyword argument"),
        (
            {"model": {"guidance": 0.5}},
            "model.guidance: input should be greater than or equal to 1",
        ),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: "),
        (
            {"objective": "ppo"},
            "objective: input should be 'nft', 'awm', 'dpo', 'grpo', 'guard' or 'dppo', got 'ppo'",
        ),
        (
            {"objective": "grpo", "sampling": {"steps": 3, "stochastic_steps": 4}},
            "sampling.stochastic_steps: expected at most the 3 steps of a turn, got 4",
        ),
        (
            {"objective": "dpo", "nft": {"beta": 200.0}, "data": {"split_groups": True}},
            "data.split_groups: expected False for dpo, whose pairs are of one rank",
        ),
        ({"objective": "dpo"}, "nft.beta: expected 10 or more for dpo (2000 is usual), got 1.0"),
        ({"rewards": {"scorer": None}}, "rewards: expected judge and judge_model, or a scorer"),
        (
            {"rewards": {"judge": ["http://x/v1"]}},
            "rewards.scorer: expected no judge and no consistency beside it",
        ),
        (
            {
                "rewards": {
                    "scorer": None,
                    "judge": ["http://x/v1"],
                    "judge_model": "x",
                    "floor": 0.9,
                }
            },
            "rewards.consistency: expected the URL of a server, or weight 0 and no floor for it",
        ),
        ({"rewards": {"floor": 1.5}}, "rewards.floor: input should be less than or equal to 1"),
        ({"rewards": {"discount": 1.5}}, "rewards.discount: input should be less than or equal"),
        (
            {"rewards": {"weights": {"following": 0.0}}},
            "rewards.weights: expected weights >= 0, one of them above, got {'following': 0.0}",
        ),
        (
            {"rewards": {"scale": "binary"}},
            "rewards.success: expected at most 1 on a binary scale, got 5.0",
        ),
        (
            {"training": {"ema_decay": 0.0}, "evaluation": {"policy": "ema"}},
            "evaluation.policy: expected current or old, since ema_decay = 0 keeps no average",
        ),
        (
            {"data": {"groups": 3, "group_size": 3}, "training": {"minibatches": 2}},
            "training.minibatches: expected a divisor of the 9 trajectories of a round, got 2",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(changes, message):
    sound = {"rewards": {"scorer": "module:name", "weights": {"following": 1.0}}}
    checked(sound)
    values = {name: sound.get(name, {}) for name in {**sound, **changes}}
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) else change
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        checked(values)


def test_a_broken_file_is_named(tmp_path):
    file = tmp_path / "mine.toml"
    with pytest.raises(ConfigError, match=r"mine\.toml: cannot be read \(No such file"):
        parse([str(file)])
    file.write_text("objective = ")
    with pytest.raises(ConfigError, match=r"mine\.toml: Invalid value"):
        parse([str(file)])
    file.write_text("[training]\nrounds = -1")
    with pytest.raises(ConfigError, match=r"mine\.toml: training\.rounds: input should be greater"):
        parse([str(file)])


def test_an_unknown_option_is_an_error(capsys):
    with pytest.raises(SystemExit) as done:
        parse(["shapes-nft", "--training.roundz", "3"])
    assert done.value.code == 2
    assert "--training.rounds" in capsys.readouterr().err
