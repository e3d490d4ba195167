"""Settings and claims that compare all objectives, credits, selections and guards."""

from __future__ import annotations

from .settings import BASE, CONSISTENCY
from .study import BASE_RUN, UNTRAINED, Claim, Finding, Setting, Study
from .tries import METHODS, chosen, protocol, read_tries

FLOOR = {"rewards.floor": 0.98, "rewards.floor_rate": 25.0}
AND = {"rewards.aggregate": "all"}
UNTRAINED_LABEL = "untrained"

SELF = Setting(
    "self-distillation",
    {"training.minibatches": 8, "training.learning_rate": 2e-3, "objective.share": 0.5},
    script="self_distillation.py",
)
TAUGHT = Setting(
    "distillation",
    {"teacher.path": BASE_RUN, "training.final_rate": 0.3},
    script="self_distillation.py",
)

TRIED = read_tries()
CHOSEN = {method.label: chosen(method, TRIED) for method in METHODS}
# F of a trajectory, sampling and update: tests count them by running the objectives.
FORWARDS = dict.fromkeys(CHOSEN, 24.0) | {
    "NFT, NormGuard": 27.0,
    "GRPO": 30.0,
    "Guard": 33.0,
    "DPPO": 33.0,
}
ROUNDS = 20


def for_as_many_flops(label: str) -> Setting:
    """Return a method with as many FLOPs as `ROUNDS` rounds of NFT, in rounds of its own."""
    setting = CHOSEN[label]
    rounds = round(ROUNDS * FORWARDS["NFT"] / FORWARDS[label])
    if rounds == ROUNDS:
        return setting
    options = {**setting.options, "training.rounds": rounds}
    return Setting(f"{label}, {rounds} rounds", options, setting.preset)


EQUAL = tuple(for_as_many_flops(label) for label in CHOSEN)
COSTLIER = tuple(x for x in EQUAL if "training.rounds" in x.options)

FINDINGS = (
    Finding(
        "loss",
        "Objectives, at equal numbers of samples",
        (UNTRAINED, *CHOSEN.values()),
        (
            *(Claim(name, UNTRAINED_LABEL) for name in CHOSEN),
            *(Claim(name, "NFT") for name in CHOSEN if name != "NFT"),
            Claim("Guard", "GRPO"),
            Claim("DPPO", "GRPO"),
        ),
        note="Every objective has the same number of rollouts, the same optimizer, the same "
        f"rewards and no KL. {protocol(TRIED)} Seconds are wall-clock time on a machine with "
        "varying other load.",
    ),
    Finding(
        "flops",
        "Objectives, at equal FLOPs",
        (CHOSEN["NFT"], *COSTLIER),
        tuple(Claim(x.label, "NFT") for x in COSTLIER),
        note=f"F is the cost of one forward pass of one row. {ROUNDS} rounds of NFT are "
        f"{ROUNDS} x {FORWARDS['NFT']:g} F for each of 96 trajectories; methods that cost more get "
        "fewer rounds, to the nearest whole one, which is at most 4% more or fewer FLOPs: "
        + ", ".join(f"{x.label} ({FORWARDS[x.label.rpartition(', ')[0]]:g} F)" for x in COSTLIER)
        + ". All others cost as much as NFT, and their rows above hold.",
    ),
    Finding(
        "credit",
        "Credit: which turns answer for a reward",
        (
            UNTRAINED,
            Setting("trajectory"),
            Setting("to go", {"rewards.credit": "to_go"}),
            Setting("mixture", {"rewards.credit": "mixture"}),
            Setting("turn", {"rewards.credit": "turn"}),
            Setting("until failure", {"rewards.credit": "until_failure"}),
        ),
        (
            Claim("trajectory", UNTRAINED_LABEL),
            Claim("to go", "trajectory"),
            Claim("mixture", "trajectory"),
            Claim("turn", "trajectory"),
            Claim("turn", "mixture"),
            Claim("until failure", "trajectory"),
        ),
        note="Trajectory: each turn has the advantage of the whole chain (the paper's broadcast). "
        "To go: the mean of its own reward and those of the turns after it. Turn: its own. "
        "Mixture: half of the trajectory's, half of its own. Until failure: its own, and turns "
        "after the first failed one are left out.",
        why="Turns succeed almost independently in this world (see the last finding of "
        "[findings.md](findings.md)), so the more a turn is credited for others, the more of "
        "their noise is in its advantage.",
    ),
    Finding(
        "selection",
        "Selection: which groups are trained on, and which chains are drawn",
        (
            UNTRAINED,
            Setting("Likert, all"),
            Setting("Likert, draw informative", {"data.draw": "informative"}),
            Setting("AND, all", AND),
            Setting("AND, drop groups", {**AND, "rewards.groups": "informative"}),
            Setting("AND, draw informative", {**AND, "data.draw": "informative"}),
        ),
        (
            Claim("Likert, draw informative", "Likert, all"),
            Claim("AND, drop groups", "AND, all"),
            Claim("AND, draw informative", "AND, all"),
        ),
        note="Drop groups: groups whose trajectories all have the top score, all the lowest, or "
        "all the same reward are left out; under the Likert average that is at most one group in "
        "a round, so it is not run. Draw informative: chains are drawn the more often, the more "
        "the rewards of their last groups differed. AND: a chain counts if all its turns "
        "succeed, so most groups are not informative.",
    ),
    Finding(
        "floor",
        "A floor on content consistency, beside a fixed weight",
        (
            UNTRAINED,
            Setting("w_CC 0", {CONSISTENCY: 0.0}),
            Setting("w_CC 0, floor 0.98", {CONSISTENCY: 0.0, **FLOOR}),
            Setting("w_CC 0.5"),
        ),
        (
            Claim("w_CC 0, floor 0.98", "w_CC 0", "content_consistency"),
            Claim("w_CC 0, floor 0.98", "w_CC 0"),
            Claim("w_CC 0, floor 0.98", "w_CC 0.5", "content_consistency"),
            Claim("w_CC 0, floor 0.98", "w_CC 0.5"),
        ),
        note="The floor is on the mean consistency of a round's chains, held by a Lagrange "
        "multiplier; evaluation is on other chains, by CC(3).",
        why="The floor is held: over the last five rounds the mean consistency in training was "
        "97.7, 98.0 and 98.0% (seeds 0, 1, 2), by multipliers of 1.7, 1.6 and 0.8. It is above "
        "the consistency of the untrained model, and costs following as a weight of that size "
        "does.",
    ),
    Finding(
        "distillation",
        "Distillation, without any reward",
        (UNTRAINED, Setting("NFT"), TAUGHT, SELF),
        (
            Claim(TAUGHT.label, UNTRAINED_LABEL),
            Claim("NFT", TAUGHT.label),
            Claim(SELF.label, UNTRAINED_LABEL),
            Claim(SELF.label, UNTRAINED_LABEL, "marginal"),
            Claim(SELF.label, UNTRAINED_LABEL, "content_consistency"),
        ),
        note="Distillation: the teacher is the NFT run of the same seed, and gets the same "
        "conditioning as the student. Self-distillation: the teacher is the untrained model, "
        "conditioned on the true image before each turn where the student is on its own; the "
        "student can learn to recover from its own mistakes, but not to edit a clean image "
        "better. Both by `examples/self_distillation.py`, at the states that the student "
        "reaches; options were chosen on seed 0 among a few.",
        why="A guess for self-distillation: the errors of this editor are wrong edits, which a "
        "clean image as conditioning does not correct. Wear, which the student could learn to "
        "repair, is small in pictures of twelve by twelve pixels.",
    ),
)

OBJECTIVES = Study(
    "objectives",
    "Objectives, credits, selections and guards, in the shapes world",
    BASE,
    "the preset `shapes-nft`: DiffusionNFT, one advantage per trajectory, w_CC 0.5, 12 groups of "
    "8, 4 steps, 3 turns",
    FINDINGS,
)
