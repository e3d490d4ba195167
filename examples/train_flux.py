"""Teach FLUX.1-Kontext or FLUX.2-klein to make several edits in a row, by reinforcement learning.

    python examples/train_flux.py shapes-nft
    accelerate launch --config_file examples/flux/launch/ddp.yaml examples/train_flux.py \
        kontext-nft --data.chains chains.jsonl --rewards.judge http://judge:8000/v1 ...

This file is the loop: sample chains, score every turn, fuse, broadcast, loss, step. The losses are
in ``flux/objectives.py``; what keeps a run of days alive (checkpoints, evaluation, log) in
``flux/run.py``; what it can be told in ``flux/config.py``. Everything mathematical is a call of the
library. Every random number comes from a key such as (seed, "noise", round, trajectory): a round
that is done again, or on other ranks, or in other batches, draws the same numbers.
"""

from __future__ import annotations

from mteditflow_examples.flux.batch import Batch, check_first_ratios, solver_of, stochastic_steps
from mteditflow_examples.flux.objectives import losses_of
from mteditflow_examples.flux.rewards import advantages_of, rewards_of
from mteditflow_examples.flux.run import Run, main
from torch import Tensor

import mteditflow as mt
from mteditflow.pipelines import Rollout
from mteditflow.rewards import TurnScores
from mteditflow.training import Updater, gather_scores, keyed_generator


def train(run: Run) -> None:
    """Sample, score, fuse, broadcast, loss, step: until the last round."""
    config = run.config
    updater = Updater(
        run.optimizer, run.policies.parameters, max_grad_norm=config.training.max_grad_norm
    )
    for number in run.rounds():
        rollout, terms, first = sample(run, number)
        advantage, valid = advantages(run, terms, rollout.trajectory.group)
        batch = Batch(run, number, rollout, advantage, valid, first)
        if config.stochastic and number == run.first_round:
            check_first_ratios(batch)
        with run.log.stopwatch.phase("updating"):
            for parts in batch.minibatches():
                run.updated(updater.step(parts, losses_of(batch)))
        slope = 0.0 if config.stochastic else config.nft.old_slope  # there, old is who sampled
        decay = mt.old_policy_decay(number, slope=slope, maximum=config.nft.old_maximum)
        run.policies.update_old(decay=decay)


def sample(run: Run, number: int) -> tuple[Rollout, dict[str, TurnScores], int]:
    """Roll out this rank's chains; each part is scored while the next one is sampled."""
    config = run.config
    chains, references, group, first = run.next_chains()
    parts, waiting, images = [], [], []
    with (
        run.log.stopwatch.phase("sampling"),
        run.policies.use("current" if config.stochastic else "old"),
        run.log.bar("rollout", len(chains), unit="chains") as bar,
    ):
        for part in run.editor.roll_out(
            references,
            [chain.instructions for chain in chains],
            generators=[
                keyed_generator(config.training.seed, "noise", number, first + b)
                for b in range(len(chains))
            ],
            group=group,
            batch=config.sampling.batch,
            solver=solver_of(config),
            stochastic_steps=stochastic_steps(config, number),
            verify=number == run.first_round,
        ):
            made = [[r, *m] for r, m in zip(references[part.rows], part.images, strict=True)]
            waiting.append(run.submit(chains[part.rows], made))
            parts.append(part.rollout)
            images += made
            bar.advance(len(made))
            run.stop_if_asked()
    terms = run.collect(waiting)
    run.show(chains, images, terms)
    return Rollout.concatenate(parts), terms, first


def advantages(
    run: Run, own_terms: dict[str, TurnScores], own_group: Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages of this rank's turns, from the scores of all ranks."""
    terms, own = gather_scores(own_terms, device=run.device)
    (group,), _ = mt.gather_ranks(own_group.to(run.device))
    group = group.cpu()
    run.scored(terms, rewards_of(run.config.rewards, terms), group)
    advantage, valid = advantages_of(run.config.rewards, terms, group, run.multipliers)
    return advantage[own], valid[own]


if __name__ == "__main__":
    main(train)
