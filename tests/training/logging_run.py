"""A run that says a lot, to be killed while it does; its terminal is standard error."""

import sys
from pathlib import Path

from mteditflow.training.run_log import RunLog

if __name__ == "__main__":
    log = RunLog(Path(sys.argv[1]), console=True, main=True)
    with log.bar("rounds", 10**6, unit="rounds") as rounds:
        for i in range(1, 10**6):
            with log.bar("rollout", 2, unit="chains") as rollout:
                rollout.advance()
            log.record(i, {f"reward/term_{k}": i / 7 + k for k in range(200)})
            log.message(f"round {i}: \x1b[31mred\x1b[0m and so on")
            rounds.advance()
