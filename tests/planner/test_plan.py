"""Drawing edit types, and a planner on its own."""

from collections import Counter
from random import Random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mteditflow.planner import EDITS
from mteditflow.planner.plan import Planner, Refused, draw_tasks
from mteditflow.rewards.transport.chat import ChatClient
from mteditflow.testing.endpoint import ScriptedServer, completion
from tests.loops import some
from tests.planner.scripted_model import ScriptedModel, picture, sees_colors

TURNS = st.integers(1, 9)


@given(st.integers(), TURNS)
def test_types_are_drawn_without_repetition_and_by_the_seed_alone(seed, turns):
    drawn = draw_tasks(Random(seed), turns)
    assert len(set(drawn)) == len(drawn) == turns
    assert set(drawn) <= set(EDITS)
    assert draw_tasks(Random(seed), turns) == drawn


def test_types_are_drawn_evenly_or_by_weight():
    random = Random(0)
    even = Counter(draw_tasks(random, 1)[0] for _ in range(9000))
    assert all(850 < even[task] < 1150 for task in some(EDITS))  # 1000, 5 standard deviations
    weights = {"subject_add": 3.0, "text_change": 1.0, "count_change": 0.0}
    first = Counter(draw_tasks(random, 2, weights)[0] for _ in range(4000))
    assert set(first) == {"subject_add", "text_change"}
    assert 2860 < first["subject_add"] < 3140


@pytest.mark.parametrize(
    ("turns", "weights", "message"),
    [
        (10, None, "turns: expected at most 9, the number of edit types with a weight, got 10"),
        (2, {"subject_add": 1.0, "text_change": 0.0}, "turns: expected at most 1"),
        (1, {"make_nicer": 1.0}, r"weights: expected one of \['subject_add', .*got 'make_nicer'"),
        (1, {"subject_add": -1.0}, r"weights\['subject_add'\]: expected a finite number in \[0"),
        (0, None, "turns: expected an integer >= 1, got 0"),
    ],
)
def test_errors_of_drawing_come_before_anything_is_asked(turns, weights, message):
    client = ChatClient(["http://127.0.0.1:9/v1"], "scripted")
    with pytest.raises(ValueError, match=message):
        Planner(client, sees_colors, turns=turns, weights=weights)


def plan(image, answer=None, **settings):
    with ScriptedServer(answer or ScriptedModel()) as server:
        client = ChatClient([server.url], "scripted", attempts=2, back_off=0.0)
        planner = Planner(client, sees_colors, **settings)

        async def run():
            scene = await planner.look(image)
            if isinstance(scene, Refused):
                return scene
            return await planner.plan(scene, chain_id="1", image="1.png")

        return anyio.run(run)


def test_what_is_infeasible_becomes_an_addition():
    weights = {"subject_remove": 1.0, "position_change": 1.0, "background_change": 1.0}
    # a background object alone: nothing to remove, no reference, nothing to keep
    chain = plan(picture(["yellow"]), turns=1, weights=weights)
    assert chain.task_types == ("subject_add",)
    chain = plan(picture(["yellow"]), turns=3, weights=weights)
    assert chain.task_types[0] == "subject_add"
    assert "subject_remove" in chain.task_types[1:] or "position_change" in chain.task_types[1:]


def test_an_image_without_objects_is_refused():
    refused = plan(Image.new("RGB", (64, 64), (128, 128, 128)))
    assert refused.reason == "no object was found"
    assert refused.detail == (
        "listed were {'wall': 'fills the image', 'unicorn': 'not found by the detector'}"
    )


def test_an_image_whose_objects_are_not_listed_is_refused():
    refused = plan(picture(["red"]), answer=lambda _: completion("I'm sorry, but no."))
    assert refused.reason == "objects: refusal"
    assert "after 2 attempts" in refused.detail


def test_the_order_in_which_chains_are_planned_does_not_matter():
    async def run(planner, ids):
        scene = await planner.look(picture(["red", "green", "white"]))
        return {x: await planner.plan(scene, chain_id=x, image="1.png") for x in ids}

    with ScriptedServer(ScriptedModel()) as server:
        client = ChatClient([server.url], "scripted")
        first, second = (
            anyio.run(run, Planner(client, sees_colors, seed=4), ids) for ids in ("abc", "cba")
        )
    assert first == second
    assert len({chain.formatted_instructions for chain in first.values()}) == 3
