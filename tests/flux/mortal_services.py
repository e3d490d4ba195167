"""The services of the shapes world on ports that stay theirs, killed and started again.

    python -m tests.flux.mortal_services judge 8001 ledger.txt --delay 0.2

Each writes into its ledger what it is asked and what it answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import sqlite3
import time
from pathlib import Path

import typer
import uvicorn
from fastapi import Request, Response
from mteditflow_examples.shapes.served import judge_app
from mteditflow_examples.shapes.vision import RuleDetector

from mteditflow.rewards.consistency.scorer import ConsistencyScorer
from mteditflow.rewards.server import create_app
from tests.flux.worlds import ENVIRONMENT
from tests.processes import Process, free_port

ASKED, ANSWERED = "asked", "answered"


def main(what: str, port: int, ledger: Path, delay: float = 0.0, lost: float = 0.0) -> None:
    """Serve until killed.

    Args:
        what: "judge" or "consistency".
        port: on the loopback.
        ledger: gets a line for each request when it comes, and when its answer goes out.
        delay: of every answer, s.
        lost: share of answers that the judge spoils.
    """
    app = (
        judge_app(lost_answers=lost)
        if what == "judge"
        else create_app(ConsistencyScorer(RuleDetector()))
    )

    def note(event: str, name: str) -> None:
        with ledger.open("a") as file:
            file.write(f"{event} {name}\n")

    @app.middleware("http")
    async def noted(request: Request, call_next) -> Response:
        body = await request.body()
        if not body or (what == "judge" and b"response_format" not in body):
            return await call_next(request)  # whether it is there is all that is asked
        said = json.dumps(json.loads(body)["messages"]).encode() if what == "judge" else body
        name = hashlib.sha256(said).hexdigest()
        note(ASKED, name)
        await asyncio.sleep(delay)
        answer = await call_next(request)
        if answer.status_code == 200 and not lost:
            note(ANSWERED, name)
        return answer

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


class Mortal:
    """A service that can be killed; as a context manager it is killed in the end.

    Args:
        what: "judge" or "consistency".
        folder: of its ledger.
        delay: of every answer, s.
    """

    def __init__(self, what: str, folder: Path, *, delay: float) -> None:
        self._port = free_port()
        self._what, self._ledger, self._delay = what, folder / f"{what}.txt", delay
        self.url = f"http://127.0.0.1:{self._port}/v1"

    def start(self, *, lost: float = 0.0) -> None:
        """Serve, and return when it does."""
        self._ledger.touch()
        given = [self._what, str(self._port), str(self._ledger)]
        given += ["--delay", str(self._delay), "--lost", str(lost)]
        self._process = Process(["-m", "tests.flux.mortal_services", *given], env=ENVIRONMENT)
        deadline = time.monotonic() + 120
        while not self._listens():
            assert time.monotonic() < deadline
            assert self._process.poll() is None
            time.sleep(0.1)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def events(self, event: str) -> list[str]:
        """What was asked, or answered, so far, in order."""
        lines = [line.split() for line in self._ledger.read_text().splitlines()]
        return [name for this, name in lines if this == event]

    @property
    def in_flight(self) -> int:
        """Requests that have no answer, those that never get one included."""
        return len(self.events(ASKED)) - len(self.events(ANSWERED))

    def __enter__(self) -> Mortal:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.kill()


def judged(cache: Path) -> int:
    """Judge's answers in the cache of a run."""
    with sqlite3.connect(f"file:{cache}?mode=ro", uri=True) as connection:
        query = "SELECT count(*) FROM answers WHERE value LIKE '{\"text\"%'"
        return int(connection.execute(query).fetchone()[0])


if __name__ == "__main__":
    typer.run(main)
