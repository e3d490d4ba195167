"""Chains that get longer over a run, and turns that ask for no change."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from mteditflow_examples import train_flux
from mteditflow_examples.flux.advantages import round_rewards, turn_advantages, turn_signals
from mteditflow_examples.flux.config import Rewards
from mteditflow_examples.flux.sampling import edit_turns, next_chains, sample, stillness
from PIL import Image

from mteditflow.objectives import RoundKey
from mteditflow.rewards import TurnScores
from tests.flux.rounds import started
from tests.flux.worlds import weights
from tests.glossary import undocumented
from tests.loops import some

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = ("--data.groups", 2, "--data.group-size", 2, "--data.turns", 3, "--training.batch", 32)
STILL = ("--data.identity-share", 0.4, "--rewards.weights.identity", 0.5)


def test_a_schedule_lengthens_the_chains_of_a_round_and_their_records(world, tmp_path):
    growth = ("--growth.first", 1, "--growth.every", 2)
    with started(world, tmp_path, *SMALL, *growth) as run:
        lengths = []
        for done in range(5):
            run.state.done = done
            run.begin_round()
            drawn = next_chains(run)
            run.sampler.step()
            assert all(len(texts) == run.turns for texts in some(drawn.instructions))
            assert all(chain.turns == run.turns for chain in some(drawn.chains))
            assert all(len(seen) == run.turns for seen in some(drawn.seen))
            assert run.numbers["chains/turns"] == run.turns
            lengths.append(run.turns)
    assert lengths == [1, 1, 2, 2, 3]


def test_a_fall_of_rewards_that_longer_chains_bring_is_no_collapse(world, tmp_path):
    growth = ("--growth.first", 2, "--growth.every", 1)
    more = (*growth, "--safety.collapse-window", 1)
    with started(world, tmp_path, *SMALL, *more) as run:
        run.begin_round()
        run.watch.check({"following": 0.9})
        run.state.done = 1
        run.begin_round()
        run.watch.check({"following": 0.1})  # of three turns: no collapse
        run.state.done = 2
        run.begin_round()
        assert run.watch.state_dict()["best"] == {"following": 0.1}  # three turns still


def test_turns_without_a_change_are_drawn_by_group_and_alike_on_any_rank():
    group = torch.tensor([7, 7, 3, 3, 11, 11])
    edits = edit_turns(RoundKey(0, 5), group, 4, 0.4)
    assert torch.equal(edits[::2], edits[1::2])
    second = edit_turns(RoundKey(0, 5, first=4), group[4:], 4, 0.4)
    assert torch.equal(second, edits[4:])
    assert not torch.equal(edit_turns(RoundKey(0, 6), group, 4, 0.4), edits)
    assert edit_turns(RoundKey(0, 5), group, 4, 0.0).all()


def test_their_share_is_the_configured_one_and_an_edit_is_left():
    """An eighth of 3,000 chains of 3 turns at 0.5 would have no edit, and gets one."""
    edits = edit_turns(RoundKey(1, 0), torch.arange(3000), 3, 0.5)
    assert edits.any(dim=1).all()
    share = float((~edits).double().mean())
    assert share == pytest.approx(0.5 - 0.125 / 3, abs=5 * (0.25 / 9000) ** 0.5)


def test_stillness_is_measured_at_turns_without_a_change_alone():
    gray, lighter = (Image.new("RGB", (2, 2), (x, x, x)) for x in (0, 51))
    scores = stillness([[gray, lighter, lighter], [gray, lighter, gray]],
                       torch.tensor([[True, True], [False, True]]))  # fmt: skip
    torch.testing.assert_close(
        scores.score, torch.tensor([[0.8, 1.0], [math.nan, 0.8]]), equal_nan=True
    )
    assert scores.unmeasured.tolist() == [[False, False], [True, False]]


def test_a_scorer_sees_edits_alone_and_the_rest_is_scored_by_its_own_picture(world, tmp_path):
    with started(world, tmp_path, *SMALL, *STILL) as run:
        run.first_round = 0
        run.begin_round()
        drawn = next_chains(run)
        rollout, images, scores = sample(run, drawn)
        config = run.config.rewards
        rewards = round_rewards(config, scores, drawn.group)
        signals, own = turn_signals(config, rewards, {})
        advantage, valid, _ = turn_advantages(config, rewards, signals, own)
    still = ~drawn.edits
    assert still.any()
    assert rollout.turn_mask.shape == still.shape == (4, 3)
    text = run.config.data.identity_instruction
    for b, texts in some(enumerate(drawn.instructions)):
        assert [x == text for x in texts] == still[b].tolist()
        assert tuple(x for x in texts if x != text) == drawn.chains[b].instructions
        assert len(images[b]) == 4
    for name in some(("following", "consistency", "strict")):
        assert torch.equal(scores[name].measured, drawn.edits)
    assert torch.equal(scores["identity"].measured, still)
    assert not any(x.lost for x in some(list(scores.values())))
    assert valid.all()  # nothing was lost: a turn with nothing to follow is no fault
    assert advantage.abs().sum() > 0


def scored(values):
    return TurnScores(torch.tensor(values), torch.ones(len(values), 3) > 0, {})


def test_a_turn_without_a_change_ends_no_chain_and_has_its_own_advantage():
    """Two members; turn 2 asks for no change. The first fails turn 1, the second follows all."""
    nan = math.nan
    config = Rewards(credit="until_failure", weights={"following": 1.0, "identity": 0.5},
                     scorer="mteditflow_examples.shapes.scoring:ExactRewards")  # fmt: skip
    terms = {
        "following": scored([[1.0, nan, 5.0], [5.0, nan, 5.0]]),
        "identity": scored([[nan, 0.5, nan], [nan, 0.9, nan]]),
    }
    rewards = round_rewards(config, terms, torch.tensor([0, 0]))
    advantage, valid, _ = turn_advantages(config, rewards, *turn_signals(config, rewards, {}))
    assert valid.tolist() == [[True, False, False], [True, True, True]]
    turn = Rewards(credit="turn", weights=config.weights, scorer=config.scorer)
    advantage, valid, _ = turn_advantages(turn, rewards, *turn_signals(turn, rewards, {}))
    assert valid.all()
    # Normalized alone: +-1 each; identity at its weight of 0.5; turn 3 without a spread.
    expected = torch.tensor([[-1.0, -0.5, 0.0], [1.0, 0.5, 0.0]])
    torch.testing.assert_close(advantage, expected, atol=1e-3, rtol=0)


def log(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: x for k, x in line.items() if not k.startswith("seconds/")} for line in lines]


@pytest.mark.parametrize("objective", ["nft", "grpo"])
def test_a_run_that_grows_goes_on_to_the_same_weights(world, tmp_path, objective):
    """Three rounds: a third turn by what is left still; resumed within the patience."""
    growth = ("--growth.first", 2, "--growth.change", 255, "--growth.patience", 2)
    more = (*SMALL, *STILL, *growth, "--training.rounds", 3, "--output.checkpoint-every", 1)
    given = (*more, "--output.keep", 9)
    with started(world, tmp_path / "whole", *given, objective=objective) as run:
        train_flux.train(run)
        assert (run.state.depth.depth, run.state.turns) == (3, 3)
    again = ("--output.resume", tmp_path / "whole" / "checkpoints" / "round-000001")
    with started(world, tmp_path / "again", *given, *again, objective=objective) as run:
        train_flux.train(run)
        assert run.first_round == 1
    whole, resumed = (log(tmp_path / x) for x in ("whole", "again"))
    assert [line["chains/turns"] for line in whole] == [2, 2, 3]
    assert undocumented(name for line in some(whole) for name in line) == []
    assert whole[1:] == resumed
    changes = [line["chains/change"] for line in whole]
    assert all(math.isnan(x) or 0 <= x <= 255 for x in some(changes))
    for name in some(("current", "old", "optimizer")):
        ours, theirs = (weights(tmp_path / x, name, done=3) for x in ("whole", "again"))
        assert all(torch.equal(ours[k], theirs[k]) for k in some(ours))


def test_a_round_without_turns_that_ask_for_no_change_counts_for_nothing(world, tmp_path):
    from mteditflow_examples.flux.reporting import carry_over

    growth = ("--growth.first", 2, "--growth.change", 9, "--growth.patience", 3)
    with started(world, tmp_path, *SMALL, *STILL, *growth) as run:
        streaks = []
        for change in (5.0, math.nan, 5.0, 9.1):
            run.begin_round()
            next_chains(run)
            run.numbers["chains/change"] = change
            carry_over(run, SimpleNamespace(means={}, spreads=dict))
            streaks.append(run.state.depth.streak)
    assert streaks == [1, 1, 2, 0]


def test_the_original_and_the_turn_before_are_rewards_of_their_own(world, tmp_path):
    """Each normalized in its group; a fault that stays costs the original alone at turn 2."""
    weights_ = {"following": 0.0, "consistency": 1.0, "consecutive": 0.5}
    config = Rewards(credit="turn", weights=weights_,
                     scorer="mteditflow_examples.shapes.scoring:ExactRewards")  # fmt: skip
    terms = {
        "following": scored([[5.0] * 3, [5.0] * 3]),
        "consistency": scored([[0.9, 0.9, 1.0], [1.0, 1.0, 1.0]]),
        "consecutive": scored([[0.9, 1.0, 0.8], [1.0, 1.0, 1.0]]),
    }
    rewards = round_rewards(config, terms, torch.tensor([0, 0]))
    advantage, _, _ = turn_advantages(config, rewards, *turn_signals(config, rewards, {}))
    # The first member: -1 each where it is worse, weighed 1 and 0.5.
    expected = torch.tensor([-1.5, -1.0, -0.5])
    torch.testing.assert_close(advantage[0], expected, atol=5e-3, rtol=0)
    with started(world, tmp_path, *SMALL, "--rewards.weights.consecutive", 0.5) as run:
        run.first_round = 0
        _, _, scores = sample(run, next_chains(run))
        found = round_rewards(run.config.rewards, scores, torch.arange(4) // 2)
        assert "consecutive" in found.names
