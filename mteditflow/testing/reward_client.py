"""The law of reward clients: a lost answer is never a number."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from itertools import repeat

from mteditflow.testing.endpoint import (
    FAULTS,
    Answer,
    Behavior,
    ScriptedServer,
    closed_port,
    completion,
)
from mteditflow.testing.law import About, fail

LOST = About(
    "lost-answer-is-never-a-number",
    "an answer that did not arrive, or cannot be read, is no reward",
    "Training on 0 or 0.5 in place of a lost answer lowers the final reward of a run.",
)


def check_reward_client(
    ask: Callable[[str], object],
    answer: Answer | None = None,
    *,
    faults: Mapping[str, Behavior] | None = None,
) -> None:
    """Check that a client of rewards never turns a lost answer into a number.

    Args:
        ask: function from the base URL of an endpoint to a reward: a number, or ``None``, NaN or
            an exception if it is lost. Retries are allowed; configure short waits.
        answer: function from a request's JSON to the JSON of the right response; by default a chat
            completion of "4".
        faults: behavior by name, ``FAULTS`` by default; in one call of ``ask`` all requests meet
            the same fault.

    Raises:
        LawBroken: a fault gives a finite number, or a sound endpoint gives none.
        TypeError: ``ask`` is asynchronous.

    Source: MT-EditFlow (arXiv 2606.01985), rewards; other trainers return 0 or 0.5 for a failed
    judge.

    Example:
        >>> import json, urllib.request
        >>> def ask(url):
        ...     body = json.dumps({"messages": []}).encode()
        ...     request = urllib.request.Request(f"{url}/chat/completions", body)
        ...     with urllib.request.urlopen(request, timeout=5) as response:
        ...         return float(json.load(response)["choices"][0]["message"]["content"])
        >>> check_reward_client(ask)
    """
    answer = answer or (lambda _: completion("4"))
    with ScriptedServer(answer) as endpoint:
        sound = _reward(ask, endpoint.url)
    if not isinstance(sound, float):
        fail({"endpoint": "sound"}, "a number", sound, LOST)
    broken: list[str] = []
    got: list[object] = []
    for name, behavior in (FAULTS if faults is None else faults).items():
        with ScriptedServer(answer, repeat(behavior)) as endpoint:
            reward = _reward(ask, endpoint.url)
        if isinstance(reward, float):
            broken.append(name)
            got.append(reward)
    reward = _reward(ask, f"http://127.0.0.1:{closed_port()}/v1")
    if isinstance(reward, float):
        broken.append("nothing listens")
        got.append(reward)
    if broken:
        fail({"faults": broken}, "no number: None, NaN or an exception", got, LOST)


class _AsynchronousError(Exception):
    """A client returned a coroutine."""


def _reward(ask: Callable[[str], object], url: str) -> object:
    """Return a finite reward as a float, and anything else as text.

    Raises:
        TypeError: the client returned a coroutine.
    """
    try:
        result = ask(url)
        if inspect.iscoroutine(result):
            result.close()
            raise _AsynchronousError
        number = float(result)  # type: ignore[arg-type]
    except _AsynchronousError:
        raise TypeError(
            "ask: expected a number, None or an exception, got a coroutine; "
            "wrap it, as in lambda url: asyncio.run(ask(url))"
        ) from None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return number if number - number == 0 else f"{number}"  # inf - inf and NaN are not 0
