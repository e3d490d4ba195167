"""Check a training run before it starts: everything short of loading weights.

    mteditflow dry-run kontext-nft --memory 48 --gpus 6 --data.chains train.jsonl ...

All options of the trainer after the preset are accepted. It reads chains and every image, finds the
checkpoint to resume from, counts the tokens of instructions, lets judge and servers, or the scorer,
score one chain whose turns change nothing, and predicts memory. Nothing is written into the output
folder. The exit code is 0 if the run can start, 2 with one line if it cannot.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from mteditflow_examples.budget import Arguments, budget_of, refuse_unknown

from mteditflow._exits import refusing
from mteditflow._pipes import reader_may_leave

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator
    from mteditflow_examples.flux.config import Config
    from mteditflow_examples.flux.inputs import Inputs

LARGEST = 10**6  # tokens
USAGE = """\
mteditflow dry-run PRESET|FILE.toml [--memory GIB] [--gpus N]
                          [objective:NAME] [--SECTION.FIELD VALUE ...]"""


def main() -> int:
    """Run the command line."""
    options = Arguments(
        prog="mteditflow dry-run",
        usage=USAGE,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    options.add_argument(
        "--memory", type=float, help="memory of a GPU, GiB as in nvidia-smi; else not compared"
    )
    options.add_argument("--gpus", type=int, default=1, help="number of training GPUs; 1")
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        with reader_may_leave():
            options.print_help()
        return 0 if words else 2
    own, rest = options.parse_known_args(words)
    from mteditflow_examples.flux.command_line import parse_or_exit

    with refusing(), reader_may_leave():
        refuse_unknown(rest, list(vars(own)))
        for line in checks(rest[0], parse_or_exit(rest), gpus=own.gpus, memory=own.memory):
            print(line, flush=True)
    return 0


def checks(name: str, config: Config, *, gpus: int, memory: float | None) -> Iterator[str]:
    """Yield one line for each part of a run that passed its check.

    Args:
        name: name of the preset.
        config: configuration of the trainer.
        gpus: number of training GPUs.
        memory: memory of a GPU, GiB; None: a prediction is not compared with it.

    Raises:
        ValueError: the run cannot start; the message names the option.
    """
    from accelerate import Accelerator
    from mteditflow_examples.flux.inputs import check, make_sampler, read_inputs

    check(config)
    yield f"options: {name} is sound; files, folders and trackers exist"
    yield from _memory(name, config, gpus=gpus, memory=memory)
    inputs = read_inputs(config, Accelerator(cpu=True))
    launch = SimpleNamespace(num_processes=gpus, process_index=0)
    make_sampler(config, inputs.chains, cast("Accelerator", launch))
    if inputs.found is not None:
        yield f"output: resumes after round {inputs.found.round}, from {inputs.found.path}"
    yield _images(inputs)
    yield from _instructions(config, inputs)
    yield _rewards(config, inputs)
    data, training = config.data, config.training
    yield (
        f"would run: {training.rounds} rounds of {data.groups} groups of {data.group_size}, "
        f"{data.turns} turns each, on {gpus} GPU{'s' * (gpus > 1)}, into {config.output.folder}"
    )


def _memory(name: str, config: Config, *, gpus: int, memory: float | None) -> Iterator[str]:
    """Predict the peak of a GPU's memory, and compare it with the memory of one.

    Raises:
        ValueError: it does not fit as configured.
    """
    from mteditflow.budget import find_model, peak

    try:
        find_model(config.model.path)
    except ValueError as error:
        yield f"memory: not predicted; {str(error).removeprefix('model: ')}"
        return
    budget = budget_of(name, config, memory=memory or 80.0, gpus=gpus)
    highest = peak(budget.plan)
    line = f"{highest.total / 2**30:.1f} GiB at the peak ({highest.name}), predicted"
    if memory is not None and budget.as_given == "no":
        raise ValueError(
            f"--memory: expected a run that fits {memory:g} GiB, got {line}; mteditflow budget "
            "lists options that make it fit"
        )
    fits = "" if memory is None else f": {budget.as_given} on {memory:g} GiB"
    yield f"memory: {line}{fits}"


def _images(inputs: Inputs) -> str:
    """Read the reference image of every chain.

    Raises:
        ChainError: an image is missing or broken.
    """
    counts = {}
    parts = {"to train": inputs.chains, "held out": inputs.held_out and inputs.held_out.chains}
    for title, chains in parts.items():
        if chains:
            seen = {chain.image: row for row, chain in enumerate(chains.chains) if chain.image}
            for row in seen.values():
                _ = chains[row].image
            counts[title] = f"{len(chains)} {title} ({len(seen)} images)"
    return f"chains: {', '.join(counts.values())}; every image is readable"


def _instructions(config: Config, inputs: Inputs) -> Iterator[str]:
    """Count the tokens of the instructions by each tokenizer, and compare them with its limit."""
    from mteditflow_examples.flux.loading import family_of
    from transformers import AutoTokenizer

    texts = {text for chain in inputs.chains.chains for text in chain.instructions}
    family, name = family_of(config.model.path), "max_sequence_length"
    known = signature(family.pipeline.__call__).parameters
    longest_input = config.model.options.get(name, known[name].default if name in known else None)
    parts = list(signature(family.pipeline.__init__).parameters)
    tokenizers = sorted(part for part in parts if part.startswith("tokenizer"))
    if longest_input is None or not tokenizers:
        yield f"instructions: {len(texts)}; their tokens are not counted for this pipeline"
        return
    counts, warnings = [], []
    for part in tokenizers:
        try:
            encode = AutoTokenizer.from_pretrained(config.model.path, subfolder=part)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            counts.append(f"not counted by {part}: {reason}")
            continue
        # The last tokenizer feeds the encoder of the option; CLIP's have a fixed length, 77.
        limit = longest_input if part == tokenizers[-1] else encode.model_max_length
        if limit > LARGEST:  # transformers' number for a tokenizer without a limit
            counts.append(f"not counted by {part}, which has no limit")
            continue
        lengths = {text: len(encode(text).input_ids) for text in texts}
        longest = max(lengths, key=lengths.__getitem__)
        counts.append(f"of at most {lengths[longest]} tokens of {limit} ({part})")
        if cut := sum(length > limit for length in lengths.values()):
            warnings.append(
                f"warning: {cut} instructions lose their end in {part}, the longest is "
                f"{longest[:60]!r}"
            )
    yield f"instructions: {len(texts)}, {', '.join(counts)}"
    yield from warnings


def _rewards(config: Config, inputs: Inputs) -> str:
    """Score one chain whose turns change nothing by the configured services or scorer.

    Raises:
        ConfigError: a trained or auxiliary reward is missing.
        ValueError: a score was lost.
    """
    import torch
    from mteditflow_examples.flux.advantages import round_rewards
    from mteditflow_examples.flux.config import IDENTITY, ConfigError
    from mteditflow_examples.flux.scoring import scoring
    from PIL import Image

    example, side = inputs.chains[0], config.model.resolution
    chain, turn = example.chain, example.image or Image.new("RGB", (side, side))
    images = [example.image, *[turn] * chain.turns]
    with TemporaryDirectory() as folder, scoring(config.rewards, Path(folder) / "cache") as submit:
        begun = time.perf_counter()
        terms = dict(submit([chain], [images]).result())
        seconds = time.perf_counter() - begun
    for name, scores in terms.items():
        if scores.lost:
            raise ValueError(
                f"rewards: expected {name} of chain {chain.id!r}, got "
                f"{next(iter(scores.lost.values()))}"
            )
    wanted = {n: x for n, x in config.rewards.weights.items() if n != IDENTITY}
    missing = [n for n in config.gate.auxiliary if n not in terms]
    if missing:
        raise ConfigError(f"gate.auxiliary: expected names among {sorted(terms)}, got {missing[0]}")
    if config.objective.card.rewarded:
        rewards = replace(config.rewards, weights=wanted)
        round_rewards(rewards, terms, torch.zeros(1, dtype=torch.int64, device="cpu"))
    calls = config.data.groups * config.data.group_size
    calls *= config.data.turns if config.rewards.scope == "turn" else 1
    each = "judge calls" if config.rewards.judge else "trajectories to score"
    return (
        f"rewards: {', '.join(terms)} of one chain in {seconds:.1f} s; a round has {calls} {each}"
    )


if __name__ == "__main__":
    sys.exit(main())
