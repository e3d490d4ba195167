"""Laws: properties that a function must have, checked by a search for counterexamples.

A law draws cases with hypothesis, calls the function under test, and raises ``LawBroken`` if the
property fails. Hypothesis shrinks the case, so the message has the smallest one that it found.
Under a hypothesis profile without ``Phase.shrink`` it has the first one instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, HypothesisException
from hypothesis.strategies import DataObject
from torch import Tensor

from mteditflow.testing.options import Subject, check_integer
from mteditflow.testing.reports import OtherSize, Raised, Returned, located, other_shape, text

S = TypeVar("S")
T = TypeVar("T")
EXAMPLES = 200
#: Options of every search.
SEARCH = ("only", "without", "examples", "seed")


class About(NamedTuple):
    """Description of a law.

    Attributes:
        name: words joined by hyphens, as in a test id.
        statement: the property, one sentence.
        why: consequence for training if the law does not hold, one sentence.
    """

    name: str
    statement: str
    why: str


class LawBroken(AssertionError):  # noqa: N818  (says what happened, as AssertionError does)
    """A function breaks a law.

    Attributes:
        law: name of the law; "" until ``Law.check`` sets it.
        case: arguments of the smallest failing case, by name.
        expected: result or property that the law requires.
        got: result or exception of the function.
        wrong: True at wrong entries of the result; ``None`` if no entry can be named.
    """

    def __init__(
        self,
        case: Mapping[str, object],
        expected: object,
        got: object,
        about: About | None = None,
        *,
        wrong: Tensor | None = None,
        switch: str = "",
    ) -> None:
        self.law = about.name if about else ""
        self.case, self.expected, self.got, self.wrong = dict(case), expected, got, wrong
        lines = [f"{about.name}: {about.statement}"] if about else []
        lines += [f"  {name} = {text(value)}" for name, value in self.case.items()]
        lines += [f"  expected {text(expected)}", f"  got      {text(got)}"]
        lines += located(self.case, expected, got, wrong)
        lines += [f"  Why it matters: {about.why}"] if about else []
        lines += [f"  {switch}"] if switch else []
        super().__init__("\n".join(lines))

    @property
    def cause(self) -> str:
        """Key of an exception or wrong type that several laws share; "" for wrong numbers."""
        return (
            str(self.got)
            if isinstance(self.got, Raised)
            else type(self.got).__name__ * (isinstance(self.got, Returned))
        )


@dataclass(frozen=True)
class Law(Generic[S]):
    """A property of one kind of function.

    Attributes:
        about: name, statement, and why it matters.
        holds: draws a case, calls the function and raises ``LawBroken``.
        skip: returns the reason why the law does not apply to a function, or ``None``.
        first: a form of ``holds`` with milder cases, searched before with half as many examples;
            ``None``: there is none. If it is broken, ``holds`` draws nothing.
        options: options of the command that describe functions for which the law differs.
    """

    about: About
    holds: Callable[[S, DataObject], None]
    skip: Callable[[S], str | None]
    first: Callable[[S, DataObject], None] | None = None
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Words joined by hyphens, as in a test id."""
        return self.about.name

    @property
    def switch(self) -> str:
        """How to leave the law out, or to check another form of it; the last line of a report."""
        options = ", ".join(self.options)
        described = f"Describe it by {options}, or leave" if options else "Leave"
        return f"Not a property of your function? {described} the law out: --without {self.name}"

    def check(self, subject: S, *, examples: int = EXAMPLES, seed: int = 0) -> None:
        """Search for a counterexample.

        Args:
            subject: function under test, wrapped as the law's kind expects.
            examples: number of cases to draw.
            seed: seed of the search; equal seeds, examples and hypothesis versions draw the same
                cases.

        Raises:
            LawBroken: a counterexample was found; the message has the smallest one, or the first
                one if the active hypothesis profile leaves out ``Phase.shrink``.
            ValueError: ``examples`` is not positive, or the law does not apply.
        """
        __tracebackhide__ = True  # pytest shows the message alone
        check_search(examples, seed)
        reason = self.skip(subject)
        if reason is not None:
            raise ValueError(f"{self.name} does not apply: {reason}")
        try:
            if self.first is not None:
                _search(self.first, subject, (examples + 1) // 2, seed)
            _search(self.holds, subject, examples, seed)
        except Flaky:
            got = "another one: it depends on earlier calls, or on random numbers of its own"
            raise LawBroken({}, "one result for one case", got, self.about) from None
        except LawBroken as broken:
            raise LawBroken(
                broken.case, broken.expected, broken.got, self.about, wrong=broken.wrong,
                switch=self.switch,
            ) from None  # fmt: skip

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Result:
    """Outcome of one law.

    Attributes:
        about: name, statement, and why it matters.
        broken: the counterexample; ``None`` if the law holds.
        skipped: reason why the law does not apply; ``None`` if it does.
    """

    about: About
    broken: LawBroken | None = None
    skipped: str | None = None


def check_search(examples: object, seed: object) -> None:
    """Raise unless ``examples`` is an integer >= 1 and ``seed`` one >= 0."""
    check_integer("examples", examples, low=1)
    check_integer("seed", seed, low=0)


def report(broken: Sequence[LawBroken]) -> str:
    """Return the failures as text; an exception or wrong type of several laws appears once."""
    shared: dict[str, list[LawBroken]] = {}
    for failure in broken:
        shared.setdefault(failure.cause or failure.law, []).append(failure)
    texts = []
    for one, *others in shared.values():
        laws = ", ".join(failure.law for failure in (one, *others))
        alone = LawBroken(one.case, one.expected, one.got)
        texts.append(f"{len(others) + 1} laws break in one way: {laws}\n{alone}" if others else one)
    return "\n\n".join(map(str, texts))


class Laws(Generic[S]):
    """All laws of one kind of function, in order of declaration.

    Args:
        kind: name of the kind.
        subject: class that wraps a function of this kind, with its options.
        shared: laws of a more general kind that also apply.
        called: calling convention and result of this kind, as text.
    """

    def __init__(
        self, kind: str, subject: type[S], shared: Iterable[Law[S]] = (), *, called: str = ""
    ) -> None:
        self.kind, self.subject, self.called = kind, subject, called
        self._laws = {law.name: self._own_options(law) for law in shared}

    def _own_options(self, law: Law[S]) -> Law[S]:
        """Return a law of a more general kind, without options that this kind does not have."""
        known = {option.name.replace("_", "-") for option in fields(self.subject)}  # type: ignore[arg-type]
        own = [x for x in law.options if x.removeprefix("--").removeprefix("no-") in known]
        return replace(law, options=tuple(own))

    def __iter__(self) -> Iterator[Law[S]]:
        return iter(self._laws.values())

    def __len__(self) -> int:
        return len(self._laws)

    def __getitem__(self, name: str) -> Law[S]:
        if name not in self._laws:
            raise ValueError(f"law: expected one of {', '.join(self._laws)}, got {name!r}")
        return self._laws[name]

    def law(
        self,
        *,
        why: str,
        skip: Callable[[S], str | None] | None = None,
        first: Callable[[S, DataObject], None] | None = None,
        options: tuple[str, ...] = (),
    ) -> Callable[[Callable[[S, DataObject], None]], Callable[[S, DataObject], None]]:
        """Return a decorator that declares a law, named and stated by its function and docstring.

        Args:
            why: consequence for training if the law does not hold, one sentence.
            skip: returns the reason why the law does not apply to a function, or ``None``.
            first: a form with milder cases, as in ``Law``.
            options: options that describe functions for which the law differs, as in ``Law``.
        """

        def declare(holds: Callable[[S, DataObject], None]) -> Callable[[S, DataObject], None]:
            statement = " ".join((holds.__doc__ or "").split())
            about = About(holds.__name__.replace("_", "-"), statement, why)
            self._laws[about.name] = Law(about, holds, skip or (lambda _: None), first, options)
            return holds

        return declare

    def through(self, view: Callable[[T], S]) -> list[Law[T]]:
        """Return these laws for another kind of subject, which ``view`` converts to this one."""

        def seen(law: Law[S]) -> Law[T]:
            first = law.first
            return Law(
                law.about,
                lambda subject, data: law.holds(view(subject), data),
                lambda subject: law.skip(view(subject)),
                None if first is None else (lambda subject, data: first(view(subject), data)),
                law.options,
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
            TypeError: an option has another type, or the function does not fit the kind: it
                does not accept the arguments, or its result has a type that no law can read.
            ValueError: a name is not that of a law, or none of the laws applies.
        """
        check_search(examples, seed)
        chosen = self.chosen(only, without)
        reasons = [law.skip(subject) for law in chosen]
        if all(reason is not None for reason in reasons):
            why = "; ".join(f"{law}: {reason}" for law, reason in zip(chosen, reasons, strict=True))
            raise ValueError(f"only, without: expected a law that applies, got {why}")
        self._try(subject)
        return self._results(chosen, subject, examples, seed)

    def _results(
        self, chosen: Iterable[Law[S]], subject: S, examples: int, seed: int
    ) -> Iterator[Result]:
        for law in chosen:
            reason = law.skip(subject)
            broken = None
            if reason is None:
                try:
                    law.check(subject, examples=examples, seed=seed)
                except LawBroken as error:
                    broken = error
            yield Result(law.about, broken, reason)

    def _try(self, subject: S) -> None:
        """Raise if one call shows that the function is not of this kind, or cannot run.

        Otherwise a wrong signature would appear as many broken laws.
        """
        misfit = subject.misfit() if isinstance(subject, Subject) else None
        if misfit is not None:
            raise ValueError(misfit)
        law = next(law for law in self if law.skip(subject) is None)
        try:
            law.check(subject, examples=1)
        except LawBroken as broken:
            got = broken.got
            if isinstance(got, Raised) and (
                got.of_the_call or isinstance(got.error, (ImportError, NameError, SystemExit))
            ):
                raise TypeError(f"function: a call of the kind {self.kind} raises {got}") from None
            if isinstance(got, Returned) and not isinstance(got, OtherSize):
                raise TypeError(f"function: expected {text(broken.expected)}, got {got}") from None

    def check(self, subject: S, **options: Any) -> None:
        """Check all laws that apply, with the options of ``results``.

        Raises:
            LawBroken: one law fails.
            AssertionError: several fail; the message has each.
            TypeError: an option is unknown, or as in ``results``.
            ValueError: as in ``results``.
        """
        __tracebackhide__ = True
        self.check_options(options)
        found = [r.broken for r in self.results(subject, **options) if r.broken is not None]
        if len(found) == 1:
            raise found[0]
        if found:
            raise AssertionError(f"{len(found)} laws are broken\n{report(found)}")

    def check_options(self, given: Iterable[str]) -> None:
        """Raise ``TypeError`` for a keyword that is no option of this kind or of a search."""
        known = [option.name for option in fields(self.subject)[1:]]  # type: ignore[arg-type]
        for name in given:
            if name not in (*known, *SEARCH):
                expected = ", ".join([*known, *SEARCH])
                raise TypeError(f"options: expected some of {expected}, got {name!r}")

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
        only, without = (
            (x,) if isinstance(x, str) or not isinstance(x, Iterable) else tuple(x)
            for x in (only, without)
        )
        names = {self[name].name for name in only} or set(self._laws)
        names -= {self[name].name for name in without}
        if not names:
            raise ValueError("only, without: expected at least one law that is left, got none")
        return [law for law in self if law.name in names]


def call(
    function: Callable[..., Any], case: Mapping[str, object], *args: Any, **kwargs: Any
) -> Any:
    """Call the function under test; an exception on a valid case breaks the law."""
    __tracebackhide__ = True
    try:
        return function(*args, **kwargs)
    except LawBroken:
        raise
    except (Exception, SystemExit) as error:
        fail(case, "a result", Raised(error))


@contextmanager
def other_defaults(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Set torch's default dtype, and the default device to "meta", which has no memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    # A tensor made inside without an explicit device has no memory, so its use raises.
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def expect_memory(result: object, case: Mapping[str, object]) -> None:
    """Fail if a result is on the default device of ``other_defaults``."""
    if isinstance(result, Tensor) and result.is_meta:
        fail(case, "a result on the device of the arguments", "one on the default device")


def refuses(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Return whether a call raises an exception other than a mismatch with its signature."""
    try:
        function(*args, **kwargs)
    except LawBroken:  # raised by a signature's adapter, on the result of a completed call
        return False
    except (Exception, SystemExit) as error:
        return not Raised(error).of_the_call
    return False


def fail(
    case: Mapping[str, object],
    expected: object,
    got: object,
    about: About | None = None,
    *,
    wrong: Tensor | None = None,
) -> NoReturn:
    """Raise ``LawBroken``; ``wrong`` is True at wrong entries of the result."""
    __tracebackhide__ = True
    raise LawBroken(case, expected, got, about, wrong=wrong)


def expect_close(
    got: Tensor,
    expected: Tensor,
    case: Mapping[str, object],
    *,
    tolerance: float,
    about: About | None = None,
) -> None:
    """Fail unless shapes are equal, and values within ``tolerance * max(1, |expected|)``.

    NaN equals NaN; separate laws check whether a result may be NaN.
    """
    __tracebackhide__ = True
    if got.shape != expected.shape:
        got_shape = other_shape(got.shape, expected.shape)
        fail(case, f"shape {list(expected.shape)}", got_shape, about)
    got_, expected_ = got.detach().double(), expected.detach().double()
    allowed = tolerance * expected_.abs().clamp(min=1)
    same = (got_ == expected_) | ((got_ - expected_).abs() <= allowed)
    same |= got_.isnan() & expected_.isnan()
    if not bool(same.all()):
        fail(case, expected, got, about, wrong=~same)


def _search(holds: Callable[[S, DataObject], None], subject: S, examples: int, start: int) -> None:
    @seed(start)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,  # no example of earlier runs, so that equal seeds draw equal cases
        print_blob=False,
        report_multiple_bugs=False,
        phases=_phases(),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def search(data: DataObject) -> None:
        try:
            holds(subject, data)
        except (LawBroken, HypothesisException):
            raise
        except Exception as error:  # outside `call`: the law could not process a result
            fail({}, "a result that the law can read", Raised(error))

    search()


def _phases() -> tuple[Phase, ...]:
    """Return the phases of a search, without shrinking if the active profile leaves it out."""
    shrinks = Phase.shrink in settings().phases
    return (Phase.generate, Phase.shrink) if shrinks else (Phase.generate,)
