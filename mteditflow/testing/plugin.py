"""pytest plugin: one test per law, with the law's name as its id.

Enable it in ``conftest.py`` by ``pytest_plugins = ["mteditflow.testing.plugin"]``, then::

    @pytest.mark.laws("advantage", my_package.advantage, signature="numpy")
    def test_my_advantage(law):
        law()

A law that does not apply to the function is a skipped test with the reason. A test with the fixture
``faulty_endpoint``, a failing HTTP endpoint, runs once for each failure in ``endpoint.FAULTS``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import pytest

from mteditflow.testing.endpoint import FAULTS, ScriptedServer, completion
from mteditflow.testing.kinds import laws_of
from mteditflow.testing.law import EXAMPLES, Law, LawBroken, check_search


@dataclass(frozen=True)
class BoundLaw:
    """A law bound to the function under test; call it to check.

    Attributes:
        law: the law.
        subject: the function under test with its options.
        examples: number of cases to draw.
        seed: as in ``Law.check``.
        calls: one entry per call, so that the plugin can detect a law that was not checked.
    """

    law: Law[Any]
    subject: Any
    examples: int = EXAMPLES
    seed: int = 0
    calls: list[None] = field(default_factory=list, repr=False, compare=False)

    def __call__(self) -> None:
        """Search for a counterexample.

        Raises:
            LawBroken: a counterexample was found.
            ValueError: another option fits the function, such as another signature.
        """
        __tracebackhide__ = True
        self.calls.append(None)
        try:
            self.law.check(self.subject, examples=self.examples, seed=self.seed)
        except LawBroken:
            misfit = self.subject.misfit()
            if misfit is None:
                raise
            raise ValueError(misfit) from None


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker ``laws``."""
    config.addinivalue_line(
        "markers",
        "laws(kind, function, *, examples=200, seed=0, only=(), without=(), **options): one test "
        "per law of mteditflow.testing, called as law() through the argument `law`",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a marked test with one law per case."""
    marker = metafunc.definition.get_closest_marker("laws")
    if marker is None:
        return
    name = metafunc.definition.name
    if "law" not in metafunc.fixturenames:
        raise pytest.Collector.CollectError(f"{name}: expected an argument `law`")
    try:
        if len(marker.args) != 2:
            raise ValueError(f"expected a kind and a function, got {len(marker.args)} arguments")
        bound = _bound(*marker.args, **marker.kwargs)
    except (TypeError, ValueError) as error:
        raise pytest.Collector.CollectError(f"{name}: mark `laws`: {error}") from error
    metafunc.parametrize("law", [_parameter(law) for law in bound])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Fail a passing test that never called its law."""
    result = yield
    law = pyfuncitem.funcargs.get("law")
    if isinstance(law, BoundLaw) and not law.calls:
        pytest.fail("the law was not checked: call law()", pytrace=False)
    return result


@pytest.fixture(params=list(FAULTS))
def faulty_endpoint(request: pytest.FixtureRequest) -> Iterator[ScriptedServer]:
    """Yield an endpoint with one failure in all responses; its ``url`` ends in /v1."""
    behavior = FAULTS[request.param]
    with ScriptedServer(lambda _: completion("4"), repeat(behavior)) as endpoint:
        yield endpoint


def _bound(
    kind: str,
    function: Any,
    *,
    examples: int = EXAMPLES,
    seed: int = 0,
    only: str | Sequence[str] = (),
    without: str | Sequence[str] = (),
    **options: Any,
) -> list[BoundLaw]:
    laws = laws_of(kind)
    check_search(examples, seed)
    laws.check_options(options)
    subject = laws.subject(function, **options)
    return [BoundLaw(law, subject, examples, seed) for law in laws.chosen(only, without)]


def _parameter(bound: BoundLaw) -> Any:
    reason = bound.law.skip(bound.subject)
    marks = () if reason is None else (pytest.mark.skip(reason=reason),)
    return pytest.param(bound, id=bound.law.name, marks=marks)
