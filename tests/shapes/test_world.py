import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.shapes.world import (
    COLORS,
    MATERIALS,
    PALETTE,
    SHAPES,
    TASK_TYPES,
    WORDS,
    Edit,
    Thing,
    corrupt,
    draw,
    draw_index,
    make_chains,
    possible_edits,
    random_chain,
    random_state,
    thing_mask,
)
from tests.loops import some

seeds = st.integers(min_value=0, max_value=2**32)
splits = st.sampled_from(["train", "held_out"])
quick = settings(max_examples=40, deadline=None)


def drawn(seed, turns, split):
    return random_chain(random.Random(seed), turns, split)


@quick
@given(seeds, st.integers(1, 9), splits)
def test_every_instruction_makes_sense_when_its_turn_comes(seed, turns, split):
    chain = drawn(seed, turns, split)
    assert len(chain.states) == turns + 1
    for edit, before, after in some(zip(chain.edits, chain.states, chain.states[1:], strict=False)):
        assert edit in possible_edits(before)
        assert (draw_index(before) != draw_index(after)).any()
        if edit.task_type == "subject_add":
            assert before.find(edit.shape) is None
            assert after.find(edit.shape).color == edit.color
        elif edit.shape:
            assert before.find(edit.shape).color == edit.color


@quick
@given(seeds, st.integers(1, 9), splits)
def test_states_stay_legal(seed, turns, split):
    for state in some(drawn(seed, turns, split).states):
        cells = [cell for thing in state.things for cell in thing.cells]
        shapes = [thing.shape for thing in state.things]
        assert len(cells) == len(set(cells)) <= 4
        colors = [thing.color for thing in state.things]
        assert len(shapes) == len(set(shapes)) >= 1
        assert len(colors) == len(set(colors))
        assert shapes == sorted(shapes, key=SHAPES.index)
        assert all(len(thing.cells) in (1, 2) for thing in some(state.things))


@quick
@given(seeds, st.integers(1, 9), splits)
def test_one_thing_is_never_edited(seed, turns, split):
    chain = drawn(seed, turns, split)
    named = {edit.shape for edit in chain.edits}
    assert any(all(thing in s.things for s in some(chain.states)) for thing in chain.initial.things
               if thing.shape not in named)  # fmt: skip


@quick
@given(seeds, st.integers(2, 8), splits)
def test_task_types_have_the_standard_names(seed, turns, split):
    chain = drawn(seed, turns, split)
    assert set(chain.task_types) <= set(TASK_TYPES)
    assert chain.instructions == [edit.instruction for edit in chain.edits]


def test_task_types_hardly_repeat_in_short_chains():
    chains = make_chains(300, turns=3, seed=0, split="train")
    assert sum(len(set(chain.task_types)) == 3 for chain in chains) > 290
    assert {kind for chain in chains for kind in chain.task_types} == set(TASK_TYPES)


@quick
@given(seeds)
def test_instructions_use_known_words_and_few(seed):
    for edit in some(possible_edits(random_state(random.Random(seed)))):
        words = edit.instruction.split()
        assert len(words) <= 8
        assert set(words) <= set(WORDS)


@quick
@given(seeds)
def test_different_states_look_different(seed):
    state = random_state(random.Random(seed))
    pictures = {draw_index(edit.apply(state)).tobytes() for edit in possible_edits(state)}
    states = {edit.apply(state) for edit in possible_edits(state)}
    assert len(pictures) == len(states)
    assert draw_index(state).tobytes() not in pictures


def test_shapes_and_materials_have_their_own_stencils():
    masks = {
        thing_mask(Thing(shape, "red", material, (0,))).tobytes()
        for shape, material in itertools.product(SHAPES, MATERIALS)
    }
    assert len(masks) == len(SHAPES) * len(MATERIALS)


def test_an_edit_that_makes_no_sense_is_refused():
    state = random_state(random.Random(0))
    absent = next(shape for shape in SHAPES if state.find(shape) is None)
    with pytest.raises(ValueError, match=r"edit: expected one possible in .*, got 'Remove the red"):
        Edit("subject_remove", "red", absent).apply(state)


def test_edits_do_what_they_say():
    state = random_state(random.Random(3))
    for edit in some(possible_edits(state)):
        after = edit.apply(state)
        if edit.task_type == "background_change":
            assert after.background == edit.value
            assert after.things == state.things
            continue
        others = {thing for thing in state.things if thing.shape != edit.shape}
        assert others <= set(after.things)
        assert after.background == state.background
        name = edit.value if edit.task_type == "subject_replace" else edit.shape
        thing = after.find(name)
        match edit.task_type:
            case "subject_remove":
                assert thing is None
            case "color_alter":
                assert thing.color == edit.value
            case "material_alter":
                assert thing.material == edit.value
            case "count_change":
                assert len(thing.cells) == {"one": 1, "two": 2}[edit.value]
            case "subject_replace":
                old = state.find(edit.shape)
                assert (thing.color, thing.cells) == (old.color, old.cells)


@pytest.mark.parametrize("turns", [1, 3, 5])
def test_splits_share_no_picture_and_no_chain(turns):
    """By construction: the split is a hash of the picture, and a chain never leaves its split."""
    held_out = make_chains(200, turns=turns, seed=0, split="held_out")
    train = make_chains(600, turns=turns, seed=0, split="train")
    assert all(
        state.split == "held_out" for chain in some(held_out) for state in some(chain.states)
    )
    assert all(state.split == "train" for chain in some(train) for state in some(chain.states))
    pictures = [
        {draw_index(state).tobytes() for chain in chains for state in chain.states}
        for chains in (held_out, train)
    ]
    assert not pictures[0] & pictures[1]
    assert not set(held_out) & set(train)


def test_corrupted_targets_stay_in_the_training_split():
    rng = random.Random(0)
    kinds = set()
    for chain in some(make_chains(150, turns=3, seed=1, split="train")):
        for edit, state, wanted in some(
            zip(chain.edits, chain.states, chain.states[1:], strict=False)
        ):
            careless = corrupt(rng, state, edit)
            assert careless.split == "train"
            assert careless != wanted
            kinds.add("ignored" if careless == state else "changed")
    assert kinds == {"ignored", "changed"}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_equal_seeds_give_equal_chains(split):
    chains = make_chains(20, turns=3, seed=5, split=split)
    assert chains == make_chains(20, turns=3, seed=5, split=split)
    assert chains != make_chains(20, turns=3, seed=6, split=split)
    assert len(set(chains)) == 20


def test_turns_must_be_positive():
    with pytest.raises(ValueError, match="turns: expected at least 1, got 0"):
        random_chain(random.Random(0), 0, "train")


def test_pictures_are_colours_of_the_palette():
    picture = draw(random_state(random.Random(0)))
    assert picture.shape == (3, 12, 12)
    assert picture.dtype == torch.float32
    exactly = "donot_use_mm_for_euclid_dist"  # matrix products round at 1e-4
    distance = torch.cdist(picture.reshape(3, -1).T, PALETTE, compute_mode=exactly)
    assert distance.min(dim=1).values.max() < 1e-6
    assert len(COLORS) == 6
