"""A run in this process, and its first round up to the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from mteditflow_examples.flux.advantages import round_rewards, turn_advantages, turn_signals
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import Config
from mteditflow_examples.flux.inputs import read_inputs
from mteditflow_examples.flux.run import Run
from mteditflow_examples.flux.sampling import next_chains, sample
from mteditflow_examples.flux.scoring import scoring
from mteditflow_examples.flux.start import build
from torch import Tensor

from mteditflow.objectives import Output, Units
from mteditflow.pipelines import Rollout, RolloutVelocity
from mteditflow.rewards import TurnScores
from mteditflow.training import RunLog, Termination
from tests.flux.worlds import options


@contextmanager
def started(
    world: Path,
    output: Path,
    *more: object,
    objective: str = "nft",
    family: str = "kontext",
    kind: type[Config] = Config,
) -> Iterator[Run]:
    """A run before its first round, in this process."""
    more = ("--data.held-out", "None", *more)
    config = parse(options(world, output, *more, objective=objective, family=family), kind)
    accelerator = Accelerator(cpu=True)
    inputs = read_inputs(config, accelerator)
    log = RunLog(output, console=False, main=True)
    with Termination() as termination, scoring(config.rewards, output / "cache.sqlite") as submit:
        yield build(config, accelerator, inputs, log, termination, submit)


def turn_values(run: Run, scores: Mapping[str, TurnScores], group: Tensor) -> tuple[Tensor, Tensor]:
    """Advantage of each turn, and whether it is trained on, as the loop computes them."""
    config = run.config.rewards
    rewards = round_rewards(config, scores, group)
    signals, weights = turn_signals(config, rewards, run.state.multipliers)
    return turn_advantages(config, rewards, signals, weights, run.state.history)[:2]


@dataclass(frozen=True)
class Round:
    """A round before its update."""

    run: Run
    rollout: Rollout
    scores: dict[str, TurnScores]
    advantage: Tensor
    valid: Tensor

    @property
    def velocity(self) -> RolloutVelocity:
        """Velocities of the policies on the rollout."""
        return RolloutVelocity(self.run.policies, self.rollout)

    def units(self, minibatches: int = 1, *, epoch: int = 0) -> list[Units]:
        """Units that the objective draws."""
        return self.run.objective.units(
            self.rollout,
            self.advantage,
            self.valid,
            key=self.run.key.of_epoch(epoch),
            minibatches=minibatches,
        )

    def losses(self, part: Units) -> Output:
        """The objective's output, as ``update`` computes it."""
        equal = self.run.policies.old_equals_current
        return self.run.objective(self.velocity, self.rollout, part, old_is_current=equal)

    def given(self, *, advantage: Tensor | None = None, valid: Tensor | None = None) -> Round:
        """The same round with other advantages, or other turns that take part."""
        return replace(
            self,
            advantage=self.advantage if advantage is None else advantage,
            valid=self.valid if valid is None else valid,
        )


def first_round(run: Run, *, advance: float = 0.0) -> Round:
    """The first round, with weights that have moved since it was sampled."""
    run.first_round = 0
    rollout, _, scores = sample(run, next_chains(run))
    advantage, valid = turn_values(run, scores, rollout.trajectory.group)
    assert advantage.abs().sum() > 0
    with torch.no_grad():
        for weight in run.policies.parameters():
            weight.add_(advance * torch.ones_like(weight))
    return Round(run, rollout, scores, advantage, valid)


class ForwardRows:
    """Counts rows that go through a model, with a graph and without."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.trained = self.others = 0
        model.register_forward_hook(self._count)

    def _count(self, _: object, args: object, output: tuple[Tensor, ...]) -> None:
        if output[0].requires_grad:
            self.trained += len(output[0])
        else:
            self.others += len(output[0])
