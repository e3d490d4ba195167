"""Settings with fewer forward passes, and claims of non-inferiority to the preset."""

from __future__ import annotations

from .settings import CONSISTENCY
from .study import Claim, Finding, Setting, Study

MARGIN = 3.0  # margin of non-inferiority, points of Overall(3)
KL = {"objective.kl_coef": 0.01}  # shapes-nft has no KL term, but kontext-nft has one
OLD = {"objective.old_slope": 0.0}
EIGHTH = {"objective.kl_share": 0.125}
QUARTER = {"objective.kl_share": 0.25}
STEPS = {CONSISTENCY: 0.5, "objective.stochastic_steps": 3}  # all but the last of four
TWO = {**STEPS, "objective.stochastic_steps": 2}

FINDINGS = (
    Finding(
        "nft",
        "NFT: 27.9 F in place of 33.6",
        (
            Setting("NFT", KL),
            Setting("KL on an eighth of the rows, old is current", {**KL, **EIGHTH, **OLD}),
        ),
        (Claim("KL on an eighth of the rows, old is current", "NFT", margin=MARGIN),),
        note="F is the cost of one forward pass of one row. FLUX.1-Kontext at three turns of six "
        "steps with checkpointing: 18 F to sample, and for each turn 3.19 to update, 1 for the old "
        "policy, 1 for the reference. An old policy that is the current one costs none; a KL on an "
        "eighth of the rows costs 1/8.",
    ),
    Finding(
        "grpo",
        "GRPO: 37.2 F in place of 66",
        (
            Setting("GRPO, three steps", STEPS, "shapes-grpo"),
            Setting("two steps", TWO, "shapes-grpo"),
        ),
        (Claim("two steps", "GRPO, three steps", margin=MARGIN),),
        note="FLUX.1-Kontext: 18 F to sample, and 3.2 F for each trained step: five of six are 66 "
        "F, two are 37.2 F. Here three of four steps are the most that can be trained: all but "
        "the last.",
    ),
    Finding(
        "nft_alone",
        "NFT: each technique alone",
        (
            Setting("NFT", KL),
            Setting("KL on a quarter of the rows: 31.3 F", {**KL, **QUARTER}),
            Setting("old is current: 30.6 F", {**KL, **OLD}),
        ),
        (
            Claim("KL on a quarter of the rows: 31.3 F", "NFT", margin=MARGIN),
            Claim("old is current: 30.6 F", "NFT", margin=MARGIN),
        ),
        note="F of FLUX.1-Kontext beside 33.6 F of Edit-R1's settings. Text of 128 tokens in place "
        "of 512 would make F itself 17% cheaper; instructions of this world fill their ten tokens, "
        "so that is not measured here.",
    ),
    Finding(
        "grpo_alone",
        "GRPO: each way to train fewer steps",
        (
            Setting("GRPO, three steps", STEPS, "shapes-grpo"),
            Setting("the first two", TWO, "shapes-grpo"),
            Setting(
                "a window of two that moves", {**TWO, "objective.window_interval": 5}, "shapes-grpo"
            ),
            Setting("two of three, drawn", {**STEPS, "objective.share": 0.66}, "shapes-grpo"),
        ),
        (
            Claim("the first two", "GRPO, three steps", margin=MARGIN),
            Claim("a window of two that moves", "GRPO, three steps", margin=MARGIN),
            Claim("two of three, drawn", "GRPO, three steps", margin=MARGIN),
        ),
        why="A guess that no run here tests: the first steps decide what an edit will be, so their "
        "noise moves the reward most; a later step adds noise to the gradient.",
        note="FLUX.1-Kontext: two of six steps are 37.2 F, first or in a window; three of five, "
        "drawn at random for every turn, 46.8 F. Noise and first steps that a group shares in "
        "turn 1 would save at most 2 F, and only where the window stands later, which loses here.",
    ),
)

COST = Study(
    "cost",
    "Fewer forward passes: what they lose in the shapes world",
    FINDINGS[0].settings[0],
    "the preset `shapes-nft` with kl_coef 0.01",
    FINDINGS,
    seeds=tuple(range(8)),
)
