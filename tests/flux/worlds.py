"""The shapes world on disk, small, and command lines of short runs in it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from mteditflow_examples.shapes.editor import Family
from mteditflow_examples.shapes.files import write_world
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_flux.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def make_world(folder: Path, family: Family = Family.kontext) -> Path:
    """A model and a few chains."""
    write_world(folder, family, seed=0, counts=(16, 4), turns=3)
    return folder


def options(
    world: Path, output: Path, *more: object, objective: str = "nft", family: str = "kontext"
) -> list[str]:
    """A short run: 4 groups of 4, 2 turns, 5 rounds of 2 updates."""
    given = {
        "model.path": world / "model",
        "data.chains": world / "train.jsonl",
        "data.held-out": world / "held_out.jsonl",
        "data.groups": 4,
        "data.group-size": 4,
        "data.turns": 2,
        "sampling.steps": 3,
        "sampling.batch": 8,
        "training.batch": 8,
        "training.rounds": 5,
        "evaluation.every": 3,
        "output.folder": output,
        "output.strips-every": 0,
    }
    preset = f"shapes-{'klein-' if family == 'klein' else ''}{objective}"
    arguments = [preset, "--output.trackers"]
    for name, value in given.items():
        arguments += [f"--{name}", str(value)]
    return [*arguments, *map(str, more)]


def command(*arguments: str, ranks: int = 1, script: Path = SCRIPT) -> list[str]:
    """What a user types; over several processes with torchrun."""
    called = [str(script), *arguments]
    if ranks == 1:
        return [sys.executable, *called]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    return [sys.executable, *launcher, *called]


def run(*arguments: str, ranks: int = 1, code: int = 0, script: Path = SCRIPT) -> str:
    """Run to the end in processes of its own; standard output and error."""
    done = subprocess.run(
        command(*arguments, ranks=ranks, script=script),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout + done.stderr


def weights(output: Path, name: str = "current", done: int = 5) -> dict[str, Tensor]:
    """Tensors of a checkpoint."""
    return load_file(output / "checkpoints" / f"round-{done:06d}" / f"{name}.safetensors")
