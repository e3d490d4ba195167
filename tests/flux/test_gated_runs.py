"""Runs with a gated KL and resets of the reference: the gate, its gradient, refusals, going on."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from mteditflow_examples import train_flux
from mteditflow_examples.budget import passes_of, plan_of
from mteditflow_examples.flux.advantages import round_rewards
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError, Gate, Rewards
from mteditflow_examples.flux.gating import RoundGate, resumed, round_gate
from mteditflow_examples.flux.resuming import check_unchanged
from mteditflow_examples.flux.updating import update

from mteditflow import GatedShare
from mteditflow.rewards import TurnScores
from mteditflow.training import Checkpoints
from tests.flux.rounds import ForwardRows, first_round, started
from tests.flux.test_train_flux import Recording
from tests.flux.test_updating import updater_of
from tests.flux.worlds import weights
from tests.glossary import undocumented
from tests.loops import some
from tests.samples_of_scores import turn_scores

pytestmark = pytest.mark.usefixtures("undrawn")
AUXILIARY = ("beauty", "taste")
WEIGHTS = {"following": 1.0, "consistency": 0.5}
# Two rounds of two steps each and a third: a reset after steps 3 and 6, so within rounds 2 and 3.
RUN = (
    *("--rewards.scorer", "mteditflow_examples.shapes.scoring:GarishJudge"),
    *("--gate.auxiliary", "honest", "--gate.share", 0.5, "--gate.window", 1),
    *("--objective.kl-coef", 1.0, "--training.reset-steps", 3, "--training.reset-kl", 1e3),
    *("--data.groups", 2, "--training.rounds", 3, "--training.final-rate", 1.0),
    *("--output.checkpoint-every", 1, "--output.keep", 9, "--safety.drift-members", 0),
)


# the gate of a round


def scores(count=11, turns=3, seed=0):
    """Four terms; of trajectory 1 a trained score was lost, of 4 and 5 auxiliary ones are gone."""
    random = torch.Generator().manual_seed(seed)
    terms = {}
    for name in ("following", "consistency", *AUXILIARY):
        values = torch.rand(count, turns, generator=random, dtype=torch.float64)
        table = ((1 + 4 * values).round() if name == "following" else values).tolist()
        table[3][-1] = None  # a shorter chain
        lost = {"following": [(1, 0)], "taste": [(4, 1)]}.get(name, [])
        for b, n in lost:
            table[b][n] = math.nan
        if name == "beauty":  # nothing to measure
            table[5] = [math.nan] * turns
        if name == "consistency":
            table[6][0] = math.nan
        terms[name] = turn_scores(table, lost, dtype=torch.float64)
    return terms


def plain_gate(terms, share, multiplier=0.0):
    """The gate by loops over trajectories; who is ranked, and the mean that the share follows."""
    count = len(terms["following"])
    means = {}
    for name, term in terms.items():
        rows = [[x for x in row if not math.isnan(x)] for row in term.score.tolist()]
        lost = {b for b, _ in term.lost}
        means[name] = [
            None if b in lost or not row else sum(row) / len(row) for b, row in enumerate(rows)
        ]
    ranked = [b for b in range(count) if all(means[name][b] is not None for name in terms)]
    weights = {"following": 1.0, "consistency": 0.5 + multiplier}
    proxy = {
        b: weights["following"] * (means["following"][b] - 1) / 4
        + weights["consistency"] * means["consistency"][b]
        for b in ranked
    }

    def beaten(value, b):
        return sum(value[b] > value[other] for other in ranked if other != b) / (len(ranked) - 1)

    uncertainty = {
        b: beaten(proxy, b) - sum(beaten(means[name], b) for name in AUXILIARY) / len(AUXILIARY)
        for b in ranked
    }
    ordered = sorted(uncertainty.values())
    place = (1 - share) * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    bound = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    gate = [b in uncertainty and uncertainty[b] > bound for b in range(count)]
    above = [u for u in ordered if u >= 0]
    return gate, ranked, sum(above) / len(above)


@pytest.mark.parametrize("share", [0.1, 0.35, 1.0])
@pytest.mark.parametrize("multiplier", [0.0, 3.0])
def test_the_gate_is_that_of_plain_loops(share, multiplier):
    terms, config = scores(), Rewards(weights=WEIGHTS, floor=0.5 if multiplier else None)
    rewards = round_rewards(config, terms, torch.arange(11) // 4)
    multipliers = {"consistency": multiplier} if multiplier else {}
    found = round_gate(Gate(AUXILIARY), config, rewards, multipliers, share)
    gate, ranked, mean = plain_gate(terms, share, multiplier)
    assert found.gate.tolist() == gate
    assert found.ranked.nonzero()[:, 0].tolist() == ranked == [0, 2, 3, 6, 7, 8, 9, 10]
    assert not found.gate[[1, 4, 5]].any()  # lost, lost, unmeasured
    assert found.mean == pytest.approx(mean)
    assert found.gate.any()


def test_ranks_see_the_gate_of_one_process():
    """Scores gathered from two ranks, each of which then takes its own rows."""
    terms, config = scores(), Rewards(weights=WEIGHTS)
    parts = [{n: x.select(rows) for n, x in terms.items()} for rows in (range(6), range(6, 11))]
    gathered = {n: TurnScores.concatenate([part[n] for part in parts]) for n in terms}
    group = torch.arange(11) // 4
    one, two = (
        round_gate(Gate(AUXILIARY), config, round_rewards(config, x, group), {}, 0.4).gate
        for x in (terms, gathered)
    )
    assert torch.equal(one, two)
    assert torch.equal(torch.cat([two[:6], two[6:]]), one)


def test_where_too_little_is_ranked_the_share_has_nothing_to_follow():
    terms, config = scores(), Rewards(weights=WEIGHTS)
    terms["beauty"] = turn_scores([[math.nan] * 3] * 10 + [[1.0] * 3], dtype=torch.float64)
    terms["beauty"].score[3, 2] = math.nan
    rewards = round_rewards(config, terms, torch.arange(11) // 4)
    found = round_gate(Gate(AUXILIARY), config, rewards, {}, 1.0)
    assert not found.gate.any()
    assert math.isnan(found.mean)
    all_below = RoundGate(torch.zeros(2) > 0, torch.tensor([-0.5, -0.1]), torch.ones(2) > 0)
    assert math.isnan(all_below.mean)


def test_a_trained_reward_that_no_trajectory_has_adds_nothing():
    terms, config = scores(), Rewards(weights=WEIGHTS)
    lone = {name: x for name, x in terms.items() if name != "consistency"}
    absent = torch.full((11, 3), torch.nan, dtype=torch.float64)
    lone["consistency"] = TurnScores(absent, terms["following"].turn_mask, {})
    group = torch.arange(11) // 4
    found = round_gate(Gate(AUXILIARY), config, round_rewards(config, lone, group), {}, 0.4)
    alone = Rewards(weights={"following": 1.0})
    expected = round_gate(Gate(AUXILIARY), alone, round_rewards(alone, terms, group), {}, 0.4)
    assert torch.equal(found.gate, expected.gate)
    assert found.ranked.sum() == 8


def test_an_auxiliary_reward_that_no_scorer_gives_is_named():
    config = Rewards(weights=WEIGHTS)
    rewards = round_rewards(config, scores(), torch.arange(11) // 4)
    with pytest.raises(ConfigError, match=r"gate\.auxiliary: expected names among .*, got 'nice'"):
        round_gate(Gate(("nice",)), config, rewards, {}, 0.1)


def test_a_share_goes_on_within_the_bounds_and_the_window_of_now():
    share = GatedShare(0.1, window=2, minimum=0.05, maximum=0.2)
    assert resumed(share, 0.15, [0.1, 0.2, 0.3]).means == (0.2, 0.3)
    assert [resumed(share, x, []).value for x in (0.9, 0.15, 0.01)] == [0.2, 0.15, 0.05]


# the updates


def test_gated_trajectories_alone_move_the_gradient_of_the_kl(world, tmp_path):
    """All advantages are 0: the KL is all there is to train, and only it evaluates the others."""
    more = ("--objective.kl-coef", 1.0, "--objective.stochastic-steps", 2)
    more += ("--training.minibatches", 1, "--data.groups", 2)
    with started(world, tmp_path, *more, objective="grpo") as run:
        first = first_round(run, advance=1e-3)
        first = first.given(advantage=torch.zeros_like(first.advantage))
        gate = torch.tensor([True, False, False, True] * 2)

        def gradient(*given):
            run.begin_round()
            optimizer, rows = Recording(run.policies.parameters()), ForwardRows(run.policies.model)
            data = (first.velocity, first.rollout, first.advantage, first.valid)
            update(run, updater_of(run, optimizer), *data, *given)
            return optimizer.seen, rows.others

        ([every], all_rows) = gradient()
        (none, no_rows) = gradient(~gate & gate)
        assert run.numbers["training/flat_updates"] == 1  # its gradient is 0: no step
        ([half], half_rows) = gradient(gate)
        assert run.means[-1]["gated"] == 0.5
        (units,) = first.units()
        kl = first.losses(units).metrics["kl"]
        loss = first.losses(units[gate[units.rows[:, 0, 0]]]).loss.sum() / units.count
        found = torch.autograd.grad(loss, run.policies.parameters())
        expected = torch.cat([x.flatten() for x in found])
        assert run.means[-1]["kl"] == pytest.approx(
            float((kl * gate[units.rows[:, 0, 0]]).mean()), rel=1e-4
        )
    assert (all_rows, half_rows, no_rows) == (32, 16, 4)  # one row a micro-batch of 8 at least
    assert none == []
    assert float((half - expected).norm() / expected.norm()) < 1e-4
    assert float((half - every).norm() / every.norm()) > 0.1


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run of three rounds: its folder and its state."""
    folder = tmp_path_factory.mktemp("gated")
    with pytest.MonkeyPatch.context() as patch:
        from tests.undrawn import undraw

        undraw(patch)
        with started(world, folder, *RUN) as run:
            train_flux.train(run)
            return folder, run.state, run.policies.state_dict("reference")


def lines_of(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: x for k, x in row.items() if not k.startswith("seconds/")} for row in rows]


def test_a_killed_run_goes_on_with_its_share_and_its_reference(whole, world, tmp_path):
    """A kill after round 2 leaves the checkpoint of round 2."""
    folder, state, reference = whole
    again = ("--output.resume", folder / "checkpoints" / "round-000002")
    with started(world, tmp_path, *RUN, *again) as run:
        train_flux.train(run)
        assert run.first_round == 2
        assert run.state == state
        assert all(
            torch.equal(x, reference[key])
            for key, x in some(run.policies.state_dict("reference").items())
        )
    for name in some(("current", "old", "optimizer", "reference")):
        ours, theirs = (weights(x, name, done=3) for x in (folder, tmp_path))
        assert all(torch.equal(ours[k], theirs[k]) for k in some(ours)), name
    assert lines_of(tmp_path) == lines_of(folder)[2:]


def test_share_gate_and_resets_are_logged(whole):
    folder, state, _ = whole
    lines, share = lines_of(folder), GatedShare(0.5, window=1)
    for line in some(lines):
        assert undocumented(line) == []
        assert line["gate/share"] == share.value
        assert line["training/gated"] == line["gate/trajectories"]
        assert 0 < line["gate/trajectories"] < 1
        assert line["gate/unranked"] == 0
        share = share.update(line["gate/uncertainty"])
    assert state.gate == share
    assert share.value != 0.5
    assert [line["training/reference_resets"] for line in lines] == [0, 1, 2]
    assert (state.resets, state.reset.steps) == (2, 0)
    text = (folder / "log.txt").read_text()
    assert "round 2: the reference is reset, after 3 steps at a KL of" in text


def test_the_first_checkpoint_has_no_reference_and_the_third_the_last_policy(whole):
    folder, _, reference = whole
    assert not (folder / "checkpoints" / "round-000001" / "reference.safetensors").exists()
    saved = weights(folder, "reference", done=3)
    assert all(torch.equal(x, saved[key]) for key, x in some(reference.items()))
    current = weights(folder, "current", done=3)  # reset after the last step of the run
    assert all(torch.equal(x, current[key]) for key, x in some(saved.items()))


def test_a_large_kl_resets_at_once():
    from mteditflow_examples.flux.run import Run

    config = parse(["shapes-nft", "--objective.kl-coef", "1", "--training.reset-steps", "9"])
    done = []
    run = SimpleNamespace(
        state=SimpleNamespace(done=0, resets=0, reset=config.training.reset),
        policies=SimpleNamespace(reset_reference=lambda: done.append(1)),
        log=SimpleNamespace(message=lambda *_: None),
    )
    for kl, gated, resets in ((5e-5, 1.0, 0), (5e-5, 0.4, 1), (0.0, 0.0, 1), (2e-4, 1.0, 2)):
        Run._reset_if_due(run, run.state.reset, {"kl": kl, "gated": gated})
        assert (len(done), run.state.resets) == (resets, resets)
    assert run.state.reset.steps == 0


def test_a_run_whose_reference_was_reset_cannot_go_on_without(whole):
    folder, _, _ = whole
    found = Checkpoints(folder / "checkpoints").find("auto")
    config = parse(["shapes-nft", *map(str, RUN), "--output.folder", str(folder)])
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, lora_targets=()),
        training=dataclasses.replace(config.training, reset_steps=None, reset_kl=1e-4),
    )
    before = found.state["config"]
    same = (("model", "lora_targets"), *(("data", x) for x in ("turns", "groups", "group_size")))
    for section, name in same:
        before[section][name] = getattr(getattr(config, section), name)
    before["model"]["lora_targets"] = []
    notes = SimpleNamespace(warning=lambda *_: None)
    with pytest.raises(ConfigError, match=r"training\.reset_steps: expected 3.*after 2 resets"):
        check_unchanged(config, {}, found, notes)


# refusals, and the budget

GATES = ("--gate.auxiliary", "honest", "--objective.kl-coef", "1")
JUDGE = ("--rewards.judge", "http://a/v1", "--rewards.judge-model", "x")
UNSOUND = [
    (["shapes-nft", "--gate.auxiliary", "honest"],
     r"^gate\.auxiliary: expected objective\.kl_coef above 0"),
    (["shapes-nft", "objective:dpo", *GATES],
     r"^gate\.auxiliary: expected no value for dpo, whose loss evaluates the reference every"),
    (["shapes-nft", *GATES, "--objective.norm-coef", "1"],
     r"^gate\.auxiliary: expected objective\.norm_coef 0"),
    (["shapes-nft", *GATES, "--training.kl-target", "1"],
     r"^training\.kl_target: expected None beside gate\.auxiliary"),
    (["shapes-nft", *GATES, "--gate.share", "0.5", "--gate.maximum", "0.2"],
     r"^gate\.share: expected between gate\.minimum 0\.0 and gate\.maximum 0\.2, got 0\.5"),
    (["shapes-nft", "--objective.kl-coef", "1", "--gate.auxiliary", "following"],
     r"^gate\.auxiliary: expected rewards that are not trained, got 'following'"),
    (["shapes-nft", *GATES[2:], *GATES[:2], "honest"],
     r"^gate\.auxiliary: expected each name once"),
    (["kontext-nft", *JUDGE, "--rewards.weights.consistency", "0", *GATES],
     r"^gate\.auxiliary: expected names among \['consistency', 'following'\], or a scorer"),
    (["kontext-nft", *JUDGE, "--rewards.weights.consistency", "0", *GATES[2:],
      "--gate.auxiliary", "consistency"],
     r"^rewards\.consistency: expected the URL of a server for gate\.auxiliary, consistency"),
    (["shapes-nft", "--training.reset-steps", "5"],
     r"^training\.reset_steps: expected None where objective\.kl_coef is 0"),
    (["shapes-nft", *GATES[2:], "--training.reset-steps", "5", "--training.kl-target", "1"],
     r"^training\.kl_target: expected None beside training\.reset_steps"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), UNSOUND)
def test_what_does_not_go_together_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words)


def test_a_budget_counts_the_largest_share_and_the_adapter_more():
    words = ["kontext-nft", *JUDGE, "--rewards.consistency", "http://b", "--objective.kl-coef", "1"]
    plain = parse(words)
    gate = Gate(("taste",), maximum=0.25)
    training = dataclasses.replace(plain.training, reset_steps=50)
    gated = dataclasses.replace(plain, gate=gate, training=training)
    every, some_ = passes_of(plain), passes_of(gated)
    assert every.reference > 0
    assert some_ == dataclasses.replace(every, reference=0.25 * every.reference)
    assert plan_of(gated, gpus=1).more_adapters == plan_of(plain, gpus=1).more_adapters + 1
