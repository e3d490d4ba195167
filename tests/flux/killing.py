"""Kills the trainer, starts it again until it ends, and compares it with one never disturbed.

    python -m tests.flux.killing --objective grpo --kills 20 --seed 0
    python -m tests.flux.killing served --seed 0

The trainer runs in a process of its own that notes what it is at, and that a point such as "saving
fsync 3 KILL" ends at the third ``os.fsync`` while it saves. Runs killed at random
are compared with one that is started as a user starts it.
"""

from __future__ import annotations

import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from safetensors.torch import load_file

from mteditflow.training.metrics_file import read_metrics
from tests.flux.worlds import ENVIRONMENT, SCRIPT, make_world, options, run_as_a_user
from tests.processes import Process

NOTE, POINT = "KILLING_NOTE", "KILLING_POINT"
ALIKE = ("before", "after", "difference_at_last_turn")  # of report.json
ROUNDS = 6
KEEP = ("--output.keep", 99, "--output.checkpoint-every", 1)  # of runs that are compared with
MORE = (
    *("--training.rounds", ROUNDS, "--training.ema-decay", 0.9, "--training.ema-every", 2),
    *("--evaluation.policy", "ema", "--evaluation.every", 4, "--output.strips-every", 3),
    *("--output.checkpoint-every", 2),
    # State that goes from round to round: an adapted weight, and rewards of earlier rounds.
    *("--objective.kl-coef", 0.01, "--training.kl-target", 1e-4, "--rewards.history", 2),
    *("--training.inner-epochs", 2),
)


@dataclass
class Life:
    """What became of one process.

    Attributes:
        code: its exit code; minus the signal that ended it.
        ended: whether it came to the end of the run.
        at: phase that it was in, "start" before there is a run.
        seconds: since the run began.
        done: rounds whose numbers it left.
        since: round that it went on after; None if it found no checkpoint or was killed before.
        told: standard error.
        wrong: what its folder has that an undisturbed run has not, or has otherwise.
    """

    code: int
    ended: bool
    at: str
    seconds: float
    done: int
    since: int | None
    told: str
    wrong: list[str] = field(default_factory=list)


def trainer(arguments: Sequence[str]) -> None:
    """Be the trainer; note the phase, and get a signal at the point that the environment names."""
    sys.argv = [str(SCRIPT), *arguments]
    from mteditflow.training.stopwatch import Stopwatch

    note = os.open(os.environ[NOTE], os.O_CREAT | os.O_WRONLY)
    where, call, number, name = os.environ.get(POINT, "nowhere no 0 KILL").split()
    phases, left = ["other"], int(number)

    def write() -> None:
        os.pwrite(note, phases[-1].ljust(20).encode(), 0)

    def reached(this: str) -> bool:
        nonlocal left
        left -= (phases[-1], this) == (where, call)
        return left == 0 and (phases[-1], this) == (where, call)

    def end() -> None:
        os.kill(os.getpid(), getattr(signal, f"SIG{name}"))

    def before(this: str) -> None:
        function = getattr(os, this)

        def doomed(*given, **named):
            if reached(this):
                end()
            return function(*given, **named)

        setattr(os, this, doomed)

    for this in ("fsync", "rename", "replace", "rmdir"):
        before(this)
    write_bytes, init, phase = Path.write_bytes, Stopwatch.__init__, Stopwatch.phase

    def half(self, data):
        if reached("image"):  # the first files of an evaluation are images
            write_bytes(self, data[: len(data) // 2])
            end()
        return write_bytes(self, data)

    def begin(self):
        init(self)
        write()

    @contextmanager
    def noted(self, name):
        phases.append(name)
        write()
        if reached("phase"):
            end()
        try:
            with phase(self, name):
                yield
        finally:
            phases.pop()
            write()

    Path.write_bytes, Stopwatch.__init__, Stopwatch.phase = half, begin, noted
    runpy.run_path(str(SCRIPT), run_name="__main__")


def live(
    arguments: Sequence[str], folder: Path, *, after: float | None = None, point: str = ""
) -> Life:
    """Start the trainer; kill it some seconds after its run began, or let a point end it."""
    before = logged(folder)
    with tempfile.NamedTemporaryFile() as note, tempfile.NamedTemporaryFile("r") as told:
        begun, process = start(arguments, note.name, point, told.name)
        try:
            process.wait(None if after is None else after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        seconds, at = time.monotonic() - begun, note.read().decode().strip()
        words = logged(folder)[len(before) :]
        went_on = re.search(r"resuming after round (\d+)", words)
        return Life(
            process.returncode,
            process.returncode == 0 and "stopped by" not in words,
            at or "start",
            seconds,
            len(read_metrics(folder / "metrics.jsonl")),
            int(went_on[1]) if went_on else None,
            told.read(),
        )


def logged(folder: Path) -> str:
    """What a run has said so far."""
    return (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""


def start(
    arguments: Sequence[str], note: str, point: str = "", told: str | None = None
) -> tuple[float, Process]:
    """Start the trainer; return when its run has begun, and at what time that was."""
    environment = ENVIRONMENT | {NOTE: note} | ({POINT: point} if point else {})
    program = ["-m", "tests.flux.killing", "trainer", *arguments]
    process = Process(program, env=environment, errors=told)
    while not Path(note).read_bytes() and process.poll() is None:
        time.sleep(0.02)
    return time.monotonic(), process


def differences(folder: Path, undisturbed: Path, *, ended: bool = True) -> list[str]:
    """Names of what differs between two runs, times and paths aside.

    Args:
        folder: of a run that was disturbed.
        undisturbed: of one that was not, with all of its checkpoints.
        ended: whether the first one has ended; of one that was killed only the checkpoints count.
    """
    there = [*folder.glob("checkpoints/round-*"), *folder.glob("checkpoints/.replaced-round-*")]
    wrong = []
    for path in there:
        name = path.name.removeprefix(".replaced-")
        if name != "round-000000":  # of a run that was stopped before its first round
            wrong += _files(path, undisturbed / "checkpoints" / name, skip="manifest.json")
    if not ended:
        return wrong
    if max(p.name for p in there) != max(p.name for p in undisturbed.glob("checkpoints/*")):
        wrong.append("the last checkpoint is missing")
    wrong += _files(folder / "evaluations", undisturbed / "evaluations")
    wrong += _files(folder / "pictures", undisturbed / "pictures")
    lines = [
        [{k: x for k, x in line.items() if not k.startswith("seconds/")} for line in _lines(run_)]
        for run_ in (folder, undisturbed)
    ]
    wrong += ["metrics.jsonl"] if lines[0] != lines[1] else []
    reports = [json.loads((x / "report.json").read_text()) for x in (folder, undisturbed)]
    wrong += [f"report.json: {name}" for name in ALIKE if reports[0][name] != reports[1][name]]
    return wrong + [str(path) for path in folder.rglob(".partial-*")]


def _lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _files(folder: Path, other: Path, *, skip: str = "") -> list[str]:
    """Files that only one of two folders has, or that differ in a byte."""
    names = {
        str(path.relative_to(root))
        for root in (folder, other)
        for path in root.rglob("*")
        if path.is_file() and path.name != skip and not path.name.startswith(".")
    }
    return [f"{folder.name}/{name}" for name in sorted(names) if not _alike(folder, other, name)]


def _alike(folder: Path, other: Path, name: str) -> bool:
    paths = [folder / name, other / name]
    if not all(path.is_file() for path in paths):
        return False
    if paths[0].name == "state.json":
        states = [json.loads(path.read_text()) for path in paths]
        for state in states:
            del state["config"]  # it has paths
            for group in state["optimizer"]["groups"]:
                del group["lr"]  # every round sets it anew, before it can be cut off
        return bool(states[0] == states[1])
    if paths[0].suffix == ".safetensors":  # peft writes the names of the modules in any order
        tensors = [load_file(path) for path in paths]
        return tensors[0].keys() == tensors[1].keys() and all(
            x.dtype == tensors[1][name].dtype and torch.equal(_bits(x), _bits(tensors[1][name]))
            for name, x in tensors[0].items()
        )
    return paths[0].read_bytes() == paths[1].read_bytes()


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)


def undisturbed_run(world: Path, folder: Path, *, objective: str) -> float:
    """Run to the end as a user does, and keep all checkpoints; seconds that it took."""
    run_as_a_user(*options(world, folder, *MORE, *KEEP, objective=objective))
    lines = read_metrics(folder / "metrics.jsonl")
    return sum(x for line in lines for name, x in line.items() if name.startswith("seconds/"))


def kill_at_random(
    world: Path, scratch: Path, *, objective: str, kills: int, seed: int
) -> list[Life]:
    """Kill runs at moments drawn evenly over the rounds left, until there are enough."""
    draw = random.Random(seed)
    whole = undisturbed_run(world, scratch / "undisturbed", objective=objective)
    lives: list[Life] = []
    number = 0
    while sum(life.code == -signal.SIGKILL for life in lives) < kills:
        folder = scratch / f"run-{number}"
        arguments = options(world, folder, *MORE, objective=objective)
        saved = max((int(p.name[-6:]) for p in folder.glob("checkpoints/round-*")), default=0)
        moment = draw.uniform(0, whole * max(1 - saved / ROUNDS, 0.1))
        life = live(arguments, folder, after=moment)
        life.wrong = differences(folder, scratch / "undisturbed", ended=life.ended)
        number += life.ended
        lives.append(life)
        typer.echo(row(lives))
    if not lives[-1].ended:
        life = live(arguments, folder)
        life.wrong = differences(folder, scratch / "undisturbed")
        lives.append(life)
        typer.echo(row(lives))
    return lives


def row(lives: Sequence[Life]) -> str:
    """The last life as a row of a table."""
    life, before = lives[-1], lives[-2] if len(lives) > 1 else None
    redone = before.done - life.since if before and life.since is not None else "-"
    ends = {0: "ended" if life.ended else "stopped", -signal.SIGKILL: "killed"}
    verdict = "; ".join(life.wrong) or "identical"
    if life.code not in ends:
        verdict = life.told[-2000:]
    cells = [
        f"{len(lives):3d}",
        ends.get(life.code, f"failed ({life.code})"),
        f"{life.seconds:6.2f} s",
        f"after {'-' if life.since is None else life.since} to {life.done}",
        f"{redone} redone",
        life.at,
        verdict,
    ]
    return " | ".join(cells)


app = typer.Typer(pretty_exceptions_enable=False)


@app.command("random")
def at_random(
    objective: Annotated[Literal["nft", "grpo"], typer.Option()] = "nft",
    kills: int = 20,
    seed: int = 0,
) -> None:
    """Kill at random moments, and print a table of what became of it."""
    with tempfile.TemporaryDirectory() as name:
        world = make_world(Path(name) / "world")
        lives = kill_at_random(world, Path(name), objective=objective, kills=kills, seed=seed)
    killed = [life for life in lives if life.code == -signal.SIGKILL]
    ended = [life for life in lives if life.ended]
    bad = [life for life in lives if life.wrong or life.code not in (0, -signal.SIGKILL)]
    typer.echo(
        f"{objective}: {len(killed)} kills, {len(ended)} runs ended, {len(bad)} not as they should"
    )
    raise typer.Exit(len(bad) > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["trainer"]:
        trainer(sys.argv[2:])
    else:
        app()
