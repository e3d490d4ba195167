"""Teach an editor to work on its own imperfect images by distillation, without any reward.

    python examples/self_distillation.py shapes-nft --model.path runs/shapes/model ...
    python examples/self_distillation.py shapes-nft --teacher.path CHECKPOINT/lora ...
    python examples/self_distillation.py shapes-nft objective:mt_opsd --data.drift 6 ...

In the first the student edits chains, each turn on its own image, and the teacher, which is the
base model, is shown the CLEAN image of each turn instead. At the states that the student reached
itself, its velocity is drawn to the teacher's. Where a turn starts from a clean image, as the first
one does, this keeps the student what it was. The second is plain on-policy distillation: a teacher
of other weights, a LoRA of the run's rank, sees what the student sees. Rewards are only asked for
by evaluations and promotions; otherwise the command line, presets, checkpoints, resuming, log and
report are those of ``train_flux.py``, with the objective ``Distillation`` in place of the preset's.

Clean images come from ``clean_images``, and it is all that knows of the shapes world, in which the
true picture before each turn can be drawn. There are none of a photograph's later turns. The third,
MT-OPSD (arXiv 2609.35611), wears a photograph out instead: the student is run some turns under an
instruction to change nothing, and edits what comes of it for real, while the teacher is shown the
photograph itself (``flux/drifting.py``). It learns to leave the worn picture as it is, too, and now
and then becomes its own teacher (``flux/promotion.py``). See "Long chains" in docs/training.md.

The first in the shapes world (seed 0, 20 rounds, 512 held-out chains, 95% intervals of paired
differences): from the clean image, with ``--training.minibatches 8 --training.learning-rate 2e-3
--objective.share 0.5``, Marginal(3) rises from 23.8 to 27.0 (+3.1 [+1.2, +5.1]), and
Marginal(3) / Marginal(1) from 0.62 to 0.69. But CC(3) falls from 96.8 to 95.8 (-1.0 [-1.3,
-0.8]), and Overall(3) gains nothing (-1.7 [-4.5, +1.1], from 18.4). A guess at why: wear can be
seen in an image, but what this editor makes are wrong edits, of which an image does not tell. From
the LoRA of 20 rounds of NFT, with ``--training.final-rate 0.3``, Overall(3) rises to 45.3; the
teacher's is 45.9.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from mteditflow_examples.flux.command_line import parse_or_exit
from mteditflow_examples.flux.config import ConfigError, DistillationConfig

from mteditflow.objectives import Sampling

if TYPE_CHECKING:
    from mteditflow_examples.flux.run import Run
    from mteditflow_examples.flux.sampling import RoundChains
    from PIL.Image import Image
    from torch import Tensor

    from mteditflow.chains import Chain
    from mteditflow.pipelines import Rollout, RolloutVelocity, Seen


def clean_images(chain: Chain, reference: Image) -> list[Image]:
    """The image before each turn had all turns before it been right: here the true ones, drawn."""
    from mteditflow_examples.shapes.served import chain_of
    from mteditflow_examples.shapes.vision import pixels_of, to_pil
    from mteditflow_examples.shapes.world import draw
    from PIL.Image import Resampling

    states = chain_of(pixels_of(reference), chain.instructions).states[:-1]
    return [to_pil(draw(state)).resize(reference.size, Resampling.NEAREST) for state in states]


def train(run: Run) -> None:
    """Roll out the student, record the teacher's conditioning, update; evaluate, log and save."""
    from mteditflow_examples.flux.checkpointing import restore, save_if_due
    from mteditflow_examples.flux.drifting import drift
    from mteditflow_examples.flux.evaluation import evaluate_if_due
    from mteditflow_examples.flux.promotion import promote_if_due
    from mteditflow_examples.flux.reporting import carry_over, record
    from mteditflow_examples.flux.sampling import next_chains
    from mteditflow_examples.flux.updating import update

    from mteditflow.training import Updater

    config, state, policies = run.config, run.state, run.policies
    updater = Updater(
        run.optimizer, policies.parameters, max_grad_norm=config.training.max_grad_norm
    )
    teacher = config.teacher.path
    run.method = method_of(run)
    restore(run)
    if teacher is not None:
        load_teacher(run)
    if evaluate_if_due(run) and state.done:
        save_if_due(run, evaluated=True)
    with run.log.bar("round", config.training.rounds, unit="rounds", done=state.done) as bar:
        while state.done < config.training.rounds:
            run.begin_round()

            # Sample: the student's chains, then the teacher's conditioning of the same edits.
            drawn = next_chains(run)
            with run.log.stopwatch.phase("sampling"):
                samples, velocity = (drift if config.drifts else follow)(run, drawn)

            # Update: toward the teacher's velocity at the student's states.
            with run.log.stopwatch.phase("updating"):
                update(run, updater, velocity, samples, None, None)
            promote_if_due(run)
            carry_over(run, None)
            state.done, run.between = state.done + 1, True

            # Evaluate if due, log, save if due.
            evaluated = False
            try:
                evaluated = evaluate_if_due(run)
            finally:  # the round is done, whether it can be evaluated or not
                record(run, bar)
            save_if_due(run, evaluated=evaluated)
            bar.advance()
            run.stop_if_requested()


def method_of(run: Run) -> str:
    """Return the name of what trains, in titles."""
    if run.config.drifts:
        return "MT-OPSD"
    return "self-distillation" if run.config.teacher.path is None else "distillation"


def follow(run: Run, drawn: RoundChains) -> tuple[Rollout, RolloutVelocity]:
    """Record the student's chains, and the teacher's conditioning: its own, or clean images'."""
    from mteditflow.pipelines import RolloutVelocity

    rollout = record_student(
        run, drawn.references, drawn.instructions, drawn.group, seen=drawn.seen
    )
    if run.config.teacher.path is not None:
        return rollout, RolloutVelocity(run.policies, rollout, teacher=("old", rollout))
    shown = clean_rollout(run, drawn, rollout)
    return rollout, RolloutVelocity(run.policies, rollout, teacher=("reference", shown))


def load_teacher(run: Run) -> None:
    """Load the teacher's LoRA as the old policy, which nothing else moves here.

    Raises:
        ConfigError: it cannot be loaded, or is of another rank or other modules.
    """
    path = run.config.teacher.path
    try:
        run.policies.load(run.editor.pipeline, path, policy="old")
    except (OSError, ValueError) as error:
        raise ConfigError(f"teacher.path: cannot load {path}: {error}") from error


def record_student(
    run: Run,
    references: Sequence[Image],
    instructions: Sequence[Sequence[str]],
    group: Tensor,
    *,
    seen: Sequence[Seen] | None = None,
    purpose: str = "noise",
) -> Rollout:
    """Roll chains out with the current policy, without noise in the steps."""
    from mteditflow_examples.flux.sampling import roll_out

    from mteditflow.pipelines import Rollout

    parts = roll_out(run, references, instructions, group, Sampling(), seen=seen, purpose=purpose)
    return Rollout.concatenate([part.rollout for part in parts])


def clean_rollout(run: Run, drawn: RoundChains, rollout: Rollout) -> Rollout:
    """Return the student's trajectories with the conditioning of the same edits of clean images.

    Members of a group share these, so each is recorded once, as a chain of one turn. The images
    that the student makes there are not used, so the noise may be any.
    """
    group, turns = rollout.trajectory.group.tolist(), rollout.turn_mask.shape[1]
    members = {g: b for b, g in enumerate(group)}
    chosen = [(drawn.chains[b], drawn.references[b]) for b in members.values()]
    images = [image for chain, reference in chosen for image in clean_images(chain, reference)]
    instructions = [[text] for chain, _ in chosen for text in chain.instructions]
    seen = [
        [[drawn.references[b] if image == "original" else image for image in turn]]
        for b in members.values()
        for turn in drawn.seen[b]
    ]
    one_each = torch.arange(len(images))
    clean = record_student(run, images, instructions, one_each, seen=seen, purpose="clean noise")
    first = torch.tensor([turns * list(members).index(g) for g in group])
    index = clean.index[first[:, None] + torch.arange(turns), 0]
    return replace(clean, trajectory=rollout.trajectory, index=index)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    words = sys.argv[1:] if arguments is None else arguments
    config = parse_or_exit(words, DistillationConfig)
    from mteditflow_examples.flux.start import main as run_to_the_end

    run_to_the_end(train, config)


if __name__ == "__main__":
    main()
