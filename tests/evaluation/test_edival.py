"""EdiVal-Bench: questions, ways, lost answers; the rules are in ``test_edival_scenes``."""

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
from mteditflow.evaluation.benchmarks.boxes import lies
from mteditflow.evaluation.benchmarks.edival_questions import plain_name, transcription, yes_or_no
from mteditflow.rewards import (
    AnswerError,
    ChatAnswer,
    ChatClient,
    Fault,
)
from mteditflow.rewards.judge.wording import quote
from mteditflow.testing.endpoint import ScriptedServer, completion, error
from tests.evaluation.formatted_worlds import FORMS, world_chain
from tests.evaluation.judged_items import picture, text_of, values_of
from tests.loops import some

HERE, LEFT = (50, 50), (20, 50)


def boxes(*centers):
    """Boxes of 2 x 2 around these centers."""
    return torch.tensor([[x - 1.0, y - 1.0, x + 1.0, y + 1.0] for x, y in centers]).view(-1, 4)


points = st.tuples(*[st.integers(0, 99)] * 2).map(lambda x: torch.tensor([x], dtype=torch.float32))


@given(points, points, st.sampled_from([0.0, 3.0]))
def test_opposite_sides_exclude_each_other(one, other, margin):
    beside = partial(lies, margin=margin)
    for side, opposite in (("left", "right"), ("above", "below")):
        assert beside(one, side, other) == beside(other, opposite, one)
        assert not (beside(one, side, other) and beside(one, opposite, other))
    assert not beside(one, "left", one)


STATEMENT = "The background shows a <beach>."


@pytest.mark.parametrize("shown", [["data:after"], ["data:before", "data:after"]])
def test_a_yes_or_no_question_shows_its_images_and_is_strict(shown):
    question = yes_or_no(STATEMENT, shown)
    urls = [x["image_url"]["url"] for x in question.content if x["type"] == "image_url"]
    assert urls == shown
    assert quote(STATEMENT) in question.content[-1]["text"]
    assert question.read(ChatAnswer(text='{"scores": [1]}')) is True
    assert question.read(ChatAnswer(text='{"scores": [0]}')) is False
    for wrong in ('{"scores": [2]}', '{"scores": [1, 0]}', "yes"):
        with pytest.raises(AnswerError):
            question.read(ChatAnswer(text=wrong))


def test_a_transcription_may_be_empty_and_a_name_may_not():
    assert transcription("data:a").read(ChatAnswer(text='{"text": ""}')) == ""
    assert transcription("data:a").read(ChatAnswer(text='{"text": "A\\nB"}')) == "A\nB"
    assert plain_name("red cup").read(ChatAnswer(text='{"name": "cup"}')) == "cup"
    with pytest.raises(AnswerError, match=r"name: expected a word, got ' \.'"):
        plain_name("red cup").read(ChatAnswer(text='{"name": " ."}'))
    for wrong in ('{"text": "a", "b": 1}', '{"text": 4}', '["a"]', '{"name": "a"}'):
        with pytest.raises(AnswerError):
            transcription("data:a").read(ChatAnswer(text=wrong))


class RedDetector:
    """A picture's red says what is in it: 10 a cup on the left of a dog, 20 a dog alone."""

    def detect(self, images, names, *, threshold):
        held = {10: {"cup": [LEFT], "dog": [HERE]}, 20: {"dog": [HERE]}}
        found = [
            boxes(*held.get(int(image[0, 0, 0]), {}).get(name, ()))
            for image, (name,) in zip(images, names, strict=True)
        ]
        return [(own, torch.ones(len(own))) for own in found]


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


def check(server, chains, images, detector=None, reader=None, **options):
    client = ChatClient([server.url], "m", **options)
    judge = EdiValJudge(client, detector or RedDetector(), reader=reader)
    return anyio.run(partial(judge.score, chains, images))


def test_each_turn_goes_its_way_and_the_report_says_which():
    with ScriptedServer(yes) as server:
        found = check(
            server, [THREE, chain(("subject_add", "Add [cup]"), name="8")], [IMAGES, IMAGES[:2]]
        )
    assert found.ways == (("detector", "judge", "detector"), ("detector",))
    assert found.scores.score[0].tolist() == [1, 1, 0]  # no cup to remove in the third turn
    assert found.scores.score[1, 0] == 0  # no cup after
    ((shown, asked),) = [(values_of(x.json), text_of(x.json)) for x in server.requests]
    assert shown == [20, 21]
    assert "Change the color of [dog] to [red]" in asked


def test_without_a_form_the_single_question_is_asked():
    bare = Chain(id="1", image="1.jpg", instructions=("Make it nice",))
    odd = chain(("subject_add", "Put a cup there"), name="2")
    with ScriptedServer(yes) as server:
        found = check(server, [bare, odd], [IMAGES[:2], IMAGES[:2]])
    assert found.ways == (("single question",), ("single question",))
    assert found.scores.score.tolist() == [[1], [1]]
    assert all(
        "Please:" in text_of(x.json) or "nice" in text_of(x.json) for x in some(server.requests)
    )


@pytest.mark.parametrize(("read", "success"), [("well, HELLO you", 1), ("hullo", 0)])
def test_a_reader_takes_the_place_of_the_judge(read, success):
    """It gets the whole image after the turn; no question is asked."""
    sizes = []

    def reader(image):
        sizes.append((image.size, image.getpixel((0, 0))[0]))
        return read

    turn = chain(("text_change", "Add text '[Hello]' on the image"))
    with ScriptedServer(yes) as server:
        found = check(server, [turn], [IMAGES[:2]], reader=reader)
    assert (sizes, found.ways) == ([((512, 512), 20)], (("OCR",),))
    assert found.scores.score.tolist() == [[success]]
    assert not server.requests


def test_a_lost_answer_is_no_failure():
    with ScriptedServer(yes, [error(400)]) as server:
        found = check(server, [THREE], [IMAGES], attempts=1, concurrency=1)
    scores = found.scores
    assert list(scores.lost) == [(0, 1)]
    assert math.isnan(scores.score[0, 1])
    assert scores.lost[0, 1].fault is Fault.rejected
    assert scores.score[0, 0] == 1


def test_a_lost_name_loses_the_turn():
    """The public scorer would go on with the name as it is."""
    turn = chain(("position_change", "Change the position of [cup] to [left] of [dog]"))
    with ScriptedServer(yes) as server:  # a yes is no name
        found = check(server, [turn], [[IMAGES[0]] * 2], attempts=1)
    assert list(found.scores.lost) == [(0, 0)]
    assert found.ways == (("detector + judge",),)


def test_images_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"images\[0\]: expected .* of 3 turns, got 2 images"):
        anyio.run(
            EdiValJudge(ChatClient(["http://127.0.0.1:9/v1"], "m"), RedDetector()).score,
            [THREE],
            [IMAGES[:2]],
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
    detected = torch.tensor([[way.startswith("detector") for way in own] for own in done.ways])
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
