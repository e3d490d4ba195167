"""Units: which rows are trained, what leaving rows out changes, and how they are cut."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_worlds import (
    GROUP,
    TURN_MASK,
    Recorded,
    advantages,
    clean_samples,
    gradients,
    key,
    recorded_trajectory,
    validity,
)

from mteditflow.objectives import (
    AWM,
    DPO,
    DPPO,
    GRPO,
    NFT,
    OBJECTIVES,
    CleanSamples,
    Distillation,
    FlowAWR,
    Guard,
    Renoise,
    RoundKey,
    Units,
)
from tests.loops import some

REPLAYS = {"stochastic_steps": 3, "noise_level": 0.7}
SAMPLES = recorded_trajectory(Recorded().policies["old"])
ALL = {name: kind() for name, kind in OBJECTIVES.items()} | {  # a new one by its defaults
    "nft": NFT(loss="plain", renoise=Renoise(levels=2)),
    "awm": AWM(renoise=Renoise(levels=2)),
    "dpo": DPO(dpo_beta=2.0, renoise=Renoise(levels=2)),
    "grpo": GRPO(**REPLAYS),
    "guard": Guard(**REPLAYS),
    "dppo": DPPO(**REPLAYS),
    "distillation": Distillation(),
    "flow_awr": FlowAWR(temperature=None),  # takes advantages as they are
}


def draw(objective, values="default", valid="default", *, key=None, minibatches=1, samples=SAMPLES):
    values = advantages() if isinstance(values, str) else values
    valid = validity() if isinstance(valid, str) else valid
    return objective.units(
        samples,
        values if objective.card.rewarded else None,
        valid,
        key=key or RoundKey(0, 0),
        minibatches=minibatches,
    )


def test_every_objective_of_the_table_is_tried():
    assert {name: type(objective) for name, objective in ALL.items()} == OBJECTIVES


# which rows


@pytest.mark.parametrize("name", ALL)
def test_invalid_turns_and_absent_ones_are_never_rows(name):
    for units in some(draw(ALL[name], minibatches=2)):
        b, n, _ = units.rows.flatten(0, 1).unbind(1)
        assert bool((validity() & TURN_MASK)[b, n].all())
        assert len(units) > 0


@pytest.mark.parametrize("name", ["grpo", "guard", "dppo"])
def test_replays_train_stochastic_steps_once(name):
    (units,) = draw(ALL[name], torch.ones(8, 3))
    expected = (validity() & TURN_MASK)[..., None] & SAMPLES.step_mask
    assert torch.equal(units.rows[:, 0], expected.nonzero())
    assert units.count == len(units) == int(expected.sum())


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_forward_objectives_train_every_level_once(name):
    (units,) = draw(ALL[name], torch.ones(8, 3))
    expected = (validity() & TURN_MASK)[..., None].expand(-1, -1, 2)
    assert torch.equal(units.rows[:, 0], expected.nonzero())
    assert units.count == len(units)
    assert len(units.seed.unique()) == len(units)


def test_a_share_of_the_steps_is_drawn_before_rows_are_left_out():
    objective = GRPO(share=0.4, **REPLAYS)  # 2 of 3 steps
    (units,) = draw(objective, torch.ones(8, 3))
    turns = units.rows[:, 0, :2].unique(dim=0, return_counts=True)
    assert turns[1].tolist() == [2] * int((validity() & TURN_MASK).sum())
    (fewer,) = draw(objective)
    assert {tuple(r) for r in fewer.rows[:, 0].tolist()} < {
        tuple(r) for r in units.rows[:, 0].tolist()
    }
    assert fewer.count == units.count


@pytest.mark.parametrize("name", [n for n in ALL if ALL[n].card.rewarded])
def test_advantages_of_rows_are_those_of_their_turns(name):
    (units,) = draw(ALL[name])
    b, n, _ = units.rows.unbind(2)
    assert torch.equal(units.advantage, advantages()[b, n])
    (units,) = draw(ALL[name], advantages()[:, 2], None)
    b, n, _ = units.rows.unbind(2)
    assert torch.equal(units.advantage, advantages()[b, 2])
    assert units.advantage.dtype == torch.float64


# rows that are left out


def left_out(objective):
    (units,) = draw(objective)
    return units.count - len(units)


ZEROS = 2  # turns of advantage 0 that are valid


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        (GRPO(**REPLAYS), 3 * ZEROS),
        (GRPO(kl_coef=0.1, **REPLAYS), 0),
        (GRPO(importance_cap=2.0, **REPLAYS), 3 * ZEROS),
        (Guard(**REPLAYS), 3 * ZEROS),
        (Guard(kl_coef=0.1, **REPLAYS), 0),
        (DPPO(**REPLAYS), 3 * ZEROS),
        (DPPO(kl_coef=0.1, **REPLAYS), 0),
        (AWM(), ZEROS),
        (AWM(kl_coef=0.1), 0),
        (AWM(norm_coef=0.1), 0),
        (AWM(old_kl_coef=0.1), 0),
        (NFT(), 0),
        (NFT(kl_coef=0.1), 0),
        (DPO(), 0),
        (Distillation(), 0),
    ],
)
def test_rows_of_advantage_0_are_left_out_exactly_where_they_cannot_matter(objective, rows):
    assert left_out(objective) == rows


@pytest.mark.parametrize("name", ["grpo", "guard", "dppo", "awm", "nft"])
@given(zeros=st.integers(0, 2**24 - 1), lost=st.integers(0, 255), seed=st.integers(0, 9))
def test_leaving_rows_out_changes_no_gradient(name, zeros, lost, seed):
    objective, velocity = ALL[name], Recorded()
    zero = torch.tensor([zeros >> i & 1 for i in range(24)]).bool().view(8, 3)
    valid = torch.tensor([lost >> i & 1 for i in range(8)]).bool()[:, None].expand(8, 3)
    values = torch.where(zero, 0.0, advantages(seed))
    (units,) = draw(objective, values, valid)
    exists = SAMPLES.step_mask if name in ("grpo", "guard", "dppo") else None
    if exists is None:
        exists = TURN_MASK[..., None].expand(-1, -1, 2)
    everything = (exists & valid[..., None]).nonzero()
    assert units.count == len(everything)
    if len(everything) == 0:
        assert len(units) == 0
        return
    # The same random numbers for the rows of both: those of units that are all wanted.
    (wanted,) = draw(objective, torch.ones(8, 3, dtype=torch.float64), valid)
    b, n, _ = everything.unbind(1)
    whole = replace(wanted, advantage=values[b, n][:, None])
    expected = objective(velocity, SAMPLES, whole).loss.sum() / len(everything)
    parameters = velocity.parameters()
    found = torch.zeros(())
    if len(units):
        found = objective(velocity, SAMPLES, units).loss.sum() / units.count
    torch.testing.assert_close(found.double(), expected, rtol=1e-9, atol=1e-12)
    if len(units):
        torch.testing.assert_close(
            gradients(found, parameters), gradients(expected, parameters), rtol=1e-6, atol=1e-9
        )
    else:
        assert not bool(gradients(expected, parameters).any())


# split


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [1, 5, 7, 1000])
def test_parts_keep_count_order_and_sum(name, size):
    objective, velocity = ALL[name], Recorded()
    (units,) = draw(objective)
    parts = units.split(size)
    assert {part.count for part in parts} == {units.count}
    assert {len(part) for part in parts[:-1]} <= {size}
    assert len(parts[-1]) <= size
    for field in ("rows", "mask", "advantage", "seed"):
        whole = getattr(units, field)
        pieces = [getattr(part, field) for part in parts]
        if whole is None:
            assert pieces == [None] * len(parts)
        else:
            assert torch.equal(torch.cat(pieces), whole)
    whole = objective(velocity, SAMPLES, units)
    outputs = [objective(velocity, SAMPLES, part) for part in parts]
    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([o.loss for o in outputs]), whole.loss, **tolerance)
    for metric, x in some(whole.metrics.items()):
        pieces = torch.cat([o.metrics[metric] for o in outputs])
        torch.testing.assert_close(pieces, x, **tolerance)
    torch.testing.assert_close(
        sum(
            gradients(o.loss.sum() / p.count, velocity.parameters())
            for o, p in zip(outputs, parts, strict=True)
        ),
        gradients(whole.loss.sum() / units.count, velocity.parameters()),
        rtol=1e-9,
        atol=1e-12,
    )


class Broken:
    """A velocity whose every output is NaN, of every policy, with a gradient that is not."""

    def __init__(self):
        self.shift = torch.zeros((), requires_grad=True)

    def __call__(self, policy, x_t, sigma, at):
        return torch.full_like(x_t, torch.nan) + self.shift


@pytest.mark.parametrize("name", ALL)
def test_idle_units_have_loss_and_gradient_0_even_where_a_velocity_is_nan(name):
    objective = ALL[name]
    if ALL[name].card.rewarded:
        objective = replace(objective, kl_coef=0.1)
    (units,) = draw(objective)
    *_, last = units.split(1000, parts=2)
    assert (len(last), last.count, bool(last.mask.any())) == (1, units.count, False)
    velocity = Broken()
    output = objective(velocity, SAMPLES, last)
    assert output.loss.tolist() == [0.0]
    assert all(x.tolist() == [0.0] for x in some(output.metrics.values()))
    output.loss.sum().backward()
    assert velocity.shift.grad == 0.0


@pytest.mark.parametrize("name", ALL)
def test_one_forward_pass_per_part_also_where_nothing_is_valid(name):
    objective, velocity = ALL[name], Recorded()
    (units,) = draw(objective, valid=torch.zeros(8, 3, dtype=torch.bool))
    assert (len(units), units.count) == (0, 0)
    assert units.split(4) == []
    parts = units.split(4, parts=3)
    assert [len(part) for part in parts] == [1, 1, 1]
    for part in some(parts):
        output = objective(velocity, SAMPLES, part)
        assert output.loss.tolist() == [0.0]
        assert not bool(gradients(output.loss.sum(), velocity.parameters()).any())
    assert velocity.asked().count("current") == 3


def test_an_idle_unit_beside_others_changes_them_by_nothing():
    objective, velocity = ALL["nft"], Recorded()
    (units,) = draw(objective)
    idle = units.idle()
    both = Units(
        torch.cat([units.rows[:3], idle.rows]),
        torch.cat([units.mask[:3], idle.mask]),
        torch.cat([units.advantage[:3], idle.advantage]),
        torch.cat([units.seed[:3], idle.seed]),
        units.count,
    )
    found, expected = objective(velocity, SAMPLES, both), objective(velocity, SAMPLES, units[:3])
    assert torch.equal(found.loss[:3], expected.loss)
    assert found.loss[3] == 0
    torch.testing.assert_close(
        gradients(found.loss.sum(), velocity.parameters()),
        gradients(expected.loss.sum(), velocity.parameters()),
    )


def test_parts_are_refused_where_they_cannot_be_cut():
    (units,) = draw(ALL["nft"])
    with pytest.raises(ValueError, match=r"parts: expected \d+ or more for \d+ units, 2 in each"):
        units.split(2, parts=1)
    with pytest.raises(ValueError, match="size: expected an integer >= 1, got 0"):
        units.split(0)


def test_units_are_chosen_by_slices_masks_and_indices():
    (units,) = draw(ALL["dpo"])
    some = torch.zeros(len(units), dtype=torch.bool)
    some[2:4] = True
    for index in (slice(2, 4), some, torch.tensor([2, 3])):
        chosen = units[index]
        assert torch.equal(chosen.rows, units.rows[2:4])
        assert torch.equal(chosen.seed, units.seed[2:4])
        assert torch.equal(chosen.advantage, units.advantage[2:4])
        assert chosen.mask.shape == (2, 2)
        assert chosen.count == units.count
    with pytest.raises(TypeError, match="index: expected a slice or a tensor, got int"):
        units[0]


# minibatches, ranks, epochs


@pytest.mark.parametrize("name", [n for n in ALL if not ALL[n].card.whole_groups])
def test_minibatches_partition_the_trajectories(name):
    objective = ALL[name]
    (whole,) = draw(objective)
    minibatches = draw(objective, minibatches=4)
    owners = [set(units.rows[..., 0].unique().tolist()) for units in minibatches]
    assert sum(map(len, owners)) == len(set().union(*owners))
    rows = torch.cat([units.rows for units in minibatches]).flatten(0, 1)
    assert sorted(rows.tolist()) == sorted(whole.rows.flatten(0, 1).tolist())
    assert sum(units.count for units in minibatches) == whole.count


def test_pairs_go_to_the_minibatch_of_their_winner():
    (whole,) = draw(ALL["dpo"])
    minibatches = draw(ALL["dpo"], minibatches=4)
    winners = [set(units.rows[:, 0, 0].unique().tolist()) for units in minibatches]
    assert sum(map(len, winners)) == len(set().union(*winners))
    pairs = torch.cat([units.rows for units in minibatches])
    assert sorted(pairs.flatten(1).tolist()) == sorted(whole.rows.flatten(1).tolist())
    assert sum(units.count for units in minibatches) == whole.count


def by_row(units, first=0):
    """Seed and advantage of each member under its trajectory's number on all ranks."""
    members = {}
    for u in range(len(units)):
        for k in range(units.rows.shape[1]):
            b, n, s = units.rows[u, k].tolist()
            seed = None if units.seed is None else int(units.seed[u, k])
            members[first + b, n, s] = seed
    return members


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("minibatches", [1, 2, 4])
@pytest.mark.parametrize("name", ALL)
def test_ranks_draw_what_one_process_would(name, minibatches, shared):
    objective = ALL[name]
    if hasattr(objective, "renoise"):
        objective = replace(objective, renoise=Renoise(levels=2, shared=shared))
    elif ALL[name].card.rewarded:
        objective = replace(objective, share=0.4)
    elif shared:
        more = {"share": 0.5} if name == "distillation" else {"queries": 3}
        objective = replace(objective, **more)
    # Two groups of four, on two ranks; a group is split over ranks where none is needed whole.
    whole, split = torch.arange(8), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    order = whole if objective.card.whole_groups else split
    samples, values, valid = SAMPLES.select(order), advantages()[order], validity()[order]
    alone = draw(
        objective, values, valid, key=RoundKey(3, 5), minibatches=minibatches, samples=samples
    )
    for k, expected in some(enumerate(alone)):
        found = {}
        count = 0
        for first in (0, 4):
            own = slice(first, first + 4)
            part = draw(
                objective,
                values[own],
                valid[own],
                key=RoundKey(3, 5, first=first),
                minibatches=minibatches,
                samples=samples.select(own),
            )[k]
            found |= by_row(part, first)
            count += part.count
        assert found == by_row(expected)
        assert count == expected.count


@pytest.mark.parametrize("name", ["nft", "awm", "dpo"])
def test_epochs_and_rounds_draw_other_noise(name):
    keys = [RoundKey(0, 0), RoundKey(0, 1), RoundKey(1, 0), RoundKey(0, 0).of_epoch(1)]
    seeds = [draw(ALL[name], key=k)[0].seed.unique().tolist() for k in keys]
    assert len({s for own in seeds for s in own}) == sum(map(len, seeds))
    again = draw(ALL[name], key=RoundKey(0, 0).of_epoch(0))[0]
    assert again.seed.unique().tolist() == seeds[0]


def test_epochs_draw_other_steps_and_minibatches():
    objective = GRPO(share=0.4, **REPLAYS)
    drawn = [draw(objective, key=RoundKey(0, 0).of_epoch(e), minibatches=2) for e in range(4)]
    for read in (
        lambda units: units[0].rows[:, 0, 0].unique().tolist(),
        lambda units: sorted(torch.cat([u.rows for u in units]).tolist()),
    ):
        assert len({str(read(units)) for units in drawn}) > 1


# a plain generator


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_equal_generators_give_equal_units(name, minibatches):
    first, again, other = (draw(ALL[name], key=key(s), minibatches=minibatches) for s in (1, 1, 2))
    for a, b, c in some(zip(first, again, other, strict=True)):
        assert torch.equal(a.rows, b.rows)
        if a.seed is not None:
            assert torch.equal(a.seed, b.seed)
            assert not set(a.seed.flatten().tolist()) & set(c.seed.flatten().tolist())


def test_a_generator_advances_from_pass_to_pass():
    generator = key()
    first, second = (draw(ALL["nft"], key=generator)[0] for _ in range(2))
    assert not set(first.seed.flatten().tolist()) & set(second.seed.flatten().tolist())


@pytest.mark.parametrize("source", [key, lambda: RoundKey(0, 0)])
@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_shared_noise_is_one_for_a_group_turn_and_level_in_all_minibatches(source, minibatches):
    objective = NFT(renoise=Renoise(levels=2, shared=True))
    drawn = draw(objective, valid=None, key=source(), minibatches=minibatches)
    rows, seeds = (torch.cat([getattr(u, f) for u in drawn]) for f in ("rows", "seed"))
    seed_of = {}
    for (b, n, k), seed in zip(rows[:, 0].tolist(), seeds[:, 0].tolist(), strict=True):
        seed_of.setdefault((int(GROUP[b]), n, k), set()).add(seed)
    assert all(len(own) == 1 for own in some(seed_of.values()))
    assert len(set.union(*seed_of.values())) == len(seed_of)


# defaults of the user


@pytest.mark.parametrize("name", ALL)
def test_default_dtype_and_device_change_nothing(name):
    objective, velocity = ALL[name], Recorded()
    if name in ("grpo", "guard", "dppo"):
        objective = replace(objective, share=0.4)
    key_ = RoundKey(0, 0)
    expected = draw(objective, key=key_, minibatches=2)
    loss = [
        objective(velocity, SAMPLES, part).loss for u in expected for part in u.split(9, parts=9)
    ]
    values, valid = advantages(), validity()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # where nothing can be read
            found = draw(objective, values, valid, key=key_, minibatches=2)
            parts = [part for u in found for part in u.split(9, parts=9)]
            again = [objective(velocity, SAMPLES, part).loss for part in parts]
            if hasattr(objective, "check_ratios"):
                objective.check_ratios(velocity, SAMPLES, trajectories=2, size=9)
    finally:
        torch.set_default_dtype(before)
    for one, other in some(zip(expected, found, strict=True)):
        assert torch.equal(one.rows, other.rows)
        assert one.seed is None or torch.equal(one.seed, other.seed)
    torch.testing.assert_close(torch.cat(again), torch.cat(loss))


# errors

WRONG = [
    (
        {"values": torch.zeros(7)},
        ValueError,
        r"advantage: expected shape \[B\] or \[B, N\] = \[8\]",
    ),
    ({"values": torch.zeros(8, 2)}, ValueError, r"advantage: expected shape .* = \[8, 3\], got"),
    ({"values": torch.zeros(8, 2, 1)}, ValueError, r"advantage: expected shape"),
    ({"values": torch.zeros(8).half()}, TypeError, r"advantage: expected float32 or float64"),
    ({"values": torch.zeros(8).long()}, TypeError, r"advantage: expected float32 or float64"),
    ({"values": [0.0] * 8}, TypeError, r"advantage: expected a torch.Tensor, got list"),
    ({"values": None}, TypeError, r"advantage: expected a tensor for \w+, got None"),
    (
        {"valid": torch.ones(8, dtype=torch.bool)},
        ValueError,
        r"valid: expected shape of advantage = \[8, 3\], got \[8\]",
    ),
    ({"valid": torch.ones(8, 3)}, TypeError, r"valid: expected a boolean mask, got torch.float32"),
    ({"minibatches": 3}, ValueError, r"minibatches: expected a divisor of the 8 trajectories"),
    ({"minibatches": 0}, ValueError, r"minibatches: expected an integer >= 1, got 0"),
    ({"key": 3}, TypeError, r"key: expected a RoundKey or a torch.Generator, got int"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
@pytest.mark.parametrize("name", [n for n in ALL if ALL[n].card.rewarded])
def test_errors(name, options, error, message):
    with pytest.raises(error, match=message):
        draw(ALL[name], **options)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [n for n in ALL if ALL[n].card.rewarded])
def test_an_advantage_is_finite_where_it_is_valid_and_read_nowhere_else(name, bad):
    values = advantages()
    values[~(validity() & TURN_MASK)] = bad
    (units,), (expected,) = draw(ALL[name], values), draw(ALL[name])
    assert torch.equal(units.rows, expected.rows)
    assert torch.equal(units.advantage, expected.advantage)
    values[0, 0] = bad
    with pytest.raises(ValueError, match=r"advantage: expected finite values where valid, got"):
        draw(ALL[name], values)


def test_distillation_has_no_reward_and_takes_validity_by_turn_or_trajectory():
    objective = Distillation()
    with pytest.raises(TypeError, match="advantage: expected None for Distillation, which has no"):
        objective.units(SAMPLES, advantages(), key=key())
    by_trajectory = torch.arange(8) != 3
    (one,) = objective.units(SAMPLES, None, by_trajectory, key=key())
    (other,) = objective.units(SAMPLES, None, by_trajectory[:, None].expand(8, 3), key=key())
    assert torch.equal(one.rows, other.rows)
    assert 3 not in one.rows[..., 0]
    assert one.count == len(one)
    for wrong in (torch.ones(7, dtype=torch.bool), torch.ones(8, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"valid: expected shape \[B\] or \[B, N\]"):
            objective.units(SAMPLES, None, wrong, key=key())
    with pytest.raises(TypeError, match="valid: expected a boolean mask"):
        objective.units(SAMPLES, None, torch.ones(8), key=key())


@pytest.mark.parametrize("name", ["grpo", "guard", "dppo", "distillation"])
def test_objectives_of_steps_refuse_samples_without_steps(name):
    with pytest.raises(ValueError, match="samples: expected stored steps, got samples without any"):
        draw(ALL[name], samples=clean_samples())


def test_objectives_refuse_units_without_what_they_need():
    (units,) = draw(ALL["distillation"])
    with pytest.raises(TypeError, match="units: expected units with advantages, got None"):
        ALL["grpo"](Recorded(), SAMPLES, units)


def test_clean_samples_say_what_is_wrong():
    good = {"clean": torch.zeros(4, 1, 2), "group": torch.zeros(4).long()}
    mask = torch.ones(4, 1, dtype=torch.bool)
    gone = torch.full((4, 1, 2), torch.nan)
    for options, error, message in (
        ({"clean": torch.zeros(4, 2)}, ValueError, r"clean: expected a non-empty tensor of shape"),
        ({"clean": torch.zeros(4, 1, 2).long()}, TypeError, "clean: expected a floating-point"),
        ({"clean": gone}, ValueError, "clean: expected finite latents in existing turns, got nan"),
        ({"group": torch.zeros(3).long()}, ValueError, r"group: expected shape \[B\] = \[4\]"),
        ({"group": torch.zeros(4)}, TypeError, r"group: expected integer ids, got torch.float32"),
        ({"group": torch.zeros(4).bool()}, TypeError, r"group: expected integer ids, got"),
        ({"turn_mask": mask[:3]}, ValueError, r"turn_mask: expected shape \[B, N\] = \[4, 1\]"),
        ({"turn_mask": mask.float()}, TypeError, "turn_mask: expected a boolean mask"),
    ):
        with pytest.raises(error, match=message):
            CleanSamples(**{**good, **options})
    absent = CleanSamples(gone, good["group"], ~mask)
    assert (len(absent), absent.step_mask.shape, absent.reduction) == (4, (4, 1, 0), "mean")
