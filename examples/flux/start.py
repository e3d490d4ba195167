"""How a run starts and ends: load its parts, train, report; save where it ends early."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType

from mteditflow import AdaptiveKL, RewardHistory
from mteditflow._command import refusing
from mteditflow.chains import ChainError, GroupSampler, InformativeSampler
from mteditflow.evaluation import JudgedBy
from mteditflow.pipelines import ReplayError
from mteditflow.rewards import InvalidRewardsError
from mteditflow.training import (
    Checkpoints,
    RewardCollapseError,
    RewardWatch,
    RunLog,
    Termination,
)

from .checkpointing import save_if_new
from .config import Config, ConfigError, flat, name_of
from .held_out import HeldOut
from .loading import load_chains, load_held_out, load_policies
from .reporting import summarize
from .rewards import Submit, judged_by, scale_of, scoring
from .run import Run, State, Stopped
from .scorers import ScorerError

BAD_INPUT = (ConfigError, ChainError, ScorerError)
ENDS = (
    InvalidRewardsError,
    ReplayError,
    RewardCollapseError,
    FloatingPointError,
)


def build(
    config: Config,
    accelerator: Accelerator,
    log: RunLog,
    termination: Termination,
    submit: Submit,
) -> Run:
    """Load everything that a run consists of.

    Raises:
        ConfigError: something of the configuration does not fit what was loaded.
    """
    data, training, output = config.data, config.training, config.output
    ranks = int(accelerator.num_processes)
    own = data.groups * data.group_size // ranks
    if own % training.minibatches:
        raise ConfigError(
            f"training.minibatches: expected a divisor of the {own} trajectories of "
            f"each of {ranks} ranks, got {training.minibatches}"
        )
    chains = load_chains(data, data.chains, config.model.resolution, log)
    held_out, judge = None, judged_by(config.rewards)
    if data.held_out is not None:
        held_out_chains = load_held_out(data, chains, config.model.resolution, log)
        held_out = HeldOut(held_out_chains, output.folder / "evaluations", accelerator)
        judge = _same_judge(held_out, judge, output.folder)
    sampler = GroupSampler if data.draw == "epochs" else InformativeSampler
    log.message(f"loading {config.model.path}, {ranks} rank{'s' if ranks > 1 else ''}")
    editor, policies = load_policies(config, accelerator)
    safety = config.safety
    return Run(
        config=config,
        log=log,
        accelerator=accelerator,
        termination=termination,
        submit=submit,
        editor=editor,
        policies=policies,
        optimizer=torch.optim.AdamW(
            policies.parameters(), training.learning_rate, weight_decay=training.weight_decay
        ),
        chains=chains,
        sampler=sampler(
            chains,
            groups=data.groups,
            group_size=data.group_size,
            ranks=ranks,
            rank=accelerator.process_index,
            split_groups=data.split_groups,
            seed=training.seed,
        ),
        held_out=held_out,
        checkpoints=Checkpoints(output.folder / "checkpoints", keep_last=output.keep),
        watch=RewardWatch(drop=safety.collapse_drop, window=safety.collapse_window),
        state=initial_state(config),
        method=name_of(config.objective).upper(),
        judged_by=judge,
    )


def _same_judge(held_out: HeldOut, judge: JudgedBy, folder: Path) -> JudgedBy:
    """Return the judge of the run's evaluations so far, else this one.

    Raises:
        ConfigError: they were judged by another.
    """
    try:
        return held_out.judge(judge)
    except ValueError as error:
        raise ConfigError(
            f"{folder} holds evaluations by another judge; choose another output.folder: {error}"
        ) from error


def initial_state(config: Config) -> State:
    """Return the state before the first round."""
    training, history = config.training, config.rewards.history
    return State(
        floor=config.rewards.multiplier,
        kl=None
        if training.kl_target is None
        else AdaptiveKL(training.kl_target, config.objective.kl_coef),
        history=RewardHistory(history) if history else None,
    )


def main(train: Callable[[Run], None], config: Config) -> None:
    """Run a trainer; exit with 0 after the last round or a signal, 2 for bad input, else with 1."""
    with refusing():
        scale_of(config.rewards)
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
            run = build(config, accelerator, log, termination, submit)
            with saved_on_exit(run):
                train(run)
                summarize(run)
    except Stopped:
        pass  # with 0: the run did what it was asked to
    except BAD_INPUT as error:
        log.message(f"error: {error}")
        sys.exit(2)
    except ENDS as error:
        log.message(f"error: {error}")
        sys.exit(1)
    finally:
        gc.collect()  # before the interpreter ends, so that gloo's threads hold nothing of it
        accelerator.end_training()


@contextmanager
def saved_on_exit(run: Run) -> Iterator[None]:
    """Save the last whole round where the run has to end early.

    Raises:
        Stopped: a signal came; requests for scores in flight are for the caller to cancel.
    """
    try:
        yield
    except Stopped as signal:
        save_if_new(run)
        run.log.message(f"stopped by {signal} after round {run.state.done}; start again to go on")
        raise
    except (InvalidRewardsError, RewardCollapseError, FloatingPointError):
        save_if_new(run)
        raise
