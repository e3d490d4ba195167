"""Trackers of a run, with its project and name in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

from .config import Config, ConfigError, Output
from .config_values import flat

# Keyword of each tracker's init function for the run's name; other trackers have no run names.
RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}


def check_trackers(output: Output) -> None:
    """Refuse trackers that are not installed, and a run name that no tracker supports.

    Raises:
        ConfigError: a tracker is missing, or the name has no effect.
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
    """Return the folders of a run and of trackers' files, ``trackers/<project>`` inside it."""
    return ProjectConfiguration(str(output.folder), logging_dir=str(output.folder / "trackers"))


def start_trackers(accelerator: Accelerator, config: Config) -> None:
    """Start the trackers, and log every field of the configuration to them."""
    output = config.output
    accelerator.init_trackers(
        output.project, config=flat(config), init_kwargs=named(output.trackers, run_name(output))
    )


def named(trackers: tuple[str, ...], run: str) -> dict[str, dict[str, Any]]:
    """Return the init arguments that set the run's name, by tracker.

    Example:
        >>> named(("tensorboard", "wandb"), "seed 3")
        {'wandb': {'name': 'seed 3'}}
    """
    return {name: {RUN_NAMES[name]: run} for name in trackers if name in RUN_NAMES}


def run_name(output: Output) -> str:
    """Return the name of the run: ``output.run``, else the name of its folder."""
    return output.run or Path(output.folder).resolve().name
