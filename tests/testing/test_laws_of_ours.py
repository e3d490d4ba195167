"""Our own functions keep every law. `make laws` draws thousands of cases in place of dozens."""

import os
import secrets
from functools import partial

import pytest
import torch

import mteditflow as mt
from mteditflow.testing import (
    Aggregator,
    Average,
    Density,
    Fusion,
    GroupAdvantage,
    LogProb,
    Loss,
    NFTLoss,
    PolicyLoss,
    Selection,
    SolverStep,
    TurnCreditFunction,
)
from mteditflow.testing.advantage import ADVANTAGE
from mteditflow.testing.densities import KL, LOG_PROB
from mteditflow.testing.fusion import FUSION
from mteditflow.testing.losses import LOSS
from mteditflow.testing.models import AVERAGE
from mteditflow.testing.policy_losses import NFT_LOSS, POLICY_LOSS
from mteditflow.testing.selection import SELECTION
from mteditflow.testing.solvers import SOLVER
from mteditflow.testing.turns import AGGREGATOR, CREDIT

# `make quick` and `make laws` draw other cases each time; a failing one is printed in full.
NEW_SEEDS = os.environ.get("HYPOTHESIS_PROFILE") == "random"
THOUSANDS = os.environ.get("MTEDITFLOW_LAWS") == "thousands"
# Advantages and credit; their variants and what goes with them; losses and solvers. New seeds on
# every run need few cases in each.
CHEAP, WHOLE, DEAR = (10_000, 3_000, 500) if THOUSANDS else (8, 4, 4) if NEW_SEEDS else (30, 25, 20)
EXACT = {"zero": 0.0, "tolerance": 1e-9, "eps": 1e-4}
# What this library promises beyond what any function must.
PROMISES = {"detaches": True, "float32": True}
# The adaptive loss divides by detached errors: its gradient is not that of its value.
WEIGHTED = ("gradient-of-value", "second-derivatives")
GROUP_WISE = ("slice-equals-whole",)  # rows of a group are compared with each other
VELOCITIES = {"velocity": "latent", "reference_velocity": "latent"}
MATCHING = {"velocity": "latent", "target": "latent"}
DISTILLATION = {"velocity": "latent", "teacher_velocity": "latent"}
GROUPED = {**VELOCITIES, "target": "latent", "advantage": "number"}
NFT = {**MATCHING, "old_velocity": "latent", "r": "share", "sigma": "sigma"}
STEPS = {"log_prob": "log-ratio", "old_log_prob": "number", "advantage": "number"}
GUARD = {"next_x": "latent", "mean": "latent", "old_mean": "latent", "std": "positive"}


def kept(reward, group, valid):
    return mt.select_groups(reward, group, valid=valid).keep


def trajectory_advantage(reward, group, valid=None):
    """The whole way of a reward of one turn: credit, then the advantage of that turn."""
    lost = None if valid is None else ~valid[:, None]
    signal = mt.TrajectoryCredit()(reward[:, None], lost=lost)
    return mt.turn_advantage({"a": signal}, {"a": 1.0}, group).value[:, 0]


def normalized_likert(score, turn_mask):
    return mt.likert_average(score, turn_mask=turn_mask)


def mean_to_go(reward, turn_mask):
    return mt.RewardToGo(1.0)(reward, turn_mask=turn_mask).value.nan_to_num(0)


def step(solver, x_t, velocity, sigma, next_sigma, noise_level):
    return solver(noise_level)(x_t, velocity, sigma, next_sigma)


def surrogate_by_step(log_prob, old_log_prob, advantage, valid=None):
    return mt.clipped_surrogate_loss(
        log_prob, old_log_prob, advantage, clip_low=0.1, clip_high=0.3, valid=valid
    )


def gated(log_prob, old_log_prob, advantage, divergence, valid=None):
    return mt.divergence_gated_loss(
        log_prob, old_log_prob, advantage, divergence, threshold=0.5, valid=valid
    )


def guarded(next_x, mean, old_mean, std, valid=None):
    return mt.guard_log_ratio(next_x, mean, old_mean, std, reduction="mean", valid=valid)


def advantage(function, **options):
    return GroupAdvantage(function, **EXACT, **PROMISES, **options)


def in_one_group(function, velocity, target, advantage, *, valid=None, **other):
    ids = torch.zeros(len(velocity), dtype=torch.int64, device=velocity.device)
    return function(velocity, *other.values(), target, advantage, ids, valid=valid)


def loss(function, roles, trained=("velocity",), **options):
    return Loss(function, roles, trained, **PROMISES, **options)


def log_prob(function, reduction):
    return LogProb(function, reduction, deterministic=True, float32=True)


def kl(function, reduction):
    return Density(function, reduction, float32=True)


DENSITIES = [
    (name, laws, subject, function, reduction)
    for name, laws, subject, function in (
        ("gaussian_log_prob", LOG_PROB, log_prob, mt.gaussian_log_prob),
        ("gaussian_kl", KL, kl, mt.gaussian_kl),
    )
    for reduction in ("mean", "sum")
]
OURS = [
    ("group_advantage", ADVANTAGE, advantage(mt.group_advantage), CHEAP, ()),
    (
        "group_advantage, std of the batch",
        ADVANTAGE,
        advantage(partial(mt.group_advantage, std="batch"), std="batch"),
        WHOLE,
        (),
    ),
    (
        "group_advantage, no std",
        ADVANTAGE,
        advantage(partial(mt.group_advantage, std="none"), std="none"),
        WHOLE,
        (),
    ),
    (
        "softmax_advantage",
        ADVANTAGE,
        advantage(mt.softmax_advantage, std="batch"),
        WHOLE,
        ("size", "large-groups"),  # differences are not those of rewards: exponentials
    ),
    ("turn_advantage", ADVANTAGE, advantage(trajectory_advantage), WHOLE, ()),
    ("binary_and", AGGREGATOR, Aggregator(mt.binary_and), WHOLE, ()),
    ("binary_average", AGGREGATOR, Aggregator(mt.binary_average), WHOLE, ()),
    (
        "likert_average",
        AGGREGATOR,
        Aggregator(normalized_likert, values=(1.0, 2.0, 3.0, 4.0, 5.0)),
        WHOLE,
        (),
    ),
    ("turn_average", AGGREGATOR, Aggregator(mt.turn_average, values=(0.0, 0.25, 1.0)), WHOLE, ()),
    ("reward_to_go", CREDIT, TurnCreditFunction(mt.reward_to_go), CHEAP, ()),
    (
        "reward_to_go, discounted",
        CREDIT,
        TurnCreditFunction(partial(mt.reward_to_go, discount=0.5)),
        CHEAP,
        (),
    ),
    ("RewardToGo", CREDIT, TurnCreditFunction(mean_to_go), WHOLE, ()),
    (
        "stop_after_failure",
        CREDIT,
        TurnCreditFunction(
            mt.stop_after_failure, values=(0.0, 1.0), reads="earlier", linear=False
        ),
        CHEAP,
        (),
    ),
    ("fuse_advantages", FUSION, Fusion(mt.fuse_advantages, **EXACT), WHOLE, ()),
    ("fuse_rewards", FUSION, Fusion(mt.fuse_rewards, level="reward", **EXACT), WHOLE, ()),
    ("select_groups", SELECTION, Selection(kept), WHOLE, ()),
    (
        "clipped_surrogate_loss",
        POLICY_LOSS,
        PolicyLoss(surrogate_by_step, "none", "valid", 0.1, 0.3, **PROMISES),
        DEAR,
        (),
    ),
    ("nft_loss", NFT_LOSS, NFTLoss(mt.nft_loss, "valid", **PROMISES), DEAR, ()),
    (
        "adaptive_nft_loss",
        LOSS,
        loss(partial(mt.adaptive_nft_loss, nft_beta=0.5), NFT, valid="valid"),
        DEAR,
        WEIGHTED,
    ),
    ("velocity_kl", LOSS, loss(mt.velocity_kl, VELOCITIES, valid="valid"), DEAR, ()),
    ("matching_log_prob", LOSS, loss(mt.matching_log_prob, MATCHING, valid="valid"), DEAR, ()),
    (
        "matching_log_prob, huber",
        LOSS,
        loss(
            partial(mt.matching_log_prob, weighting="huber"),
            {**MATCHING, "sigma": "sigma"},
            valid="valid",
        ),
        DEAR,
        ("second-derivatives",),  # near 0 they change within a step of finite differences
    ),
    (
        "matching_surrogate_loss",
        LOSS,
        loss(
            partial(mt.matching_surrogate_loss, clip_low=0.1, clip_high=0.1),
            {**MATCHING, "old_velocity": "latent", "advantage": "number"},
            valid="valid",
        ),
        DEAR,
        (),
    ),
    (
        "flow_awr_loss",
        LOSS,
        loss(
            mt.flow_awr_loss,
            {**MATCHING, "old_velocity": "latent", "advantage": "number"},
            valid="valid",
        ),
        DEAR,
        (),
    ),
    (
        "exact_flow_awr_loss",
        LOSS,
        loss(mt.exact_flow_awr_loss, {**MATCHING, "advantage": "share"}, valid="valid"),
        DEAR,
        (),
    ),
    (
        "crd_loss",
        LOSS,
        loss(partial(in_one_group, mt.crd_loss), GROUPED, valid="valid"),
        DEAR,
        (*WEIGHTED, *GROUP_WISE),
    ),
    (
        "dgpo_loss",
        LOSS,
        loss(
            partial(in_one_group, partial(mt.dgpo_loss, dgpo_beta=0.5)), GROUPED, valid="valid"
        ),
        DEAR,
        (*WEIGHTED, *GROUP_WISE),
    ),
    (
        "distillation_loss",
        LOSS,
        loss(mt.distillation_loss, DISTILLATION, valid="valid"),
        DEAR,
        (),
    ),
    (
        "velocity_norm_hinge",
        LOSS,
        loss(mt.velocity_norm_hinge, VELOCITIES, valid="valid"),
        DEAR,
        ("second-derivatives",),
    ),
    (
        "divergence_gated_loss",
        LOSS,
        loss(gated, {**STEPS, "divergence": "positive"}, ("log_prob",), valid="valid"),
        DEAR,
        (),
    ),
    ("guard_log_ratio", LOSS, loss(guarded, GUARD, ("mean",), valid="valid"), DEAR, ()),
    ("Flow-SDE", SOLVER, SolverStep(partial(step, mt.FlowSDE)), DEAR, ()),
    ("Dance-SDE", SOLVER, SolverStep(partial(step, mt.DanceSDE)), DEAR, ()),
    ("CPS", SOLVER, SolverStep(partial(step, mt.CPS), marginals=False), DEAR, ()),
    *(
        (f"{name}, {how}", laws, subject(partial(function, reduction=how), how), DEAR, ())
        for name, laws, subject, function, how in DENSITIES
    ),
    (
        "update_old_policy",
        AVERAGE,
        Average(lambda old, current, decay: mt.update_old_policy(old, current, decay=decay)),
        DEAR,
        (),
    ),
]  # fmt: skip
CASES = [
    pytest.param(
        law,
        subject,
        examples,
        id=f"{name}: {law.name}",
        marks=[pytest.mark.compile] if law.name == "compiled-equals-eager" else [],
    )
    for name, laws, subject, examples, without in OURS
    for law in laws.chosen(without=without)
    if law.skip(subject) is None
]


@pytest.mark.parametrize(("law", "subject", "examples"), CASES)
def test_the_law_holds(law, subject, examples):
    seed = secrets.randbelow(2**32) if NEW_SEEDS else 0
    law.check(subject, examples=examples, seed=seed)
