"""Torch's default dtype and device change no result: nothing is made without naming its own.

The default device is `meta` here, on which nothing can be computed with CPU tensors: a tensor made
without naming its device fails at once. So no accelerator is needed to see it.
"""

import ast
import inspect
from pathlib import Path

import pytest
import torch

import mteditflow as mt
from mteditflow.objectives import training_rows
from mteditflow.testing.law import other_defaults

B, N, S, SHAPE = 4, 3, 5, (2, 6)
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=generator)


x, y, z = normal(3, B, *SHAPE)
sigma, next_sigma = torch.linspace(0.9, 0.5, B), torch.linspace(0.6, 0.2, B)
group = torch.tensor([5, 5, -(2**40), -(2**40)])
dense_group = torch.tensor([1, 1, 0, 0])
reward, r = torch.rand(B, generator=generator), torch.rand(B, generator=generator)
per_turn = torch.rand(B, N, generator=generator)
success = per_turn > 0.5
group_of_rows = torch.tensor([0, 1])
valid = torch.tensor([True, True, True, False])
turn_mask = torch.tensor([[True, True, True]] * 3 + [[True, True, False]])
log_prob, old_log_prob, advantage = normal(3, B, N, S)
step_valid = advantage > 0
rewards = {"a": reward, "b": r}
weights = {"a": 1.0, "b": 0.2}
grid = torch.linspace(1, 0, S + 1)
pictures = torch.rand(B, N, 1, 2, 2, generator=generator), torch.zeros(B, 1, 2, 2)
touched = torch.zeros(B, N, 2, 2, dtype=torch.bool)
every_step = torch.ones(4, 1, 1000, dtype=torch.bool)
signals = {"a": mt.TurnCredit()(per_turn), "b": mt.RewardToGo(0.5)(per_turn)}


def roll(solver=mt.FlowSDE(0.7), **options):  # noqa: B008
    generators = [torch.Generator("cpu").manual_seed(k) for k in range(B)]
    return mt.rollout(
        lambda x_t, sigma, *, reference, turn: x_t,
        torch.stack([x] * N, dim=1),
        grid,
        solver=solver,
        generators=generators,
        reduction="sum",
        **options,
    )


def log_prob_of(solver):
    return mt.gaussian_log_prob(z, *solver(x, y, sigma, next_sigma), reduction="sum")


CALLS = {
    "interpolate": lambda: mt.interpolate(x, y, 0.5),
    "interpolate rows": lambda: mt.interpolate(x, y, sigma),
    "clean": lambda: mt.clean_from_velocity(x, y, 0.5),
    "noise": lambda: mt.noise_from_velocity(x, y, 0.5),
    "score": lambda: mt.score_from_velocity(x, y, 0.5),
    "target": lambda: mt.velocity_target(x, y),
    "flow matching": lambda: mt.flow_matching_loss(x, y, z),
    "shift": lambda: mt.shift_sigmas(grid, 3.0),
    "exponential shift": lambda: mt.exponential_shift_sigmas(grid, 1.15),
    "ODE": lambda: log_prob_of(mt.ODE()),
    "FlowSDE": lambda: log_prob_of(mt.FlowSDE(0.7)),
    "FlowSDE numbers": lambda: mt.FlowSDE(0.7)(x, y, 1.0, 0.5).sample(z),
    "DanceSDE": lambda: log_prob_of(mt.DanceSDE(0.7)),
    "CPS": lambda: log_prob_of(mt.CPS(0.7)),
    "kl": lambda: mt.gaussian_kl(x, y, torch.full_like(x[:, :1, :1], 0.5), reduction="mean"),
    "cps surrogate": lambda: mt.cps_surrogate(x, y, reduction="sum"),
    "rollout": lambda: roll().log_prob,
    "rollout ODE": lambda: roll(mt.ODE()).clean,
    "rollout window": lambda: roll(stochastic_steps=[1]).step_mask,
    "rollout groups": lambda: roll(group=group, turn_mask=turn_mask).group,
    "batched noise": lambda: mt.batched_noise((2,), [torch.Generator("cpu")]),
    "generators": lambda: mt.batched_noise((2,), mt.trajectory_generators(0, 3, device="cpu")),
    "binary and": lambda: mt.binary_and(success, turn_mask=turn_mask),
    "binary and all": lambda: mt.binary_and(success),
    "binary average": lambda: mt.binary_average(success),
    "likert": lambda: mt.likert_average(1 + 4 * per_turn),
    "turn average": lambda: mt.turn_average(per_turn, turn_mask=turn_mask),
    "reward to go": lambda: mt.reward_to_go(per_turn, discount=0.9),
    "stop after failure": lambda: mt.stop_after_failure(success),
    "broadcast": lambda: mt.broadcast_to_steps(reward, turns=N, steps=S),
    "group advantage": lambda: mt.group_advantage(reward, group),
    "group advantage dense": lambda: mt.group_advantage(reward, dense_group, valid=valid),
    "group advantage turns": lambda: mt.group_advantage(per_turn, group, std="batch"),
    "group advantage mean": lambda: mt.group_advantage(reward, group, std="none"),
    "group ids": lambda: mt.group_ids(2, 3),
    "group pairs": lambda: mt.group_pairs(reward, group).winner,
    "select groups": lambda: mt.select_groups(reward, group, top=0.9).keep,
    "turn advantage": lambda: mt.turn_advantage(signals, weights, group).value,
    "trajectory credit": lambda: mt.TrajectoryCredit()(per_turn).value,
    "history": lambda: mt.RewardHistory(2).updated(signals, group).joined(signals, group)[1],
    "pad turns": lambda: mt.pad_turns([[1, 0], [0.5]]).valid,
    "softmax advantage": lambda: mt.softmax_advantage(per_turn, group, gate_floor=0.01),
    "group std": lambda: mt.group_std(reward, group),
    "fuse advantages": lambda: mt.fuse_advantages(rewards, weights, group),
    "fuse rewards": lambda: mt.fuse_rewards(rewards, weights, group, valid=valid),
    "fuse unmeasured": lambda: mt.fuse_rewards(
        rewards, weights, group, measured=dict.fromkeys(rewards, valid)
    ),
    "clamp": lambda: mt.clamp_advantage(reward),
    "renormalize": lambda: mt.renormalize_advantage(reward),
    "gather": lambda: mt.gather_ranks(reward)[0][0],
    "clipped": lambda: mt.clipped_surrogate_loss(
        log_prob, old_log_prob, advantage, clip_low=0.1, clip_high=0.1, valid=step_valid
    ),
    "masked mean": lambda: mt.masked_mean(reward, valid),
    "r": lambda: mt.optimality_probability(advantage),
    "nft": lambda: mt.nft_loss(x, y, z, r, nft_beta=0.5),
    "adaptive nft": lambda: mt.adaptive_nft_loss(x, y, z, r, sigma, nft_beta=0.5),
    "adaptive nft number": lambda: mt.adaptive_nft_loss(x, y, z, r, 0.5, nft_beta=0.5),
    "mask coverage": lambda: mt.mask_coverage(success, 2),
    "box coverage": lambda: mt.box_coverage([[0.0, 0.0, 3.0, 2.5]], (4, 6), 2),
    "token weights": lambda: mt.token_weights(per_turn, (B * N, 64)),
    "region advantage": lambda: mt.region_advantage(
        {"a": per_turn, "b": per_turn}, {"a": per_turn[..., None, None]}
    ),
    "awm surrogate": lambda: mt.matching_surrogate_loss(
        x, y, z, r, clip_low=0.1, clip_high=0.1
    ),
    "awm": lambda: mt.matching_log_prob(x, y),
    "awm, huber": lambda: mt.matching_log_prob(x, y, weighting="huber", sigma=sigma),
    "flow awr": lambda: mt.flow_awr_loss(x, y, z, r),
    "exact flow awr": lambda: mt.exact_flow_awr_loss(x, y, r),
    "distillation": lambda: mt.distillation_loss(x, y),
    "mt opsd": lambda: mt.mt_opsd_loss(x, y, z, valid),
    "step kl": lambda: mt.step_kl_weight(mt.DanceSDE(0.3), sigma, next_sigma),
    "step kl of numbers": lambda: mt.step_kl_weight(mt.DanceSDE(0.3), 0.75, 0.5),
    "guard": lambda: mt.guard_log_ratio(x, y, z, 0.5, reduction="mean"),
    "guard weight": lambda: mt.guard_step_weight(mt.ODE(), sigma, next_sigma),
    "dppo": lambda: mt.divergence_gated_loss(
        log_prob, old_log_prob, advantage, advantage.square(), threshold=0.5, valid=step_valid
    ),
    "importance": lambda: mt.truncated_importance_weight(log_prob, old_log_prob, cap=2.0),
    "dpo": lambda: mt.dpo_loss(
        x, y, z, group_of_rows, 1 - group_of_rows, dpo_beta=2.0, valid=group_of_rows > 0
    ),
    "crd": lambda: mt.crd_loss(x, y, z, reward, group, adaptive=True, valid=valid),
    "kl by reward": lambda: mt.kl_coef_by_reward(reward, kl_coef=0.1),
    "dgpo": lambda: mt.dgpo_loss(x, y, z, reward, group, dgpo_beta=2.0, valid=valid),
    "noise weight": lambda: mt.noise_step_weight(mt.FlowSDE(0.7), sigma, next_sigma),
    "uncertainty": lambda: mt.rank_uncertainty(reward, {"a": r}, valid=valid),
    "uncertainty gate": lambda: mt.uncertainty_gate(reward, 0.4, valid=valid),
    "diversity": lambda: mt.group_diversity(per_turn, group, valid=valid),
    "diversity advantage": lambda: mt.diversity_advantage(reward - 0.5, r),
    "norm hinge": lambda: mt.velocity_norm_hinge(x, y),
    "collapse rate": lambda: mt.collapse_rate(success, valid=turn_mask),
    "survival": lambda: mt.survival_curve(success, valid=turn_mask).low,
    "turns survived": lambda: torch.stack(mt.turns_survived(success, valid=turn_mask).mean),
    "wear": lambda: mt.wear(*pictures, edited=touched, valid=turn_mask),
    "uniform grid": lambda: mt.uniform_sigmas(7),
    "normalize likert": lambda: mt.normalize_likert(1 + 4 * per_turn),
    "training rows": lambda: torch.cat(
        training_rows(
            every_step,
            generators=[torch.Generator("cpu").manual_seed(k) for k in range(4)],
            share=0.333,  # 333 steps; bfloat16 has 332 and 334
            minibatches=2,
        )
    ),
    "conditional": lambda: mt.conditional_success(success),
    "velocity kl": lambda: mt.velocity_kl(x, y),
    "ratio": lambda: mt.check_ratio(log_prob, old_log_prob, clip=1e-4).deviation,
    "clip fraction": lambda: torch.stack(
        mt.clip_fraction(log_prob, old_log_prob, clip_low=0.1, clip_high=0.1)
    ),
    "approximate kl": lambda: mt.approximate_kl(log_prob, old_log_prob, valid=step_valid),
    "zero variance": lambda: mt.zero_variance_share(reward, group),
    "variance ratio": lambda: mt.variance_ratio(reward, r, group),
    "correlation": lambda: mt.advantage_correlation(reward, r, group),
    "IF": lambda: mt.instruction_following(success),
    "marginal": lambda: mt.marginal_success(success, valid=turn_mask),
    "CC": lambda: mt.content_consistency(per_turn),
    "overall": lambda: mt.overall(reward, r),
    "interval difference": lambda: mt.interval_difference(
        mt.wilson_interval(2, 3), mt.wilson_interval(1, 3)
    ).low,
    "wilson": lambda: mt.wilson_interval(2, 3).low,
    "paired difference": lambda: mt.paired_difference_interval(success, success).high,
    "group measured": lambda: mt.group_measured(valid, group),
    "bootstrap": lambda: mt.bootstrap_interval(
        lambda s: s.mean(dim=0), per_turn, generator=torch.Generator("cpu"), resamples=20
    ).low,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_defaults_change_nothing(name, dtype):
    expected = CALLS[name]()
    with other_defaults(dtype):
        result = CALLS[name]()
    assert result.device == torch.device("cpu")
    assert result.dtype == expected.dtype
    assert torch.equal(result.nan_to_num(-9), expected.nan_to_num(-9))


def test_every_public_function_of_tensors_is_here():
    """A new one is added to ``CALLS``; those of Python's numbers alone, and in place, are named."""
    no_tensors = {
        "constrained_weights", "draw_probabilities", "ema_decay", "flux2_mu", "flux_mu",
        "old_policy_decay", "sliding_window", "token_tile", "update_old_policy",
    }  # fmt: skip
    source = Path(__file__).read_text(encoding="utf-8")
    functions = {x for x in mt.__all__ if inspect.isfunction(getattr(mt, x))}
    assert {x for x in functions if f"mt.{x}(" not in source} == no_tensors - {"update_old_policy"}


# Functions that make tensors: those whose default dtype the values fix, and all others.
OF_INTEGERS = {"arange", "as_tensor", "randint", "randperm"}
OF_ANY = {
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randn",
    "tensor",
    "zeros",
}


def test_every_tensor_made_names_its_dtype_and_device():
    """By reading the source, so that it holds where running it takes a pipeline or a server."""
    nameless = []
    for path in Path(mt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            module, name = ast.unparse(node.func.value), node.func.attr
            if module != "torch" or name not in OF_INTEGERS | OF_ANY:
                continue
            needed = {"device", "dtype"} if name in OF_ANY else {"device"}
            if missing := needed - {keyword.arg for keyword in node.keywords}:
                nameless.append(f"{path.name}:{node.lineno} torch.{name}: {sorted(missing)}")
    assert not nameless


def test_files_are_read_into_memory(tmp_path):
    trajectory = roll()
    with torch.device("meta"):
        trajectory.save(tmp_path / "t.safetensors")
        loaded = mt.Trajectory.load(tmp_path / "t.safetensors")
        both = mt.Trajectory.concatenate([trajectory, loaded])
    assert both.latents.device == torch.device("cpu")
    assert torch.equal(both.latents[:B], both.latents[B:])
    assert torch.equal(loaded.log_prob, trajectory.log_prob)


def test_the_old_policy_moves_where_it_lives():
    old, current = [torch.zeros(3)], [torch.ones(3)]
    with torch.device("meta"):
        mt.update_old_policy(old, current, decay=0.5)
    assert torch.equal(old[0], torch.full((3,), 0.5))
