"""Laws: properties that a function must have, searched for a smallest counterexample.

A law draws cases with hypothesis, calls the function under test and raises ``LawBroken`` where the
property fails. Hypothesis shrinks the case, so the message shows the smallest one it found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.strategies import DataObject
from torch import Tensor

S = TypeVar("S")
T = TypeVar("T")
EXAMPLES = 200


class About(NamedTuple):
    """Words on a law.

    Attributes:
        name: words joined by hyphens, as in a test id.
        statement: the property, one sentence.
        why: what goes wrong in training where it does not hold, one sentence.
    """

    name: str
    statement: str
    why: str


class Raised(NamedTuple):
    """Exception of the function under test.

    Attributes:
        error: the exception.
    """

    error: BaseException

    def __str__(self) -> str:
        first = str(self.error).strip().partition("\n")[0]
        return f"the exception {type(self.error).__name__}{': ' * bool(first)}{first}"


class LawBroken(AssertionError):  # noqa: N818  (says what happened, as AssertionError does)
    """A function breaks a law.

    Attributes:
        law: name of the law, "" until it is known.
        case: arguments of the smallest failing case, by name.
        expected: what the law demands.
        got: what the function returned or raised.
    """

    def __init__(
        self, case: Mapping[str, object], expected: object, got: object, about: About | None = None
    ) -> None:
        self.law = about.name if about else ""
        self.case, self.expected, self.got = dict(case), expected, got
        lines = [f"{about.name}: {about.statement}"] if about else []
        lines += [f"  {name} = {_text(value)}" for name, value in self.case.items()]
        lines += [f"  expected {_text(expected)}", f"  got      {_text(got)}"]
        lines += [f"  Why it matters: {about.why}"] if about else []
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Law(Generic[S]):
    """A property of one kind of function.

    Attributes:
        about: name, statement, and why it matters.
        holds: draws a case, calls the function and raises ``LawBroken``.
        skip: returns why the law does not apply to a function, or ``None``.
    """

    about: About
    holds: Callable[[S, DataObject], None]
    skip: Callable[[S], str | None]

    @property
    def name(self) -> str:
        """Words joined by hyphens, as in a test id."""
        return self.about.name

    def check(self, subject: S, *, examples: int = EXAMPLES, seed: int = 0) -> None:
        """Search for a counterexample.

        Args:
            subject: function under test, wrapped as the law's kind expects.
            examples: number of cases to draw.
            seed: the cases are the same for the same seed, number of examples and hypothesis.

        Raises:
            LawBroken: a case was found; the message has the smallest one.
            ValueError: ``examples`` is not positive, or the law does not apply.
        """
        __tracebackhide__ = True  # pytest shows the message alone
        check_examples(examples)
        reason = self.skip(subject)
        if reason is not None:
            raise ValueError(f"{self.name} does not apply: {reason}")
        try:
            _search(self.holds, subject, examples, seed)
        except Flaky:
            got = "another one: it depends on earlier calls, or on random numbers of its own"
            raise LawBroken({}, "one result for one case", got, self.about) from None
        except LawBroken as broken:
            raise LawBroken(broken.case, broken.expected, broken.got, self.about) from None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Result:
    """Outcome of one law.

    Attributes:
        about: name, statement, and why it matters.
        broken: the counterexample, ``None`` where the law holds.
        skipped: why it does not apply, ``None`` where it does.
    """

    about: About
    broken: LawBroken | None = None
    skipped: str | None = None


def check_examples(examples: int) -> None:
    """Raise ``ValueError`` unless there is a case to draw."""
    if examples < 1:
        raise ValueError(f"examples: expected an integer >= 1, got {examples}")


class Laws(Generic[S]):
    """All laws of one kind of function, in the order in which they were declared.

    Args:
        kind: name of the kind.
        subject: class that wraps a function of this kind, with its options.
        shared: laws of a wider kind that hold too.
    """

    def __init__(self, kind: str, subject: type[S], shared: Iterable[Law[S]] = ()) -> None:
        self.kind, self.subject = kind, subject
        self._laws = {law.name: law for law in shared}

    def __iter__(self) -> Iterator[Law[S]]:
        return iter(self._laws.values())

    def __len__(self) -> int:
        return len(self._laws)

    def __getitem__(self, name: str) -> Law[S]:
        if name not in self._laws:
            raise ValueError(f"law: expected one of {', '.join(self._laws)}, got {name!r}")
        return self._laws[name]

    def law(
        self, *, why: str, skip: Callable[[S], str | None] | None = None
    ) -> Callable[[Callable[[S, DataObject], None]], Callable[[S, DataObject], None]]:
        """Declare a law: its name is that of the decorated function, its docstring the statement.

        Args:
            why: what goes wrong in training where the law does not hold, one sentence.
            skip: returns why the law does not apply to a function, or ``None``.
        """

        def declare(holds: Callable[[S, DataObject], None]) -> Callable[[S, DataObject], None]:
            statement = " ".join((holds.__doc__ or "").split())
            about = About(holds.__name__.replace("_", "-"), statement, why)
            self._laws[about.name] = Law(about, holds, skip or (lambda _: None))
            return holds

        return declare

    def through(self, view: Callable[[T], S]) -> list[Law[T]]:
        """Return these laws for another kind of subject, which ``view`` maps to this one."""

        def seen(law: Law[S]) -> Law[T]:
            return Law(
                law.about,
                lambda subject, data: law.holds(view(subject), data),
                lambda subject: law.skip(view(subject)),
            )

        return [seen(law) for law in self]

    def results(
        self,
        subject: S,
        *,
        only: str | Sequence[str] = (),
        without: str | Sequence[str] = (),
        examples: int = EXAMPLES,
        seed: int = 0,
    ) -> Iterator[Result]:
        """Yield the outcome of each law.

        Args:
            subject: function under test, wrapped as the kind expects.
            only: names of laws to check; empty means all.
            without: names of laws to leave out.
            examples: cases per law.
            seed: as in ``Law.check``.

        Raises:
            ValueError: a name is not that of a law.
        """
        for law in self.chosen(only, without):
            reason = law.skip(subject)
            broken = None
            if reason is None:
                try:
                    law.check(subject, examples=examples, seed=seed)
                except LawBroken as error:
                    broken = error
            yield Result(law.about, broken, reason)

    def check(self, subject: S, **options: Any) -> None:
        """Check all laws that apply; options are those of ``results``.

        Raises:
            LawBroken: one law fails.
            AssertionError: several fail; the message has each.
        """
        __tracebackhide__ = True
        found = [r.broken for r in self.results(subject, **options) if r.broken is not None]
        if len(found) == 1:
            raise found[0]
        if found:
            raise AssertionError("\n".join([f"{len(found)} laws are broken", *map(str, found)]))

    def chosen(
        self, only: str | Sequence[str] = (), without: str | Sequence[str] = ()
    ) -> list[Law[S]]:
        """Return laws by name, in order of declaration.

        Args:
            only: names, or one name; empty means all.
            without: names, or one name, to leave out.

        Raises:
            ValueError: a name is not that of a law, or none is left.
        """
        only, without = ((x,) if isinstance(x, str) else tuple(x) for x in (only, without))
        names = {self[name].name for name in only} or set(self._laws)
        names -= {self[name].name for name in without}
        if not names:
            raise ValueError("only, without: expected at least one law that is left, got none")
        return [law for law in self if law.name in names]


def call(
    function: Callable[..., Any], case: Mapping[str, object], *args: Any, **kwargs: Any
) -> Any:
    """Call the function under test; what it raises on a sound case breaks the law."""
    __tracebackhide__ = True
    try:
        return function(*args, **kwargs)
    except (Exception, SystemExit) as error:
        fail(case, "a result", Raised(error))


@contextmanager
def other_defaults(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Set torch's default dtype, and its default device to one without memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def expect_memory(result: object, case: Mapping[str, object]) -> None:
    """Fail where a result is on the default device of ``other_defaults``."""
    if isinstance(result, Tensor) and result.is_meta:
        fail(case, "a result on the device of the arguments", "one on the default device")


def refuses(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Return whether a call raises ``TypeError`` or ``ValueError``."""
    try:
        function(*args, **kwargs)
    except (TypeError, ValueError):
        return True
    except Exception:  # any other failure shows in a call whose result is needed
        return False
    return False


def fail(
    case: Mapping[str, object], expected: object, got: object, about: About | None = None
) -> NoReturn:
    """Raise ``LawBroken``."""
    __tracebackhide__ = True
    raise LawBroken(case, expected, got, about)


def expect_close(
    got: Tensor,
    expected: Tensor,
    case: Mapping[str, object],
    *,
    tolerance: float,
    about: About | None = None,
) -> None:
    """Fail unless shapes agree, and values within ``tolerance * max(1, |expected|)``.

    NaN equals NaN: whether a result may be NaN is the subject of laws of its own.
    """
    __tracebackhide__ = True
    if got.shape != expected.shape:
        fail(case, f"shape {list(expected.shape)}", f"shape {list(got.shape)}", about)
    got_, expected_ = got.detach().double(), expected.detach().double()
    allowed = tolerance * expected_.abs().clamp(min=1)
    same = (got_ == expected_) | ((got_ - expected_).abs() <= allowed)
    same |= got_.isnan() & expected_.isnan()
    if not bool(same.all()):
        fail(case, expected, got, about)


def _search(holds: Callable[[S, DataObject], None], subject: S, examples: int, start: int) -> None:
    @seed(start)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def search(data: DataObject) -> None:
        holds(subject, data)

    search()


def _text(value: object) -> str:
    """Return a value as a short literal."""
    if isinstance(value, Tensor):
        numbers = repr(value.detach().cpu().tolist())
        plain = value.dtype in (torch.float64, torch.int64, torch.bool)
        return numbers if plain else f"{numbers} ({str(value.dtype).removeprefix('torch.')})"
    if isinstance(value, (Raised, str)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if callable(value) and not inspect.isclass(value):
        return getattr(value, "__qualname__", repr(value))
    return repr(value)
