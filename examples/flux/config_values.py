"""Configurations from values of files and the command line, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mteditflow.objectives import (
    OBJECTIVES,
    Objective,
)

from .config import Config, ConfigError
from .spelling import hint

_Kind = TypeVar("_Kind")


def typed(values: dict[str, Any], kind: type[Config] = Config) -> Config:
    """Return the configuration of validated fields; the objective's class validates its own.

    Args:
        values: sections by name, as in a preset file or checkpoint; the objective's section has
            its "name" in addition to its fields.
        kind: class of the configuration.

    Raises:
        ConfigError: one line per wrong field.
    """
    values = dict(values)
    given = values.pop("objective", None)
    objective = {} if given is None else {"objective": _objective(given, rewarded=kind is Config)}
    try:
        return replace(_strictly(kind, values), **objective)
    except ValidationError as error:
        known = field_names(kind())
        raise ConfigError("\n".join(_in_words(x, known) for x in error.errors())) from None


def field_names(config: Config) -> list[str]:
    """Return the dotted names of all fields and sections, those of the objective included."""

    def walk(prefix: str, section: Any) -> Iterator[str]:
        for entry in fields(section):
            name, value = f"{prefix}{entry.name}", getattr(section, entry.name)
            yield name
            if is_dataclass(value):
                yield from walk(f"{name}.", value)

    return list(walk("", config))


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    """Return the cached adapter that reads and writes a class; building one is slow."""
    return TypeAdapter(kind)


def _strictly(kind: type[_Kind], values: dict[str, Any]) -> _Kind:
    """Build a dataclass from JSON or TOML values without coercion: true and "4" are not numbers.

    Raises:
        ValidationError: a value is of another type, or out of range.
    """
    # Strict validation of Python values would refuse lists for tuples and strings for paths; that
    # of JSON takes both. default=str is for dates, which TOML has and JSON does not.
    built: _Kind = _adapter(kind).validate_json(json.dumps(values, default=str), strict=True)
    return built


def dumped(config: Config) -> dict[str, Any]:
    """Return the fields as JSON values, the inverse of ``typed``."""
    values = {
        name: _adapter(type(getattr(config, name))).dump_python(getattr(config, name), mode="json")
        for name in (f.name for f in fields(config))
    }
    values["objective"] = {"name": name_of(config.objective), **values["objective"]}
    return values


def flat(config: Config) -> dict[str, Any]:
    """Return fields by dotted name, as numbers and strings only, for trackers."""

    def walk(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict) and prefix != "rewards":
                yield from walk(f"{prefix}.{name}".lstrip("."), value)
            else:
                kept = value if isinstance(value, (int, float, str)) else str(value)
                yield f"{prefix}.{name}".lstrip("."), kept

    return dict(walk("", dumped(config)))


def name_of(objective: Objective) -> str:
    """Return the name of an objective on the command line."""
    return next(name for name, kind in OBJECTIVES.items() if type(objective) is kind)


def options_of(objective: Objective) -> list[str]:
    """Return the dotted names of an objective's fields; those of a section, not the section.

    Example:
        >>> from mteditflow.objectives import GRPO
        >>> options_of(GRPO())[:2]
        ['solver', 'noise_level']
    """
    names = [x.removeprefix("objective.") for x in field_names(Config(objective=objective))
             if x.startswith("objective.")]  # fmt: skip
    return [name for name in names if not any(x.startswith(f"{name}.") for x in names)]


def objectives_with(field: str, *, rewarded: bool) -> list[str]:
    """Return the names of the objectives, with or without a reward, that have a field.

    Example:
        >>> objectives_with("objective.nft_beta", rewarded=True)
        ['nft']
    """
    return [
        name
        for name, kind in OBJECTIVES.items()
        if kind.card.rewarded == rewarded and field in field_names(Config(objective=kind()))
    ]


def _objective(given: Any, *, rewarded: bool) -> Objective:
    """Build an objective, of those with or without a reward, from its name and fields.

    Raises:
        ConfigError: there is no such name, or a field is wrong.
    """
    values = dict(given) if isinstance(given, dict) else {"name": given}
    name = values.pop("name", None)
    names = [key for key, kind in OBJECTIVES.items() if kind.card.rewarded == rewarded]
    if name not in names:
        raise ConfigError(f"objective.name: expected one of {names}, got {name!r}")
    default = OBJECTIVES[name]()
    unknown = list(_unknown_fields(default, values))
    known = [x for x in field_names(Config(objective=default)) if x.startswith("objective.")]
    if unknown:
        field = f"objective.{unknown[0]}"
        others = objectives_with(field, rewarded=rewarded)
        if others:
            raise ConfigError(
                f"{field}: expected a field of {name}, got one of {', '.join(others)}; {name} has "
                f"{', '.join(options_of(default))}"
            )
        raise ConfigError(f"{field}: {name} has no such field{hint(field, known)}")
    try:
        return _strictly(OBJECTIVES[name], values)
    except ValidationError as error:
        lines = [f"objective.{_in_words(problem, known)}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _unknown_fields(defaults: Any, values: dict[str, Any]) -> Iterator[str]:
    """Yield the dotted names that are not fields of a dataclass or of one nested in it."""
    for key, value in values.items():
        inner = getattr(defaults, key, None) if isinstance(key, str) else None
        if key not in {f.name for f in fields(defaults)}:
            yield str(key)
        elif is_dataclass(inner) and isinstance(value, dict):
            yield from (f"{key}.{name}" for name in _unknown_fields(inner, value))


def _in_words(error: Any, known: Sequence[str]) -> str:
    """Return a pydantic error as one line: field, expectation, value, and a similar field name."""
    name, what = ".".join(map(str, error["loc"])), error["msg"]
    if error["type"] == "value_error":  # raised by mteditflow: names field and value itself
        return f"{name}.{what.removeprefix('Value error, ')}".removeprefix(".")
    near = hint(name, known) if error["type"] == "unexpected_keyword_argument" else ""
    return f"{name}: {what[0].lower()}{what[1:]}, got {error['input']!r}{near}".removeprefix(": ")
