"""Updates of a round: which rows are computed, flat rounds, epochs, bounds on the KL."""

import dataclasses
import json

import pytest
import torch
from mteditflow_examples import train_flux
from mteditflow_examples.flux.updating import check_first_ratios, update
from peft.tuners.lora import LoraLayer

from mteditflow import AdaptiveKL
from mteditflow.objectives import OBJECTIVES
from mteditflow.training import Updater
from tests.flux.rounds import ForwardRows, first_round, started, turn_values
from tests.flux.test_train_flux import Recording
from tests.flux.worlds import weights
from tests.loops import some
from tests.samples_of_scores import turn_scores

pytestmark = pytest.mark.usefixtures("undrawn")
GRPO = ("--objective.stochastic-steps", 2)
NO_KL = (*GRPO, "--objective.kl-coef", 0)


def lines_of(output):
    """Metrics of each round without times."""
    told = (output / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in told]
    return [{k: x for k, x in row.items() if not k.startswith("seconds/")} for row in rows]


def updater_of(run_, optimizer=None):
    optimizer = run_.optimizer if optimizer is None else optimizer
    return Updater(optimizer, run_.policies.parameters, max_grad_norm=1e9)


def taken(first, run_):
    """Gradients of the round's updates, and the rows that went through the model."""
    run_.begin_round()
    optimizer, rows = Recording(run_.policies.parameters()), ForwardRows(run_.policies.model)
    given = (first.velocity, first.rollout, first.advantage, first.valid)
    update(run_, updater_of(run_, optimizer), *given)
    return optimizer.seen, rows


def gradient(run_, total):
    """Gradient of a loss with respect to the current policy, flat."""
    found = torch.autograd.grad(total, run_.policies.parameters())
    return torch.cat([x.flatten() for x in found])


# rows without weight are not computed


def test_turns_after_a_failure_are_not_computed(world, tmp_path):
    more = ("--rewards.credit", "until_failure", "--training.minibatches", 1)
    with started(world, tmp_path, *more) as run_:
        first = first_round(run_, advance=1e-3)
        score = torch.full_like(first.scores["following"].score, 5.0)
        score[:6, 0] = 1.0
        score[6:8, 1] = 3.0
        terms = first.scores | {"following": turn_scores(score.tolist())}
        advantage, valid = turn_values(run_, terms, first.rollout.trajectory.group)
        assert valid.sum() == 16 * 2 - 6
        first = first.given(advantage=advantage, valid=valid)
        (found,), rows = taken(first, run_)
        assert (rows.trained, rows.others) == (26, 26)  # current and old
        every = dataclasses.replace(first, valid=torch.ones_like(valid)).units()[0]
        loss = first.losses(every).loss
        kept = valid[every.rows[:, 0, 0], every.rows[:, 0, 1]]
        expected = gradient(run_, loss[kept].mean())
    assert expected.norm() > 0
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("name", ["grpo", "guard", "dppo"])
def test_a_flat_group_is_not_computed_and_still_counts(world, tmp_path, name):
    """The gradient is that of the mean over all valid rows, whose others are exactly 0."""
    more = (f"objective:{name}", *NO_KL, "--training.minibatches", 1)
    with started(world, tmp_path, *more, objective="grpo") as run_:
        first = first_round(run_)
        advantage = first.advantage.clone()
        advantage[4:12] = 0
        first = first.given(advantage=advantage)
        (found,), rows = taken(first, run_)
        assert (rows.trained, rows.others) == (8 * 2 * 2, 0)  # two groups, two turns, two steps
        pulled = dataclasses.replace(run_.objective, kl_coef=1.0)  # a pull acts on every row
        (every,) = pulled.units(first.rollout, advantage, first.valid, key=run_.key)
        assert len(every) == every.count == 64
        assert first.units()[0].count == 64
        expected = gradient(run_, first.losses(every).loss.mean())
    assert expected.norm() > 0
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_where_every_group_is_flat_nothing_is_computed(world, tmp_path):
    with started(world, tmp_path, *NO_KL, objective="grpo") as run_:
        first = first_round(run_)
        first = first.given(advantage=torch.zeros_like(first.advantage))
        seen, rows = taken(first, run_)
        assert (seen, rows.trained, rows.others) == ([], 0, 0)
        assert run_.numbers["training/empty_updates"] == 2
        assert run_.numbers["training/flat_updates"] == 0
        assert (run_.state.updates, run_.state.skipped, run_.means) == (0, 0, [])


def test_where_a_pull_acts_flat_groups_are_computed(world, tmp_path):
    more = (*GRPO, "--objective.kl-coef", 0.1)
    with started(world, tmp_path, *more, objective="grpo") as run_:
        first = first_round(run_, advance=1e-3)
        first = first.given(advantage=torch.zeros_like(first.advantage))
        seen, rows = taken(first, run_)
        assert (rows.trained, rows.others) == (64, 64)  # current and reference
        assert all(x.norm() > 0 for x in some(seen))
        assert run_.numbers["training/empty_updates"] == 0


def test_a_pull_that_pulls_nowhere_is_a_flat_update(world, tmp_path):
    """At the reference the KL has no gradient: rows are computed, and no step is taken."""
    with started(world, tmp_path, *GRPO, "--objective.kl-coef", 0.1, objective="grpo") as run_:
        first = first_round(run_)
        first = first.given(advantage=torch.zeros_like(first.advantage))
        seen, rows = taken(first, run_)
        assert (seen, rows.trained) == ([], 64)
        assert run_.numbers["training/flat_updates"] == 2
        assert run_.numbers["training/empty_updates"] == 0
        assert (run_.state.updates, run_.between) == (0, True)
        assert [means["grad_norm"] for means in run_.means] == [0, 0]


# epochs, and bounds on the KL


@pytest.mark.parametrize("objective", ["nft", "grpo"])
def test_each_epoch_takes_all_rows_and_draws_anew(world, tmp_path, objective):
    more = ("--training.inner-epochs", 2, "--data.groups", 2)
    more += ("--objective.share", 0.5, *GRPO) if objective == "grpo" else ()
    with started(world, tmp_path, *more, objective=objective) as run_:
        first, calls = first_round(run_), []
        velocity = first.velocity

        def seen(policy, x_t, sigma, at):
            if policy == "current":
                calls.append((x_t, sigma, at))
            return velocity(policy, x_t, sigma, at)

        run_.begin_round()
        before = run_.policies.state_dict("current")
        update(run_, updater_of(run_), seen, first.rollout, first.advantage, first.valid)
        assert run_.state.updates == len(run_.means) == 2 * 2
        after = run_.policies.state_dict("current")
        assert any(not torch.equal(x, after[name]) for name, x in before.items())
    half = len(calls) // 2
    epochs = []
    for own in (calls[:half], calls[half:]):
        x_t, sigma, at = (torch.cat(x) for x in zip(*own, strict=True))
        order = (at[:, 0] * 2 + at[:, 1]).argsort()
        assert at[order].tolist() == [[b, n] for b in range(8) for n in range(2)]
        epochs.append((x_t[order], sigma[order]))
    (x_t, sigma), (other_x_t, other_sigma) = epochs
    if objective == "nft":  # other noise and flow times everywhere
        assert (sigma != other_sigma).all()
        assert all((x_t != other_x_t).flatten(1).any(dim=1))
    else:  # other steps of some turns, the same step of others
        same = sigma == other_sigma
        assert same.any()
        assert not same.all()
        assert torch.equal(x_t[same], other_x_t[same])


def test_the_first_epoch_is_that_of_a_run_without_others(world, tmp_path):
    with started(world, tmp_path) as run_:
        first = first_round(run_)
        for one, other in some(zip(first.units(2), first.units(2, epoch=0), strict=True)):
            assert torch.equal(one.seed, other.seed)
        for one, other in some(zip(first.units(2), first.units(2, epoch=1), strict=True)):
            assert not set(one.seed.flatten().tolist()) & set(other.seed.flatten().tolist())


def test_beyond_a_kl_the_rest_of_a_round_is_left_out(world, tmp_path):
    more = ("--training.inner-epochs", 3, "--training.stop-kl", 1e-12, "--training.rounds", 2)
    more += (
        "--data.groups",
        2,
        "--objective.old-slope",
        0,
    )  # old is current at the start of every round
    with started(world, tmp_path / "bounded", *more) as run_:
        train_flux.train(run_)
        assert run_.state.updates == 2 * 2  # the first update is at KL 0, the second beyond
    for line in some(lines_of(tmp_path / "bounded")):
        assert line["training/stopped_at_kl"] > 1e-12
        assert line["training/old_kl"] == pytest.approx(line["training/stopped_at_kl"] / 2)
    more = (*more[:2], "--training.stop-kl", 1e6, "--training.rounds", 1, "--data.groups", 2)
    with started(world, tmp_path / "free", *more) as run_:
        train_flux.train(run_)
        assert run_.state.updates == 3 * 2
    (line,) = lines_of(tmp_path / "free")
    assert "training/stopped_at_kl" not in line


@pytest.mark.parametrize("name", ["grpo", "guard", "dppo", "nft", "awm"])
def test_every_objective_with_an_old_policy_can_be_stopped(world, tmp_path, name):
    preset = "nft" if hasattr(OBJECTIVES[name](), "renoise") else "grpo"
    more = (f"objective:{name}", "--training.stop-kl", 1e-15, "--training.minibatches", 4)
    with started(world, tmp_path, *more, "--data.groups", 2, objective=preset) as run_:
        first = first_round(run_)
        run_.begin_round()
        given = (first.velocity, first.rollout, first.advantage, first.valid)
        update(run_, updater_of(run_), *given)
        assert run_.state.updates < 4
        assert run_.numbers["training/stopped_at_kl"] > 1e-15


def test_a_run_goes_on_with_its_kl_weight_and_its_history(world, tmp_path):
    """A kill after round 2 leaves the checkpoint of round 2."""
    more = ("--training.rounds", 3, "--training.final-rate", 1.0, "--output.checkpoint-every", 1)
    more += ("--training.kl-target", 1e-4, "--objective.kl-coef", 0.1, *GRPO)
    more += ("--rewards.history", 2, "--rewards.credit", "turn", "--data.groups", 2)
    with started(world, tmp_path / "whole", *more, objective="grpo") as run_:
        train_flux.train(run_)
        whole = run_.state
    again = ("--output.resume", tmp_path / "whole" / "checkpoints" / "round-000002")
    with started(world, tmp_path / "again", *more, *again, objective="grpo") as run_:
        train_flux.train(run_)
        assert run_.first_round == 2
        assert run_.state == whole
    for name in ("current", "old", "optimizer"):
        one, other = (weights(tmp_path / x, name, done=3) for x in ("whole", "again"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in some(one))
    lines = lines_of(tmp_path / "whole")
    assert lines_of(tmp_path / "again") == lines[2:]
    controller = AdaptiveKL(1e-4, 0.1)
    for line in some(lines):
        assert line["training/kl_coef"] == controller.value
        controller = controller.update(line["training/kl"])
    assert whole.kl == controller
    assert controller.value != 0.1
    assert whole.history.entries
    visits = [len(entries) for entries in whole.history.entries.values()]
    assert sum(visits) == 3 * 2
    assert max(visits) <= 2


def test_the_adapted_weight_is_that_of_the_loss(world, tmp_path):
    more = ("--training.kl-target", 1e-4, "--objective.kl-coef", 0.1, *GRPO)
    with started(world, tmp_path, *more, objective="grpo") as run_:
        assert run_.objective == run_.config.objective
        run_.state.kl = dataclasses.replace(run_.state.kl, value=0.7)
        assert run_.objective == dataclasses.replace(run_.config.objective, kl_coef=0.7)


# importance weights


def test_importance_weights_turn_a_failing_ratio_check_into_a_warning(world, tmp_path):
    more = (*NO_KL, "--objective.importance-cap", 2, "--training.rounds", 2, "--data.groups", 2)
    with started(world, tmp_path / "off", *more, objective="grpo") as run_:
        first = first_round(run_, advance=0.05)
        check_first_ratios(run_, first.velocity, first.rollout)
    assert "warning: ratio check failed" in (tmp_path / "off" / "log.txt").read_text()
    with started(world, tmp_path / "run", *more, objective="grpo") as run_:
        train_flux.train(run_)
        assert run_.state.updates == 4
    assert "ratio check passed" in (tmp_path / "run" / "log.txt").read_text()
    for line in some(lines_of(tmp_path / "run")):  # sampler and trainer agree here
        assert line["training/importance_weight"] == pytest.approx(1, abs=1e-4)


def test_a_rollout_of_another_policy_is_weighted_by_importance(world, tmp_path):
    more = (*NO_KL, "--objective.importance-cap", 1.0001, "--data.groups", 2)
    with started(world, tmp_path, *more, objective="grpo") as run_:
        first = first_round(run_, advance=0.05)
        run_.policies.update_old(decay=0.0)  # training's own old policy is not the one that sampled
        (units,) = first.units()
        weight = first.losses(units).metrics["importance_weight"]
        plain = dataclasses.replace(run_.objective, importance_cap=None)
        ratio = plain(first.velocity, first.rollout, units).metrics["ratio"]
    assert torch.allclose(weight, ratio.clamp(max=1.0001), rtol=1e-4)
    assert weight.max() <= 1.0001
    assert weight.min() < 0.9999


def test_updates_of_a_half_precision_model_share_the_casts_of_its_adapters(world, tmp_path):
    with started(world, tmp_path, "--model.dtype", "bfloat16") as run_:
        first = first_round(run_)
        layers = [x for x in run_.policies.model.modules() if isinstance(x, LoraLayer)]
        flags = []
        hook = run_.policies.model.register_forward_pre_hook(
            lambda *_: flags.append({layer.cast_input_dtype_enabled for layer in layers})
        )
        taken(first, run_)
        hook.remove()
        assert flags
        assert set().union(*flags) == {False}  # by peft, layer by layer
        assert {layer.cast_input_dtype_enabled for layer in layers} == {True}
