"""Promotion in MT-OPSD: a student that beats its teacher on sessions becomes the teacher."""

from __future__ import annotations

from mteditflow.rewards import TurnScores
from mteditflow.training import SessionCounts, count_sessions, gather_scores, promotes, session_gain

from .config import ConfigError, DistillationConfig
from .evaluation import edit_chains, first_scores
from .held_out import HeldOut
from .run import Run
from .sampling import collect
from .scoring import scale_of


def promote_if_due(run: Run) -> None:
    """Compare student and teacher every ``teacher.every`` rounds; promote a winning student.

    Call it before the round counts as done: a run that is killed in between repeats both.
    """
    config, sessions = run.config, run.sessions
    assert isinstance(config, DistillationConfig)
    teacher = config.teacher
    if sessions is None or (run.state.done + 1) % teacher.every:
        return
    with run.log.stopwatch.phase("comparing"):
        # The teacher's outcomes hold until a promotion: the noise of sessions never changes.
        if run.state.teacher is None:
            run.state.teacher = _outcomes(run, sessions, "old")
        student = _outcomes(run, sessions, "current")
    before = run.state.teacher
    if before is None or student is None:
        run.log.warning(
            f"round {run.state.done + 1}: sessions lost scores; no comparison, the teacher stays"
        )
        return
    gains = [session_gain(*pair) for pair in zip(student, before, strict=True)]
    promoted = promotes(
        gains, success_margin=teacher.success_margin, collapse_margin=teacher.collapse_margin
    )
    run.numbers["teacher/promoted"] = int(promoted)
    for turn, counts, gain in zip(teacher.turns, student, gains, strict=True):
        run.numbers |= {
            f"teacher/successes/turn_{turn}": counts.successes,
            f"teacher/collapses/turn_{turn}": counts.collapses,
            f"teacher/more_successes/turn_{turn}": gain.successes,
            f"teacher/fewer_collapses/turn_{turn}": gain.collapses,
        }
    if promoted:
        run.policies.update_old(decay=0.0)
        run.state.teacher = student
        run.log.message(f"round {run.state.done + 1}: the student replaces the teacher")


def _outcomes(run: Run, sessions: HeldOut, policy: str) -> list[SessionCounts] | None:
    """Edit all sessions with a policy and count their outcomes; a collective call.

    Returns:
        Counts up to each compared turn; None if a score was lost, since the outcome of a session
        without all its scores is unknown.

    Raises:
        ConfigError: consistency is not scored.
    """
    config, rows, waiting = run.config, sessions.rows(), []
    assert isinstance(config, DistillationConfig)
    with run.policies.use(policy):
        for start in range(0, len(rows), config.evaluation.batch):
            part = rows[start : start + config.evaluation.batch]
            waiting.append(run.submit(*edit_chains(run, sessions, part, purpose="sessions")))
            run.stop_if_requested()
    terms, _ = gather_scores(collect(run, waiting), device=run.device)
    if "consistency" not in terms:
        raise ConfigError(
            f"teacher.sessions: expected a scorer of consistency, by which a session collapses, "
            f"got {sorted(terms)}"
        )
    scored: dict[str, TurnScores] = {
        name: first_scores(x, len(sessions.chains)) for name, x in terms.items()
    }
    following, looks = scored["following"], scored["consistency"]
    if following.lost or looks.lost:
        return None
    success = scale_of(config.rewards).followed(following.score)
    degraded = looks.score <= config.teacher.degraded  # NaN (not measured) counts as not degraded
    return [count_sessions(success, degraded, turn) for turn in config.teacher.turns]
