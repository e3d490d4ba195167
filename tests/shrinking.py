"""Whether laws shrink the cases that break them, whatever the profile of the run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import Phase, settings


@contextmanager
def phases(chosen: Sequence[Phase]) -> Iterator[None]:
    """Leave all else as the profile of the run has it."""
    before = settings.get_current_profile_name()
    settings.register_profile("phases", settings.default, phases=chosen)
    settings.load_profile("phases")
    yield
    settings.load_profile(before)


@pytest.fixture
def smallest_cases():
    """Laws report the smallest case."""
    with phases([Phase.explicit, Phase.generate, Phase.shrink]):
        yield


@pytest.fixture
def first_cases():
    """Laws report the first case, where only that there is one matters: shrinking takes longer."""
    with phases([Phase.explicit, Phase.generate]):
        yield
