"""Recipes with fewer forward passes, and what each loses beside the preset that it changes."""

from __future__ import annotations

from .settings import CONSISTENCY
from .study import Claim, Finding, Setting, Study

MARGIN = 3.0  # points of Overall(3)
KL = {"objective.kl_coef": 0.01}  # shapes-nft has none, kontext-nft has
OLD = {"objective.old_slope": 0.0}
EIGHTH = {"objective.kl_share": 0.125}
STEPS = {CONSISTENCY: 0.5, "objective.stochastic_steps": 3}  # all but the last of four

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
            Setting("two steps", {**STEPS, "objective.stochastic_steps": 2}, "shapes-grpo"),
        ),
        (Claim("two steps", "GRPO, three steps", margin=MARGIN),),
        note="FLUX.1-Kontext: 18 F to sample, and 3.2 F for each trained step: five of six are "
        "66 F, two are 37.2 F. Here three of four steps are all that can be trained but the last.",
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
