"""Train an editor on its own imperfect images by distillation, without any reward.

    python examples/self_distillation.py shapes-nft --model.path runs/shapes/model ...
    python examples/self_distillation.py shapes-nft --teacher.path CHECKPOINT/lora ...
    python examples/self_distillation.py shapes-nft objective:mt_opsd --data.drift 6 ...

1. Self-distillation: the student edits chains, each turn from its previous result. The teacher, the
base model, is conditioned on the CLEAN image of each turn. At the student's own states, the
student's velocity is regressed onto the teacher's. For turns that start from a clean image, such as
the first, this keeps the student at the base model.
2. On-policy distillation: the teacher has other weights, a LoRA of the run's rank, and sees the
student's images.
3. MT-OPSD (arXiv 2609.35611): see below.

Only evaluations and promotions use rewards. Command line, presets, checkpoints, resuming, log and
report are those of ``train_flux.py``, with the objective ``Distillation`` in place of the preset's.

Clean images come from ``clean_images``, the only function specific to the shapes world, where the
true picture before each turn can be drawn. For photographs, later turns have no clean image.
MT-OPSD degrades the photograph instead: the student runs some turns under an instruction to change
nothing, then makes a real edit of the result, while the teacher sees the photograph itself
(``flux/drifting.py``). The student also learns to keep degraded pictures unchanged, and replaces
its teacher when it beats it (``flux/promotion.py``). See "Long chains" in docs/training.md.

Self-distillation in the shapes world (seed 0, 20 rounds, 512 held-out chains, 95% intervals of
paired differences): with ``--training.minibatches 8 --training.learning-rate 2e-3
--objective.share 0.5``, Marginal(3) rises from 23.8 to 27.0 (+3.1 [+1.2, +5.1]), and
Marginal(3) / Marginal(1) from 0.62 to 0.69. But CC(3) falls from 96.8 to 95.8 (-1.0 [-1.3,
-0.8]), and Overall(3) gains nothing (-1.7 [-4.5, +1.1], from 18.4). A guess at why: wear is visible
in an image, but this editor's errors are wrong edits, which an image does not reveal. Distillation
from the LoRA of 20 rounds of NFT, with ``--training.final-rate 0.3``: Overall(3) rises to 45.3; the
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
    """Return the input image of each turn if all previous turns had been right, [N].

    This version draws the true pictures of the shapes world; replace it for other data.
    """
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
            finally:  # the round's metrics are complete even if its evaluation fails
                record(run, bar)
            save_if_due(run, evaluated=evaluated)
            bar.advance()
            run.stop_if_requested()


def method_of(run: Run) -> str:
    """Return the name of the method, for titles."""
    if run.config.drifts:
        return "MT-OPSD"
    return "self-distillation" if run.config.teacher.path is None else "distillation"


def follow(run: Run, drawn: RoundChains) -> tuple[Rollout, RolloutVelocity]:
    """Record the student's chains, and the teacher's conditioning, by the same or clean images."""
    from mteditflow.pipelines import RolloutVelocity

    rollout = record_student(
        run, drawn.references, drawn.instructions, drawn.group, seen=drawn.seen
    )
    if run.config.teacher.path is not None:
        return rollout, RolloutVelocity(run.policies, rollout, teacher=("old", rollout))
    shown = clean_rollout(run, drawn, rollout)
    return rollout, RolloutVelocity(run.policies, rollout, teacher=("reference", shown))


def load_teacher(run: Run) -> None:
    """Load the teacher's LoRA as the old policy, which nothing else updates here.

    Raises:
        ConfigError: the LoRA cannot be loaded, or has another rank or other modules.
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
    """Roll out chains with the current policy and deterministic steps."""
    from mteditflow_examples.flux.sampling import roll_out

    from mteditflow.pipelines import Rollout

    parts = roll_out(run, references, instructions, group, Sampling(), seen=seen, purpose=purpose)
    return Rollout.concatenate([part.rollout for part in parts])


def clean_rollout(run: Run, drawn: RoundChains, rollout: Rollout) -> Rollout:
    """Return the student's trajectories with the conditioning of the same edits of clean images.

    Members of a group share clean images, so each is recorded once, as a chain of one turn. The
    results of these edits are not used, so their noise does not matter.
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
    # Row of turn 1 of each trajectory's group among the clean edits, which lie turn by turn.
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
