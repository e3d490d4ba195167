"""``mteditflow check``: the laws of a function, as a table with the smallest failing cases."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn

from mteditflow.testing.kinds import KINDS
from mteditflow.testing.law import EXAMPLES, Law, Laws, Raised, Result, check_examples
from mteditflow.testing.signatures import SIGNATURES

HELP = {
    "signature": f"how it is called: {', '.join(SIGNATURES)}, or an adapter as module:name",
    "std": "what it divides by: group, batch, none",
    "ddof": "0: std of the population; 1: std of the sample",
    "eps": "bound of what your function adds to a std; it is not passed",
    "min_members": "smallest group that it accepts",
    "detaches": "it detaches its constants itself",
    "deterministic": "it is given rows of std 0",
    "zero": "largest absolute advantage that counts as 0 in a group of equal rewards",
    "tolerance": "relative difference that counts as rounding",
    "values": "the scores that it takes",
    "any_order": "the order of turns does not matter",
    "reads": "turns that a turn's credit depends on: later, earlier",
    "linear": "the credit of a sum of rewards is the sum of their credits",
    "level": "advantage: each reward is normalized; reward: their sum is",
    "inputs": "argument=role for each: latent, number, share, sigma, positive, log-ratio",
    "trained": "arguments that get a gradient",
    "reduction": "losses: none or mean over rows; densities: mean or sum over elements",
    "valid": "name of the mask argument; 'none' where there is none",
    "clip_low": "how far the ratio may fall below 1; 'none': nothing is clipped",
    "clip_high": "how far the ratio may rise above 1",
    "noise_level": "noise level at which it is checked",
    "marginals": "it keeps the marginals of the ODE as steps become small",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _refuse(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after ``mteditflow check``; ``None`` takes those of the process.

    Returns:
        0 where every law holds, 1 where one is broken.

    Raises:
        SystemExit: with 2 and one line for bad usage, with 0 for ``--help``.
    """
    options = vars(_parser().parse_args(arguments))
    laws: Laws[Any] = KINDS[options.pop("kind")]
    search = {name: options.pop(name) for name in ("only", "without", "examples", "seed")}
    target = options.pop("function")
    try:
        function = _load("function", target)
        signature = options.get("signature", "")
        if ":" in signature:
            options["signature"] = _load("--signature", signature)
        subject = laws.subject(function, **options)
        chosen = laws.chosen(search["only"], search["without"])
        check_examples(search["examples"])
        _try(laws, subject, next((law for law in chosen if law.skip(subject) is None), None))
    except (TypeError, ValueError) as error:
        _refuse(str(error))
    shown = getattr(getattr(subject, "convention", None), "shown", None)
    called = f", called as {shown}" if shown else ""
    sys.stdout.write(f"{len(chosen)} law{'s' * (len(chosen) != 1)} of {target}{called}\n")
    try:
        return _table(laws, laws.results(subject, **search), search["examples"])
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return 130


def _try(laws: Laws[Any], subject: Any, law: Law[Any] | None) -> None:
    """Raise ``ValueError`` where the function cannot be called in the way of its kind at all."""
    if law is None:
        return
    broken = next(iter(laws.results(subject, only=law.name, examples=1))).broken
    error = broken.got.error if broken is not None and isinstance(broken.got, Raised) else None
    if isinstance(error, (TypeError, ImportError, NameError, SystemExit)):
        raise ValueError(f"function: a call of the kind {laws.kind} raises {Raised(error)}")


def _table(laws: Laws[Any], results: Any, examples: int) -> int:
    """Print one line per law as it is checked, then the broken ones in full."""
    width = max(len(law.name) for law in laws)
    done: list[Result] = []
    for result in results:
        done.append(result)
        name, statement = result.about.name, result.about.statement
        verdict = "BROKEN" if result.broken else "skipped" if result.skipped else "holds"
        detail = f"{statement} ({result.skipped})" if result.skipped else statement
        sys.stdout.write(f"  {verdict:<7}  {name:<{width}}  {detail}\n")
        sys.stdout.flush()
    broken = [result.broken for result in done if result.broken is not None]
    for failure in broken:
        sys.stdout.write(f"\n{failure}\n")
    skipped = sum(result.skipped is not None for result in done)
    held = len(done) - len(broken) - skipped
    sys.stdout.write(
        f"\n{held} hold, {len(broken)} broken, {skipped} skipped; {examples} examples each\n"
    )
    return 1 if broken else 0


def _parser() -> _Parser:
    parser = _Parser(
        prog="mteditflow check",
        description="Check a function against the laws of its kind, and show the smallest case "
        "that breaks one. Exit code: 0 all hold, 1 a law is broken, 2 bad usage.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=_Parser)
    for name, laws in KINDS.items():
        sub = kinds.add_parser(name, help=f"{len(laws)} laws", allow_abbrev=False)
        sub.add_argument("function", metavar="MODULE:FUNCTION")
        for option in fields(laws.subject)[1:]:
            sub.add_argument(f"--{option.name.replace('_', '-')}", **_argument(option))
        sub.add_argument("--examples", type=int, default=EXAMPLES, help="cases for each law (200)")
        sub.add_argument("--seed", type=int, default=0, help="another seed draws other cases (0)")
        sub.add_argument("--only", nargs="+", default=(), metavar="LAW", help="check these alone")
        sub.add_argument("--without", nargs="+", default=(), metavar="LAW", help="leave these out")
    return parser


def _argument(option: Field[Any]) -> dict[str, Any]:
    """Return what argparse needs for an option of a subject."""
    text = HELP[option.name]
    default = option.default
    if option.name == "inputs":
        return {
            "nargs": "+",
            "required": True,
            "action": _Roles,
            "metavar": "NAME=ROLE",
            "help": text,
        }
    if default is MISSING or isinstance(default, tuple):
        kind: Callable[[str], Any] = str if default is MISSING else float
        required = default is MISSING
        return {"nargs": "+", "type": kind, "default": () if required else default,
                "action": _Tuple, "required": required, "help": text}  # fmt: skip
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction, "default": default, "help": text}
    if option.name in ("valid", "clip_low", "clip_high"):
        kind = str if option.name == "valid" else float
        return {"type": _optional(kind), "default": default, "help": f"{text} ({default})"}
    return {"type": type(default), "default": default, "help": f"{text} ({default})"}


class _Tuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


class _Roles(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        pairs = [value.partition("=") for value in values]
        if not all(name and role for name, _, role in pairs):
            parser.error(f"--inputs: expected NAME=ROLE, got {' '.join(values)}")
        setattr(namespace, self.dest, {name: role for name, _, role in pairs})


def _optional(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    value.__name__ = kind.__name__  # argparse names it in its message
    return value


def _load(option: str, target: str) -> Any:
    """Import ``module:name``; the working directory comes first, as for ``python -m``."""
    module, _, name = target.partition(":")
    if not module or not name or "/" in module or module.endswith(".py"):
        raise ValueError(f"{option}: expected MODULE:FUNCTION, got {target!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        value: Any = importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"{option}: {module} cannot be imported: {error}") from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise ValueError(f"{option}: {module} has no {name}")
        value = getattr(value, part)
    return value


def _refuse(message: str) -> NoReturn:
    """Print one line and exit with 2."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
