"""Tiny pipelines of the real classes, one thread."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

pytest.importorskip("diffusers")
from mteditflow_examples.shapes.editor import build_klein, build_kontext


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kontext():
    return build_kontext()


@pytest.fixture
def klein():
    return build_klein()


@pytest.fixture(params=["kontext", "klein"])
def pipeline(request):
    """Both families."""
    return request.getfixturevalue(request.param)
