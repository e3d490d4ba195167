"""Saves checkpoints in a loop in a fork of its own, and kills the fork when it is told to.

Arguments: the folder. Each line of standard input is one life: seconds until the kill, and whether
disk operations are slowed down. Answers with a line after each kill.
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


def slow_down():
    """Make every step of a save long enough for a kill to meet each of them."""
    for name in ("fsync", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, slowed(getattr(os, name)))


def slowed(function):
    def slow(*given, **named):
        time.sleep(random.random() * 0.004)
        return function(*given, **named)

    return slow


def save_forever(folder):
    """Each round's tensors hold its number; every third round is saved twice."""
    checkpoints = Checkpoints(folder, keep_last=2)
    found = checkpoints.latest()
    for number in count(found.round + 1 if found else 0):
        for attempt in range(2 if number % 3 == 0 else 1):
            tensors = {
                name: {f"weight{i}": torch.full((500,), float(number)) for i in range(3)}
                for name in ("model", "optimizer")
            }
            state = {"round": number, "attempt": attempt}
            checkpoints.save(number, tensors, state, score=random.random(), extra=add_lora(number))


def add_lora(number):
    def write(folder):
        (folder / "lora").mkdir()
        (folder / "lora" / "weights.txt").write_text(f"{number} " * 200)

    return write


def main(folder):
    torch.set_num_threads(1)
    for line in sys.stdin:
        delay, slow = line.split()
        child = os.fork()
        if child == 0:
            random.seed(line)
            if slow == "slow":
                slow_down()
            save_forever(folder)
        time.sleep(float(delay))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
