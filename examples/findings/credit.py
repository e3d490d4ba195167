"""Settings and claims on credit assignment: broadcast over the chain, or per turn."""

from __future__ import annotations

from .settings import BASE, JUDGES
from .study import Claim, Finding, Setting, Study
from .worlds import SHAPES_APART

CREDITS = {"broadcast": "trajectory", "own turn": "turn", "to go": "to_go"}
SEEN = {"exact": None, "neighbors": "NeighborRewards", "short-sighted": "ShortSightedJudge"}
TITLES = {
    "exact": "A judge who compares with the true picture",
    "neighbors": "A judge who compares with the picture before",
    "short-sighted": "A judge who looks closely at the last turn alone",
}
LONGER = {"data.turns": 6}


def _setting(judge: str, credit: str, **more: object) -> Setting:
    options: dict[str, object] = {**more}
    if SEEN[judge] is not None:
        options["rewards.scorer"] = f"{JUDGES}:{SEEN[judge]}"
    if CREDITS[credit] != "trajectory":
        options["rewards.credit"] = CREDITS[credit]
    return Setting(credit, options)


def _finding(judge: str, *, better: str, worse: str) -> Finding:
    return Finding(
        judge,
        TITLES[judge],
        tuple(_setting(judge, credit) for credit in CREDITS),
        (Claim(better, worse), Claim("to go", worse)),
    )


SIX = Finding(
    "six_turns",
    "Six turns in training, exact judge; evaluation is on three",
    tuple(_setting("exact", credit, **LONGER) for credit in CREDITS),
    (Claim("own turn", "broadcast"), Claim("to go", "broadcast")),
)
EXACT = _finding("exact", better="own turn", worse="broadcast")
NEIGHBORS = _finding("neighbors", better="own turn", worse="broadcast")
SHORT_SIGHTED = _finding("short-sighted", better="broadcast", worse="own turn")

ABOUT = "the preset `shapes-nft`: exact judge, the advantage of the chain broadcast to its turns"
CREDIT = Study(
    "credit",
    "Credit to turns: chains whose turns go on with each other",
    BASE,
    ABOUT,
    (EXACT, NEIGHBORS, SHORT_SIGHTED, SIX),
    train_turns=6,
)
CREDIT_APART = Study(
    "credit_apart",
    "Credit to turns: chains whose turns have nothing to do with each other",
    BASE,
    ABOUT,
    (EXACT, NEIGHBORS, SHORT_SIGHTED),
    world=SHAPES_APART,
)
