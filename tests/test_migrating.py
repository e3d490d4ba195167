"""docs/migrating.md: every conversion that the page states, against the peer's formula.

The formulas of flow_grpo, DiffusionNFT, Flow-Factory and TRL are written here from their
mathematics, in float64, with the peer's constants.
"""

import math

import pytest
import torch

import mteditflow as mt
from mteditflow import objectives
from mteditflow.objectives import CleanSamples
from tests.loops import some

SHAPE = (6, 2, 4, 4)
ELEMENTS = 32  # of a latent
G = 3
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
SIGMA = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.2], dtype=torch.float64)  # the first step: 1
NEXT = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.2, 0.0], dtype=torch.float64)


def tensors(count, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def column(values):
    return values.view(-1, 1, 1, 1)


def mean(x):
    """Mean over the elements of a latent."""
    return x.flatten(1).mean(dim=1)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def normal_log_density(x, center, std):
    return -((x - center) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))


def flow_sde(x, v, sigma, following, level):
    """Mean, std and diffusion coefficient of flow_grpo's and Flow-Factory's step; dt < 0."""
    dt = following - sigma
    g = level * (sigma / (1 - torch.where(sigma == 1, following, sigma))).sqrt()
    drift = v + g**2 / (2 * sigma) * (x + (1 - sigma) * v)
    return x + drift * dt, g * (-dt).sqrt(), g


def dance_sde(x, v, sigma, following, level):
    """DanceGRPO's step as DiffusionNFT and Flow-Factory have it, by the score."""
    score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
    step = sigma - following
    return x - step * (v - level**2 / 2 * score), level * step.sqrt()


def cps(x, v, sigma, following, level):
    """The coefficients-preserving step of flow_grpo and Flow-Factory."""
    std = following * math.sin(level * math.pi / 2)
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    return (1 - following) * clean + (following**2 - std**2).sqrt() * noise, std


def peer_clipped(log_prob, old, advantage, low, high):
    """PPO's surrogate as all of them write it: the larger of two losses."""
    ratio = (log_prob - old).exp()
    clamped = ratio.clamp(1 - low, 1 + high)
    return torch.maximum(-advantage * ratio, -advantage * clamped)


# One step


def test_flow_sde_step_and_its_log_prob():
    x, v, noise = tensors(3)
    center, std, _ = flow_sde(x, v, column(SIGMA), column(NEXT), 0.7)
    ours = mt.FlowSDE(0.7)(x, v, SIGMA, NEXT)
    same(ours.mean, center)
    same(ours.std, std)
    following = center + std * noise
    theirs = mean(normal_log_density(following, center, std))
    same(mt.gaussian_log_prob(following, *ours, reduction="mean"), theirs)


def test_sum_is_mean_times_elements():
    x, center, old_center = tensors(3)
    std = torch.full((6,), 0.3, dtype=torch.float64)
    joint = normal_log_density(x, center, std.view(-1, 1, 1, 1)).flatten(1).sum(dim=1)
    log_prob, old = (
        mt.gaussian_log_prob(x, c, std, reduction="mean") for c in (center, old_center)
    )
    same(ELEMENTS * log_prob, joint)
    same(mt.gaussian_log_prob(x, center, std, reduction="sum"), joint)
    summed = mt.gaussian_log_prob(x, old_center, std, reduction="sum")
    same((joint - summed).exp().log(), ELEMENTS * (log_prob - old).exp().log())


def test_dance_sde_step():
    x, v = tensors(2)
    center, std = dance_sde(x, v, column(SIGMA), column(NEXT), 0.3)
    ours = mt.DanceSDE(0.3)(x, v, SIGMA, NEXT)
    same(ours.mean, center)
    same(ours.std, std)


def test_cps_step_and_its_surrogate():
    x, v, noise, old_v = (t[:5] for t in tensors(4))  # the last step ends at 0, without noise
    sigma, following = SIGMA[:5], NEXT[:5]
    center, std = cps(x, v, column(sigma), column(following), 0.8)
    ours, old = (mt.CPS(0.8)(x, u, sigma, following) for u in (v, old_v))
    same(ours.mean, center)
    same(ours.std, std)
    drawn = center + std * noise
    theirs = -mean((drawn - center) ** 2)
    same(mt.cps_surrogate(drawn, ours.mean, reduction="mean"), theirs)
    # The objective's log-ratio is that of densities: theirs over twice the variance.
    their_log_ratio = theirs + mean((drawn - old.mean) ** 2)
    densities = [mt.gaussian_log_prob(drawn, *t, reduction="mean") for t in (ours, old)]
    same(densities[0] - densities[1], their_log_ratio / (2 * std.flatten() ** 2))


def test_kl_of_a_step():
    x, v, reference_v = tensors(3)
    center, _, g = flow_sde(x, v, column(SIGMA), column(NEXT), 0.7)
    reference = flow_sde(x, reference_v, column(SIGMA), column(NEXT), 0.7)[0]
    flow_grpo = mean((center - reference) ** 2) / (2 * g.flatten() ** 2)
    flow_factory = mean((center - reference) ** 2)
    ours = mt.FlowSDE(0.7)(x, v, SIGMA, NEXT)
    kl = mt.gaussian_kl(ours.mean, reference, ours.std, reduction="mean")
    same(kl * (SIGMA - NEXT), flow_grpo)
    same(kl * 2 * ours.std.flatten() ** 2, flow_factory)
    same(mt.velocity_kl(v, reference_v), mean((v - reference_v) ** 2))  # v-based


def test_time_and_velocity_of_the_other_direction():
    clean, noise, old_v = tensors(3)
    t = 1 - SIGMA  # noise at 0, data at 1, velocity = data - noise
    x_t = column(t) * clean + (1 - column(t)) * noise
    same(mt.interpolate(clean, noise, 1 - t), x_t)
    same(mt.velocity_target(clean, noise), -(clean - noise))
    same(mt.clean_from_velocity(x_t, -old_v, 1 - t), x_t + (1 - column(t)) * old_v)
    timesteps = 1000 * SIGMA  # those of diffusers' schedulers
    same(mt.interpolate(clean, noise, timesteps / 1000), x_t)


# Advantages


def peer_advantage(reward, *, over, ddof=0, eps=0.0):
    """Centered in the group, over the std of the group or the batch, by loops."""
    result = torch.empty_like(reward)
    for group in GROUP.unique():
        own = reward[group == GROUP]
        own = own[~own.isnan()]
        spread = {"group": own, "batch": reward[~reward.isnan()]}[over].std(correction=ddof)
        result[group == GROUP] = (reward[group == GROUP] - own.mean()) / (spread + eps)
    return result


def rewards():
    return tensors(3, (6,), seed=1)


@pytest.mark.parametrize("over", ["group", "batch"])
def test_flow_grpo_and_diffusion_nft_advantages(over):
    reward, other, _ = rewards()
    same(mt.group_advantage(reward, GROUP, std=over), peer_advantage(reward, over=over, eps=1e-4))
    # several rewards: their weighted sum, normalized once
    fused = mt.fuse_rewards({"a": reward, "b": other}, {"a": 0.5, "b": 2.0}, GROUP, std=over)
    same(fused, peer_advantage(0.5 * reward + 2 * other, over=over, eps=1e-4))


def test_ddpo_advantage():
    reward, *_ = rewards()
    theirs = (reward - reward.mean()) / (reward.std(correction=0) + 1e-8)
    same(mt.group_advantage(reward, torch.zeros(6, dtype=torch.long), eps=1e-8), theirs)


@pytest.mark.parametrize(("over", "count"), [("group", G), ("batch", 6)])
def test_trl_advantage(over, count):
    reward, *_ = rewards()
    shrink = math.sqrt((count - 1) / count)
    ours = shrink * mt.group_advantage(reward, GROUP, std=over, eps=1e-4 * shrink)
    same(ours, peer_advantage(reward, over=over, ddof=1, eps=1e-4))
    centered = reward - reward.view(2, G).mean(dim=1).repeat_interleave(G)
    same(mt.group_advantage(reward, GROUP, std="none"), centered)


def test_trl_lost_reward():
    reward, *_ = rewards()
    reward[1] = torch.nan  # no reward function had an answer
    theirs = peer_advantage(reward, over="group", ddof=1, eps=1e-4).nan_to_num(0.0)
    members = torch.tensor([2, 2, 2, 3, 3, 3], dtype=torch.float64)
    shrink = ((members - 1) / members).sqrt()
    valid = ~reward.isnan()
    for group in (0, 1):
        own = group == GROUP
        eps = 1e-4 * shrink[own][0].item()
        ours = shrink * mt.group_advantage(reward, GROUP, valid=valid, eps=eps)
        same(ours[own], theirs[own])


def test_trl_normalize_then_sum():
    parts, weights = dict(zip("ab", rewards(), strict=False)), {"a": 1.0, "b": 0.3}
    summed = sum(
        w * peer_advantage(parts[k], over="group", ddof=1, eps=1e-4) for k, w in weights.items()
    )
    theirs = (summed - summed.mean()) / (summed.std() + 1e-4)
    of_group, of_batch = math.sqrt((G - 1) / G), math.sqrt(5 / 6)
    fused = of_group * mt.fuse_advantages(parts, weights, GROUP, eps=1e-4 * of_group)
    same(of_batch * mt.renormalize_advantage(fused, eps=1e-4 * of_batch), theirs)


def test_flow_factory_aggregations():
    parts, weights = dict(zip("ab", rewards(), strict=False)), {"a": 1.0, "b": 0.3}
    normed = sum(w * peer_advantage(parts[k], over="group") for k, w in weights.items())
    gdpo = (normed - normed.mean()) / normed.std(correction=0)
    fused = mt.fuse_advantages(parts, weights, GROUP, eps=0.0)
    same(mt.renormalize_advantage(fused, eps=0.0), gdpo)
    for over in ("group", "batch"):  # "sum", without and with global_std
        total = sum(w * parts[k] for k, w in weights.items())
        same(
            mt.fuse_rewards(parts, weights, GROUP, std=over, eps=0.0),
            peer_advantage(total, over=over),
        )


# Losses


def test_clipped_surrogate():
    log_prob, old, advantage = tensors(3, (400,))
    for low, high in ((0.2, 0.28), (1e-4, 1e-4)):  # TRL's epsilon and epsilon_high; the others'
        theirs = peer_clipped(log_prob, old, advantage.clamp(-1, 1), low, high)
        bounded = mt.clamp_advantage(advantage, limit=1.0)
        ours = mt.clipped_surrogate_loss(log_prob, old, bounded, clip_low=low, clip_high=high)
        same(ours, theirs)
        ratio = (log_prob - old).exp()
        below, above = mt.clip_fraction(log_prob, old, clip_low=low, clip_high=low)
        same(below + above, ((ratio - 1).abs() > low).double().mean())  # clipfrac


def test_zero_advantages_left_out_of_the_mean():
    log_prob, old, advantage = tensors(3, (8,))
    advantage[:3] = 0  # flow_grpo drops these samples, then takes the mean over the others
    theirs = peer_clipped(log_prob, old, advantage, 0.2, 0.2)[3:].mean()
    ours = mt.clipped_surrogate_loss(log_prob, old, advantage, clip_low=0.2, clip_high=0.2)
    same(ours.mean(), 5 / 8 * theirs)


def test_reductions_of_trl():
    loss, mask = tensors(1, (4, 5))[0], torch.ones(4, 5, dtype=torch.bool)
    mask[0, 2:] = False
    same(mt.masked_mean(loss, mask), (loss * mask).sum() / mask.sum())  # dapo
    by_row = torch.stack([mt.masked_mean(row, kept) for row, kept in zip(loss, mask, strict=True)])
    same(by_row.mean(), ((loss * mask).sum(dim=1) / mask.sum(dim=1)).mean())  # grpo


def test_kl_estimates():
    log_prob, reference = tensors(2, (50,))
    log_ratio = reference - log_prob
    trl = (log_ratio.exp() - log_ratio - 1).mean()
    same(mt.approximate_kl(reference, log_prob), trl)
    near = log_prob + 1e-3 * reference
    approx_kl = 0.5 * ((near - log_prob) ** 2).mean()  # flow_grpo's and DDPO's metric
    assert mt.approximate_kl(near, log_prob).item() == pytest.approx(approx_kl.item(), rel=1e-2)
    # The mean of TRL's estimate is the Gaussian KL: by quadrature over the policy's own samples.
    points, std = torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.tensor(0.9).double()
    density, base = (normal_log_density(points, center, std) for center in (0.3, -0.2))
    estimate = ((base - density).exp() - (base - density) - 1) * density.exp()
    centers = torch.tensor([[[0.3]], [[-0.2]]], dtype=torch.float64)
    (kl,) = mt.gaussian_kl(*centers, std, reduction="sum")
    same(torch.trapezoid(estimate, points), kl)


def test_diffusion_nft_loss():
    x0, noise, v, old = tensors(4)
    advantage = 4 * rewards()[0]
    beta, limit, t = 0.4, 5.0, column(SIGMA)
    x_t = (1 - t) * x0 + t * noise
    share = (advantage.clamp(-limit, limit) / limit / 2 + 0.5).clamp(0, 1)
    losses = []
    for mixed in (beta * v + (1 - beta) * old, (1 + beta) * old - beta * v):
        error = x_t - t * mixed - x0
        losses.append(mean(error**2) / mean(error.abs()).clamp(min=1e-5))
    theirs = limit * (share * losses[0] + (1 - share) * losses[1]) / beta
    r = mt.optimality_probability(advantage, advantage_max=limit)
    same(r, share)
    target = mt.velocity_target(x0, noise)
    ours = mt.adaptive_nft_loss(v, old, target, r, SIGMA, nft_beta=beta, advantage_max=limit)
    same(ours, theirs)


def test_awm_weightings():
    v, target = tensors(2)
    error = mean((v - target) ** 2)
    eps = 1e-10
    theirs = {
        "sigma": -SIGMA * error,
        "sigma_squared": -(SIGMA**2) * error,
        "huber": -SIGMA * ((error + eps).sqrt() - 1e-5),
        "general_huber": -SIGMA * ((error + eps) ** 0.25 - eps**0.25) / 0.25,
    }
    same(mt.matching_log_prob(v, target), -error)
    for weighting, value in some(theirs.items()):
        same(mt.matching_log_prob(v, target, weighting=weighting, sigma=SIGMA), value)


def test_guard_ratio():
    x, v, old_v, noise = tensors(4)
    center, std, _ = flow_sde(x, v, column(SIGMA), column(NEXT), 0.7)
    old = flow_sde(x, old_v, column(SIGMA), column(NEXT), 0.7)[0]
    drawn, scale = old + std * noise, std.flatten()
    log_ratio = mean(normal_log_density(drawn, center, std) - normal_log_density(drawn, old, std))
    theirs = scale * log_ratio + mean((center - old) ** 2) / (2 * scale)
    same(mt.guard_log_ratio(drawn, center, old, std, reduction="mean"), theirs)


def test_dpo_losses():
    v, reference, target = tensors(3)
    winner, loser = torch.tensor([0, 4]), torch.tensor([2, 3])
    better = mean((reference - target) ** 2) - mean((v - target) ** 2)
    margin = better[winner] - better[loser]
    for beta in (0.1, 2000.0):
        flow_factory = torch.nn.functional.softplus(-beta / 2 * margin)
        trl = torch.nn.functional.softplus(-beta * margin)  # log-ratios: `better`
        same(mt.dpo_loss(v, reference, target, winner, loser, dpo_beta=beta), flow_factory)
        same(mt.dpo_loss(v, reference, target, winner, loser, dpo_beta=2 * beta), trl)


# Averages and counts


@pytest.mark.parametrize("updates", [1, 2])
def test_old_policy_decay_in_optimizer_steps(updates):
    types = {1: (0, 0.001, 0.5), 2: (75, 0.0075, 0.999)}
    for flat, rate, hold in some(types.values()):
        for done in (0, 3, 40, 300, 900):
            step = updates * (done + 1)  # theirs counts optimizer steps, after the round's
            theirs = 0.0 if step < flat else min((step - flat) * rate, hold)
            ours = mt.old_policy_decay(step, slope=rate, maximum=hold, start=flat)
            assert ours == pytest.approx(theirs, abs=1e-12)
            objective = objectives.NFT(old_slope=rate * updates, old_maximum=hold)
            if flat == 0:
                assert objective.old_decay(done + 1) == pytest.approx(theirs, abs=1e-12)


def test_ema_warm_up_and_repetition():
    for step in (0, 1, 8, 100):
        theirs = min((1 + step) / (10 + step), 0.9)
        assert mt.ema_decay(step, maximum=0.9) == theirs
    # flow_grpo averages once for every micro-batch of a step that is due: decay ** micro_batches
    average, weight = 2.0, 5.0
    for _ in range(6):
        average += (1 - 0.9) * (weight - average)
    ours = [torch.tensor([2.0], dtype=torch.float64)]
    mt.update_old_policy(ours, [torch.tensor([weight], dtype=torch.float64)], decay=0.9**6)
    assert ours[0].item() == pytest.approx(average)


def test_reference_that_follows():
    reference, policy = tensors(2, (4,))
    theirs = 0.6 * policy + 0.4 * reference  # ref_model_mixup_alpha
    ours = [reference.clone()]
    mt.update_old_policy(ours, [policy], decay=1 - 0.6)
    same(ours[0], theirs)


def test_groups_and_optimizer_steps_of_a_round():
    devices, batch, members, batches, accumulation, levels = 2, 3, 2, 4, 2, 5
    prompts, steps, rows = 0, 0, 0
    for number in range(batches):  # flow_grpo and DiffusionNFT: what an epoch does
        prompts += devices * batch // members
        rows += devices * batch * levels
        steps += (number + 1) % accumulation == 0
    groups, minibatches = batches * batch * devices // members, batches // accumulation
    samples = CleanSamples(torch.zeros(groups * members, 1, 4), mt.group_ids(groups, members))
    objective = objectives.NFT(renoise=objectives.Renoise(levels=levels))
    units = objective.units(
        samples, torch.ones(groups * members), key=torch.Generator(), minibatches=minibatches
    )
    assert (groups, len(units), sum(x.count for x in units)) == (prompts, steps, rows)
