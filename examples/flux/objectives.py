"""What is learned from a round: objectives as functions of a batch and its rows.

Each returns quantities per row, [M]: "policy_loss", what is added to it with a weight (``kl``),
and what is only reported. All mathematics is in calls of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

import mteditflow as mt

from .batch import Batch

Quantities = dict[str, Tensor]


def losses_of(batch: Batch) -> Callable[[Tensor], tuple[Quantities, Tensor]]:
    """What an updater takes: quantities of rows, "loss" among them, and the rows' weights."""
    config = batch.run.config
    objective, kl_coef = OBJECTIVES[config.objective], config.kl_coef

    def losses(rows: Tensor) -> tuple[Quantities, Tensor]:
        found = objective(batch, rows)
        found["loss"] = found["policy_loss"]
        if "kl" in found:
            found["loss"] = found["policy_loss"] + kl_coef * found["kl"]
        return found, batch.of_turns(batch.valid, rows).float()

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
    return {"policy_loss": loss, **kept_near(batch, velocity, forward)}


def grpo(batch: Batch, rows: Tensor) -> Quantities:
    """Flow-GRPO: replay stochastic steps, and make good ones likelier."""
    clip = batch.run.config.grpo.clip
    steps, forward = batch.replayed(rows)
    transition = batch.transition(steps, forward())
    log_prob = mt.gaussian_log_prob(steps.next_x, *transition, reduction="mean")
    loss = mt.clipped_surrogate_loss(
        log_prob,
        steps.log_prob,
        batch.of_turns(batch.advantage, rows),
        clip_low=clip,
        clip_high=clip,
    )
    found = {"policy_loss": loss, **ratios(log_prob - steps.log_prob, clip)}
    return found | steps_kept_near(batch, transition, steps, forward)


def kept_near(batch: Batch, velocity: Tensor, forward: Callable[[], Tensor]) -> Quantities:
    """KL in velocity to the model as it came, if it weighs anything."""
    if batch.run.config.kl_coef == 0:
        return {}
    return {"kl": mt.velocity_kl(velocity, batch.reference(forward))}


def steps_kept_near(
    batch: Batch, transition: mt.Transition, steps: mt.Steps, forward: Callable[[], Tensor]
) -> Quantities:
    """KL of steps to those of the model as it came, if it weighs anything."""
    if batch.run.config.kl_coef == 0:
        return {}
    reference = batch.transition(steps, batch.reference(forward))
    kl = mt.gaussian_kl(transition.mean, reference.mean, transition.std, reduction="mean")
    return {"kl": kl}


def ratios(log_ratio: Tensor, clip: float) -> Quantities:
    """What a log shows of the ratios of new to old policy."""
    ratio = log_ratio.detach().exp()
    return {"ratio": ratio, "clip_fraction": ((ratio - 1).abs() > clip).float()}


OBJECTIVES: Mapping[str, Callable[[Batch, Tensor], Quantities]] = {"nft": nft, "grpo": grpo}
