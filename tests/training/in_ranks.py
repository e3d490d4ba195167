"""Runs a function of a test in several processes with gloo, and brings its results back."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.processes import Process, free_port


def in_ranks(function: str, ranks: int, folder: Path) -> list[Any]:
    """Call ``tests.module:function()`` on every rank; what it returns goes through JSON."""
    port = free_port()
    workers = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        program = ["-m", "tests.training.in_ranks", function, str(folder / f"{rank}")]
        workers.append(Process(program, env=environment))
    codes = [worker.wait(timeout=120) for worker in workers]
    assert codes == [0] * ranks, codes
    return [json.loads((folder / f"{rank}").read_text()) for rank in range(ranks)]


def main() -> None:
    import importlib

    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    module, _, name = sys.argv[1].partition(":")
    found = getattr(importlib.import_module(module), name)()
    Path(sys.argv[2]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
