"""GroundingDINO and DINOv3 of the real classes, tiny, loaded from disk by ``from_pretrained``."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import WORDS
from transformers import GroundingDinoProcessor

from mteditflow.rewards.consistency.models import DinoV3, GroundingDino
from mteditflow.rewards.consistency.pairs import Pair
from mteditflow.rewards.consistency.scorer import ConsistencyScorer
from tests.loops import some


def picture(seed, height=512, width=512, block=64):
    """An RGB image of colored blocks, uint8 [3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = -(-height // block), -(-width // block)
    blocks = torch.randint(0, 256, (3, rows, columns), dtype=torch.uint8, generator=generator)
    whole = blocks.repeat_interleave(block, 1).repeat_interleave(block, 2)
    return whole[:, :height, :width].contiguous()


NAMES = [["a cat"], ["dog", "red ball", "tree"], ["the house"], ["car", "sky"]]


# -- GroundingDINO --------------------------------------------------------------------------------


def test_boxes_are_those_of_the_reference_processor(detector):
    """The same model by transformers' own processor: prompt, boxes above the threshold, scale."""
    images = [picture(n) for n in range(4)]
    processor = GroundingDinoProcessor(detector.processor, detector.tokenizer)
    prompts = ["a cat .", "dog . red ball . tree .", "the house .", "car . sky ."]
    strict = GroundingDino(detector.model, detector.tokenizer, detector.processor, threshold=0.999)
    found = strict(images, NAMES)
    kept = 0
    for image, prompt, boxes in some(zip(images, prompts, found, strict=True)):
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        with torch.no_grad():
            outputs = detector.model(**inputs)
        expected = processor.post_process_grounded_object_detection(
            outputs,
            inputs.input_ids,
            threshold=0.999,
            text_threshold=0.35,
            target_sizes=[(512, 512)],
        )[0]["boxes"]
        torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-3)
        kept += len(expected)
    assert 0 < kept < 32, "the threshold should part the 8 boxes of each image"
    assert [len(boxes) for boxes in detector(images, NAMES)] > [len(boxes) for boxes in found]


def test_boxes_are_absolute_corners_of_any_size_of_image(detector):
    wide = picture(0, 256, 512)
    for boxes in some(detector([wide], [["a cat"]])):
        assert boxes.shape[1] == 4
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        assert ((center >= 0) & (center <= torch.tensor([512.0, 256.0]))).all()
        assert center[:, 0].max() > 256, "x is scaled by the width"


def test_what_is_found_does_not_depend_on_the_batch(detector):
    """Prompts of different lengths are padded; measured, that moves no box by 1e-4 of a pixel."""
    images = [picture(n) for n in range(4)]
    together = detector(images, NAMES)
    for image, names, boxes in zip(images, NAMES, together, strict=True):
        torch.testing.assert_close(detector([image], [names])[0], boxes, rtol=0, atol=1e-4)


def test_the_full_stop_after_the_last_name_matters(detector):
    """Without it the words of the last name do not see each other, so scores change."""
    inputs = detector.processor([picture(0)], return_tensors="pt")
    logits = []
    for prompt in ("dog . red ball .", "dog . red ball"):
        text = detector.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            logits.append(detector.model(**text, **inputs).logits[..., 3:5])  # red ball
    assert not torch.allclose(*logits, rtol=1e-3)
    assert detector.prompts(["dog", "red ball"]) == ["dog . red ball ."]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(st.sampled_from([*WORDS, "qxz" * 9, "猫", "кот", "?"]), min_size=1, max_size=40),
        min_size=1,
        max_size=60,
    )
)
def test_names_are_never_cut(detector, names):
    """Every prompt fits the text encoder, and the prompts together name everything in order."""
    names = [" ".join(words)[:300] for words in names]
    prompts = detector.prompts(names)
    assert " ".join(prompts) == " . ".join(names) + " ."
    lengths = [len(ids) for ids in detector.tokenizer(prompts).input_ids]
    assert max(lengths) <= 256
    first = [len(detector.tokenizer(p.split(" . ")[0] + " .").input_ids) - 2 for p in prompts]
    full = [have + need > 256 for have, need in zip(lengths, first[1:], strict=False)]
    assert all(full), "a new prompt only where the next name does not fit"


def test_boxes_of_several_prompts_are_united(detector):
    names = [f"{a} {b}" for a in WORDS for b in WORDS]  # 3 tokens each with the full stop
    prompts = detector.prompts(names)
    assert len(prompts) == 2
    parts = [prompt.removesuffix(" .").split(" . ") for prompt in prompts]
    image = picture(1)
    expected = torch.cat(detector([image, image], parts))
    torch.testing.assert_close(detector([image], [names])[0], expected, rtol=0, atol=1e-4)


def test_no_box_above_the_threshold_gives_an_empty_tensor(detector):
    none = GroundingDino(detector.model, detector.tokenizer, detector.processor, threshold=1.0)
    (boxes,) = none([picture(0)], [["a cat"]])
    assert boxes.shape == (0, 4)


def test_refuses_what_it_cannot_detect(detector):
    image = picture(0)
    with pytest.raises(ValueError, match=r"names: expected at most 253 tokens each, got 300"):
        detector([image], [[" ".join(["cat"] * 300)]])
    with pytest.raises(ValueError, match=r"names: expected one or more for each .* got \[1, 0\]"):
        detector([image, image], [["cat"], []])
    with pytest.raises(ValueError, match="for 1 images"):
        detector([image], [["cat"], ["dog"]])
    with pytest.raises(ValueError, match="for 0 images"):
        detector([], [])
    with pytest.raises(ValueError, match="images: expected all of one size"):
        detector([image, picture(0, 256)], [["cat"], ["dog"]])
    with pytest.raises(ValueError, match="threshold: expected a finite number"):
        GroundingDino(detector.model, detector.tokenizer, detector.processor, threshold=35)


# -- DINOv3 ---------------------------------------------------------------------------------------


def test_tokens_are_told_apart_by_kind(features):
    images = [picture(n, height, width) for n, (height, width) in enumerate([(512, 512), (7, 90)])]
    found = features(images)
    with torch.no_grad():
        tokens = features.model(pixel_values=features.prepare(images)).last_hidden_state
    assert tokens.shape == (2, 201, 32)
    assert (found.grid, found.size) == ((14, 14), (224, 224))
    assert torch.equal(torch.cat([found.cls[:, None], found.registers, found.patches], 1), tokens)
    assert [x.shape[1] for x in (found.registers, found.patches)] == [4, 196]
    assert found.cls.dtype == torch.float32


def test_preparation_is_bilinear_with_antialiasing(features):
    """An independent filter: PIL's bilinear resize of each channel in floating point."""
    image = picture(3, 300, 517, block=13)
    planes = [
        Image.fromarray(plane.float().numpy()).resize((224, 224), Image.Resampling.BILINEAR)
        for plane in image
    ]
    data = [torch.frombuffer(bytearray(plane.tobytes()), dtype=torch.float32) for plane in planes]
    expected = torch.stack(data).view(3, 224, 224) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (expected - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(features.prepare([image])[0], expected, rtol=0, atol=1e-4)


def test_features_do_not_depend_on_the_batch(features):
    images = [picture(n, 64 * (n + 1), 300) for n in range(5)]
    together = features(images)
    for n, image in some(enumerate(images)):
        for alone, row in some(zip(features([image])[:3], together[:3], strict=True)):
            torch.testing.assert_close(alone[0], row[n], rtol=0, atol=1e-5)


# -- both -----------------------------------------------------------------------------------------


def test_half_precision_computes_in_half_and_answers_in_full(tiny_models, features, detector):
    half = DinoV3.from_pretrained(tiny_models / "dinov3", dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    images = [picture(0), picture(1)]
    found, exact = half(images), features(images)
    assert {x.dtype for x in found[:3]} == {torch.float32}
    assert torch.cosine_similarity(found.cls, exact.cls).min() > 0.999
    coarse = GroundingDino.from_pretrained(tiny_models / "grounding_dino", dtype=torch.bfloat16)
    boxes = coarse(images, [["a cat"], ["dog"]])
    assert [x.dtype for x in boxes] == [torch.float32] * 2


def test_scores_of_the_real_classes(detector, features):
    """An image compared with itself scores exactly 1 in all terms, with another one less."""
    images = [Image.fromarray(picture(n).permute(1, 2, 0).numpy()) for n in (0, 1)]
    pairs = [
        Pair(source=0, edited=n, unchanged_objects=("a cat",), all_objects=("dog", "a cat"))
        for n in (0, 1)
    ]
    for tokens in ("strict", "compat"):
        same, other = ConsistencyScorer(detector, features, tokens=tokens).score_pairs(
            images, pairs
        )
        assert list(same.model_dump().values()) == pytest.approx([1.0] * 4, abs=1e-6)
        assert all(value < 0.99 for value in some(other.model_dump().values()))


def test_detections_have_scores_above_the_threshold_and_calling_gives_their_boxes(detector):
    images, names = [picture(0), picture(1)], [["a cat"], ["dog", "ball"]]
    every = detector.detect(images, names, threshold=0.0)
    scores = torch.cat([own for _, own in every]).sort().values
    middle = float(scores[len(scores) // 2])
    for threshold in (middle, detector.threshold):
        for (boxes, own), (all_boxes, all_scores) in some(
            zip(detector.detect(images, names, threshold=threshold), every, strict=True)
        ):
            above = all_scores > threshold  # a score at the threshold is not
            assert torch.equal(own, all_scores[above])
            assert torch.equal(boxes, all_boxes[above])
    assert 0 < (scores > middle).sum() < len(scores)
    called = detector(images, names)
    found = detector.detect(images, names, threshold=detector.threshold)
    assert all(torch.equal(x, boxes) for x, (boxes, _) in some(zip(called, found, strict=True)))
    with pytest.raises(ValueError, match="threshold: expected"):
        detector.detect(images, names, threshold=1.5)


def test_pickled_weights_are_refused(tiny_models, tmp_path):
    config = tiny_models / "dinov3" / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(OSError, match="safetensors"):
        DinoV3.from_pretrained(tmp_path)


def test_the_default_weights_are_those_of_the_published_names(tiny_models, tmp_path, monkeypatch):
    """A folder of the same name comes before the hub."""
    published = {
        "IDEA-Research/grounding-dino-tiny": "grounding_dino",
        "facebook/dinov3-vitb16-pretrain-lvd1689m": "dinov3",
    }
    for name, tiny in some(published.items()):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(tiny_models / tiny)
    monkeypatch.chdir(tmp_path)
    for model in (GroundingDino.from_pretrained().model, DinoV3.from_pretrained().model):
        assert model.name_or_path in published
        assert not model.training


@pytest.mark.slow
def test_torchvision_is_not_needed():
    code = (
        "import sys; sys.modules['torchvision'] = None; "
        "from mteditflow.rewards.consistency.models import DinoV3, GroundingDino"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_a_missing_extra_is_named():
    code = (
        "import sys; sys.modules['transformers'] = None; import mteditflow.rewards.consistency."
        "models"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "mteditflow.rewards.consistency.models needs transformers: pip install" in run.stderr
