"""``mteditflow check``: check the laws of a function; print a table and smallest failing cases."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn

from mteditflow._spelling import perhaps
from mteditflow.testing.kinds import KINDS
from mteditflow.testing.law import EXAMPLES, SEARCH, Laws, Result
from mteditflow.testing.signatures import SIGNATURES

HELP = {
    "signature": f"calling convention: {', '.join(SIGNATURES)}, or an adapter as module:name",
    "std": "divisor of advantages, a std: group, batch, none",
    "ddof": "0: std of the population; 1: std of the sample",
    "eps": "upper bound of the constant that the function adds to a std; it is not passed",
    "min_members": "smallest group that the function accepts",
    "detaches": "it detaches constants or rewards itself",
    "float32": "half-precision inputs give the float32 result; losses and densities in float32",
    "deterministic": "the function is called with rows of std 0, too",
    "zero": "largest absolute advantage that counts as 0 in a group of equal rewards",
    "tolerance": "relative difference that counts as rounding",
    "values": "scores that the function accepts, two or more",
    "any_order": "the order of turns does not matter",
    "reads": "turns that a turn's credit depends on: later, earlier",
    "linear": "the credit of a sum of rewards is the sum of their credits",
    "level": "normalized quantity; advantage: each reward; reward: their weighted sum",
    "inputs": "argument=role for each: latent, number, share, sigma, positive, log-ratio",
    "trained": "arguments that get a gradient",
    "reduction": "losses: none or mean over rows; densities: mean or sum over elements",
    "valid": "name of the mask argument; none: there is no mask",
    "clip_low": "largest decrease of the ratio below 1; none: no clipping",
    "clip_high": "largest increase of the ratio above 1; none: no clipping",
    "noise_level": "noise level of the checked steps",
    "marginals": "the solver keeps the marginals of the ODE as steps become small",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: --"):
            word = message.split()[2].partition("=")[0]
            options = (f"--{name.replace('_', '-')}" for name in (*HELP, *SEARCH))
            message += perhaps(word, options)
        _refuse(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: arguments after ``mteditflow check``; ``None``: those of the process.

    Returns:
        0 if every law holds, 1 if one is broken, 130 if interrupted.

    Raises:
        SystemExit: code 2 and one line for bad usage, code 0 after ``--help``.
    """
    options = vars(_parser().parse_args(arguments))
    laws: Laws[Any] = KINDS[options.pop("kind")]
    search = {name: options.pop(name) for name in SEARCH}
    target = options.pop("function")
    if not faulthandler.is_enabled():
        with suppress(OSError, RuntimeError, ValueError):  # stderr may be no file
            faulthandler.enable()  # a crash in native code shows the line that called it
    try:
        function = _load("function", target)
        signature = options.get("signature", "")
        if ":" in signature:
            options["signature"] = _load("--signature", signature)
        subject = laws.subject(function, **options)
        results = laws.results(subject, **search)
        called = getattr(getattr(subject, "convention", None), "shown", laws.called)
        count = len(laws.chosen(search["only"], search["without"]))
        sys.stdout.write(f"{count} law{'s' * (count != 1)} of {target}, called as {called}\n")
        return _table(laws, results, search["examples"])
    except (TypeError, ValueError) as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return 130


def _table(laws: Laws[Any], results: Any, examples: int) -> int:
    """Print one line per law as soon as it is checked, a broken one with its case.

    An exception or wrong type that several laws share is printed once.
    """
    width = max(len(law.name) for law in laws)
    done: list[Result] = []
    shared: dict[str, list[str]] = {}
    for result in results:
        done.append(result)
        name, statement = result.about.name, result.about.statement
        verdict = "BROKEN" if result.broken else "skipped" if result.skipped else "holds"
        detail = f"{statement} ({result.skipped})" if result.skipped else statement
        sys.stdout.write(f"  {verdict:<7}  {name:<{width}}  {detail}\n")
        if result.broken is not None:
            alike = shared.setdefault(result.broken.cause or name, [])
            alike.append(name)
            if len(alike) == 1:
                sys.stdout.write(f"\n{result.broken}\n\n")
            else:
                sys.stdout.write(f"{'':<11}as {alike[0]}, above\n")
        sys.stdout.flush()
    broken = [result.broken for result in done if result.broken is not None]
    for alike in shared.values():
        if len(alike) > 1:
            words = f"{len(alike)} laws break in one way: {', '.join(alike)}"
            sys.stdout.write(f"\n{words}\n")
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
        words = f"{len(laws)} laws of {laws.called}"
        sub = kinds.add_parser(name, help=words, description=words, allow_abbrev=False)
        sub.add_argument("function", metavar="MODULE:FUNCTION")
        for option in fields(laws.subject)[1:]:  # the first field is the function
            sub.add_argument(f"--{option.name.replace('_', '-')}", **_argument(option))
        sub.add_argument("--examples", type=int, default=EXAMPLES, help="cases for each law (200)")
        sub.add_argument("--seed", type=int, default=0, help="another seed draws other cases (0)")
        for flag, about in (("only", "check these alone"), ("without", "leave these out")):
            sub.add_argument(
                f"--{flag}", nargs="+", action="extend", default=[], metavar="LAW", help=about
            )
    return parser


def _argument(option: Field[Any]) -> dict[str, Any]:
    """Return the keyword arguments of ``add_argument`` for an option of a subject."""
    about = HELP[option.name]
    default = option.default
    if option.name == "inputs":
        return {
            "nargs": "+",
            "required": True,
            "action": _Roles,
            "metavar": "NAME=ROLE",
            "help": about,
        }
    if default is MISSING or isinstance(default, tuple):
        kind: Callable[[str], Any] = str if default is MISSING else float
        required = default is MISSING
        shown = "" if default is MISSING else f" ({' '.join(map(str, default))})"
        return {"nargs": "+", "type": kind, "default": () if required else default,
                "action": _Tuple, "required": required, "help": about + shown}  # fmt: skip
    if isinstance(default, bool):
        shown = "yes" if default else "no"
        return {
            "action": argparse.BooleanOptionalAction,
            "default": default,
            "help": f"{about} ({shown})",
        }
    if option.name in ("valid", "clip_low", "clip_high"):
        kind = str if option.name == "valid" else float
        shown = "none" if default is None else default
        return {"type": _optional(kind), "default": default, "help": f"{about} ({shown})"}
    return {"type": type(default), "default": default, "help": f"{about} ({default})"}


class _Tuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


class _Roles(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        pairs = [value.partition("=") for value in values]
        if not all(name and role for name, _, role in pairs):
            parser.error(f"--inputs: expected NAME=ROLE, got {' '.join(values)}")
        if len({name for name, _, _ in pairs}) < len(pairs) or getattr(namespace, self.dest):
            parser.error(f"--inputs: expected each name once, got {' '.join(values)}")
        setattr(namespace, self.dest, {name: role for name, _, role in pairs})


def _optional(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    value.__name__ = kind.__name__  # argparse's error message has the type's name
    return value


def _load(option: str, target: str) -> Any:
    """Import ``module:name``; the working directory comes first, as in ``python -m``.

    Raises:
        ValueError: the target is malformed, cannot be imported, or does not exist.
    """
    module, _, name = target.partition(":")
    if not module or not name or "/" in module or module.endswith(".py"):
        path = module.removeprefix("./").removesuffix(".py").replace("/", ".")
        fix = f"; write {path}:{name}" if module and name else ""
        raise ValueError(f"{option}: expected MODULE:FUNCTION, got {target!r}{fix}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        value: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        words = f"{type(error).__name__}: {error}"
        raise ValueError(f"{option}: {module} cannot be imported: {words}") from error
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
