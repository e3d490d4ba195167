"""The ``mteditflow`` command: one subcommand per program, imported when it runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from mteditflow._pipes import reader_may_leave
from mteditflow._spelling import perhaps

USAGE = "usage: mteditflow COMMAND [OPTIONS]; mteditflow COMMAND --help lists the options"


class Command(NamedTuple):
    """Subcommand.

    Attributes:
        about: one-line description.
        module: module of the program.
        name: name in that module of a typer application, or of a function that reads ``sys.argv``.
        extra: extra of mteditflow with the program's dependencies.
    """

    about: str
    module: str
    name: str
    extra: str


COMMANDS = {
    "demo": Command(
        "train a tiny FLUX editor on chains of three edits, in minutes on a CPU",
        "mteditflow_examples.demo",
        "app",
        "train",
    ),
    "train": Command(
        "train FLUX, Qwen-Image-Edit or another pipeline; --help lists presets and sections",
        "mteditflow_examples.train_flux",
        "main",
        "train",
    ),
    "dry-run": Command(
        "check a training run before it starts: options, files, images, rewards, memory",
        "mteditflow_examples.dry_run",
        "main",
        "train",
    ),
    "init": Command(
        "copy the trainer's files into a folder, to edit and run them there",
        "mteditflow_examples.init",
        "app",
        "train",
    ),
    "budget": Command(
        "predict memory, FLOPs and least hours of a training run, without a GPU",
        "mteditflow_examples.budget",
        "main",
        "train",
    ),
    "evaluate": Command(
        "score an edit pipeline or a folder of images on chains; compare two runs",
        "mteditflow_examples.evaluate",
        "app",
        "train",
    ),
    "export": Command(
        "write a run's LoRA for diffusers or ComfyUI, with a model card",
        "mteditflow_examples.export",
        "app",
        "train",
    ),
    "chains": Command(
        "convert, check, count and split files of chains",
        "mteditflow.chains.__main__",
        "app",
        "chains",
    ),
    "plan": Command(
        "plan chains from a folder of images", "mteditflow.planner.__main__", "app", "rewards"
    ),
    "judge": Command(
        "check what a judge's endpoint honors", "mteditflow.rewards.__main__", "app", "rewards"
    ),
    "serve": Command(
        "serve content consistency over HTTP",
        "mteditflow.rewards.server.__main__",
        "app",
        "rewards",
    ),
    "check": Command(
        "check your own function against the laws of its kind",
        "mteditflow.testing.__main__",
        "main",
        "testing",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Args:
        arguments: arguments after ``mteditflow``; ``None``: those of the process.

    Raises:
        SystemExit: always, with the subcommand's exit code; 2 if there is no such subcommand, or if
            an extra that it needs is not installed.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
        with reader_may_leave():
            sys.stdout.write("\n".join([USAGE, "", *lines, ""]))
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        with reader_may_leave():
            sys.stdout.write(f"mteditflow {importlib.import_module('mteditflow').__version__}\n")
        sys.exit(0)
    if words[0] not in COMMANDS:
        near = perhaps(words[0], COMMANDS)
        _refuse(f"command: expected one of {', '.join(COMMANDS)}, got {words[0]!r}{near}")
    command = COMMANDS[words[0]]
    try:
        program = getattr(importlib.import_module(command.module), command.name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("mteditflow", "mteditflow_examples"):
            raise  # a fault of this package, not a missing dependency
        _refuse(
            f"mteditflow {words[0]} needs {missing}: pip install 'mteditflow[{command.extra}]'"
            if missing
            else str(error)
        )
    sys.argv = [f"mteditflow {words[0]}", *words[1:]]
    if command.name == "app":
        program(prog_name=sys.argv[0])
    sys.exit(program())


def _refuse(message: str) -> None:
    """Print one line on standard error, and exit with 2."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)
