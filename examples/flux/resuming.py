"""Compare a run with the checkpoint to resume from, before any model is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mteditflow.evaluation.provenance import content_hash
from mteditflow.training import Checkpoint, Checkpoints, read_metrics

from .config import Config, ConfigError
from .config_values import dumped
from .loading import Notes

# Weights, optimizer, order of chains and random numbers depend on these fields; a change needs a
# new run.
FIXED = (
    ("objective", "name"),
    *(("model", f"lora_{name}") for name in ("rank", "alpha", "targets", "start", "reference")),
    *(("data", name) for name in ("turns", "history", "groups", "group_size", "draw")),
    ("training", "optimizer"),
    ("training", "seed"),
)
LEARNING_RATE = ("learning_rate", "schedule", "warmup_rounds", "final_rate", "rounds")  # its fields
HASHED = (
    *(("model", "path"), ("model", "lora"), ("sampling", "model"), ("sampling", "lora")),
    *(("data", "chains"), ("data", "held_out"), ("teacher", "sessions")),
)


def find_checkpoint(config: Config, notes: Notes) -> Checkpoint | None:
    """Return the checkpoint to resume from; None: the run starts at round 0.

    Damaged checkpoints are reported in ``notes``.

    Raises:
        ConfigError: ``output.resume`` is never and a checkpoint exists; the named checkpoint does
            not exist; all checkpoints are damaged or gone; or the checkpoint is from another folder
            and this one holds a run.
        ValueError: ``metrics.jsonl`` is damaged.
    """
    output = config.output
    checkpoints = Checkpoints(output.folder / "checkpoints")
    with warnings.catch_warnings(record=True) as damaged:
        warnings.simplefilter("always")
        try:
            found = checkpoints.find("auto" if output.resume == "never" else output.resume)
        except (OSError, ValueError) as error:
            raise ConfigError(f"output.resume: {error}") from error
    if output.resume == "never" and found is not None:
        raise ConfigError(
            f"output.resume: never, but {output.folder} holds a run; choose another folder, or go "
            "on with auto"
        )
    reasons = [str(warning.message) for warning in damaged]
    if found is None and not reasons:
        _refuse_lost_checkpoints(config, notes)
    if found is None and reasons:  # starting over would discard the run's metrics
        raise ConfigError(
            f"output.resume: expected a whole checkpoint in {output.folder}, got damaged ones "
            f"alone; choose another folder, or delete them to begin again: {'; '.join(reasons)}"
        )
    if found is not None and not checkpoints.holds(found):
        _refuse_two_histories(config, found)
    for reason in reasons:
        notes.warning(reason)
    return found


def _refuse_lost_checkpoints(config: Config, notes: Notes) -> None:
    """Refuse to start at round 0 if the metrics imply checkpoints that are missing.

    A run that was killed before its first checkpoint starts over, with a message in the log.

    Raises:
        ConfigError: the metrics do not begin at round 1, or pass the first round that saves.
        ValueError: the metrics are damaged.
    """
    path = config.output.folder / "metrics.jsonl"
    rounds = [int(line["round"]) for line in read_metrics(path)]
    if not rounds:
        return
    if rounds[0] > 1 or rounds[-1] > _first_save(config):
        raise ConfigError(
            f"output.folder: expected checkpoints beside the metrics of {_spans(rounds)}, got none "
            f"in {config.output.folder / 'checkpoints'}; put them back, give output.resume the "
            f"checkpoint of another folder that the run began from, or delete {path} to begin again"
        )
    notes.message(f"no checkpoint yet: {_spans(rounds)} of {path} will be repeated")


def _first_save(config: Config) -> int:
    """Return the first round after which a run saves a checkpoint."""
    due = [config.output.checkpoint_every, config.training.rounds]
    return min(due if config.data.held_out is None else [*due, config.evaluation.every])


def warn_of_lost_files(config: Config, found: Checkpoint, notes: Notes) -> None:
    """Warn of missing metrics and evaluations of rounds before a checkpoint.

    Args:
        config: configuration of this process.
        found: checkpoint to resume from; one from another folder has no files here to miss.
        notes: collects the warnings.

    Raises:
        ValueError: the metrics are damaged.
    """
    folder = config.output.folder
    if not Checkpoints(folder / "checkpoints").holds(found):
        return
    path = folder / "metrics.jsonl"
    there = {line["round"] for line in read_metrics(path)}
    if gone := [done for done in range(1, found.round + 1) if done not in there]:
        notes.warning(
            f"{path}: expected a line of every round up to {found.round}, got none of "
            f"{_spans(gone)}; curves and report lack them"
        )
    evaluated = found.state.get("evaluated", [])
    names = {done: folder / "evaluations" / f"round-{done:06d}.json" for done in evaluated}
    if config.data.held_out is not None and (
        gone := [done for done, file in names.items() if not file.exists()]
    ):
        notes.warning(
            f"{folder / 'evaluations'}: expected those of {_spans(evaluated)}, got none of "
            f"{_spans(gone)}; curves and report lack them"
        )


def _spans(rounds: Sequence[int]) -> str:
    """Return rounds as text, with runs of consecutive numbers as ranges.

    Example:
        >>> _spans([1, 2, 3, 7]), _spans([4])
        ('rounds 1 to 3, 7', 'round 4')
    """
    known = set(rounds)
    starts = [n for n in rounds if n - 1 not in known]
    ends = [n for n in rounds if n + 1 not in known]
    parts = [f"{a} to {b}" if b > a else f"{a}" for a, b in zip(starts, ends, strict=True)]
    return f"round{'s' if len(rounds) > 1 else ''} {', '.join(parts)}"


def _refuse_two_histories(config: Config, found: Checkpoint) -> None:
    """Refuse a checkpoint of another folder if this one already has rounds of its own.

    Raises:
        ConfigError: the folder has checkpoints, or metrics up to the checkpoint's round.
    """
    folder = config.output.folder
    own = any((folder / "checkpoints").glob("round-*"))
    if own or any(line["round"] <= found.round for line in read_metrics(folder / "metrics.jsonl")):
        raise ConfigError(
            f"output.resume: expected a checkpoint of the run in {folder}, got {found.path}; go on "
            "with auto, or choose another output.folder"
        )


def fingerprints(config: Config) -> dict[str, str]:
    """Return hashes of the files that a run depends on, by field; Hub ids have no hash."""
    own = [(section, name) for section, name in HASHED if hasattr(config, section)]
    paths = {(section, name): getattr(getattr(config, section), name) for section, name in own}
    given = {".".join(field): path for field, path in paths.items() if path is not None}
    hashes = {field: content_hash(path) for field, path in given.items()}
    return {field: found for field, found in hashes.items() if found is not None}


def check_unchanged(
    config: Config, files: Mapping[str, str], found: Checkpoint, notes: Notes
) -> list[dict[str, Any]]:
    """Compare a configuration with that of a checkpoint: refuse some changes, warn of others.

    Args:
        config: configuration of this process.
        files: ``fingerprints`` of ``config``.
        found: checkpoint to resume from.
        notes: collects a warning for each accepted change, and for a learning rate that changes.

    Returns:
        All accepted changes of the run up to now, in order: "after_round", "option", "was", "is".

    Raises:
        ConfigError: a field or file differs that the state of the run depends on.
    """
    before, now = found.state["config"], dumped(config)
    folder, defaults = config.output.folder, dumped(type(config)())
    for section, name in FIXED:  # fields newer than the checkpoint had their defaults
        was = before.get(section, {}).get(name, defaults[section][name])
        value = now[section][name]
        if was != value:
            field = section if name == "name" else f"{section}.{name}"
            raise ConfigError(_refusal(field, f"{was!r}", folder, f"{value!r}"))
    lora, was = config.model.lora, before["model"].get("lora")
    if (lora is None) != (was is None):
        raise ConfigError(_refusal("model.lora", f"{was}", folder, f"{lora}"))
    if config.training.ema_decay > 0 and before["training"]["ema_decay"] == 0:
        got = f"{config.training.ema_decay} and no average to go on from"
        raise ConfigError(_refusal("training.ema_decay", "0.0", folder, got))
    resets, steps = found.state.get("resets", 0), config.training.reset_steps
    if resets and steps is None:
        got = f"{steps} after {resets} resets, whose reference only a run with resets can hold"
        raise ConfigError(
            _refusal("training.reset_steps", f"{before['training']['reset_steps']}", folder, got)
        )
    old = found.state.get("files", {})
    for field in (x for x in files if x in old and old[x] != files[x]):
        section, _, name = field.partition(".")
        path = getattr(getattr(config, section), name)
        content = f"a file or folder of content {old[field]}"
        raise ConfigError(_refusal(field, content, folder, f"{path} of content {files[field]}"))
    for text in _unknown_files(files, old):
        notes.warning(text)
    changes = [{"after_round": found.round, **change} for change in _changed_fields(before, now)]
    for change in changes:
        notes.warning(
            f"{change['option']} was {change['was']!r} and is {change['is']!r} from here on"
        )
    if (text := _changed_rate(config, before["training"], found.round)) is not None:
        notes.warning(text)
    return [*found.state.get("changes", []), *changes]


def _refusal(field: str, was: str, folder: object, got: str) -> str:
    return (
        f"{field}: expected {was}, with which the run in {folder} began, got {got}; choose another "
        "output.folder"
    )


def _unknown_files(files: Mapping[str, str], old: Mapping[str, str]) -> Iterator[str]:
    for field in files:
        if field not in old:
            yield f"{field}: the checkpoint has no hash of it, so a change would not be seen"


def _changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for section, fields in now.items():
        for name, value in fields.items():
            was = before.get(section, {}).get(name)
            if was != value:
                yield {"option": f"{section}.{name}", "was": was, "is": value}


def _changed_rate(config: Config, before: Mapping[str, Any], done: int) -> str | None:
    """Describe a learning rate that another schedule, such as one of more rounds, changes.

    Args:
        config: configuration of this process.
        before: section training of the checkpoint.
        done: completed rounds.
    """
    now = config.training
    fields = {name: before.get(name, getattr(now, name)) for name in LEARNING_RATE}
    changed = [f"training.{name}" for name, was in fields.items() if was != getattr(now, name)]
    old = replace(now, **fields)
    planned = old.rate(done) if done < old.rounds else None
    if not changed or done >= now.rounds or planned == now.rate(done):
        return None
    ran = f"{old.rate(done - 1):.3g} in round {done}, " if 0 < done <= old.rounds else ""
    instead = "" if planned is None else f" (planned: {planned:.3g})"
    return (
        f"{', '.join(changed)}: the learning rate is {ran}{now.rate(done):.3g} in round "
        f"{done + 1}{instead}, {now.rate(now.rounds - 1):.3g} in the last round, {now.rounds}"
    )
