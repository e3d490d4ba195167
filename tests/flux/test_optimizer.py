"""Learning rate and optimizer of a run: rounds follow the schedule, 8 bits resume exactly."""

import sys

import pytest
import torch
from mteditflow_examples import train_flux
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError, Training
from mteditflow_examples.flux.config_values import dumped
from mteditflow_examples.flux.loading import Notes
from mteditflow_examples.flux.optimizer import check_optimizer, make_optimizer
from mteditflow_examples.flux.resuming import check_unchanged

from mteditflow.training import Checkpoint, learning_rate_share
from tests.flux.rounds import started
from tests.flux.worlds import options, weights
from tests.loops import some
from tests.refusals import call

COSINE = ("--training.schedule", "cosine", "--training.warmup-rounds", 2)


def test_rounds_follow_the_schedule(world, tmp_path):
    more = (*COSINE, "--training.rounds", 6, "--training.final-rate", 0.25)
    with started(world, tmp_path, *more) as run:
        for done in range(6):
            run.state.done = done
            run.begin_round()
            share = learning_rate_share(done, 6, schedule="cosine", warmup=2, final=0.25)
            assert run.optimizer.param_groups[0]["lr"] == 1e-3 * share
            assert run.numbers["training/learning_rate"] == 1e-3 * share


def test_a_constant_rate_leaves_the_end_of_a_preset_aside(world, tmp_path):
    with started(world, tmp_path, "--training.schedule", "constant") as run:
        run.state.done = 4
        run.begin_round()
        assert run.optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--training.warmup-rounds", "40"],
            r"training\.warmup_rounds: expected fewer than the 40 rounds, got 40",
        ),
        (
            ["--training.schedule", "cosine", "--training.final-rate", "1"],
            r"training\.final_rate: expected below 1 for schedule cosine, such as 0\.1, got 1",
        ),
    ],
)
def test_a_schedule_that_is_none_is_refused(words, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parse(["shapes-nft", *words])


def test_8_bits_without_their_package_end_with_one_line(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    ended = call(train_flux.main, options(world, tmp_path, "--training.optimizer", "adamw_8bit"))
    assert ended.code == 2
    assert ended.err.startswith("error: training.optimizer: adamw_8bit needs bitsandbytes (pip ")
    assert ended.err.count("\n") == 1


def test_8_bits_of_sharded_weights_are_refused():
    with pytest.raises(
        ConfigError, match=r"^training\.optimizer: expected adamw where weights are"
    ):
        check_optimizer(Training(optimizer="adamw_8bit"), sharded=True)


@pytest.mark.bases
def test_8_bits_hold_their_state_in_bytes_and_step_about_as_adamw_does():
    pytest.importorskip("bitsandbytes")
    check_optimizer(Training(optimizer="adamw_8bit"), sharded=False)
    moved = []
    for kind in ("adamw", "adamw_8bit"):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 8192).reshape(64, 128))
        optimizer = make_optimizer([weight], Training(optimizer=kind, learning_rate=1e-2))
        for _ in range(5):
            weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(weight.detach())
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    start = torch.linspace(-1, 1, 8192).reshape(64, 128)
    assert (moved[1] - moved[0]).norm() < 0.05 * (moved[0] - start).norm()


@pytest.mark.bases
def test_a_run_of_8_bits_goes_on_to_the_same_weights(world, tmp_path):
    """Also: what it stored is 8 bits, so that the state was read, not made again."""
    pytest.importorskip("bitsandbytes")
    more = ("--training.optimizer", "adamw_8bit", "--evaluation.every", 1000)
    for rounds, folder in ((3, "whole"), (2, "parts"), (3, "parts")):
        words = options(world, tmp_path / folder, *more, "--training.rounds", rounds)
        words += ["--training.schedule", "constant"]
        assert call(train_flux.main, words).code == 0
    whole, parts = (weights(tmp_path / x, done=3) for x in ("whole", "parts"))
    assert all(torch.equal(parts[name], x) for name, x in some(whole.items()))
    stored = weights(tmp_path / "parts", "optimizer", done=3)
    assert any(x.dtype == torch.uint8 for x in some(stored.values()))


def test_a_run_with_another_optimizer_is_refused(tmp_path):
    """So is one that began before there was a choice, which was with adamw."""
    state = {"config": dumped(parse(["shapes-nft"]))}
    found = Checkpoint(tmp_path, 1, None, state)
    now = parse(["shapes-nft", "--training.optimizer", "adamw_8bit"])
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^training\.optimizer: expected .adamw., with"):
            check_unchanged(now, {}, found, Notes())
        state["config"]["training"].pop("optimizer", None)
    check_unchanged(parse(["shapes-nft"]), {}, found, Notes())
