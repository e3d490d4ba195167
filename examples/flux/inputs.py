"""Inputs of a run, read and checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mteditflow import gather_ranks
from mteditflow._exits import BAD_INPUT, naming_argument, refuse
from mteditflow._files import require_folder, require_no_device
from mteditflow._hub import HubError, explaining_hub
from mteditflow._text import parse_json
from mteditflow.chains import ChainDataset, ChainError, GroupSampler, InformativeSampler
from mteditflow.chains.formats.stored import is_stored
from mteditflow.evaluation import JudgedBy
from mteditflow.pipelines import Family
from mteditflow.pipelines.families import find_family
from mteditflow.pipelines.quantization import check_quantization
from mteditflow.rewards.command_line import check_source
from mteditflow.training import Checkpoint

from .config import Config, ConfigError, DistillationConfig, Model
from .declared import check_terms
from .held_out import HeldOut
from .loading import (
    Notes,
    family_of,
    load_chains,
    load_held_out,
    load_sessions,
    made_by,
    require_fitting,
)
from .lora_files import check_lora
from .resuming import check_unchanged, find_checkpoint, fingerprints, warn_of_lost_files
from .scoring import check_services, judged_by, require_services, scale_of
from .trackers import check_trackers

INDEX = "model_index.json"  # in the folder of every diffusers pipeline


@dataclass(frozen=True, eq=False)
class Inputs:
    """All parts of a run except its models.

    Attributes:
        chains: training chains.
        sampler: sampler of the training chains.
        held_out: evaluations so far, and the held-out chains; None: no evaluation.
        sessions: chains on which student and teacher are compared; None: no comparison.
        found: checkpoint to resume from; None: the run starts at round 0.
        judged_by: provenance of the scores.
        files: hashes of the files that the run depends on, by field.
        changes: options that have changed since the run began, as in ``Run``.
        notes: messages to log first.
    """

    chains: ChainDataset
    sampler: GroupSampler
    held_out: HeldOut | None
    sessions: HeldOut | None
    found: Checkpoint | None
    judged_by: JudgedBy
    files: dict[str, str]
    changes: list[dict[str, Any]]
    notes: Notes


def check(config: Config) -> None:
    """Check paths, services and trackers, without reading chains.

    Raises:
        ConfigError: a file, folder, service or tracker is missing, or of the wrong kind.
        ValueError: a URL does not end in /v1, or the output folder is a file.
    """
    check_services(config.rewards)
    check_terms(config)
    check_trackers(config.output)
    for part in ("", "checkpoints", "evaluations", "pictures"):
        require_folder("output.folder", config.output.folder / part)
    _check_model("model.path", config.model.path)
    if config.sampling.model is not None:
        _check_model("sampling.model", config.sampling.model)
    _check_memory_options(config.model)
    files = {"data.chains": config.data.chains, "data.held_out": config.data.held_out}
    if isinstance(config, DistillationConfig):
        files["teacher.sessions"] = config.teacher.sessions
    for name, path in files.items():
        if path is not None:
            with naming_argument(name):
                _check_chains(name, path)
    if isinstance(config, DistillationConfig) and config.teacher.path is not None:
        check_lora("teacher.path", config.teacher.path, config.model.lora_rank)
    if config.model.lora is not None:
        continued = config.model.lora_start == "continue"
        check_lora("model.lora", config.model.lora, config.model.lora_rank if continued else None)
    if config.sampling.lora is not None:
        check_lora("sampling.lora", config.sampling.lora, None)


def _check_chains(field: str, path: Path) -> None:
    """Raise unless a path is a file, or a stored data set.

    Raises:
        ConfigError: it is missing, or a folder of something else.
        OSError: it is a device or a pipe, or cannot be looked up.
    """
    require_no_device(path)
    if not path.is_file() and not is_stored(path):
        got = f"none at {path}" if not path.exists() else f"the folder {path}"
        raise ConfigError(f"{field}: expected a file of chains, got {got}")


def _check_model(field: str, source: str) -> None:
    """Raise unless a source may be a supported pipeline; a Hub id is not looked up.

    Raises:
        ConfigError: the folder holds no pipeline, or an unsupported one.
    """
    try:
        check_source(field, source, INDEX)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if Path(source).exists():
        try:
            find_family(parse_json((Path(source) / INDEX).read_bytes())["_class_name"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{field}: {source}: {error}") from error


def _check_memory_options(model: Model) -> None:
    """Check that the quantization package is installed and embeddings can be stored.

    Raises:
        ConfigError: the package is missing.
        ValueError: the folder for embeddings is a file.
    """
    if model.prompt_folder is not None:
        require_folder("model.prompt_folder", model.prompt_folder)
    if model.quantize == "none":
        return
    try:
        check_quantization(model.quantize)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def read_inputs(config: Config, accelerator: Accelerator) -> Inputs:
    """Read chains and the checkpoint, and check that all parts fit together; not collective.

    After all other checks, rank 0 asks the services whether they answer.

    Raises:
        ConfigError: parts do not fit together, a chains file cannot be read, or a setting differs
            from the run to resume.
        OSError: another file cannot be read.
        ValueError: a service does not answer.
    """
    data = config.data
    notes = Notes()
    with _naming("data.chains"):
        chains = load_chains(config, data.chains, notes, turns=1 if config.drifts else data.turns)
    family = _family("model.path", config.model.path)
    if config.sampling.model is not None:
        _check_sibling(config.sampling.model, family)
    require_fitting(config, family, chains)
    sampler = make_sampler(config, chains, accelerator)
    files = fingerprints(config)
    found, changes = find_checkpoint(config, notes), []
    if found is not None:
        notes.message(f"resuming after round {found.round}, from {found.path}")
        changes = check_unchanged(config, files, found, notes)
        warn_of_lost_files(config, found, notes)
        _load_order(sampler, found)
    held_out = None
    if data.held_out is not None:
        with _naming("data.held_out"):
            unseen = load_held_out(config, chains, notes)
        require_fitting(config, family, unseen)
        held_out = HeldOut(unseen, config.output.folder / "evaluations", accelerator)
        if strays := ", ".join(held_out.strays()):
            notes.warning(f"{held_out.folder}: ignored, since no run writes such files: {strays}")
    sessions = None
    if isinstance(config, DistillationConfig) and config.teacher.sessions is not None:
        others = chains, None if held_out is None else held_out.chains
        with _naming("teacher.sessions"):
            compared = load_sessions(config, config.teacher.sessions, notes, *others)
        require_fitting(config, family, compared)
        sessions = HeldOut(compared, config.output.folder / "sessions", accelerator)
    if accelerator.is_main_process:
        whole = config.rewards.scope == "trajectory"
        require_services(config.rewards, images=data.turns + 1 if whole else 2)
    judge = judged_by(config.rewards)
    if held_out is not None and found is not None:
        judge = _comparable(config, held_out, judge, found.round)
    return Inputs(chains, sampler, held_out, sessions, found, judge, files, changes, notes)


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Prefix errors of a chains file with the field that names it.

    Raises:
        ConfigError: a chain is invalid, or a file cannot be read.
    """
    try:
        yield
    except (ChainError, OSError) as error:
        raise ConfigError(f"{field}: {error}") from error


def _family(field: str, source: str) -> Family:
    """Return the family of a pipeline.

    Raises:
        ConfigError: the pipeline cannot be trained, or does not exist.
    """
    try:
        with explaining_hub(field, source):
            return family_of(source)
    except HubError as error:
        raise ConfigError(str(error)) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}: {error}") from error


def _check_sibling(source: str, family: Family) -> None:
    """Raise ``ConfigError`` unless a pipeline has the class of the trained one."""
    expected = family.pipeline.__name__
    got = _family("sampling.model", source).pipeline.__name__
    if got != expected:
        raise ConfigError(f"sampling.model: expected a {expected}, as model.path, got a {got}")


def make_sampler(config: Config, chains: ChainDataset, accelerator: Accelerator) -> GroupSampler:
    """Return the sampler of this rank.

    Raises:
        ConfigError: a round does not divide over the ranks, or needs more chains than exist.
    """
    data, training = config.data, config.training
    ranks = int(accelerator.num_processes)
    kind = GroupSampler if data.draw == "epochs" else InformativeSampler
    try:
        sampler = kind(
            chains,
            groups=data.groups,
            group_size=data.group_size,
            ranks=ranks,
            rank=accelerator.process_index,
            split_groups=data.split_groups,
            seed=training.seed,
        )
    except ValueError as error:
        section = "training" if str(error).startswith("seed:") else "data"
        raise ConfigError(f"{section}.{error}") from error
    if data.groups + data.extra_groups > len(chains):
        raise ConfigError(
            f"data.extra_groups: expected at most the {len(chains) - data.groups} chains beside "
            f"the {data.groups} of a round, got {data.extra_groups}"
        )
    own = data.groups * data.group_size // ranks
    if own % training.minibatches:
        raise ConfigError(
            f"training.minibatches: expected a divisor of the {own} trajectories of "
            f"each of {ranks} ranks, got {training.minibatches}"
        )
    return sampler


def _load_order(sampler: GroupSampler, found: Checkpoint) -> None:
    """Restore the sampler's state from a checkpoint.

    Raises:
        ConfigError: the checkpoint has other chains, groups or another seed.
    """
    try:
        sampler.load_state_dict(found.state["sampler"])
    except ValueError as error:
        raise ConfigError(f"output.resume: cannot go on from {found.path}: {error}") from error


def _comparable(config: Config, held_out: HeldOut, judge: JudgedBy, done: int) -> JudgedBy:
    """Return the judge of the run's evaluations so far; without any, ``judge``.

    Raises:
        ConfigError: an evaluation is damaged, or not comparable with future ones.
    """
    folder, fix = config.output.folder, "choose another output.folder"
    try:
        success = scale_of(config.rewards).success
        held_out.require_comparable(done, success, made_by(config, done))
    except ConfigError:  # one is damaged
        raise
    except ValueError as error:
        raise ConfigError(f"{error}; {fix}") from error
    try:
        return held_out.judge(judge, done)
    except ValueError as error:
        raise ConfigError(f"{folder} holds evaluations by another judge; {fix}: {error}") from error


@contextmanager
def refusing_together(accelerator: Accelerator) -> Iterator[None]:
    """Exit on every rank if the block fails on one: a collective call at the end of the block.

    Without it, the other ranks would wait for the failed one in their next collective call.

    Raises:
        SystemExit: code 2 on every rank; ranks whose block failed print the reason.
    """
    fault: Exception | None = None
    try:
        yield
    except (OSError, ValueError) as error:
        fault = error
    (faulty,), _ = gather_ranks(torch.tensor([fault is not None], device=accelerator.device))
    if fault is not None:
        refuse("; ".join(str(fault).splitlines()))
    if bool(faulty.any()):
        raise SystemExit(BAD_INPUT)
