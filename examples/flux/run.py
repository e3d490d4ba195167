"""One rank of a run: its parts, and its state between rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator

from mteditflow import (
    AdaptiveKL,
    GatedShare,
    LagrangeMultiplier,
    ReferenceReset,
    RewardHistory,
    ema_decay,
)
from mteditflow.chains import ChainDataset, GroupSampler
from mteditflow.drift import DriftWatch
from mteditflow.evaluation import JudgedBy
from mteditflow.objectives import Objective, RoundKey
from mteditflow.pipelines import Editor, LoraPolicies
from mteditflow.training import (
    Checkpoint,
    Checkpoints,
    DepthCurriculum,
    RewardWatch,
    RunLog,
    SessionCounts,
    Termination,
    Update,
)

from .config import Config
from .few_steps import Sibling
from .held_out import HeldOut
from .scoring import Submit

EMPTY = "training/empty_updates"  # updates without a row to compute
FLAT = "training/flat_updates"  # updates whose gradient is exactly 0
UNTAKEN = (EMPTY, FLAT)  # numbers of updates of a round that made no optimizer step
GATED = "gated"  # metric of an update: share of its units whose trajectory is gated


class Stopped(Exception):  # noqa: N818, since it is no error
    """The run received a signal to stop; its weights are those of the last complete round."""


class FlatRewardsError(RuntimeError):
    """Too many rounds in a row whose rewards trained nothing."""


@dataclass
class State:
    """State of a run between two rounds, besides weights, optimizer, sampler and watch.

    Attributes:
        done: completed rounds.
        updates: optimizer steps taken, each of which changed the weights.
        skipped: optimizer steps skipped in a row because of non-finite losses.
        flat: rounds in a row without a trajectory of higher or lower reward than its group.
        floor: Lagrange multiplier of consistency; None without ``rewards.floor``.
        kl: adapted coefficient of the KL to the reference; None without ``training.kl_target``.
        history: rewards of earlier rounds of each chain; None without ``rewards.history``.
        depth: curriculum of turns by pixel change; None without ``growth.change``.
        turns: turns of the last round that began; 0 before the first.
        teacher: session outcomes of the teacher, up to each compared turn; None until computed.
        gate: share of the trajectories that keep their KL to the reference, if the KL is gated.
        reset: condition of the next reset of the reference, if there are any.
        resets: number of resets of the reference so far.
    """

    done: int = 0
    updates: int = 0
    skipped: int = 0
    flat: int = 0
    floor: LagrangeMultiplier | None = None
    kl: AdaptiveKL | None = None
    history: RewardHistory | None = None
    depth: DepthCurriculum | None = None
    turns: int = 0
    teacher: list[SessionCounts] | None = None
    gate: GatedShare | None = None
    reset: ReferenceReset | None = None
    resets: int = 0

    @property
    def multipliers(self) -> dict[str, float]:
        """Lagrange multipliers of this round by reward."""
        return {} if self.floor is None else {"consistency": self.floor.value}


@dataclass(eq=False)
class Run:
    """One rank of a run: editor and policies, data, optimizer, and outputs.

    Attributes:
        submit: function of chains and images that returns the future of their scores.
        sibling: distilled editor that samples; None: the editor samples itself.
        method: name of the objective, for titles.
        judged_by: provenance of the scores.
        sessions: chains on which student and teacher are compared; None: no comparison.
        found: checkpoint to resume from; None: the run starts at round 0.
        files: hashes of the files that the run depends on, from ``resuming.fingerprints``.
        numbers: metrics of the round in progress.
        means: mean metrics of each update of the round.
        batches: rest of the sampler's current epoch, as lists of indices.
        absent: rewards whose absence from a round has been logged.
        flat_rewards: why the rewards of the last such round trained nothing; "": none did not.
        outage_explained: whether the log says what follows while a server is out.
        drift: drift detector; None without ``safety.drift_members``.
        alarms: drift alarms so far, each with "round", "statistic", "value", "low", "high" and
            "picture".
        changes: options changed by resumed processes, each with "after_round", "option", "was" and
            "is".
        first_round: completed rounds at the start of this process; -1 before ``restore``.
        saved: round of the checkpoint that a restart would resume from; -1: none known.
        between: whether weights are exactly those after ``state.done`` rounds; False from the first
            update of a round to its end.
    """

    config: Config
    log: RunLog
    accelerator: Accelerator
    termination: Termination
    submit: Submit
    editor: Editor
    policies: LoraPolicies
    optimizer: torch.optim.Optimizer
    chains: ChainDataset
    sampler: GroupSampler
    held_out: HeldOut | None
    checkpoints: Checkpoints
    watch: RewardWatch
    state: State
    method: str
    judged_by: JudgedBy
    sessions: HeldOut | None = None
    sibling: Sibling | None = None
    found: Checkpoint | None = None
    files: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    means: list[dict[str, float]] = field(default_factory=list)
    batches: Iterator[list[int]] = field(default_factory=lambda: iter(()))
    absent: set[str] = field(default_factory=set)
    flat_rewards: str = ""
    outage_explained: bool = False
    drift: DriftWatch | None = None
    alarms: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    first_round: int = -1
    saved: int = -1
    between: bool = True

    @property
    def begun(self) -> bool:
        """Whether the run has been restored, or started without a checkpoint."""
        return self.first_round >= 0

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.accelerator.device

    @property
    def main(self) -> bool:
        """Whether this rank writes files."""
        return bool(self.accelerator.is_main_process)

    @property
    def own(self) -> int:
        """Number of trajectories of this rank in a round."""
        data = self.config.data
        return data.groups * data.group_size // int(self.accelerator.num_processes)

    @property
    def key(self) -> RoundKey:
        """Key of this rank's random numbers in the current round.

        It counts trajectories over all ranks, so the numbers do not depend on how they are split.
        """
        first = int(self.accelerator.process_index) * self.own
        return RoundKey(self.config.training.seed, self.state.done, first)

    @property
    def objective(self) -> Objective:
        """Objective of this round, with the adapted KL coefficient."""
        objective = self.config.objective
        return (
            objective if self.state.kl is None else replace(objective, kl_coef=self.state.kl.value)
        )

    @property
    def turns(self) -> int:
        """Turns of this round's chains; under mt_opsd, identity turns before the trained one."""
        if self.state.depth is not None:
            return self.state.depth.depth
        return self.config.growth.turns(self.state.done, self.config.most_turns)

    def stop_if_requested(self) -> None:
        """Raise if any rank has received a signal; a collective call.

        Raises:
            Stopped: a rank has.
        """
        if self.termination.agreed():
            raise Stopped(self.termination.signal or "a signal to another rank")

    def begin_round(self) -> None:
        """Set the learning rate and turns of the round, and clear the metrics."""
        training = self.config.training
        rate = training.rate(self.state.done)
        # Weight decay as well: a restored optimizer has that of its checkpoint.
        for group in self.optimizer.param_groups:
            group.update(lr=rate, weight_decay=training.weight_decay)
        self.means, self.numbers = [], {"training/learning_rate": rate, **dict.fromkeys(UNTAKEN, 0)}
        if self.config.growth.first is not None:
            self._begin_turns()

    def _begin_turns(self) -> None:
        """Log the turns of the round, and restart the collapse watch if they have changed."""
        before, self.state.turns = self.state.turns, self.turns
        self.numbers["chains/turns"] = self.turns
        if before not in (0, self.turns):
            self.watch.restart()  # longer chains earn less, which must not count as a collapse
            self.log.message(f"round {self.state.done + 1}: {self.turns} turns, {before} before")

    def count(self, update: Update) -> None:
        """Count one update, and update the averaged policy if due.

        Raises:
            FloatingPointError: ``safety.max_skipped`` updates in a row were skipped.
        """
        training, state = self.config.training, self.state
        if update.outcome == "empty":
            self.numbers[EMPTY] += 1
            return
        self.means.append({**update.means, "grad_norm": update.grad_norm})
        if update.outcome == "flat":
            self.numbers[FLAT] += 1
            return
        if update.outcome == "skipped":
            state.skipped += 1
            self.log.warning(f"round {state.done + 1}: an update was skipped, {update.reason}")
            if state.skipped >= self.config.safety.max_skipped:
                raise FloatingPointError(
                    f"{state.skipped} skipped updates in a row: {update.reason}"
                )
            return
        state.skipped, self.between = 0, False  # only consecutive skips count
        state.updates += 1
        if training.ema_decay > 0 and state.updates % training.ema_every == 0:
            decay = ema_decay(state.updates, maximum=training.ema_decay)
            self.policies.update_ema(decay=decay)
        if state.reset is not None:
            self._reset_if_due(state.reset, update.means)

    def _reset_if_due(self, reset: ReferenceReset, means: Mapping[str, float]) -> None:
        """Let the reference be the current policy where its time has come.

        The KL is the mean over the rows that keep theirs; a step without any counts as one of 0.
        """
        gated = means.get(GATED, 1.0)
        reset = reset.update(means["kl"] / gated if gated > 0 else 0.0)
        if reset.due:
            self.policies.reset_reference()
            self.state.resets += 1
            self.log.message(
                f"round {self.state.done + 1}: the reference is reset, after {reset.steps} steps "
                f"at a KL of {reset.kl:.3g}"
            )
            reset = reset.restarted()
        self.state.reset = reset
