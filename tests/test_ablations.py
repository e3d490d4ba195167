"""The paper's findings: the table of settings, the page, what is kept."""

import json
import re
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mteditflow_examples.ablations import main
from mteditflow_examples.budget import passes_of
from mteditflow_examples.findings import running
from mteditflow_examples.findings.credit import CREDIT, CREDIT_APART
from mteditflow_examples.findings.long_chains import COMPETENT_START, LONG_CHAINS
from mteditflow_examples.findings.objectives import CHOSEN, EQUAL, FORWARDS, OBJECTIVES, ROUNDS
from mteditflow_examples.findings.page import document, write_page
from mteditflow_examples.findings.regions import REGIONS
from mteditflow_examples.findings.results import Results, chain_values, long_claims
from mteditflow_examples.findings.running import FULL, SHORT, Ablations, Form, Run
from mteditflow_examples.findings.settings import BASE, FINDINGS, JUDGES, PAPER, PAPER_IN_PICTURES
from mteditflow_examples.findings.study import EIGHT, THREE, UNTRAINED, Finding, Setting, Study
from mteditflow_examples.findings.tries import METHODS, RATES, TRIES, chosen, protocol, write_tries
from mteditflow_examples.flux.config_values import dumped, name_of

from mteditflow.evaluation import Evaluation
from mteditflow.rewards import TurnScores
from mteditflow.training import Checkpoints
from tests.forked import forking
from tests.loops import some


def evaluation(seed, turns=THREE.turns, skill=0.5, rounds=0):
    generator = torch.Generator().manual_seed(seed)
    passed = torch.rand(40, turns, generator=generator) < skill
    kept = 0.9 + 0.1 * torch.rand(40, turns, generator=generator)
    scores = {"following": 1 + 4.0 * passed, "consistency": kept, "strict": passed.float()}
    terms = {k: TurnScores(x, torch.ones(40, turns) > 0, {}) for k, x in scores.items()}
    names = [f"chain {c}" for c in range(40)]
    return Evaluation(rounds, names, [["Do it"] * turns] * 40, terms, success_at=5)


def results(seeds=3, better="", study=PAPER):
    """Made-up runs, in which settings of that name are much better."""
    metrics = [{"seconds/sampling": 1.5, "seconds/updating": 1.0}]
    runs = {
        name: [
            Run(
                evaluation(seed),
                evaluation(100 * i + seed, skill=0.95 if better and better in name else 0.6),
                metrics,
            )
            for seed in range(seeds)
        ]
        for i, name in enumerate(study.settings)
    }
    long = [
        Run(evaluation(s, EIGHT.turns), evaluation(s + 50, EIGHT.turns, 0.9), ())
        for s in range(seeds)
    ]
    return Results(study, runs, long)


def finish(ablations, setting, seed):
    """Touch the evaluations of a run, as if it were complete."""
    for held_out in some(ablations._lengths(setting)):
        path = ablations._after(setting, seed, held_out)
        path.parent.mkdir(exist_ok=True)
        path.touch()


def test_values_of_chains_have_the_metrics_for_means():
    own = evaluation(0)
    for name, values in some(chain_values(own).items()):
        scale = 100 if name == "strict" else 1
        assert float(values.mean()) == pytest.approx(scale * own.estimates[name][-1], rel=1e-5)


@pytest.mark.parametrize(
    "study",
    [
        PAPER,
        PAPER_IN_PICTURES,
        TRIES,
        OBJECTIVES,
        CREDIT,
        CREDIT_APART,
        REGIONS,
        LONG_CHAINS,
        COMPETENT_START,
    ],
)
def test_settings_are_sound_and_compare_one_thing(tmp_path, study):
    short = Ablations(tmp_path, SHORT, study)
    full = replace(FULL, rounds=study.rounds)
    ablations = Ablations(tmp_path, full, study)
    for setting in some(study.settings.values()):
        own = setting.options.get("training.rounds", study.rounds)
        assert short._config(setting, 0).training.rounds == own * SHORT.rounds // study.rounds
        config = ablations._config(setting, 0)
        assert config.data.groups * config.data.group_size == 96
        assert config.evaluation.steps == config.sampling.steps
        assert config.training.rounds == setting.options.get("training.rounds", study.rounds)
        default = "distillation" if "distillation" in setting.script else "nft"
        default = "grpo" if setting.preset.endswith("-grpo") else default
        assert name_of(config.objective) == setting.options.get("objective", default)
    for finding in some(study.findings):
        labels = [setting.label for setting in finding.settings]
        assert len(set(labels)) == len(labels) >= 3
        assert {x for c in finding.claims for x in (c.higher, c.lower)} <= set(labels)
    assert study.base.name in {s.name for finding in study.findings for s in finding.settings}


def test_a_setting_is_a_preset_and_the_words_after_it(tmp_path):
    setting = Setting("AWM", {"data.group_size": 4, "objective": "awm", "objective.clip_low": 0.1})
    words = ["objective:awm", "--data.group-size", "4", "--objective.clip-low", "0.1"]
    assert setting.words == words
    assert setting.name == "shapes-nft-data.group-size=4-objective=awm-objective.clip-low=0.1"
    ablations = Ablations(tmp_path, SHORT, OBJECTIVES)
    assert ablations.arguments(setting, 0)[-5:] == words
    taught = next(s for s in OBJECTIVES.settings.values() if s.label == "distillation")
    given = ablations.arguments(taught, 2)
    lora = tmp_path / f"{OBJECTIVES.base.name}-2" / "checkpoints" / "round-000004" / "lora"
    assert ablations._config(taught, 2).teacher.path == lora
    assert given.count("--teacher.path") == 1


def test_methods_at_equal_flops_cost_what_they_say(tmp_path):
    ablations = Ablations(tmp_path, FULL, OBJECTIVES)
    assert [x.label.split(f", {x.options.get('training.rounds')}")[0] for x in EQUAL] == list(
        CHOSEN
    )
    assert len(EQUAL) == len(CHOSEN)
    for equal, (label, setting) in zip(some(EQUAL), some(CHOSEN.items()), strict=True):
        assert equal.label.startswith(label)
        config = ablations._config(setting, 0)
        passes = passes_of(config)
        sampling = config.data.turns * config.sampling.steps
        assert sampling + 3 * passes.trained + passes.forward == FORWARDS[label]
        rounds = ablations._config(equal, 0).training.rounds
        assert abs(rounds * FORWARDS[label] / (ROUNDS * FORWARDS["NFT"]) - 1) < 0.04


def test_the_best_try_is_taken_and_the_page_shows_all(tmp_path, monkeypatch):
    assert all(len({y.name for y in x.tries()}) == 2 * len(RATES) for x in some(METHODS))
    first, method = METHODS[0].tries(), METHODS[0]
    reached = iter(range(100))
    monkeypatch.setattr(
        Ablations, "result", lambda *_: Run(evaluation(0), evaluation(next(reached), skill=0.9), [])
    )
    ablations = Ablations(tmp_path, replace(FULL, held_out=256), TRIES)
    monkeypatch.setattr(Ablations, "complete_seeds", lambda own: list(own.form.seeds))
    short = Ablations(tmp_path, SHORT, TRIES)  # has none of the full study's seeds
    path = write_tries(short, tmp_path, command="make it")
    assert path == tmp_path / "tries.json"
    assert json.loads(path.read_text())["seed"] == 0
    tried = json.loads(write_tries(ablations, tmp_path, command="make it").read_text())
    rows = tried["methods"]["NFT"]
    best = max(range(4), key=lambda k: rows[k]["overall"])
    assert chosen(method, tried) == replace(first[best], label="NFT")
    for row in some(rows):
        row["overall"] = 50.0  # a tie
    assert chosen(method, tried) == replace(first[0], label="NFT")
    assert "50.0 (nft_beta 1.0, learning rate 0.001)" in protocol(tried)
    assert chosen(method, None) == replace(first[0], label="NFT")
    assert "The tries have not been run" in protocol(None)
    rows[0]["try"] = "another"
    with pytest.raises(ValueError, match=r"tries\.json: expected today's tries of NFT, got others"):
        chosen(method, tried)


def test_settings_that_differ_do_not_share_a_run(tmp_path):
    first, other = Setting("first", {"rewards.scorer": "a:b_c"}), Setting("other")
    study = replace(PAPER, base=first, findings=(), longer=None)
    same = replace(study, findings=(Finding("x", "X", (replace(first, label="same"),), ()),))
    assert len(same.settings) == 1
    for colliding in some(
        (Setting("x", {"rewards.scorer": "a:b-c"}), Setting("x", {"rewards.scorer": "A:b_c"}))
    ):
        assert colliding.name == first.name
        finding = Finding("x", "X", (other, colliding), ())
        with pytest.raises(ValueError, match=r"expected different names, got .* twice"):
            assert replace(study, findings=(finding,)).settings
    given = Setting("x", {"training.seed": 5})  # would not reach the run
    with pytest.raises(ValueError, match=r"training\.seed: expected no option of a setting, got 5"):
        Ablations(tmp_path, SHORT, PAPER).arguments(given, 0)


@pytest.mark.parametrize(
    ("after", "error"),
    [
        (evaluation(0, rounds=2), "expected round 4, got 2; remove it"),
        (
            evaluation(0, turns=2, rounds=4),
            "expected the chains of the untrained model",
        ),
    ],
)
def test_an_evaluation_of_another_round_or_of_other_chains_is_not_read(tmp_path, after, error):
    ablations = Ablations(tmp_path, SHORT, PAPER)
    evaluation(0).write(ablations._before(0, 4))
    path = ablations._after(BASE, 0)
    after.write(path)
    with pytest.raises(ValueError, match=f"{path.name}: {error}"):
        ablations.result(BASE, 0)
    evaluation(1, rounds=4).write(path)
    (path.parent / "metrics.jsonl").touch()
    assert ablations.result(BASE, 0).after.round == 4


def test_a_setting_goes_on_from_another_s_run(tmp_path, monkeypatch):
    """Whatever threads take first: the run that is needed is made once, and before."""
    first = Setting("first", {"data.turns": 2})
    then = Setting("then", {"data.turns": 1}, after=first)
    again = Setting("again", {"data.turns": 3}, after=first)
    assert then.name == "shapes-nft-data.turns=1-after-shapes-nft-data.turns=2"
    finding = Finding("x", "X", (then, again), ())
    study = replace(PAPER, base=then, findings=(finding,), longer=None)
    assert list(study.settings.values()) == [first, then, again]
    ablations = Ablations(tmp_path, replace(SHORT, seeds=(5,)), study)
    lora = tmp_path / f"{first.name}-5" / "checkpoints" / "round-000004" / "lora"
    assert ablations._config(then, 5).model.lora == lora
    made = []

    def train(_, setting, seed):
        time.sleep(0.01)
        if setting not in made:
            made.append(setting)

    monkeypatch.setattr(Ablations, "_train_alone", train)
    monkeypatch.setattr(Ablations, "_evaluate", lambda *_: None)
    assert ablations.run_all(3) == []
    assert made[0] == first
    assert sorted(map(str, made)) == sorted(map(str, (first, then, again)))


@pytest.mark.parametrize(
    "config",
    [
        {"objective": "nft", "nft": {"beta": 1.0}},  # of a version with other fields
        {"objective": {"name": "awm"}},
    ],
)
def test_a_run_with_other_fields_is_not_taken_for_one_of_a_setting(tmp_path, monkeypatch, config):
    found = SimpleNamespace(state={"config": config}, round=4)
    monkeypatch.setattr(Checkpoints, "find", lambda *_: found)
    ablations = Ablations(tmp_path, SHORT, PAPER)
    with pytest.raises(ValueError, match=r"expected a run of 'base', got another; remove it \("):
        ablations._rounds(BASE, 0)
    small = Ablations(tmp_path, SHORT, replace(PAPER, findings=FINDINGS[:1]))
    assert len(small.other_runs()) == small.total == 3
    found.state["config"] = dumped(ablations._config(BASE, 7))
    with pytest.raises(ValueError, match=r"got another; .* \(training\.seed: 7 in place of 0\)"):
        ablations._rounds(BASE, 0)
    moved = dumped(ablations._config(BASE, 0))
    moved["model"]["path"] = "elsewhere"
    moved["output"] = {}
    found.state["config"] = moved
    assert ablations._rounds(BASE, 0) == 4


def test_the_page_says_what_the_numbers_say(tmp_path):
    ablations = Ablations(tmp_path, FULL, PAPER)
    for seed in range(3):
        for setting in PAPER.settings.values():
            finish(ablations, setting, seed)
    text = document(results(better="aggregate=successes"), ablations, command="make it")
    assert "| Scoring | Overall(3): Likert average > binary average" in text
    row = next(line for line in text.splitlines() if "Likert average > binary average |" in line)
    assert "**reversed**" in row
    row = next(line for line in text.splitlines() if "binary average > binary AND |" in line)
    assert "**seen**" in row
    assert "Seeds 0, 1, 2, 22 settings: 66 runs of 20 rounds" in text
    for finding in some(FINDINGS):
        assert text.count(f"findings_{finding.name}.png") == 1
        assert all(f"\n| {setting.label} | " in text for setting in some(finding.settings))
    assert len(re.findall(r"\| 2\.5 \|\n", text)) == sum(len(f.settings) for f in FINDINGS)
    assert long_claims(results().long)["Marginal(8)"].verdict == "seen"


def test_the_untrained_model_is_a_setting_that_is_not_run(tmp_path, monkeypatch):
    ablations = Ablations(tmp_path, FULL, OBJECTIVES)
    assert UNTRAINED.name not in OBJECTIVES.settings
    monkeypatch.setattr(Ablations, "complete_seeds", lambda _: [0, 1])
    monkeypatch.setattr(
        Ablations, "result", lambda _, s, k: Run(evaluation(k, skill=0.3), evaluation(k + 9), [])
    )
    found = Results.read(ablations)
    assert found.long == []
    before = found.values(UNTRAINED, "overall")
    base = found.before(OBJECTIVES.base, "overall")
    assert float(before.mean()) == pytest.approx(base)
    gain = found.difference(OBJECTIVES.base, UNTRAINED)
    after = found.values(OBJECTIVES.base, "overall")
    assert gain.mean == pytest.approx(float((after - before).mean()))


def test_what_is_missing_is_counted_and_nothing_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Ablations, "run_all", None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("mteditflow_examples.findings.page.draw_finding", lambda *_: None)
    with pytest.raises(SystemExit, match="no seed is complete, so there is no page"):
        main("findings", workers=0, runs=tmp_path, docs=tmp_path / "docs")
    assert "Missing: 66 of 66 runs" in capsys.readouterr().out

    ablations = Ablations(tmp_path, FULL, PAPER)
    for setting in PAPER.settings.values():
        finish(ablations, setting, 1)
    assert ablations.complete_seeds() == [1]
    longer = ablations._after(BASE, 1, EIGHT)
    longer.unlink()  # interrupted between two evaluations
    assert ablations.missing()[22:23] == [(BASE, 1)]
    assert ablations.complete_seeds() == []
    longer.touch()
    monkeypatch.setattr(Results, "read", lambda _: results(seeds=1))
    main("findings", workers=0, runs=tmp_path, docs=tmp_path / "docs")
    assert "Missing: 44 of 66 runs" in capsys.readouterr().out
    assert "Missing: 44 of 66 runs;" in (tmp_path / "docs" / "findings.md").read_text()


def test_page_and_figures_are_written_from_complete_seeds(tmp_path, monkeypatch):
    ablations = Ablations(tmp_path, SHORT, PAPER)
    with pytest.raises(ValueError, match="expected a seed with all settings, got none"):
        write_page(ablations, tmp_path, command="make it")
    for setting in PAPER.settings.values():
        finish(ablations, setting, 0)
    monkeypatch.setattr(Results, "read", lambda _: results(seeds=1))
    page = write_page(ablations, tmp_path / "docs", command="make it")
    text = page.read_text()
    assert "no interval from one seed" in text
    named = set(re.findall(r"\((findings_\w+\.png)\)", text))
    assert named == {path.name for path in page.parent.glob("*.png")}


@pytest.mark.slow
def test_runs_are_made_kept_and_refused(tmp_path, monkeypatch):
    small = {"data.groups": 4, "data.group_size": 4, "data.turns": 1}
    base = Setting("small", small)
    judged = Setting("judged", {"rewards.scorer": f"{JUDGES}:CarefulJudge", **small})
    form, finding = Form((3,), rounds=1, train=16, held_out=4), Finding("x", "X", (judged,), ())
    ablations = Ablations(tmp_path, form, replace(PAPER, base=base, findings=(finding,)))
    with forking(running):
        assert ablations.run_all(2) == []
    assert ablations.complete_seeds() == [3]
    run = ablations.result(judged, 3)
    assert (len(run.metrics), run.before.round, run.after.round) == (1, 0, 1)
    assert run.before.turns == run.after.turns == THREE.turns  # whatever was trained
    assert ablations.result(ablations.study.base, 3, EIGHT).after.turns == EIGHT.turns
    assert run.before.chain_ids == run.after.chain_ids == ablations.result(base, 3).after.chain_ids

    monkeypatch.setattr(running.subprocess, "Popen", None)  # is there, so nothing runs
    assert ablations.run_all(1) == []
    ablations._after(judged, 3).unlink()
    ablations._run(judged, 3).rename(ablations._run(Setting("x", {"data.turns": 2}), 3))
    other = Setting("x", {"data.turns": 2})
    ablations = replace(ablations, study=replace(PAPER, base=other, findings=()))
    [failure] = ablations.run_all(1)
    assert "expected a run of" in failure
    assert "got another; remove it" in failure


def test_models_are_loaded_by_one_thread_at_a_time(tmp_path, monkeypatch):
    inside, most = [], []

    def evaluate(_, setting, seed, held_out):
        inside.append((setting, seed, held_out))
        time.sleep(0.02)
        most.append(len(inside))
        inside.pop()

    monkeypatch.setattr(Ablations, "_train", lambda *_: None)
    monkeypatch.setattr(Ablations, "_evaluate", evaluate)
    assert Ablations(tmp_path, Form((0, 1), rounds=1, train=16, held_out=4), PAPER).run_all(4) == []
    assert len(most) >= 2 * len(PAPER.settings)
    assert set(most) == {1}


@pytest.mark.slow
def test_trainers_that_fail_are_told_one_by_one(tmp_path, monkeypatch):
    bad = tuple(Setting(x, {"training.minibatches": n}) for n, x in ((7, "bad"), (5, "worse")))
    form, finding = Form((0,), rounds=1, train=16, held_out=4), Finding("x", "X", bad[1:], ())
    ablations = Ablations(tmp_path, form, Study("x", "X", bad[0], "bad", (finding,)))
    with forking(running):
        first, second = ablations.run_all(2)
    assert "training.minibatches: expected a divisor of the 96 trajectories" in first
    assert "got 7" in first
    assert "got 5" in second
    assert sys.executable in first
    assert ablations.complete_seeds() == []
