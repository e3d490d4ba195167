"""The shapes world through real reward services, over HTTP on the loopback.

A scripted judge takes the place of a vision-language model: it gets the same requests, and answers
from exact rewards what it reads in them, except for a share of answers that it spoils. Content
consistency is scored by the server of the library, with a detector that sees by rule.

    python -m mteditflow_examples.shapes.served judge --lost-answers 0.1
    python -m mteditflow_examples.shapes.served consistency

The trainer takes both as it takes real ones: see ``examples/lost_rewards.py``.
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
    """Write a chain as the library's record; ``files`` draws the image that it names."""
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
    """Names of the things that stand as they were in all states after."""
    kept = [t for t in before.things if all(t in state.things for state in after)]
    return tuple(f"{t.color} {t.shape}" for t in kept)


def chain_of(reference: Tensor, instructions: Sequence[str]) -> Chain:
    """Read a chain back from its reference picture, uint8 ``[3, H, W]``, and its instructions.

    Raises:
        ValueError: If the picture is of no state, or an instruction makes no sense.
    """
    state = initial = read_state(to_index(reference))
    edits = []
    for instruction in instructions:
        matching = [e for e in possible_edits(state) if e.instruction == instruction]
        if not matching:
            raise ValueError(f"'{instruction}' makes no sense in {state}")
        edits.append(matching[0])
        state = matching[0].apply(state)
    return Chain(initial, tuple(edits))


def judge_app(*, lost_answers: float, invent: bool = False) -> FastAPI:
    """Build a judge behind an OpenAI-compatible endpoint that knows the truth of the world.

    It takes requests about whole chains, without thinking, in JSON.

    Args:
        lost_answers: Share of requests whose answer is spoilt, however often they are sent: which
            ones, and how, follows from the content of the request.
        invent: Instead of spoiling an answer give every turn the middle of the Likert scale, which
            is what trainers see who put it in place of a lost one.
    """
    app = FastAPI(title="A scripted judge for the shapes world")

    @app.post("/v1/chat/completions")
    def complete(body: dict[str, Any]) -> dict[str, Any]:
        content = body["messages"][-1]["content"]
        if "response_format" not in body:  # of a client that asks whether there is a judge
            return _completion("stop", "ok")
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
    """Score every turn, 1..5, of a request that shows the reference and what each turn made."""
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
    """Run this module's ``main`` in a process of its own; give the URL that it serves."""
    command = [sys.executable, "-m", "mteditflow_examples.shapes.served", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"cwd": Path(__file__).parents[1], "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **options) as process:
        try:
            line = process.stdout.readline()
            if not line.startswith("http://"):
                raise RuntimeError(f"the {arguments[0]} did not start; see above")
            yield line.strip()
        finally:
            process.terminate()


def main(
    what: Annotated[Service, typer.Argument(help="What to serve.")],
    lost_answers: Annotated[float, typer.Option(min=0, max=1, help="Share to spoil.")] = 0.0,
    invent: Annotated[bool, typer.Option(help="Give these 3 of 5 instead.")] = False,
) -> None:
    """Serve on a free port of the loopback, whose URL is written first."""
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
