"""Reward models and OCR as scorers: what they are given, what is lost, what is unmeasured."""

import math
import re
import sys
from pathlib import Path

import anyio
import numpy as np
import pytest
import torch
from mteditflow_examples.flux.config import Rewards
from mteditflow_examples.flux.scoring import own_scorer
from PIL import Image, ImageDraw, ImageFont

from mteditflow.chains import Chain
from mteditflow.evaluation import (
    EditRewardScorer,
    EditScoreScorer,
    PickScore,
    PickScoreScorer,
    RapidOcr,
    TextScorer,
    TurnScorer,
)
from mteditflow.evaluation.text_scorer import read_share, wanted_text
from mteditflow.rewards import Fault, Lost
from tests.loops import some
from tests.tiny_pick_score import write_pick_score

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
CHAINS = [
    Chain(id="1", image="1.png", instructions=("make it red", "add a hat")),
    Chain(id="2", image="2.png", instructions=("blur",)),
]
COLORS = [["red", "lime", "blue"], ["black", "white"]]
IMAGES = [[Image.new("RGB", (8, 8), color) for color in own] for own in COLORS]
PLACES = [(0, 0), (0, 1), (1, 0)]  # of the turns, in the order in which they are scored


def scored(scorer, chains=CHAINS, images=IMAGES):
    return anyio.run(scorer.score, chains, images)


def red(image):
    return image.getpixel((0, 0))[0]


class EditReward:
    """The documented signature of ``EditRewardInferencer.reward``."""

    def __init__(self, *values, width=2):
        self.values, self.width, self.calls = list(values), width, []

    def reward(self, prompts, image_src, image_paths):
        self.calls.append((prompts, list(map(red, image_src)), list(map(red, image_paths))))
        rows = [self.values.pop(0) for _ in prompts]
        return torch.tensor([[x] + [9.0] * (self.width - 1) for x in rows], dtype=torch.bfloat16)


def test_edit_reward_sees_the_image_before_and_its_first_number_counts():
    model = EditReward(2.0, -0.5, 0.0)
    found = scored(EditRewardScorer(model, batch_size=2))
    assert model.calls == [
        (["make it red", "add a hat"], [255, 0], [0, 0]),
        (["blur"], [0], [255]),
    ]
    raw, following = found["edit_reward"], found["following"]
    assert [float(raw.score[x]) for x in PLACES] == [2.0, -0.5, 0.0]
    assert [float(following.score[x]) for x in PLACES] == pytest.approx(
        [1 / (1 + math.exp(-x)) for x in (2.0, -0.5, 0.0)]
    )
    assert following.turn_mask.tolist() == [[True, True], [True, False]]
    EditRewardScorer.scale.check("following", following.score)


def test_a_reward_that_is_no_number_is_lost_and_a_wrong_count_refused():
    found = scored(EditRewardScorer(EditReward(1.0, math.nan, math.inf, width=1)))
    assert {place: x.fault for place, x in found["following"].lost.items()} == {
        (0, 1): Fault.not_a_number,
        (1, 0): Fault.not_a_number,
    }
    short = EditReward(1.0, 1.0, 1.0)
    short.reward = lambda **_: torch.ones(1, 2)
    with pytest.raises(ValueError, match="rewards: expected 3, one for each edit, got"):
        scored(EditRewardScorer(short))
    with pytest.raises(TypeError, match=r"expected EditRewardInferencer of .*, got int"):
        EditRewardScorer(3)


ANSWER = {
    "prompt_following": 8.0, "consistency": 9.0, "perceptual_quality": 5.0, "overall": 6.0,
    "SC_reasoning": "good", "PQ_reasoning": "blurred",
}  # fmt: skip


class EditScore:
    """The documented signature of ``editscore.EditScore.evaluate``."""

    def __init__(self, *answers, num_pass=1):
        self.answers, self.num_pass, self.calls = list(answers), num_pass, []

    def evaluate(self, image_prompts, text_prompt):
        self.calls.append((*map(red, image_prompts), text_prompt))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_edit_score_aspects_lie_on_their_ranges():
    model = EditScore(ANSWER, ANSWER, ANSWER | {"prompt_following": 0.0})
    found = scored(EditScoreScorer(model))
    assert model.calls == [(255, 0, "make it red"), (0, 0, "add a hat"), (0, 255, "blur")]
    assert {name: float(x.score[0, 0]) for name, x in found.items()} == pytest.approx(
        {"following": 8.0, "consistency": 0.9, "quality": 0.5, "edit_score": 0.6}
    )
    assert float(found["following"].score[1, 0]) == 0.0
    EditScoreScorer.scale.check("following", found["following"].score)


def test_what_edit_score_guessed_is_lost():
    guessed = ANSWER | {"PQ_reasoning": "guess_if_cannot_parse | I am sorry"}
    model = EditScore(guessed, KeyError("score"), ANSWER | {"overall": 12.0})
    for scores in some(scored(EditScoreScorer(model)).values()):
        assert {place: x.fault for place, x in scores.lost.items()} == {
            (0, 0): Fault.format,
            (0, 1): Fault.format,
            (1, 0): Fault.out_of_range,
        }
        assert scores.score.isnan().all()
    with pytest.raises(ValueError, match="model: expected num_pass 1, since a guess is marked"):
        EditScoreScorer(EditScore(num_pass=4))


def test_the_real_edit_score_with_a_scripted_model():
    """Where editscore is installed: what its parser cannot read is lost, the rest is read."""
    real = pytest.importorskip("editscore").EditScore(backbone="scripted", score_range=25)
    good = ['{"reasoning": "fine", "score": [20, 22]}', '{"reasoning": "fine", "score": [15, 10]}']
    answers = good + ["no answer at all"] * 6

    class Scripted:
        def prepare_input(self, images, prompt):
            return images, prompt

        def inference(self, prompt, seed=None):
            return answers.pop(0)

    real.model = Scripted()
    found = scored(EditScoreScorer(real), CHAINS[:1], IMAGES[:1])
    assert float(found["following"].score[0, 0]) == 8.0  # 20 of 25, of 10
    assert float(found["quality"].score[0, 0]) == pytest.approx(0.4)  # the smaller of 15 and 10
    assert {place: x.fault for place, x in found["quality"].lost.items()} == {(0, 1): Fault.format}


def test_without_its_package_edit_score_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "editscore", None)
    with pytest.raises(ImportError, match="EditScoreScorer needs editscore: pip install editscore"):
        EditScoreScorer()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_pick_score(tmp_path_factory.mktemp("clip"))


def test_pick_score_scores_what_a_turn_made_for_its_instruction(clip):
    model = PickScore.from_pretrained(clip)
    found = scored(PickScoreScorer(model))["following"]
    made = [IMAGES[b][n + 1] for b, n in PLACES]
    expected = model(made, [CHAINS[b].instructions[n] for b, n in PLACES])
    assert [float(found.score[x]) for x in PLACES] == pytest.approx(expected.tolist())
    assert expected.std() > 0
    PickScoreScorer.scale.check("following", found.score)


class Mine(PickScoreScorer):
    def __init__(self):
        super().__init__(lambda images, prompts: torch.tensor([float(red(x)) / 5 for x in images]))


def test_a_trainer_takes_a_subclass_by_its_path():
    scorer = own_scorer(Rewards(scorer=f"{__name__}:Mine"), f"{__name__}:Mine")
    found = scored(scorer)["following"]
    assert found.score.nan_to_num(-1).tolist() == [[0.0, 0.0], [51.0, -1.0]]


@pytest.fixture(scope="module")
def reader():
    return RapidOcr(threads=1)


def sign(text):
    image = Image.new("RGB", (256, 96), (30, 90, 160))
    ImageDraw.Draw(image).text((20, 20), text, fill="white", font=ImageFont.load_default(40))
    return image


def test_text_is_read_where_a_turn_asks_for_it_and_nowhere_else(reader):
    chain = Chain(
        id="7",
        image="7.png",
        instructions=("Write “Houston” over it", "Make it blue", "Add the text 'open'", "Add text"),
        task_types=("text_change", "color_alter", "text_change", "text_change"),
    )
    images = [sign(x) for x in ("", "Houston", "Houston", "Houston", "open")]
    found = scored(TextScorer(reader), [chain], [images])["following"]
    assert float(found.score[0, 0]) == 1.0
    assert float(found.score[0, 2]) <= 0.5  # another text is there
    assert found.unmeasured.tolist() == [[False, True, False, True]]  # none is quoted in the last
    assert found.valid.tolist() == [True]
    assert not found.lost


@pytest.mark.parametrize(
    ("instruction", "more", "wanted"),
    [
        ("Add text '[New]' on the image", {}, "New"),
        ("Replace the text '[old]' on [mug]  with '[new]'", {}, "new"),
        ('Let it say "Hi, you"', {"task_types": ("text_change",)}, "Hi, you"),
        ("Change 'a' to 'b' in Tom's sign", {"task_types": ("text_change",)}, "b"),
        ("Put a sign there", {"formatted_instructions": ("Add text '[go]' on the image",)}, "go"),
        ("Put a 'sign' there", {}, None),
        ("Add a hat", {"task_types": ("text_change",)}, None),
        ("Add text 'x'", {"task_types": ("subject_add",)}, None),
        ("Remove [cat]", {}, None),
    ],
)
def test_the_wanted_text_is_never_invented(instruction, more, wanted):
    chain = Chain(id="1", image="1.png", instructions=(instruction,), **more)
    assert wanted_text(chain, 0) == wanted


def test_the_share_that_is_read_is_the_best_of_all_stretches():
    def edits(a, b):
        if not a or not b:
            return len(a) + len(b)
        same = edits(a[1:], b[1:]) + (a[0] != b[0])
        return min(same, edits(a[1:], b) + 1, edits(a, b[1:]) + 1)

    for text in some(("", "cab", "abcab", "ddd", "axbxc", "cba")):
        ends = range(len(text) + 1)
        nearest = min(edits("abc", text[i:j]) for i in ends for j in ends if i <= j)
        assert read_share("abc", text) == pytest.approx(1 - nearest / 3), text


def test_the_page_shows_a_scorer_of_ones_own_that_runs(tmp_path, monkeypatch):
    """The program of the page, named as the page names it, and what it returns."""
    text = PAGE.read_text(encoding="utf-8")
    section = text[text.index("## A scorer of your own") :]
    program = re.search(r"^```python\n(.*?)^```", section, flags=re.M | re.S)[1]
    assert len(program.splitlines()) <= 24
    (tmp_path / "own_page_scorer.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = re.search(r"--rewards\.scorer own_page_scorer:(\w+)", section)[1]
    path = f"own_page_scorer:{name}"
    scorer = own_scorer(Rewards(scorer=path), path)
    found = scored(scorer)
    tiny = [[IMAGES[0][0], Image.new("RGB", (4, 9)), IMAGES[0][2]]]
    lost = scored(scorer, CHAINS[:1], tiny)["following"]
    sys.modules.pop("own_page_scorer")
    ((place, reason),) = lost.lost.items()
    assert (place, str(reason)) == (
        (0, 0),
        "answer makes no sense after 1 attempt: a picture of (4, 9) pixels",
    )
    # Asked to be red: red 0, green 255 of lime; then a hat and blur, which it does not measure.
    assert found["following"].score.nan_to_num(-1).tolist() == [[0.0, -1.0], [-1.0, -1.0]]
    assert found["following"].unmeasured.tolist() == [[False, True], [True, False]]


class Fixed(TurnScorer):
    """Returns what it is given."""

    terms = ("following", "style")

    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def score_turns(self, turns):
        return self.returned


GOOD = {"following": 1, "style": 0.5}
REASON = Lost(Fault.timeout, "no answer", 2)


def test_a_term_of_a_turn_may_be_lost_alone():
    found = scored(Fixed([GOOD | {"style": REASON}, REASON, GOOD | {"following": math.nan}]))
    assert found["following"].lost == {(0, 1): REASON}
    assert found["style"].lost == {(0, 0): REASON, (0, 1): REASON}
    assert found["following"].score.nan_to_num(-1).tolist() == [[1, -1], [-1, -1]]
    assert found["following"].unmeasured.tolist() == [[False, False], [True, False]]
    assert float(found["style"].score[1, 0]) == 0.5


def test_numbers_of_any_kind_are_scores():
    kinds = [torch.tensor(0.5), np.float32(0.5), np.array(0.5)]
    found = scored(Fixed([{"following": x, "style": True} for x in kinds]))
    assert [float(found["following"].score[x]) for x in PLACES] == [0.5] * 3
    assert [float(found["style"].score[x]) for x in PLACES] == [1.0] * 3


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([GOOD], ValueError, ": expected 3 entries, one for each turn, got 1"),
        ([GOOD] * 4, ValueError, ": expected 3 entries, one for each turn, got 4"),
        (None, TypeError, ": expected a list with one entry for each turn, got NoneType None"),
        ([GOOD, 0.5, GOOD], TypeError, "[1]: expected a dictionary or Lost, got float 0.5"),
        (
            [GOOD, GOOD, {"following": 1}],
            ValueError,
            "[2]: expected the terms ['following', 'style'], as Fixed declares, got ['following']",
        ),
        ([GOOD | {"bonus": 1}] * 3, ValueError, "got ['following', 'style', 'bonus']"),
        (
            [GOOD | {"style": "high"}] * 3,
            TypeError,
            "[0]['style']: expected a number, NaN (nothing to measure) or Lost (no answer), got st",
        ),
        ([GOOD | {"style": None}] * 3, TypeError, "or Lost (no answer), got NoneType None"),
        ([GOOD | {"style": torch.ones(2)}] * 3, TypeError, "(no answer), got Tensor tensor([1., "),
        ([GOOD | {"following": math.inf}] * 3, ValueError, "['following']: expected a number, NaN"),
    ],
)
def test_what_score_turns_returns_is_checked_by_name(returned, error, message):
    with pytest.raises(error, match=re.escape(message)) as found:
        scored(Fixed(returned))
    assert str(found.value).startswith("Fixed.score_turns")


def test_a_scorer_that_scores_nothing_is_refused_before_a_run():
    class Idle(TurnScorer):
        terms = ("following",)

    with pytest.raises(TypeError, match="score_turns"):
        Idle()
