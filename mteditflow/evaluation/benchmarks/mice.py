"""MICE-Bench of Edit-R2: sessions of three turns that depend on each other by a rule or a pronoun.

Two unrelated benchmarks have this name; this one is from Edit-R2 (arXiv 2606.05950). Its files have
the format ``edit-r2``. In the split ``cm``, turn 1 sets a rule for all edits; in ``cu``, later
turns refer to objects by pronouns. ``B`` sessions of ``N`` turns:

- **IF**, 0 or 1 per turn: the check of its edit type, by a detector and the judge (``EdiValJudge``,
  on the formatted instruction, so without the rule of ``cm``).
- **CC** per turn: mean of the similarity of unchanged objects and, where the background must stay,
  of the masked background, both with the source. A turn without unchanged objects has no CC: 277 of
  the 2,160 turns of the test files.
- **GA** (``cm``) or **CU** (``cu``) per turn: whether every turn so far was carried out with its
  rule kept or its pronoun resolved. The judge sees all images so far, and the mean of 4 yes-or-no
  votes at temperature 0.6 counts.

The three scores and both splits are the paper's, of which only the abstract was accessible. The
rest comes from its public code (yuxiaooye/Edit-R2). Differences from that code:

- A turn without CC counts 0.5 there. Here it is unmeasured and leaves the mean, unless
  ``report_mice(missing=0.5)`` is called for the number of the code.
- A call without an answer counts as no, or 0.5, there. Here there is no report without it.
- Its checks of IF derive from EdiVal-Bench's: in position edits objects are counted by full names,
  text is sought in the whole image, hats and birds are no exception, and the question about a color
  or material edit names the property only. The 7 text edits of ``cm`` without a target fail there,
  and get the single question of ``EdiValJudge`` here.
- The wording is this library's own (there: Chinese), so numbers are not comparable with the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import anyio.to_thread
import torch
from torch import Tensor

from mteditflow._checks import check_choice, check_number
from mteditflow.chains import Chain
from mteditflow.evaluation.benchmarks.edival import EdiValJudge
from mteditflow.evaluation.benchmarks.items import Rubric
from mteditflow.evaluation.benchmarks.sessions import (
    Measured,
    Session,
    SessionReport,
    SessionScores,
    UnansweredError,
    history,
    measured,
    read_images,
    score_turns,
)
from mteditflow.evaluation.intervals import bounded_interval, interval_of
from mteditflow.rewards import ChatClient, ConsistencyClient, TurnScores
from mteditflow.rewards.judge.prompts import Request
from mteditflow.rewards.scale import COSINE, SHARE

Split = Literal["cm", "cu"]
NAMES = {"cm": "GA", "cu": "CU"}
VOTES, TEMPERATURE = 4, 0.6
PART = 16  # sessions whose images are in memory at once
SESSION = """\
You check a session with an image editor. In each turn the editor was given the image before and \
one instruction. You see the source, the instructions so far and the image after each."""
TASKS = {
    "cm": f"""\
{SESSION} The first instruction also sets a rule that every later edit has to keep. Go through the \
turns in order, each against the image before it. A turn is right if the change that it asks for \
was made and the rule was kept. The rule is about the thing that the turn adds or alters and about \
nothing else: the rule carried over to other things is wrong, and so is a tint of the whole image \
in place of the thing's own change. A turn that only removes something cannot break the rule.""",
    "cu": f"""\
{SESSION} Later instructions may speak of a thing by a pronoun, or of a place by "there". Under \
each stands the same instruction in plain words, with what is meant in square brackets; the \
editor did not get it. Go through the turns in order, each against the image before it. A turn is \
right if the change that it asks for was made, and made to what stands in the brackets.""",
}
AWARENESS = Rubric(
    {"all_right": "1: every turn so far is right; 0: one of them is not"}, low=0, high=1
)


@dataclass(frozen=True, eq=False)
class MiceScores:
    """Scores of every turn of B sessions.

    Attributes:
        split: "cm" or "cu".
        awareness: GA or CU in [0, 1], the mean of the votes.
        following: IF, 0 or 1, [B, N]; ``None`` without ``checks``.
        consistency: CC in [-1, 1], [B, N], NaN without unchanged objects; ``None`` without a
            consistency client.
    """

    split: Split
    awareness: SessionScores
    following: TurnScores | None = None
    consistency: TurnScores | None = None


def awareness_request(split: Split, session: Session, urls: Sequence[str], turn: int) -> Request:
    """Build the question of GA or CU about turns 1 to ``turn``, given the URLs of all images."""
    plain = (session.chain.formatted_instructions or ())[:turn] if split == "cu" else None
    instructions = session.chain.instructions[:turn]
    return history(TASKS[split], AWARENESS, instructions, urls[: turn + 1], plain=plain)


async def score_mice(
    client: ChatClient,
    sessions: Sequence[Session],
    *,
    split: Split,
    votes: int = VOTES,
    checks: EdiValJudge | None = None,
    consistency: ConsistencyClient | None = None,
    progress: bool = False,
) -> MiceScores:
    """Score sessions by GA or CU, and by IF and CC if their measures are given.

    With caches in the clients, a repeated call requests only lost answers.

    Args:
        client: client of the judge for GA or CU; the benchmark's temperature is 0.6.
        sessions: B sessions with the fields of the format ``edit-r2``.
        split: "cm", whose turn 1 sets a rule, or "cu", with pronouns.
        votes: number of answers per turn, of which the mean counts.
        checks: measure of IF, best with a client at temperature 0; ``None`` leaves IF out.
        consistency: measure of CC; ``None`` leaves CC out.
        progress: whether to show a bar that counts sessions.

    Raises:
        ValueError: ``split`` is unknown, there are several votes at temperature 0, or a session
            lacks a field that a measure needs.

    Source: Edit-R2 (arXiv 2606.05950), its public code.
    """
    require_fields(sessions, split=split, objects=consistency is not None)
    ask = partial(awareness_request, split)
    awareness = await score_turns(client, sessions, ask, votes=votes, progress=progress)
    following, similar = [], []
    # Images are decoded again for the other measures only, and for PART sessions at once.
    for start in range(0, len(sessions) if checks or consistency else 0, PART):
        part = sessions[start : start + PART]
        chains = [session.chain for session in part]
        images = await anyio.to_thread.run_sync(lambda own: [read_images(x) for x in own], part)
        if checks is not None:
            following.append((await checks.score(chains, images)).scores)
        if consistency is not None:
            found = await consistency.score(chains, images)
            similar.append(_with_objects(chains, found.scores))
    return MiceScores(
        split,
        awareness,
        TurnScores.concatenate(following) if following else None,
        TurnScores.concatenate(similar) if similar else None,
    )


def require_fields(sessions: Sequence[Session], *, split: str, objects: bool) -> None:
    """Check that sessions have the fields that the measures need.

    Args:
        sessions: sessions to score.
        split: "cm" or "cu"; "cu" needs formatted instructions.
        objects: whether CC is measured, which needs the names of objects.

    Raises:
        ValueError: ``split`` is unknown, or a session lacks a field; the message names both.
    """
    check_choice("split", split, tuple(NAMES))
    needed = ["formatted_instructions"] * (split == "cu")
    needed += ["unchanged_objects", "all_objects"] * objects
    for session in sessions:
        for name in needed:
            if getattr(session.chain, name) is None:
                raise ValueError(f"session {session.chain.id!r}: expected {name}, got none")


def _with_objects(chains: Sequence[Chain], scores: TurnScores) -> TurnScores:
    """Return CC with turns without unchanged objects set to NaN (unmeasured).

    The consistency client may score such a turn by its background alone; the benchmark does not.
    """
    score = scores.score.clone()
    for b, chain in enumerate(chains):
        names = zip(chain.unchanged_objects or (), chain.all_objects or (), strict=True)
        for n, (own, every) in enumerate(names):
            if not (own and every):
                score[b, n] = torch.nan
    return TurnScores(score, scores.turn_mask, scores.lost)


def report_mice(found: MiceScores, *, missing: float | None = None) -> SessionReport:
    """Average IF, CC and GA or CU by turn and over all turns, with intervals over sessions.

    Args:
        found: scores of all sessions.
        missing: CC of a turn without unchanged objects, in [0, 1]: 0.5 for the number of the public
            code. ``None`` leaves such turns out of the mean.

    Returns:
        The measures that were scored; counts are sessions by turn, and turns over all turns.

    Raises:
        UnansweredError: an answer is missing; the message names session and turn.
        ValueError: ``missing`` is out of range.

    Example:
        >>> from pathlib import Path
        >>> chain = Chain(id="7", image="7.png", instructions=("Add a cup", "Paint it"))
        >>> sessions = (Session(chain, (Path("7.png"),) * 3),)
        >>> votes = SessionScores(sessions, {("7", 1): (1.0,), ("7", 2): (0.25,)}, {})
        >>> similar = TurnScores(torch.tensor([[0.9, torch.nan]]), torch.ones(1, 2) > 0, {})
        >>> found = MiceScores("cu", votes, consistency=similar)
        >>> for missing in (None, 0.5):
        ...     whole = report_mice(found, missing=missing).all_turns
        ...     print({name: (round(x.estimate, 3), x.count) for name, x in whole.items()})
        {'CC': (0.9, 1), 'CU': (0.625, 2)}
        {'CC': (0.7, 2), 'CU': (0.625, 2)}
    """
    if missing is not None:
        check_number("missing", missing, low=0.0, high=1.0)
    sessions = found.awareness.sessions
    tables: dict[str, Tensor] = {}
    if found.following is not None:
        tables["IF"] = _answered(sessions, found.following)
    if found.consistency is not None:
        similar = _answered(sessions, found.consistency)
        tables["CC"] = similar if missing is None else similar.nan_to_num(nan=missing)
    tables[NAMES[found.split]] = found.awareness.table(lambda scores: scores[0])
    return SessionReport(
        benchmark=f"MICE-Bench ({found.split})",
        sessions=len(sessions),
        turns=sessions[0].chain.turns,
        by_turn={name: _by_turn(table, _range(name)) for name, table in tables.items()},
        all_turns={name: _over_all(table, _range(name)) for name, table in tables.items()},
        notes=() if missing is None else (f"CC: a turn without unchanged objects is {missing:g}",),
    )


def _range(name: str) -> tuple[float, float]:
    """Return the range of a measure; CC is a cosine, the others are shares."""
    return COSINE if name == "CC" else SHARE


def _answered(sessions: Sequence[Session], scores: TurnScores) -> Tensor:
    """Return scores [B, N], float64, NaN where there was nothing to measure."""
    for (b, n), why in scores.lost.items():
        raise UnansweredError(
            f"session {sessions[b].chain.id!r}, turn {n + 1}: expected an answer "
            f"({len(scores.lost)} missing in all), got none: {why}; a report needs every answer, "
            "and the same command asks for those missing"
        )
    return scores.score.double()


def _by_turn(table: Tensor, bounds: tuple[float, float]) -> list[Measured]:
    found = interval_of(lambda x: x.nanmean(dim=0), (table,))
    counts = table.isfinite().sum(dim=0)
    return measured(bounded_interval(found, counts.double(), bounds)[0], counts.tolist())


def _over_all(table: Tensor, bounds: tuple[float, float]) -> Measured:
    """Average over all turns; the interval is over sessions, the count is of turns."""
    found = interval_of(lambda x: x.nanmean().reshape(1), (table,))
    there = table.isfinite()
    # Turns of a session are not independent, so a flat interval is widened by its sessions.
    sessions = there.any(dim=1).sum().double().reshape(1)
    (whole,) = measured(bounded_interval(found, sessions, bounds)[0], [int(there.sum())])
    return whole
