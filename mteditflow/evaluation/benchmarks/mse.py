"""MSE-Bench: success rate of sessions of five turns, where a turn counts if all before succeeded.

A judge sees the session up to a turn and rates, from 0 to 10, how well the last instruction was
followed and how consistent the last image is with the one before. A turn succeeds if both are 7 or
more; a session ends at its first failed turn. SR@k is the share of sessions whose turns 1 to k all
succeeded.

Fields and sizes (100 sessions of 5 turns) are those of the data set's card. Scores, threshold and
stopping are those of the public evaluator (ByteDance-Seed/VINCIE, ``evaluation``), since the
paper's description of them was not accessible. That evaluator also averages both scores over all
sessions, with 0 after a failed turn; these averages are left out. Rows are read as chains of the
format ``mse``. The wording of the questions is this library's own, so numbers are not comparable
with those of the benchmark's authors.
"""

from __future__ import annotations

from collections.abc import Sequence

from mteditflow.evaluation.benchmarks.items import Rubric, Scores
from mteditflow.evaluation.benchmarks.sessions import (
    Session,
    SessionReport,
    SessionScores,
    history,
    measured,
    score_turns,
)
from mteditflow.metrics import instruction_following, wilson_interval
from mteditflow.rewards import ChatClient
from mteditflow.rewards.judge.prompts import Request

ENOUGH = 7  # least score of 10 that both criteria of a successful turn have
TASK = """\
You rate one turn of a session with an image editor. The editor was given an image and an \
instruction, and went on from its own result with the next instruction. You see the source, the \
instructions so far and the image after each. Rate the last turn alone: compare its image with the \
image just before it. What came earlier only helps you to understand."""
RUBRIC = Rubric(
    {
        "following": "how fully the last image does what the last instruction asks. 0: not at "
        "all; 10: all of it, just as it says",
        "consistency": "how little else changed since the image just before. 0: it is another "
        "scene; 10: only what had to change did",
    },
    low=0,
    high=10,
)


def succeeded(scores: Scores) -> bool:
    """Whether both scores of a turn are 7 or more."""
    return min(scores) >= ENOUGH


def failed(scores: Scores) -> bool:
    """Whether a turn failed, which ends its session."""
    return not succeeded(scores)


def mse_request(session: Session, urls: Sequence[str], turn: int) -> Request:
    """Build the question about a turn, from 1, given the URLs of all images of the session."""
    return history(TASK, RUBRIC, session.chain.instructions[:turn], urls[: turn + 1])


async def score_mse(
    client: ChatClient, sessions: Sequence[Session], *, progress: bool = False
) -> SessionScores:
    """Rate the turns of each session up to its first failure; see ``score_turns``.

    Source: VINCIE (arXiv 2506.10941), its public evaluator.
    """
    return await score_turns(client, sessions, mse_request, stop=failed, progress=progress)


def report_mse(found: SessionScores) -> SessionReport:
    """Return SR@k for every k, with Wilson's interval over sessions.

    Raises:
        UnansweredError: an answer of the judge is missing; the message names session and turn.

    Example:
        >>> from pathlib import Path
        >>> from mteditflow.chains import Chain
        >>> chain = Chain(id="7", image="7.png", instructions=("Add a dog", "Make it bark"))
        >>> scores = {("7", 1): (9, 7), ("7", 2): (9, 6)}
        >>> found = SessionScores((Session(chain, (Path("7.png"),) * 3),), scores, {})
        >>> [turn.estimate for turn in report_mse(found).by_turn["SR"]]
        [1.0, 0.0]
    """
    return session_report("MSE-Bench", found)


def session_report(benchmark: str, found: SessionScores) -> SessionReport:
    """Return SR@k of a benchmark whose turns succeed if both scores are 7 or more."""
    # A failed turn leaves zeros after it, so that the cumulative product is exact.
    success = found.table(succeeded, stop=failed)
    count, turns = success.shape
    rate = instruction_following(success)
    interval = wilson_interval(rate * count, rate.new_full(rate.shape, count))
    by_turn = {"SR": measured(interval, [count] * turns)}
    return SessionReport(benchmark=benchmark, sessions=count, turns=turns, by_turn=by_turn)
