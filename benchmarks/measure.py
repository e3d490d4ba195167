"""Time and memory of callables, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch

Call = Callable[[], object]


def keep_freed_memory() -> bool:
    """Let the C library's allocator keep what is freed, as accelerators' caching allocators do.

    Left alone it returns large blocks to the system at moments that depend on the order of frees,
    and getting them back then costs more than the arithmetic. Returns whether it could be asked to.
    """
    options = {
        -1: 2**30,
        -3: 2**25,
    }  # glibc's trim and mmap thresholds; 32 MiB is the latter's most
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, size) for option, size in options.items())


def interleaved_seconds(
    calls: Mapping[str, Call],
    *,
    device: str,
    rounds: int,
    sample_seconds: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of one call, a list over rounds for each candidate.

    Every round times every candidate, in an order drawn anew, so that a drift of the machine meets
    all of them. A sample begins with a call that is not timed, since the candidate before leaves
    its own state of caches and allocator, and repeats a short call for ``sample_seconds``.
    ``clock`` may be ``time.process_time``, which a busy machine disturbs least.
    """
    repeats = {}
    for name, call in calls.items():
        _seconds(call, device)  # compiles
        repeats[name] = math.ceil(sample_seconds / _seconds(call, device))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffler = list(calls), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            _seconds(calls[name], device)
            seconds[name].append(_seconds(calls[name], device, repeats[name], clock))
    return seconds


def _seconds(
    call: Call,
    device: str,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    _synchronize(device)
    start = clock()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return (clock() - start) / repeats


def peak_bytes(call: Call, *, device: str) -> int:
    """Most memory that a call holds at any moment, above what was there before it.

    On the CPU the running sum of the allocator's events as ``torch.profiler`` records them: every
    tensor and every temporary, to the byte. On CUDA the caching allocator's own peak counter.
    """
    call()  # lazy initialisations are not the call's
    gc.collect()  # nor is what it frees of others' garbage
    if torch.device(device).type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in events), initial=0))


def ratios(ours: Sequence[float], plain: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of ours / plain over rounds: first, median, third."""
    low, median, high = statistics.quantiles(
        (a / b for a, b in zip(ours, plain, strict=True)), n=4, method="inclusive"
    )
    return low, median, high


def median_interval(
    ours: Sequence[float], plain: Sequence[float], *, resamples: int = 1000
) -> tuple[float, float, float]:
    """Median of ours / plain over rounds within its 95 % bootstrap interval: low, median, high."""
    paired = [a / b for a, b in zip(ours, plain, strict=True)]
    generator = random.Random(0)
    medians = [
        statistics.median(generator.choices(paired, k=len(paired))) for _ in range(resamples)
    ]
    low, *_, high = statistics.quantiles(medians, n=40, method="inclusive")
    return low, statistics.median(paired), high


def straight_line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Exponent of the growth (slope of the logarithms), and R^2 of a straight line through it."""
    logs = [math.log(x) for x in sizes], [math.log(y) for y in seconds]
    exponent = statistics.linear_regression(*logs).slope
    return exponent, statistics.correlation(sizes, seconds) ** 2


@contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that the profiler's C++ writes to standard error."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
