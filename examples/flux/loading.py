"""Load the editor with its policies, and chains."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from PIL import Image

from mteditflow._hub import HubError, explaining_hub
from mteditflow.chains import ChainDataset, read_chains, shared
from mteditflow.evaluation import MadeBy
from mteditflow.evaluation.provenance import content_hash
from mteditflow.pipelines import (
    Editor,
    Family,
    LoraPolicies,
    aspect_buckets,
    fit_to_bucket,
)
from mteditflow.pipelines.families import find_family
from mteditflow.training import RunLog

from .config import Config, ConfigError, DistillationConfig, Model
from .few_steps import guidance_call, lora_for_few_steps, start_of, with_field
from .sharding import sharding

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def quiet_libraries() -> None:
    """Turn off progress bars and hints of diffusers and transformers, which clutter the log."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if not torch.cuda.is_available():  # an installed DeepSpeed warns if it has to choose itself
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def load_policies(
    config: Config, accelerator: Accelerator, instructions: Sequence[str] = ()
) -> tuple[Editor, LoraPolicies]:
    """Load the editor, add adapters, and shard it if configured; a collective call.

    Args:
        config: configuration of the run.
        accelerator: accelerator of this rank.
        instructions: instructions of all chains, embedded ahead into ``model.prompt_folder``.

    Raises:
        ConfigError: the editor cannot be loaded as configured.
    """
    quiet_libraries()
    try:
        with explaining_hub("model.path", config.model.path):
            return _policies(config, accelerator, instructions)
    except HubError as error:
        raise ConfigError(str(error)) from error
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(with_field("model", error)) from error


def _policies(
    config: Config, accelerator: Accelerator, instructions: Sequence[str]
) -> tuple[Editor, LoraPolicies]:
    model, ranks = config.model, int(accelerator.num_processes)
    if model.dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")  # TF32 on GPUs, for the float32 adapters
    guidance = guidance_call(model.guidance, family_of(model.path))
    side = model.resolution if config.data.fit == "square" else None  # None: the reference's size
    editor = Editor.load(
        model.path,
        dtype=DTYPES[model.dtype],
        device=accelerator.device,
        call={
            "height": side,
            "width": side,
            "num_inference_steps": config.sampling.steps,
            **guidance,
            **model.options,
        },
        attention_backend=model.attention,
        gradient_checkpointing=model.checkpointing,
        kept_blocks=model.kept_blocks,
        compile_blocks=model.compile,
        vae_slicing=model.vae_slicing,
        vae_tiling=model.vae_tiling,
        quantize=None if model.quantize == "none" else model.quantize,
        encoder_device="cpu" if model.encoders == "host" else None,
        prompt_folder=model.prompt_folder,
        # Each rank embeds its share; all read the common folder afterwards.
        instructions=instructions[int(accelerator.process_index) :: ranks],
    )
    if instructions:
        accelerator.wait_for_everyone()  # until every rank has stored its share
    # Side of a token in pixels; diffusers would silently round other sizes down.
    multiple = 2 * editor.pipeline.vae_scale_factor
    name, given = "model.resolution", model.resolution
    if config.data.fit == "buckets":
        name, given = "data.bucket_multiple", config.data.bucket_multiple
    if given % multiple:
        raise ConfigError(f"{name}: expected a multiple of {multiple} pixels, got {given}")
    shards = sharding(model, ranks)
    shards.before_adapters(editor)
    lora = editor.lora(
        rank=model.lora_rank, alpha=model.lora_alpha, targets=model.lora_targets or None
    )
    policies = LoraPolicies(
        editor.transformer,
        lora,
        seed=config.training.seed,
        ema=config.training.ema_decay > 0,
        resettable=config.training.reset_steps is not None,
        start=start_of(model, editor),
        few_steps=None if config.sampling.model else lora_for_few_steps(config.sampling, editor),
    )
    shards.after_adapters(editor)
    return editor, policies


def _started_from(model: Model) -> str:
    """Return text on the LoRA that the policies started from; empty without one."""
    return "" if model.lora is None else f", which started from {model.lora} ({model.lora_start})"


def family_of(source: str) -> Family:
    """Return the family of a pipeline; of a Hub id, only its index file is downloaded.

    Raises:
        ValueError: the pipeline belongs to no supported family.
        OSError: the pipeline does not exist.
    """
    return find_family(diffusers.DiffusionPipeline.load_config(source)["_class_name"])


def require_fitting(config: Config, family: Family, *datasets: ChainDataset) -> None:
    """Raise unless chains fit the pipeline.

    An editing pipeline needs a reference image in every chain. Text to image needs chains without
    one, a single turn, and no option that depends on a reference.

    Raises:
        ConfigError: chains or options do not fit.
    """
    makes, kind = family.references == "none", family.pipeline.__name__
    expected = "no image in any chain" if makes else "an image in every chain"
    for chain in (chain for dataset in datasets for chain in dataset.chains):
        if (chain.image is None) != makes:
            got = "none" if chain.image is None else repr(chain.image)
            raise ConfigError(
                f'data: expected {expected} ("image": null is none) for a {kind}, got {got} in '
                f"chain {chain.id!r}"
            )
    if not makes:
        _require_taken(config, family, *datasets)
        return
    if config.data.fit == "buckets":
        raise ConfigError(
            f"data.fit: expected square for a {kind}, which has no reference to take a shape from, "
            "got buckets"
        )
    if config.data.turns > 1:
        raise ConfigError(
            f"data.turns: expected 1 for a {kind}, which edits no image, got {config.data.turns}"
        )
    if config.rewards.scorer is None:
        raise ConfigError(
            f"rewards.scorer: expected one for a {kind}, since judge and consistency compare with "
            "a reference image, got none"
        )
    if isinstance(config, DistillationConfig) and config.teacher.path is None:
        raise ConfigError(
            f"teacher.path: expected a LoRA for a {kind}, whose base model has no clean image to "
            "be shown, got none"
        )


def _require_taken(config: Config, family: Family, *datasets: ChainDataset) -> None:
    """Raise unless the input images of every turn fit the pipeline.

    Raises:
        ConfigError: the pipeline takes one image, and a turn has other inputs than the last image.
    """
    if family.references == "several":
        return
    kind = f"a {family.pipeline.__name__}, which takes one reference image"
    if config.data.history != "last":
        raise ConfigError(f"data.history: expected last for {kind}, got {config.data.history}")
    for chain in (chain for dataset in datasets for chain in dataset.chains):
        if other := [list(names) for names in chain.seen() if names != ("last",)]:
            raise ConfigError(
                f"data: expected references of ['last'] alone for {kind}, got {other[0]} in chain "
                f"{chain.id!r}"
            )


def made_by(config: Config, done: int) -> MadeBy:
    """Return the provenance of held-out images: the model, with its adapters after a round."""
    model, data = config.model, config.data
    own: dict[str, Any] = {} if data.fit == "square" else {"buckets": data.bucket_multiple}
    if data.history != "last":
        own["history"] = data.history
    return MadeBy(
        editor=model.path,
        editor_hash=content_hash(model.path),
        lora=f"{config.evaluation.policy} policy of round {done}{_started_from(model)}",
        dtype=model.dtype,
        seed=config.training.seed,
        steps=config.evaluation.steps,
        guidance=model.guidance,
        resolution=model.resolution,
        call=json.dumps(model.options | own, sort_keys=True),
    )


@dataclass(frozen=True)
class Notes:
    """Messages collected before the run's log is open."""

    lines: list[tuple[str, bool]] = field(default_factory=list)

    def message(self, text: str) -> None:
        """Add a message."""
        self.lines.append((text, False))

    def warning(self, text: str) -> None:
        """Add a warning."""
        self.lines.append((text, True))

    def write(self, log: RunLog) -> None:
        """Write all messages to the log, in order."""
        for text, warns in self.lines:
            (log.warning if warns else log.message)(text)


def load_held_out(config: Config, train: ChainDataset, notes: Notes) -> ChainDataset:
    """Read the held-out chains, which must be disjoint from the training chains.

    Raises:
        ConfigError: both share ids or reference images, and ``data.allow_overlap`` is off.
        ChainError: a line is invalid.
        OSError: a file cannot be opened.
    """
    data = config.data
    chains = load_chains(config, data.held_out, notes, turns=data.turns)
    found = shared(train.chains, chains.chains)
    if found.any and not data.allow_overlap:
        raise ConfigError(
            f"data.held_out: expected nothing that is in data.chains, got {found}; split the "
            "chains by mteditflow chains split, or give --data.allow-overlap"
        )
    if found.any:
        notes.warning(f"data.held_out: not disjoint from data.chains, both have {found}")
    return chains


def load_sessions(
    config: DistillationConfig, path: Path, notes: Notes, *others: ChainDataset | None
) -> ChainDataset:
    """Read the sessions for promotions, which must be disjoint from the run's other chains.

    Raises:
        ConfigError: ids or reference images are shared, or no session is long enough.
        ChainError: a line is invalid.
        OSError: the file cannot be opened.
    """
    turns = max(config.teacher.turns)
    sessions = load_chains(config, path, notes, turns=turns, field="teacher.turns")
    for name, other in zip(("data.chains", "data.held_out"), others, strict=True):
        if other is not None and (found := shared(other.chains, sessions.chains)).any:
            raise ConfigError(
                f"teacher.sessions: expected nothing that is in {name}, got {found}; split the "
                "chains by mteditflow chains split"
            )
    return sessions


def load_chains(
    config: Config, path: Path, notes: Notes, *, turns: int, field: str = "data.turns"
) -> ChainDataset:
    """Read chains, cut them to a number of turns, and crop their images to the run's sizes.

    Args:
        config: configuration of the run.
        path: file of chains.
        notes: collects how many chains are too short and left out.
        turns: turns of each chain.
        field: name of the option that sets ``turns``, for messages.

    Raises:
        ConfigError: no chain is long enough.
        ChainError: a line is invalid.
        OSError: the file cannot be opened.
    """
    data = config.data
    chains = read_chains(path, check_images=True, allow_outside=data.allow_outside).chains
    cut = [chain.first_turns(turns) for chain in chains if chain.turns >= turns]
    if not cut:
        raise ConfigError(f"{field}: expected chains of {turns} turns in {path}, got none")
    if len(cut) < len(chains):
        short = len(chains) - len(cut)
        notes.message(f"{path}: left out {short} of {len(chains)} chains, shorter than {turns}")

    return ChainDataset(cut, transform=fitting(config))


def fitting(config: Config) -> Callable[[Image.Image], Image.Image]:
    """Return the function that scales and crops references to the run's sizes.

    Raises:
        ConfigError: no bucket fits ``data.bucket_multiple``.
    """
    side, data = config.model.resolution, config.data
    sizes: tuple[tuple[int, int], ...] = ((side, side),)
    if data.fit == "buckets":
        try:
            sizes = aspect_buckets(side * side, data.bucket_multiple)
        except ValueError as error:
            raise ConfigError(f"data.bucket_{error}") from error
    return partial(fit_to_bucket, buckets=sizes)
