"""Checkpoints of a run: content, schedule, and resuming."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from mteditflow import RewardHistory, gather_ranks
from mteditflow.training import (
    Checkpoint,
    Checkpoints,
    RunLog,
    SessionCounts,
    load_optimizer_state,
    optimizer_state,
)

from .config import ConfigError
from .config_values import dumped
from .gating import resumed
from .held_out import HeldOut
from .run import Run


def restore(run: Run) -> None:
    """Restore the checkpoint in ``run.found``, if any; a collective call.

    Raises:
        ConfigError: ranks found different checkpoints.
    """
    found = run.found
    (rounds,), _ = gather_ranks(torch.tensor([found.round if found else 0], device=run.device))
    if len(rounds.unique()) > 1:
        raise ConfigError(
            "output.folder: expected one that all ranks share, got one in which they find "
            f"checkpoints of rounds {rounds.tolist()}"
        )
    if found is not None:
        _load(run, found)
    run.first_round = run.state.done
    if run.main:
        cut_back(found, run.checkpoints, run.log, run.held_out)
    planned = run.config.training.rounds
    if run.state.done >= planned:
        which = "the only round is" if planned == 1 else f"all {planned} rounds are"
        run.log.message(f"{which} done; to train on, raise training.rounds")
    run.accelerator.wait_for_everyone()


def cut_back(
    found: Checkpoint | None, checkpoints: Checkpoints, log: RunLog, held_out: HeldOut | None
) -> None:
    """Remove everything of rounds after a checkpoint from a run's folder; None: of all rounds.

    Later checkpoints are set aside before metrics and evaluations are cut. A kill in between then
    leaves one history: the last checkpoint, and metrics that include all rounds before it.
    """
    if found is not None and checkpoints.holds(found):
        aside = [str(path) for path in checkpoints.set_aside_after(found)]
        if aside:
            log.warning(
                f"going back to round {found.round}: set aside, not deleted, {', '.join(aside)}; "
                f"metrics and evaluations since are dropped{_left_report(log.folder)}"
            )
    log.rewind(found.round + 1 if found else 1)
    if held_out is not None:
        held_out.rewind(found.round if found else -1)


def _left_report(folder: Path) -> str:
    there = (folder / "report.json").exists()
    return ", and report.json is of them until this run ends" if there else ""


def save_if_due(run: Run, *, evaluated: bool) -> None:
    """Save after the last round, every ``output.checkpoint_every`` rounds, and when evaluated."""
    done, config = run.state.done, run.config
    last = done == config.training.rounds
    if evaluated or last or done % config.output.checkpoint_every == 0:
        save(run, evaluated=evaluated)


def save_if_new(run: Run) -> None:
    """Save unless the last checkpoint is current, or an update of the round has begun."""
    if run.between and run.saved != run.state.done:
        save(run)


def save(run: Run, *, evaluated: bool = False) -> None:
    """Write a checkpoint of the run between two rounds; a collective call.

    Args:
        run: the run.
        evaluated: whether the last evaluation is of this policy, so that its score ranks the
            checkpoint.
    """
    state, policy = run.state, run.config.evaluation.policy
    with run.log.stopwatch.phase("saving"):
        # On all ranks: under FSDP2, gathering sharded tensors is collective.
        tensors = {name: run.policies.state_dict(name) for name in _trained(run)}
        tensors["optimizer"], values = optimizer_state(run.optimizer)
        kept = {
            "sampler": run.sampler.state_dict(),
            "watch": run.watch.state_dict(),
            "drift": None if run.drift is None else run.drift.state_dict(),
            "alarms": run.alarms,
            "multipliers": state.multipliers,
            "kl_coef": None if state.kl is None else state.kl.value,
            "gate": None if state.gate is None else [state.gate.value, state.gate.means],
            "reset": None if state.reset is None else [state.reset.kl, state.reset.steps],
            "resets": state.resets,
            "history": None if state.history is None else state.history.state_dict(),
            "depth": None if state.depth is None else [state.depth.depth, state.depth.streak],
            "turns": state.turns,
            "teacher": state.teacher,
            "updates": state.updates,
            "skipped": state.skipped,
            "flat": state.flat,
            "optimizer": values,
            "config": dumped(run.config),
            "changes": run.changes,
            "files": run.files,
            "evaluated": _evaluated_before(run),
        }
        if run.main:
            evaluations = run.held_out.all() if evaluated and run.held_out else []
            score = evaluations[-1].score if evaluations else math.nan
            run.checkpoints.save(
                state.done,
                tensors,
                kept,
                score=score if math.isfinite(score) else None,
                extra=lambda folder: run.policies.save(
                    run.editor.pipeline, folder / "lora", policy=policy, state=tensors[policy]
                ),
            )
        run.accelerator.wait_for_everyone()
    run.saved = state.done


def _evaluated_before(run: Run) -> list[int]:
    """Return the evaluated rounds before this one, whose own evaluation may come after saving."""
    rounds = run.held_out.rounds() if run.held_out is not None else []
    return [done for done in rounds if done < run.state.done]


def _trained(run: Run) -> tuple[str, ...]:
    """Return the policies that have weights of their own."""
    names = ("current", "old", "ema")[: 3 if run.config.training.ema_decay > 0 else 2]
    return (*names, *["reference"] * run.policies.reference_was_reset)


def _load(run: Run, found: Checkpoint) -> None:
    """Restore all state of a checkpoint, except the sampler's, which ``read_inputs`` restores.

    Keys read by ``get`` are missing in checkpoints of older versions.
    """
    state, kept = run.state, found.state
    state.resets = kept.get("resets", 0)
    for name in (*_trained(run), *["reference"] * (state.resets > 0)):
        run.policies.load_state_dict(found.tensors(name), name)
    load_optimizer_state(run.optimizer, found.tensors("optimizer"), kept["optimizer"])
    run.watch.load_state_dict(kept["watch"])
    if run.drift is not None and kept.get("drift") is not None:
        run.drift.load_state_dict(kept["drift"])
    run.alarms = kept.get("alarms", [])
    if state.floor is not None:
        value = kept.get("multipliers", {}).get("consistency", 0.0)
        # The maximum may have been lowered since the checkpoint.
        state.floor = replace(state.floor, value=min(value, state.floor.maximum))
    if state.kl is not None and kept.get("kl_coef") is not None:
        state.kl = replace(state.kl, value=kept["kl_coef"])
    if state.gate is not None and kept.get("gate") is not None:
        state.gate = resumed(state.gate, *kept["gate"])
    if state.reset is not None and kept.get("reset") is not None:
        kl, steps = kept["reset"]
        state.reset = replace(state.reset, kl=kl, steps=steps)
    if state.history is not None and kept.get("history") is not None:
        state.history = RewardHistory.from_state(state.history.rounds, kept["history"])
    if state.depth is not None and kept.get("depth") is not None:
        state.depth = state.depth.resumed(*kept["depth"])
    state.turns, state.flat = kept.get("turns", 0), kept.get("flat", 0)
    if kept.get("teacher") is not None:
        state.teacher = [SessionCounts(*counts) for counts in kept["teacher"]]
    state.done, state.updates, state.skipped = found.round, kept["updates"], kept["skipped"]
    if run.checkpoints.holds(found):  # a checkpoint of another folder is not saved in this one
        run.saved = state.done
