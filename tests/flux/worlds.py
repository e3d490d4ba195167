"""The shapes world on disk, small, and command lines of short runs in it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import NamedTemporaryFile

from mteditflow_examples.shapes.editor import Family
from mteditflow_examples.shapes.files import write_world
from safetensors.torch import load_file
from torch import Tensor

from tests.processes import ROOT, Process, free_port

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


def run(
    *arguments: str, ranks: int = 1, code: int = 0, script: Path = SCRIPT, drawn: bool = False
) -> str:
    """Run to the end in one forked process per rank; standard output and error."""
    group = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    group["MASTER_PORT"] = str(free_port())
    with NamedTemporaryFile("r") as said, ExitStack() as stack:
        processes = []
        for rank in map(str, range(ranks)):
            of_rank = group | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
            program, env = [script, *arguments], ENVIRONMENT | of_rank
            given = {"output": said.name, "errors": said.name, "drawn": drawn}
            processes.append(Process(program, env=env, **given))
            stack.callback(processes[-1].kill)
        codes = [process.wait(300) for process in processes]
        told = said.read()
    assert codes == [code] * ranks, told[-4000:]
    return told


def run_as_a_user(*arguments: str, ranks: int = 1) -> None:
    """Run to the end with the command that a user types: a new interpreter, or torchrun."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    launcher += [f"--master-port={free_port()}"]
    called = [*(launcher if ranks > 1 else ()), str(SCRIPT), *arguments]
    done = subprocess.run(
        [sys.executable, *called], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def weights(output: Path, name: str = "current", done: int = 5) -> dict[str, Tensor]:
    """Tensors of a checkpoint."""
    return load_file(output / "checkpoints" / f"round-{done:06d}" / f"{name}.safetensors")
