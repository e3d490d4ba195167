"""Worlds on disk, once per worker, and runs that draw nothing."""

import pytest
from mteditflow_examples.shapes.editor import Family

from tests.flux.worlds import make_world
from tests.undrawn import undrawn

__all__ = ["undrawn"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("kontext"))


@pytest.fixture(scope="session")
def klein_world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("klein"), Family.klein)
