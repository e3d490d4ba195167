"""``compat`` against EdiVal-Bench's public scorer: the scores that it gave, within 1e-6.

``public_scorer.json`` holds facts: boxes, center and size as shares of the image, and the four
terms that the public code returned for the pictures below with a detector that finds these boxes
and a DINOv3 of these weights. Over 200 such pairs the largest difference was 3.6e-7; with a mask
brought to the model's size by torch's nearest-exact it was 6e-3.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from mteditflow.rewards import ConsistencyScorer, DinoV3, Pair
from tests.loops import some

PAIRS = json.loads(Path(__file__).with_name("public_scorer.json").read_text())["pairs"]
TERMS = ("object", "background", "object_l1", "background_l1")


def features():
    """DINOv3 of 2 layers; every weight is a draw of numpy, so that no version of torch matters."""
    model = DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_register_tokens=4,
        )
    )
    random = np.random.default_rng(0)
    weights = {name: x for name, x in sorted(model.state_dict().items()) if "inv_freq" not in name}
    for name, weight in weights.items():
        if weight.ndim > 1:
            weight.copy_(torch.from_numpy(random.normal(scale=0.3, size=tuple(weight.shape))))
        else:
            weight.fill_(name.endswith(("weight", "lambda1")))  # norms and scales 1, biases 0
    return DinoV3(model.eval())


def pictures(seed):
    """Two images of 16 x 16 squares; those of an even seed share three quarters of their color."""
    random = np.random.default_rng(seed)
    source, edited = (
        np.kron(random.integers(0, 256, (16, 16, 3)), np.ones((32, 32, 1), dtype=np.int64))
        for _ in range(2)
    )
    edited = edited if seed % 2 else (3 * source + edited) // 4
    return [Image.fromarray(image.astype(np.uint8)) for image in (source, edited)]


def pixels(boxes):
    center, size = torch.tensor(boxes).view(-1, 2, 2).unbind(1)
    return 512 * torch.cat([center - size / 2, center + size / 2], dim=1)


def test_the_public_scorer_gave_the_same_scores():
    found = {}

    def detect(images, names):
        keys = [(image.numpy().tobytes(), *own) for image, own in zip(images, names, strict=True)]
        return [pixels(found[key]) for key in keys]

    work = []
    for n, row in enumerate(PAIRS):
        images = pictures(row["seed"])
        for letter, image in zip("ab", images, strict=True):
            data = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).tobytes()
            found[data, f"one {n}"] = row["boxes"]["a one"]
            found[data, f"all {n}"] = row["boxes"][f"{letter} all"]
        pair = Pair(
            source=0, edited=1, unchanged_objects=(f"one {n}",), all_objects=(f"all {n}",)
        )  # fmt: skip
        work.append((images, [pair]))
    scorer = ConsistencyScorer(detect, features(), tokens="compat")
    for row, (scores,) in some(zip(PAIRS, scorer.score_many(work), strict=True)):
        expected = {term: row[term] for term in TERMS if row[term] is not None}
        assert scores.model_dump(exclude_none=True) == pytest.approx(expected, abs=1e-6, rel=0)


def test_the_table_has_what_can_differ():
    """No box, everything masked, and backgrounds from near 0 to near 1."""
    assert any(not row["boxes"]["a one"] for row in PAIRS)
    assert any(row["background_l1"] is None for row in PAIRS)
    scores = [row["background"] for row in PAIRS]
    assert min(scores) < 0.5
    assert max(scores) > 0.9
