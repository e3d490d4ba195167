"""The command line: a preset or a TOML file, then an objective and fields that override it."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, make_dataclass, replace
from itertools import takewhile
from pathlib import Path

import tyro

from mteditflow._exits import BAD_INPUT, refuse
from mteditflow._pipes import reader_may_leave
from mteditflow._spelling import perhaps
from mteditflow.objectives import OBJECTIVES, Objective

from .config import Config, ConfigError
from .config_values import dumped, name_of, typed
from .field_help import with_help
from .parser_errors import reworded
from .soundness import checked

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"
HELP = ("-h", "--help")
WEIGHT = "--rewards.weights."
# tyro draws boxes around errors, in ASCII where the terminal has no Unicode.
STYLE, RULE = re.compile(r"\x1b\[[0-9;]*m"), re.compile(r"[-─]{4}")
FRAME = re.compile(r"^\s*[│╭╰|+]|[│╮╯|+]\s*$")


def parse_or_exit(
    arguments: Sequence[str], kind: type[Config] = Config, *, services: bool = True
) -> Config:
    """Parse the command line as ``parse`` does, and exit with one line if it is wrong.

    Raises:
        SystemExit: code 2 if the command line is wrong or empty, 0 after printing help.
    """
    try:
        with reader_may_leave():
            return parse(arguments, kind, services=services)
    except ConfigError as error:
        refuse("; ".join(str(error).splitlines()))
    sys.exit(0)  # only reached if the reader of the help closed the pipe, as in help | head


def parse(
    arguments: Sequence[str], kind: type[Config] = Config, *, services: bool = True
) -> Config:
    """Parse the command line: a preset's name or a TOML file, then fields that override it.

    Args:
        arguments: such as ``["kontext-nft", "objective:awm", "--objective.clip-low", "1e-3"]``.
        kind: class of the configuration.
        services: whether a judge or scorer is required.

    Raises:
        ConfigError: the command line cannot be parsed; or a field is out of range, has no effect,
            or conflicts with another.
        SystemExit: ``arguments`` is empty or asks for help.
    """
    words = list(arguments)
    if not words or words[0] in HELP:
        print(overview(kind))
        sys.exit(0 if words else BAD_INPUT)
    base = _preset(words[0], kind)
    chosen = [word for word in words[1:] if word.startswith("objective:")]
    rest = [word for word in words[1:] if word not in chosen]
    base = _with_terms(base, rest)
    if len(chosen) > 1:
        raise ConfigError(f"objective: expected one, got {' and '.join(chosen)}")
    if chosen:
        base = replace(base, objective=_other_objective(base.objective, chosen[0], kind))
    asked = next((place for place, word in enumerate(rest) if word in HELP), None)
    if asked is not None:
        sections = (*_plain_words(rest[:asked]), *_plain_words(rest[asked + 1 :]))
        _help(words[0], base, sections)
    return checked(typed(dumped(_with_fields(base, rest)), kind), base, services=services)


def _with_terms(base: Config, words: Sequence[str]) -> Config:
    """Return a preset with weight 0 for each new reward on the command line.

    tyro parses only options of keys that the default dictionary has.
    """
    named = [word.removeprefix(WEIGHT).partition("=")[0] for word in words if WEIGHT in word]
    weights = dict.fromkeys(named, 0.0) | base.rewards.weights
    return replace(base, rewards=replace(base.rewards, weights=weights))


def _with_fields(base: Config, words: Sequence[str]) -> Config:
    """Return a configuration with the fields of the command line in place of its own.

    Raises:
        ConfigError: the arguments cannot be parsed.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            return tyro.cli(
                type(base),
                default=base,
                args=words,
                # The objective's class is chosen before, so its union needs no subcommands.
                config=(tyro.conf.AvoidSubcommands,),
                add_help=False,
            )
    except SystemExit as error:
        wrong = reworded(_in_a_line(said.getvalue()), words, base)
        raise ConfigError(wrong) from error


def _in_a_line(box: str) -> str:
    """Return the first message in an error box of tyro, without frame, title and rules."""
    lines = [FRAME.sub("", STYLE.sub("", line)).strip() for line in box.splitlines()]
    parts = [[]]
    for line in lines[1:]:
        if RULE.match(line):
            parts.append([])
        elif line:
            parts[-1].append(line)
    return " ".join(" ".join(next(part for part in parts if part)).split())


def overview(kind: type[Config]) -> str:
    """Return the help page of the command without a preset."""
    program = Path(sys.argv[0]).name
    presets = "\n".join(
        f"  {path.stem:<20} {_about(path.read_text(encoding='utf-8'))}"
        for path in sorted(PRESETS.glob("*.toml"))
    )
    lines = [
        f"usage: {program} PRESET|FILE.toml [objective:NAME] [--SECTION.FIELD VALUE ...]",
        "",
        str(kind.__doc__),
        "",
        "presets",
        presets,
    ]
    lines += ["", "objectives, over a preset of the same kind"]
    for name, objective in OBJECTIVES.items():
        if objective.card.rewarded == (kind is Config):
            lines.append(f"  {f'objective:{name}':<20} {_summary(objective)}")
    lines += [
        "",
        "sections, listed by PRESET --help SECTION",
        *_sections(kind),
        "",
        f"example: {program} kontext-nft --help objective",
    ]
    return "\n".join(lines)


def _sections(kind: type[Config]) -> list[str]:
    """Return a line for each section."""
    return [f"  {f.name:<20} {_summary(type(getattr(kind(), f.name)))}" for f in fields(kind)]


def _summary(kind: type) -> str:
    return str(kind.__doc__).partition("\n")[0]


def _about(text: str) -> str:
    """Return the first comment of a preset."""
    return text.partition("\n")[0].removeprefix("#").strip()


def _plain_words(words: Sequence[str]) -> Iterator[str]:
    """Return the words before the first option."""
    return takewhile(lambda word: not word.startswith("-"), words)


def _help(preset: str, config: Config, wanted: Sequence[str]) -> None:
    """Print the sections of a preset, or the fields of some sections with their values; exit.

    Raises:
        ConfigError: a section does not exist.
        SystemExit: code 0, after the help.
    """
    sections = {f.name: getattr(config, f.name) for f in fields(config)}
    unknown = [name for name in wanted if name not in sections]
    if unknown:
        raise ConfigError(f"--help: expected a section among {list(sections)}, got {unknown[0]!r}")
    program = f"{Path(sys.argv[0]).name} {preset}"
    if not wanted:
        print(f"{program}: sections, listed by --help SECTION")
        print("\n".join(f"  {name:<12} {_summary(type(x))}" for name, x in sections.items()))
        sys.exit(0)
    shown = [(name, with_help(sections[name])) for name in wanted]
    tyro.cli(make_dataclass("Fields", shown), args=["--help"], prog=program)


def _preset(name: str, kind: type[Config]) -> Config:
    """Read a preset by name, or a TOML file by path.

    Raises:
        ConfigError: the preset does not exist, or the file cannot be read.
    """
    path = Path(name) if name.endswith(".toml") else PRESETS / f"{name}.toml"
    names = [path.stem for path in sorted(PRESETS.glob("*.toml"))]
    if not name.endswith(".toml") and name not in names:
        near = perhaps(name, names)
        raise ConfigError(f"preset: expected one of {names} or a .toml file, got {name!r}{near}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        if kind is not Config:  # its objective is the program's own
            values.pop("objective", None)
        return typed(values, kind)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError:
        raise ConfigError(f"{path}: expected fields, got too many tables in each other") from None
    except ValueError as error:  # bad TOML or UTF-8, or an integer of over 4,300 digits
        raise ConfigError(f"{path}: {error}") from error


def _other_objective(before: Objective, word: str, program: type[Config]) -> Objective:
    """Return another objective of the same kind; fields that both have keep their values.

    Raises:
        ConfigError: the objective does not exist, or is of another kind.
    """
    name = word.removeprefix("objective:")
    # The family is the direct base class, such as ForwardObjective or ReplayObjective.
    family, rewarded = type(before).__mro__[1], program is Config
    fitting = [
        n for n, c in OBJECTIVES.items() if c.card.rewarded == rewarded and issubclass(c, family)
    ]
    if name not in fitting:
        raise ConfigError(f"objective: expected one of {fitting} over this preset, got {name!r}")
    if name == name_of(before):
        return before
    own = {f.name for f in fields(OBJECTIVES[name])}  # type: ignore[arg-type]
    shared = {f.name: getattr(before, f.name) for f in fields(before) if f.name in own}  # type: ignore[arg-type]
    if OBJECTIVES[name].whole_kl:
        shared.pop("kl_share", None)
    return OBJECTIVES[name](**shared)
