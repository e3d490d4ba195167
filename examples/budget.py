"""Predict the cost of a training run, before it starts and without a GPU.

    mteditflow budget kontext-nft --memory 24
    mteditflow budget klein-nft --memory 80 --gpus 4 --training.batch 1 --json

All options of the trainer after the preset are accepted. The exit code is 0 if the run fits, as
configured or with the changes that the report lists, 1 if nothing fits, and 2 for wrong input.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, NoReturn

from mteditflow._checks import check_count
from mteditflow._exits import FAILED, refuse, refusing
from mteditflow._pipes import reader_may_leave

if TYPE_CHECKING:
    from mteditflow_examples.flux.config import Config

    from mteditflow.budget import Budget, Model, ModelCosts, Passes, Plan, Sampler, Shape

# Options that lower the FLOPs of a trajectory and change its gradient: section, field, value.
TECHNIQUES = (
    ("objective", "kl_share", 0.25),
    ("objective", "kl_coef", 0.0),
    ("objective", "old_slope", 0.0),
    ("objective", "share", 0.5),
    ("objective", "stochastic_steps", 2),
    ("sampling", "steps", 4),
)
LARGEST = 4096  # pixels of a side
OPTIONS = """\
mteditflow budget PRESET|FILE.toml [--memory GIB] [--gpus N] [--efficiency SHARE] [--json]
                         [objective:NAME] [--SECTION.FIELD VALUE ...]"""


WRONG_VALUE = re.compile(
    r"argument (?P<option>--\w+): invalid (?P<kind>int|float) value: (?P<got>.*)"
)
NO_VALUE = re.compile(r"argument (?P<option>--\w+): expected one argument")
KINDS = {"int": "a whole number", "float": "a number"}


class Arguments(argparse.ArgumentParser):
    """Parser whose errors take one line, "option: expected X, got Y"."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        if wrong := WRONG_VALUE.fullmatch(message):
            refuse(f"{wrong['option']}: expected {KINDS[wrong['kind']]}, got {wrong['got']}")
        if wrong := NO_VALUE.fullmatch(message):
            refuse(f"{wrong['option']}: expected a value, got none")
        refuse(message)


def parser() -> Arguments:
    """Return the parser of the command's own options."""
    made = Arguments(
        prog="mteditflow budget",
        usage=OPTIONS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    made.add_argument(
        "--memory", type=float, default=80.0, help="memory of a GPU, GiB as in nvidia-smi; 80"
    )
    made.add_argument("--gpus", type=int, default=1, help="number of training GPUs; 1")
    made.add_argument(
        "--efficiency", type=float, default=0.4, help="assumed share of a GPU's peak FLOPS; 0.4"
    )
    made.add_argument("--json", action="store_true", help="print JSON, memory in GiB")
    return made


def main() -> int:
    """Run the command line."""
    words = sys.argv[1:]
    options = parser()
    if not words or words[0] in ("-h", "--help"):
        with reader_may_leave():
            options.print_help()
        return 0 if words else 2
    own, rest = options.parse_known_args(words)
    from mteditflow_examples.flux.command_line import parse_or_exit
    from mteditflow_examples.flux.config import ConfigError

    with refusing(ConfigError), reader_may_leave():
        refuse_unknown(rest, list(vars(own)))
        config = parse_or_exit(rest, services=False)
        budget = budget_of(
            rest[0], config, memory=own.memory, gpus=own.gpus, efficiency=own.efficiency
        )
        print(json.dumps(budget.as_json(), indent=1) if own.json else "\n".join(budget.lines()))
    return 0 if budget.feasible else FAILED


def refuse_unknown(words: Sequence[str], own: Sequence[str]) -> None:
    """Refuse options without a section, which are neither the command's own nor the trainer's.

    Args:
        words: arguments that the command's own parser leaves.
        own: names of the command's own options.

    Raises:
        ValueError: there is one; the message has similar options.
    """
    from mteditflow_examples.flux.config import Config
    from mteditflow_examples.flux.config_values import field_names
    from mteditflow_examples.flux.parser_errors import option_hint

    given = (word.partition("=")[0] for word in words if word.startswith("--") and word != "--help")
    unknown = next((word for word in given if "." not in word), None)
    if unknown is None:
        return
    options = [*own, *(name for name in field_names(Config()) if "." in name)]
    near = option_hint(unknown.removeprefix("--").replace("-", "_"), options)
    raise ValueError(
        f"options: expected {', '.join(f'--{name}' for name in own)} or --SECTION.FIELD of the "
        f"trainer, got {unknown}{near}"
    )


def budget_of(
    name: str, config: Config, *, memory: float, gpus: int = 1, efficiency: float = 0.4
) -> Budget:
    """Return the budget of a configuration of the trainer.

    Args:
        name: name in the report.
        config: configuration of the trainer.
        memory: memory of a GPU, GiB.
        gpus: number of training GPUs.
        efficiency: assumed share of a GPU's peak FLOPS.

    Raises:
        ValueError: a number is out of range, or the model is unknown.
    """
    from mteditflow.budget import Budget

    plan = plan_of(config, gpus=gpus)
    cheaper = techniques(config, plan)
    return Budget(name, plan, memory, efficiency, trainer_options(config), cheaper)


def trainer_options(config: Config) -> frozenset[str]:
    """Return the dotted names of a configuration's fields."""
    return frozenset(
        f"{section.name}.{field.name}"
        for section in fields(config)
        for field in fields(getattr(config, section.name))
    )


def plan_of(config: Config, *, gpus: int) -> Plan:
    """Return the plan of a configuration: all quantities that its costs depend on.

    Args:
        config: configuration of the trainer.
        gpus: number of training GPUs.

    Raises:
        ValueError: the model is unknown, or a number is out of range.
    """
    import torch

    from mteditflow.budget import Plan, case_of, costs_of, count_blocks, find_model

    model, data, training = config.model, config.data, config.training
    with _named("model.path"):
        known = find_model(model.path)
    sibling = sibling_of(config, known)
    _check_runnable(config, gpus, reads_images=known.behavior.reads_images)
    text = model.options.get("max_sequence_length")
    guidance = config.sampling.guidance  # training replays the recorded guidance branches
    branches = (sibling or known).branches(
        model.guidance if guidance is None else guidance, model.options
    )
    dtype = getattr(torch, model.dtype)
    references = 1 + (data.history == "original" and data.turns > 1)  # turn 1 has one fewer
    if references > 1 and not (known.behavior.one_by_one and known.behavior.reference != "none"):
        raise ValueError(
            f"data.history: expected last for a {known.pipeline}, which takes one reference image "
            f"at most, got {data.history}"
        )
    case = case_of(
        known,
        known.behavior.shape(model.resolution, text=text, references=references, token=known.token),
        rank=model.lora_rank,
        branches=branches,
        targets=model.lora_targets,
        dtype=dtype,
    )
    ahead = model.prompt_folder is not None and model.encoders == "device"
    frozen = model.lora is not None and model.lora_start == "freeze"
    started = model.lora is not None and model.lora_reference == "start"
    costs = costs_of(known, case)
    held = frozen + started
    return Plan(
        costs,
        passes_of(config),
        branches=branches,
        turns=data.turns,
        steps=config.sampling.steps,
        trajectories=data.groups * data.group_size,
        rounds=training.rounds,
        sampling_batch=config.sampling.batch,
        evaluation_batch=config.evaluation.batch,
        training_batch=training.batch,
        one_by_one=known.behavior.one_by_one,
        average=training.ema_decay > 0,
        checkpointing=model.checkpointing,
        blocks=count_blocks(case),
        kept_blocks=model.kept_blocks,
        vae_slicing=model.vae_slicing,
        vae_tiling=model.vae_tiling,
        gpus=gpus,
        dtype=dtype,
        quantize=model.quantize,
        encoders="ahead" if ahead else model.encoders,
        reads_images=known.behavior.reads_images,
        more_adapters=held + (training.reset_steps is not None),
        sampler=sampler_of(config, known, case.shape, costs, sets=2 + held if sibling else 0),
        optimizer_bytes=2 if training.optimizer == "adamw_8bit" else 8,
        shard=model.shard,
    )


def sibling_of(config: Config, model: Model) -> Model | None:
    """Return the sibling that samples; None: the model samples itself.

    Raises:
        ValueError: the model is no sibling, or sharding is configured.
    """
    sampling = config.sampling
    if sampling.few_steps is None:
        return None
    from mteditflow_examples.flux.few_steps import refuse_sharded

    from mteditflow.budget import find_sibling

    refuse_sharded(sampling, config.model.shard)
    if sampling.model is None:
        return None
    with _named("sampling.model"):
        return find_sibling(model, sampling.model)


def sampler_of(
    config: Config, model: Model, shape: Shape, costs: ModelCosts, *, sets: int
) -> Sampler | None:
    """Return the costs of a few-step sampler: a sibling, a LoRA, or both; None without either.

    Args:
        config: configuration of the trainer.
        model: the trained model.
        shape: shape of a row.
        costs: costs of the model; a sibling's transformer has the same configuration.
        sets: sets of adapters on the sibling; 0: no sibling.

    Raises:
        ValueError: the file is not a LoRA of the transformer.
    """
    sampling = config.sampling
    if sampling.few_steps is None:
        return None
    from mteditflow.budget import Sampler, count_lora

    lora = 0
    if sampling.lora is not None:
        with _named("sampling.lora"):
            lora = count_lora(model, sampling.lora)
    # 2 FLOPs per weight and token; an upper bound, since some layers process only image or text.
    forward = 2.0 * lora * (shape.image_tokens + shape.text)
    return Sampler(costs.row if sets else None, sets, lora, forward)


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Prefix errors raised inside the block with an option's name.

    Raises:
        ValueError: the block raised ``ValueError`` or ``OSError``.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        own = str(error).removeprefix("source: ").removeprefix("model: ")
        raise ValueError(f"{option}: {own}") from error


def _check_runnable(config: Config, gpus: int, *, reads_images: bool) -> None:
    """Refuse configurations that the trainer refuses on ``gpus`` GPUs, and absurd resolutions.

    Raises:
        ValueError: an option conflicts with another, or with the number of GPUs.
    """
    from mteditflow_examples.flux.sharding import check_sharding

    model, data = config.model, config.data
    check_count("gpus", gpus)
    if model.resolution > LARGEST:
        raise ValueError(f"model.resolution: expected at most {LARGEST}, got {model.resolution}")
    check_sharding(model, model.shard, gpus)
    if model.shard == "fsdp2" and config.training.optimizer == "adamw_8bit":
        raise ValueError("training.optimizer: expected adamw under fsdp2, got adamw_8bit")
    whole = data.groups * (data.group_size if data.split_groups else 1)
    if whole % gpus:
        what = "trajectories" if data.split_groups else "groups, each on one GPU"
        more = -(-data.groups // gpus) * gpus
        split = not data.groups * data.group_size % gpus and not config.objective.card.whole_groups
        raise ValueError(
            f"--gpus: expected a divisor of the {whole} {what}, got {gpus}; give --data.groups "
            f"{more}{', or --data.split-groups' * split}"
        )
    if reads_images and model.prompt_folder is not None:
        raise ValueError(
            "model.prompt_folder: expected None for this model, whose text encoder reads each "
            "turn's image, too"
        )


def passes_of(config: Config) -> Passes:
    """Count forward and backward passes in the last round, where old and current policy differ.

    A gated KL counts with the largest share that its gate may reach.

    Raises:
        ValueError: the objective does not accept the configuration's numbers.
    """
    from mteditflow.budget import count_passes

    passes = count_passes(
        config.objective,
        turns=config.data.turns,
        steps=config.sampling.steps,
        group_size=config.data.group_size,
        minibatches=config.training.minibatches,
        epochs=config.training.inner_epochs,
        round=config.training.rounds - 1,
    )
    if not config.gate.auxiliary:
        return passes
    return replace(passes, reference=config.gate.maximum * passes.reference)


def techniques(config: Config, plan: Plan) -> dict[str, float]:
    """Return the cost of a trajectory under cheaper options that change the gradient.

    Args:
        config: configuration of the trainer.
        plan: its plan.

    Returns:
        Cost in units of F, one forward pass of a row, by option and value; only options that the
        configuration accepts and that lower the cost.
    """
    from mteditflow.budget import work

    given, found = work(plan).in_forwards, {}
    for section, name, value in TECHNIQUES:
        part = getattr(config, section)
        if getattr(part, name, value) <= value:
            continue
        try:
            changed = replace(config, **{section: replace(part, **{name: value})})
            passes = passes_of(changed)
        except ValueError:  # the value conflicts with others of the configuration
            continue
        cost = work(replace(plan, passes=passes, steps=changed.sampling.steps)).in_forwards
        if cost < given:
            found[f"{section}.{name} {value:g}"] = cost
    return found


if __name__ == "__main__":
    sys.exit(main())
