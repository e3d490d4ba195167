"""The rules of the object pool: golden, by properties, and against a simulator of the text."""

import re
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from mteditflow.chains import Chain
from mteditflow.planner import (
    EDITS,
    BackgroundChange,
    ColorAlter,
    CountChange,
    EditError,
    ListedObject,
    MaterialAlter,
    Pool,
    PositionChange,
    SubjectAdd,
    SubjectRemove,
    SubjectReplace,
    TextChange,
    chain_fields,
)
from mteditflow.rewards import ConsistencyScorer, pairs_of
from tests.loops import some
from tests.planner.simulator import check_record

CAR = ListedObject(name="red car", color="red", count=1)
DOG = ListedObject(name="dog")
SIGN = ListedObject(name="wooden sign", material="wooden", text="Open", count=2)
HILL = ListedObject(name="hill", color="green", foreground=False)


def exactly(message):
    return f"^{re.escape(message)}$"


def street():
    return Pool.of([CAR, DOG, SIGN, HILL])


def pools(start, *edits):
    result = [start]
    for edit in edits:
        result.append(result[-1].apply(edit))
    return result


# golden


def test_added_text_is_among_all_objects_and_nothing_else():
    """As in EdiVal-Bench: the name "text", once, from that turn on; no object of the pool."""
    start = Pool.of([DOG, CAR])
    adds = (TextChange(new="SALE"), SubjectRemove(target="dog"), TextChange(new="NOW"))
    fields = chain_fields(pools(start, *adds))
    assert fields["all_objects"] == (("dog", "red car", "text"),) * 3
    assert fields["available_objects"] == (("dog", "red car"), ("red car",), ("red car",))
    assert fields["unchanged_objects"] == fields["available_objects"]
    assert fields["turn_unchanged_objects"] == fields["available_objects"]
    of_its_own = Pool.of([ListedObject(name="Text"), DOG]).apply(TextChange(new="SALE"))
    assert of_its_own.names == ("Text", "dog")
    with pytest.raises(EditError, match="that the chain has not used, got 'text'"):
        start.apply(adds[0]).apply(SubjectAdd(name="text"))
    replaced = Pool.of([SIGN]).apply(TextChange(new="Shut", old="Open", target="wooden sign"))
    assert replaced.names == ("wooden sign",)


def test_consistency_of_a_right_added_text_is_that_of_doing_nothing():
    before = Image.new("RGB", (512, 512), (128, 128, 128))
    before.paste((200, 30, 30), (32, 32, 96, 96))
    after = before.copy()
    after.paste((255, 255, 255), (320, 320, 480, 384))

    def finds(images, names):  # a red car, and white text
        colors = {"red car": (200, 30, 30), "text": (255, 255, 255)}
        return [
            torch.cat([boxes_of(x, colors[name]) for name in own])
            for x, own in zip(images, names, strict=True)
        ]

    fields = chain_fields(pools(Pool.of([CAR]), TextChange(new="SALE")))
    chain = Chain(id="7", image="7.png", instructions=("Write SALE",), **fields)
    scores = [
        ConsistencyScorer(finds).score_pairs([before, made], pairs_of(chain))[0]
        for made in (after, before)
    ]
    assert [x.background_l1 for x in scores] == [1.0, 1.0]
    assert [x.object_l1 for x in scores] == [1.0, 1.0]


def boxes_of(pixels, color):
    """The box around all pixels of a color, if there are any."""
    same = (pixels == torch.tensor(color, dtype=torch.uint8)[:, None, None]).all(0)
    rows, columns = same.nonzero(as_tuple=True)
    corners = [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]] if len(rows) else []
    return torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)


def test_golden_chain():
    """Worked by hand from the rules of the specification."""
    fields = chain_fields(
        pools(
            street(),
            ColorAlter(target="red car", color="blue"),
            SubjectAdd(name="bench", position="left", reference="dog"),
            PositionChange(target="wooden sign", position="right", reference="bench"),
            BackgroundChange(background="beach", kept=("blue car", "dog", "wooden sign")),
            SubjectReplace(target="dog", name="cat"),
            SubjectRemove(target="blue car"),
        )
    )
    assert fields["available_objects"] == (
        ("blue car", "dog", "wooden sign", "hill"),
        ("blue car", "dog", "wooden sign", "hill", "bench"),
        ("blue car", "dog", "wooden sign", "hill", "bench"),
        ("blue car", "dog", "wooden sign"),
        ("blue car", "cat", "wooden sign"),
        ("cat", "wooden sign"),
    )
    assert fields["unchanged_objects"] == (
        ("dog", "wooden sign", "hill"),
        ("dog", "wooden sign", "hill"),
        ("dog", "hill"),
        ("dog",),
        (),
        (),
    )
    assert fields["turn_unchanged_objects"] == (
        ("dog", "wooden sign", "hill"),
        ("blue car", "dog", "wooden sign", "hill"),
        ("blue car", "dog", "hill"),
        ("blue car", "dog", "wooden sign"),
        ("blue car", "wooden sign"),
        ("cat", "wooden sign"),
    )
    names = ("red car", "dog", "wooden sign", "hill", "blue car")
    assert fields["all_objects"] == (
        names,
        (*names, "bench"),
        (*names, "bench"),
        (*names, "bench"),
        (*names, "bench", "cat"),
        (*names, "bench", "cat"),
    )
    assert fields["background_consistency"] == (True, True, True, False, False, False)
    assert fields["task_types"] == (
        "color_alter",
        "subject_add",
        "position_change",
        "background_change",
        "subject_replace",
        "subject_remove",
    )


@pytest.mark.parametrize(
    ("edit", "after"),
    [
        # the word stands in the name: substituted
        (ColorAlter(target="red car", color="blue"), {"name": "blue car", "color": "blue"}),
        (
            MaterialAlter(target="wooden sign", material="steel"),
            {"name": "steel sign", "material": "steel"},
        ),
        # it does not: prepended
        (ColorAlter(target="dog", color="white"), {"name": "white dog", "color": "white"}),
        (ColorAlter(target="hill", color="brown"), {"name": "brown hill", "color": "brown"}),
        (MaterialAlter(target="dog", material="stone"), {"name": "stone dog", "material": "stone"}),
        # the rest
        (CountChange(target="wooden sign", count=3), {"count": 3}),
        (TextChange(target="wooden sign", old="Open", new="Shut"), {"text": "Shut"}),
        (SubjectReplace(target="wooden sign", name="lamp"), {"name": "lamp"}),
        (PositionChange(target="dog", position="left", reference="hill"), {}),
    ],
)
def test_what_an_edit_changes_of_its_target(edit, after):
    before = {x.name: x for x in street().objects}[edit.target]
    changed = street().apply(edit).objects[street().available.index(edit.target)]
    assert changed.model_dump() == {**before.model_dump(), **after, "edited": True}


def test_a_whole_word_is_substituted_and_case_does_not_matter():
    pool = Pool.of([ListedObject(name="Red bored cat", color="red")])
    assert pool.apply(ColorAlter(target="Red bored cat", color="blue")).available == (
        "blue bored cat",
    )
    # a word that only ends in it, or a replacement with a backslash, are taken as they stand
    pool = Pool.of([ListedObject(name="bored cat", color="red")])
    assert pool.apply(ColorAlter(target="bored cat", color=r"\1")).available == (r"\1 bored cat",)


def test_text_on_the_image_changes_no_object():
    pool = street().apply(TextChange(new="Hello"))
    assert pool.objects == street().objects
    assert pool.unchanged == street().available


def test_an_added_object_does_not_count_as_unchanged_nor_outlast_the_background():
    pool = street().apply(SubjectAdd(name="bench"))
    assert "bench" not in pool.unchanged
    assert "bench" not in pool.lasting
    assert "bench" in pool.apply(SubjectRemove(target="dog")).available


def test_what_stands_in_the_place_of_an_original_outlasts_the_background():
    pool = street().apply(SubjectReplace(target="dog", name="cat"))
    assert pool.lasting == ("red car", "cat", "wooden sign")


# what makes no sense


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (SubjectRemove(target="cat"), "expected one of ['red car', 'dog', 'wooden sign', 'hill']"),
        (SubjectRemove(target="Dog"), "expected one of ['red car', 'dog', 'wooden sign', 'hill']"),
        (
            SubjectAdd(name="cat", position="left", reference="cow"),
            "expected one of ['red car', 'dog', 'wooden sign', 'hill'], got 'cow'",
        ),
        (
            PositionChange(target="dog", position="left", reference="cow"),
            "expected one of ['red car', 'dog', 'wooden sign', 'hill'], got 'cow'",
        ),
        (SubjectAdd(name="DOG"), "that the chain has not used, got 'DOG'"),
        (SubjectReplace(target="red car", name="dog"), "that the chain has not used, got 'dog'"),
        (CountChange(target="red car", count=1), "red car: expected another count than 1"),
        (ColorAlter(target="red car", color="Red"), "red car: expected another color than 'red'"),
        (
            MaterialAlter(target="wooden sign", material="wooden"),
            "wooden sign: expected another material than 'wooden'",
        ),
        (
            TextChange(target="wooden sign", old="Shut", new="Sale"),
            "wooden sign: expected the old text 'Open', got 'Shut'",
        ),
        (
            TextChange(target="dog", old="Shut", new="Sale"),
            "dog: expected the old text None, got 'Shut'",
        ),
        (
            BackgroundChange(background="beach", kept=("dog",)),
            "expected kept to be ['red car', 'dog', 'wooden sign'], got ['dog']",
        ),
        (
            MaterialAlter(target="wooden sign", material="s" * 80),
            "expected a name of up to 80 characters",
        ),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused(edit, message):
    with pytest.raises(EditError, match=re.escape(message)):
        street().apply(edit)


def test_a_known_colour_is_told_whatever_its_case():
    pool = Pool.of([ListedObject(name="dog", color="White")])
    with pytest.raises(EditError, match=exactly("dog: expected another color than 'White'")):
        pool.apply(ColorAlter(target="dog", color="white"))


def test_a_colour_that_the_name_already_says_is_refused():
    pool = Pool.of([ListedObject(name="red car")])
    with pytest.raises(EditError, match=exactly("red car: its name already contains 'red'")):
        pool.apply(ColorAlter(target="red car", color="red"))


def test_a_name_is_never_used_twice_in_a_chain():
    pool = street().apply(SubjectRemove(target="dog"))
    with pytest.raises(EditError, match="that the chain has not used, got 'dog'"):
        pool.apply(SubjectAdd(name="dog"))
    pool = Pool.of([CAR, ListedObject(name="blue car")])
    with pytest.raises(EditError, match="that the chain has not used, got 'blue car'"):
        pool.apply(ColorAlter(target="red car", color="blue"))


def test_obstacles():
    one, hill = Pool.of([DOG]), Pool.of([HILL])
    assert one.obstacle("subject_remove") == "subject_remove needs 2 objects, there are 1"
    assert one.obstacle("position_change") == "position_change needs 2 objects, there are 1"
    assert hill.obstacle("background_change") == (
        "background_change needs an original object in the foreground"
    )
    again = one.apply(BackgroundChange(background="beach", kept=("dog",)))
    assert again.obstacle("background_change") == "background_change has only just been made"
    assert again.apply(TextChange(new="A")).obstacle("background_change") is None
    empty = Pool.of([])
    possible = [task for task in EDITS if empty.obstacle(task) is None]
    assert possible == ["subject_add", "text_change"]
    assert all(street().obstacle(task) is None for task in some(EDITS))
    with pytest.raises(EditError, match=exactly("subject_remove needs 2 objects, there are 1")):
        one.apply(SubjectRemove(target="dog"))


def test_the_names_of_an_image_must_differ():
    message = "objects: expected unique names, got 'DOG' twice"
    with pytest.raises(ValueError, match=exactly(message)):
        Pool.of([DOG, CAR, ListedObject(name="DOG")])


# properties

WORDS = st.sampled_from(["cat", "dog", "cup", "car", "hill", "sign", "bus", "tree", "boy", "hat"])
COLORS = st.sampled_from(["red", "blue", "dark red", "Green"])
MATERIALS = st.sampled_from(["wood", "steel", "glass", "red brick"])
TEXTS = st.sampled_from(["Open", "Shut", "It's 5 o'clock"])
POSITIONS = st.sampled_from(["left", "right", "above", "below"])
COUNTS = st.integers(1, 5)


@st.composite
def listings(draw):
    """Objects of an image: some of their names say their color or material."""
    objects = {}
    for _ in range(draw(st.integers(1, 6))):
        color, material = draw(st.none() | COLORS), draw(st.none() | MATERIALS)
        words = [word for word in (color, material) if word and draw(st.booleans())]
        name = " ".join([*words, draw(WORDS)])
        text, count = draw(st.none() | TEXTS), draw(st.none() | COUNTS)
        objects[name.casefold()] = ListedObject(
            name=name,
            color=color,
            material=material,
            text=text,
            count=count,
            foreground=draw(st.booleans()),
        )
    return list(objects.values())


def an_edit(draw, pool, task):
    """Return an edit whose slots are mostly sensible."""
    there = st.sampled_from(pool.available)
    target = draw(there)
    text = {x.name: x.text for x in pool.objects}[target]
    kinds = {
        "subject_add": lambda: (
            SubjectAdd(name=draw(WORDS))
            if draw(st.booleans())
            else SubjectAdd(name=draw(WORDS), position=draw(POSITIONS), reference=target)
        ),
        "subject_remove": lambda: SubjectRemove(target=target),
        "subject_replace": lambda: SubjectReplace(target=target, name=draw(WORDS)),
        "position_change": lambda: PositionChange(
            target=target, position=draw(POSITIONS), reference=draw(there)
        ),
        "count_change": lambda: CountChange(target=target, count=draw(COUNTS)),
        "color_alter": lambda: ColorAlter(target=target, color=draw(COLORS)),
        "material_alter": lambda: MaterialAlter(target=target, material=draw(MATERIALS)),
        "text_change": lambda: (
            TextChange(target=target, old=text, new=draw(TEXTS))
            if text
            else TextChange(new=draw(TEXTS))
        ),
        "background_change": lambda: BackgroundChange(background="a beach", kept=pool.lasting),
    }
    return kinds[task]()


@st.composite
def chains(draw):
    """A listing and the pools of a chain of up to 8 edits; what makes no sense is left out."""
    listed = draw(listings())
    result = [Pool.of(listed)]
    for task in draw(st.lists(st.sampled_from(tuple(EDITS)), min_size=1, max_size=12)):
        with suppress(ValueError):  # of the edit alone, or of the edit in this pool
            result.append(result[-1].apply(an_edit(draw, result[-1], task)))
    return listed, result


@given(chains())
def test_a_chain_makes_sense_at_every_turn(chain):
    _, steps = chain
    assume(len(steps) > 1)
    for before, after in some(pairwise(steps)):
        edit = after.edits[-1]
        named = {*edit.touched, getattr(edit, "reference", None)} - {None}
        assert named <= set(before.available)
        assert len({name.casefold() for name in after.names}) == len(after.names)
        assert set(after.available) | set(before.names) <= set(after.names)
        assert set(after.unchanged) <= set(before.unchanged) & set(after.available)
        assert set(after.unchanged) <= set(
            chain_fields([before, after])["turn_unchanged_objects"][0]
        )
        assert after.objects  # there is always something left to edit
        new = set(after.available) - set(before.available)
        gone = set(before.available) - set(after.available)
        assert new.isdisjoint(before.names)
        if edit.task == "subject_remove":
            assert (new, gone) == (set(), {edit.target})
        elif edit.task == "background_change":
            assert all(x.original and x.foreground for x in some(after.objects))
            assert not new
        elif edit.task == "subject_add":
            assert (new, gone) == ({edit.name}, set())
            assert after.unchanged == before.unchanged
        elif edit.task in ("subject_replace", "color_alter", "material_alter"):
            assert len(new) == 1
            assert gone == {edit.target}
        else:
            assert after.available == before.available


@given(chains())
def test_unchanged_objects_are_originals_that_nothing_touched(chain):
    listed, steps = chain
    originals = {x.name for x in listed}
    for pool in some(steps):
        touched = {name for edit in pool.edits for name in edit.touched}
        assert set(pool.unchanged) == (originals - touched) & set(pool.available)
        assert not pool.unchanged or set(pool.unchanged) <= originals


# against a simulator that reads the text alone


@given(chains())
def test_the_records_are_those_of_the_simulator(chain):
    listed, steps = chain
    assume(len(steps) > 1)
    check_record([x.model_dump() for x in listed], chain_fields(steps))


@given(chains())
def test_the_fields_make_a_chain(chain):
    _, steps = chain
    turns = len(steps) - 1
    if turns:
        record = Chain(id="1", image="1.png", instructions=("do",) * turns, **chain_fields(steps))
        assert Chain.model_validate_json(record.to_json()) == record
