"""The command line: presets are sound, fields are explained, what is wrong is refused."""

import dataclasses
import re
from datetime import date
from itertools import pairwise

import pytest
from mteditflow_examples.flux.command_line import PRESETS, parse
from mteditflow_examples.flux.config import Config, ConfigError, DistillationConfig
from mteditflow_examples.flux.config_values import dumped, flat, name_of, typed
from mteditflow_examples.flux.soundness import checked
from mteditflow_examples.pictures.scene import NO_CHANGE

from mteditflow.objectives import OBJECTIVES, ForwardObjective, Guard, Renoise
from mteditflow.objectives.replay import ReplayObjective
from mteditflow.rewards import RequestOptions
from tests.loops import some

SERVICES = ["--rewards.judge", "http://judge/v1", "--rewards.judge-model", "judge"]
SERVICES += ["--rewards.consistency", "http://scores/v1"]
EMBEDDED = ("pictures", "shapes")  # worlds whose presets name a scorer
REWARDED = [name for name, kind in OBJECTIVES.items() if kind.card.rewarded]
RENOISING = [name for name in REWARDED if issubclass(OBJECTIVES[name], ForwardObjective)]
SOUND = {"rewards": {"scorer": "module:name", "weights": {"following": 1.0}}}


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_presets_are_sound(preset):
    config = parse([preset, *([] if preset.startswith(EMBEDDED) else SERVICES)])
    assert name_of(config.objective) == preset.rpartition("-")[2]
    assert parse([preset, *([] if preset.startswith(EMBEDDED) else SERVICES)]) == config


def test_presets_of_models_pay_for_no_forward_pass_that_brings_nothing():
    """As docs/cost.md finds; a preset of a world of its own is left as it was studied."""
    cited = [x for x in sorted(PRESETS.glob("*nft.toml")) if not x.stem.startswith(EMBEDDED)]
    assert len(cited) == 7
    for path in some(cited):
        objective = parse([path.stem, *SERVICES]).objective
        assert (objective.old_slope, objective.kl_share) == (0.0, 0.125)
        assert "docs/cost.md" in path.read_text()
    assert parse(["kontext-grpo", *SERVICES]).objective.stochastic_steps == 2


def test_fields_go_over_the_preset():
    config = parse(["shapes-nft", "--training.rounds", "3", "--rewards.weights.consistency", "2"])
    preset = parse(["shapes-nft"])
    assert config.training == dataclasses.replace(preset.training, rounds=3)
    assert config.rewards.weights == {"following": 1.0, "consistency": 2.0, "strict": 0.0}
    assert config.model == preset.model


def test_options_of_the_judge_in_json_and_in_a_file(tmp_path):
    words = ["--rewards.chat-template-kwargs", '{"enable_thinking": false}']
    words += ["--rewards.extra-body", '{"top_p": 0.8}', "--rewards.reasoning-tokens", "4096"]
    config = parse(["kontext-nft", *SERVICES, *words])
    assert config.rewards.request == RequestOptions(
        None, 4096, {"enable_thinking": False}, {"top_p": 0.8}
    )
    file = tmp_path / "mine.toml"
    text = (PRESETS / "kontext-nft.toml").read_text()
    table = "chat_template_kwargs = {enable_thinking = false}\nextra_body = {top_p = 0.8}\n"
    file.write_text(text.replace("[rewards]\n", f"[rewards]\nreasoning_tokens = 4096\n{table}"))
    assert parse([str(file), *SERVICES]).rewards == config.rewards
    assert typed(dumped(config)) == config


@pytest.mark.parametrize("word", ["{", "[1]", "enable_thinking"])
def test_an_option_in_json_that_is_none(word):
    with pytest.raises(ConfigError, match="expected a JSON object"):
        parse(["kontext-nft", *SERVICES, "--rewards.extra-body", word])


def test_a_file_is_a_preset(tmp_path):
    file = tmp_path / "mine.toml"
    text = (PRESETS / "shapes-grpo.toml").read_text()
    file.write_text(text.replace("rounds = 40", "rounds = 7"))
    assert parse([str(file)]).training.rounds == 7
    assert parse([str(file), "--training.rounds", "8"]).training.rounds == 8


def shown(capsys, *arguments, kind=Config):
    """What a call of help prints; it ends the program with 0."""
    with pytest.raises(SystemExit) as done:
        parse([*arguments, "--help"], kind)
    assert done.value.code == 0
    return capsys.readouterr().out


def options_of(prefix, default):
    """Names of all options of a section, nested ones too."""
    for field in dataclasses.fields(default):
        name, value = f"{prefix}.{field.name.replace('_', '-')}", getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            yield from options_of(name, value)
        elif name != "--model.options":  # of preset files alone
            yield name


def broken_early(page):
    """Lines of help texts that end although the first word of the next one still fits."""
    rows = [line[2:-2] for line in page.splitlines() if line.startswith("│ ")]
    pairs = [(a, b) for a, b in pairwise(rows) if a.startswith("      ") and b.startswith("      ")]
    return [a for a, b in pairs if len(f"{a.rstrip()} {b.split()[0]}") <= len(a)]


@pytest.mark.parametrize("kind", [Config, DistillationConfig])
def test_every_field_says_what_it_is(kind, capsys):
    found, sections = [], [field.name for field in dataclasses.fields(kind)]
    for section in some(sections):
        page = shown(capsys, "kontext-nft", section, kind=kind)
        told = re.sub(r"[│\s]+", " ", page)
        assert broken_early(page) == []
        for option in some(options_of(f"--{section}", getattr(kind(), section))):
            assert re.search(rf"{option}\b.{{20}}", told), option
        found += re.findall(r"\(default: ", told)
    assert len(found) > 70
    whole = re.sub(r"[│\s]+", " ", shown(capsys, "kontext-nft", *sections, kind=kind))
    assert len(re.findall(r"\(default: ", whole)) == len(found)
    about = shown(capsys, "kontext-nft", kind=kind)
    assert all(f"  {section} " in about for section in some(sections))
    assert len(about.splitlines()) <= len(sections) + 3  # a page that can be read at a glance


@pytest.mark.parametrize("name", [n for n, c in OBJECTIVES.items() if c.card.rewarded])
def test_help_shows_the_fields_of_the_objective_that_is_chosen(name, capsys):
    kind = OBJECTIVES[name]
    preset = "kontext-grpo" if issubclass(kind, ReplayObjective) else "kontext-nft"
    told = shown(capsys, preset, f"objective:{name}", "objective")
    assert set(re.findall(r"--(?:objective\.)(?:renoise\.)?[a-z-]+", told)) >= set(
        options_of("--objective", kind())
    )
    with pytest.raises(ConfigError, match="--help: expected a section among"):
        parse([preset, "nft", "--help"])


@pytest.mark.parametrize("kind", [Config, DistillationConfig])
def test_without_a_preset_they_are_listed(kind, capsys):
    for arguments, code in (([], 2), (["--help"], 0), (["-h"], 0)):
        with pytest.raises(SystemExit) as done:
            parse(arguments, kind)
        assert done.value.code == code
        told = capsys.readouterr().out
        assert all(path.stem in told for path in some(PRESETS.glob("*.toml")))
        assert all(f"  {field.name} " in told for field in some(dataclasses.fields(kind)))
        rewarded = [f"objective:{n} " in told for n, c in OBJECTIVES.items() if c.card.rewarded]
        assert set(rewarded) == {kind is Config}
    with pytest.raises(ConfigError, match=r"preset: expected one of \['flux2-.*, got 'nft'"):
        parse(["nft"], kind)


# objectives


def test_another_objective_of_the_kind_takes_the_fields_that_both_have():
    config = parse(["shapes-grpo", "objective:guard", "--objective.clip-low", "0.5"])
    preset = parse(["shapes-grpo"])
    own = {f.name for f in dataclasses.fields(config.objective)}
    shared = own & {f.name for f in dataclasses.fields(preset.objective)}
    assert {"clip_low", "clip_high", "kl_coef", "noise_level", "stochastic_steps"} <= shared
    assert isinstance(config.objective, Guard)
    for name in shared - {"clip_low"}:
        assert getattr(config.objective, name) == getattr(preset.objective, name)
    assert config.objective.clip_low == 0.5
    assert dataclasses.replace(config, objective=preset.objective) == preset
    awm = parse(["shapes-nft", "--objective.clip-high", "1", "objective:awm"])
    assert awm.objective.renoise == Renoise(shift=3.0)
    assert (awm.objective.clip_high, awm.objective.old_slope) == (1.0, 0.02)
    assert parse(["shapes-nft", "objective:nft"]) == parse(["shapes-nft"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["shapes-nft", "objective:guard"],
            f"objective: expected one of {RENOISING} over this preset, got 'guard'",
        ),
        (
            ["shapes-grpo", "objective:nft"],
            "objective: expected one of ['grpo', 'guard', 'dppo'] over this preset, got 'nft'",
        ),
        (
            ["shapes-nft", "objective:distillation"],
            f"objective: expected one of {RENOISING} over this preset, got 'distillation'",
        ),
        (
            ["shapes-nft", "objective:awm", "objective:dpo"],
            "objective: expected one, got objective:awm and objective:dpo",
        ),
    ],
)
def test_an_objective_of_another_kind_is_refused(words, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parse(words)


@pytest.mark.parametrize(
    "words",
    [
        ["shapes-nft", "--objective.clip-low", "0.1"],
        ["shapes-grpo", "--objective.nft-beta", "0.1"],
        ["shapes-nft", "objective:dpo", "--objective.nft-beta", "0.1"],
        ["shapes-grpo", "objective:dppo", "--objective.clip-high", "0.1"],
        ["shapes-nft", "--teacher.path", "lora"],
    ],
)
def test_a_field_of_another_objective_is_refused(words):
    with pytest.raises(ConfigError, match=f"^{words[-2]}: expected an option of .*, got one of "):
        parse(words)
    section, name = words[-2].removeprefix("--").split(".")
    name = name.replace("-", "_")
    if section == "objective":
        values = {"name": name_of(parse(words[:-2]).objective), name: 0.1}
        with pytest.raises(ConfigError, match=rf"^objective\.{name}: expected a field of"):
            typed(SOUND | {"objective": values})


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"training": {"rounds": True}}, "training.rounds: input should be a valid integer"),
        ({"training": {"rounds": "4"}}, "training.rounds: input should be a valid integer"),
        ({"training": {"rounds": 4.0}}, "training.rounds: input should be a valid integer"),
        ({"training": {"rounds": date(2026, 1, 1)}}, "training.rounds: input should be a valid"),
        ({"model": {"checkpointing": 1}}, "model.checkpointing: input should be a valid boolean"),
        ({"model": {"shard": True}}, "model.shard: input should be 'none', 'fsdp2' or 'zero3'"),
        ({"data": {"held_out": 1}}, "data.held_out: input should be a valid string"),
        ({"objective": {"name": "grpo", "clip_low": True}}, "objective.clip_low: input should be"),
        ({"objective": {"name": "grpo", "clip_low": "0.1"}}, "objective.clip_low: input should be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_value_of_another_type_is_refused(values, line):
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}.*, got "):
        typed(SOUND | values)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_dumped_is_read_again(name):
    kind = Config if OBJECTIVES[name].card.rewarded else DistillationConfig
    config = typed(SOUND | {"objective": name, "data": {"held_out": "held_out.jsonl"}}, kind)
    assert typed(dumped(config), kind) == config
    assert dumped(config)["objective"]["name"] == name
    values = flat(config)
    assert values["objective.name"] == name
    assert values["data.held_out"] == "held_out.jsonl"
    assert all(isinstance(value, (int, float, str)) for value in some(values.values()))


def test_distillation_leaves_the_objective_of_a_preset():
    config = parse(["shapes-nft", "--objective.share", "0.5"], DistillationConfig)
    assert name_of(config.objective) == "distillation"
    assert config.objective.share == 0.5
    assert config.model == parse(["shapes-nft"]).model


# what is refused


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
            {"model": {"guidance": -0.5}},
            "model.guidance: input should be greater than or equal to 0",
        ),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: "),
        (
            {"objective": "ppo"},
            f"objective.name: expected one of {REWARDED}, got 'ppo'",
        ),
        (
            {"objective": {"name": "nft", "nft_beta": 0.0}},
            "objective.nft_beta: expected a finite number in (0, inf], got 0.0",
        ),
        (
            {"objective": {"name": "nft", "renoise": {"shift": -1.0}}},
            "objective.renoise.shift: expected a finite number in (0, inf], got -1.0",
        ),
        (
            {"objective": "grpo", "sampling": {"steps": 3}},
            "objective.stochastic_steps: expected at most the 3 steps of a turn, got 5",
        ),
        (
            {"objective": "dpo", "data": {"split_groups": True}},
            "data.split_groups: expected False for dpo, which needs whole groups on a rank",
        ),
        (
            {"objective": "dpo", "training": {"stop_kl": 1.0}},
            "training.stop_kl: expected None for dpo, which has no old_kl",
        ),
        (
            {"training": {"kl_target": 1.0}},
            "training.kl_target: expected objective.kl_coef above 0 to start from, got 0",
        ),
        ({"rewards": {"scorer": None}}, "rewards: expected judge and judge_model, or a scorer"),
        (
            {"rewards": {"judge": ["http://x/v1"]}},
            "rewards.scorer: expected no judge and no consistency beside it, got 'module:name'; "
            "to score by them, give --rewards.scorer None",
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
        (
            {"rewards": {"extra_body": {"seed": 1}}},
            "rewards.extra_body: expected parameters that the client does not set, got 'seed'",
        ),
        ({"rewards": {"floor": 1.5}}, "rewards.floor: input should be less than or equal to 1"),
        ({"rewards": {"discount": 1.5}}, "rewards.discount: input should be less than or equal"),
        (
            {"rewards": {"weights": {"following": 0.0}}},
            "rewards.weights: expected weights >= 0, one of them above, got {'following': 0.0}",
        ),
        (
            {"rewards": {"scale": "binary", "success": 5}},
            "rewards.success: expected a finite number in (0, 1], got 5.0, on the scale binary",
        ),
        (
            {"rewards": {"scale": "likert", "success": 7}},
            "rewards.success: expected a finite number in (1, 5], got 7.0, on the scale likert",
        ),
        (
            {"data": {"allow_overlap": True}},
            "data.allow_overlap: has an effect only where data.held_out is given, got True",
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
    checked(typed(SOUND))
    values = {name: SOUND.get(name, {}) for name in {**SOUND, **changes} if name != "objective"}
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        checked(typed(values))


GROWS = ["--growth.first", "2", "--data.identity-share", "0.2", "--rewards.weights.identity", "0.5"]
GATES = ["--gate.auxiliary", "honest", "--objective.kl-coef", "1"]
IGNORED = {  # field: an option, and options under which it has an effect
    "rewards.discount": ("0.5", ["--rewards.credit", "to_go"]),
    "rewards.trajectory-share": ("0.25", ["--rewards.credit", "mixture"]),
    "rewards.floor-rate": ("2", ["--rewards.floor", "0.9"]),
    "rewards.floor-maximum": ("2", ["--rewards.floor", "0.9"]),
    "safety.ratio": ("warn", None),
    "safety.ratio-share": ("0.5", None),
    "model.lora-start": ("freeze", ["--model.lora", "x"]),
    "model.lora-reference": ("start", ["--model.lora", "x", "--objective.kl-coef", "1"]),
    "training.final-rate": ("0.5", []),
    "training.ema-every": ("2", ["--training.ema-decay", "0.5"]),
    "safety.collapse-window": ("5", []),
    "safety.drift-rounds": ("9", []),
    "safety.drift-width": ("9", []),
    "rewards.judge-model": ("name", None),
    "rewards.scope": ("turn", None),
    "rewards.thinking": ("", None),
    "rewards.answer-format": ("text", None),
    "rewards.answer-tokens": ("900", None),
    "rewards.reasoning-tokens": ("900", None),
    "rewards.chat-template-kwargs": ('{"enable_thinking": false}', None),
    "rewards.extra-body": ('{"top_p": 0.8}', None),
    "rewards.concurrency": ("5", None),
    "rewards.timeout": ("5", None),
    "rewards.terms": ("l1", None),
    "rewards.pairing": ("consecutive", None),
    "data.identity-instruction": (
        "Keep it",
        ["--data.identity-share", "0.2", "--rewards.weights.identity", "0.5"],
    ),
    "rewards.region-normalization": ("rms", ["--rewards.regions"]),
    "rewards.region-outside": ("0.1", ["--rewards.regions"]),
    "growth.every": ("2", ["--growth.first", "2"]),
    "growth.change": ("9", GROWS),
    "growth.patience": ("3", ["--growth.change", "9", *GROWS]),
    "gate.share": ("0.2", GATES),
    "gate.minimum": ("0.05", GATES),
    "gate.maximum": ("0.5", GATES),
    "gate.window": ("5", GATES),
    "training.reset-kl": ("0.1", ["--training.reset-steps", "9", "--objective.kl-coef", "1"]),
}
WITHOUT = {
    "safety.collapse-window": ["--safety.collapse-drop", "1"],
    "safety.drift-rounds": ["--safety.drift-members", "0"],
    "safety.drift-width": ["--safety.drift-members", "0"],
    "training.final-rate": ["--training.schedule", "constant"],
}
OF_REWARDS = {
    "rewards.weights.following": "2",
    "rewards.aggregate": "all",
    "rewards.credit": "turn",
    "rewards.groups": "informative",
    "rewards.floor": "0.9",
    "rewards.fusion": "rewards",
    "rewards.std": "none",
    "rewards.advantage-limit": "1",
    "rewards.history": "2",
    "rewards.regions": "",
    "data.identity-share": "0.1",
    "data.extra-groups": "2",
    "gate.auxiliary": "honest",
    "safety.drift-members": "2",
    "safety.max-flat": "3",
}


def option(name, value):
    if name == "rewards.thinking":
        return ["--rewards.no-thinking"]
    return [f"--{name}", value] if value else [f"--{name}"]


@pytest.mark.parametrize("name", IGNORED)
def test_a_field_that_has_no_effect_is_refused(name):
    value, effective = IGNORED[name]
    given = option(name, value)
    with pytest.raises(ConfigError, match=rf"^{name.replace('-', '_')}: has an effect only where "):
        parse(["shapes-nft", *WITHOUT.get(name, ()), *given])
    if name.startswith("safety.ratio"):
        parse(["shapes-grpo", *given])
    elif effective is None:
        parse(["kontext-nft", *SERVICES, *given])
    else:
        parse(["shapes-nft", *effective, *given])


@pytest.mark.parametrize("name", OF_REWARDS)
def test_distillation_refuses_what_makes_advantages(name):
    given = option(name, OF_REWARDS[name])
    more = ["--rewards.weights.identity", "1"] if name == "data.identity-share" else []
    more += ["--objective.kl-coef", "1"] if name == "gate.auxiliary" else []
    parse(["shapes-nft", *given, *more])
    field = ".".join(name.split(".")[:2]).replace("-", "_")
    message = rf"^{field}: has an effect only where the objective learns from rewards"
    with pytest.raises(ConfigError, match=message):
        parse(["shapes-nft", *given], DistillationConfig)


def test_every_field_that_may_be_ignored_is_tested():
    """Each of ``_ignored`` by its name, from a configuration in which all of them are wrong."""
    fields = {".".join(name.split(".")[:2]).replace("-", "_") for name in (*IGNORED, *OF_REWARDS)}
    base = parse(["shapes-nft"], DistillationConfig)
    rewards = dataclasses.replace(
        base.rewards, discount=0.5, trajectory_share=0.1, floor_rate=1.0, floor_maximum=1.0,
        judge_model="x", scope="turn", thinking=False, answer_format="text", answer_tokens=9,
        reasoning_tokens=9, chat_template_kwargs={"a": 1}, extra_body={"a": 1}, concurrency=1,
        timeout=1.0, terms="l1", pairing="consecutive", weights={"following": 2.0},
        aggregate="all", credit="turn", groups="informative", fusion="rewards", std="none",
        advantage_limit=1.0, history=1, region_normalization="rms", region_outside=0.1,
    )  # fmt: skip
    safety = dataclasses.replace(
        base.safety, ratio="warn", ratio_share=0.5, collapse_drop=1.0, collapse_window=3,
        drift_members=0, drift_rounds=9, drift_width=9.0, max_flat=3,
    )  # fmt: skip
    training = dataclasses.replace(
        base.training, ema_every=3, schedule="constant", final_rate=0.5, reset_kl=0.1
    )
    gate = dataclasses.replace(base.gate, share=0.2, minimum=0.1, maximum=0.5, window=3)
    model = dataclasses.replace(base.model, lora_start="freeze", lora_reference="start")
    data = dataclasses.replace(
        base.data, identity_share=0.1, identity_instruction="x", extra_groups=2
    )
    growth = dataclasses.replace(base.growth, every=2, change=9.0, patience=3)
    changed = dataclasses.replace(
        base, model=model, data=data, growth=growth, rewards=rewards, safety=safety,
        training=training, gate=gate,
    )  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        checked(changed, base)
    named = {line.partition(":")[0] for line in str(refused.value).splitlines()}
    # Without a floor its rate has no effect, without regions their weights, nor a gate's share.
    assert named == fields - {"rewards.floor", "rewards.regions", "gate.auxiliary"}
    one = dataclasses.replace(base, gate=dataclasses.replace(base.gate, auxiliary=("honest",)))
    with pytest.raises(ConfigError, match=r"^gate\.auxiliary: has an effect only where"):
        checked(one, base)
    for name, value in (("floor", 0.5), ("regions", True)):
        one = dataclasses.replace(base, rewards=dataclasses.replace(base.rewards, **{name: value}))
        with pytest.raises(ConfigError, match=rf"^rewards\.{name}: has an effect only where"):
            checked(one, base)


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
    for digits in some(["9" * 5000, "0x" + "f" * 5000]):
        file.write_text(f"[training]\nseed = {digits}")
        with pytest.raises(ConfigError, match=r"mine\.toml: "):
            parse([str(file)])
    for nested in some(["[" * 9000 + "]" * 9000, "{a=" * 3000 + "1" + "}" * 3000]):
        file.write_text(f"[model]\noptions = {{ x = {nested} }}")
        with pytest.raises(ConfigError, match=r"mine\.toml: "):
            parse([str(file)])
    file.write_text(".".join("a" * 3000) + " = 1")
    with pytest.raises(ConfigError, match=r"mine\.toml: "):
        parse([str(file)])
    with pytest.raises(ConfigError, match=r"^preset: expected one of "):
        parse(["x" * 5000])
    with pytest.raises(ConfigError, match="null byte"):
        parse(["\0.toml"])


def test_an_unknown_option_is_an_error_that_names_the_nearest():
    message = "Unrecognized options: --training.roundz, 3; perhaps --training.rounds"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parse(["shapes-nft", "--training.roundz", "3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('objective = ["nft"]', r"objective\.name: expected one of \[.*\], got \['nft'\]"),
        ('[objective]\nname = ["nft"]', r"objective\.name: expected one of \[.*\], got \['nft'\]"),
        ('[objective]\nname = "distillation"', r"objective\.name: expected one of .* got 'distil"),
        (
            '[objective]\nname = "nft"\nclip_low = 1',
            r"objective\.clip_low: expected a field of nft",
        ),
        (
            '[objective]\nname = "nft"\n[objective.renoise]\nlevel = 4',
            r"objective\.renoise\.level: nft has no such field",
        ),
        ("[rewards]\nfloors = 1", r"rewards\.floors: unexpected keyword argument, got 1"),
    ],
)
def test_a_wrong_name_in_a_file_is_refused_at_any_depth(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        parse([str(file)])
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_bytes('# Größe\nobjective = "nft"\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"mine\.toml: 'utf-8' codec can't decode"):
        parse([str(file)])


def test_help_of_a_section_may_stand_after_options(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["shapes-nft", "--training.batch", "3", "--help", "objective"])
    assert ended.value.code == 0
    assert "--objective.nft-beta" in capsys.readouterr().out


LONG = {  # words, and how the refusal begins
    ("--rewards.weights.identity", "1"): "data.identity_share, rewards.weights.identity: expected",
    ("--data.identity-share", "0.2"): "data.identity_share, rewards.weights.identity: expected",
    ("--data.identity-share", "1", "--rewards.weights.identity", "1"): "data.identity_share: exp",
    (
        *("--data.identity-share", "0.2", "--rewards.weights.identity", "1"),
        *("--rewards.fusion", "rewards"),
    ): "rewards.fusion: expected advantages where data.identity_share is above 0",
    (
        *("--data.turns", "1", "--data.identity-share", "0.2"),
        *("--rewards.weights.identity", "1"),
    ): "data.identity_share: has an effect only where",
    (
        "--growth.first",
        "3",
        "--growth.every",
        "1",
    ): "growth.first: expected fewer than the 3 of dat",
    ("--growth.first", "1"): "growth: expected every or change beside first",
    (*GROWS, "--growth.every", "1", "--growth.change", "9"): "growth: expected every or change",
    ("--growth.first", "1", "--growth.change", "9"): "growth.change: expected data.identity_share",
    ("--data.drift", "2"): "data.drift: has an effect only where the objective is mt_opsd",
}


@pytest.mark.parametrize("words", LONG, ids=" ".join)
def test_options_of_long_chains_that_do_not_go_together_are_refused(words):
    with pytest.raises(ConfigError, match=f"^{re.escape(LONG[words])}"):
        parse(["shapes-nft", *words])


def test_consistency_with_the_turn_before_needs_both_pairings():
    both = ["kontext-nft", *SERVICES, "--rewards.pairing", "both"]
    weighted = ["--rewards.weights.consecutive", "0.2"]
    config = parse([*both, *weighted])
    assert config.rewards.weights == {"consecutive": 0.2} | parse(both).rewards.weights
    with pytest.raises(ConfigError, match=r"^rewards\.weights\.consecutive: expected rewards\.pai"):
        parse(["kontext-nft", *SERVICES, *weighted])
    with pytest.raises(ConfigError, match=r"^rewards\.pairing: expected data\.turns above 1"):
        parse([*both, "--data.turns", "1"])
    parse(["shapes-nft", *weighted])  # the scorer of that world has it


def test_an_adapted_kl_weight_goes_with_no_floor():
    words = ["shapes-nft", "objective:crd", "--objective.kl-coef", "0.01"]
    words += ["--training.kl-target", "0.01", "--objective.kl-floor", "0.009"]
    with pytest.raises(
        ConfigError, match=r"training\.kl_target: expected None beside objective\.kl_f"
    ):
        parse(words)


def test_a_plus_of_an_error_is_kept():
    words = ["shapes-nft", "objective:flow_awr", "--objective.form", "exact"]
    with pytest.raises(ConfigError, match=r"whose weight 1 \+ advantage must not be negative"):
        parse([*words, "--objective.temperature", "None"])


def test_growth_that_no_round_sees_is_refused():
    words = ["pictures-nft", "--growth.first", "2", "--training.rounds", "9", "--growth.every"]
    assert parse([*words, "8"]).growth.every == 8
    with pytest.raises(ConfigError, match=r"growth\.every: expected fewer than the 9 of training"):
        parse([*words, "9"])


@pytest.mark.parametrize("preset", ["pictures-nft", "pictures-grpo"])
def test_turns_without_a_change_are_asked_for_in_words_of_the_world(preset):
    assert parse([preset]).data.identity_instruction == NO_CHANGE


def test_weights_are_of_rewards_that_a_run_has():
    parsed = parse(["pictures-nft", "--rewards.weights.sharp_ness", "0.5"]).rewards.weights
    assert parsed["sharp_ness"] == 0.5  # of a scorer: what it gives shows when it scores
    judged = ["kontext-nft", "--rewards.judge", "http://x/v1", "--rewards.judge-model", "m"]
    judged += ["--rewards.consistency", "http://y"]
    assert parse(judged).rewards.weights.keys() == {"following", "consistency"}
    with pytest.raises(ConfigError, match=r"expected names among following, .* got foo"):
        parse([*judged, "--rewards.weights.foo=1"])
