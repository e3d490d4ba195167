"""Reinforcement learning of flow-matching image models, multi-turn editing first.

Pure functions and small frozen classes over torch tensors. Everything here needs torch, einops,
numpy and safetensors alone; ``mteditflow.objectives`` builds on it, and ``mteditflow.pipelines``
drives diffusers pipelines (``mteditflow[diffusers]``).

Axes: ``B`` trajectories, ``G`` members of a group, ``N`` turns, ``S`` denoising steps, ``M`` rows
(any flat batch of them). ``sigma`` is 1 at noise and 0 at data.
"""

<<<<<<< HEAD
from typing import TYPE_CHECKING

from mteditflow._lazy import lazy

if TYPE_CHECKING:
    from mteditflow._reduce import masked_mean
    from mteditflow.advantages.constraint import (
        AdaptiveKL,
        LagrangeMultiplier,
        constrained_weights,
    )
    from mteditflow.advantages.credit import (
        Credit,
        RewardToGo,
        Signal,
        TrajectoryCredit,
        TurnCredit,
        turn_advantage,
    )
    from mteditflow.advantages.gardo import (
        GatedShare,
        ReferenceReset,
        diversity_advantage,
        group_diversity,
        rank_uncertainty,
        uncertainty_gate,
    )
    from mteditflow.advantages.group import (
        clamp_advantage,
        fuse_advantages,
        fuse_rewards,
        group_advantage,
        group_ids,
        group_measured,
        group_std,
        renormalize_advantage,
    )
    from mteditflow.advantages.history import RewardHistory
    from mteditflow.advantages.pairs import Pairs, group_pairs
    from mteditflow.advantages.selection import GroupSelection, draw_probabilities, select_groups
    from mteditflow.advantages.softmax import softmax_advantage
    from mteditflow.advantages.turns import (
        PaddedTurns,
        binary_and,
        binary_average,
        broadcast_to_steps,
        likert_average,
        normalize_likert,
        pad_turns,
        reward_to_go,
        stop_after_failure,
        turn_average,
    )
    from mteditflow.diagnostics import (
        RatioCheck,
        advantage_correlation,
        approximate_kl,
        check_ratio,
        clip_fraction,
        variance_ratio,
        zero_variance_share,
    )
    from mteditflow.distributed import gather_ranks
    from mteditflow.flow.path import (
        clean_from_velocity,
        exponential_shift_sigmas,
        flow_matching_loss,
        flux2_mu,
        flux_mu,
        interpolate,
        noise_from_velocity,
        score_from_velocity,
        shift_sigmas,
        uniform_sigmas,
        velocity_target,
    )
    from mteditflow.flow.sampling import (
        VelocityFunction,
        batched_noise,
        rollout,
        trajectory_generators,
    )
    from mteditflow.flow.solvers import (
        CPS,
        ODE,
        DanceSDE,
        FlowSDE,
        Solver,
        Transition,
        cps_surrogate,
        gaussian_kl,
        gaussian_log_prob,
        sliding_window,
    )
    from mteditflow.flow.trajectory import Steps, Trajectory
    from mteditflow.losses.awm import matching_log_prob
    from mteditflow.losses.clipped import clipped_surrogate_loss
    from mteditflow.losses.crd import crd_loss, kl_coef_by_reward
    from mteditflow.losses.dgpo import dgpo_loss
    from mteditflow.losses.distillation import distillation_loss, mt_opsd_loss, step_kl_weight
    from mteditflow.losses.dpo import dpo_loss
    from mteditflow.losses.dppo import divergence_gated_loss
    from mteditflow.losses.flow_awr import exact_flow_awr_loss, flow_awr_loss
    from mteditflow.losses.guard import guard_log_ratio, guard_step_weight
    from mteditflow.losses.importance import truncated_importance_weight
    from mteditflow.losses.nft import (
        adaptive_nft_loss,
        nft_loss,
        optimality_probability,
        velocity_kl,
    )
    from mteditflow.losses.norm_guard import velocity_norm_hinge
    from mteditflow.losses.tempflow import noise_step_weight
    from mteditflow.metrics import (
        Interval,
        TurnsSurvived,
        bootstrap_interval,
        collapse_rate,
        conditional_success,
        content_consistency,
        instruction_following,
        interval_difference,
        marginal_success,
        overall,
        paired_difference_interval,
        survival_curve,
        turns_survived,
        wear,
        wilson_interval,
    )
    from mteditflow.old_policy import ema_decay, old_policy_decay, update_old_policy
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "CPS": ".flow.solvers",
            "ODE": ".flow.solvers",
            "AdaptiveKL": ".advantages.constraint",
            "Credit": ".advantages.credit",
            "DanceSDE": ".flow.solvers",
            "FlowSDE": ".flow.solvers",
            "GatedShare": ".advantages.gardo",
            "GroupSelection": ".advantages.selection",
            "Interval": ".metrics",
            "LagrangeMultiplier": ".advantages.constraint",
            "PaddedTurns": ".advantages.turns",
            "Pairs": ".advantages.pairs",
            "RatioCheck": ".diagnostics",
            "ReferenceReset": ".advantages.gardo",
            "RewardHistory": ".advantages.history",
            "RewardToGo": ".advantages.credit",
            "Signal": ".advantages.credit",
            "Solver": ".flow.solvers",
            "Steps": ".flow.trajectory",
            "Trajectory": ".flow.trajectory",
            "TrajectoryCredit": ".advantages.credit",
            "Transition": ".flow.solvers",
            "TurnCredit": ".advantages.credit",
            "TurnsSurvived": ".metrics",
            "VelocityFunction": ".flow.sampling",
            "adaptive_nft_loss": ".losses.nft",
            "advantage_correlation": ".diagnostics",
            "approximate_kl": ".diagnostics",
            "batched_noise": ".flow.sampling",
            "binary_and": ".advantages.turns",
            "binary_average": ".advantages.turns",
            "bootstrap_interval": ".metrics",
            "broadcast_to_steps": ".advantages.turns",
            "check_ratio": ".diagnostics",
            "clamp_advantage": ".advantages.group",
            "clean_from_velocity": ".flow.path",
            "clip_fraction": ".diagnostics",
            "clipped_surrogate_loss": ".losses.clipped",
            "collapse_rate": ".metrics",
            "conditional_success": ".metrics",
            "constrained_weights": ".advantages.constraint",
            "content_consistency": ".metrics",
            "cps_surrogate": ".flow.solvers",
            "crd_loss": ".losses.crd",
            "dgpo_loss": ".losses.dgpo",
            "distillation_loss": ".losses.distillation",
            "divergence_gated_loss": ".losses.dppo",
            "diversity_advantage": ".advantages.gardo",
            "dpo_loss": ".losses.dpo",
            "draw_probabilities": ".advantages.selection",
            "ema_decay": ".old_policy",
            "exact_flow_awr_loss": ".losses.flow_awr",
            "exponential_shift_sigmas": ".flow.path",
            "flow_awr_loss": ".losses.flow_awr",
            "flow_matching_loss": ".flow.path",
            "flux2_mu": ".flow.path",
            "flux_mu": ".flow.path",
            "fuse_advantages": ".advantages.group",
            "fuse_rewards": ".advantages.group",
            "gather_ranks": ".distributed",
            "gaussian_kl": ".flow.solvers",
            "gaussian_log_prob": ".flow.solvers",
            "group_advantage": ".advantages.group",
            "group_diversity": ".advantages.gardo",
            "group_ids": ".advantages.group",
            "group_measured": ".advantages.group",
            "group_pairs": ".advantages.pairs",
            "group_std": ".advantages.group",
            "guard_log_ratio": ".losses.guard",
            "guard_step_weight": ".losses.guard",
            "instruction_following": ".metrics",
            "interpolate": ".flow.path",
            "interval_difference": ".metrics",
            "kl_coef_by_reward": ".losses.crd",
            "likert_average": ".advantages.turns",
            "marginal_success": ".metrics",
            "masked_mean": "._reduce",
            "matching_log_prob": ".losses.awm",
            "mt_opsd_loss": ".losses.distillation",
            "nft_loss": ".losses.nft",
            "noise_from_velocity": ".flow.path",
            "noise_step_weight": ".losses.tempflow",
            "normalize_likert": ".advantages.turns",
            "old_policy_decay": ".old_policy",
            "optimality_probability": ".losses.nft",
            "overall": ".metrics",
            "pad_turns": ".advantages.turns",
            "paired_difference_interval": ".metrics",
            "rank_uncertainty": ".advantages.gardo",
            "renormalize_advantage": ".advantages.group",
            "reward_to_go": ".advantages.turns",
            "rollout": ".flow.sampling",
            "score_from_velocity": ".flow.path",
            "select_groups": ".advantages.selection",
            "shift_sigmas": ".flow.path",
            "sliding_window": ".flow.solvers",
            "softmax_advantage": ".advantages.softmax",
            "step_kl_weight": ".losses.distillation",
            "stop_after_failure": ".advantages.turns",
            "survival_curve": ".metrics",
            "trajectory_generators": ".flow.sampling",
            "truncated_importance_weight": ".losses.importance",
            "turn_advantage": ".advantages.credit",
            "turn_average": ".advantages.turns",
            "turns_survived": ".metrics",
            "uncertainty_gate": ".advantages.gardo",
            "uniform_sigmas": ".flow.path",
            "update_old_policy": ".old_policy",
            "variance_ratio": ".diagnostics",
            "velocity_kl": ".losses.nft",
            "velocity_norm_hinge": ".losses.norm_guard",
            "velocity_target": ".flow.path",
            "wear": ".metrics",
            "wilson_interval": ".metrics",
            "zero_variance_share": ".diagnostics",
        },
    )
=======
from mteditflow._reduce import masked_mean
from mteditflow.advantages.constraint import (
    AdaptiveKL,
    LagrangeMultiplier,
    constrained_weights,
)
from mteditflow.advantages.credit import (
    Credit,
    RewardToGo,
    Signal,
    TrajectoryCredit,
    TurnCredit,
    turn_advantage,
)
from mteditflow.advantages.gardo import (
    GatedShare,
    ReferenceReset,
    diversity_advantage,
    group_diversity,
    rank_uncertainty,
    uncertainty_gate,
)
from mteditflow.advantages.group import (
    clamp_advantage,
    fuse_advantages,
    fuse_rewards,
    group_advantage,
    group_ids,
    group_measured,
    group_std,
    renormalize_advantage,
)
from mteditflow.advantages.history import RewardHistory
from mteditflow.advantages.pairs import Pairs, group_pairs
from mteditflow.advantages.regions import (
    box_coverage,
    mask_coverage,
    region_advantage,
    token_tile,
    token_weights,
)
from mteditflow.advantages.selection import GroupSelection, draw_probabilities, select_groups
from mteditflow.advantages.softmax import softmax_advantage
from mteditflow.advantages.turns import (
    PaddedTurns,
    binary_and,
    binary_average,
    broadcast_to_steps,
    likert_average,
    normalize_likert,
    pad_turns,
    reward_to_go,
    stop_after_failure,
    turn_average,
)
from mteditflow.diagnostics import (
    RatioCheck,
    advantage_correlation,
    approximate_kl,
    check_ratio,
    clip_fraction,
    variance_ratio,
    zero_variance_share,
)
from mteditflow.distributed import gather_ranks
from mteditflow.flow.path import (
    clean_from_velocity,
    exponential_shift_sigmas,
    flow_matching_loss,
    flux2_mu,
    flux_mu,
    interpolate,
    noise_from_velocity,
    score_from_velocity,
    shift_sigmas,
    uniform_sigmas,
    velocity_target,
)
from mteditflow.flow.sampling import VelocityFunction, batched_noise, rollout, trajectory_generators
from mteditflow.flow.solvers import (
    CPS,
    ODE,
    DanceSDE,
    FlowSDE,
    Solver,
    Transition,
    cps_surrogate,
    gaussian_kl,
    gaussian_log_prob,
    sliding_window,
)
from mteditflow.flow.trajectory import Steps, Trajectory
from mteditflow.losses.awm import matching_log_prob, matching_surrogate_loss
from mteditflow.losses.clipped import clipped_surrogate_loss
from mteditflow.losses.crd import crd_loss, kl_coef_by_reward
from mteditflow.losses.dgpo import dgpo_loss
from mteditflow.losses.distillation import distillation_loss, mt_opsd_loss, step_kl_weight
from mteditflow.losses.dpo import dpo_loss
from mteditflow.losses.dppo import divergence_gated_loss
from mteditflow.losses.flow_awr import exact_flow_awr_loss, flow_awr_loss
from mteditflow.losses.guard import guard_log_ratio, guard_step_weight
from mteditflow.losses.importance import truncated_importance_weight
from mteditflow.losses.nft import (
    adaptive_nft_loss,
    nft_loss,
    optimality_probability,
    velocity_kl,
)
from mteditflow.losses.norm_guard import velocity_norm_hinge
from mteditflow.losses.tempflow import noise_step_weight
from mteditflow.metrics import (
    Interval,
    TurnsSurvived,
    bootstrap_interval,
    collapse_rate,
    conditional_success,
    content_consistency,
    instruction_following,
    interval_difference,
    marginal_success,
    overall,
    paired_difference_interval,
    survival_curve,
    turns_survived,
    wear,
    wilson_interval,
)
from mteditflow.old_policy import ema_decay, old_policy_decay, update_old_policy
>>>>>>> i19-r

__version__ = "0.1.0"

__all__ = [
    "CPS",
    "ODE",
    "AdaptiveKL",
    "Credit",
    "DanceSDE",
    "FlowSDE",
    "GatedShare",
    "GroupSelection",
    "Interval",
    "LagrangeMultiplier",
    "PaddedTurns",
    "Pairs",
    "RatioCheck",
    "ReferenceReset",
    "RewardHistory",
    "RewardToGo",
    "Signal",
    "Solver",
    "Steps",
    "Trajectory",
    "TrajectoryCredit",
    "Transition",
    "TurnCredit",
    "TurnsSurvived",
    "VelocityFunction",
    "adaptive_nft_loss",
    "advantage_correlation",
    "approximate_kl",
    "batched_noise",
    "binary_and",
    "binary_average",
    "bootstrap_interval",
    "box_coverage",
    "broadcast_to_steps",
    "check_ratio",
    "clamp_advantage",
    "clean_from_velocity",
    "clip_fraction",
    "clipped_surrogate_loss",
    "collapse_rate",
    "conditional_success",
    "constrained_weights",
    "content_consistency",
    "cps_surrogate",
    "crd_loss",
    "dgpo_loss",
    "distillation_loss",
    "divergence_gated_loss",
    "diversity_advantage",
    "dpo_loss",
    "draw_probabilities",
    "ema_decay",
    "exact_flow_awr_loss",
    "exponential_shift_sigmas",
    "flow_awr_loss",
    "flow_matching_loss",
    "flux2_mu",
    "flux_mu",
    "fuse_advantages",
    "fuse_rewards",
    "gather_ranks",
    "gaussian_kl",
    "gaussian_log_prob",
    "group_advantage",
    "group_diversity",
    "group_ids",
    "group_measured",
    "group_pairs",
    "group_std",
    "guard_log_ratio",
    "guard_step_weight",
    "instruction_following",
    "interpolate",
    "interval_difference",
    "kl_coef_by_reward",
    "likert_average",
    "marginal_success",
    "mask_coverage",
    "masked_mean",
    "matching_log_prob",
    "matching_surrogate_loss",
    "mt_opsd_loss",
    "nft_loss",
    "noise_from_velocity",
    "noise_step_weight",
    "normalize_likert",
    "old_policy_decay",
    "optimality_probability",
    "overall",
    "pad_turns",
    "paired_difference_interval",
    "rank_uncertainty",
    "region_advantage",
    "renormalize_advantage",
    "reward_to_go",
    "rollout",
    "score_from_velocity",
    "select_groups",
    "shift_sigmas",
    "sliding_window",
    "softmax_advantage",
    "step_kl_weight",
    "stop_after_failure",
    "survival_curve",
    "token_tile",
    "token_weights",
    "trajectory_generators",
    "truncated_importance_weight",
    "turn_advantage",
    "turn_average",
    "turns_survived",
    "uncertainty_gate",
    "uniform_sigmas",
    "update_old_policy",
    "variance_ratio",
    "velocity_kl",
    "velocity_norm_hinge",
    "velocity_target",
    "wear",
    "wilson_interval",
    "zero_variance_share",
]
