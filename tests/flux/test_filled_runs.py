"""Dynamic sampling: poor groups are replaced within a bound, alike on any ranks."""

from dataclasses import replace

import pytest
import torch
from mteditflow_examples.flux import filling
from mteditflow_examples.flux.advantages import round_rewards
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError
from mteditflow_examples.flux.filling import Sampled, fill, poor_groups
from mteditflow_examples.flux.sampling import next_chains, sample

from mteditflow.rewards import Fault, Lost, TurnScores
from tests.flux.rounds import started
from tests.loops import some

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = ("--data.groups", 3, "--data.group-size", 2, "--data.turns", 1)
WEIGHTS = ("--rewards.weights.consistency", 0)


def given(scores, group, plan):
    """Scores of "following" by the plan, group id to its members' scores; None is lost."""
    values, lost, seen = [], {}, {}
    for b, own in enumerate(group.tolist()):
        member = seen[own] = seen.get(own, -1) + 1
        value = plan.get(own, (1.0, 5.0))[member]
        values.append([float("nan") if value is None else value])
        if value is None:
            lost[b, 0] = Lost(Fault.timeout, "none", attempts=1)
    found = TurnScores(torch.tensor(values), torch.ones(len(values), 1, dtype=torch.bool), lost)
    return {**scores, "following": found}


def planned(monkeypatch, plan):
    """Make the scores of whatever is sampled follow a plan, and note what is sampled."""
    asked = []

    def sampled(run, drawn, **options):
        rollout, images, scores = sample(run, drawn, **options)
        asked.append((drawn.group.tolist(), options["places"]))
        return rollout, images, given(scores, drawn.group, plan)

    monkeypatch.setattr(filling, "sample", sampled)
    return asked


def first(run, plan):
    run.first_round = 0
    run.begin_round()
    drawn = next_chains(run)
    rollout, images, scores = sample(run, drawn)
    scores = given(scores, drawn.group, plan(list(dict.fromkeys(drawn.group.tolist()))))
    rewards = round_rewards(run.config.rewards, scores, drawn.group)
    return Sampled(drawn, rollout, images, scores, rewards)


def test_flat_and_broken_groups_are_replaced_in_their_places(world, tmp_path, monkeypatch):
    """Three groups: the first is flat, the second whole, the third has lost a member."""
    with started(world, tmp_path, *SMALL, *WEIGHTS, "--data.extra-groups", 5) as run:
        before = first(run, lambda ids: {ids[0]: (3.0, 3.0), ids[2]: (5.0, None)})
        ids = list(dict.fromkeys(before.drawn.group.tolist()))
        assert poor_groups(run, before.rewards) == [ids[0], ids[2]]
        asked = planned(monkeypatch, {})
        after = fill(run, before)
        new = list(dict.fromkeys(after.drawn.group.tolist()))
    assert [x[1] for x in asked] == [[0, 1, 4, 5]]
    assert new[1] == ids[1]
    assert not {new[0], new[2]} & set(ids)
    assert run.numbers["filling/groups"] == 2
    assert run.numbers["filling/trajectories"] == 4
    assert run.numbers["filling/left"] == 0
    group = after.drawn.group
    assert torch.equal(after.rollout.trajectory.group, group)
    assert torch.equal(after.rewards.group, group)
    for b, chain in some(enumerate(after.drawn.chains)):
        assert chain.id == run.chains.chains[int(group[b])].id
        assert after.drawn.instructions[b] == list(chain.instructions[:1])
    # What stays is untouched, bit for bit.
    latents = [x.rollout.trajectory.latents for x in (before, after)]
    assert torch.equal(latents[0][2:4], latents[1][2:4])
    assert after.scores["following"].score.flatten().tolist() == [1, 5, 1, 5, 1, 5]
    assert not after.scores["following"].lost


def test_the_bound_holds_and_no_group_gets_worse(world, tmp_path, monkeypatch):
    """Every other chain is flat: all attempts are spent, and the broken group stays."""
    with started(world, tmp_path, *SMALL, *WEIGHTS, "--data.extra-groups", 3) as run:
        before = first(run, lambda ids: {ids[0]: (3.0, 3.0), ids[2]: (5.0, None)})
        asked = planned(monkeypatch, dict.fromkeys(range(99), (2.0, 2.0)))
        after = fill(run, before)
        assert run.numbers["filling/groups"] == 0
        assert run.numbers["filling/trajectories"] == 6
        assert run.numbers["filling/left"] == 2
    assert [x[1] for x in asked] == [[0, 1, 4, 5], [0, 1]]
    assert torch.equal(after.drawn.group, before.drawn.group)
    assert torch.equal(after.rollout.trajectory.latents, before.rollout.trajectory.latents)
    assert after.scores["following"].lost.keys() == {(5, 0)}


def test_chains_and_noise_follow_from_the_round_and_the_place(world, tmp_path, monkeypatch):
    """Once more, and with the places of a second rank: the same latents there."""
    with started(world, tmp_path, *SMALL, *WEIGHTS, "--data.extra-groups", 2) as run:
        before = first(run, lambda ids: {ids[2]: (3.0, 3.0)})
        planned(monkeypatch, {})
        found = [fill(run, before).rollout.trajectory for _ in range(2)]
        # A rank that holds the third group alone, whose first trajectory is number 4 of all.
        key = run.key
        monkeypatch.setattr(type(run), "key", property(lambda _: replace(key, first=4)))
        rows = slice(4, 6)
        own = replace(
            before.drawn,
            **{
                name: getattr(before.drawn, name)[rows]
                for name in ("chains", "references", "group", "seen", "instructions", "edits")
            },
        )
        scores = {name: x.select([4, 5]) for name, x in before.scores.items()}
        alone = Sampled(own, before.rollout.select(rows), before.images[rows], scores,
                        round_rewards(run.config.rewards, scores, own.group))  # fmt: skip
        monkeypatch.setattr(filling, "_others", lambda *_: [int(found[0].group[4])])
        last = fill(run, alone).rollout.trajectory
    assert torch.equal(found[0].latents, found[1].latents)
    assert torch.equal(found[0].group, found[1].group)
    torch.testing.assert_close(last.latents, found[0].latents[rows], atol=1e-4, rtol=1e-4)
    assert not torch.equal(found[0].latents[rows], before.rollout.trajectory.latents[rows])


def test_what_cannot_be_filled_is_refused(world, tmp_path):
    for words, message in some([
        (["--data.fit", "buckets"], r"^data\.extra_groups: expected 0 where data\.fit is buckets"),
        (["--model.shard", "fsdp2"], r"^data\.extra_groups: expected 0 where model\.shard is"),
    ]):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            parse(["shapes-nft", "--data.extra-groups", "2", *words])
    message = r"^data\.extra_groups: expected at most the 13 chains beside the 3 of a round, got 14"
    refused = pytest.raises(ConfigError, match=message)
    with refused, started(world, tmp_path, *SMALL, "--data.extra-groups", 14):
        pass
