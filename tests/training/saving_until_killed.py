"""Saves checkpoints in forks of its own, which are killed when it is told to.

Arguments: the folder. Each line of standard input is one life, and is answered by the signal that
ended it, 0 for none: "0.03 fast" saves for 0.03 s, "0.03 slow" too but with slow disk operations;
"7 step" replaces the last checkpoint, saves the next, and dies at the eighth disk operation.
"""

import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

import torch

from mteditflow.training.checkpoint import Checkpoints

OPERATIONS = ("fsync", "rename", "unlink", "rmdir", "mkdir", "open")


def intercept(before):
    """Call a function before every disk operation that goes through os."""
    for name in OPERATIONS:
        setattr(os, name, intercepted(getattr(os, name), before))


def intercepted(function, before):
    def call(*given, **named):
        before()
        return function(*given, **named)

    return call


def wait():
    time.sleep(random.random() * 0.004)


def die_at(step):
    calls = count()

    def before():
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def save(checkpoints, number):
    """The tensors of a round hold its number, and so do the other files."""
    tensors = {
        name: {f"weight{i}": torch.full((500,), float(number)) for i in range(3)}
        for name in ("model", "optimizer")
    }

    def add_lora(folder):
        (folder / "lora").mkdir()
        (folder / "lora" / "weights.txt").write_text(f"{number} " * 200)

    score = random.random()
    checkpoints.save(number, tensors, {"round": number}, score=score, extra=add_lora)


def live(folder, amount, kind):
    """One life: every third round is saved twice."""
    checkpoints = Checkpoints(folder, keep_last=2)
    found = checkpoints.latest()
    last = found.round if found else -1
    if kind == "step":
        intercept(die_at(int(amount)))
        for number in (max(last, 0), last + 1):
            save(checkpoints, number)
        return
    if kind == "slow":
        intercept(wait)
    for number in count(last + 1):
        for _ in range(2 if number % 3 == 0 else 1):
            save(checkpoints, number)


def main(folder):
    torch.set_num_threads(1)
    for line in sys.stdin:
        amount, kind = line.split()
        child = os.fork()
        if child == 0:
            random.seed(line)
            live(folder, amount, kind)
            os._exit(0)
        if kind != "step":
            time.sleep(float(amount))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
