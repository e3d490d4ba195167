"""Training data of MT-OPSD: images that the student has degraded by its own identity turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from mteditflow import gather_ranks
from mteditflow.objectives import MTOPSD, Sampling, WornSamples
from mteditflow.pipelines import Rollout, RolloutVelocity
from mteditflow.rewards import pixel_change

from .config import ConfigError
from .reporting import CHANGE
from .run import Run
from .sampling import RoundChains, roll_out


class Drifted(NamedTuple):
    """Samples and velocities of an MT-OPSD round.

    Attributes:
        samples: the turn that each trajectory is trained on.
        velocity: the student's, given degraded images, and the teacher's, given clean ones.
    """

    samples: WornSamples
    velocity: RolloutVelocity


def drift(run: Run, drawn: RoundChains) -> Drifted:
    """Degrade images by identity turns, then record one more turn of each.

    That turn is the chain's first edit, or another identity turn with probability
    1 - ``objective.edit_share``.
    """
    objective, text = run.objective, run.config.data.identity_instruction
    assert isinstance(objective, MTOPSD)
    references = [image for image in drawn.references if image is not None]
    worn = _wear_out(run, references, text)
    identity = torch.tensor(
        [
            # Keyed by the place over all ranks, so that the draw does not depend on their number.
            Random(run.key.number("branch", run.key.first + b)).random() >= objective.edit_share
            for b in range(len(worn))
        ],
        dtype=torch.bool,
    )
    asked = [
        text if still else chain.instructions[0]
        for chain, still in zip(drawn.chains, identity.tolist(), strict=True)
    ]
    student = _record(run, worn, asked, "noise")
    samples = WornSamples(student, identity, _given(student))
    taught = ("old", _clean(run, drawn, references, student))
    return Drifted(samples, RolloutVelocity(run.policies, student, teacher=taught))


def _wear_out(run: Run, references: Sequence[Image], text: str) -> list[Image]:
    """Return the images after all identity turns, and add the pixel change to the metrics."""
    turns, size, worn, changes = run.turns, run.config.sampling.batch, [], []
    with run.log.bar("drift", len(references), unit="chains") as bar:
        for start in range(0, len(references), size):
            part = references[start : start + size]
            rows = range(start, start + len(part))
            edited = run.editor.edit(
                part,
                [[text] * turns] * len(part),
                generators=[run.key.generator("drift", row) for row in rows],
                batch=size,
            )
            worn += [images[-1] for images in edited]
            for first, images in zip(part, edited, strict=True):
                pairs = zip([first, *images[:-1]], images, strict=True)
                changes.append([pixel_change(*pair) for pair in pairs])
            bar.advance(len(part))
            run.stop_if_requested()
    found = torch.tensor(changes, dtype=torch.float64, device="cpu")
    (everywhere,), _ = gather_ranks(found.to(run.device))
    run.numbers[CHANGE] = float(everywhere.mean())
    return worn


def _record(run: Run, images: Sequence[Image], texts: Sequence[str], purpose: str) -> Rollout:
    """Record one deterministic turn of the student on each image."""
    each = torch.arange(len(images))  # inputs differ, so no two trajectories share conditioning
    given = (images, [[text] for text in texts], each)
    parts = roll_out(run, *given, Sampling(), purpose=purpose)
    return Rollout.concatenate([part.rollout for part in parts])


def _given(student: Rollout) -> Tensor:
    """Return the latents of the student's input images.

    Raises:
        ConfigError: the pipeline does not concatenate one reference of the sample's size.
    """
    at = torch.stack([torch.arange(len(student)), torch.zeros(len(student), dtype=torch.int64)], 1)
    try:
        return student.reference_at(at)
    except ValueError as error:
        raise ConfigError(f"objective: mt_opsd cannot train this pipeline: {error}") from error


def _clean(run: Run, drawn: RoundChains, references: Sequence[Image], student: Rollout) -> Rollout:
    """Return the student's trajectories under the conditioning of clean images, for the teacher.

    Members of a group share the clean image, so each is recorded once. Trajectories that end in an
    identity turn get it, too: the teacher runs on every row, and its output there is ignored.
    """
    group = drawn.group.tolist()
    members = {g: b for b, g in enumerate(group)}
    images = [references[b] for b in members.values()]
    texts = [drawn.chains[b].instructions[0] for b in members.values()]
    clean = _record(run, images, texts, "clean noise")
    # The student's states, with each row's index pointing to its group's clean conditioning.
    place = {g: number for number, g in enumerate(members)}
    index = clean.index[torch.tensor([place[g] for g in group])]
    return replace(clean, trajectory=student.trajectory, index=index)
