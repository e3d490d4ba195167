"""LME-Bench: success rate and collapse rate of sessions of ten turns.

Pass 1: a judge sees the session up to a turn and rates, from 0 to 10, how well the last instruction
was followed and how consistent the last image is with the one BEFORE it. A turn succeeds if both
are 7 or more; a session is rated up to its first failure. SR@k is the share of sessions whose turns
1 to k all succeeded.

Pass 2: for every turn the judge sees the SOURCE, the turn's image and the instructions so far, and
rates content loss and surface corruption, 0, 1 or 2 each. The image is destroyed if they add up to
2 or more. A session collapses at the first of two destroyed turns in a row and stays collapsed.
CR@k is the share of sessions that collapsed by turn k. It looks one turn ahead: if turns 3 and 4
are destroyed, the session counts in CR@3. The benchmark reports k = 3, 5, 8 and 10.

Both rates and their rules are the paper's (MT-OPSD, arXiv 2609.35611). The following come from its
public code only (liangbingzhao/MT-OPSD): the images that pass 1 shows (all so far, the source at
the size of the first result), the JPEGs of pass 2 (longest side 768, quality 90), and the rule that
a session with a missing image, or a call without an answer, ends the evaluation. That code asks two
more questions, of quality and of appearance, which neither rate uses and which are left out here.
The authors' judge is GPT-4o. The wording of the questions is this library's own, so numbers are not
comparable with those of the paper.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mteditflow.evaluation.benchmarks.items import Rubric, Scores
from mteditflow.evaluation.benchmarks.mse import failed, session_report
from mteditflow.evaluation.benchmarks.sessions import (
    Session,
    SessionReport,
    SessionScores,
    heading,
    history,
    measured,
    read_images,
    request_of,
    score_turns,
)
from mteditflow.metrics import collapse_rate, wilson_interval
from mteditflow.rewards import ChatClient
from mteditflow.rewards.judge.prompts import Request
from mteditflow.rewards.judge.wording import image_part, quote, text_part

REPORTED = (3, 5, 8, 10)  # turns of the benchmark's tables
DESTROYED = 2  # sum of both damage scores from which an image is destroyed
LONGEST_SIDE, QUALITY = 768, 90  # JPEGs of pass 2: pixels, quality of 100

FOLLOWING_TASK = """\
You rate one turn of a long session with an image editor. The editor was given an image and an \
instruction, and went on from its own result with the next instruction. You see the source, the \
instructions so far and the image after each. Rate the last turn alone, by what differs between \
its image and the image just before it. What came earlier only helps you to understand."""
FOLLOWING = Rubric(
    {
        "following": "whether the very change that the last instruction asks for happened "
        "between these two images: what is to be added is new, what is to be removed or made fewer "
        "is less than before, the thing that is named was itself altered. 0: no such change, also "
        "where the earlier image already looked that way; 10: just as it says",
        "consistency": "whether all that should have stayed is as in the image just before. An "
        "instruction about a part of the image: 0 if it is another scene, 10 if nothing else "
        "changed. An instruction about the whole image (style, weather, light, color): that it "
        "changed is right; 0 if subjects, their identity or the layout are lost, 10 if all of "
        "them are there in the new look",
    },
    low=0,
    high=10,
)
DAMAGE_TASK = """\
You look for damage in one image of a long session with an image editor. You see the source, the \
instructions that were carried out since, in order, and the image as it is now. A look that an \
instruction asked for is no damage, however far from a photograph it is: mosaics have hard blocks, \
watercolors run, old photographs have no color. Damage is what a skilled artist with the same \
instructions would not have left behind: noise, speckle, smears, blur, melted or doubled shapes, \
glaring color, flat patches in place of texture, shards, a background that shows no place any \
more, a subject that is a mere outline."""
DAMAGE = Rubric(
    {
        "content_loss": "0: every main thing and the place can be recognized; 1: at least one of "
        "them cannot; 2: the image does not show the scene any more",
        "surface_corruption": "0: none worth a word; 1: it is plain to see, and the image bears "
        "it; 2: it is most of what there is to see",
    },
    low=0,
    high=2,
)


@dataclass(frozen=True, eq=False)
class LmeScores:
    """Scores of both passes over the same sessions.

    Attributes:
        following: pass 1: following and consistency, 0..10, up to each session's first failure.
        damage: pass 2: content loss and surface corruption, 0..2, of every turn.
    """

    following: SessionScores
    damage: SessionScores


def following_request(session: Session, urls: Sequence[str], turn: int) -> Request:
    """Build the question of pass 1 about a turn, from 1, given the URLs of all images."""
    instructions = session.chain.instructions[:turn]
    return history(FOLLOWING_TASK, FOLLOWING, instructions, urls[: turn + 1])


def damage_request(session: Session, urls: Sequence[str], turn: int) -> Request:
    """Build the question of pass 2 about a turn, from 1, given the URLs of all images."""
    done = "\n".join(
        f"Instruction of turn {n}: {quote(x)}"
        for n, x in enumerate(session.chain.instructions[:turn], start=1)
    )
    content = [
        text_part(f"{heading(DAMAGE_TASK, DAMAGE)}\n\nThe source:"),
        image_part(urls[0]),
        text_part(f"{done}\nThe image now, after turn {turn}:"),
        image_part(urls[turn]),
    ]
    return request_of(content, DAMAGE)


def jpeg_urls(session: Session) -> list[str]:
    """Encode all images of a session as JPEG data URLs, longest side at most 768 pixels."""
    return [_jpeg_url(image) for image in read_images(session)]


def _jpeg_url(image: Image.Image) -> str:
    small, stream = image.copy(), io.BytesIO()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    small.save(stream, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


async def score_lme(
    client: ChatClient, sessions: Sequence[Session], *, progress: bool = False
) -> LmeScores:
    """Score both passes by a judge, with at most 20 calls per session of ten turns.

    See ``score_turns``. Lost answers in pass 1 do not stop pass 2: with a cache in the client, a
    repeated call requests only lost answers.

    Source: MT-OPSD (arXiv 2609.35611) and its public code.
    """
    return LmeScores(
        await score_turns(client, sessions, following_request, stop=failed, progress=progress),
        await score_turns(client, sessions, damage_request, load=jpeg_urls, progress=progress),
    )


def is_destroyed(scores: Scores) -> bool:
    """Whether content loss and surface corruption of a turn add up to 2 or more."""
    return sum(scores) >= DESTROYED


def report_lme(found: LmeScores) -> SessionReport:
    """Return SR@k and CR@k for every k, with Wilson's intervals over sessions.

    Raises:
        UnansweredError: an answer of the judge is missing; the message names session and turn.

    Example:
        >>> from pathlib import Path
        >>> from mteditflow.chains import Chain
        >>> chain = Chain(id="7", image="7.png", instructions=("a", "b", "c"))
        >>> sessions = (Session(chain, (Path("7.png"),) * 4),)
        >>> rated = {("7", 1): (9, 9), ("7", 2): (6, 9)}
        >>> damage = {("7", 1): (0, 0), ("7", 2): (1, 1), ("7", 3): (0, 2)}
        >>> found = LmeScores(*(SessionScores(sessions, x, {}) for x in (rated, damage)))
        >>> report = report_lme(found)
        >>> {name: [turn.estimate for turn in own] for name, own in report.by_turn.items()}
        {'SR': [1.0, 0.0, 0.0], 'CR': [0.0, 1.0, 1.0]}
    """
    report = session_report("LME-Bench", found.following)
    rate = collapse_rate(found.damage.table(is_destroyed))
    counts = rate.new_full(rate.shape, report.sessions)
    own = measured(wilson_interval(rate * counts, counts), [report.sessions] * report.turns)
    return report.model_copy(update={"by_turn": {**report.by_turn, "CR": own}})
