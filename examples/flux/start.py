"""Run lifecycle: load the parts, train, report; save if the run ends early."""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from mteditflow import AdaptiveKL, RewardHistory
from mteditflow._exits import naming_argument, refusing
from mteditflow._locks import sole_writer
from mteditflow.chains import ChainError
from mteditflow.drift import DriftWatch
from mteditflow.pipelines import Editor, ReplayError
from mteditflow.rewards import InvalidRewardsError
from mteditflow.rewards.transport.concurrency import ending_past_calls
from mteditflow.training import (
    Checkpoints,
    RewardCollapseError,
    RewardWatch,
    RunLog,
    Termination,
)

from .checkpointing import save_if_new
from .config import Config, ConfigError
from .config_values import name_of
from .few_steps import load_sampler, refuse_sharded
from .inputs import Inputs, check, read_inputs, refusing_together
from .loading import load_policies
from .optimizer import check_optimizer, make_optimizer
from .reporting import record_stopped, refuse_untrained, summarize
from .run import FlatRewardsError, Run, State, Stopped
from .scorers import ScorerError
from .scoring import Submit, scoring
from .sharding import sharding, without_engine
from .trackers import places, start_trackers

BAD_INPUT = (ConfigError, ChainError, ScorerError)
STOPS = (InvalidRewardsError, RewardCollapseError, FlatRewardsError, FloatingPointError)
ENDS = (*STOPS, ReplayError, OSError)


def build(
    config: Config,
    accelerator: Accelerator,
    inputs: Inputs,
    log: RunLog,
    termination: Termination,
    submit: Submit,
) -> Run:
    """Load the models, and return the assembled run.

    Raises:
        ConfigError: the models cannot be loaded as configured.
    """
    training, output, safety = config.training, config.output, config.safety
    inputs.notes.write(log)
    ranks = int(accelerator.num_processes)
    log.message(f"loading {config.model.path}, {ranks} rank{'s' if ranks > 1 else ''}")
    editor, policies = load_policies(config, accelerator, _ahead(config, inputs))
    sibling = load_sampler(config, editor)
    _log_assumptions(editor, config.model.resolution, log)
    return Run(
        config=config,
        log=log,
        accelerator=accelerator,
        termination=termination,
        submit=submit,
        editor=editor,
        policies=policies,
        optimizer=make_optimizer(policies.parameters(), training),
        chains=inputs.chains,
        sampler=inputs.sampler,
        held_out=inputs.held_out,
        checkpoints=Checkpoints(output.folder / "checkpoints", keep_last=output.keep),
        watch=RewardWatch(drop=safety.collapse_drop, window=safety.collapse_window),
        state=initial_state(config),
        method=name_of(config.objective).upper(),
        judged_by=inputs.judged_by,
        sessions=inputs.sessions,
        sibling=sibling,
        drift=None
        if safety.drift_members == 0
        else DriftWatch(baseline=safety.drift_rounds, width=safety.drift_width),
        found=inputs.found,
        files=inputs.files,
        changes=inputs.changes,
    )


def _ahead(config: Config, inputs: Inputs) -> list[str]:
    """Return the distinct instructions to embed before the transformer moves to the device."""
    if config.model.prompt_folder is None:
        return []
    more = [x.chains.chains for x in (inputs.held_out, inputs.sessions) if x is not None]
    chains = (*inputs.chains.chains, *(chain for part in more for chain in part))
    texts = [text for chain in chains for text in chain.instructions]
    if config.data.identity_share > 0 or config.drifts:
        texts.append(config.data.identity_instruction)
    return list(dict.fromkeys(texts))


def _log_assumptions(editor: Editor, side: int, log: RunLog) -> None:
    """Log how an unlisted pipeline class will be called, and the encoded size of references."""
    for text in editor.assumptions:
        log.message(f"assumed: {text}")
    size = editor.reference_size(side, side)
    if size not in (None, (side, side)):
        width, height = size
        log.message(f"references of {side} x {side} pixels are encoded at {width} x {height}")


def initial_state(config: Config) -> State:
    """Return the state before the first round."""
    training, history = config.training, config.rewards.history
    return State(
        floor=config.rewards.multiplier,
        kl=None
        if training.kl_target is None
        else AdaptiveKL(training.kl_target, config.objective.kl_coef),
        history=RewardHistory(history) if history else None,
        depth=config.curriculum,
        gate=config.gate.adaptive,
        reset=training.reset,
    )


def main(train: Callable[[Run], None], config: Config) -> None:
    """Run a trainer; return after the last round, and after a signal.

    If a scorer still blocks then, the process exits here with the same code.

    Raises:
        SystemExit: code 2 if a check before the first round fails, 1 for later failures.
    """
    with refusing():
        check(config)
    with ending_past_calls():
        _main(train, config)


def _main(train: Callable[[Run], None], config: Config) -> None:
    folder = config.output.folder
    with without_engine():
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            log_with=list(config.output.trackers) or None,
            project_config=places(config.output),
        )
    try:
        with Termination() as termination, ExitStack() as stack:
            with refusing_together(accelerator):
                shards = sharding(config.model, int(accelerator.num_processes))
                refuse_sharded(config.sampling, shards.how)
                check_optimizer(config.training, sharded=shards.how == "fsdp2")
                inputs = read_inputs(config, accelerator)
                with naming_argument("output.folder"):
                    log = _open_log(folder, accelerator, stack)
                cache = folder / f"answers-{accelerator.process_index}.sqlite"
                submit = stack.enter_context(scoring(config.rewards, cache))
            start_trackers(accelerator, config)
            _run(train, partial(build, config, accelerator, inputs, log, termination, submit), log)
    except Stopped:  # outside the stack, whose exit on an exception cancels requests in flight
        pass
    finally:
        gc.collect()  # now, so that gloo's threads hold no Python objects at interpreter shutdown
        accelerator.end_training()


def _run(train: Callable[[Run], None], load: Callable[[], Run], log: RunLog) -> None:
    """Load a run and train; log expected errors as one line and exit.

    Raises:
        Stopped: a signal arrived; the run is saved.
        SystemExit: code 2 if an error came before the first round of this process, else 1.
    """
    run: Run | None = None
    try:
        run = load()
        with saved_on_exit(run):
            train(run)
            summarize(run)
        refuse_untrained(run)
    except (*BAD_INPUT, *ENDS) as error:
        with suppress(OSError):  # the log's disk may be full; the terminal shows the line anyway
            log.message(f"error: {error}{_cure(error, run)}")
        sys.exit(1 if run is not None and run.begun else 2)


def _cure(error: Exception, run: Run | None) -> str:
    """Return what to do about a full disk; "" for other errors."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    cure = "free space and start again"
    if run is None or run.saved < 0:
        return f"; {cure}"
    return f"; the checkpoint of round {run.saved} is intact: {cure}"


def _open_log(folder: Path, accelerator: Accelerator, stack: ExitStack) -> RunLog:
    """Open the log; rank 0 first locks the folder against other runs.

    Raises:
        InUseError: another run writes into the folder.
        OSError: the folder cannot be written.
        ValueError: its ``metrics.jsonl`` is damaged.
    """
    main = bool(accelerator.is_main_process)
    stale = stack.enter_context(sole_writer(folder)) if main else None
    log = RunLog(folder, console=True, main=main)
    stack.enter_context(log.capture())
    if stale is not None:
        log.warning(f"{folder}: going on after {stale}, which was killed")
    return log


@contextmanager
def saved_on_exit(run: Run) -> Iterator[None]:
    """Save the last complete round if the run ends early inside the block.

    Raises:
        Stopped: a signal arrived; the caller cancels scoring requests in flight.
    """
    try:
        yield
    except Stopped as signal:
        save_if_new(run)
        run.log.message(f"stopped by {signal} after round {run.state.done}; start again to resume")
        raise
    except STOPS:
        record_stopped(run)
        save_if_new(run)
        raise
    except ScorerError as error:
        if error.everywhere:  # saving is collective
            save_if_new(run)
        raise
