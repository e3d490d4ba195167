"""Rewards and advantages from scores: how turns become one reward, and who is credited."""

import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mteditflow_examples import train_flux
from mteditflow_examples.flux.advantages import round_rewards, turn_advantages, turn_signals
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError, Rewards
from mteditflow_examples.flux.reporting import carry_over
from mteditflow_examples.flux.sampling import next_chains, sample

from mteditflow import RewardHistory, fuse_advantages, likert_average
from tests.flux.rounds import first_round, started, turn_values
from tests.loops import some
from tests.samples_of_scores import nan, turn_scores

FOLLOWING = {"weights": {"following": 1.0}}
CREDITS = ("trajectory", "turn", "until_failure", "to_go", "mixture")
close = partial(torch.testing.assert_close, rtol=0, atol=1e-3)  # eps of the std is 1e-4


def advantages(rows, group=None, lost=(), consistency=None, multipliers=None, **options):
    """Of chains that are scored for following; of one group if none is given."""
    terms = {"following": turn_scores(rows, lost)}
    if consistency is not None:
        terms["consistency"] = turn_scores(consistency)
    group = torch.zeros(len(rows), dtype=torch.int64) if group is None else group
    return fused(Rewards(**FOLLOWING | options), terms, group, multipliers)


def fused(config, terms, group, multipliers=None, history=None):
    """As the loop computes them."""
    rewards = round_rewards(config, terms, group)
    signals, weights = turn_signals(config, rewards, multipliers or {})
    return turn_advantages(config, rewards, signals, weights, history)[:2]


def rewards_of(config, rows):
    """Reward for following of each trajectory of one group."""
    group = torch.zeros(len(rows), dtype=torch.int64)
    rewards = round_rewards(config, {"following": turn_scores(rows)}, group)
    return rewards.reward("following").value.tolist()


# golden values


@pytest.mark.parametrize(
    ("aggregate", "scale", "expected"),
    [
        ("average", "likert", [0.75, 1.0, 0.625]),  # of (5, 3), (5, 5) and (4, 3), 1 to 5 on 0 to 1
        ("successes", "likert", [0.5, 1.0, 0.0]),
        ("all", "likert", [0.0, 1.0, 0.0]),
    ],
)
def test_turns_become_one_reward(aggregate, scale, expected):
    config = Rewards(**FOLLOWING, aggregate=aggregate, scale=scale)
    assert rewards_of(config, [[5.0, 3.0], [5.0, 5.0], [4.0, 3.0]]) == expected


@pytest.mark.parametrize(("aggregate", "half"), [("average", 0.5), ("successes", 0.5), ("all", 0)])
def test_yes_and_no_become_one_reward(aggregate, half):
    config = Rewards(**FOLLOWING, aggregate=aggregate, scale="binary", success=1)
    assert rewards_of(config, [[1.0, 0.0], [1.0, 1.0]]) == [half, 1.0]


def test_a_binary_scale_refuses_another_score():
    config = Rewards(**FOLLOWING, scale="binary", success=1)
    with pytest.raises(ValueError, match=r"score: expected whole scores in 0..1, got 3"):
        rewards_of(config, [[1.0, 3.0]])


def test_a_trajectory_shares_its_advantage_among_the_turns_that_it_has():
    advantage, valid = advantages([[5.0, 1.0], [1.0, None]])
    close(advantage, torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
    assert valid.tolist() == [[True, True], [True, False]]


def test_each_turn_is_compared_with_the_same_turn_of_its_group():
    advantage, valid = advantages([[5.0, 1.0], [1.0, 5.0]], credit="turn")
    close(advantage, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    assert valid.all()


def test_each_turn_answers_for_what_comes_after_it():
    # To go: (1/2, 0) and (1/2, 1), (1, 1); discounted by 1/2: (2/3, 0), (1/3, 1), (1, 1).
    rows = [[5.0, 1.0], [1.0, 5.0], [5.0, 5.0]]
    third = math.sqrt(1 / 2)
    advantage, valid = advantages(rows, credit="to_go")
    close(advantage, torch.tensor([[-third, -2 * third], [-third, third], [2 * third, third]]))
    assert valid.all()
    advantage, _ = advantages(rows, credit="to_go", discount=0.5)
    close(advantage[:, 0], torch.tensor([0.0, -math.sqrt(3 / 2), math.sqrt(3 / 2)]))


def test_a_mixture_weighs_the_chain_and_the_turn():
    rows = [[5.0, 1.0], [1.0, 1.0]]
    advantage, _ = advantages(rows, credit="mixture", trajectory_share=0.25)
    close(advantage, torch.tensor([[1.0, 0.25], [-1.0, -0.25]]))


@pytest.mark.parametrize("aggregate", ["average", "all"])
def test_the_chains_reward_in_a_mixture_is_that_of_credit_trajectory(aggregate):
    rows = [[5.0, 1.0], [1.0, 5.0], [5.0, 5.0]]
    whole = advantages(rows, credit="trajectory", aggregate=aggregate)
    mixed = advantages(rows, credit="mixture", trajectory_share=1.0, aggregate=aggregate)
    for found, expected in some(zip(mixed, whole, strict=True)):
        assert torch.equal(found, expected)


def test_groups_that_are_not_informative_are_left_out_if_so_configured():
    rows = [[5.0, 5.0], [5.0, 5.0], [1.0, 1.0], [1.0, 1.0], [3.0, 4.0], [4.0, 3.0], [5.0, 1.0]]
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    config = Rewards(**FOLLOWING, groups="informative")

    def rewards():
        return round_rewards(config, {"following": turn_scores(rows)}, group)

    assert not advantages(rows, group, groups="informative")[1].any()
    assert advantages(rows, group)[1].all()
    assert rewards().informative("following").counts == {
        "kept": 0, "short": 1, "saturated": 1, "hopeless": 1, "flat": 1,
    }  # fmt: skip
    rows[5] = [5.0, 5.0]
    assert advantages(rows, group, groups="informative")[1].any(dim=1).tolist() == [
        *[False] * 4, True, True, False,
    ]  # fmt: skip
    assert rewards().spreads("following") == {0: 0.0, 1: 0.0, 2: pytest.approx(3 / 16)}


def test_below_its_floor_consistency_gains_weight():
    rows, looks = [[5.0], [1.0]], [[0.5], [0.9]]
    given = {"consistency": looks, "weights": {"following": 1.0, "consistency": 0.5}, "floor": 0.8}
    for multiplier, expected in ((0.0, 0.5), (0.5, 0.0), (2.0, -0.5)):  # (1 - 0.5 - m) / (1 + m)
        found, _ = advantages(rows, multipliers={"consistency": multiplier}, **given)
        close(found, torch.tensor([[expected], [-expected]]))
    given["weights"] = {"following": 1.0}
    found, _ = advantages(rows, multipliers={"consistency": 3.0}, **given)
    close(found, torch.tensor([[-0.5], [0.5]]))
    terms = {"following": turn_scores(rows)}
    with pytest.raises(
        ConfigError, match=r"expected names among \['following'\], got 'consistency'"
    ):
        round_rewards(Rewards(**FOLLOWING, floor=0.8), terms, torch.zeros(2, dtype=torch.int64))


def test_after_a_failure_no_turn_takes_part():
    rows = [[5.0, 5.0, 1.0], [1.0, 5.0, 5.0], [5.0, 1.0, 5.0], [5.0, 5.0, 5.0]]
    advantage, valid = advantages(rows, credit="until_failure")
    assert valid.tolist() == [[True] * 3, [True, False, False], [True, True, False], [True] * 3]
    # Means of 1 1 0, of 1, 0, 1 without the second, and of 0 and 1 alone; population std.
    third, half = math.sqrt(1 / 3), math.sqrt(1 / 2)
    expected = [[third, half, -1], [-math.sqrt(3), 0, 0], [third, -2 * half, 0], [third, half, 1]]
    close(advantage, torch.tensor(expected))


def test_a_lost_score_takes_its_own_turn_out_or_its_chain():
    rows, lost = [[math.nan, 5.0], [5.0, 1.0], [1.0, 5.0]], [(0, 0)]
    masks = {credit: advantages(rows, lost=lost, credit=credit)[1].tolist() for credit in CREDITS}
    others = [[True, True], [True, True]]
    assert masks["trajectory"] == [[False, False], *others]
    assert masks["turn"] == masks["to_go"] == [[False, True], *others]
    assert masks["mixture"] == masks["trajectory"]
    # Whether it succeeded is not known: what came after takes no part either.
    assert masks["until_failure"] == [[False, False], [True, True], [True, False]]


@pytest.mark.parametrize("credit", CREDITS)
def test_a_term_without_weight_may_be_absent_and_one_with_weight_may_not(credit):
    rows = [[5.0, 1.0], [1.0, 5.0], [5.0, 5.0]]
    alone = advantages(rows, credit=credit)
    weights = {"following": 1.0, "strict": 0.0}
    for found, expected in some(
        zip(advantages(rows, credit=credit, weights=weights), alone, strict=True)
    ):
        assert torch.equal(found, expected)
    with pytest.raises(ConfigError, match=r"expected names among \['following'\], got 'strict'"):
        advantages(rows, credit=credit, weights={"following": 1.0, "strict": 0.1})


@pytest.mark.parametrize("fusion", ["advantages", "rewards"])
def test_several_terms_are_fused_turn_by_turn(fusion):
    config = Rewards(weights={"following": 1.0, "consistency": 0.5}, fusion=fusion, credit="turn")
    following, consistency = [[5.0, 1.0], [1.0, 5.0]], [[0.5, 0.9], [0.9, 0.8]]
    terms = {"following": turn_scores(following), "consistency": turn_scores(consistency)}
    advantage, _ = fused(config, terms, torch.zeros(2, dtype=torch.int64))
    expected = [[0.5, -0.5], [-0.5, 0.5]] if fusion == "advantages" else [[1.0, -1.0], [-1.0, 1.0]]
    close(advantage[:, 0], torch.tensor(expected)[:, 0])
    second = [-0.5, 0.5] if fusion == "advantages" else [-1.0, 1.0]
    close(advantage[:, 1], torch.tensor(second))


# properties

few = settings(max_examples=40)  # tests/advantages has as many laws of the functions themselves

likert = st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0])


@st.composite
def scored(draw, turns=None):
    """Rows of scores and their groups; chains of equal length."""
    turns = draw(st.integers(1, 4)) if turns is None else turns
    rows = draw(st.lists(st.lists(likert, min_size=turns, max_size=turns), min_size=1, max_size=9))
    group = draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    return rows, torch.tensor(group)


@few
@given(scored(turns=1))
def test_of_one_turn_everyone_is_credited_alike(batch):
    whole, *others = (advantages(*batch, credit=credit) for credit in CREDITS)
    for other in some(others):
        close(other[0], whole[0], atol=1e-6)  # a mixture adds up two halves
        assert torch.equal(other[1], whole[1])


@few
@given(scored())
def test_a_trajectorys_advantage_is_the_librarys(batch):
    rows, group = batch
    reward = {"following": likert_average(torch.tensor(rows))}
    expected = fuse_advantages(reward, {"following": 1.0}, group)
    advantage, valid = advantages(rows, group)
    assert torch.equal(advantage, expected[:, None].expand_as(advantage))
    assert valid.all()


@few
@given(scored(), st.sampled_from(CREDITS), st.randoms())
def test_the_order_of_trajectories_is_free(batch, credit, rng):
    rows, group = batch
    order = rng.sample(range(len(rows)), len(rows))
    advantage, valid = advantages(rows, group, credit=credit)
    moved, mask = advantages([rows[b] for b in order], group[order], credit=credit)
    close(moved, advantage[order])
    assert torch.equal(mask, valid[order])


@few
@given(scored(), st.sampled_from(["turn", "until_failure"]), st.data())
def test_later_turns_do_not_matter_to_earlier_ones(batch, credit, data):
    rows, group = batch
    turn = data.draw(st.integers(0, len(rows[0]) - 1))
    whole = advantages(rows, group, credit=credit)
    cut = advantages([row[: turn + 1] for row in rows], group, credit=credit)
    for found, expected in some(zip(cut, whole, strict=True)):
        assert torch.equal(found, expected[:, : turn + 1])


@few
@given(scored())
def test_the_ends_of_discount_and_share_are_credit_turn(batch):
    expected = advantages(*batch, credit="turn")
    for options in (
        {"credit": "to_go", "discount": 0.0},
        {"credit": "mixture", "trajectory_share": 0.0},
    ):
        for found, value in some(zip(advantages(*batch, **options), expected, strict=True)):
            assert torch.equal(found, value)


@few
@given(scored(), st.data())
def test_what_comes_after_a_failure_may_be_anything(batch, data):
    rows, group = batch
    expected = advantages(rows, group, credit="until_failure")
    for row in rows:
        failed = next((n for n, x in enumerate(row) if x < 5), len(row))
        row[failed + 1 :] = [data.draw(likert) for _ in row[failed + 1 :]]
    for found, value in some(
        zip(advantages(rows, group, credit="until_failure"), expected, strict=True)
    ):
        assert torch.equal(found, value)


# in the trainer


def test_a_turn_after_a_failure_is_left_out_of_an_update(world, tmp_path):
    with started(world, tmp_path, "--rewards.credit", "until_failure") as run_:
        first = first_round(run_)
        score = torch.full_like(first.scores["following"].score, 5.0)
        score[:8, 0] = 1.0
        terms = first.scores | {"following": turn_scores(score.tolist())}
        advantage, valid = turn_values(run_, terms, first.rollout.trajectory.group)
        (units,) = first.given(advantage=advantage, valid=valid).units()
    expected = [[b, n] for b in range(16) for n in range(2) if b >= 8 or n == 0]
    assert units.rows[:, 0, :2].tolist() == expected
    assert units.count == len(units) == 24 * run_.config.objective.renoise.levels


def test_a_run_that_goes_on_keeps_its_multiplier_and_what_chains_showed(world, tmp_path):
    more = ("--data.draw", "informative", "--rewards.floor", 1.0, "--rewards.floor-rate", 20.0)
    more += ("--rewards.groups", "informative", "--training.final-rate", 1.0, "--data.groups", 2)
    states = []
    for folder, rounds in (("whole", (3,)), ("parts", (2, 3))):
        for until in rounds:
            given = (*more, "--training.rounds", until)
            (tmp_path / folder).mkdir(exist_ok=True)
            with started(world, tmp_path / folder, *given) as run_:
                train_flux.train(run_)
        saved = run_.checkpoints.find("auto")
        told = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        rows = [
            {k: x for k, x in json.loads(row).items() if not k.startswith("seconds/")}
            for row in told
        ]
        states.append((saved.tensors("current"), saved.state, rows))
    (one, state, metrics), (two, again, others) = states
    assert all(torch.equal(one[name], two[name]) for name in some(one))
    assert metrics == others
    assert len(metrics) == 3
    for name in ("sampler", "multipliers", "watch"):
        assert state[name] == again[name]
    assert state["sampler"]["round"] == 3
    assert any(spread is not None for spread in state["sampler"]["spreads"])
    value = 0.0
    for row in some(metrics):
        assert row["multiplier/consistency"] == value
        value = min(max(value + 20 * (1 - row["reward/consistency"]), 0), 10)
    assert state["multipliers"] == {"consistency": value}
    assert value > 0


GAPS = [[nan, nan], [nan, nan], [0.5, 0.5], [0.9, nan]]  # nobody of the first group has any


def with_gaps(credit, fusion, **weights):
    weights = {"following": 1.0, "consistency": 1.0} | weights
    config = Rewards(weights=weights, credit=credit, fusion=fusion)
    group = torch.tensor([7, 7, 2, 2])
    rows = [[5.0, 5.0], [1.0, 1.0], [1.0, 1.0], [5.0, 5.0]]
    terms = {"following": turn_scores(rows), "consistency": turn_scores(GAPS)}
    rewards = round_rewards(config, terms, group)
    return rewards, turn_advantages(config, rewards, *turn_signals(config, rewards, {}))


@pytest.mark.parametrize("credit", CREDITS)
def test_following_trains_a_group_whose_consistency_cannot_be_measured(credit):
    rewards, found = with_gaps(credit, "advantages")
    first = found.value[:2, 0].tolist()
    assert first == pytest.approx([1, -1], abs=1e-3)  # that of following alone
    assert found.value[2:, 0].tolist() == pytest.approx([-2, 2], abs=1e-3)
    assert found.valid[:, 0].all()
    assert found.unfused_groups == 0
    numbers = rewards.numbers()
    assert (numbers["invalid_share"], numbers["unmeasured/consistency"]) == (0, 0.5)
    for scores in rewards.terms.values():  # what ends a run that loses too much
        scores.require(max_invalid_share=0.0)


@pytest.mark.parametrize("credit", ["trajectory", "turn"])
def test_reward_fusion_leaves_such_a_group_out_and_counts_it(credit):
    _, found = with_gaps(credit, "rewards")
    assert found.unfused_groups == 1
    assert not found.valid[:2].any()
    assert found.valid[2:, 0].all()
    assert found.value[2:, 0].tolist() == pytest.approx([-1, 1], abs=1e-3)
    _, without = with_gaps(credit, "rewards", consistency=0.0)
    assert without.unfused_groups == 0  # of weight 0 it is not needed
    assert without.valid.all()


def test_reward_fusion_leaves_out_turns_and_not_whole_chains():
    """At turn 2 one member of the second group has consistency: its mean stands for the other."""
    _, found = with_gaps("turn", "rewards")
    assert found.valid.tolist() == [[False, False]] * 2 + [[True, True]] * 2
    assert found.value[2:, 1].tolist() == pytest.approx([-1, 1], abs=1e-3)


def test_a_round_that_is_not_done_moves_no_multiplier(world, tmp_path):
    more = ("--rewards.floor", 1.0, "--data.draw", "informative", "--rewards.history", 2)
    with started(world, tmp_path, *more) as run_:
        before = run_.state.multipliers, run_.sampler.state_dict(), run_.state.history
        run_.first_round = 0
        drawn = next_chains(run_)
        rollout, _, terms = sample(run_, drawn)
        turn_values(run_, terms, rollout.trajectory.group)
        assert (run_.state.multipliers, run_.sampler.state_dict(), run_.state.history) == before
        rewards = round_rewards(run_.config.rewards, terms, drawn.group)
        carry_over(run_, rewards, turn_signals(run_.config.rewards, rewards, {})[0])
        after = run_.state.multipliers, run_.sampler.state_dict(), run_.state.history
        assert all(x != y for x, y in some(zip(before, after, strict=True)))


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("fusion", ["advantages", "rewards"])
def test_earlier_rounds_of_a_chain_join_its_statistics_and_nothing_else(credit, fusion):
    """Advantages are those of one large group, cut to the members of this round."""
    config = Rewards(**FOLLOWING, credit=credit, fusion=fusion, history=2)
    before, now = [[5.0, 5.0], [3.0, 4.0]], [[5.0, 2.0], [5.0, 5.0]]
    group, history = torch.tensor([7, 7]), RewardHistory(2)
    rewards = round_rewards(config, {"following": turn_scores(before)}, group)
    history = history.updated(turn_signals(config, rewards, {})[0], group)
    terms = {"following": turn_scores(now)}
    alone = fused(config, terms, group, history=RewardHistory(2))
    expected = fused(config, terms, group)
    for found, value in some(zip(alone, expected, strict=True)):
        assert torch.equal(found, value)
    joined, valid = fused(config, terms, group, history=history)
    both = {"following": turn_scores(now + before)}
    whole, mask = fused(config, both, torch.tensor([7] * 4))
    assert joined.shape == (2, 2)
    assert torch.equal(valid, mask[:2])
    close(joined, whole[:2], atol=1e-6)
    other, _ = fused(config, terms, torch.tensor([8, 8]), history=history)
    assert torch.equal(other, alone[0])


@pytest.mark.parametrize("name", ["credit", "aggregate", "groups"])
def test_another_word_is_refused(name):
    with pytest.raises((ConfigError, SystemExit)):
        parse(["shapes-nft", f"--rewards.{name}", "other"])
