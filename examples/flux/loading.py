"""The parts of a run that come from disk: the editor with its policies, and chains."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator, DistributedType
from PIL import Image, ImageOps

from mteditflow.chains import ChainDataset, read_chains, shared
from mteditflow.evaluation import MadeBy
from mteditflow.evaluation.provenance import content_hash
from mteditflow.pipelines import Editor, LoraPolicies, Start, read_lora
from mteditflow.training import RunLog, shard_model

from .config import Config, ConfigError, Data, Model

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def quiet_libraries() -> None:
    """Turn off progress bars and hints of diffusers and transformers; the run's log reports."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def load_policies(config: Config, accelerator: Accelerator) -> tuple[Editor, LoraPolicies]:
    """Load the editor, give it adapters, and shard it if it is to be sharded.

    Raises:
        ConfigError: it cannot be loaded as it is configured.
    """
    quiet_libraries()
    try:
        return _policies(config, accelerator)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error


def _policies(config: Config, accelerator: Accelerator) -> tuple[Editor, LoraPolicies]:
    model = config.model
    if model.dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")  # the adapters' products: TF32 on GPUs
    editor = Editor.load(
        model.path,
        dtype=DTYPES[model.dtype],
        device=accelerator.device,
        call={
            "height": model.resolution,
            "width": model.resolution,
            "num_inference_steps": config.sampling.steps,
            "guidance_scale": model.guidance,
            **model.options,
        },
        attention_backend=model.attention,
        gradient_checkpointing=model.checkpointing,
        compile_blocks=model.compile,
        vae_slicing=model.vae_slicing,
        vae_tiling=model.vae_tiling,
    )
    multiple = 2 * editor.pipeline.vae_scale_factor  # pixels of a token; diffusers would round down
    if model.resolution % multiple:
        raise ValueError(
            f"resolution: expected a multiple of {multiple} pixels, got {model.resolution}"
        )
    lora = editor.lora(
        rank=model.lora_rank, alpha=model.lora_alpha, targets=model.lora_targets or None
    )
    policies = LoraPolicies(
        editor.transformer,
        lora,
        seed=config.training.seed,
        ema=config.training.ema_decay > 0,
        start=_start(model, editor),
    )
    if model.shard or accelerator.distributed_type is DistributedType.FSDP:
        # The velocity is a view of the output; nothing here works on it in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        shard_model(editor.transformer, blocks=editor.transformer._no_split_modules)
    return editor, policies


def _start(model: Model, editor: Editor) -> Start | None:
    """Return the LoRA that the policies start from."""
    if model.lora is None:
        return None
    weights = read_lora(type(editor.pipeline), model.lora)
    return Start(weights, frozen=model.lora_start == "freeze", reference=model.lora_reference)


def _started_from(model: Model) -> str:
    """Return words for the LoRA that the policies started from, if there is one."""
    return "" if model.lora is None else f", which started from {model.lora} ({model.lora_start})"


def made_by(config: Config, done: int) -> MadeBy:
    """Return what edits held-out chains after a round: the model, with the adapters of then."""
    model = config.model
    return MadeBy(
        editor=model.path,
        editor_hash=content_hash(model.path),
        lora=f"{config.evaluation.policy} policy of round {done}{_started_from(model)}",
        dtype=model.dtype,
        seed=config.training.seed,
        steps=config.evaluation.steps,
        guidance=model.guidance,
        resolution=model.resolution,
        call=json.dumps(model.options, sort_keys=True),
    )


@dataclass(frozen=True)
class Notes:
    """Words for the log of a run, before there is one."""

    lines: list[tuple[str, bool]] = field(default_factory=list)

    def message(self, text: str) -> None:
        """Keep a message."""
        self.lines.append((text, False))

    def warning(self, text: str) -> None:
        """Keep a warning."""
        self.lines.append((text, True))

    def write(self, log: RunLog) -> None:
        """Log them in order."""
        for text, warns in self.lines:
            (log.warning if warns else log.message)(text)


def load_held_out(data: Data, train: ChainDataset, resolution: int, notes: Notes) -> ChainDataset:
    """Read the held-out chains, which share nothing with those to train on.

    Raises:
        ConfigError: they share ids or reference images, and ``data.allow_overlap`` is not set.
        ChainError: a line is bad.
        OSError: a file cannot be opened.
    """
    chains = load_chains(data, data.held_out, resolution, notes)
    found = shared(train.chains, chains.chains)
    if found.any and not data.allow_overlap:
        raise ConfigError(
            f"data.held_out: expected nothing that is in data.chains, got {found}; split the "
            "chains by mteditflow chains split, or give --data.allow-overlap"
        )
    if found.any:
        notes.warning(f"held-out chains are not held out: shared with data.chains are {found}")
    return chains


def load_chains(data: Data, path: Path, resolution: int, notes: Notes) -> ChainDataset:
    """Read chains, cut them to the turns of the run, and fit their images to squares.

    Raises:
        ConfigError: none of them is long enough.
        ChainError: a line is bad.
        OSError: the file cannot be opened.
    """
    chains = read_chains(path, check_images=True, allow_outside=data.allow_outside).chains
    cut = [chain.first_turns(data.turns) for chain in chains if chain.turns >= data.turns]
    if not cut:
        raise ConfigError(f"data.turns: expected chains of {data.turns} turns in {path}, got none")
    if len(cut) < len(chains):
        short = len(chains) - len(cut)
        notes.message(
            f"{path}: left out {short} of {len(chains)} chains, shorter than {data.turns}"
        )

    def fit(image: Image.Image) -> Image.Image:
        return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)

    return ChainDataset(cut, transform=fit)
