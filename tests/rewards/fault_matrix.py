"""Every fault, and what becomes of a score: the table that the tests check and the page shows.

`python -m tests.rewards.fault_matrix` writes docs/faults.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mteditflow.rewards import Fault
from mteditflow.testing import endpoint as scripted
from mteditflow.testing.endpoint import Behavior, changed, error, plain

ATTEMPTS = 3
PAGE = Path(__file__).parents[2] / "docs" / "faults.md"


@dataclass(frozen=True)
class Outcome:
    """What becomes of a score: right, or invalid for a reason after some attempts."""

    fault: Fault | None = None
    attempts: int = 0

    def __str__(self) -> str:
        if self.fault is None:
            return "right"
        times = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return f"invalid: {self.fault.value} ({times})"


RIGHT = Outcome()


@dataclass(frozen=True)
class Cell:
    """What a server does; what becomes of a score if it always does so, and if it does so once."""

    behavior: Behavior | None  # None: nobody listens there
    always: Outcome
    once: Outcome = RIGHT


@dataclass(frozen=True)
class Row:
    """One fault; a cell is None where there is no such thing."""

    name: str
    judge: Cell | None
    consistency: Cell | None


def both(name: str, behavior: Behavior | None, fault: Fault) -> Row:
    """A fault of the wire, which is the same for both."""
    cell = Cell(behavior, Outcome(fault, ATTEMPTS))
    return Row(name, cell, cell)


def each(
    name: str,
    judge: tuple[Behavior, Fault] | None,
    consistency: tuple[Behavior, Fault] | None,
) -> Row:
    """A fault of the answer's content."""
    cells = (part and Cell(part[0], Outcome(part[1], ATTEMPTS)) for part in (judge, consistency))
    return Row(name, *cells)


def at_once(name: str, behavior: Behavior, fault: Fault) -> Row:
    """A fault after which the only endpoint there is must not be asked again."""
    cell = Cell(behavior, Outcome(fault, 1), Outcome(fault, 1))
    return Row(name, cell, cell)


def says(change: Callable[[str], str], **choice: Any) -> Behavior:
    """The judge's right text, changed; `choice` changes what stands around it."""

    def apply(body: Any) -> Any:
        message = body["choices"][0]["message"]
        message["content"] = change(message["content"])
        body["choices"][0] |= choice
        return body

    return changed(apply)


def scores(change: Callable[[list[Any]], list[Any]]) -> Behavior:
    """The judge's right scores, changed."""
    return says(lambda text: json.dumps({"scores": change(json.loads(text)["scores"])}))


def pairs(change: Callable[[list[Any]], list[Any]]) -> Behavior:
    """The right pairs of content consistency, changed."""
    return changed(lambda body: body | {"pairs": change(body["pairs"])})


def first_pair(value: Any) -> Behavior:
    return pairs(lambda right: [right[0] | {"object": value}, *right[1:]])


async def talkative(exchange: scripted.Exchange) -> None:
    await exchange.reply(b"Sure! " + json.dumps(exchange.right()).encode() + b" Anything else?")


def moved(body: Any) -> Any:
    message = body["choices"][0]["message"]
    message |= {"content": None, "reasoning_content": message["content"]}
    return body


thinks_only = changed(moved)
ARABIC = {ord(str(digit)): chr(0x660 + digit) for digit in range(10)}
SORRY = "I'm sorry, but I can't score this picture."
NO_SCORE = plain({"detail": SORRY})

MATRIX = [
    both("time-out: no answer", scripted.silent, Fault.timeout),
    both("slow drip: a byte now and then", scripted.drip, Fault.timeout),
    both("refused connection", None, Fault.connection),
    both("connection reset", scripted.reset, Fault.connection),
    both("429 with Retry-After", error(429, Retry_After="0.05"), Fault.rate_limited),
    at_once(
        "429 with a Retry-After beyond patience",
        error(429, Retry_After="3600"),
        Fault.rate_limited,
    ),
    both("500", error(500), Fault.server_error),
    both("502", error(502), Fault.server_error),
    both("503 with Retry-After", error(503, Retry_After="0.05"), Fault.server_error),
    at_once("302: the server is elsewhere", error(302, Location="/login"), Fault.redirected),
    at_once("400: the request is rejected", error(400), Fault.rejected),
    both("truncated body", scripted.truncated, Fault.connection),
    both("HTML", scripted.HTML, Fault.malformed),
    both("empty body", scripted.EMPTY, Fault.malformed),
    both("broken JSON", scripted.broken_json, Fault.malformed),
    both("a JSON list", scripted.JSON_LIST, Fault.malformed),
    both("JSON without an answer", scripted.NO_CHOICES, Fault.malformed),
    both("an error in a 200", scripted.ERROR_IN_200, Fault.malformed),
    both("bytes that are not Unicode", scripted.BAD_UNICODE, Fault.malformed),
    both("a body of 16 MiB", scripted.huge, Fault.malformed),
    each(
        "a score too few",
        (scores(lambda right: right[:-1]), Fault.wrong_count),
        (pairs(lambda right: right[:-1]), Fault.wrong_count),
    ),
    each(
        "a score too many",
        (scores(lambda right: [*right, 5]), Fault.wrong_count),
        (pairs(lambda right: [*right, right[0]]), Fault.wrong_count),
    ),
    each(
        "a score out of range",
        (scores(lambda right: [7, *right[1:]]), Fault.out_of_range),
        (first_pair(1.5), Fault.out_of_range),
    ),
    each(
        "NaN",
        (scores(lambda right: [float("nan"), *right[1:]]), Fault.not_a_number),
        (first_pair(float("nan")), Fault.not_a_number),
    ),
    each(
        "text around the JSON",
        (says(lambda text: f"Sure! {text}"), Fault.request_ignored),
        (talkative, Fault.malformed),
    ),
    each(
        "another language's digits",
        (scores(lambda right: [str(x).translate(ARABIC) for x in right]), Fault.not_a_number),
        (first_pair("0.5".translate(ARABIC)), Fault.not_a_number),
    ),
    each("a refusal", (says(lambda _: SORRY), Fault.refusal), (NO_SCORE, Fault.malformed)),
    each("reasoning without an answer", (thinks_only, Fault.reasoning), None),
    each(
        "cut off at the token limit",
        (says(lambda text: text[:-3], finish_reason="length"), Fault.cut_off),
        None,
    ),
]

HEADER = f"""\
# Faults and what becomes of a score

Made by `python -m tests.rewards.fault_matrix`; do not edit. Each cell is a test
(`tests/rewards/test_fault_matrix.py`): the real `Judge` and the real `ConsistencyClient` ask a
server on raw sockets that fails as the row describes, *always* or *once*; there is no other
endpoint. {ATTEMPTS} attempts are allowed.

A score is right, or it is invalid with a reason; no fault turns into a number. An invalid
score takes no part in the statistics of its group, and its trajectory gets no gradient.

| fault | judge, always | judge, once | consistency, always | consistency, once |
|---|---|---|---|---|
"""
FOOTER = """
Where "once" is invalid, a second endpoint would take over: a request that one endpoint rejects, or
for which it demands too long a wait, goes to the next. The row of the refused connection was
measured "once" in this way, with one of two endpoints dead.
"""


def render() -> str:
    """The whole page."""
    lines = []
    for row in MATRIX:
        cells = [row.name]
        for cell in (row.judge, row.consistency):
            cells += ["", ""] if cell is None else [str(cell.always), str(cell.once)]
        lines.append(f"| {' | '.join(cells)} |\n")
    return HEADER + "".join(lines) + FOOTER


if __name__ == "__main__":
    PAGE.write_text(render())
