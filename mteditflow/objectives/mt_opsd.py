"""MT-OPSD as an objective: edits of worn images, and identity turns that change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from mteditflow._checks import (
    check_count,
    check_floating,
    check_mask,
    check_number,
    check_rank,
    check_shape,
)
from mteditflow.flow.path import interpolate, velocity_target
from mteditflow.flow.sampling import batched_noise
from mteditflow.flow.trajectory import Steps
from mteditflow.losses.distillation import mt_opsd_loss
from mteditflow.objectives.base import Card, Objective, Output, Sampling, Velocity, masked_output
from mteditflow.objectives.keys import Key, RoundKey, round_key
from mteditflow.objectives.samples import Samples, recorded_steps, starts_of, valid_turns
from mteditflow.objectives.units import (
    Units,
    check_units,
    member_mask,
    member_rows,
    training_rows,
)
from mteditflow.objectives.velocities import Velocities


@dataclass(frozen=True, eq=False)
class WornSamples:
    """Samples whose last turn edits a worn image, one that the student's own turns have degraded.

    Args:
        samples: recorded trajectories; their last turn is trained.
        identity: trajectories whose last instruction asks for no change, boolean [B]; all others
            ask for an edit.
        given: latents of the input image of the last turn, [B, ...], in the layout of the samples'
            clean latents.

    Raises:
        ValueError: shapes do not match.
        TypeError: ``identity`` is not boolean, or ``given`` not floating point.

    Source: MT-OPSD (arXiv 2609.35611).

    Example:
        >>> from mteditflow.objectives import CleanSamples
        >>> samples = CleanSamples(torch.zeros(2, 1, 4), torch.tensor([0, 0]))
        >>> worn = WornSamples(samples, torch.tensor([True, False]), torch.ones(2, 4))
        >>> worn.turn_mask.shape, worn.given.shape
        (torch.Size([2, 1]), torch.Size([2, 4]))
    """

    samples: Samples
    identity: Tensor
    given: Tensor

    def __post_init__(self) -> None:
        count = len(self.samples.group)
        check_mask("identity", self.identity, (count,), "[B]")
        check_floating(given=self.given)
        check_rank("given", self.given, 2, "[B, ...]")
        check_shape("given", self.given, (count, *self.given.shape[1:]), "[B, ...]")

    def __len__(self) -> int:
        return len(self.samples.group)

    @property
    def group(self) -> Tensor:
        """Integer group id of each trajectory, [B]."""
        return self.samples.group

    @property
    def turn_mask(self) -> Tensor:
        """Turns that exist, boolean [B, N]."""
        return self.samples.turn_mask

    @property
    def step_mask(self) -> Tensor:
        """Steps that exist and have a density, boolean [B, N, S]."""
        return self.samples.step_mask

    @property
    def reduction(self) -> str:
        """Reduction of the stored log-probs over elements, "mean" or "sum"."""
        return self.samples.reduction

    def clean_at(self, at: Tensor) -> Tensor:
        """Return the final latents of (trajectory, turn) rows."""
        return self.samples.clean_at(at)

    def steps_at(self, rows: Tensor) -> Steps:
        """Return stored steps of (trajectory, turn, step) rows."""
        return self.samples.steps_at(rows)


@dataclass(frozen=True, kw_only=True)
class MTOPSD(Objective):
    r"""MT-OPSD: edit worn images as a teacher edits the clean one, and preserve them on request.

    Before the trained turn, the student degrades an image by turns that ask for no change. A few
    states of the last turn are trained. If that turn is an edit, the student's velocity on the worn
    image is matched to the teacher's on the clean one, at states of the student's own sampling. If
    it asks for no change once more, the target leads to the worn image itself, so that artifacts do
    not grow. See ``mt_opsd_loss`` for the formula. Samples that are not ``WornSamples`` are treated
    as edits only.

    Args:
        edit_share: probability that a trajectory's last turn is an edit, in (0, 1]. The sampling
            loop draws with it; ``WornSamples.identity`` records the outcome.
        identity_weight: weight of an identity turn, which asks for no change, >= 0.
        queries: states per trajectory that are trained in a pass, >= 1.
        query_alpha: first parameter of the Beta distribution of their positions, > 0.
        query_beta: second parameter, > 0. Position 0 is noise and position 1 is clean: (2, 5)
            trains the noisier steps (FLUX), (5, 5) the middle (Qwen-Image-Edit).

    Metrics: "policy_loss", "edit_loss" and "identity_loss", unweighted; the latter two are 0 for a
    unit of the other kind.

    Raises:
        ValueError: a number is out of range.
        TypeError: a count is not an integer.

    Source: MT-OPSD (arXiv 2609.35611), Eq. 5 and 6.

    Example:
        >>> MTOPSD(query_alpha=5.0).sampling(0, steps=4)
        Sampling(solver=None, stochastic_steps=None)
    """

    card = Card(
        title="MT-OPSD",
        papers=("2609.35611",),
        losses=("mt_opsd_loss",),
        needs="teacher on clean images; no reward",
        passes="1 + 1",
        rewarded=False,
        old_kl=False,
    )

    edit_share: float = 0.667
    """Probability that the trained turn is an edit; otherwise it asks for no change."""
    identity_weight: float = 10.0
    """Weight of a turn that asks for no change, relative to 1 for an edit."""
    queries: int = 2
    """States per trajectory that are trained in a pass over a round."""
    query_alpha: float = 2.0
    """First parameter of the Beta distribution of trained states, from noise (0) to clean (1)."""
    query_beta: float = 5.0
    """Second parameter; (2, 5) trains noisier states (FLUX), (5, 5) the middle (Qwen-Image)."""

    def __post_init__(self) -> None:
        check_number("edit_share", self.edit_share, low=0.0, high=1.0, open_low=True)
        check_number("identity_weight", self.identity_weight, low=0.0)
        check_count("queries", self.queries)
        check_number("query_alpha", self.query_alpha, low=0.0, open_low=True)
        check_number("query_beta", self.query_beta, low=0.0, open_low=True)

    def sampling(self, round: int, *, steps: int) -> Sampling:  # noqa: A002
        """See ``Objective``; any sampler can be used, deterministic ones included."""
        return Sampling()

    def units(
        self,
        samples: Samples,
        advantage: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        key: Key,
        minibatches: int = 1,
    ) -> list[Units]:
        """See ``Objective``: ``queries`` rows of the last turn; ``advantage`` is None."""
        if advantage is not None:
            raise TypeError("advantage: expected None for MTOPSD, which has no reward")
        exists, steps = samples.turn_mask.cpu(), recorded_steps(samples).sum(dim=2)
        numbers = torch.arange(exists.shape[1], dtype=torch.int64, device="cpu")
        last = torch.where(exists, numbers, -1).amax(dim=1)
        exists = valid_turns(samples, valid)
        key = round_key(key)
        generators = [key.generator("rows", b) for b in range(len(exists))]
        drawn = training_rows(
            torch.ones(len(exists), 1, 1, dtype=torch.bool, device="cpu"),
            generators=generators,
            minibatches=minibatches,
        )
        return [
            self._units(
                samples,
                [(b, int(last[b])) for b in rows[:, 0].tolist() if exists[b, last[b]]],
                steps,
                key,
            )
            for rows in drawn
        ]

    def _units(
        self, samples: Samples, turns: list[tuple[int, int]], steps: Tensor, key: RoundKey
    ) -> Units:
        """Draw the trained states of some turns, and a seed for the noise of each."""
        places = [(b, n, query) for b, n in turns for query in range(self.queries)]
        rows, seeds = [], []
        for b, n, query in places:
            # torch.distributions takes no generator; this Random depends on the key alone.
            number = Random(key.number("query", key.first + b, query))
            position = number.betavariate(self.query_alpha, self.query_beta)
            count = int(steps[b, n])
            rows.append([b, n, min(int(position * count), count - 1)])
            seeds.append(key.number("query noise", key.first + b, query))
        found = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 1, 3)
        trajectory, turn = (samples.turn_mask.cpu().nonzero().tolist() or [[0, 0]])[0]
        return Units(
            rows=found,
            mask=torch.ones_like(found[..., 0], dtype=torch.bool),
            advantage=None,
            seed=torch.tensor(seeds, dtype=torch.int64, device="cpu").reshape(-1, 1),
            count=len(rows),
            spare=(trajectory, turn),
            starts=starts_of(samples),
        )

    def __call__(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool = False
    ) -> Output:
        """See ``Objective``."""
        # The teacher is evaluated in identity rows too: with sharded weights every rank must make
        # the same forward passes.
        check_units(units, members=1, drawn=True)
        rows = member_rows(units)
        steps = Steps(*(x.detach() for x in samples.steps_at(rows)))
        identity, x_t, target = _identity_turns(samples, units, steps)
        at = Velocities(velocity, x_t, steps.sigma, units, old_is_current=old_is_current)
        exists = member_mask(units, at.current)
        identity = identity.to(at.current.device)
        loss = mt_opsd_loss(
            at.current,
            at.teacher,
            target.to(at.current.device),
            identity,
            identity_weight=1.0,  # metrics are unweighted; the weight follows below
            valid=exists,
        )
        found = {
            "policy_loss": torch.where(identity, self.identity_weight * loss, loss),
            "edit_loss": torch.where(identity, 0, loss),
            "identity_loss": torch.where(identity, loss, 0),
        }
        return masked_output(units, found["policy_loss"], found)


def _identity_turns(samples: Samples, units: Units, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mask of identity rows, [M], and states and targets of all rows, [M, ...].

    Identity rows get a re-noised point between the worn image and fresh noise; edit rows keep the
    stored state of the student's sampling.
    """
    rows = member_rows(units)
    if not isinstance(samples, WornSamples):
        return (
            torch.zeros_like(rows[:, 0], dtype=torch.bool),
            steps.x_t,
            torch.zeros_like(steps.x_t),
        )
    assert units.seed is not None  # check_units
    seeds = units.seed.T.flatten().tolist()
    given = samples.given[rows[:, 0].to(samples.given.device)].detach().float()
    noise = batched_noise(
        given.shape[1:], [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    ).to(given.device)
    identity = samples.identity.cpu()[rows[:, 0]]
    on_path = interpolate(given, noise, steps.sigma.to(given))
    asked = identity.to(given.device).view(-1, *[1] * (given.ndim - 1))
    x_t = torch.where(asked, on_path.to(steps.x_t), steps.x_t)
    return identity, x_t, velocity_target(given, noise)
