"""Credit to turns: what each turn answers for, and the advantage that it gets."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import (
    RewardToGo,
    Signal,
    TrajectoryCredit,
    TurnCredit,
    binary_and,
    fuse_advantages,
    fuse_rewards,
    likert_average,
    select_groups,
    stop_after_failure,
    turn_advantage,
    turn_average,
)
from tests.loops import some

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
NAN = torch.nan
CREDITS = {
    "trajectory": TrajectoryCredit(),
    "turn": TurnCredit(),
    "to go": RewardToGo(),
    "to go, discounted": RewardToGo(discount=0.7),
}
credited = pytest.mark.parametrize("name", CREDITS)
fuses = pytest.mark.parametrize("fuse", [fuse_advantages, fuse_rewards])
close = partial(torch.testing.assert_close, equal_nan=True)


def exactly(message):
    return f"^{re.escape(message)}$"


def same(found, expected):
    """Whether values and masks are equal bit for bit."""
    assert torch.equal(found.valid, expected.valid)
    assert torch.equal(found.measured, expected.measured)
    assert torch.equal(found.value.nan_to_num(7), expected.value.nan_to_num(7))


@st.composite
def batches(draw, gaps=True):
    """Rewards of turns and their masks: absent turns, gaps, lost rewards; and groups."""
    rows, turns = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    number = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    flag = st.sampled_from([False, False, False, True]) if gaps else st.just(False)
    masks = {"turn_mask": torch.tensor([[draw(flag) for _ in range(turns)] for _ in range(rows)])}
    masks["turn_mask"] = ~masks["turn_mask"]
    for name in ("unmeasured", "lost"):
        masks[name] = torch.tensor([[draw(flag) for _ in range(turns)] for _ in range(rows)])
    reward = [[draw(number) for _ in range(turns)] for _ in range(rows)]
    reward = torch.tensor(reward, dtype=torch.float64)
    reward[~masks["turn_mask"] | masks["unmeasured"] | masks["lost"]] = NAN  # never read
    group = torch.tensor([draw(st.integers(0, 2)) for _ in range(rows)])
    return reward, masks, group


# golden values


def test_golden_credits():
    reward = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, NAN], [1.0, NAN, 0.0], [1.0, NAN, 0.5]])
    there = torch.ones(4, 3, dtype=torch.bool)
    there[1, 2] = False  # a chain of two turns
    gap, lost = torch.zeros_like(there), torch.zeros_like(there)
    gap[2, 1] = lost[3, 1] = True
    masks = {"turn_mask": there, "unmeasured": gap, "lost": lost}
    third = 1 / 3
    expected = {  # by hand: means of what each turn answers for
        TurnCredit(): [[1, 0, 0.5], [0, 1, NAN], [1, NAN, 0], [1, NAN, 0.5]],
        TrajectoryCredit(): [[0.5] * 3, [0.5] * 3, [0.5] * 3, [NAN] * 3],
        RewardToGo(): [[0.5, 0.25, 0.5], [0.5, 1, NAN], [0.5, 0, 0], [NAN, NAN, 0.5]],
        RewardToGo(discount=0.5): [
            [1.125 / 1.75, 0.25 / 1.5, 0.5],
            [third, 1, NAN],
            [1 / 1.25, 0, 0],
            [NAN, NAN, 0.5],
        ],
    }
    for credit, rows in some(expected.items()):
        value, _, measured = credit(reward, **masks)
        close(value, torch.tensor(rows))
        assert torch.equal(measured, ~value.isnan())
    strict = TrajectoryCredit(binary_and)(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert strict.value.tolist() == [[0, 0], [1, 1]]


def test_golden_states():
    """A gap is valid and unmeasured, and its chain keeps its reward; a lost turn costs it that."""
    reward = torch.tensor([[1.0, NAN], [NAN, NAN], [1.0, NAN]])
    gap = torch.tensor([[False, True], [True, True], [False, False]])
    lost = torch.tensor([[False, False], [False, False], [False, True]])
    yes, no = True, False
    expected = {  # valid, measured
        TurnCredit(): ([[yes, yes], [yes, yes], [yes, no]], [[yes, no], [no, no], [yes, no]]),
        TrajectoryCredit(): ([[yes, yes], [yes, yes], [no, no]], [[yes, yes], [no, no], [no, no]]),
        RewardToGo(): ([[yes, yes], [yes, yes], [no, no]], [[yes, no], [no, no], [no, no]]),
    }
    for credit, (valid, measured) in some(expected.items()):
        found = credit(reward, unmeasured=gap, lost=lost)
        assert found.valid.tolist() == valid
        assert found.measured.tolist() == measured
    plain = Signal(reward, lost)
    assert torch.equal(plain.measured, lost)  # where none is given, everything valid is measured


def test_an_unmeasured_signal_costs_a_turn_none_of_its_others():
    """IF trains a chain in which there is no consistency to measure; a lost one takes it out."""
    following = Signal(torch.tensor([[0.0], [4.0], [2.0]]), torch.ones(3, 1) > 0)
    value, yes = torch.tensor([[0.5], [NAN], [1.0]]), torch.ones(3, 1) > 0
    group, weights = torch.zeros(3).long(), {"following": 1.0, "consistency": 0.5}
    gap = Signal(value, yes, value.isfinite())
    signals = {"following": following, "consistency": gap}
    found = turn_advantage(signals, weights, group, std="none")
    assert found.valid.all()
    assert found.value.tolist() == [[-2 - 0.125], [2], [0.125]]
    lost = signals | {"consistency": Signal(value, value.isfinite())}
    found = turn_advantage(lost, weights, group, std="none")
    assert found.valid.tolist() == [[True], [False], [True]]
    assert found.value.tolist() == [[-1 - 0.125], [0], [1.125]]


@fuses
def test_a_turn_without_any_measured_signal_is_not_trained(fuse):
    value = torch.tensor([[1.0], [NAN], [3.0]])
    signal = Signal(value, torch.ones(3, 1) > 0, value.isfinite())
    other = Signal(torch.zeros(3, 1), torch.ones(3, 1) > 0)  # of weight 0: no information
    signals, weights = {"a": signal, "b": other}, {"a": 1.0, "b": 0.0}
    found = turn_advantage(signals, weights, torch.zeros(3).long(), fuse=fuse, eps=0.0)
    assert found.valid.tolist() == found.measured.tolist() == [[True], [False], [True]]
    assert found.value.tolist() == [[-1], [0], [1]]


def test_golden_advantages():
    reward, group = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.5, 1.0]]), torch.tensor([4, 4, 2])
    found = turn_advantage({"own": TurnCredit()(reward)}, {"own": 2.0}, group, eps=0.0)
    assert found.value.tolist() == [[2, -2], [-2, 2], [0, 0]]  # a group of one learns nothing
    assert found.valid.all()
    signals = {"own": TurnCredit()(reward), "chain": TrajectoryCredit()(reward)}
    found = turn_advantage(signals, {"own": 0.75, "chain": 0.25}, group, eps=0.0)
    assert found.value.tolist() == [[1, -0.5], [-1, 0.5], [0, 0]]


# explicit loops


def credit_by_loop(weight, row, there, gap, lost):
    """Of one chain: a weighted mean for each turn, "gap" where unmeasured, None where lost.

    ``weight(n, m)`` is what turn m counts for turn n.
    """
    values = []
    for n in range(len(row)):
        for_it = [m for m in range(len(row)) if there[m] and weight(n, m) > 0]
        has = [m for m in for_it if not lost[m] and not gap[m]]
        if not for_it or any(lost[m] for m in for_it):
            values.append(None)
            continue
        if not has:
            values.append("gap")
            continue
        total = sum(weight(n, m) for m in has)
        values.append(sum(weight(n, m) * row[m] for m in has) / total)
    return values


WEIGHTS = {
    "trajectory": lambda n, m: 1.0,
    "turn": lambda n, m: float(n == m),
    "to go": lambda n, m: float(m >= n),
    "to go, discounted": lambda n, m: 0.7 ** (m - n) if m >= n else 0.0,
}


@credited
@given(batch=batches())
def test_credit_is_the_explicit_loop(name, batch):
    reward, masks, _ = batch
    value, valid, measured = CREDITS[name](reward, **masks)
    lists = [x.tolist() for x in (reward, *masks.values())]
    for b, rows in some(enumerate(zip(*lists, strict=True))):
        expected = credit_by_loop(WEIGHTS[name], *rows)
        for n, x in some(enumerate(expected)):
            if name != "trajectory" and not rows[1][n]:
                x = None
            assert valid[b, n] == (x is not None)
            assert measured[b, n] == (x not in (None, "gap"))
            if measured[b, n]:
                assert value[b, n].item() == pytest.approx(x, abs=1e-12)


@given(batches(), st.data())
def test_advantage_is_the_explicit_loop(batch, data):
    reward, masks, group = batch
    first = RewardToGo()(reward, **masks)
    second = TrajectoryCredit()(reward, **masks)
    keep = torch.tensor([[data.draw(st.booleans()) for _ in row] for row in reward.tolist()])
    value, valid, _ = turn_advantage(
        {"a": first, "b": second}, {"a": 1.0, "b": 0.5}, group, turn_mask=masks["turn_mask"],
        keep=keep, eps=0.1,
    )  # fmt: skip
    for n in some(range(reward.shape[1])):
        allowed = (first.valid & second.valid & keep)[:, n].tolist()
        compared = [b for b, ok in enumerate(allowed) if ok]
        measured = (first.measured | second.measured)[:, n]
        assert valid[:, n].nonzero().flatten().tolist() == [b for b in compared if measured[b]]
        sums = {}
        for b in compared:
            expected = 0.0
            for signal, weight in ((first, 1.0), (second, 0.5)):
                members = [c for c in compared if group[c] == group[b] and signal.measured[c, n]]
                if b not in members:
                    continue
                own = signal.value[members, n].numpy()
                deviation = signal.value[b, n].item() - own.mean()
                expected += weight * deviation / (own.std() + 0.1)
            sums[b] = expected
        assert value[compared, n].tolist() == pytest.approx(list(sums.values()), abs=1e-12)


# properties


@fuses
@given(batch=batches(), std=st.sampled_from(["group", "batch", "none"]))
def test_trajectory_credit_is_the_broadcast_of_the_trajectorys_advantage(fuse, batch, std):
    reward, masks, group = batch
    has = masks["turn_mask"] & ~masks["unmeasured"] & ~masks["lost"]
    whole = has.any(dim=1) & ~(masks["turn_mask"] & masks["lost"]).any(dim=1)
    own = torch.zeros_like(reward[:, 0])
    if whole.any():
        own[whole] = turn_average(reward[whole], turn_mask=has[whole])
    expected = fuse({"r": own}, {"r": 0.3}, group, valid=whole, std=std)
    signals, options = {"r": TrajectoryCredit()(reward, **masks)}, {"fuse": fuse, "std": std}
    found = turn_advantage(signals, {"r": 0.3}, group, turn_mask=masks["turn_mask"], **options)
    there = torch.where(masks["turn_mask"], expected[:, None], 0)
    assert torch.equal(found.value, there)
    assert torch.equal(found.valid, whole[:, None] & masks["turn_mask"])


@given(batches())
def test_the_ends_of_the_discount_are_the_turn_and_the_chain(batch):
    reward, masks, _ = batch
    same(RewardToGo(discount=0)(reward, **masks), TurnCredit()(reward, **masks))
    first, whole = (CREDITS[name](reward, **masks) for name in ("to go", "trajectory"))
    there = masks["turn_mask"][:, 0]
    close(first.value[there, 0], whole.value[there, 0])
    assert torch.equal(first.valid[there, 0], whole.valid[there, 0])


@fuses
@given(batch=batches())
def test_the_ends_of_a_mixture_are_its_signals(fuse, batch):
    reward, masks, group = batch
    signals = {name: CREDITS[name](reward, **masks) for name in ("turn", "trajectory")}
    options = {"turn_mask": masks["turn_mask"], "fuse": fuse}
    for name, other in (("turn", "trajectory"), ("trajectory", "turn")):
        alone = turn_advantage({name: signals[name]}, {name: 1.0}, group, **options)
        same(turn_advantage(signals, {name: 1.0, other: 0.0}, group, **options), alone)


@given(batches(gaps=False), st.floats(0.1, 0.9))
def test_a_mixture_is_the_mean_of_advantages(batch, share):
    reward, _, group = batch
    reward = reward.nan_to_num(0.0)
    signals = {name: CREDITS[name](reward) for name in ("turn", "trajectory")}
    ends = [turn_advantage({n: s}, {n: 1.0}, group).value for n, s in signals.items()]
    mixed = turn_advantage(signals, {"turn": 1 - share, "trajectory": share}, group)
    close(mixed.value, (1 - share) * ends[0] + share * ends[1])


@credited
@given(batch=batches(), rng=st.randoms())
def test_rows_are_independent_and_their_order_is_free(name, batch, rng):
    reward, masks, group = batch
    order = rng.sample(range(len(reward)), len(reward))
    whole = CREDITS[name](reward, **masks)
    moved = CREDITS[name](reward[order], **{k: mask[order] for k, mask in masks.items()})
    same(moved, Signal(*(x[order] for x in whole)))
    row = CREDITS[name](reward[:1], **{k: mask[:1] for k, mask in masks.items()})
    same(row, Signal(*(x[:1] for x in whole)))
    found = turn_advantage({"r": moved}, {"r": 1.0}, group[order])
    close(found.value, turn_advantage({"r": whole}, {"r": 1.0}, group).value[order])


@credited
@given(batch=batches(), shift=st.floats(-3, 3), scale=st.floats(0.1, 3))
def test_credit_is_a_mean(name, batch, shift, scale):
    reward, masks, _ = batch
    signal = CREDITS[name](reward, **masks)
    moved = CREDITS[name](scale * reward + shift, **masks)
    close(moved.value, scale * signal.value + shift, atol=1e-9, rtol=0)
    assert torch.equal(moved.valid, signal.valid)
    assert torch.equal(moved.measured, signal.measured)


@credited
@given(batch=batches())
def test_padded_turns_are_as_if_deleted(name, batch):
    reward, masks, group = batch
    signal = CREDITS[name](reward, **masks)
    exists = {"turn_mask": torch.nn.functional.pad(masks["turn_mask"], (0, 2))}
    wider = exists | {k: torch.nn.functional.pad(masks[k], (0, 2)) for k in ("unmeasured", "lost")}
    padded = CREDITS[name](torch.nn.functional.pad(reward, (0, 2), value=NAN), **wider)
    turns = reward.shape[1]
    same(Signal(*(x[:, :turns] for x in padded)), signal)
    found = turn_advantage({"r": padded}, {"r": 1.0}, group, **exists)
    assert not found.valid[:, turns:].any()


@credited
def test_of_chains_of_equal_quality_the_longer_is_no_better(name):
    there = torch.tensor([[True, False, False], [True, True, True]])
    signal = CREDITS[name](torch.full((2, 3), 0.5), turn_mask=there)
    found = turn_advantage({"r": signal}, {"r": 1.0}, torch.zeros(2).long(), turn_mask=there)
    assert torch.equal(found.valid, there)
    assert not found.value.any()


def test_chains_of_unequal_length_are_compared_turn_by_turn_or_as_wholes():
    there = torch.tensor([[True, False], [True, True], [True, True]])
    reward, group = torch.tensor([[1.0, NAN], [0.0, 0.5], [0.5, 0.0]]), torch.zeros(3).long()
    whole, turn = (
        turn_advantage({"r": credit(reward, turn_mask=there)}, {"r": 1.0}, group, turn_mask=there)
        for credit in (TrajectoryCredit(), TurnCredit())
    )
    assert torch.equal(whole.value[1:, 0], whole.value[1:, 1])  # of (1, 1/4, 1/4), in either turn
    assert whole.value[0, 0] > 1
    assert whole.value[0, 1] == 0  # a turn that is not there
    close(turn.value[1:, 1], torch.tensor([1.0, -1.0]), atol=1e-3, rtol=0)  # of the two alone


# with masks of other rooms


def test_turns_after_a_failure_and_groups_that_teach_nothing_take_no_part():
    likert = torch.tensor([[5.0, 1.0, 5.0], [1.0, 5.0, 1.0], [5.0, 5.0, 1.0], [5.0, 5.0, 1.0]])
    group = torch.tensor([0, 0, 1, 1])
    signal = TurnCredit()((likert - 1) / 4)
    until = stop_after_failure(likert == 5).bool()
    teaching = select_groups(likert_average(likert), group).keep[:, None]
    found = turn_advantage({"r": signal}, {"r": 1.0}, group, keep=until & teaching, eps=0.0)
    assert found.valid.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert found.value.tolist() == [[1, 0, 0], [-1, 0, 0], [0, 0, 0], [0, 0, 0]]


# gradients, errors, dtypes


def test_no_gradient_flows():
    reward = torch.rand(4, 2, requires_grad=True)
    found = turn_advantage({"r": TurnCredit()(reward)}, {"r": 1.0}, torch.tensor([0, 0, 1, 1]))
    assert not found.value.requires_grad


@credited
def test_errors_of_credit(name):
    credit, reward = CREDITS[name], torch.zeros(2, 3)
    message = "reward: expected finite rewards (mark lost ones), got nan at index [0, 1]"
    with pytest.raises(ValueError, match=exactly(message)):
        credit(torch.tensor([[0.0, NAN]]))
    with pytest.raises(ValueError, match=r"expected a non-empty tensor of shape \[B, N\], got"):
        credit(torch.zeros(3))
    with pytest.raises(TypeError, match=r"reward: expected float32 or float64, got"):
        credit(reward.bfloat16())
    for mask in ("turn_mask", "unmeasured", "lost"):
        with pytest.raises(ValueError, match=rf"{mask}: expected shape \[B, N\] = \[2, 3\], got"):
            credit(reward, **{mask: torch.ones(2, dtype=torch.bool)})
        with pytest.raises(TypeError, match=f"{mask}: expected a boolean mask, got torch.float32"):
            credit(reward, **{mask: torch.ones(2, 3)})


def test_options_are_checked_where_there_is_nothing_to_compare_with():
    signals, alone = {"r": TurnCredit()(torch.zeros(2, 2))}, torch.arange(2)
    assert turn_advantage(signals, {"r": 1.0}, alone).value.eq(0).all()
    with pytest.raises(ValueError, match=r"^std: expected one of"):
        turn_advantage(signals, {"r": 1.0}, alone, std="none at all")
    with pytest.raises(ValueError, match=r"^eps: expected a finite number in \[0, inf\]"):
        turn_advantage(signals, {"r": 1.0}, alone, eps=-1.0)


def test_errors_of_advantages():
    signal, group = TurnCredit()(torch.zeros(2, 3)), torch.zeros(2).long()
    for weights, message in (
        ({}, "weights: expected one weight for each signal in ['r'], got []"),
        ({"r": 0.0}, "weights: expected one other than 0, got {'r': 0.0}"),
        ({"r": NAN}, "weights['r']: expected a finite number in [-inf, inf], got nan"),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            turn_advantage({"r": signal}, weights, group)
    for mask in ("turn_mask", "keep"):
        with pytest.raises(ValueError, match=rf"{mask}: expected shape \[B, N\] = \[2, 3\], got"):
            turn_advantage({"r": signal}, {"r": 1.0}, group, **{mask: torch.ones(2) > 0})
    broken = Signal(torch.full((2, 3), NAN), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected finite values"):
        turn_advantage({"r": broken}, {"r": 1.0}, group)
    with pytest.raises(ValueError, match="discount: expected a finite number in"):
        RewardToGo(discount=1.1)


@credited
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_stay(name, device, dtype):
    reward = torch.rand(4, 2, dtype=dtype, device=device)
    signal = CREDITS[name](reward)
    found = turn_advantage({"r": signal}, {"r": 1.0}, torch.zeros(4, device=device).long())
    for x in (signal.value, found.value):
        assert x.dtype == dtype
        assert x.device == reward.device


@pytest.mark.compile
@pytest.mark.parametrize("credit", [TurnCredit(), RewardToGo(discount=0.5)])
def test_compiled_equals_eager(credit):
    group, there = torch.tensor([3, 3, 9, 9]), torch.tensor([[True, False], [True, True]] * 2)

    def function(reward):
        signal = credit(reward, turn_mask=there)
        return turn_advantage({"r": signal}, {"r": 1.0}, group, turn_mask=there)

    reward = torch.rand(4, 2)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(reward), function(reward), strict=True):
        close(found, expected)


@pytest.mark.parametrize("shape", [(3,), (3, 2, 1)])
def test_rewards_have_two_axes(shape):
    with pytest.raises(ValueError, match=r"^reward: .*\[B, N\]"):
        TurnCredit()(torch.ones(shape))


def test_a_discount_is_not_negative():
    with pytest.raises(ValueError, match=r"^discount: "):
        RewardToGo(discount=-0.1)


# forms, absent turns, aliases


def test_absent_turns_have_advantage_0():
    """Under ``TrajectoryCredit`` a padded turn has a signal, and must not look trained."""
    exists = torch.tensor([[True, True], [True, False], [True, False]])
    reward = torch.tensor([[1.0, 0.0], [1.0, torch.nan], [0.0, torch.nan]])
    signals = {"a": TrajectoryCredit()(reward, turn_mask=exists)}
    keep = torch.tensor([[True, True], [False, True], [True, True]])
    for options in ({}, {"keep": keep}):
        got = turn_advantage(signals, {"a": 1.0}, [0, 0, 0], turn_mask=exists, **options)
        assert (got.value[~got.valid] == 0).all()
        assert torch.equal(got.valid, exists & options.get("keep", exists))
        assert (got.value != 0).any()


def test_the_masks_of_a_signal_are_two():
    value, valid = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    for signal in (
        Signal(value, valid),
        TurnCredit()(value),
        TrajectoryCredit()(value),
        turn_advantage({"a": TurnCredit()(value)}, {"a": 1.0}, torch.tensor([0, 0])),
    ):
        signal.measured[0, 0] = False
        assert signal.valid.all()
        signal.value[0, 0] = 5.0
        assert signal.value.flatten().tolist() == [5.0, 0.0, 0.0, 0.0]


def test_a_signal_checks_itself():
    value, valid = torch.zeros(2), torch.tensor([True, False])
    for arguments, error, message in (
        ((value, valid[:1]), ValueError, r"^valid: expected shape of value = \[2\], got \[1\]$"),
        ((value, valid.float()), TypeError, "^valid: expected a boolean mask"),
        ((value, valid, ~valid), ValueError, "^measured: expected no measured entry that is not"),
        (
            (value.half(), valid),
            TypeError,
            "^value: expected float32 or float64, got torch.float16",
        ),
    ):
        with pytest.raises(error, match=message):
            Signal(*arguments)
    listed = Signal([0, 1], [True, False])
    assert listed.value.dtype == torch.float32
    assert listed.measured.tolist() == [True, False]


def test_credits_take_lists_and_arrays():
    lost = [[False, True]]
    for reward in ([[1.0, 7.0]], np.array([[1, 7]]), [[True, True]]):
        signal = TurnCredit()(reward, lost=lost)
        assert signal.value[0, 0] == 1.0
        assert signal.valid.tolist() == [[True, False]]


def test_a_nan_signal_is_refused_where_ids_are_all_different():
    signal = Signal([[1.0], [torch.nan]], [[True], [True]])
    with pytest.raises(ValueError, match=r"^signals\['a'\]: expected finite values"):
        turn_advantage({"a": signal}, {"a": 1.0}, [0, 1])
