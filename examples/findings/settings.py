"""Settings and claims for the paper's findings, with explanations of differences."""

from __future__ import annotations

from dataclasses import replace

from .study import Claim, Finding, Setting, Study
from .worlds import PICTURES, SHAPES

BASE = Setting("base")
CONSISTENCY = "rewards.weights.consistency"
JUDGES = "mteditflow_examples.shapes.scoring"

FINDINGS = (
    Finding(
        "scoring",
        "Scoring: how the turns' scores become one reward",
        (
            Setting("Likert average"),
            Setting("binary average", {"rewards.aggregate": "successes"}),
            Setting("binary AND", {"rewards.aggregate": "all"}),
        ),
        (Claim("Likert average", "binary average"), Claim("binary average", "binary AND")),
        "Likert average > binary average > binary AND.",
        why="The share of informative groups differs: on seed 0 before training, over 24 "
        "groups of 8, in 83% of the groups all rewards are equal under binary AND, 17% under the "
        "binary average and none under the Likert average; inside groups AND correlates with the "
        "Likert average by 0.24, the binary average by 0.69.",
    ),
    Finding(
        "evaluator",
        "Evaluator: which errors of a judge do harm",
        (
            Setting("exact"),
            Setting(
                "biased, little variance",
                {"rewards.scorer": f"{JUDGES}:HastyJudge"},
            ),
            Setting(
                "noisy, little bias",
                {"rewards.scorer": f"{JUDGES}:CarefulJudge"},
            ),
        ),
        (
            Claim("noisy, little bias", "biased, little variance"),
            Claim("exact", "noisy, little bias"),
        ),
        "A judge that thinks (less bias, more variance) > one that does not. The paper only "
        "implies the second claim, that the exact judge is better still.",
        "In training alone; evaluation is always by the exact rewards. The biased judge is "
        "lenient in nine turns of ten: it passes an edit that is right in place or in color "
        "alone, with noise of 0.25 points. The noisy judge is lenient in one turn of ten, with "
        "noise of 1.",
        "These judges were made up for the test, and their error rates were chosen, not fitted to "
        "real ones. Inside groups, which is all that training sees, both are about equally far "
        "from the truth: their rewards correlate with the exact ones by 0.63 (biased) and 0.67 "
        "(noisy) before training, by 0.54 and 0.55 after the base run. So the order of the two "
        "is not given by the signal that they leave. A guess that no run here tests: the edits "
        "that the biased judge passes (a right place or color) are steps toward a right edit, "
        "which noise is not.",
    ),
    Finding(
        "fusion",
        "Fusion: advantages added up, or rewards",
        (
            Setting("advantages, w_CC 0.5"),
            Setting("rewards, w_CC 0.5", {"rewards.fusion": "rewards"}),
            Setting("advantages, w_CC 1", {CONSISTENCY: 1.0}),
            Setting("rewards, w_CC 1", {"rewards.fusion": "rewards", CONSISTENCY: 1.0}),
        ),
        (
            Claim("advantages, w_CC 0.5", "rewards, w_CC 0.5"),
            Claim("advantages, w_CC 1", "rewards, w_CC 1"),
            Claim("advantages, w_CC 1", "rewards, w_CC 1", "content_consistency"),
        ),
        "Advantage level > reward level, and the gap grows with training; the variance of IF in a "
        "group was 5.8 times that of CC.",
        "Compared only at the end of training, so this does not test whether the gap grows.",
        "Inside groups the spread of CC is a third of that of IF (on seed 0: 0.044 and "
        "0.131 before training), so adding rewards up acts like advantages with a third of w_CC: "
        "its CC(3) at w_CC 0.5 and 1 is that of advantages at 0.1 to 0.5. CC starts at 97% here, "
        "so a smaller weight costs Overall nothing, unlike in the paper.",
    ),
    Finding(
        "w_cc",
        "w_CC: the weight of content consistency",
        (
            Setting("0", {CONSISTENCY: 0.0}),
            Setting("0.1", {CONSISTENCY: 0.1}),
            Setting("0.2", {CONSISTENCY: 0.2}),
            Setting("0.5"),
            Setting("1", {CONSISTENCY: 1.0}),
            Setting("2", {CONSISTENCY: 2.0}),
        ),
        (
            Claim("2", "0", "content_consistency"),
            Claim("0", "2", "instruction_following"),
            Claim("0.2", "0"),
            Claim("0.2", "2"),
        ),
        "CC rises and IF falls as w_CC grows; Overall is best at a moderate one (0.15 to 0.2).",
        why="CC(3) moves by 2.4 points over all weights and starts at 97%, so there is little to "
        "lose: without a weight it ends a point below that. Overall follows IF, which falls slowly "
        "up to 0.5 and fast after it.",
    ),
    Finding(
        "group_size",
        "Group size, at 96 trajectories a round",
        (
            Setting("4", {"data.groups": 24, "data.group_size": 4}),
            Setting("8"),
            Setting("16", {"data.groups": 6, "data.group_size": 16}),
            Setting("32", {"data.groups": 3, "data.group_size": 32}),
        ),
        (Claim("16", "4"), Claim("16", "8"), Claim("16", "32")),
        "A moderate group is best: 16 of 8, 16, 32, 64.",
        "Equal samples: a larger group means fewer chains in a round.",
        "A guess that no run here tests: with 96 trajectories a group of 32 "
        "leaves three chains a round, which is few for a world of many edit types; a group of 4 "
        "gives rough means. The paper's rounds are larger, so its best size may be, too.",
    ),
    Finding(
        "steps",
        "Denoising steps, in sampling and evaluation",
        (
            Setting("4"),
            Setting("6", {"sampling.steps": 6, "evaluation.steps": 6}),
            Setting("10", {"sampling.steps": 10, "evaluation.steps": 10}),
        ),
        (Claim("6", "4"), Claim("10", "6"), Claim("10", "4")),
        "Finer steps do best.",
        "Equal rounds, so finer steps cost more; see seconds. The model before training is "
        "evaluated at the same steps.",
        "The untrained editor is as good with 4 steps as with 10 (Overall(3) 17.9 and 17.3), so "
        "finer steps have nothing to repair.",
    ),
    Finding(
        "turns",
        "Turns in training; evaluation is always on three",
        (
            Setting("1", {"data.turns": 1}),
            Setting("2", {"data.turns": 2}),
            Setting("3"),
        ),
        (Claim("2", "1"), Claim("3", "2"), Claim("3", "1")),
        "Overall rises with the number of training turns.",
        "Equal rounds and trajectories, so that more turns are also more images; see seconds.",
        "The errors of this editor are errors of single edits (37% of first turns succeed), which "
        "training on one turn covers, too. With one turn the advantage is that edit's own, and "
        "with three it is shared by three edits: see the next finding.",
    ),
    Finding(
        "objective",
        "Objective, and who is credited",
        (
            Setting("NFT, trajectory"),
            Setting("NFT, turn", {"rewards.credit": "turn"}),
            Setting("NFT, until failure", {"rewards.credit": "until_failure"}),
            Setting("GRPO, trajectory", {CONSISTENCY: 0.5}, "shapes-grpo"),
        ),
        (
            Claim("NFT, trajectory", "GRPO, trajectory"),
            Claim("NFT, trajectory", "NFT, turn"),
            Claim("NFT, trajectory", "NFT, until failure"),
        ),
        "NFT ends above GRPO (turn-3 Overall 45.56 and 44.04, from 38.71). It broadcasts one "
        "advantage to all turns and gives no numbers for the two alternatives, so those claims "
        "only test whether its choice is the best one here.",
        "Turn: every turn is normalized among the same turn of its group. Until failure: the "
        "same, but turns after the first failed one are left out.",
        "Turns succeed almost independently here (on seed 0 before training IF(3) is "
        "3.5%, the product of the three Marginals 2.9%), so an advantage of the trajectory adds "
        "the luck of two other turns to each. Where one failed turn spoils the rest, as the paper "
        "says of photographs, a turn's own advantage leaves out what it did to the later ones.",
    ),
)

LONGER = Finding(
    "long",
    "Longer chains: trained on 3 turns, tested on 1 to 8",
    (BASE,),
    (),
    "Success falls less from turn to turn after training: from turn 1 to 3 Marginal falls by 8.57 "
    "points in untrained Kontext, by 1.58 after GRPO and 1.05 after NFT.",
    why="Marginal(8) / Marginal(1) is higher after training (51%, before 32%); in "
    "points the fall to turn 8 is not smaller (29 after, 25 before), since there is more to fall "
    "from. To turn 3, as far as training went, it falls by 9.5 points before and after.",
)

PAPER = Study(
    "findings",
    "The paper's findings, looked for in the shapes world",
    BASE,
    "the preset `shapes-nft`: Likert average, exact judge, advantage fusion, w_CC 0.5, 12 groups "
    "of 8, 4 steps, 3 turns, DiffusionNFT",
    FINDINGS,
    LONGER,
)


def in_pictures(study: Study, *, seeds: tuple[int, ...]) -> Study:
    """Return a study of the shapes world, moved to the world of pictures without its reasons."""

    def moved(setting: Setting) -> Setting:
        options = {
            name: value.replace(f".{SHAPES.name}.", f".{PICTURES.name}.")
            if isinstance(value, str)
            else value
            for name, value in setting.options.items()
        }
        preset = setting.preset.replace(SHAPES.name, PICTURES.name)
        return replace(setting, options=options, preset=preset)

    findings = tuple(
        replace(finding, settings=tuple(map(moved, finding.settings)), note="", why="")
        for finding in study.findings
    )
    return replace(
        study,
        name=f"{study.name}_pictures",
        title=study.title.replace(SHAPES.title, PICTURES.title),
        base=moved(study.base),
        about=study.about.replace(SHAPES.name, PICTURES.name),
        findings=findings,
        longer=None if study.longer is None else replace(study.longer, why=""),
        seeds=seeds,
        world=PICTURES,
    )


PAPER_IN_PICTURES = in_pictures(PAPER, seeds=(0, 1))
