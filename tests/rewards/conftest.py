"""Tiny detector and features of the real classes, written to disk once and loaded from there."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folder with ``grounding_dino`` and ``dinov3``, as their users hold them."""
    from tiny_models import save_dinov3, save_grounding_dino
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("tiny_models")
    save_grounding_dino(folder / "grounding_dino")
    save_dinov3(folder / "dinov3")
    return folder


@pytest.fixture(scope="session")
def detector(tiny_models):
    from mteditflow.rewards.consistency.models import GroundingDino

    return GroundingDino.from_pretrained(tiny_models / "grounding_dino")


@pytest.fixture(scope="session")
def features(tiny_models):
    from mteditflow.rewards.consistency.models import DinoV3

    return DinoV3.from_pretrained(tiny_models / "dinov3")
