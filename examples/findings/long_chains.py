"""Settings for training on long chains, evaluated on chains of twenty turns."""

from __future__ import annotations

from .study import THREE, Finding, HeldOut, Setting, Study
from .worlds import COMPETENT, PICTURES

TWENTY, STILL = HeldOut(20, part=2), HeldOut(10, no_change=True)
HELD_OUT = (THREE, TWENTY, STILL)
NFT, GRPO = "pictures-nft", "pictures-grpo"
OWN = {"rewards.credit": "turn"}
GROWN = {"data.turns": 6, "growth.first": 2, "growth.every": 8}
STILLNESS = {"data.identity_share": 0.25, "rewards.weights.identity": 1.0}
NEIGHBORS = {"rewards.weights.consecutive": 0.5}
GENTLE = {"training.learning_rate": 3e-4, "objective.kl_coef": 0.03}
OPSD = {"objective": "mt_opsd", "data.drift": 4}
TEACHING = "self_distillation.py"

BASE = Setting("NFT", preset=NFT)
TURN = Setting("NFT, own turn", OWN, NFT)
LONG_CHAINS = Study(
    "long_chains",
    "Long chains in the world of pictures: trained on three turns, tested on twenty",
    BASE,
    "the preset `pictures-nft`: one advantage per trajectory of three turns, w_CC 0.5",
    (
        Finding(
            "recipes",
            "Recipes",
            (
                BASE,
                TURN,
                Setting("GRPO", preset=GRPO),
                Setting("GRPO, own turn", OWN, GRPO),
                Setting("own turn, two turns growing to six", {**OWN, **GROWN}, NFT),
                Setting("own turn, a quarter without a change", {**OWN, **STILLNESS}, NFT),
                Setting(
                    "own turn, consistency with the turn before, too", {**OWN, **NEIGHBORS}, NFT
                ),
                Setting(
                    "consistency with the turn before, 120 rounds",
                    {**OWN, **NEIGHBORS, "training.rounds": 120},
                    NFT,
                ),
                Setting("MT-OPSD", OPSD, NFT, TEACHING),
                Setting("NFT, own turn, then MT-OPSD", OPSD, NFT, TEACHING, TURN),
            ),
            (),
        ),
    ),
    world=PICTURES,
    train_turns=6,
    held_out=HELD_OUT,
    rounds=40,
    chains=256,
)

GENTLY = Setting("NFT", GENTLE, NFT)
COMPETENT_START = Study(
    "competent_start",
    "A competent start: what training still gains",
    GENTLY,
    "the preset `pictures-nft` with learning rate 3e-4 and KL 0.03, from the competent editor",
    (
        Finding(
            "recipes",
            "Recipes",
            (
                GENTLY,
                Setting("NFT, own turn", {**GENTLE, **OWN}, NFT),
                Setting("two turns growing to six", {**GENTLE, **GROWN}, NFT),
                Setting("a quarter of turns without a change", {**GENTLE, **STILLNESS}, NFT),
            ),
            (),
        ),
    ),
    world=COMPETENT,
    train_turns=6,
    held_out=HELD_OUT,
    rounds=40,
    chains=256,
)
