"""The page that shows the judge's prompts is what its script makes of the prompts as they are."""

import numpy as np
from PIL import Image

from docs.render_prompts import FOLDER, PAGE, page, pictures
from mteditflow.rewards import ExpectationPrompt, JudgePrompt


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run python -m docs.render_prompts"


def test_the_pictures_are_up_to_date():
    files = [FOLDER / f"image_{n}.png" for n in range(4)]
    assert sorted(FOLDER.iterdir()) == files
    for file, picture in zip(files, pictures(), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file).convert("RGB")), picture)


def test_every_prompt_is_on_it():
    choices = [
        (scope, scale, thinking, answer_format)
        for scope in ("trajectory", "turn")
        for scale in ("likert", "binary")
        for thinking in (True, False)
        for answer_format in ("json", "text")
    ]
    prompts = [
        *(JudgePrompt(*c) for c in choices),
        ExpectationPrompt(),
        ExpectationPrompt("binary"),
    ]
    assert [page().count(f"<code>{prompt}</code>") for prompt in prompts] == [1] * 18
