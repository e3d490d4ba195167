"""EdiVal-Bench's checks against its public scorer: the verdict that it gave on every scene.

``edival_scenes.json`` holds facts: what a scripted detector finds in the images before and after a
turn, (x1, y1, x2, y2) in pixels of 512 and a score; what a scripted model answers; and the verdict
of the public code. ``text`` is what can be read in a crop of a size, ``names`` an object without
color and material. ``read`` is false where the public scorer cannot read the instruction.
"""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import anyio
import pytest
import torch
from PIL import Image

from mteditflow.chains import Chain
from mteditflow.evaluation.benchmarks import EdiValJudge
from mteditflow.rewards import ChatClient
from mteditflow.testing.endpoint import ScriptedServer, completion
from tests.evaluation.judged_items import images_of, text_of
from tests.loops import some

SCENES = json.loads(Path(__file__).with_name("edival_scenes.json").read_text())["scenes"]
NAMES = {name: plain for scene in SCENES for name, plain in scene["names"].items()}
SIDES = ("before", "after")


class SceneDetector:
    """Finds what a scene says: an image's red is its scene, its green the side."""

    def detect(self, images, names, *, threshold):
        found = []
        for image, (name,) in zip(images, names, strict=True):
            scene, side = image[:2, 0, 0].tolist()
            rows = torch.tensor(SCENES[scene][SIDES[side]].get(name, [])).view(-1, 5)
            rows = rows[rows[:, 4] > threshold]
            found.append((rows[:, :4], rows[:, 4]))
        return found


def answer(request):
    """What the scripted model says: a plain name, the text in a crop, yes or no."""
    shown, keys = images_of(request), schema_of(request)
    if keys == ["name"]:
        (name,) = re.findall('Name: "(.*)"', text_of(request))
        return completion(json.dumps({"name": NAMES.get(name, name)}))
    scene = SCENES[shown[-1].getpixel((0, 0))[0]]
    if keys == ["text"]:
        size = "{}x{}".format(*shown[0].size)
        return completion(json.dumps({"text": (scene["text"] or {}).get(size, "?")}))
    return completion(json.dumps({"scores": [int(scene["yes"])]}))


def schema_of(request):
    return list(request["response_format"]["json_schema"]["schema"]["properties"])


@pytest.fixture(scope="module")
def verdicts():
    """The success of each scene, and the way to it."""
    chains = [
        Chain(
            id=str(n),
            image=f"{n}.png",
            instructions=(scene["instruction"],),
            task_types=(scene["type"],),
            formatted_instructions=(scene["formatted"],),
        )
        for n, scene in enumerate(SCENES)
    ]
    images = [
        [Image.new("RGB", (512, 512), (n, side, 0)) for side in (0, 1)] for n in range(len(SCENES))
    ]
    with ScriptedServer(answer) as server:
        judge = EdiValJudge(ChatClient([server.url], "m"), SceneDetector())
        found = anyio.run(partial(judge.score, chains, images))
    assert not found.scores.lost
    return [int(x) for x in found.scores.score[:, 0]], [way for (way,) in found.ways]


@pytest.mark.parametrize("kind", sorted({scene["type"] for scene in SCENES}))
def test_the_verdict_is_that_of_the_public_scorer(verdicts, kind):
    ours = {n: x for n, x in enumerate(verdicts[0]) if SCENES[n]["type"] == kind}
    read = {n: x for n, x in ours.items() if SCENES[n]["read"]}
    assert {SCENES[n]["note"]: x for n, x in read.items()} == {
        SCENES[n]["note"]: SCENES[n]["success"] for n in read
    }


def test_what_the_public_scorer_cannot_read_gets_the_single_question(verdicts):
    """It counts such a turn as failed; here the report shows that it was checked otherwise."""
    unread = [n for n, scene in enumerate(SCENES) if not scene["read"]]
    assert [SCENES[n]["success"] for n in unread] == [0] * len(unread)
    assert [n for n, way in enumerate(verdicts[1]) if way == "single question"] == unread


def test_each_edit_type_has_scenes_of_both_ends():
    counts = Counter((scene["type"], scene["success"]) for scene in SCENES if scene["read"])
    kinds = {kind for kind, _ in counts}
    assert len(kinds) == 9
    assert all(counts[kind, success] for kind in some(kinds) for success in (0, 1))
    assert sum(counts.values()) == 128


def test_the_way_to_a_verdict(verdicts):
    """The judge is asked only where boxes leave it open; only text and looks need no detector."""
    ways = {kind: set() for kind in {scene["type"] for scene in SCENES}}
    for scene, way in zip(SCENES, verdicts[1], strict=True):
        if scene["read"]:
            ways[scene["type"]].add(way)
    assert ways == {
        "subject_add": {"detector", "detector + judge"},
        "subject_remove": {"detector"},
        "subject_replace": {"detector", "detector + judge"},
        "position_change": {"detector", "detector + judge"},
        "count_change": {"detector"},
        "color_alter": {"judge"},
        "material_alter": {"judge"},
        "text_change": {"judge", "detector", "detector + judge"},
        "background_change": {"judge", "detector", "detector + judge"},
    }
