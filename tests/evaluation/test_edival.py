"""EdiVal-Bench: the rule of each edit type, and which way was taken."""

import math
from functools import partial

import anyio
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mteditflow_examples.shapes.vision import RuleDetector, to_pil
from mteditflow_examples.shapes.world import draw, make_chains

from mteditflow.chains import Chain, read_chains, write_chains
from mteditflow.evaluation.benchmarks import EdiValJudge
from mteditflow.evaluation.benchmarks.edival import RULES, Find, lies, statement, yes_or_no
from mteditflow.planner import parse_formatted
from mteditflow.rewards import (
    AnswerError,
    ChatAnswer,
    ChatClient,
    Fault,
)
from mteditflow.testing.endpoint import ScriptedServer, completion, error
from tests.evaluation.formatted_worlds import FORMS, world_chain
from tests.evaluation.judged_items import picture, text_of, values_of


def boxes(*centres):
    """Boxes of 2 x 2 around these centres."""
    return torch.tensor([[x - 1.0, y - 1.0, x + 1.0, y + 1.0] for x, y in centres]).view(-1, 4)


def told(instruction, before, after):
    """What the rule of an instruction says, where names are found at these centres."""
    edit = parse_formatted(instruction)
    sides = [lambda name, seen=seen: boxes(*seen.get(name, ())) for seen in (before, after)]
    return RULES[type(edit)](edit, Find(*sides))


HERE, LEFT, UP = (50, 50), (20, 50), (50, 20)


@pytest.mark.parametrize(
    ("instruction", "before", "after", "expected"),
    [
        ("Add [cup]", {}, {"cup": [HERE]}, True),
        ("Add [cup]", {"cup": [HERE]}, {"cup": [HERE]}, False),
        ("Add [cup]", {"cup": [HERE]}, {"cup": [HERE, LEFT]}, True),
        ("Add [cup]", {}, {}, False),
        ("Add [cup] on the [left] of [dog]", {}, {"cup": [LEFT], "dog": [HERE]}, True),
        ("Add [cup] on the [right] of [dog]", {}, {"cup": [LEFT], "dog": [HERE]}, False),
        ("Add [cup] on the [left] of [dog]", {}, {"cup": [LEFT]}, False),
        ("Remove [cup]", {"cup": [HERE]}, {}, True),
        ("Remove [cup]", {"cup": [HERE, LEFT]}, {"cup": [HERE]}, False),
        ("Remove [cup]", {}, {}, None),
        ("Replace [cup] with [dog]", {"cup": [HERE]}, {"dog": [HERE]}, True),
        ("Replace [cup] with [dog]", {"cup": [HERE]}, {"dog": [HERE], "cup": [LEFT]}, False),
        ("Replace [cup] with [dog]", {"cup": [HERE]}, {}, False),
        ("Replace [cup] with [dog]", {}, {"dog": [HERE]}, None),
        ("Replace [dog] with [Black Dog]", {"dog": [HERE]}, {"Black Dog": [HERE]}, None),
        ("Change the count of [cup] to [2]", {}, {"cup": [HERE, LEFT]}, True),
        ("Change the count of [cup] to [2]", {}, {"cup": [HERE, LEFT, UP]}, False),
        (
            "Change the position of [cup] to [above] of [dog]",
            {},
            {"cup": [UP], "dog": [HERE]},
            True,
        ),
        (
            "Change the position of [cup] to [below] of [dog]",
            {},
            {"cup": [UP], "dog": [HERE]},
            False,
        ),
        ("Change the position of [cup] to [below] of [dog]", {}, {"cup": [UP]}, False),
    ],
)
def test_rules(instruction, before, after, expected):
    assert told(instruction, before, after) is expected


@given(st.tuples(*[st.integers(0, 99)] * 4))
def test_opposite_sides_exclude_each_other(centres):
    one, other = boxes(centres[:2]), boxes(centres[2:])
    for side, opposite in (("left", "right"), ("above", "below")):
        assert lies(one, side, other) == lies(other, opposite, one)
        assert not (lies(one, side, other) and lies(one, opposite, other))
    assert not lies(one, "left", one)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (
            "Change the color of [red car] to [blue]",
            "What was the red car before an edit now has the color blue.",
        ),
        (
            "Change the material of [car] to [wood]",
            "What was the car before an edit is now made of wood.",
        ),
        ("Add text '[Hi]' on the image", "The text 'Hi' can be read on the image."),
        ("Replace the text '[A]' on [sign] with '[B]'", "The text on the sign reads 'B', not 'A'."),
        (
            "Change the background to [beach], remain the [dog] unchanged",
            "The background of the image is beach.",
        ),
        ("Remove [cup]", None),
    ],
)
def test_statements(instruction, expected):
    edit = parse_formatted(instruction)
    assert statement(edit) == expected
    assert (expected is None) == (type(edit) in RULES)


def test_a_yes_or_no_question_is_about_one_image_and_strict():
    request = yes_or_no("The cup is red.", "data:after")
    assert [x["image_url"]["url"] for x in request.content if x["type"] == "image_url"] == [
        "data:after"
    ]
    assert request.read(ChatAnswer(text='{"scores": [1]}')) == (1,)
    for wrong in ('{"scores": [2]}', '{"scores": [1, 0]}', "yes"):
        with pytest.raises(AnswerError):
            request.read(ChatAnswer(text=wrong))


def red_detector(images, names):
    """A picture's red says what is in it: 10 a cup on the left of a dog, 20 a dog alone."""
    held = {10: {"cup": [LEFT], "dog": [HERE]}, 20: {"dog": [HERE]}}
    return [
        boxes(*held.get(int(image[0, 0, 0]), {}).get(name, ()))
        for image, (name,) in zip(images, names, strict=True)
    ]


def chain(*pairs, name="7", **fields):
    """A chain of (edit type, formatted instruction)."""
    return Chain(
        id=name,
        image=f"{name}_input_raw.jpg",
        instructions=[f"Please: {formatted}" for _, formatted in pairs],
        task_types=[kind for kind, _ in pairs],
        formatted_instructions=[formatted for _, formatted in pairs],
        **fields,
    )


THREE = chain(
    ("subject_remove", "Remove [cup]"),
    ("color_alter", "Change the color of [dog] to [red]"),
    ("subject_remove", "Remove [cup]"),
)
IMAGES = [picture(10), picture(20), picture(21), picture(22)]


def yes(request):
    return completion('{"scores": [1]}')


def check(server, chains, images, detector=red_detector, **options):
    judge = EdiValJudge(ChatClient([server.url], "m", **options), detector)
    return anyio.run(partial(judge.score, chains, images))


def test_each_turn_goes_its_way_and_the_report_says_which():
    with ScriptedServer(yes) as server:
        found = check(
            server, [THREE, chain(("subject_add", "Add [dog]"), name="8")], [IMAGES, IMAGES[:2]]
        )
    assert found.ways == (
        ("detector", "yes/no question", "single question"),
        ("detector",),
    )
    assert found.scores.score[0].tolist() == [1, 1, 1]
    assert found.scores.score[1, 0] == 0  # the dog was there before
    asked = sorted((values_of(x.json), text_of(x.json)) for x in server.requests)
    assert [shown for shown, _ in asked] == [[21], [21, 22]]
    assert "What was the dog before an edit now has the color red." in asked[0][1]
    assert "Please: Remove [cup]" in asked[1][1]


def test_without_a_detector_or_a_form_the_single_question_is_asked():
    bare = Chain(id="1", image="1.jpg", instructions=("Make it nice",))
    odd = chain(("subject_add", "Put a cup there"), name="2")
    with ScriptedServer(yes) as server:
        found = check(server, [bare, odd, THREE], [IMAGES[:2], IMAGES[:2], IMAGES], detector=None)
    assert found.ways == (
        ("single question",),
        ("single question",),
        ("single question", "yes/no question", "single question"),
    )


def test_a_lost_answer_is_no_failure():
    with ScriptedServer(yes, [error(400)]) as server:
        found = check(server, [THREE], [IMAGES], attempts=1, concurrency=1)
    scores = found.scores
    assert len(scores.lost) == 1
    ((_, turn),) = scores.lost
    assert math.isnan(scores.score[0, turn])
    assert scores.lost[0, turn].fault is Fault.rejected
    assert scores.score[0, 0] == 1


def test_images_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"images\[0\]: expected .* of 3 turns, got 2 images"):
        anyio.run(
            EdiValJudge(ChatClient(["http://127.0.0.1:9/v1"], "m")).score, [THREE], [IMAGES[:2]]
        )


def test_in_the_shapes_world_a_perfect_editor_succeeds_and_an_idle_one_never_does():
    worlds = make_chains(24, turns=3, seed=5, split="train")
    chains = [world_chain(world) for world in worlds]
    perfect = [[to_pil(draw(state)) for state in world.states] for world in worlds]
    idle = [[images[n]] * 2 for images in perfect for n in range(3)]
    with ScriptedServer(yes) as server:
        done = check(server, chains, perfect, RuleDetector())
        single = [one_turn(chain, n) for chain in chains for n in range(3)]
        nothing = check(server, single, idle, RuleDetector())
    detected = torch.tensor([[way == "detector" for way in own] for own in done.ways])
    kinds = [kind for chain in chains for kind in chain.task_types]
    assert set(FORMS) == {kind for kind, by in zip(kinds, detected.flatten(), strict=True) if by}
    assert bool((done.scores.score[detected] == 1).all())
    assert bool((nothing.scores.score[detected.reshape(-1, 1)] == 0).all())


def one_turn(chain, n):
    return Chain(
        id=f"{chain.id}-{n}",
        image=chain.image,
        instructions=chain.instructions[n : n + 1],
        formatted_instructions=chain.formatted_instructions[n : n + 1],
    )


def test_chains_of_the_csv_can_be_checked(tmp_path):
    full = chain(
        ("subject_remove", "Remove [cup]"),
        unchanged_objects=[["dog"]],
        available_objects=[["dog"]],
        all_objects=[["cup", "dog"]],
        background_consistency=[True],
    )
    write_chains([full], tmp_path / "edival.csv", format="edival")
    (read,) = read_chains(tmp_path / "edival.csv").chains
    with ScriptedServer(yes) as server:
        found = check(server, [read], [IMAGES[:2]])
    assert found.ways == (("detector",),)
    assert not server.requests
