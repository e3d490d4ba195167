"""The trainer in one process: micro-batches, what a round holds, ratios, stopping, going on."""

import json
import math
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from mteditflow_examples import train_flux
from mteditflow_examples.flux import parts
from mteditflow_examples.flux.batch import Batch, check_first_ratios, stochastic_steps
from mteditflow_examples.flux.config import ConfigError, parse
from mteditflow_examples.flux.objectives import losses_of
from mteditflow_examples.flux.rewards import scoring
from mteditflow_examples.flux.run import Run, main
from safetensors.torch import load_file

from mteditflow import check_ratio
from mteditflow.pipelines import ReplayError
from mteditflow.rewards import Fault, InvalidRewardsError, Lost, TurnScores
from mteditflow.training import RunLog, Termination, Updater
from tests.flux.worlds import ENVIRONMENT, command, options, run, weights


class Recording(torch.optim.SGD):
    """Keeps the gradient of each step, and goes nowhere."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.seen = []

    def step(self, closure=None):
        self.seen += [torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]])]


@contextmanager
def started(world, output, *more, objective="nft", family="kontext"):
    """A run before its first round, in this process."""
    more = ("--data.held-out", "None", *more)
    config = parse(options(world, output, *more, objective=objective, family=family))
    log = RunLog(output, console=False, main=True)
    with Termination() as termination, scoring(config.rewards, output / "cache.sqlite") as submit:
        yield Run(config, Accelerator(cpu=True), log, termination, submit)


def first_batch(run, advance=0):
    """The first round's batch, with other weights than those that sampled it."""
    run.first_round = 0
    rollout, terms, first = train_flux.sample(run, 0)
    advantage, valid = train_flux.advantages(run, terms, rollout.trajectory.group)
    assert advantage.abs().sum() > 0
    with torch.no_grad():
        for weight in run.policies.parameters():
            weight.add_(advance * torch.ones_like(weight))
    return Batch(run, 0, rollout, advantage, valid, first)


GRPO = ("--sampling.stochastic-steps", 2, "--grpo.kl-coef", 0.1)


ALL = {  # objective: a preset's, and options under which every term of its loss weighs something
    "nft": ("nft", "--nft.kl-coef", 0.1, "--nft.norm-coef", 0.1),
    "awm": ("nft", "--nft.clip", 0.5, "--nft.old-kl-coef", 0.1, "--nft.norm-coef", 0.1),
    "dpo": ("nft", "--nft.beta", 10, "--nft.kl-coef", 0.1, "--nft.noise-levels", 2),
    "grpo": ("grpo", *GRPO),
    "guard": ("grpo", *GRPO, "--grpo.clip", 0.5),
    "dppo": ("grpo", *GRPO, "--grpo.threshold", 1),
}


@pytest.mark.parametrize("objective", ALL)
def test_micro_batches_do_not_change_gradients(world, tmp_path, objective, monkeypatch):
    # In double precision: kernels for one row round otherwise than those for eight, and float32
    # shows it (up to 3e-5 where old and current velocity are close).
    monkeypatch.setitem(parts.DTYPES, "float32", torch.float64)
    preset, *more = ALL[objective]
    more += ["--objective", objective, "--data.groups", 2]
    with started(world, tmp_path, *more, objective=preset) as run_:
        for name in ("current", "old"):
            for weight in run_.policies._parameters(name):
                weight.data = weight.data.double()
        batch = first_batch(run_, advance=1e-3)
        rows = torch.cat([part for minibatch in batch.minibatches() for part in minibatch])
        optimizer = Recording(run_.policies.parameters())
        updater = Updater(optimizer, run_.policies.parameters, max_grad_norm=1e9)
        for size in (len(rows), 8, 2, 1):
            assert updater.step(rows.split(size), losses_of(batch)).taken
        whole, *others = optimizer.seen
        assert whole.norm() > 0
        for other in others:
            assert float((other - whole).norm() / whole.norm()) <= 1e-9


def test_pairs_are_of_one_group_and_turn_and_none_at_all_changes_nothing(world, tmp_path):
    with started(world, tmp_path, "--objective", "dpo", "--nft.beta", 200) as run_:
        batch = first_batch(run_)
        trajectory, turn = batch.paired.nonzero().T
        loser, group = batch.losers[trajectory, turn], batch.rollout.trajectory.group
        assert len(trajectory) > 0
        assert torch.equal(group[trajectory], group[loser])
        assert (batch.advantage[trajectory, turn] > batch.advantage[loser, turn]).all()
        rows = torch.cat([part for minibatch in batch.minibatches() for part in minibatch])
        assert torch.equal(rows[:, :2].unique(dim=0), batch.paired.nonzero())
        best = torch.zeros_like(batch.advantage)
        best[0, 0] = 1  # the only pair of the round, in one of its two minibatches
        weights = []
        for minibatch in replace(batch, advantage=best).minibatches():
            rows = torch.cat(minibatch)
            weights.append(losses_of(replace(batch, advantage=best))(rows)[1].tolist())
        assert sorted(weights) == [[0.0], [1.0]]
        same = replace(batch, advantage=torch.zeros_like(batch.advantage))
        updater = Updater(run_.optimizer, run_.policies.parameters, max_grad_norm=1.0)
        for minibatch in same.minibatches():
            update = updater.step(minibatch, losses_of(same))
            assert (update.taken, update.reason) == (False, "no row has a weight")


def test_sampling_batches_do_not_change_trajectories(world, tmp_path):
    latents = []
    for size in (16, 2, 1):
        with started(world, tmp_path, "--sampling.batch", size) as run_:
            run_.first_round = 0
            rollout, terms, _ = train_flux.sample(run_, 0)
            latents.append((rollout.trajectory.latents[:, 0], terms["following"].score))
    for other, score in latents[1:]:
        assert torch.allclose(other, latents[0][0], atol=1e-5)
        assert torch.equal(score, latents[0][1])


def test_groups_share_chains_and_differ_in_noise(world, tmp_path):
    with started(world, tmp_path) as run_:
        run_.first_round = 0
        trajectory = train_flux.sample(run_, 0)[0].trajectory
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
        verdicts = []
        run_.ratio_checked = verdicts.append
        check_first_ratios(first_batch(run_))
    assert verdicts[0].ok
    assert float(verdicts[0].deviation.nan_to_num().max()) < 1e-6


def test_a_ratio_that_is_not_one_stops_the_run_or_warns(world, tmp_path):
    wrong = check_ratio(torch.full((1, 1), 0.1), torch.zeros(1, 1), clip=1e-3)
    with started(world, tmp_path, *GRPO, objective="grpo") as run_:
        with pytest.raises(ReplayError, match=r"ratio check failed: largest .* latents rounded"):
            run_.ratio_checked(wrong)
        with pytest.raises(ReplayError, match="ratio check failed"):
            check_first_ratios(first_batch(run_, advance=0.05))
    more = (*GRPO, "--safety.ratio", "warn")
    with started(world, tmp_path, *more, objective="grpo") as run_:
        run_.ratio_checked(wrong)
    assert "warning: ratio check failed" in (tmp_path / "log.txt").read_text()


def test_lost_rewards_weigh_nothing(world, tmp_path):
    with started(world, tmp_path) as run_:
        run_.first_round = 0
        rollout, terms, first = train_flux.sample(run_, 0)
        score = terms["following"].score.clone()
        score[3, 1] = math.nan
        lost = {(3, 1): Lost(Fault.timeout, "no answer", 2)}
        terms["following"] = TurnScores(score, terms["following"].turn_mask, lost)
        advantage, valid = train_flux.advantages(run_, terms, rollout.trajectory.group)
        batch = Batch(run_, 0, rollout, advantage, valid, first)
        rows = torch.cat([part for parts in batch.minibatches() for part in parts])
        _, weight = losses_of(batch)(rows)
        assert torch.equal(weight == 0, rows[:, 0] == 3)
        assert not advantage[3].any()
        terms["following"] = TurnScores(
            torch.full_like(score, math.nan),
            terms["following"].turn_mask,
            {(b, n): lost[3, 1] for b in range(16) for n in range(2)},
        )
        with pytest.raises(InvalidRewardsError, match=r"100% of 16 rewards are invalid"):
            train_flux.advantages(run_, terms, rollout.trajectory.group)


def test_windows_move(world, tmp_path):
    more = ("--sampling.stochastic-steps", 1, "--sampling.window-interval", 2)
    with started(world, tmp_path, *more, objective="grpo") as run_:
        seen = [list(stochastic_steps(run_.config, k)) for k in range(6)]
    assert seen == [[0], [0], [1], [1], [2], [2]]


def test_updates_that_are_not_finite_stop_a_run_when_they_go_on(world, tmp_path):
    with started(world, tmp_path, "--safety.max-skipped", 2) as run_:
        bad = Updater(run_.optimizer, run_.policies.parameters, max_grad_norm=1.0).step(
            [torch.arange(1)],
            lambda part: ({"loss": run_.policies.parameters()[0].sum() * math.nan}, torch.ones(1)),
        )
        run_.updated(bad)
        with pytest.raises(FloatingPointError, match="2 updates in a row: not finite"):
            run_.updated(bad)
    assert "an update was skipped, not finite" in (tmp_path / "log.txt").read_text()


@pytest.fixture
def refused(monkeypatch, capsys):
    """What the trainer says as it refuses to start, in this process."""

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_flux.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            main(train_flux.train)
        assert ended.value.code not in (0, None)
        return f"{ended.value.code}{capsys.readouterr().err}"

    return start


def test_errors_at_the_start_are_told_in_a_line(world, tmp_path, refused):
    told = run(*options(world, tmp_path, "--training.rounds", 0), code=1)
    assert "error: training.rounds: input should be greater than or equal to 1, got 0" in told
    assert "Traceback" not in told
    told = refused(*options(world, tmp_path, "--rewards.scorer", "nothing:Here"))
    assert "error: rewards.scorer: expected module:name, got 'nothing:Here'" in told


def test_a_run_leaves_what_its_user_looks_for(world, tmp_path):
    more = ("--output.trackers", "tensorboard", "--output.strips-every", 2)
    told = run(*options(world, tmp_path, *more))
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
        "evaluations/round-000000/000003_turn_2.png",
        "checkpoints/round-000005/lora/pytorch_lora_weights.safetensors",
    } <= left
    assert not any(name.startswith("evaluations/round-000003/") for name in left)
    assert any("tfevents" in name for name in left)
    assert not any(name.endswith((".pt", ".pkl", ".bin", ".pth")) for name in left)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["training/learning_rate"] == pytest.approx(1e-3)
    assert lines[-1]["training/learning_rate"] == pytest.approx(1e-4)


@pytest.mark.slow
def test_stopped_and_changed_runs_go_on(world, tmp_path, refused):
    given = options(world, tmp_path / "run", "--training.rounds", 400, "--evaluation.every", 1000)
    process = subprocess.Popen(command(*given), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 0, told
    assert "stopped by SIGTERM after round" in told
    done = len(metrics.read_text().splitlines())
    weights(tmp_path / "run", done=done)  # it saved the round that it had done

    total = ("--training.rounds", done + 1, "--training.batch", 4)
    told = run(*options(world, tmp_path / "run", *total, "--evaluation.every", 1000))
    assert f"going on after round {done}" in told
    assert "training.batch was 8 and is 4 from here on" in told
    told = refused(*options(world, tmp_path / "run", *GRPO, objective="grpo"))
    assert "error: objective: expected 'nft', with which" in told
    told = refused(*options(world, tmp_path / "run", "--output.resume", "never"))
    assert "error: output.resume: never, but" in told


def test_weights_that_were_loaded_are_those_that_were_saved(world, tmp_path):
    run(*options(world, tmp_path, "--training.rounds", 2, "--data.held-out", "None"))
    with started(world, tmp_path, "--training.rounds", 2) as run_:
        assert list(run_.rounds()) == []
        saved = load_file(tmp_path / "checkpoints" / "round-000002" / "current.safetensors")
        loaded = run_.policies.state_dict()
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_unknown_weights_and_uneven_ranks_are_refused(world, tmp_path):
    with started(world, tmp_path, "--rewards.weights.strict", 1) as run_:
        run_.first_round = 0
        rollout, terms, _ = train_flux.sample(run_, 0)
        del terms["strict"]
        with pytest.raises(ConfigError, match=r"rewards.weights: expected names among .*'strict'"):
            train_flux.advantages(run_, terms, rollout.trajectory.group)
