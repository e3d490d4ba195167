"""Trackers of a run: under which project and name it appears in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

from .config import Config, ConfigError, Output, flat

# What a tracker's own start calls the name of a run; the others have the project alone.
RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}


def check_trackers(output: Output) -> None:
    """Refuse trackers that are not installed, and names that none of them takes.

    Raises:
        ConfigError: there are such.
    """
    known = sorted(map(str, get_available_trackers()))
    for name in output.trackers:
        if name not in known:
            raise ConfigError(f"output.trackers: expected names among {known}, got {name!r}")
    if output.run is not None and not RUN_NAMES.keys() & set(output.trackers):
        raise ConfigError(
            f"output.run: has an effect only where output.trackers has one of {sorted(RUN_NAMES)}, "
            f"got {output.run!r}"
        )


def places(output: Output) -> ProjectConfiguration:
    """Return where trackers write that write files: ``trackers/<project>`` in the run's folder."""
    return ProjectConfiguration(str(output.folder), logging_dir=str(output.folder / "trackers"))


def start_trackers(accelerator: Accelerator, config: Config) -> None:
    """Start the trackers, with every field of the configuration."""
    output = config.output
    accelerator.init_trackers(
        output.project, config=flat(config), init_kwargs=named(output.trackers, run_name(output))
    )


def named(trackers: tuple[str, ...], run: str) -> dict[str, dict[str, Any]]:
    """Return the arguments that give a run its name in each tracker that takes one.

    Example:
        >>> named(("tensorboard", "wandb"), "seed 3")
        {'wandb': {'name': 'seed 3'}}
    """
    return {name: {RUN_NAMES[name]: run} for name in trackers if name in RUN_NAMES}


def run_name(output: Output) -> str:
    """Return the name of the run: the one that was given, else that of its folder."""
    return output.run or Path(output.folder).resolve().name
