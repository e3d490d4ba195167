"""Preference: PickScore of the real classes from a folder, and the term that is reported."""

import anyio
import pytest
import torch
from PIL import Image

from mteditflow.chains import Chain
from mteditflow.evaluation.preference import PickScore, Preference
from tests.loops import some
from tests.tiny_pick_score import write_pick_score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pick_score(tmp_path_factory.mktemp("pickscore"))


def pictures(count):
    return [Image.new("RGB", (40, 50), (40 * i, 255 - 40 * i, 90)) for i in range(count)]


PROMPTS = ["a red cat", "make it snow", "add a very long hat that goes on and on", "x", "remove it"]


def test_the_score_is_the_scaled_cosine_of_each_image_with_its_own_prompt(folder):
    model = PickScore.from_pretrained(folder)
    scores = model(pictures(5), PROMPTS)
    assert scores.shape == (5,)
    assert not scores.requires_grad
    with torch.no_grad():
        for image, prompt, score in zip(pictures(5), PROMPTS, scores, strict=True):
            text = model.tokenizer(prompt, truncation=True, max_length=16, return_tensors="pt")
            pixels = model.processor(images=image, return_tensors="pt")
            both = model.model(**text, **pixels)
            torch.testing.assert_close(both.logits_per_image[0, 0], score, rtol=1e-4, atol=1e-4)
    assert scores.std() > 0


def test_batches_change_nothing(folder):
    whole = PickScore.from_pretrained(folder)(pictures(5), PROMPTS)
    parts = PickScore.from_pretrained(folder, batch_size=2)(pictures(5), PROMPTS)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)


def test_bad_calls_are_named(folder):
    model = PickScore.from_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"prompts: expected one for each image, .* 1 for 2 images"
    ):
        model(pictures(2), ["a"])
    with pytest.raises(ValueError, match="got 0 for 0 images"):
        model([], [])
    with pytest.raises(ValueError, match="batch_size: expected"):
        PickScore.from_pretrained(folder, batch_size=0)


def red_of(images, prompts):
    return torch.tensor(
        [image.getpixel((0, 0))[0] + 0.5 * len(p) for image, p in zip(images, prompts, strict=True)]
    )


def chain(name, *instructions):
    return Chain(id=name, image=f"{name}.png", instructions=instructions)


def test_every_turn_is_scored_beside_the_reference_for_the_same_prompt():
    images = pictures(3), pictures(2)[::-1]
    chains = [chain("1", "ab", "abcd"), chain("2", "a")]
    found = anyio.run(Preference(red_of).score, chains, images)
    assert list(found) == ["preference", "preference_of_reference"]
    assert found["preference"].score[0].tolist() == [41.0, 82.0]
    assert found["preference_of_reference"].score[0].tolist() == [1.0, 2.0]
    assert found["preference"].score[1, 0] == 0.5
    assert found["preference_of_reference"].score[1, 0] == 40.5
    for scores in some(found.values()):
        assert scores.turn_mask.tolist() == [[True, True], [True, False]]
        assert scores.score[1].isnan().tolist() == [False, True]


def test_an_editor_that_does_nothing_is_at_its_baseline(folder):
    same = [pictures(1) * 3]
    found = anyio.run(
        Preference(PickScore.from_pretrained(folder)).score, [chain("1", "a", "b")], same
    )
    torch.testing.assert_close(found["preference"].score, found["preference_of_reference"].score)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda images, prompts: torch.zeros(len(images) + 1),
            "preference: expected shape one score for",
        ),
        (lambda images, prompts: torch.full((len(images),), torch.nan), "expected a finite score"),
    ],
)
def test_a_model_that_gives_something_else_is_an_error(model, message):
    with pytest.raises(ValueError, match=message):
        anyio.run(Preference(model).score, [chain("1", "a")], [pictures(2)])


def test_images_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"images\[0\]: expected .* of 1 turns, got 3 images"):
        anyio.run(Preference(red_of).score, [chain("1", "a")], [pictures(3)])
