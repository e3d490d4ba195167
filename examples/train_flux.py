"""Reinforcement learning of FLUX, Qwen-Image-Edit and other pipelines on chains of edits.

    python examples/train_flux.py shapes-nft
    accelerate launch --config_file examples/flux/launch/ddp.yaml examples/train_flux.py \
        kontext-nft --data.chains chains.jsonl --rewards.judge http://judge:8000/v1 ...

This file is the loop, with one call for each step of a round. The mathematics is in the library;
``flux/`` has everything else: options, loading, sampling, rewards, updates, checkpoints, evaluation
and reports. Every random number comes from a key such as (seed, "noise", round, trajectory), so a
repeated round draws the same numbers, on any number of ranks and in any batches.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mteditflow_examples.flux.command_line import parse_or_exit

if TYPE_CHECKING:
    from mteditflow_examples.flux.run import Run


def train(run: Run) -> None:
    """Sample, score, compute advantages, update; evaluate, log and save when due."""
    from mteditflow_examples.flux.advantages import (
        reward_advantages,
        round_rewards,
        turn_advantages,
        turn_signals,
    )
    from mteditflow_examples.flux.checkpointing import restore, save_if_due
    from mteditflow_examples.flux.evaluation import evaluate_if_due
    from mteditflow_examples.flux.filling import Sampled, fill
    from mteditflow_examples.flux.gating import gate_round
    from mteditflow_examples.flux.panel import watch_drift
    from mteditflow_examples.flux.regions import token_advantages
    from mteditflow_examples.flux.reporting import (
        carry_over,
        log_rewards,
        record,
        refuse_flat_rewards,
        refuse_unsound_rewards,
        show_chains,
    )
    from mteditflow_examples.flux.sampling import gather, next_chains, sample, velocity_of
    from mteditflow_examples.flux.updating import check_first_ratios, update

    from mteditflow.training import Updater

    config, state, policies = run.config, run.state, run.policies
    updater = Updater(
        run.optimizer, policies.parameters, max_grad_norm=config.training.max_grad_norm
    )
    restore(run)
    if evaluate_if_due(run) and state.done:
        save_if_due(run, evaluated=True)
    with run.log.bar("round", config.training.rounds, unit="rounds", done=state.done) as bar:
        while state.done < config.training.rounds:
            run.begin_round()

            # Sample: whole chains, each turn edits the previous result.
            drawn = next_chains(run)
            rollout, images, scores = sample(run, drawn)
            show_chains(run, drawn, images, scores)

            # Score: rewards of all ranks, since the statistics of groups may span them.
            all_scores, group, own = gather(run, scores, drawn.group)
            rewards = round_rewards(config.rewards, all_scores, group)
            log_rewards(run, rewards)
            refuse_unsound_rewards(run, rewards)

            # Fill: other chains in place of uninformative groups, within a bound.
            filled = Sampled(drawn, rollout, images, scores, rewards)
            if config.data.extra_groups:
                filled = fill(run, filled)

            # Advantage: credit turns, normalize in groups, fuse; this rank keeps its own rows.
            signals, weights = turn_signals(config.rewards, filled.rewards, state.multipliers)
            advantage, valid, unfused = turn_advantages(
                config.rewards, filled.rewards, signals, weights, state.history
            )
            run.numbers["groups/unfused"] = unfused
            refuse_flat_rewards(run, filled.rewards, advantage, valid)
            advantage, valid = advantage[own], valid[own]
            if config.rewards.regions:  # credit tokens: each reward counts in its own region
                parts = reward_advantages(
                    config.rewards, filled.rewards, signals, weights, state.history
                )
                mine = {name: part[own] for name, part in parts.items()}
                advantage = token_advantages(run, filled.drawn, filled.rollout, filled.images, mine)

            # Gate: keep the KL where the trained rewards rank above the auxiliary ones.
            gate = None
            if config.gate.auxiliary:
                gate = gate_round(run, filled.rewards)[own]

            # Update: the objective's minibatches, then the old policy.
            velocity = velocity_of(policies, filled.rollout)
            if config.stochastic and state.done == run.first_round:  # all ratios must be 1
                check_first_ratios(run, velocity, filled.rollout)
            with run.log.stopwatch.phase("updating"):
                update(run, updater, velocity, filled.rollout, advantage, valid, gate)
            policies.update_old(decay=run.objective.old_decay(state.done))

            # Monitor: statistics of the images against their early bands; these train nothing.
            watch_drift(run, drawn, images, scores)
            carry_over(run, rewards, signals, filled.rewards.group)
            state.done, run.between = state.done + 1, True

            # Evaluate if due, log, save if due.
            evaluated = False
            try:
                evaluated = evaluate_if_due(run)
            finally:  # the round's metrics are complete even if its evaluation fails
                record(run, bar)
            save_if_due(run, evaluated=evaluated)
            bar.advance()
            run.stop_if_requested()


def main() -> None:
    """Run the command line."""
    config = parse_or_exit(sys.argv[1:])  # before the heavy imports, so help and errors are fast
    from mteditflow_examples.flux.start import main as run_to_the_end

    run_to_the_end(train, config)


if __name__ == "__main__":
    main()
