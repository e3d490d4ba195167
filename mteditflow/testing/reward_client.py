"""The law of reward clients: a lost answer is never a number."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any

from mteditflow.testing.endpoint import (
    FAULTS,
    Answer,
    Behavior,
    ScriptedServer,
    closed_port,
    completion,
    error,
    reset,
)
from mteditflow.testing.expect import described
from mteditflow.testing.law import About, fail

LOST = About(
    "lost-answer-is-never-a-number",
    "an answer that did not arrive, or cannot be read, is no reward",
    "Training on 0 or 0.5 in place of a lost answer lowers the final reward of a run.",
)


RIGHT = About(
    "right-answer-is-the-reward",
    "an answer that arrived is the reward, at the first attempt or a later one",
    "A wrong parse, or a failed attempt averaged in as 0, trains on a score that no judge gave.",
)
_ONCE: Mapping[str, Behavior] = {
    "status 500, once": error(500),
    "connection reset, once": reset,
}


def check_reward_client(
    ask: Callable[[str], object],
    answer: Answer | None = None,
    *,
    faults: Mapping[str, Behavior] | None = None,
    reward: float | None = None,
) -> None:
    """Check that a client of rewards never turns a lost answer into a number.

    Configure ``ask`` with a timeout of 1 or 2 seconds. One fault is 3 seconds without an answer: a
    longer timeout meets a closed connection in its place.

    Args:
        ask: function from the base URL of an endpoint to a reward: a number, or ``None``, NaN or
            an exception if it is lost. Retries are allowed; configure short waits.
        answer: function from a request's JSON to the JSON of the right response; by default a chat
            completion of "4".
        faults: behavior by name, ``FAULTS`` by default; in one call of ``ask`` all requests meet
            the same fault.
        reward: reward for ``answer``, if ``ask`` rescales it; ``None``: 4 for the default
            ``answer``, and any number for another one.

    Raises:
        LawBroken: a fault gives a finite number, or a sound endpoint gives none, or another one;
            so do two faults that end after the first request.
        TypeError: ``ask`` is asynchronous, or a sound endpoint gives no number but a list or the
            like.

    Source: MT-EditFlow (arXiv 2606.01985), rewards; other trainers return 0 or 0.5 for a failed
    judge.

    Example:
        >>> import json, urllib.request
        >>> def ask(url):
        ...     body = json.dumps({"messages": []}).encode()
        ...     request = urllib.request.Request(f"{url}/chat/completions", body)
        ...     with urllib.request.urlopen(request, timeout=1) as response:
        ...         return float(json.load(response)["choices"][0]["message"]["content"])
        >>> check_reward_client(ask)
    """
    if answer is None:
        answer, reward = lambda _: completion("4"), 4.0 if reward is None else float(reward)
    with ScriptedServer(answer) as endpoint:
        sound = _reward(ask, endpoint.url, sound=True)
    if not isinstance(sound, float):
        fail({"endpoint": "sound"}, "a number", sound, LOST)
    if reward is None:
        reward = sound
    elif not _near(sound, reward):
        fail({"endpoint": "sound"}, f"{reward} (option reward)", sound, RIGHT)
    broken: list[str] = []
    got: list[object] = []
    for name, behavior in (FAULTS if faults is None else faults).items():
        with ScriptedServer(answer, repeat(behavior)) as endpoint:
            returned = _reward(ask, endpoint.url)
        if isinstance(returned, float):
            broken.append(name)
            got.append(returned)
    returned = _reward(ask, f"http://127.0.0.1:{closed_port()}/v1")
    if isinstance(returned, float):
        broken.append("nothing listens")
        got.append(returned)
    if broken:
        fail({"faults": broken}, "no number: None, NaN or an exception", got, LOST)
    for name, behavior in _ONCE.items():
        with ScriptedServer(answer, [behavior]) as endpoint:
            returned = _reward(ask, endpoint.url)
        if isinstance(returned, float) and not _near(returned, reward):
            fail({"fault": name}, f"{reward}, or no number", returned, RIGHT)


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * max(1.0, abs(other))


def _reward(ask: Callable[[str], object], url: str, *, sound: bool = False) -> object:
    """Return a finite reward as a float, and anything else as text.

    Raises:
        TypeError: the client returned a coroutine, or a ``sound`` endpoint's answer became
            neither a number nor ``None``.
    """
    try:
        result: Any = ask(url)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError(
            "ask: expected a number, None or an exception, got a coroutine; "
            "wrap it, as in lambda url: asyncio.run(ask(url))"
        )
    if result is None:
        return "None"
    try:
        if isinstance(result, (list, tuple, dict)):
            raise TypeError
        number = float(result)
    except (TypeError, ValueError, RuntimeError):
        if sound and not isinstance(result, str):
            words = described(result)
            raise TypeError(f"ask: expected a number, None or an exception, got {words}") from None
        return repr(result)
    return number if number - number == 0 else f"{number}"  # inf - inf and NaN are not 0
