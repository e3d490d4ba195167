import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.pictures.chains import (
    ASKED,
    chain_of,
    corrupted,
    make_chains,
    no_change_chains,
    random_chain,
    random_scene,
)
from examples.pictures.drawing import draw
from examples.pictures.scene import KINDS, NO_CHANGE, WORDS, Scene, Thing, possible_edits
from tests.loops import some

seeds = st.integers(min_value=0, max_value=2**32)
splits = st.sampled_from(["train", "held_out"])
quick = settings(max_examples=15, deadline=None)


@quick
@given(seeds, st.integers(1, 20), splits)
def test_every_turn_of_a_chain_makes_sense_in_the_scene_that_it_finds(seed, turns, split):
    chain = random_chain(random.Random(seed), turns, split)
    assert len(chain.edits) == turns
    for edit, before in some(zip(chain.edits, chain.scenes, strict=False)):
        assert edit in set(possible_edits(before))
    assert {scene.split for scene in chain.scenes} == {split}


@quick
@given(seeds, st.integers(1, 20), splits)
def test_a_thing_of_the_first_scene_is_never_edited(seed, turns, split):
    chain = random_chain(random.Random(seed), turns, split)
    edited = {kind for edit in chain.edits for kind in edit.kinds}
    assert any(
        thing.kind not in edited and all(thing in scene.things for scene in some(chain.scenes))
        for thing in chain.initial.things
    )


@quick
@given(seeds)
def test_every_edit_changes_the_picture_and_leaves_names_unambiguous(seed):
    scene = random_scene(random.Random(seed))
    before = draw(scene).astype(int)
    for edit in some(possible_edits(scene)):
        kinds = [thing.kind for thing in edit.result.things]
        assert len(set(kinds)) == len(kinds) > 0
        places = [thing.place for thing in edit.result.things]
        assert len(set(places)) == len(places)
        changed = (abs(draw(edit.result) - before).max(axis=-1) > 20).sum()
        assert changed >= 12, edit.instruction


def test_all_nine_types_occur_and_a_turn_names_what_earlier_turns_made():
    chains = make_chains(40, turns=20, seed=1, split="held_out")
    counts = Counter(edit.task_type for chain in chains for edit in chain.edits)
    assert set(counts) == set(ASKED)
    assert min(counts.values()) > 20
    later = 0
    for chain in chains:
        first = {thing.name for thing in chain.initial.things}
        for edit, before in zip(chain.edits, chain.scenes, strict=False):
            named = [thing.name for thing in before.things if thing.name in edit.instruction]
            later += any(name not in first for name in named)
    assert later > 200


def test_instructions_are_short_and_of_known_words():
    chains = make_chains(60, turns=9, seed=3, split="train")
    for chain in some(chains):
        for instruction in some(chain.instructions):
            words = instruction.split()
            assert len(words) <= 8
            assert set(words) <= set(WORDS)


def test_equal_seeds_draw_equal_chains_and_splits_share_no_scene():
    chains = make_chains(30, turns=3, seed=5, split="train")
    assert chains == make_chains(30, turns=3, seed=5, split="train")
    assert chains != make_chains(30, turns=3, seed=6, split="train")
    held_out = make_chains(30, turns=3, seed=5, split="held_out")
    seen = {scene for chain in chains for scene in chain.scenes}
    assert not seen & {scene for chain in held_out for scene in chain.scenes}


def test_a_chain_is_read_back_from_its_first_scene_and_its_instructions():
    for chain in some(make_chains(10, turns=6, seed=2, split="train")):
        initial = Scene.from_record(chain.initial.to_record())
        assert chain_of(initial, chain.instructions) == chain


def test_no_change_leaves_the_scene():
    for chain in some(no_change_chains(3, turns=20, seed=0, split="held_out")):
        assert set(chain.scenes) == {chain.initial}
        assert chain.instructions == (NO_CHANGE,) * 20
        assert chain_of(chain.initial, chain.instructions) == chain


def test_what_makes_no_sense_is_refused():
    scene = Scene("meadow", "", (Thing("house", "red", "plain", "one", "back left"),))
    with pytest.raises(ValueError, match=r"instructions: expected .*, got 'Remove the blue car'"):
        chain_of(scene, ("Remove the blue car",))
    with pytest.raises(ValueError, match="expected background, text and things"):
        Scene.from_record({"background": "meadow"})
    with pytest.raises(ValueError, match="expected a thing of this world"):
        Scene.from_record({"background": "meadow", "text": "", "things": [["cat"] * 5]})
    with pytest.raises(ValueError, match="turns: expected at least 1, got 0"):
        random_chain(random.Random(0), 0, "train")


def test_a_careless_editor_ignores_or_mistakes_the_instruction():
    rng = random.Random(0)
    ignored, other = 0, 0
    for chain in some(make_chains(400, turns=1, seed=4, split="train")):
        result = corrupted(rng, chain.initial, chain.edits[0])
        assert result != chain.edits[0].result
        assert result.split == "train"
        ignored += result == chain.initial
        other += result in {edit.result for edit in possible_edits(chain.initial)}
    assert ignored + other == 400
    assert 130 < ignored < 230


def test_plurals_are_named_where_there_are_two():
    thing = Thing("mushroom", "blue", "plain", "two", "back left")
    assert thing.name == "blue mushrooms"
    scene = Scene("snow", "", (thing,))
    instructions = {edit.instruction for edit in possible_edits(scene)}
    assert "Paint the blue mushrooms red" in instructions
    assert "Change the number of blue mushrooms to one" in instructions
    assert "Replace the blue mushrooms with houses" in instructions
    assert "Add an orange house at front left" in instructions
    assert not any("Remove" in instruction for instruction in some(instructions))
    assert len(KINDS) == len(set(KINDS.values()))
