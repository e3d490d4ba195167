"""What is learned from a round: objectives as functions of a batch and its rows.

Each returns quantities per row, [M]: "policy_loss", "kl" and "norm_hinge", which are added to it
with their weights, and what is only reported. All mathematics is in calls of the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import mteditflow as mt

from .batch import Batch

Quantities = dict[str, Tensor]


def losses_of(batch: Batch) -> Callable[[Tensor], tuple[Quantities, Tensor]]:
    """What an updater takes: quantities of rows, "loss" among them, and the rows' weights."""
    config = batch.run.config
    weights = {"kl": config.kl_coef, "norm_hinge": config.nft.norm_coef}

    def losses(rows: Tensor) -> tuple[Quantities, Tensor]:
        found = OBJECTIVES[config.objective](batch, rows)
        found["loss"] = found["policy_loss"]
        for name, weight in weights.items():
            if name in found:
                found["loss"] = found["loss"] + weight * found[name]
        return found, batch.of_turns(batch.weight, rows)

    return losses


def nft(batch: Batch, rows: Tensor) -> Quantities:
    """DiffusionNFT: noise what was made anew, and move toward it or away from it."""
    options, maximum = batch.run.config.nft, batch.run.config.rewards.advantage_max
    _, sigma, target, forward = batch.renoised(rows)
    velocity = forward()
    old_velocity = batch.run.policies.old_velocity(velocity, forward)
    r = mt.optimality_probability(batch.of_turns(batch.advantage, rows), advantage_max=maximum)
    if options.loss == "adaptive":
        loss = mt.adaptive_nft_loss(
            velocity, old_velocity, target, r, sigma, nft_beta=options.beta, advantage_max=maximum
        )
    else:
        loss = mt.nft_loss(velocity, old_velocity, target, r, nft_beta=options.beta)
    return {"policy_loss": loss, **kept_near(batch, velocity, lambda: batch.reference(forward))}


def awm(batch: Batch, rows: Tensor) -> Quantities:
    """Advantage-weighted matching: make what was good match better, in place of log-probs."""
    options = batch.run.config.nft
    _, _, target, forward = batch.renoised(rows)
    velocity = forward()
    old_velocity = batch.run.policies.old_velocity(velocity, forward)
    log_prob, old_log_prob = (mt.matching_log_prob(v, target) for v in (velocity, old_velocity))
    loss = surrogate(batch, rows, log_prob, old_log_prob, options.clip)
    found = {"policy_loss": loss, **ratios(log_prob - old_log_prob, options.clip)}
    if options.old_kl_coef > 0:
        found["old_kl"] = mt.velocity_kl(velocity, old_velocity)
        found["policy_loss"] = loss + options.old_kl_coef * found["old_kl"]
    return found | kept_near(batch, velocity, lambda: batch.reference(forward))


def dpo(batch: Batch, rows: Tensor) -> Quantities:
    """Online DPO: prefer the best of a group to its worst, more than the reference does."""
    losers = torch.stack([batch.losers[rows[:, 0], rows[:, 1]], rows[:, 1], rows[:, 2]], dim=1)
    made = batch.renoised(torch.cat([rows, losers]), noise_of=rows.repeat(2, 1))
    winner, loser = torch.arange(2 * len(rows), device=batch.run.device).split(len(rows))
    velocity, reference = made.forward(), batch.reference(made.forward)
    beta = batch.run.config.nft.beta
    loss = mt.dpo_loss(velocity, reference, made.target, winner, loser, dpo_beta=beta)
    found = {"policy_loss": loss, "preferred": (loss.detach() < math.log(2)).float()}
    near = kept_near(batch, velocity, lambda: reference)
    return found | {name: values.view(2, -1).mean(dim=0) for name, values in near.items()}


def grpo(batch: Batch, rows: Tensor) -> Quantities:
    """Flow-GRPO: replay stochastic steps, and make good ones likelier."""
    clip = batch.run.config.grpo.clip
    steps, forward = batch.replayed(rows)
    transition = batch.transition(steps, forward())
    log_prob = mt.gaussian_log_prob(steps.next_x, *transition, reduction="mean")
    loss = surrogate(batch, rows, log_prob, steps.log_prob, clip)
    found = {"policy_loss": loss, **ratios(log_prob - steps.log_prob, clip)}
    return found | steps_kept_near(batch, transition, steps, forward)


def guard(batch: Batch, rows: Tensor) -> Quantities:
    """GRPO-Guard: ratios without bias, and every step's gradient of one scale."""
    config = batch.run.config
    steps, forward = batch.replayed(rows)
    velocity = forward()
    transition = batch.transition(steps, velocity)
    old = batch.transition(steps, batch.run.policies.old_velocity(velocity, forward))
    log_ratio = mt.guard_log_ratio(
        steps.next_x, transition.mean, old.mean, transition.std, reduction="mean"
    )
    loss = surrogate(batch, rows, log_ratio, torch.zeros_like(log_ratio), config.grpo.clip)
    weight = mt.guard_step_weight(batch.solver, steps.sigma, steps.next_sigma)
    found = {"policy_loss": loss * weight / config.sampling.steps}
    found |= ratios(log_ratio, config.grpo.clip)
    return found | steps_kept_near(batch, transition, steps, forward)


def dppo(batch: Batch, rows: Tensor) -> Quantities:
    """Flow-DPPO: no clip; what is too far from the old policy may not go further."""
    threshold = batch.run.config.grpo.threshold
    steps, forward = batch.replayed(rows)
    velocity = forward()
    transition = batch.transition(steps, velocity)
    old = batch.transition(steps, batch.run.policies.old_velocity(velocity, forward))
    log_prob = mt.gaussian_log_prob(steps.next_x, *transition, reduction="mean")
    divergence = mt.gaussian_kl(
        transition.mean.detach(), old.mean, transition.std, reduction="mean"
    )
    loss = mt.divergence_gated_loss(
        log_prob,
        steps.log_prob,
        batch.of_turns(batch.advantage, rows),
        divergence,
        threshold=threshold,
    )
    beyond = (divergence > threshold).float()
    found = {"policy_loss": loss, "divergence": divergence, "beyond": beyond}
    return found | steps_kept_near(batch, transition, steps, forward)


OBJECTIVES: Mapping[str, Callable[[Batch, Tensor], Quantities]] = {
    "nft": nft,
    "awm": awm,
    "dpo": dpo,
    "grpo": grpo,
    "guard": guard,
    "dppo": dppo,
}


def surrogate(
    batch: Batch, rows: Tensor, log_prob: Tensor, old_log_prob: Tensor, clip: float
) -> Tensor:
    """The clipped surrogate of rows."""
    advantage = batch.of_turns(batch.advantage, rows)
    return mt.clipped_surrogate_loss(
        log_prob, old_log_prob, advantage, clip_low=clip, clip_high=clip
    )


def ratios(log_ratio: Tensor, clip: float) -> Quantities:
    """What a log shows of the ratios of new to old policy."""
    ratio = log_ratio.detach().exp()
    return {"ratio": ratio, "clip_fraction": ((ratio - 1).abs() > clip).float()}


def kept_near(
    batch: Batch, velocity: Tensor, reference_velocity: Callable[[], Tensor]
) -> Quantities:
    """KL in velocity to the model as it came and the hinge on its norm, if they weigh anything."""
    options = batch.run.config.nft
    if options.kl_coef == options.norm_coef == 0:
        return {}
    reference = reference_velocity()
    found = {"kl": mt.velocity_kl(velocity, reference)} if options.kl_coef > 0 else {}
    if options.norm_coef > 0:
        found["norm_hinge"] = mt.velocity_norm_hinge(velocity, reference)
    return found


def steps_kept_near(
    batch: Batch, transition: mt.Transition, steps: mt.Steps, forward: Callable[[], Tensor]
) -> Quantities:
    """KL of steps to those of the model as it came, if it weighs anything."""
    if batch.run.config.kl_coef == 0:
        return {}
    reference = batch.transition(steps, batch.reference(forward))
    kl = mt.gaussian_kl(transition.mean, reference.mean, transition.std, reduction="mean")
    return {"kl": kl}
