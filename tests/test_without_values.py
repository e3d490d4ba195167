"""Under ``vmap`` and of fake tensors there are no values to check: the functions work without."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mteditflow as mt
from tests.loops import some

P, M, SHAPE, B, N = 2, 3, (2, 2), 4, 3
generator = torch.Generator().manual_seed(0)
# Forward-mode rules import torch's decompositions, which torch.jit.script still compiles.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


def normal(*shape):
    return torch.randn(P, *shape, generator=generator)


def share(*shape):
    return torch.rand(P, *shape, generator=generator)


x, y, z = normal(M, *SHAPE), normal(M, *SHAPE), normal(M, *SHAPE)
high, low, valid = 0.6 + 0.3 * share(M), 0.5 * share(M), share(M) > 0.3
reward, turns = share(B), share(B, N)
group = torch.tensor([[7, 7, -(2**40), 7], [1, 0, 1, 0]])
kept, exists = share(B) > 0.3, torch.ones(P, B, N, dtype=torch.bool)
a, b, advantage = normal(M), normal(M), normal(M)
winner, loser = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[1, 2], [1, 1]])


def weights(x):
    return {"a": x, "b": x.square()}, {"a": 1.0, "b": 0.2}


def step(solver):
    return lambda x, y, s, t: torch.cat([part.flatten() for part in solver(x, y, s, t)])


# How a problem of one batch is called, and the tensors of P problems.
CALLS = {
    "interpolate": (mt.interpolate, (x, y, high)),
    "velocity_target": (mt.velocity_target, (x, y)),
    "clean_from_velocity": (mt.clean_from_velocity, (x, y, high)),
    "noise_from_velocity": (mt.noise_from_velocity, (x, y, high)),
    "score_from_velocity": (mt.score_from_velocity, (x, y, high)),
    "flow_matching_loss": (mt.flow_matching_loss, (x, y, z)),
    "shift_sigmas": (lambda s: mt.shift_sigmas(s, 3.0), (low,)),
    "exponential_shift_sigmas": (lambda s: mt.exponential_shift_sigmas(s, 1.0), (low,)),
    "ODE": (step(mt.ODE()), (x, y, high, low)),
    "FlowSDE": (step(mt.FlowSDE(0.7)), (x, y, high, low)),
    "DanceSDE": (step(mt.DanceSDE(0.3)), (x, y, high, low)),
    "CPS": (step(mt.CPS(0.5)), (x, y, high, low)),
    "gaussian_log_prob": (
        lambda x, y, s, v: mt.gaussian_log_prob(x, y, s, reduction="mean", valid=v),
        (x, y, high, valid),
    ),
    "gaussian_kl": (lambda x, y, s: mt.gaussian_kl(x, y, s, reduction="sum"), (x, y, high)),
    "cps_surrogate": (lambda x, y: mt.cps_surrogate(x, y, reduction="mean"), (x, y)),
    "guard_log_ratio": (
        lambda x, y, z, s: mt.guard_log_ratio(x, y, z, s, reduction="mean"), (x, y, z, high)
    ),
    "guard_step_weight": (lambda s, t: mt.guard_step_weight(mt.ODE(), s, t), (high, low)),
    "noise_step_weight": (
        lambda s, t: mt.noise_step_weight(mt.FlowSDE(0.7), s, t), (high, low)
    ),
    "step_kl_weight": (lambda s, t: mt.step_kl_weight(mt.DanceSDE(0.3), s, t), (high, low)),
    "nft_loss": (lambda *args: mt.nft_loss(*args, nft_beta=0.5), (x, y, z, low)),
    "adaptive_nft_loss": (
        lambda *args: mt.adaptive_nft_loss(*args[:-1], nft_beta=0.5, valid=args[-1]),
        (x, y, z, low, high, valid),
    ),
    "optimality_probability": (mt.optimality_probability, (advantage,)),
    "velocity_kl": (mt.velocity_kl, (x, y)),
    "velocity_norm_hinge": (mt.velocity_norm_hinge, (x, y)),
    "matching_surrogate_loss": (
        lambda x, y, z, a: mt.matching_surrogate_loss(x, y, z, a, clip_low=0.1, clip_high=0.1),
        (x, y, z, advantage),
    ),
    "matching_surrogate_loss, tokens": (
        lambda x, y, z, a: mt.matching_surrogate_loss(x, y, z, a, clip_low=0.1, clip_high=0.1),
        (x, y, z, normal(M, 2, 1)),
    ),
    "nft_loss, tokens": (
        lambda x, y, z, r: mt.nft_loss(x, y, z, r, nft_beta=0.5), (x, y, z, share(M, 2, 1))
    ),
    "flow_awr_loss, tokens": (mt.flow_awr_loss, (x, y, z, normal(M, 2, 1))),
    "matching_log_prob": (mt.matching_log_prob, (x, y)),
    "matching_log_prob, huber": (
        lambda x, y, s: mt.matching_log_prob(x, y, weighting="huber", sigma=s), (x, y, high)
    ),
    "flow_awr_loss": (
        lambda *args: mt.flow_awr_loss(*args[:-1], valid=args[-1]), (x, y, z, low, valid)
    ),
    "exact_flow_awr_loss": (mt.exact_flow_awr_loss, (x, y, low)),
    "crd_loss": (
        lambda *args: mt.crd_loss(*args[:-1], valid=args[-1]),
        (x, y, z, advantage, group[:, :M], valid),
    ),
    "kl_coef_by_reward": (lambda a: mt.kl_coef_by_reward(a, kl_coef=0.1), (advantage,)),
    "dgpo_loss": (
        lambda *args: mt.dgpo_loss(*args[:-1], dgpo_beta=2.0, valid=args[-1]),
        (x, y, z, advantage, group[:, :M], valid),
    ),
    "distillation_loss": (mt.distillation_loss, (x, y)),
    "mt_opsd_loss": (
        lambda x, y, z, v: mt.mt_opsd_loss(x, y, z, v) + mt.mt_opsd_loss(x, y, z, ~v),
        (x, y, z, valid),
    ),
    "clipped_surrogate_loss": (
        lambda *args: mt.clipped_surrogate_loss(*args, clip_low=0.1, clip_high=0.1),
        (a, b, advantage),
    ),
    "divergence_gated_loss": (
        lambda *args: mt.divergence_gated_loss(*args, threshold=0.1), (a, b, advantage, low)
    ),
    "truncated_importance_weight": (
        lambda a, b: mt.truncated_importance_weight(a, b, cap=2.0), (a, b)
    ),
    "dpo_loss": (lambda *args: mt.dpo_loss(*args, dpo_beta=2.0), (x, y, z, winner, loser)),
    "rank_uncertainty": (lambda r, v: mt.rank_uncertainty(r, {"a": -r}, valid=v), (reward, kept)),
    "group_diversity": (lambda f, g, v: mt.group_diversity(f, g, valid=v), (turns, group, kept)),
    "diversity_advantage": (lambda r, d: mt.diversity_advantage(r - 0.5, d), (turns, reward)),
    "masked_mean": (mt.masked_mean, (a, valid)),
    "group_advantage": (lambda r, g, v: mt.group_advantage(r, g, valid=v), (reward, group, kept)),
    "group_advantage, batch": (lambda r, g: mt.group_advantage(r, g, std="batch"), (reward, group)),
    "group_advantage, turns": (mt.group_advantage, (turns, group)),
    "softmax_advantage": (mt.softmax_advantage, (turns, group)),
    "softmax_advantage, gated": (
        lambda r, g, v: mt.softmax_advantage(r, g, valid=v, temperature=0.5, gate_floor=0.01),
        (reward, group, kept),
    ),
    "group_std": (mt.group_std, (reward, group)),
    "fuse_advantages": (lambda r, g: mt.fuse_advantages(*weights(r), g), (reward, group)),
    "fuse_rewards": (lambda r, g: mt.fuse_rewards(*weights(r), g), (reward, group)),
    "clamp_advantage": (mt.clamp_advantage, (reward,)),
    "renormalize_advantage": (mt.renormalize_advantage, (reward,)),
    "zero_variance_share": (mt.zero_variance_share, (reward, group)),
    "variance_ratio": (mt.variance_ratio, (reward, 1 - reward, group)),
    "advantage_correlation": (mt.advantage_correlation, (reward, 1 - reward, group)),
    "approximate_kl": (mt.approximate_kl, (a, b)),
    "binary_and": (lambda s, m: mt.binary_and(s, turn_mask=m), (turns > 0.3, exists)),
    "binary_average": (mt.binary_average, (turns > 0.3,)),
    "likert_average": (mt.likert_average, (1 + 4 * turns,)),
    "normalize_likert": (mt.normalize_likert, (1 + 4 * turns,)),
    "turn_average": (mt.turn_average, (turns,)),
    "reward_to_go": (mt.reward_to_go, (turns,)),
    "stop_after_failure": (mt.stop_after_failure, (turns > 0.3,)),
    "broadcast_to_steps": (lambda r: mt.broadcast_to_steps(r, turns=2, steps=2), (reward,)),
    "instruction_following": (mt.instruction_following, (turns > 0.3,)),
    "marginal_success": (mt.marginal_success, (turns > 0.3,)),
    "collapse_rate": (mt.collapse_rate, (turns > 0.5,)),
    "survival_curve": (lambda s: torch.stack(mt.survival_curve(s)), (turns > 0.3,)),
    "turns_survived": (
        lambda s: torch.stack([x for part in mt.turns_survived(s) for x in part]), (turns > 0.3,)
    ),
    "wear": (lambda x, y: mt.wear(x, y), (share(B, N, 1, 2, 2), share(B, 1, 2, 2))),
    "content_consistency": (mt.content_consistency, (turns,)),
    "overall": (mt.overall, (turns, turns)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_vmap_equals_a_loop(name):
    function, inputs = CALLS[name]
    got = torch.vmap(function)(*inputs)
    expected = torch.stack([function(*(x[p] for x in inputs)) for p in range(P)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_give_the_shape(name):
    function, inputs = CALLS[name]
    first = [x[0] for x in inputs]
    expected = function(*first)
    with FakeTensorMode() as mode:
        got = function(*(mode.from_tensor(x) for x in first))
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype


# In which a NaN stands for a term that is not there.
NAN_IS_A_VALUE = {"content_consistency"}


@pytest.mark.parametrize("name", sorted(set(CALLS) - NAN_IS_A_VALUE))
def test_a_nan_that_cannot_be_checked_reaches_the_result(name):
    """In no argument is it taken for a number, such as an advantage of 0 or a std of 0."""
    function, inputs = CALLS[name]
    for position, x in some(enumerate(inputs)):
        if not x.is_floating_point():
            continue
        bad = x.clone()
        bad[0].view(-1)[0] = torch.nan  # row 0 of problem 0; every entry is valid
        given = [bad if i == position else part for i, part in enumerate(inputs)]
        given = [torch.ones_like(p) if p.dtype == torch.bool else p for p in given]
        got = torch.vmap(function)(*given)
        assert got[0].isnan().any(), f"argument {position}"
        assert got[1].isfinite().all(), f"argument {position}"


def test_a_nan_of_one_group_leaves_the_others():
    nan = torch.nan
    bad = torch.tensor([[1.0, nan, 2.0, 4.0], [1.0, 2.0, 2.0, 4.0]])
    groups = torch.tensor([0, 0, 1, 1])
    for function in (
        lambda r: mt.group_advantage(r, groups, eps=0.0),
        lambda r: mt.fuse_advantages({"a": r}, {"a": 1.0}, groups, eps=0.0),
        lambda r: mt.fuse_rewards({"a": r}, {"a": 1.0}, groups, eps=0.0),
    ):
        got = torch.vmap(function)(bad)
        assert got[0, :2].isnan().all()
        assert got[0, 2:].tolist() == [-1.0, 1.0]
        assert got[1].tolist() == [-1.0, 1.0, -1.0, 1.0]


def test_gradients_under_vmap():
    """Per-sample gradients: grad inside vmap, of a loss that checks its values."""

    def loss(velocity, old, target, r):
        return mt.nft_loss(velocity, old, target, r, nft_beta=0.5).sum()

    r = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.25, 0.5]])
    got = torch.vmap(torch.func.grad(loss))(x, y, z, r)
    expected = torch.stack([torch.func.grad(loss)(x[p], y[p], z[p], r[p]) for p in range(P)])
    torch.testing.assert_close(got, expected)


def test_values_are_still_checked_where_there_are_some():
    """Under ``grad`` values can be read: a wrong one is refused there, too."""
    wrong = torch.tensor([0.5, 1.5, 0.5])
    with pytest.raises(ValueError, match=r"^r: expected values in \[0, 1\], got 1\.5"):
        torch.func.grad(lambda v: mt.nft_loss(v, y[0], z[0], wrong, nft_beta=0.5).sum())(x[0])
