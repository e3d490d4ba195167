"""Rewrite error messages of tyro's parser as "option: expected X, got Y"."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import takewhile

from .config import Config, DistillationConfig
from .config_values import field_names, name_of, objectives_with, options_of
from .spelling import meant

_OPTION = r"(?P<option>--[\w.-]+)"
# Options of accelerate's and torch's launchers: the trainer has none for the number of ranks.
_LAUNCHERS = ("gpus", "gpu", "num_gpus", "num_processes", "nproc_per_node", "num_machines")
_KINDS = {"INT": "a whole number", "FLOAT": "a number", "STR": "a word", "PATH": "a path"}


def reworded(said: str, words: Sequence[str], config: Config) -> str:
    """Return a tyro error as "option: expected X, got Y"; unknown messages stay as they are.

    Args:
        said: message of tyro, on one line.
        words: arguments of the command line.
        config: configuration whose fields are the options.

    Example:
        >>> wrong = "Error parsing --a.b: invalid literal for int() with base 10: 'x'"
        >>> reworded(wrong, [], Config())
        "--a.b: expected a whole number, got 'x'"
        >>> reworded("Unrecognized options: 2", ["--a.b", "1", "2"], Config())
        "--a.b 1: expected no further value, got '2'"
    """
    known = field_names(config)
    for pattern, words_of in _PATTERNS:
        if found := re.match(pattern, said):
            return words_of(found)
    unknown = re.match(r"Unrecognized options: (?P<word>[^,]*)", said)
    if unknown is None:
        return said
    word = unknown["word"]
    if not word.startswith("--"):
        return _stray(word, words, known) or said
    field = word.removeprefix("--").replace("-", "_")
    if field in known:  # a dictionary field has an option per entry, none of its own
        return f"{word}: expected its entries one by one, as {word}.NAME VALUE"
    if other := _elsewhere(field, config):
        return f"{word}: {other}"
    return said + _near(field, known)


def _elsewhere(field: str, config: Config) -> str | None:
    """Return what an option belongs to that this configuration does not have; None if nothing.

    Example:
        >>> _elsewhere("teacher.path", Config())
        'expected an option of the trainer, got one of examples/self_distillation.py'
    """
    if field in _LAUNCHERS:
        return (
            "expected an option of the trainer, got one of the launcher; give accelerate launch "
            "--num_processes N before the script"
        )
    if others := objectives_with(field, rewarded=config.objective.card.rewarded):
        name = name_of(config.objective)
        return (
            f"expected an option of {name}, got one of {', '.join(others)}; {name} has "
            f"--objective.NAME for {', '.join(options_of(config.objective)).replace('_', '-')}"
        )
    if field in field_names(DistillationConfig()) and field.startswith("teacher."):
        return "expected an option of the trainer, got one of examples/self_distillation.py"
    return None


def _stray(word: str, words: Sequence[str], known: Sequence[str]) -> str | None:
    """Return an error for a word that belongs to no option; None if the word is truncated."""
    if word not in words:  # tyro's box truncates long words
        return None
    before = list(takewhile(lambda other: other != word, words))
    start = max((i for i, other in enumerate(before) if other.startswith("--")), default=None)
    if start is None:
        field = word.removeprefix("-").replace("-", "_")
        return f"options: expected --NAME VALUE, got {word!r}{_near(field, known)}"
    return f"{' '.join(before[start:])}: expected no further value, got {word!r}"


def _near(field: str, known: Sequence[str]) -> str:
    """Return a suggestion of similar options; sections are none."""
    return option_hint(field, [name for name in known if "." in name])


def option_hint(field: str, known: Sequence[str]) -> str:
    """Return a suggestion of similar options, spelled as options.

    Args:
        field: name without dashes.
        known: names of the options.

    Example:
        >>> option_hint("training.lr", ["training.learning_rate"])
        '; perhaps --training.learning-rate'
        >>> option_hint("memry", ["memory", "training.rounds"])
        '; perhaps --memory'
    """
    found = meant(field, known)
    return f"; perhaps {' or '.join(map(_option, found))}" if found else ""


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _of_kinds(found: re.Match[str]) -> str:
    kinds = [_KINDS.get(x, x) for x in re.findall(r"\w+", found["kinds"])]
    kinds = [*(x for x in kinds if x != "None"), *(x for x in kinds if x == "None")]
    return f"{found['option']}: expected {' or '.join(kinds)}, got {found['value']}"


_PATTERNS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        rf"Missing value for argument '{_OPTION}'",
        lambda x: f"{x['option']}: expected a value, got none",
    ),
    (
        rf"Error parsing {_OPTION}: invalid literal for int\(\) with base 10: (?P<value>.*)",
        lambda x: f"{x['option']}: expected a whole number, got {x['value']}",
    ),
    (
        rf"Error parsing {_OPTION}: could not convert string to float: (?P<value>.*)",
        lambda x: f"{x['option']}: expected a number, got {x['value']}",
    ),
    (
        rf"Error parsing {_OPTION}: no type matching (?P<kinds>\S+) could be instantiated from "
        r"\[(?P<value>.*?)\]\.",
        _of_kinds,
    ),
    (rf"Error parsing {_OPTION}: (?P<rest>.*)", lambda x: f"{x['option']}: {x['rest']}"),
    (
        rf"invalid choice (?P<value>.*) for argument '{_OPTION}'\. "
        r"Expected one of \((?P<choices>.*)\)",
        lambda x: (
            f"{x['option']}: expected one of {x['choices'].replace(chr(39), '')}, got {x['value']}"
        ),
    ),
)
