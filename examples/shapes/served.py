"""The shapes world behind real reward services, over HTTP on the loopback.

A scripted judge replaces the vision-language model: it gets the same requests, and answers from the
exact rewards of the images in them, except for a share of spoiled answers. Content consistency is
scored by the server of the library, with a rule-based detector.

    python -m mteditflow_examples.shapes.served judge --lost-answers 0.1
    python -m mteditflow_examples.shapes.served consistency

The trainer uses them like any other services: see ``examples/lost_rewards.py``.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import chain as joined
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import uvicorn
from fastapi import FastAPI
from PIL import Image
from torch import Tensor

from mteditflow._command import program
from mteditflow.chains import Chain as Record
from mteditflow.rewards import ConsistencyScorer
from mteditflow.rewards.server import create_app

from .rewards import Truth, score
from .vision import RuleDetector, pixels_of, read_state, to_index
from .world import Chain, State, possible_edits

MIDDLE = 3  # of the Likert scale: one half, normalized
INSTRUCTION = re.compile(r'"((?:Add|Change|Move|Remove|Replace) [a-z ]+)"')
SPOILT: tuple[tuple[str, str], ...] = (  # (finish reason, answer)
    ("content_filter", ""),
    ("length", '{"scores": [5, '),
    ("stop", "I'm sorry, but I can't help with that."),
    ("stop", '{"scores": [3]}'),
    ("stop", '{"scores": [5, 9, 4]}'),
)


class Service(str, Enum):
    """Services of this module."""

    judge = "judge"
    consistency = "consistency"


def record_of(chain: Chain) -> Record:
    """Return a chain as the library's record; ``files`` writes the image of its path."""
    name = hashlib.sha256(repr(chain).encode()).hexdigest()[:16]
    names = [[f"{t.color} {t.shape}" for t in state.things] for state in chain.states]
    first, after = chain.initial, chain.states[1:]
    turns = range(len(after))
    return Record(
        id=name,
        image=f"images/{name}.png",
        instructions=tuple(chain.instructions),
        task_types=tuple(chain.task_types),
        unchanged_objects=tuple(_kept(first, after[: n + 1]) for n in turns),
        turn_unchanged_objects=tuple(_kept(chain.states[n], after[n : n + 1]) for n in turns),
        all_objects=tuple(tuple(dict.fromkeys(joined(*names[: n + 2]))) for n in turns),
        available_objects=tuple(tuple(now) for now in names[1:]),
        background_consistency=tuple(
            all(state.background == first.background for state in after[: n + 1]) for n in turns
        ),
    )


def _kept(before: State, after: Sequence[State]) -> tuple[str, ...]:
    """Return the names of things that stay unchanged in all later states."""
    kept = [t for t in before.things if all(t in state.things for state in after)]
    return tuple(f"{t.color} {t.shape}" for t in kept)


def chain_of(reference: Tensor, instructions: Sequence[str]) -> Chain:
    """Return the chain of a reference picture, uint8 ``[3, H, W]``, and instructions.

    Raises:
        ValueError: If the picture shows no state, or an instruction is not possible.
    """
    state = initial = read_state(to_index(reference))
    edits = []
    for instruction in instructions:
        matching = [e for e in possible_edits(state) if e.instruction == instruction]
        if not matching:
            raise ValueError(f"instructions: expected one possible in {state}, got {instruction!r}")
        edits.append(matching[0])
        state = matching[0].apply(state)
    return Chain(initial, tuple(edits))


def judge_app(*, lost_answers: float, invent: bool = False) -> FastAPI:
    """Build an OpenAI-compatible endpoint of a judge that answers from the exact rewards.

    It accepts requests about whole chains, without thinking, in JSON.

    Args:
        lost_answers: Share of requests with a spoiled answer. The content of a request decides
            whether and how, so a retry gets the same answer.
        invent: In place of a spoiled answer, give every turn the middle of the Likert scale. This
            simulates trainers that replace lost answers by a default.
    """
    app = FastAPI(title="A scripted judge for the shapes world")

    @app.post("/v1/chat/completions")
    def complete(body: dict[str, Any]) -> dict[str, Any]:
        content = body["messages"][-1]["content"]
        if "response_format" not in body:  # a client's check that the judge is reachable
            return _completion("stop", "ok")
        # A uniform 64-bit number from the content: equal requests are lost or answered alike.
        fate = int.from_bytes(hashlib.sha256(json.dumps(content).encode()).digest()[:8], "big")
        lost = fate / 2**64 < lost_answers
        if lost and not invent:
            return _completion(*SPOILT[fate % len(SPOILT)])
        schema = body["response_format"]["json_schema"]["schema"]
        levels = schema["properties"]["scores"]["items"]["enum"]
        likert = [MIDDLE if lost else score for score in judge(content)]
        scores = [score if 5 in levels else int(score == 5) for score in likert]
        return _completion("stop", json.dumps({"scores": scores}))

    return app


def judge(content: Sequence[dict[str, Any]]) -> list[int]:
    """Score every turn, 1..5, of a request with the reference and the result of each turn."""
    text = "\n".join(part["text"] for part in content if part["type"] == "text")
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    pngs = [base64.b64decode(url.partition(",")[2], validate=True) for url in urls]
    reference, *edited = [pixels_of(Image.open(io.BytesIO(png), formats=("PNG",))) for png in pngs]
    chain = chain_of(reference, INSTRUCTION.findall(text))
    scores = score(torch.stack(edited)[None] / 255, Truth.of([chain]))
    return [int(likert) for likert in scores.likert[0]]


def _completion(finish_reason: str, answer: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer}
    return {
        "id": "scripted",
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
    }


@contextmanager
def service(*arguments: str) -> Iterator[str]:
    """Run this module's ``main`` in its own process; yield the URL that it serves.

    Raises:
        RuntimeError: The service did not start.
    """
    command = [sys.executable, "-m", "mteditflow_examples.shapes.served", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"cwd": Path(__file__).parents[1], "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **options) as process:
        try:
            line = process.stdout.readline()  # blocks until the service listens
            if not line.startswith("http://"):
                raise RuntimeError(f"the {arguments[0]} did not start; see above")
            yield line.strip()
        finally:
            process.terminate()


def main(
    what: Annotated[Service, typer.Argument(help="Service to run.")],
    lost_answers: Annotated[
        float, typer.Option(min=0, max=1, help="Share of answers to spoil.")
    ] = 0.0,
    invent: Annotated[bool, typer.Option(help="Score 3 of 5 in place of spoiled answers.")] = False,
) -> None:
    """Serve on a free port of the loopback; the first line of output is the URL."""
    if what is Service.judge:
        served = judge_app(lost_answers=lost_answers, invent=invent)
    else:
        served = create_app(ConsistencyScorer(RuleDetector()))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", flush=True)
        uvicorn.Server(uvicorn.Config(served, log_level="warning")).run(sockets=[listener])


app = program(main)

if __name__ == "__main__":
    app()
