"""``python -m benchmarks``: measure, print, and write ``results.json`` and ``results.md``."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import measure, report
from benchmarks.cases import GROUPS, LATENTS, SAMPLES, Case, cases, compiled_cases, growths

LENGTHS = (4, 8, 16, 32)


def measure_pair(case: Case, *, device: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """Time and memory of a function and its plain twin, which must agree."""
    torch.testing.assert_close(
        case.run(case.ours),
        case.run(case.plain),
        rtol=rounding(case),
        atol=1e-5,
        check_dtype=False,
    )
    functions = {"plain": case.plain, "ours": case.ours}
    peaks = {
        name: measure.peak_bytes(lambda f=f: case.run(f), device=device)
        for name, f in functions.items()
        if case.plain_in_torch
    }
    if compiled:
        functions["ours compiled"] = torch.compile(case.ours, fullgraph=True)
        if case.plain_in_torch:
            functions["plain compiled"] = torch.compile(case.plain, fullgraph=True)
    seconds = measure.interleaved_seconds(
        {name: lambda f=f: case.run(f) for name, f in functions.items()},
        device=device,
        rounds=rounds,
    )
    return {
        "name": case.name,
        "seconds": {name: statistics.median(samples) for name, samples in seconds.items()},
        "time_ratio": measure.ratios(seconds["ours"], seconds["plain"]),
        "time_limit": case.time_limit,
        "bytes": peaks,
        "memory_limit": case.memory_limit,
    }


def rounding(case: Case) -> float:
    """Relative difference that the dtype of the inputs explains."""
    return 1e-3 if case.inputs[0].dtype == torch.float32 else 2e-2


def measure_compiled(case: Case, *, device: str, rounds: int) -> dict[str, Any]:
    """Time of the compiled function beside the compiled plain formula, on the CPU in CPU time.

    Raises:
        AssertionError: the two disagree by more than the rounding of their inputs' dtype.
    """
    torch.compiler.reset()  # else earlier cases make shapes dynamic
    ours, plain = (torch.compile(f, fullgraph=True) for f in (case.ours, case.plain))
    torch.testing.assert_close(
        case.run(ours), case.run(plain), rtol=rounding(case), atol=1e-5, check_dtype=False
    )
    seconds = measure.interleaved_seconds(
        {"plain": lambda: case.run(plain), "ours": lambda: case.run(ours)},
        device=device,
        rounds=rounds,
        sample_seconds=0.05,
        clock=time.process_time if torch.device(device).type == "cpu" else time.perf_counter,
    )
    return {
        "name": case.name,
        "seconds": {name: statistics.median(samples) for name, samples in seconds.items()},
        "time_ratio": measure.median_interval(seconds["ours"], seconds["plain"]),
        "time_limit": case.time_limit,
    }


def measure_growths(*, device: str, rounds: int, lengths: Sequence[int], **size: Any) -> list[Any]:
    """How time grows along each axis."""
    results = []
    for name, function in growths(device, **size).items():
        calls = {str(length): lambda f=function, n=length: f(n) for length in lengths}
        samples = measure.interleaved_seconds(calls, device=device, rounds=rounds)
        seconds = [statistics.median(samples[str(length)]) for length in lengths]
        exponent, r_squared = measure.straight_line(lengths, seconds)
        results.append(
            {
                "name": name,
                "lengths": list(lengths),
                "seconds": seconds,
                "exponent": exponent,
                "r_squared": r_squared,
            }
        )
    return results


def main() -> bool:
    """Run all; return whether every limit is met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--rounds", type=int, default=21, help="samples of each candidate")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument(
        "--system-malloc", action="store_true", help="leave the C allocator as it is"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave compiled figures out")
    report.add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keeps_memory = not options.system_malloc and measure.keep_freed_memory()

    pairs = []
    for case in cases(options.device):
        if options.only not in case.name:
            continue
        pair = measure_pair(
            case, device=options.device, rounds=options.rounds, compiled=not options.no_compile
        )
        pairs.append(pair)
        _print_ratio(pair)
    compiled = []
    for case in [] if options.no_compile else compiled_cases(options.device):
        if options.only not in f"compiled {case.name}":
            continue
        compiled.append(measure_compiled(case, device=options.device, rounds=options.rounds))
        _print_ratio(compiled[-1], prefix="compiled ")
    if options.only:
        return True
    results = {
        "environment": {
            **report.environment(options.device),
            "malloc": "keeps freed memory" if keeps_memory else "system default",
        },
        "latents": list(LATENTS),
        "samples": SAMPLES,
        "groups": GROUPS,
        "rounds": options.rounds,
        "pairs": pairs,
        "compiled": compiled,
        "growths": measure_growths(
            device=options.device, rounds=max(3, options.rounds // 3), lengths=LENGTHS
        ),
    }
    report.write(options.output, options.device, results)
    page = report.render({options.device: results})
    print(f"\n{page}\nWritten to {options.output / 'results.md'}")
    return "MISSED" not in page


def _print_ratio(result: dict[str, Any], *, prefix: str = "") -> None:
    low, ratio, high = result["time_ratio"]
    verdict = report.met(ratio, result["time_limit"])
    name = prefix + result["name"]
    print(f"{name:60} {ratio:7.4f} ({low:.4f}..{high:.4f}) {verdict}", flush=True)


if __name__ == "__main__":
    raise SystemExit(not main())
