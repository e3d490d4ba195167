"""What keeps a run of days alive: its rounds, checkpoints, evaluations and log, and how it ends."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from matplotlib.figure import Figure
from PIL.Image import Image
from pydantic import TypeAdapter
from torch import Tensor

from mteditflow import RatioCheck, gather_ranks
from mteditflow.chains import Chain, ChainError, GroupSampler, TeachingSampler, collate_chains
from mteditflow.pipelines import ReplayError
from mteditflow.rewards import InvalidRewardsError, Reward, TurnScores
from mteditflow.training import (
    Bar,
    Checkpoint,
    Checkpoints,
    RewardCollapseError,
    RewardWatch,
    RunLog,
    Termination,
    Update,
    load_optimizer_state,
    optimizer_state,
    round_numbers,
)
from mteditflow.training.pictures import (
    Strip,
    draw_before_after,
    draw_curves,
    draw_histograms,
    draw_strips,
    log_pictures,
    write_picture,
)
from mteditflow.training.report import print_summary, run_report, write_report

from .config import Config, ConfigError, parse
from .held_out import HeldOut
from .parts import load_chains, load_policies
from .rewards import Submit, scoring, spreads_of, teaching_groups

POLL = 1.0  # s between looks for a signal while scores are waited for
ENDS = (
    ConfigError,
    ChainError,
    InvalidRewardsError,
    ReplayError,
    RewardCollapseError,
    FloatingPointError,
)


class Stopped(Exception):  # noqa: N818, since it is no error
    """A signal asked the run to end; its weights are those of the last whole round."""


class Run:
    """One rank of a run: the editor and its policies, data, optimiser, and the record of it all."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        log: RunLog,
        termination: Termination,
        submit: Submit,
    ) -> None:
        self.config, self.log, self.submit = config, log, submit
        self.method = config.objective.upper()  # in the title of the run's curves
        self.device = accelerator.device
        self._accelerator, self._termination = accelerator, termination
        data, training, output = config.data, config.training, config.output
        ranks = accelerator.num_processes
        self._own = data.groups * data.group_size // ranks
        if self._own % training.minibatches:
            raise ConfigError(
                f"training.minibatches: expected a divisor of the {self._own} trajectories of "
                f"each of {ranks} ranks, got {training.minibatches}"
            )
        self._chains = load_chains(data, data.chains, config.model.resolution, log)
        sampler = GroupSampler if data.draw == "epochs" else TeachingSampler
        self._sampler = sampler(
            self._chains,
            groups=data.groups,
            group_size=data.group_size,
            ranks=ranks,
            rank=accelerator.process_index,
            split_groups=data.split_groups,
            seed=training.seed,
        )
        self._floor = config.rewards.multiplier
        log.message(f"loading {config.model.path}, {ranks} rank{'s' if ranks > 1 else ''}")
        self.editor, self.policies = load_policies(config, accelerator)
        self.optimizer = torch.optim.AdamW(
            self.policies.parameters(), training.learning_rate, weight_decay=training.weight_decay
        )
        self._held_out = None
        if data.held_out is not None:
            held_out = load_chains(data, data.held_out, config.model.resolution, log)
            self._held_out = HeldOut(held_out, output.folder / "evaluations", accelerator)
        self._checkpoints = Checkpoints(output.folder / "checkpoints", keep_last=output.keep)
        self._watch = RewardWatch(
            drop=config.safety.collapse_drop, window=config.safety.collapse_window
        )
        self._batches: Iterator[list[int]] = iter(())
        self.done = self._updates = self._skipped = 0
        self._means: list[Mapping[str, float]] = []
        self._rewards: dict[str, float] = {}  # mean of each in this round
        self._spreads: dict[int, float] = {}  # of its chains
        self._numbers: dict[str, float] = {}
        self.first_round = -1  # of this process
        self._saved = -1  # round of the checkpoint that a start would go on from
        self._between = True  # two rounds, so that the weights are those of self.done

    def rounds(self) -> Iterator[int]:
        """Number the rounds that are left; around each do all that is due."""
        training = self.config.training
        self._restore()
        self.first_round = self.done
        if self._evaluate_if_due() and self.done:
            self.save(scored=True)
        with self.log.bar("round", training.rounds, unit="rounds", done=self.done) as bar:
            while self.done < training.rounds:
                progress = self.done / max(training.rounds - 1, 1)
                rate = training.learning_rate * (1 - (1 - training.final_rate) * progress)
                for group in self.optimizer.param_groups:
                    group.update(lr=rate, weight_decay=training.weight_decay)
                self._means, self._numbers = [], {"training/learning_rate": rate}
                yield self.done
                self.done, self._between = self.done + 1, True
                self._learn()
                try:
                    evaluated, last = self._evaluate_if_due(), self.done == training.rounds
                finally:  # the round is done, whether it can be evaluated or not
                    self._record(bar)
                if evaluated or last or self.done % self.config.output.checkpoint_every == 0:
                    self.save(scored=evaluated)
                bar.advance()
                self.stop_if_asked()

    def _learn(self) -> None:
        """Take from a round that is done what the next one depends on."""
        if isinstance(self._sampler, TeachingSampler):
            self._sampler.step(self._spreads)
        else:
            self._sampler.step()
        consistency = self._rewards.get("consistency", math.nan)
        if self._floor is not None and math.isfinite(consistency):
            self._floor = self._floor.update(consistency)

    @property
    def multipliers(self) -> dict[str, float]:
        """Of the reward that has a floor, in this round."""
        return {} if self._floor is None else {"consistency": self._floor.value}

    def next_chains(self) -> tuple[list[Chain], list[Image], Tensor, int]:
        """Chain, reference and group id of each of this rank's trajectories of a round.

        The last value is the place of the first of them among the trajectories of all ranks.
        """
        indices = next(self._batches, None)
        if indices is None:
            self._batches = iter(self._sampler)
            indices = next(self._batches)
        batch = collate_chains(self._chains.__getitems__(indices))
        return list(batch.chains), batch.images, batch.group, self._first

    @property
    def _first(self) -> int:
        return self._accelerator.process_index * self._own

    def collect(self, waiting: Sequence[Future[Mapping[str, TurnScores]]]) -> dict[str, TurnScores]:
        """Wait for the scores of every part, of all ranks, and join them; a collective call.

        Raises:
            Stopped: a signal came meanwhile.
        """
        with (
            self.log.stopwatch.phase("scoring"),
            self.log.bar("rewards", len(waiting), unit="parts") as bar,
        ):
            unfinished = True
            while unfinished:
                done, left = wait(waiting, timeout=POLL)
                bar.advance(len(done) - bar.done)
                (lefts,), _ = gather_ranks(torch.tensor([len(left)], device=self.device))
                unfinished = bool(lefts.any())
                self.stop_if_asked()
        scored = [future.result() for future in waiting]
        return {name: TurnScores.concatenate([s[name] for s in scored]) for name in scored[0]}

    def show(
        self,
        chains: Sequence[Chain],
        images: Sequence[Sequence[Image]],
        terms: Mapping[str, TurnScores],
    ) -> None:
        """Draw a few members of the round's first groups, now and then."""
        if not self._pictured:
            return
        ids = list(dict.fromkeys(chain.id for chain in chains))[:2]
        members = ([b for b, chain in enumerate(chains) if chain.id == name][:3] for name in ids)
        strips = [
            Strip(chains[b].id, chains[b].instructions, images[b], terms, b, label=f"member {i}")
            for rows in members
            for i, b in enumerate(rows, start=1)
        ]
        success, title = self.config.rewards.success, f"Round {self.done + 1}: two chains of it"
        self._draw("chains", draw_strips(strips, success_at=success, title=title))

    @property
    def _pictured(self) -> bool:
        """Whether this rank draws pictures of this round."""
        every = self.config.output.strips_every
        due = every > 0 and self.done % every == 0
        return due and self._accelerator.is_main_process

    def _draw(self, name: str, figure: Figure) -> None:
        """Write a picture, and give it to the trackers."""
        folder = self.config.output.folder / "pictures"
        with self.log.stopwatch.phase("drawing"):
            write_picture(figure, folder / f"round-{self.done + 1:06d}-{name}.png")
            log_pictures(self._accelerator.trackers, {name: figure}, step=self.done + 1)

    def scored(
        self,
        terms: Mapping[str, TurnScores],
        rewards: Mapping[str, Reward],
        group: Tensor,
    ) -> None:
        """Take in the scores of a round, of all ranks; stop a run that should not go on.

        Raises:
            InvalidRewardsError: too many rewards were lost.
            RewardCollapseError: a reward has fallen too far.
        """
        self._numbers |= round_numbers(terms, rewards, group)
        selection = teaching_groups(self.config.rewards, terms, group)
        self._numbers |= {f"groups/{reason}": count for reason, count in selection.counts.items()}
        self._numbers |= {f"multiplier/{name}": x for name, x in self.multipliers.items()}
        self._spreads = spreads_of(self.config.rewards, terms, group)
        self._rewards = {name: float(x.value[x.valid].mean()) for name, x in rewards.items()}
        if self._pictured:
            title = f"Rewards of round {self.done + 1}"
            self._draw("rewards", draw_histograms(rewards, group, title=title))
        for name in rewards:
            terms[name].require(max_invalid_share=self.config.rewards.max_invalid)
        before = self._watch.state_dict()
        try:
            self._watch.check(self._rewards)
        except RewardCollapseError:
            self._watch.load_state_dict(before)  # this round will be done again
            raise

    def ratio_checked(self, check: RatioCheck) -> None:
        """Take in the verdict on the first rollout's ratios, of every rank.

        Raises:
            ReplayError: they deviate on some rank, and ``safety.ratio`` is not "warn".
        """
        (fine,), _ = gather_ranks(torch.tensor([check.ok], device=self.device))
        if bool(fine.all()):
            self.log.message(f"ratio check passed: {check.verdict}")
        elif self.config.safety.ratio == "warn":
            self.log.warning(f"ratio check failed: {check.verdict}")
        else:
            raise ReplayError(f"ratio check failed: {check.verdict}; safety.ratio = warn goes on")

    def updated(self, update: Update) -> None:
        """Take in one optimiser step.

        Raises:
            FloatingPointError: too many updates in a row were skipped.
        """
        training = self.config.training
        self._means.append({**update.means, "grad_norm": update.grad_norm})
        if not update.taken:
            self._skipped += 1
            self.log.warning(f"round {self.done + 1}: an update was skipped, {update.reason}")
            if self._skipped >= self.config.safety.max_skipped:
                raise FloatingPointError(f"{self._skipped} updates in a row: {update.reason}")
            return
        self._skipped, self._between = 0, False
        self._updates += 1
        if training.ema_decay > 0 and self._updates % training.ema_every == 0:
            self.policies.update_ema(decay=training.ema_decay)

    def stop_if_asked(self) -> None:
        """End the run here if any rank got a signal; a collective call.

        Raises:
            Stopped: one did.
        """
        if self._termination.agreed():
            raise Stopped(self._termination.signal or "a signal to another rank")

    def save(self, *, scored: bool = False) -> None:
        """Write a checkpoint of the run as it is between two rounds; a collective call.

        Args:
            scored: whether its policy is the one that was evaluated last.
        """
        policy = self.config.evaluation.policy
        with self.log.stopwatch.phase("saving"):
            tensors = {name: self.policies.state_dict(name) for name in self._trained}
            tensors["optimizer"], values = optimizer_state(self.optimizer)
            state = {
                "sampler": self._sampler.state_dict(),
                "watch": self._watch.state_dict(),
                "multipliers": self.multipliers,
                "updates": self._updates,
                "skipped": self._skipped,
                "optimizer": values,
                "config": TypeAdapter(Config).dump_python(self.config, mode="json"),
            }
            if self._accelerator.is_main_process:
                evaluations = self._held_out.all() if scored and self._held_out else []
                score = evaluations[-1].score if evaluations else math.nan
                self._checkpoints.save(
                    self.done,
                    tensors,
                    state,
                    score=score if math.isfinite(score) else None,
                    extra=lambda folder: self.policies.save(
                        self.editor.pipeline, folder / "lora", policy=policy, state=tensors[policy]
                    ),
                )
            self._accelerator.wait_for_everyone()
        self._saved = self.done

    def save_if_new(self) -> None:
        """Save what the last checkpoint does not hold, unless a round is only half done."""
        if self._between and self._saved != self.done:
            self.save()

    @property
    def _trained(self) -> tuple[str, ...]:
        """The policies that have weights of their own."""
        return ("current", "old", "ema")[: 3 if self.config.training.ema_decay > 0 else 2]

    def _restore(self) -> None:
        """Go on from a checkpoint, if there is one to go on from."""
        which = self.config.output.resume
        found = self._checkpoints.find("auto" if which == "never" else which)
        if which == "never" and found is not None:
            raise ConfigError(
                f"output.resume: never, but {self.config.output.folder} holds a run; choose "
                "another folder, or go on with auto"
            )
        (rounds,), _ = gather_ranks(torch.tensor([found.round if found else 0], device=self.device))
        if len(rounds.unique()) > 1:
            raise ConfigError(
                "output.folder: expected one that all ranks share, got one in which they find "
                f"checkpoints of rounds {rounds.tolist()}"
            )
        if found is not None:
            self._load(found)
        self.log.rewind(self.done + 1)
        if self._held_out is not None and self._accelerator.is_main_process:
            self._held_out.rewind(self.done if found else -1)
        self._accelerator.wait_for_everyone()

    def _load(self, found: Checkpoint) -> None:
        """Take everything from a checkpoint.

        Raises:
            ConfigError: it is of another objective, or of other chains.
        """
        for name in self._trained:
            self.policies.load_state_dict(found.tensors(name), name)
        load_optimizer_state(self.optimizer, found.tensors("optimizer"), found.state["optimizer"])
        try:
            self._sampler.load_state_dict(found.state["sampler"])
        except ValueError as error:  # other chains, groups or seed
            raise ConfigError(f"output.resume: cannot go on from {found.path}: {error}") from error
        self._watch.load_state_dict(found.state["watch"])
        if self._floor is not None:
            value = found.state.get("multipliers", {}).get("consistency", 0.0)
            self._floor = replace(self._floor, value=min(value, self._floor.maximum))
        self.done, self._updates = found.round, found.state["updates"]
        self._skipped = found.state["skipped"]
        if self.config.output.resume == "auto":
            self._saved = self.done
        self.log.message(f"going on after round {self.done}, from {found.path}")
        self._tell_changes(found.state["config"])

    def _tell_changes(self, before: Mapping[str, Any]) -> None:
        """Say which fields are not those that the checkpoint was made with.

        Raises:
            ConfigError: the objective is another one, whose old policy and optimiser are none.
        """
        now = TypeAdapter(Config).dump_python(self.config, mode="json")
        if now["objective"] != before["objective"]:
            raise ConfigError(
                f"objective: expected {before['objective']!r}, with which the run in "
                f"{self.config.output.folder} began, got {now['objective']!r}"
            )
        for section, fields in now.items():
            for name, value in fields.items() if isinstance(fields, dict) else ():
                was = before.get(section, {}).get(name)
                if was != value:
                    self.log.warning(f"{section}.{name} was {was!r} and is {value!r} from here on")

    def _evaluate_if_due(self) -> bool:
        """Evaluate before the first round, after the last, and now and then; whether it was due."""
        if self._held_out is None or self._held_out.complete(self.done):
            return False
        if self.done not in (0, self.config.training.rounds) and (
            self.done % self.config.evaluation.every
        ):
            return False
        with self.log.stopwatch.phase("evaluating"):
            self._held_out.evaluate(self)
        return True

    def _record(self, bar: Bar) -> None:
        """Write down the numbers of the round that has ended."""
        names = dict.fromkeys(name for means in self._means for name in means)
        for name in names:
            values = [means[name] for means in self._means if name in means]
            self._numbers[f"training/{name}"] = sum(values) / len(values)
        self._numbers["training/skipped_updates"] = self._skipped
        numbers = self.log.record(self.done, self._numbers)
        self._accelerator.log(numbers, step=self.done)
        rewards = [name for name in self.config.rewards.weights if f"reward/{name}" in numbers]
        bar.note(", ".join(f"{name} {numbers[f'reward/{name}']:.2f}" for name in rewards))

    def summarise(self) -> None:
        """Write the report of the whole run with its pictures, and print it."""
        if not self._accelerator.is_main_process:
            return
        folder, metrics = self.config.output.folder, self.log.metrics
        evaluations = self._held_out.all() if self._held_out else []
        model = "/".join(Path(self.config.model.path).parts[-2:])
        title = f"{model}, {self.method}"
        write_picture(draw_curves(metrics, evaluations, title=title), folder / "curves.png")
        if self._held_out is None:
            self.log.message(f"{self.done} rounds done; no held-out chains, so no report")
            return
        before, after = evaluations[0], evaluations[-1]
        images = (self._held_out.images(e.round) for e in (before, after))
        repaired = draw_before_after(before, after, *images)
        if repaired is not None:
            write_picture(repaired, folder / "chains.png")
        report = run_report(
            before, after, metrics, config=flat(self.config), seed=self.config.training.seed
        )
        write_report(folder, report)
        print_summary(report, folder)


def main(train: Callable[[Run], None]) -> None:
    """Run a trainer from the command line; exit with 0 after the last round or a signal, else 1."""
    try:
        config = parse(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
    folder = config.output.folder
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=list(config.output.trackers) or None,
        project_dir=str(folder),
    )
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        sys.exit(
            "error: DeepSpeed's engine would keep its own copies of the adapters; shard by "
            "--model.shard (FSDP2, the same as ZeRO-3) under any other launcher"
        )
    log = RunLog(folder, console=True, main=accelerator.is_main_process)
    accelerator.init_trackers("trackers", config=flat(config))
    cache = folder / f"answers-{accelerator.process_index}.sqlite"
    try:
        with Termination() as termination, scoring(config.rewards, cache) as submit:
            _guarded(train, Run(config, accelerator, log, termination, submit))
    except Stopped:
        pass  # with 0: what was asked for is done
    except ENDS as error:
        log.message(f"error: {error}")
        sys.exit(1)
    finally:
        gc.collect()  # before the interpreter ends, so that gloo's threads hold nothing of it
        accelerator.end_training()


def _guarded(train: Callable[[Run], None], run: Run) -> None:
    """Train; where the run has to end early, lose no round that is done.

    Raises:
        Stopped: a signal came; requests for scores in flight are for the caller to cancel.
    """
    try:
        train(run)
    except Stopped as signal:
        run.save_if_new()
        run.log.message(f"stopped by {signal} after round {run.done}; start again to go on")
        raise
    except (InvalidRewardsError, RewardCollapseError, FloatingPointError):
        run.save_if_new()
        raise
    else:
        run.summarise()


def flat(config: Config) -> dict[str, Any]:
    """Fields by dotted name, as trackers take them."""
    values = TypeAdapter(Config).dump_python(config, mode="json")
    sections = {k: v if isinstance(v, dict) else {"": v} for k, v in values.items()}
    return {
        f"{section}.{name}".rstrip("."): value
        if isinstance(value, (int, float, str))
        else str(value)
        for section, fields in sections.items()
        for name, value in fields.items()
    }
