"""Turn aggregation: from scores per turn to a reward, and from an advantage to every step."""

import math
import re
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import (
    binary_and,
    binary_average,
    broadcast_to_steps,
    conditional_success,
    content_consistency,
    instruction_following,
    likert_average,
    marginal_success,
    normalize_likert,
    overall,
    pad_turns,
    reward_to_go,
    stop_after_failure,
    turn_average,
)
from mteditflow.rewards.scale import BINARY, LIKERT

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
NAN = math.nan

# Each aggregator with the values it takes, and the same in plain Python over the turns that exist.
REFERENCES = {
    "and": (binary_and, (0, 1), lambda turns: float(all(turns))),
    "binary": (binary_average, (0, 1), lambda turns: sum(turns) / len(turns)),
    "likert": (
        likert_average,
        (1, 2, 3, 4, 5),
        lambda turns: sum((score - 1) / 4 for score in turns) / len(turns),
    ),
    "likert_max": (
        lambda scores, **options: likert_average(scores, normalization="max", **options),
        (1, 2, 3, 4, 5),
        lambda turns: sum(score / 5 for score in turns) / len(turns),
    ),
    "average": (turn_average, (-2, 0, 0.5, 3), lambda turns: sum(turns) / len(turns)),
}
aggregators = pytest.mark.parametrize("name", REFERENCES)


def exactly(message):
    return f"^{re.escape(message)}$"


@st.composite
def chains(draw, values):
    """Rows of scores with a mask that leaves every chain at least one turn."""
    turns = draw(st.integers(1, 5))
    rows = draw(st.integers(1, 5))
    scores = [[draw(st.sampled_from(values)) for _ in range(turns)] for _ in range(rows)]
    mask = [[draw(st.booleans()) for _ in range(turns)] for _ in range(rows)]
    for row in mask:
        row[draw(st.integers(0, turns - 1))] = True
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(mask)


# golden values


def test_golden_binary():
    success = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert binary_and(success).tolist() == [1, 0, 0, 0]
    assert binary_average(success).tolist() == [1, 0.75, 0.25, 0]


def test_golden_likert():
    likert = torch.tensor([[5, 5], [1, 1], [3, 4], [2, 5]])
    # (l - 1) / 4: 1, 0, (2 + 3) / 8, (1 + 4) / 8
    assert likert_average(likert).tolist() == [1, 0, 0.625, 0.625]
    # l / 5: 1, 0.2, 7 / 10, 7 / 10
    assert likert_average(likert, normalization="max").tolist() == pytest.approx([1, 0.2, 0.7, 0.7])
    assert likert_average(torch.tensor([[2.5]])).tolist() == [0.375]  # averaged votes


def test_golden_average():
    assert turn_average(torch.tensor([[0.5, -0.25, 0.5]])).tolist() == [0.25]


def test_golden_chains_of_unequal_length():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    success = torch.tensor([[1.0, 1.0, 0.0], [0.0, NAN, 1.0]])
    assert binary_and(success, turn_mask=mask).tolist() == [1, 0]
    assert binary_average(success, turn_mask=mask).tolist() == [1, 0]
    likert = torch.tensor([[2.0, 5.0, NAN], [3.0, 99.0, -1.0]])
    assert likert_average(likert, turn_mask=mask).tolist() == [0.625, 0.5]
    assert turn_average(likert, turn_mask=mask).tolist() == [3.5, 3.0]


# loops and properties


@aggregators
@given(data=st.data())
def test_aggregators_equal_the_loop(name, data):
    aggregate, values, reference = REFERENCES[name]
    scores, mask = data.draw(chains(values))
    expected = [
        reference([s for s, exists in zip(row, keep, strict=True) if exists])
        for row, keep in zip(scores.tolist(), mask.tolist(), strict=True)
    ]
    assert aggregate(scores, turn_mask=mask).tolist() == pytest.approx(expected, abs=1e-15)


@given(chains((0, 1)))
def test_strict_success_never_exceeds_the_average(chain):
    scores, mask = chain
    strict, average = binary_and(scores, turn_mask=mask), binary_average(scores, turn_mask=mask)
    assert (strict <= average).all()
    assert torch.equal(strict == 1, average == 1)


@given(chains((1, 2, 3, 4, 5)))
def test_the_likert_normalisations_are_affine_in_each_other(chain):
    scores, mask = chain
    minmax = likert_average(scores, turn_mask=mask)
    of_max = likert_average(scores, normalization="max", turn_mask=mask)
    torch.testing.assert_close(of_max, 0.8 * minmax + 0.2)


# reward_to_go


def test_golden_reward_to_go():
    reward = torch.tensor([[1.0, 2.0, 4.0]])
    assert reward_to_go(reward).tolist() == [[7, 6, 4]]
    assert reward_to_go(reward, discount=0.5).tolist() == [[3, 4, 4]]
    assert reward_to_go(reward, discount=0.0).tolist() == [[1, 2, 4]]
    assert reward_to_go(torch.tensor([[3]])).tolist() == [[3]]
    mask = torch.tensor([[True, True, False]])
    padded = torch.tensor([[1.0, 2.0, NAN]])
    assert reward_to_go(padded, discount=0.5, turn_mask=mask).tolist() == [[2, 2, 0]]


@given(chains((-2, 0, 0.5, 3)), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_reward_to_go_equals_the_loop(chain, discount):
    reward, mask = chain
    expected = [
        [
            sum(discount ** (m - n) * row[m] for m in range(n, len(row)) if keep[m]) * keep[n]
            for n in range(len(row))
        ]
        for row, keep in zip(reward.tolist(), mask.tolist(), strict=True)
    ]
    result = reward_to_go(reward, discount=discount, turn_mask=mask)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


# stop_after_failure


def test_golden_stop_after_failure():
    success = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 0]])
    weights = [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert stop_after_failure(success).tolist() == weights
    assert stop_after_failure(torch.tensor([[0]])).tolist() == [[1]]
    mask = torch.tensor([[True, False, True]])
    assert stop_after_failure(torch.tensor([[1.0, NAN, 0.0]]), turn_mask=mask).tolist() == [
        [1, 0, 1]
    ]


@given(chains((0, 1)))
def test_stop_after_failure_equals_the_loop(chain):
    success, mask = chain
    expected = []
    for row, keep in zip(success.tolist(), mask.tolist(), strict=True):
        alive, weights = 1.0, []
        for score, exists in zip(row, keep, strict=True):
            weights.append(alive if exists else 0.0)
            if exists and score == 0:
                alive = 0.0
        expected.append(weights)
    assert stop_after_failure(success, turn_mask=mask).tolist() == expected


# broadcast_to_steps


def test_golden_broadcast():
    per_trajectory = broadcast_to_steps(torch.tensor([2.0, -1.0]), turns=2, steps=3)
    assert per_trajectory.tolist() == [[[2.0] * 3] * 2, [[-1.0] * 3] * 2]
    per_turn = broadcast_to_steps(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), turns=2, steps=1)
    assert per_turn.tolist() == [[[1.0], [2.0]], [[3.0], [4.0]]]


def test_broadcast_passes_the_gradient_of_every_step():
    advantage = torch.tensor([1.0, 2.0], requires_grad=True)
    broadcast_to_steps(advantage, turns=3, steps=5).sum().backward()
    assert advantage.grad.tolist() == [15.0, 15.0]
    assert torch.autograd.gradcheck(
        lambda x: broadcast_to_steps(x, turns=2, steps=3),
        torch.randn(4, 2, dtype=torch.float64, requires_grad=True),
    )


@pytest.mark.parametrize("shape", [(), (2, 3), (2, 2, 2)])
def test_broadcast_refuses_other_shapes(shape):
    message = f"advantage: expected shape [B] or [B, N] with N = 2, got {list(shape)}"
    with pytest.raises(ValueError, match=exactly(message)):
        broadcast_to_steps(torch.zeros(shape), turns=2, steps=1)


def test_broadcast_errors():
    for counts, name in [((0, 1), "turns"), ((1, 0), "steps")]:
        with pytest.raises(ValueError, match=exactly(f"{name}: expected an integer >= 1, got 0")):
            broadcast_to_steps(torch.zeros(2), turns=counts[0], steps=counts[1])
    message = "advantage: expected a floating-point tensor, got torch.complex64"
    with pytest.raises(TypeError, match=exactly(message)):
        broadcast_to_steps(torch.zeros(2, dtype=torch.complex64), turns=1, steps=1)


# what all that read turns share


READERS = {
    "success": [binary_and, binary_average, stop_after_failure],
    "likert": [likert_average],
    "score": [turn_average],
    "reward": [reward_to_go],
}
readers = pytest.mark.parametrize(
    ("name", "function"), [(name, f) for name, fs in READERS.items() for f in fs]
)


@readers
@pytest.mark.parametrize("shape", [(3,), (3, 0), (0, 3), (1, 2, 3)])
def test_the_shape_is_chains_by_turns(name, function, shape):
    message = f"{name}: expected a non-empty tensor of shape [B, N], got {list(shape)}"
    with pytest.raises(ValueError, match=exactly(message)):
        function(torch.ones(shape))


@readers
def test_a_chain_without_turns_is_refused(name, function):
    mask = torch.tensor([[True, False], [False, False]])
    message = "turn_mask: expected at least one turn in each row, got False at index [1]"
    with pytest.raises(ValueError, match=exactly(message)):
        function(torch.ones(2, 2), turn_mask=mask)


@readers
def test_the_mask_is_boolean_and_fits(name, function):
    message = "turn_mask: expected a boolean mask, got torch.float32; convert 0 and 1 with .bool()"
    with pytest.raises(TypeError, match=exactly(message)):
        function(torch.ones(2, 2), turn_mask=torch.ones(2, 2))
    message = "turn_mask: expected shape [B, N] = [2, 2], got [2, 1]"
    with pytest.raises(ValueError, match=exactly(message)):
        function(torch.ones(2, 2), turn_mask=torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize("function", READERS["success"])
@pytest.mark.parametrize("wrong", [0.5, -1.0, 2.0, NAN])
def test_success_is_0_or_1(function, wrong):
    message = f"success: expected 0 or 1, got {wrong} at index [0, 1]"
    with pytest.raises(ValueError, match=exactly(message)):
        function(torch.tensor([[1.0, wrong]]))


@pytest.mark.parametrize("wrong", [0.5, 5.5, NAN])
def test_likert_lies_in_1_to_5(wrong):
    message = f"likert: expected scores in 1..5, got {wrong} at index [0, 1]"
    with pytest.raises(ValueError, match=exactly(message)):
        likert_average(torch.tensor([[1.0, wrong]]))
    message = "normalization: expected one of ['minmax', 'max'], got 'mean'"
    with pytest.raises(ValueError, match=exactly(message)):
        likert_average(torch.ones(1, 1), normalization="mean")


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, NAN])
def test_scores_and_rewards_are_finite(wrong):
    x = torch.tensor([[1.0, wrong]])
    message = f"score: expected finite scores, got {wrong} at index [0, 1]"
    with pytest.raises(ValueError, match=exactly(message)):
        turn_average(x)
    message = f"reward: expected finite rewards, got {wrong} at index [0, 1]"
    with pytest.raises(ValueError, match=exactly(message)):
        reward_to_go(x)


@pytest.mark.parametrize("discount", [-0.1, 1.1])
def test_discount_lies_between_0_and_1(discount):
    message = f"discount: expected a finite number in [0, 1], got {discount}"
    with pytest.raises(ValueError, match=exactly(message)):
        reward_to_go(torch.ones(1, 1), discount=discount)


@readers
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bool, torch.float32),
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_is_float32_at_least_and_the_device_stays(name, function, device, dtype, expected):
    scores = torch.ones(2, 3, dtype=dtype, device=device)
    if (function, dtype) == (likert_average, torch.bool):
        with pytest.raises(TypeError, match="got booleans"):
            function(scores)
        return
    result = function(scores)
    assert result.dtype == expected
    assert result.device.type == device


@pytest.mark.compile
@readers
def test_compiled_equals_eager(name, function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    scores = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, NAN]])
    mask = ~scores.isnan()
    assert torch.equal(compiled(scores, turn_mask=mask), function(scores, turn_mask=mask))
    assert torch.equal(compiled(scores[:1]), function(scores[:1]))


@pytest.mark.compile
def test_compiled_broadcast_equals_eager():
    compiled = torch.compile(broadcast_to_steps, fullgraph=True, backend="aot_eager")
    advantage = torch.randn(4)
    assert torch.equal(
        compiled(advantage, turns=2, steps=3), broadcast_to_steps(advantage, turns=2, steps=3)
    )


def test_likert_scores_are_normalized_one_by_one():
    scores = torch.tensor([[1, 2], [3, 5]])
    assert normalize_likert(scores).tolist() == [[0.0, 0.25], [0.5, 1.0]]
    fifths = normalize_likert(scores, normalization="max").tolist()
    assert fifths == [pytest.approx([0.2, 0.4]), pytest.approx([0.6, 1.0])]
    assert normalize_likert(torch.tensor(3.4, dtype=torch.float64)).item() == pytest.approx(0.6)
    dtypes = (torch.int64, torch.float16, torch.float32, torch.float64)
    found = [normalize_likert(torch.ones(1, dtype=dtype)).dtype for dtype in dtypes]
    assert found == [torch.float32] * 3 + [torch.float64]


@given(st.lists(st.floats(1, 5), min_size=1, max_size=6))
def test_the_mean_of_normalized_scores_is_the_normalized_mean(scores):
    turns = torch.tensor([scores], dtype=torch.float64)
    for normalization in ("minmax", "max"):
        mean = normalize_likert(turns, normalization=normalization).mean(dim=1)
        torch.testing.assert_close(mean, likert_average(turns, normalization=normalization))


@pytest.mark.parametrize("bad", [0.99, 5.01, NAN, 0, 6])
def test_what_is_no_likert_score_is_refused(bad):
    with pytest.raises(ValueError, match=r"^likert: expected scores in 1\.\.5, got"):
        normalize_likert(torch.tensor([3, bad]))
    with pytest.raises(ValueError, match=r"^normalization: expected one of"):
        normalize_likert(torch.tensor([3]), normalization="mean")
    with pytest.raises(TypeError, match=r"^likert: expected numbers or a torch.Tensor, got str"):
        normalize_likert("3")


@pytest.mark.parametrize("booleans", [[[True, True]], torch.ones(1, 2) > 0, [[5, True]]])
def test_booleans_are_no_likert_scores(booleans):
    for function in (likert_average, normalize_likert):
        with pytest.raises(TypeError, match=r"^likert: expected scores in 1\.\.5, got booleans"):
            function(booleans)
    with pytest.raises(TypeError, match=r"^l: expected scores in 1\.\.5, got booleans"):
        LIKERT.check("l", torch.ones(1, dtype=torch.bool))
    BINARY.check("b", torch.tensor([True, False]))


@pytest.mark.parametrize(
    "function",
    [binary_and, binary_average, likert_average, normalize_likert, turn_average, reward_to_go,
     stop_after_failure, instruction_following, marginal_success, conditional_success,
     content_consistency, lambda x: overall(x, x)],
)  # fmt: skip
def test_lists_of_floats_are_float64_and_of_integers_float32(function):
    dtypes = [function(x).dtype for x in ([[1.0]], [[1]], torch.ones(1, 1), np.ones((1, 1)))]
    assert dtypes == [torch.float64, torch.float32, torch.float32, torch.float64]


# pad_turns


def test_chains_are_any_sequences():
    padded = pad_turns((range(2), deque([5])))
    assert padded.score.nan_to_num(-9).tolist() == [[0, 1], [5, -9]]
    for sparse, name in (
        (torch.ones(1, 1).to_sparse(), "scores"),
        ([torch.ones(1).to_sparse()], r"scores\[0\]"),
    ):
        with pytest.raises(TypeError, match=rf"^{name}: expected a dense tensor, got layout "):
            pad_turns(sparse)


def test_padding_tells_lost_from_unmeasured_from_absent():
    padded = pad_turns([[1, None, 0.5], [math.nan, True], np.array([3], dtype=np.int32)])
    assert padded.score.dtype == torch.float32
    assert padded.score.nan_to_num(-9).tolist() == [[1, -9, 0.5], [-9, 1, -9], [3, -9, -9]]
    assert padded.turn_mask.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert padded.valid.tolist() == [
        [True, False, True],
        [False, True, False],
        [True, False, False],
    ]
    assert padded.lost.tolist() == [[False, True, False], [False] * 3, [False] * 3]
    assert turn_average(padded.score, turn_mask=padded.valid).tolist() == [0.75, 1.0, 3.0]


def test_numbers_of_every_kind_are_padded_exactly():
    rows = [
        [0.1],
        (torch.tensor(0.1, dtype=torch.float64),),
        torch.tensor([0.1]).double(),
        [np.float64(0.1)],
    ]
    padded = pad_turns(rows, dtype=torch.float64)
    assert padded.score.flatten().tolist() == [0.1, 0.1, float(torch.tensor(0.1)), 0.1]
    assert pad_turns([[2**40]], dtype=torch.float64).score.item() == 2**40
    assert pad_turns([[0.1]]).score.item() == torch.tensor(0.1).item()


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([], ValueError, r"^scores: expected at least one chain, got none$"),
        ([[1.0], []], ValueError, r"^scores\[1\]: expected at least one turn, got none$"),
        ([[1.0], 2.0], TypeError, r"^scores\[1\]: expected one list of scores, got float$"),
        ([["1"]], TypeError, r"^scores\[0\]\[0\]: expected a number, or None if lost, got str$"),
        ([[0.0, math.inf]], ValueError, r"^scores\[0\]\[1\]: expected a finite .*, got inf$"),
        ([[1e39]], ValueError, r"^scores\[0\]\[0\]: expected a finite torch.float32 number"),
        ([[2**24 + 1]], ValueError, r"^scores\[0\]\[0\]: expected an integer that torch.float32"),
    ],
)
def test_what_cannot_be_padded(scores, error, message):
    with pytest.raises(error, match=message):
        pad_turns(scores)
    with pytest.raises(TypeError, match=r"^dtype: expected torch.float32 or torch.float64, got"):
        pad_turns([[1.0]], dtype=torch.float16)


@pytest.mark.parametrize(
    "function", [binary_and, binary_average, turn_average, reward_to_go, stop_after_failure]
)
def test_turns_in_every_form(function):
    success, mask = [[1, 0, 1], [0, 1, 1]], [[True, True, False], [True, True, True]]
    expected = function(torch.tensor(success), turn_mask=torch.tensor(mask))
    assert torch.equal(function(success, turn_mask=mask), expected)
    assert torch.equal(function(np.array(success), turn_mask=np.array(mask)), expected)


def test_the_steps_of_a_broadcast_are_a_copy():
    for advantage, sizes in (
        (torch.ones(2), (2, 3)), (torch.ones(2, 2), (2, 3)), (torch.ones(2, 1), (1, 1))
    ):  # fmt: skip
        steps = broadcast_to_steps(advantage, turns=sizes[0], steps=sizes[1])
        steps[0, 0, 0] = 5.0
        assert (advantage == 1).all()
        assert steps.sum() == steps.numel() + 4
    assert broadcast_to_steps([2, 3], turns=1, steps=1).flatten().tolist() == [2.0, 3.0]


def test_padded_turns_name_what_was_unmeasured():
    padded = pad_turns([[1, None, NAN], [0.5]])
    assert padded.unmeasured.tolist() == [[False, False, True], [False, False, False]]
    states = torch.stack([padded.valid, padded.lost, padded.unmeasured]).sum(dim=0)
    assert torch.equal(states > 0, padded.turn_mask)
    assert states.max() == 1


def test_masked_arrays_are_refused_with_the_fix():
    row = np.ma.array([1.0, 2.0], mask=[False, True])
    for call, name in (
        (lambda: pad_turns([[1.0], row]), "scores"),
        (lambda: turn_average([row, row]), "score"),
        (lambda: reward_to_go(row[None]), "reward"),
    ):
        with pytest.raises(TypeError, match=rf"^{name}: .* masked array, .*np\.ma\.getmaskarray"):
            call()
