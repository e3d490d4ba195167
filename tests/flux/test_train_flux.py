"""The trainer in one process: micro-batches, what a round holds, ratios, stopping, going on."""

import json
import math
import signal
import sys
import time

import pytest
import torch
from accelerate import Accelerator
from mteditflow_examples import train_flux
from mteditflow_examples.flux import loading
from mteditflow_examples.flux.advantages import round_rewards
from mteditflow_examples.flux.config import ConfigError
from mteditflow_examples.flux.held_out import HeldOut
from mteditflow_examples.flux.reporting import refuse_unsound_rewards
from mteditflow_examples.flux.sampling import next_chains, sample
from mteditflow_examples.flux.scoring import scale_of
from mteditflow_examples.flux.updating import _judge, check_first_ratios, update
from safetensors.torch import load_file

from mteditflow import check_ratio
from mteditflow.chains import ChainDataset, EditedImages, read_chains, write_chains
from mteditflow.evaluation.provenance import JudgedBy, Provenance
from mteditflow.objectives import Output, Units
from mteditflow.pipelines import ReplayError
from mteditflow.rewards import BINARY, LIKERT, Fault, InvalidRewardsError, Lost, TurnScores
from mteditflow.training import Updater
from tests.flux.rounds import first_round, started, turn_values
from tests.flux.worlds import ENVIRONMENT, SCRIPT, options, run, weights
from tests.glossary import undocumented
from tests.loops import some
from tests.processes import Process
from tests.samples_of_scores import evaluation, turn_scores


class Recording(torch.optim.SGD):
    """Keeps the gradient of each step, and goes nowhere."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.seen = []

    def step(self, closure=None):
        self.seen += [torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]])]


GRPO = ("--objective.stochastic-steps", 2, "--objective.kl-coef", 0.1)
CLIP = ("--objective.clip-low", 0.5, "--objective.clip-high", 0.5)


ALL = {  # objective: a preset's, and options under which every term of its loss weighs something
    "nft": ("nft", "--objective.kl-coef", 0.1, "--objective.norm-coef", 0.1),
    "awm": (
        *("nft", *CLIP, "--objective.old-kl-coef", 0.1),
        *("--objective.norm-coef", 0.1),
    ),
    "flow_awr": ("nft", "--objective.temperature", 0.5, "--objective.kl-coef", 0.1),
    "dpo": (
        *("nft", "--objective.dpo-beta", 10, "--objective.kl-coef", 0.1),
        *("--objective.renoise.levels", 2),
    ),
    "grpo": ("grpo", *GRPO),
    "guard": ("grpo", *GRPO, *CLIP),
    "dppo": ("grpo", *GRPO, "--objective.threshold", 1),
}


@pytest.mark.parametrize("objective", ALL)
def test_micro_batches_do_not_change_gradients(world, tmp_path, objective, monkeypatch):
    # In double precision: kernels for one row round otherwise than those for eight, and float32
    # shows it (up to 3e-5 where old and current velocity are close).
    monkeypatch.setitem(loading.DTYPES, "float32", torch.float64)
    preset, *more = ALL[objective]
    more = [f"objective:{objective}", *more, "--data.groups", 2, "--data.group-size", 2]
    with started(world, tmp_path, *more, objective=preset) as run_:
        for name in ("current", "old"):
            for weight in run_.policies._parameters(name):
                weight.data = weight.data.double()
        first = first_round(run_, advance=1e-3)
        (units,) = first.units()
        optimizer = Recording(run_.policies.parameters())
        updater = Updater(optimizer, run_.policies.parameters, max_grad_norm=1e9)
        for size in (len(units), 3, 1):
            step = updater.step(units.split(size), first.losses, count=units.count)
            assert step.outcome == "taken"
        whole, *others = optimizer.seen
        assert whole.norm() > 0
        for other in some(others):
            assert float((other - whole).norm() / whole.norm()) <= 1e-9


def test_pairs_are_of_one_group_and_turn_and_none_at_all_changes_nothing(world, tmp_path):
    with started(world, tmp_path, "objective:dpo", "--objective.dpo-beta", 200) as run_:
        first = first_round(run_)
        (units,) = first.units()
        (winner, loser), group = units.rows.unbind(dim=1), first.rollout.trajectory.group
        assert len(winner) > 0
        assert torch.equal(group[winner[:, 0]], group[loser[:, 0]])
        assert torch.equal(winner[:, 1:], loser[:, 1:])
        values = [first.advantage[rows[:, 0], rows[:, 1]] for rows in (winner, loser)]
        assert (values[0] > values[1]).all()
        pairs = set()  # of each group and turn whose members differ, the best against the worst
        for g in group.unique().tolist():
            own = (group == g).nonzero().flatten()
            for turn in range(2):
                value = first.advantage[own, turn]
                if value.max() > value.min():
                    pairs.add((int(own[value.argmax()]), int(own[value.argmin()]), turn))
        drawn = zip(winner[:, 0].tolist(), loser[:, 0].tolist(), winner[:, 1].tolist(), strict=True)
        assert set(drawn) == pairs
        assert units.count == len(units)
        best = torch.zeros_like(first.advantage)
        best[0, 0] = 1  # the only pair of the round, in one of its two minibatches
        parts = first.given(advantage=best).units(2)
        assert sorted((len(part), part.count) for part in parts) == [(0, 0), (1, 1)]
        before = run_.policies.state_dict("current")
        updater = Updater(run_.optimizer, run_.policies.parameters, max_grad_norm=1.0)
        run_.begin_round()
        flat = torch.zeros_like(first.advantage)
        update(run_, updater, first.velocity, first.rollout, flat, first.valid)
        assert run_.numbers["training/empty_updates"] == run_.config.training.minibatches == 2
        assert (run_.state.updates, run_.state.skipped) == (0, 0)
        after = run_.policies.state_dict("current")
        assert all(torch.equal(x, after[name]) for name, x in some(before.items()))


def test_sampling_batches_do_not_change_trajectories(world, tmp_path):
    latents = []
    for size in (16, 2, 1):
        with started(world, tmp_path, "--sampling.batch", size) as run_:
            run_.first_round = 0
            rollout, _, terms = sample(run_, next_chains(run_))
            latents.append((rollout.trajectory.latents[:, 0], terms["following"].score))
    for other, score in some(latents[1:]):
        assert torch.allclose(other, latents[0][0], atol=1e-5)
        assert torch.equal(score, latents[0][1])


def test_groups_share_chains_and_differ_in_noise(world, tmp_path):
    with started(world, tmp_path) as run_:
        run_.first_round = 0
        trajectory = sample(run_, next_chains(run_))[0].trajectory
        assert trajectory.group.unique(return_counts=True)[1].tolist() == [4, 4, 4, 4]
        noise = trajectory.latents[:, 0, 0].flatten(1)
        assert (torch.cdist(noise, noise) + 100 * torch.eye(16) > 1).all()
        assert trajectory.latents.shape[1] == 2  # data.turns cuts chains of three


@pytest.mark.parametrize("family", ["kontext", "klein"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_ratios_on_the_first_rollout_are_one(world, klein_world, tmp_path, family, guidance):
    chosen = {"kontext": world, "klein": klein_world}[family]
    more = (*GRPO, "--data.groups", 2, "--model.guidance", guidance)
    with started(chosen, tmp_path, *more, objective="grpo", family=family) as run_:
        first = first_round(run_)
        check = run_.objective.check_ratios(first.velocity, first.rollout, trajectories=8, size=8)
        check_first_ratios(run_, first.velocity, first.rollout)
    assert check.ok
    assert float(check.deviation.nan_to_num().max()) < 1e-6
    assert "ratio check passed" in (tmp_path / "log.txt").read_text()


def test_a_ratio_that_is_not_one_stops_the_run_or_warns(world, tmp_path):
    wrong = check_ratio(torch.full((1, 1), 0.1), torch.zeros(1, 1), clip=1e-3)
    with started(world, tmp_path, *GRPO, objective="grpo") as run_:
        with pytest.raises(ReplayError, match=r"ratio check failed: largest .* latents rounded"):
            _judge(run_, wrong, corrected=False)
        first = first_round(run_, advance=0.05)
        with pytest.raises(ReplayError, match="ratio check failed"):
            check_first_ratios(run_, first.velocity, first.rollout)
    more = (*GRPO, "--safety.ratio", "warn")
    with started(world, tmp_path, *more, objective="grpo") as run_:
        _judge(run_, wrong, corrected=False)
    assert "warning: ratio check failed" in (tmp_path / "log.txt").read_text()


def test_lost_rewards_are_left_out_of_updates(world, tmp_path):
    with started(world, tmp_path) as run_:
        first = first_round(run_)
        following, group = first.scores["following"], first.rollout.trajectory.group
        score = following.score.clone()
        score[3, 1] = math.nan
        lost = {(3, 1): Lost(Fault.timeout, "no answer", 2)}
        terms = first.scores | {"following": TurnScores(score, following.turn_mask, lost)}
        advantage, valid = turn_values(run_, terms, group)
        (units,) = first.given(advantage=advantage, valid=valid).units()
        assert units.rows[:, 0, 0].unique().tolist() == [b for b in range(16) if b != 3]
        assert units.count == len(units) == 15 * 2
        assert not advantage[3].any()
        refuse_unsound_rewards(run_, round_rewards(run_.config.rewards, terms, group))
        terms["following"] = TurnScores(
            torch.full_like(score, math.nan),
            following.turn_mask,
            {(b, n): lost[3, 1] for b in range(16) for n in range(2)},
        )
        with pytest.raises(InvalidRewardsError, match=r"100% of 16 rewards are invalid"):
            refuse_unsound_rewards(run_, round_rewards(run_.config.rewards, terms, group))


def test_windows_move(world, tmp_path):
    more = ("--objective.stochastic-steps", 1, "--objective.window-interval", 2)
    with started(world, tmp_path, *more, objective="grpo") as run_:
        steps = run_.config.sampling.steps
        seen = [list(run_.objective.sampling(k, steps=steps).stochastic_steps) for k in range(6)]
        run_.first_round, run_.state.done = 2, 2
        rollout, _, _ = sample(run_, next_chains(run_))
    assert seen == [[0], [0], [1], [1], [2], [2]]
    assert rollout.step_mask.any(dim=(0, 1)).nonzero().flatten().tolist() == [1]


def test_updates_that_are_not_finite_stop_a_run_when_they_go_on(world, tmp_path):
    with started(world, tmp_path, "--safety.max-skipped", 2) as run_:
        one = torch.ones(1, 1, dtype=torch.bool)
        units = Units(torch.zeros(1, 1, 3, dtype=torch.int64), one, None, None, 1)
        bad = Updater(run_.optimizer, run_.policies.parameters, max_grad_norm=1.0).step(
            [units],
            lambda part: Output(run_.policies.parameters()[0].sum()[None] * math.nan, {}),
            count=1,
        )
        run_.begin_round()
        run_.count(bad)
        with pytest.raises(FloatingPointError, match="2 skipped updates in a row: not finite"):
            run_.count(bad)
    assert "an update was skipped, not finite" in (tmp_path / "log.txt").read_text()


@pytest.fixture
def refused(monkeypatch, capsys):
    """Exit code and standard error of a trainer that refuses to start, in this process."""

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_flux.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            train_flux.main()
        assert ended.value.code not in (0, None)
        return f"{ended.value.code} {capsys.readouterr().err}"

    return start


def test_errors_at_the_start_are_told_in_a_line(world, tmp_path, refused):
    told = run(*options(world, tmp_path, "--training.rounds", 0), code=2)
    line = "error: training.rounds: input should be greater than or equal to 1, got 0\n"
    assert told == line
    told = refused(*options(world, tmp_path, "--rewards.scorer", "nothing:Here"))
    assert told.startswith("2 error: rewards.scorer: expected module:name, got 'nothing:Here'")


class Bare:
    """A scorer that declares no scale."""

    async def score(self, chains, images):
        return {"following": turn_scores([[1.0, 0.0]] * len(chains))}


class OnZeroToOne(Bare):
    """A scorer whose scores are not on the scale that it declares."""

    scale = LIKERT


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rewards.success", 7], "rewards.success: expected a finite number in (1, 5], got 7.0"),
        (["--rewards.scale", "binary"], "rewards.scale: expected the scale that mteditflow_examp"),
        (["--rewards.scorer", f"{__name__}:Bare"], "add to it, for instance, scale = mteditflow."),
        (
            [
                "--rewards.scorer",
                f"{__name__}:Bare",
                "--rewards.scale",
                "binary",
                "--rewards.success",
                5,
            ],
            "rewards.success: expected a finite number in (0, 1], got 5.0",
        ),
    ],
)
def test_scales_and_thresholds_are_refused_before_anything_is_loaded(
    world, tmp_path, refused, more, message
):
    told = refused(*options(world, tmp_path / "run", *more))
    assert told.startswith("2 error: rewards.")
    assert told.count("\n") == 1
    assert message in told
    assert not (tmp_path / "run").exists()


def test_a_side_that_the_pipeline_would_round_is_refused(world, tmp_path, refused):
    told = refused(*options(world, tmp_path / "run", "--model.resolution", 13))
    assert told.startswith("2 ")
    assert told.endswith("error: model.resolution: expected a multiple of 2 pixels, got 13\n")


def test_scores_off_the_declared_scale_end_the_run(world, tmp_path, refused):
    scorer = ("--rewards.scorer", f"{__name__}:OnZeroToOne", "--rewards.weights.consistency", 0)
    told = refused(*options(world, tmp_path, *scorer))
    assert told.startswith("1 ")  # it had begun
    assert "following: expected whole scores in 1..5, got 0; OnZeroToOne declares" in told


def test_a_scale_on_the_command_line_is_taken_where_none_is_declared(world, tmp_path):
    scorer = ("--rewards.scorer", f"{__name__}:Bare", "--rewards.scale", "binary")
    with started(world, tmp_path, *scorer) as run_:
        assert scale_of(run_.config.rewards) == BINARY
        chains = run_.chains.chains[:3]
        images = [[None] * (1 + x.turns) for x in chains]
        found = run_.submit(chains, images).result()
        assert (
            round_rewards(
                run_.config.rewards,
                {**found, "consistency": found["following"]},
                torch.zeros(3).long(),
            )
            .reward("following")
            .value.tolist()
            == [0.5] * 3
        )


def overlapping(world, tmp_path):
    """The held-out chains with one of the training chains' pictures under another name and id."""
    train, held_out = (read_chains(world / f"{x}.jsonl").chains for x in ("train", "held_out"))
    copy = tmp_path / "copy.png"
    copy.write_bytes(train[3].image_path.read_bytes())
    again = train[3].model_copy(update={"id": "again", "image": str(copy)})
    write_chains([*held_out, again], tmp_path / "held_out.jsonl")
    return "--data.held-out", tmp_path / "held_out.jsonl", "--data.allow-outside"


def test_held_out_chains_that_are_trained_on_are_refused(world, tmp_path, refused):
    shared = overlapping(world, tmp_path)
    told = refused(*options(world, tmp_path / "run", *shared))
    assert told.startswith("2 ")
    assert "data.held_out: expected nothing that is in data.chains, got 1 reference image (" in told
    assert "= again)" in told
    assert "loading" not in told  # the model
    with started(world, tmp_path, *shared, "--data.allow-overlap") as run_:
        assert len(run_.held_out.chains) == 5
    assert "data.held_out: not disjoint from data.chains" in (tmp_path / "log.txt").read_text()
    told = refused(*options(world, tmp_path / "run", "--data.held-out", world / "train.jsonl"))
    assert "got 16 chain ids (" in told


def test_another_judge_than_that_of_the_runs_evaluations_is_refused(world, tmp_path):
    held_out = HeldOut(ChainDataset([]), tmp_path, Accelerator(cpu=True))
    judge = JudgedBy(judge="m", judge_server="m, server 1")
    assert held_out.judge(judge, 1) is judge
    held_out.write(evaluation([[1]], provenance=Provenance(judged_by=judge)))
    assert held_out.judge(JudgedBy(judge="m"), 1) == judge  # a server that does not answer yet
    for other in ({"judge": "n"}, {"judge_server": "m, server 2"}):
        with pytest.raises(ValueError, match=f"{next(iter(other))} = "):
            held_out.judge(judge.model_copy(update=other), 1)
    held_out.write(evaluation([[1]], after=1))
    assert held_out.judge(judge, 0) == judge  # that of round 1 will be made again
    with pytest.raises(ValueError, match="an evaluation without provenance"):
        held_out.judge(judge, 1)


def test_a_run_leaves_what_its_user_looks_for(world, tmp_path):
    more = ("--output.trackers", "tensorboard", "--output.strips-every", 2)
    told = run(*options(world, tmp_path, *more), drawn=True)
    assert "paired over 4 chains" in told
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {
        "report.json",
        "curves.png",
        "log.txt",
        "metrics.jsonl",
        "pictures/round-000001-chains.png",
        "pictures/round-000003-rewards.png",
        "evaluations/round-000000.json",
        "evaluations/round-000003.json",
        "evaluations/round-000005.json",
        "curves.svg",
        "checkpoints/round-000005/lora/pytorch_lora_weights.safetensors",
    } <= left
    assert not any(name.startswith("evaluations/round-000003/") for name in some(left))
    held_out = [x.first_turns(2) for x in read_chains(world / "held_out.jsonl").chains]
    edited = EditedImages(tmp_path / "evaluations" / "round-000005")
    assert all(edited.complete(chain) for chain in some(held_out))
    for name in ("before", "after"):
        judge = json.loads((tmp_path / "report.json").read_text())[name]["judged_by"]
        assert judge.startswith("scorer mteditflow_examples.shapes.scoring:ExactRewards ")
    assert any("tfevents" in name for name in left)
    assert not any(name.endswith((".pt", ".pkl", ".bin", ".pth")) for name in some(left))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]
    assert undocumented(name for line in some(lines) for name in line) == []
    assert lines[0]["training/learning_rate"] == pytest.approx(1e-3)
    assert lines[-1]["training/learning_rate"] == pytest.approx(1e-4)


@pytest.mark.slow
def test_stopped_and_changed_runs_go_on(world, tmp_path, refused):
    given = options(world, tmp_path / "run", "--training.rounds", 400, "--evaluation.every", 1000)
    errors = tmp_path / "errors.txt"
    process = Process([SCRIPT, *given], env=ENVIRONMENT, errors=errors, drawn=False)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, told = process.wait(timeout=60), errors.read_text()
    assert code == 0, told
    assert "stopped by SIGTERM after round" in told
    done = len(metrics.read_text().splitlines())
    weights(tmp_path / "run", done=done)  # it saved the round that it had done

    total = ("--training.rounds", done + 1, "--training.batch", 4)
    told = run(*options(world, tmp_path / "run", *total, "--evaluation.every", 1000))
    assert f"resuming after round {done}" in told
    assert "training.batch was 8 and is 4 from here on" in told
    told = refused(*options(world, tmp_path / "run", *GRPO, objective="grpo"))
    assert "error: objective: expected 'nft', with which" in told
    told = refused(*options(world, tmp_path / "run", "--output.resume", "never"))
    assert "error: output.resume: never, but" in told


def test_weights_that_were_loaded_are_those_that_were_saved(world, tmp_path):
    run(*options(world, tmp_path, "--training.rounds", 2, "--data.held-out", "None"))
    with started(world, tmp_path, "--training.rounds", 2) as run_:
        train_flux.train(run_)
        assert run_.first_round == run_.state.done == 2
        saved = load_file(tmp_path / "checkpoints" / "round-000002" / "current.safetensors")
        loaded = run_.policies.state_dict()
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in some(saved))


def test_a_weight_without_a_term_is_refused(world, tmp_path):
    with started(world, tmp_path, "--rewards.weights.strict", 1) as run_:
        run_.first_round = 0
        rollout, _, terms = sample(run_, next_chains(run_))
        del terms["strict"]
        with pytest.raises(ConfigError, match=r"rewards.weights: expected names among .*'strict'"):
            turn_values(run_, terms, rollout.trajectory.group)
