"""Teach an editor to work on its own imperfect images by distillation, without any reward.

    python examples/self_distillation.py shapes-nft --model.path runs/shapes/model ...
    python examples/self_distillation.py shapes-nft --distillation.teacher CHECKPOINT/lora ...

The first is MT-OPSD (arXiv 2609.35611): the student edits chains, each turn on its own image, and
the teacher, which is the model as it came, is shown the CLEAN image of each turn instead. At the
states that the student reached itself, its velocity is drawn to the teacher's. Where a turn starts
from a clean image, as the first one does, this keeps the student what it was. The second is plain
on-policy distillation: a teacher of other weights, a LoRA of the run's rank, sees what the student
sees. Rewards are only asked for by evaluations; otherwise the command line, presets, checkpoints,
resuming, log and report are those of ``train_flux.py``, whose objective has no meaning here.

Clean images come from ``clean_images``, and it is all that knows of the shapes world, in which the
true picture before each turn can be drawn. There are none of a photograph's later turns. MT-OPSD
wears a photograph out instead: the student is run k turns under an instruction to change nothing,
and edits what comes of it for real, while the teacher is shown the photograph itself. With a chain
of k such instructions and the real one, ``clean_images`` is ``[photograph] * (k + 1)``. The paper
adds ``flow_matching_loss`` under the instruction to change nothing, at half the weight; this world
has no such instruction.

Seen in the shapes world (seed 0, 20 rounds, 512 held-out chains, 95% intervals of paired
differences): from the clean image, with ``--training.minibatches 8 --training.learning-rate 2e-3
--distillation.share 0.5``, Marginal(3) rises from 23.8 to 27.0 (+3.1 [+1.2, +5.1]), and turn 3
keeps 69% of the success at turn 1, before 62%. But CC(3) falls from 96.8 to 95.8 (-1.0 [-1.3,
-0.8]), and Overall(3) gains nothing (-1.7 [-4.5, +1.1], from 18.4). A guess at why: wear can be
seen in an image, but what this editor makes are wrong edits, of which an image does not tell. From
the LoRA of 20 rounds of NFT, with ``--training.final-rate 0.3``, Overall(3) rises to 45.3; the
teacher's is 45.9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from mteditflow_examples.flux.config import ConfigError
from mteditflow_examples.flux.run import Run, main
from mteditflow_examples.shapes.served import chain_of
from mteditflow_examples.shapes.vision import pixels_of, to_pil
from mteditflow_examples.shapes.world import draw
from PIL.Image import Image, Resampling
from torch import Tensor

import mteditflow as mt
from mteditflow.chains import Chain
from mteditflow.pipelines import Rollout
from mteditflow.training import Updater, keyed_generator, training_rows

Losses = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def clean_images(chain: Chain, reference: Image) -> list[Image]:
    """The image before each turn had all turns before it been right: here the true ones, drawn."""
    states = chain_of(pixels_of(reference), chain.instructions).states[:-1]
    return [to_pil(draw(state)).resize(reference.size, Resampling.NEAREST) for state in states]


def train(run: Run) -> None:
    """Roll out, look up what the teacher says there, step: until the last round."""
    config = run.config
    updater = Updater(
        run.optimizer, run.policies.parameters, max_grad_norm=config.training.max_grad_norm
    )
    run.method = "self-distillation" if config.distillation.teacher is None else "distillation"
    for number in run.rounds():
        if number == run.first_round:
            load_teacher(run)
        rollout, shown, rows = sample(run, number)
        with run.log.stopwatch.phase("updating"):
            for minibatch in rows:
                parts = minibatch.split(config.training.batch)
                run.updated(updater.step(parts, losses_of(run, rollout, shown)))


def load_teacher(run: Run) -> None:
    """Let the old policy, which nothing moves here, be the teacher, if there is one."""
    teacher = run.config.distillation.teacher
    if teacher is not None:
        try:
            run.policies.load(run.editor.pipeline, teacher, policy="old")
        except (OSError, ValueError) as error:
            raise ConfigError(f"distillation.teacher: cannot load {teacher}: {error}") from error


def sample(run: Run, number: int) -> tuple[Rollout, Rollout, list[Tensor]]:
    """Roll this rank's chains out: the student's record, the teacher's, rows of each minibatch."""
    chains, references, group, first = run.next_chains()

    def generators(purpose: str) -> list[torch.Generator]:
        """Of trajectories by their place among those of all ranks."""
        seed = run.config.training.seed
        return [keyed_generator(seed, purpose, number, first + b) for b in range(len(chains))]

    with run.log.stopwatch.phase("sampling"):
        instructions = [chain.instructions for chain in chains]
        rollout = shown = record(run, number, references, instructions, generators("noise"), group)
        if run.config.distillation.teacher is None:
            shown = cleaned(run, number, chains, references, rollout)
    steps = rollout.trajectory.log_prob.shape[2]
    rows = training_rows(
        rollout.trajectory.turn_mask[..., None].expand(-1, -1, steps),
        generators=generators("rows"),
        share=run.config.distillation.share,
        minibatches=run.config.training.minibatches,
    )
    return rollout, shown, rows


def record(
    run: Run,
    number: int,
    references: Sequence[Image],
    instructions: Sequence[Sequence[str]],
    generators: Sequence[torch.Generator],
    group: Tensor,
) -> Rollout:
    """Roll chains out as the current policy, without noise in the steps."""
    parts = []
    with run.log.bar("rollout", len(references), unit="chains") as bar:
        for part in run.editor.roll_out(
            references,
            instructions,
            generators=generators,
            group=group,
            batch=run.config.sampling.batch,
            verify=number == run.first_round,
        ):
            parts.append(part.rollout)
            bar.advance(len(part.images))
            run.stop_if_asked()
    return Rollout.concatenate(parts)


def cleaned(
    run: Run,
    number: int,
    chains: Sequence[Chain],
    references: Sequence[Image],
    rollout: Rollout,
) -> Rollout:
    """The student's trajectories, with the conditioning of the same edits of clean images.

    Members of a group share these, so each is recorded once, as a chain of one turn. What the
    student makes of them is not used, so the noise may be any.
    """
    group, turns = rollout.trajectory.group.tolist(), run.config.data.turns
    members = {g: b for b, g in enumerate(group)}
    images = [x for b in members.values() for x in clean_images(chains[b], references[b])]
    instructions = [[text] for b in members.values() for text in chains[b].instructions]
    noise = [torch.Generator() for _ in images]
    clean = record(run, number, images, instructions, noise, torch.arange(len(images)))
    first = torch.tensor([turns * list(members).index(g) for g in group])
    index = clean.index[first[:, None] + torch.arange(turns), 0]
    return replace(clean, trajectory=rollout.trajectory, index=index)


def losses_of(run: Run, rollout: Rollout, shown: Rollout) -> Losses:
    """Distances of rows to the teacher's velocity at the student's states, as an updater takes."""
    model = run.policies.model
    teacher = "reference" if run.config.distillation.teacher is None else "old"

    def losses(rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        trajectory, turn, step = rows.unbind(dim=1)
        steps = rollout.trajectory.steps(trajectory, turn, step)
        at = (steps.x_t.to(run.device), steps.sigma.to(run.device), trajectory, turn)
        velocity = rollout.velocity(model, *at)
        with torch.no_grad(), run.policies.use(teacher):
            teacher_velocity = shown.velocity(model, *at)
        loss = mt.distillation_loss(velocity, teacher_velocity)
        return {"loss": loss}, torch.ones_like(loss)

    return losses


if __name__ == "__main__":
    main(train)
