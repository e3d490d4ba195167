"""Pairs of a chain under both pairings, and scores laid out over chains."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mteditflow.chains import Chain
from mteditflow.rewards import ConsistencyScores, Fault, Lost, Pair, PairScores, pairs_of
from tests.loops import some

N = 3
CHAIN = Chain(
    id="7",
    image="7.png",
    instructions=["Remove the cat", "Change the background to a beach", "Paint the dog red"],
    task_types=["subject_remove", "background_change", "color_alter"],
    unchanged_objects=[("dog", "tree"), ("dog", "tree"), ("tree",)],
    turn_unchanged_objects=[("dog", "tree"), ("dog", "tree", "hat"), ("tree", "hat")],
    all_objects=[("cat", "dog", "tree"), ("cat", "dog", "tree"), ("cat", "dog", "red dog", "tree")],
    background_consistency=[True, False, False],
)


def without(*names):
    return CHAIN.model_copy(update=dict.fromkeys(names))


def backgrounds(chain, pairing="reference"):
    return [pair.background for pair in pairs_of(chain, pairing=pairing)]


def test_reference_pairs_the_first_image_with_each_turn():
    pairs = pairs_of(CHAIN)
    assert [(pair.source, pair.edited) for pair in pairs] == [(0, 1), (0, 2), (0, 3)]
    assert [pair.unchanged_objects for pair in pairs] == list(CHAIN.unchanged_objects)
    assert [pair.all_objects for pair in pairs] == list(CHAIN.all_objects)
    assert backgrounds(CHAIN) == [True, False, False], "changed at one turn, and so ever after"


def test_consecutive_pairs_each_turn_with_the_one_before():
    pairs = pairs_of(CHAIN, pairing="consecutive")
    assert [(pair.source, pair.edited) for pair in pairs] == [(0, 1), (1, 2), (2, 3)]
    assert [pair.unchanged_objects for pair in pairs] == list(CHAIN.turn_unchanged_objects)
    assert [pair.all_objects for pair in pairs] == list(CHAIN.all_objects)
    assert backgrounds(CHAIN, "consecutive") == [True, False, True], "changed at that turn alone"


def test_consecutive_falls_back_on_what_no_turn_edited():
    pairs = pairs_of(without("turn_unchanged_objects"), pairing="consecutive")
    assert [pair.unchanged_objects for pair in pairs] == list(CHAIN.unchanged_objects)


def test_background_is_told_by_either_field():
    for pairing in ("reference", "consecutive"):
        expected = backgrounds(CHAIN, pairing)
        assert backgrounds(without("task_types"), pairing) == expected
        assert backgrounds(without("background_consistency"), pairing) == expected


@pytest.mark.parametrize("pairing", ["reference", "consecutive"])
def test_a_field_that_is_not_known_leaves_its_term_out(pairing):
    """An unknown one is not an empty one: the other terms stay as they were."""
    full = pairs_of(CHAIN, pairing=pairing)
    no_objects = without("unchanged_objects", "turn_unchanged_objects")
    for pair, known in some(zip(pairs_of(no_objects, pairing=pairing), full, strict=True)):
        assert pair == known.model_copy(update={"unchanged_objects": ()})
    for pair, known in some(
        zip(pairs_of(without("all_objects"), pairing=pairing), full, strict=True)
    ):
        assert pair == known.model_copy(update={"all_objects": ()})
    no_background = without("task_types", "background_consistency")
    for pair, known in some(zip(pairs_of(no_background, pairing=pairing), full, strict=True)):
        assert pair == known.model_copy(update={"all_objects": (), "background": True})


def test_a_chain_without_objects_is_refused():
    message = r"chain '7': expected unchanged_objects or all_objects.* plan the chain to find them"
    with pytest.raises(ValueError, match=message):
        pairs_of(without("unchanged_objects", "all_objects"))
    with pytest.raises(ValueError, match="pairing: expected one of"):
        pairs_of(CHAIN, pairing="previous")


@given(st.lists(st.sampled_from(["color_alter", "background_change"]), min_size=1, max_size=6))
def test_a_background_that_changes_again(types):
    """By task types each change counts; the reference's background never comes back."""
    chain = Chain(
        id="1", image="1.png", instructions=["x"] * len(types), task_types=types,
        all_objects=[("a",)] * len(types),
    )  # fmt: skip
    changes = [kind == "background_change" for kind in types]
    assert backgrounds(chain, "consecutive") == [not change for change in changes]
    assert backgrounds(chain) == [not any(changes[: n + 1]) for n in range(len(types))]


def test_messages_are_checked():
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Pair(source=-1, edited=0)
    with pytest.raises(ValidationError, match="Extra inputs"):
        Pair(source=0, edited=1, unchanged=("a",))
    for wrong in (float("nan"), float("inf"), 1.5, -1.5, "0.5", True):
        with pytest.raises(ValidationError):
            PairScores(object=wrong)
    with pytest.raises(ValidationError):
        PairScores(object_l1=-0.5)
    for message in (PairScores(object=-0.25), pairs_of(CHAIN)[0]):
        assert type(message).model_validate_json(message.model_dump_json()) == message


def test_scores_are_laid_out_and_averaged():
    """Mean of the terms that exist; NaN where none does; a lost chain is lost at each turn."""
    lost = Lost(Fault.timeout, "no answer", attempts=4)
    answers = [
        [
            PairScores(object=0.5, background=1.0, object_l1=0.25, background_l1=0.75),
            PairScores(object=-0.5, background_l1=0.5),
            PairScores(),
        ],
        lost,
        [PairScores(background=0.25)],
    ]
    found = ConsistencyScores.collect(answers, [3, 2, 1])
    nan = torch.nan
    expected = torch.tensor([[0.75, -0.5, nan], [nan, nan, nan], [0.25, nan, nan]])
    torch.testing.assert_close(found.scores.score, expected, equal_nan=True)
    expected = torch.tensor([[0.5, 0.5, nan], [nan, nan, nan], [nan, nan, nan]])
    torch.testing.assert_close(found.l1_scores.score, expected, equal_nan=True)
    assert found.turn_mask.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert found.lost == {(1, 0): lost, (1, 1): lost}
    assert found.scores.valid.tolist() == [True, False, True]
    assert found.scores.reasons == {"time-out": 2}
    assert found.scores.unmeasured.nonzero().tolist() == [[0, 2]]


def test_answers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"answers\[0\]: expected 2 pairs, got 1"):
        ConsistencyScores.collect([[PairScores()]], [2])
    with pytest.raises(ValueError, match="got 1 answers for 2 chains"):
        ConsistencyScores.collect([[PairScores()]], [1, 1])
    with pytest.raises(ValueError, match="got 0 answers for 0 chains"):
        ConsistencyScores.collect([], [])
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"turn_mask: expected shape \[B, N\]"):
        ConsistencyScores(good, good, good, good[:, :2], good == 0, {})
    with pytest.raises(TypeError, match="object_l1: expected float32 or float64"):
        ConsistencyScores(good, good, good.int(), good, good == 0, {})


def test_joined_batches_are_laid_out_as_if_collected_at_once():
    dead = Lost(Fault.timeout, "no answer within 1 s", 2)
    answers = [[PairScores(object=0.5)], dead, [PairScores(background=n / 4) for n in range(3)]]
    turns = [1, 2, 3]
    whole = ConsistencyScores.collect(answers, turns)
    parts = [
        ConsistencyScores.collect(answers[part], turns[part]) for part in (slice(2), slice(2, 3))
    ]
    joined = ConsistencyScores.concatenate(parts)
    for name in ("object", "background", "object_l1", "background_l1", "turn_mask"):
        ours, expected = getattr(joined, name), getattr(whole, name)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert joined.lost == whole.lost
