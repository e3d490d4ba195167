"""The demo, its report and the scripts around it, as small as they go."""

import json
import math
from dataclasses import replace

import pytest
import torch
import train_shapes
import typer
from evidence import KINDS, document, draw_summary, folder, run
from PIL import Image
from shapes.editor import load_editor
from shapes.evaluate import METRICS, compare, summarise
from shapes.pretrain import single_edits
from shapes.report import Log, print_table
from shapes.rewards import Scored, Scores, exact_rewards
from shapes.world import draw_index, make_chains
from train_shapes import LINKED, RECIPES, TURNS, Objective, Recipe, Rewards, main, train

from mteditflow.rewards import Fault, Lost, TurnScores

pytestmark = pytest.mark.slow


class Silent:
    """A log that keeps what it is told."""

    def __init__(self):
        self.scores, self.valid = [], []

    def progress(self, updates):
        return range(updates)

    def add(self, scores, rewards, valid):
        assert all(reward.shape == (len(scores.following),) for reward in rewards.values())
        self.scores.append(scores)
        self.valid.append(valid)


def scores(success, consistency=0.5):
    success = torch.tensor(success, dtype=torch.bool)
    full = torch.full(success.shape, consistency)
    return Scores(likert=1 + 4 * success.long(), success=success, consistency=full, strict=success)


@pytest.fixture(scope="module", params=list(Objective))
def demo(request, tmp_path_factory):
    output = tmp_path_factory.mktemp(request.param.value)
    small = replace(RECIPES[request.param], chains=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, request.param, small)
        main(objective=request.param, seed=3, output=output, updates=1, held_out=8)
    return output


def test_the_demo_leaves_a_report_and_pictures(demo):
    report = json.loads((demo / "report.json").read_text())
    assert report["objective"] in demo.name
    assert (report["seed"], report["updates"], report["held_out_chains"]) == (3, 1, 8)
    assert report["invalid_reward_share"] == 0
    assert report["seconds"] > 0
    for when in ("before", "after"):
        for name in METRICS:
            assert len(report[when][name]) == 3
            for value, (low, high) in zip(
                report[when][name], report[when][f"{name}_interval"], strict=True
            ):
                assert 0 <= low <= value <= high <= 100
    for picture in ("learning_curve.png", "chains.png"):
        with Image.open(demo / picture) as image:
            assert min(image.size) > 300


def test_the_table_tells_the_gain(demo, capsys):
    print_table(json.loads((demo / "report.json").read_text()))
    printed = capsys.readouterr().out
    assert "Overall at turn 3" in printed
    assert printed.count("before") >= 5


@pytest.mark.parametrize("objective", list(Objective))
def test_training_changes_the_policy_and_repeats_with_the_seed(objective):
    recipe = Recipe(updates=1, learning_rate=1e-2, consistency_weight=0.5, chains=2, group=4)
    runs = []
    for seed in (0, 0, 1):
        pipeline, log = load_editor(), Silent()
        train(objective, recipe, seed, pipeline, log, exact_rewards)
        weights = [w for n, w in pipeline.transformer.named_parameters() if ".current." in n]
        runs.append(torch.cat([weight.detach().flatten() for weight in weights]))
        assert log.scores[0].following.score.shape == (8, 3)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert runs[0].isfinite().all()


@pytest.mark.parametrize("objective", list(Objective))
def test_a_lost_reward_trains_nothing(objective, monkeypatch):
    lost, trained = [1, 6], []
    rows = getattr(train_shapes, f"{objective.value}_rows")

    def some_lost(chains, pictures):
        following, consistency, _ = exact_rewards(chains, pictures)
        score = following.score.clone()
        score[lost, 1] = torch.nan
        why = {(b, 1): Lost(Fault.timeout, "no answer within 60 s", 4) for b in lost}
        return Scored(TurnScores(score, following.turn_mask, why), consistency, {"time-out": 2})

    def spied(rollout, policies, index, advantage, *rest):
        assert advantage.isfinite().all()
        trained.extend(index[0].tolist())
        return rows(rollout, policies, index, advantage, *rest)

    monkeypatch.setattr(train_shapes, f"{objective.value}_rows", spied)
    log, pipeline = Silent(), load_editor()
    recipe = Recipe(updates=1, learning_rate=1e-2, consistency_weight=0.5, chains=2, group=4)
    train(objective, recipe, 0, pipeline, log, some_lost)
    assert set(trained) == set(range(8)) - set(lost)
    assert (~log.valid[0]).nonzero().flatten().tolist() == lost
    assert all(weight.isfinite().all() for weight in pipeline.transformer.parameters())


def test_the_log_counts_lost_rewards_and_leaves_them_out_of_means():
    log = Log("nft", seed=0)
    rewards = {"following": torch.tensor([1.0, torch.nan, 0.0, 0.5])}
    likert = torch.tensor([[5.0, 5.0], [torch.nan, 5.0], [1.0, 5.0], [5.0, 5.0]])
    exists = torch.ones(4, 2, dtype=torch.bool)
    following = TurnScores(likert, exists, {(1, 0): Lost(Fault.refusal, "no", 2)})
    success = Scored(following, TurnScores(likert, exists, {}), {"refusal": 1})
    log.add(success, rewards, rewards["following"].isfinite())
    log.add(success._replace(lost={}), {"following": torch.ones(4)}, exists[:, 0])
    assert log.rewards[0] == {"following": 0.5, "chains": pytest.approx(2 / 3)}
    assert (log.invalid, log.scored) == (1, 8)
    assert log.lost == {"refusal": 1}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Short runs through both services: lost answers invalid, and invented."""
    reports = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, Objective.nft, replace(RECIPES[Objective.nft], chains=4))
        for invent in (False, True):
            output = tmp_path_factory.mktemp("served")
            main(
                output=output,
                updates=2,
                held_out=8,
                rewards=Rewards.served,
                lost_answers=0.3,
                invent=invent,
            )
            reports[invent] = json.loads((output / "report.json").read_text())
    return reports


def test_served_rewards_tell_how_many_answers_were_lost_and_why(served):
    lost = served[False]["lost_answers"]
    assert 0.1 < lost["share"] < 0.5
    assert sum(lost["reasons"].values()) == round(lost["share"] * 64)
    assert set(lost["reasons"]) <= {fault.value for fault in Fault}
    assert served[False]["invalid_reward_share"] == lost["share"]


@pytest.mark.parametrize("option", [{"lost_answers": 0.1}, {"invent": True}])
def test_options_of_served_rewards_are_refused_with_exact_ones(option, tmp_path):
    with pytest.raises(typer.BadParameter, match="expected --rewards served"):
        main(output=tmp_path, updates=1, held_out=2, **option)


def test_invented_rewards_hide_the_loss_from_training(served):
    assert served[True]["invalid_reward_share"] == 0
    assert served[True]["lost_answers"]["share"] > 0.1
    assert served[True]["rewards"][0] != served[False]["rewards"][0]


def test_the_table_tells_what_the_judge_lost(served, capsys):
    print_table(served[False])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"The judge lost {served[False]['lost_answers']['share']:.1%} of its answers" in printed


def test_held_out_chains_share_nothing_with_pretraining_or_training():
    """The pictures and chains that the scripts really use, not only the splits they come from."""
    pictures, _ = single_edits(200, seed=0, corruption=0.25)
    seen = {picture.numpy().tobytes() for picture in pictures.flatten(0, 1)}
    options = {"turns": TURNS, "linked": LINKED}
    training = make_chains(480, seed=0, split="train", **options)
    held_out = make_chains(256, seed=0, split="held_out", **options)
    seen |= {draw_index(state).tobytes() for chain in training for state in chain.states}
    assert not seen & {draw_index(state).tobytes() for c in held_out for state in c.states}
    assert not {(c.initial, *c.instructions) for c in held_out} & {
        (c.initial, *c.instructions) for c in training
    }


def test_defaults_train_three_turns_with_the_mean_of_likert_scores():
    assert set(RECIPES) == set(Objective)
    assert all(recipe.updates >= 20 and recipe.group >= 8 for recipe in RECIPES.values())


def test_summary_by_hand():
    summary = summarise(scores([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1]]))
    assert summary["marginal"] == [75, 75, 25]
    assert summary["instruction_following"] == [75, 50, 25]
    assert summary["content_consistency"] == [50, 50, 50]
    assert summary["overall"] == pytest.approx(
        [100 * math.sqrt(share / 2) for share in (0.75, 0.5, 0.25)], abs=0.01
    )


def test_comparison_by_hand_and_without_any_success():
    before = scores([[1, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0]])
    report = compare(before, scores([[1, 1, 1]] * 4, consistency=1.0))
    assert report["kept"] == [0.25, 1.0]
    assert report["kept_difference"] == 75
    assert report["content_consistency"] == 50
    assert report["marginal"] == 75
    assert report["marginal_interval"][0] > 0
    nothing = compare(scores([[0, 0, 0]] * 4), scores([[0, 0, 0]] * 4))
    assert nothing["kept"] == [None, None]
    assert "NaN" not in json.dumps(nothing)


def test_evidence_is_written_from_reports(demo, tmp_path):
    report = json.loads((demo / "report.json").read_text())
    kind = report["objective"]
    folder(tmp_path, kind, 3).mkdir()
    (folder(tmp_path, kind, 3) / "report.json").write_text(json.dumps(report))
    there = folder(tmp_path, kind, 3)
    assert run(KINDS[kind], 3, there, workers=1) == report  # is there already, so nothing runs
    reports = {(kind, seed): report for kind in KINDS for seed in (0, 1)}
    text = document(reports)
    assert text.count("| seed 0, before |") == len(KINDS)
    assert report["versions"]["torch"] in text
    draw_summary(reports, tmp_path / "summary.png")
    with Image.open(tmp_path / "summary.png") as image:
        assert min(image.size) > 300


def test_evidence_refuses_the_report_of_another_run(tmp_path):
    output = folder(tmp_path, "grpo-twice", 1)
    assert output.name == "grpo-1-twice"
    output.mkdir(parents=True)
    (output / "report.json").write_text(json.dumps({"objective": "nft", "seed": 1}))
    with pytest.raises(ValueError, match="expected a report of"):
        run(KINDS["grpo-twice"], 1, output, workers=1)
