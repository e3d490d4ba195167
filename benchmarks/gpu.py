"""``benchmarks/gpu.sh``: what one GPU shows in two parts of at most four minutes each.

``functions`` measures the library's functions beside plain code, eager and compiled, and the tiny
families in bfloat16; ``models`` measures Kontext and klein-9B at full size with random weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import measure, report, rewards_page
from benchmarks.__main__ import measure_compiled, measure_pair
from benchmarks.cases import cases, compiled_cases, in_dtype
from benchmarks.gpu_models import (
    COLUMNS,
    FAILURES,
    NOT_REACHED,
    Deadline,
    failed,
    family_rows,
    model_rows,
    tiny_size,
)
from benchmarks.trainer_batch import environment
from benchmarks.trainer_full_size import SIZES

HEADER = """\
# Benchmarks on one GPU

Made by `benchmarks/gpu.sh`; do not edit. Each part ends by itself within its time: what it did not
come to reads "not reached".
"""
SECONDS = 190.0  # of four minutes; imports and the last piece of work take the rest
COMPILING = 30.0  # seconds that compiling a pair of functions may take
SMALL = {"latents": (4, 4, 32, 32), "samples": 60, "groups": 12}
FUNCTIONS = ("function", "dtype", "plain, ms", "ours, ms", "ours / plain", "memory, ours / plain")
COMPILED = ("compiled function", "plain, ms", "ours, ms", "ours / plain")
FAMILIES = ("tiny family", "what", "seconds", "over plain calls", "samples")
ABOUT_FUNCTIONS = """\
Functions beside plain code of the same formula (`benchmarks/plain.py`), which agree first; plain
code computes in float32. Ratios are medians over rounds, compiled ones with both sides compiled.
Families are the tiny ones of the shapes world in bfloat16: one trajectory of 3 turns by the
pipeline's own sampler, plain and recorded, and updates on a recorded one."""
ABOUT_MODELS = """\
Random weights of the real architectures, bfloat16, adapters of rank {rank} in float32,
{resolution} x {resolution}, one trajectory of 3 turns of {steps} steps, micro-batches of one row.
NFT is the preset `kontext-nft` with an old policy that differs, GRPO is `kontext-grpo` with 2
stochastic steps a turn. FLOP are the model's, adapters included, a recomputed forward and the VAE
not. The matrix rate is that of one product of 8192 x 8192 matrices here; the stated peak is the
maker's. Peak memory is the allocator's, weights included, and beside it what `mteditflow budget`
predicts; there are no text encoders. int8 (torchao) and nf4 (bitsandbytes) are of the linear layers
in blocks."""
TRIAL = "A trial of the program on small inputs and tiny models, which says nothing of a GPU."
Tables = list[dict[str, Any]]


def functions(options: argparse.Namespace, save: Callable[[Tables], None]) -> None:
    """Measure functions, families, compiled functions."""
    deadline, device = Deadline(options.seconds), options.device
    rounds, small = (2, SMALL) if options.tiny else (11, {})
    tables: Tables = [
        {"columns": columns, "rows": []} for columns in (FUNCTIONS, FAMILIES, COMPILED)
    ]
    pairs, families, compiled = (table["rows"] for table in tables)
    for case in cases(device, **small):
        many = any(x.ndim > 1 for x in case.inputs)
        for dtype in (torch.float32, torch.bfloat16) if many else (torch.float32,):
            pairs.append([case.name, str(dtype).removeprefix("torch."), NOT_REACHED, *["-"] * 3])
            if deadline.allows(5):
                given = in_dtype(case, dtype)
                try:
                    found = measure_pair(given, device=device, rounds=rounds, compiled=False)
                except FAILURES as error:
                    pairs[-1][2] = failed(error)
                    continue
                pairs[-1][2:] = [*milliseconds(found), found["time_ratio"][1], memory(found)]
    save(tables)
    for name in SIZES:
        given = (name, tiny_size(name), device, torch.bfloat16, deadline)
        try:
            families.extend(family_rows(*given, rounds=rounds))
        except FAILURES as error:
            families.append([name, "all", failed(error), "-", 0])
        save(tables)
    for case in compiled_cases(device, **({"latents": SMALL["latents"]} if small else {})):
        compiled.append([case.name, NOT_REACHED, "-", "-"])
        if deadline.allows(COMPILING):
            try:
                found = measure_compiled(case, device=device, rounds=rounds)
                compiled[-1][1:] = [*milliseconds(found), found["time_ratio"][1]]
            except FAILURES as error:
                compiled[-1][1] = failed(error)
        save(tables)


def models(options: argparse.Namespace, save: Callable[[Tables], None]) -> None:
    """Measure the models at full size; each gets its share of the time that is left."""
    deadline = Deadline(options.seconds)
    if options.dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")  # as the trainer does
    table: dict[str, Any] = {"columns": COLUMNS, "rows": []}
    for number, (name, size) in enumerate(SIZES.items()):
        share = Deadline(deadline.left / (len(SIZES) - number))
        given = tiny_size(name) if options.tiny else size
        dtype = getattr(torch, options.dtype)
        for row in model_rows(name, given, options.device, dtype, share):
            table["rows"].append(row)
            save([table])


def milliseconds(found: dict[str, Any]) -> list[float]:
    """Milliseconds of the plain function and of ours."""
    return [1e3 * found["seconds"][name] for name in ("plain", "ours")]


def memory(found: dict[str, Any]) -> Any:
    """Peak memory of our function over that of the plain one."""
    peaks = found["bytes"]
    return peaks["ours"] / peaks["plain"] if peaks and peaks["plain"] else "-"


def parser() -> argparse.ArgumentParser:
    """Read the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    made.add_argument("part", choices=("functions", "models"))
    made.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    made.add_argument("--dtype", default="bfloat16", help="of models: bfloat16 or float32")
    made.add_argument("--seconds", type=float, default=SECONDS, help="after which nothing begins")
    made.add_argument("--tiny", action="store_true", help="small inputs and tiny models")
    report.add_output(made)
    return made


def main() -> None:
    """Measure one part, and write ``gpu.json`` and ``gpu.md`` as it goes."""
    read = parser()
    options = read.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        read.error(f"--device: expected one that torch finds, got {options.device}")
    if torch.device(options.device).type == "cpu":
        torch.set_num_threads(1)
        measure.keep_freed_memory()
    about = environment(options.device)
    size = next(iter(SIZES.values()))
    texts = {
        "functions": ABOUT_FUNCTIONS,
        "models": ABOUT_MODELS.format(rank=size.rank, resolution=size.resolution, steps=size.steps),
    }
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "diffusers", "peft"))
    name = f"{options.part}{', tiny' if options.tiny else ''}: {about['device']}"
    start = time.monotonic()

    def save(tables: Tables) -> None:
        text = f"{versions}.\n\n{TRIAL if options.tiny else texts[options.part]}"
        section = {"about": text, "environment": about, "tables": tables}
        rewards_page.write(options.output, name, section, page="gpu", header=HEADER)

    {"functions": functions, "models": models}[options.part](options, save)
    print((options.output / "gpu.md").read_text())
    print(f"{time.monotonic() - start:.0f} s; written to {options.output / 'gpu.md'}")


if __name__ == "__main__":
    main()
