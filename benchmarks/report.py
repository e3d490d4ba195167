"""Results as JSON, one entry per device, and the page that is made from it."""

from __future__ import annotations

import argparse
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import mteditflow

HEADER = """\
# Benchmarks

Made by `python -m benchmarks` (`make benchmark`); do not edit. Each function is measured beside a
plain implementation of the same formula (`benchmarks/plain.py`) in one run and checked to agree
with it first. Candidates take turns within each round, so a busy machine slows them alike. A ratio
is ours / plain: the median over rounds of the ratio within a round, with its quartiles in
brackets. Memory is the peak above the inputs; on the CPU the running sum of the allocator's events
as `torch.profiler` records them, on CUDA the allocator's own peak. On Linux malloc is told to keep
freed memory: by default it hands large blocks back and fetches them again, page by page, whenever
the order of frees suits it, which makes all times longer and ratios erratic (`--system-malloc`).
"""


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--output``: a folder, which is made before anything is measured."""
    here = Path(__file__).parent
    parser.add_argument("--output", type=_folder, default=here, help="folder of the page")


def _folder(path: str) -> Path:
    output = Path(path)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"expected a folder, got {path}: {error}") from error
    return output


def environment(device: str) -> dict[str, Any]:
    """Return versions and machine of the figures."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "malloc": "system default",
        "mteditflow": mteditflow.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(folder: Path, device: str, results: dict[str, Any]) -> None:
    """Replace this device's entry in ``results.json`` and render all of them anew."""
    path = folder / "results.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[device] = results
    path.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
    (folder / "results.md").write_text(render(everything))


def render(everything: dict[str, Any]) -> str:
    """The whole page."""
    return "\n".join([HEADER, *(_section(*item) for item in sorted(everything.items()))])


def _section(device: str, results: dict[str, Any]) -> str:
    about = results["environment"]
    lines = [
        f"## {device}: {about['device']}, {about['threads']} thread"
        + ("s" if about["threads"] > 1 else ""),
        "",
        f"{about['date']}; mteditflow {about['mteditflow']}, torch {about['torch']}, "
        f"python {about['python']}. Latents {results['latents']}, float32; group advantages of "
        f"{results['samples']:,} samples in {results['groups']:,} groups; "
        f"{results['rounds']} rounds; malloc: {about['malloc']}.",
        "",
        "### Time, milliseconds",
        "",
        "| function | plain | ours | ratio | limit | | plain compiled | ours compiled |",
        "|---|--:|--:|--:|--:|---|--:|--:|",
        *(_time_row(pair) for pair in results["pairs"]),
        "",
        *_compiled_section(results.get("compiled", [])),
        "### Peak memory, MiB",
        "",
        "| function | plain | ours | ratio | limit | |",
        "|---|--:|--:|--:|--:|---|",
        *(_memory_row(pair) for pair in results["pairs"] if pair["bytes"]),
        "",
        "### Growth",
        "",
        "Time against one axis, the others fixed: 1 is linear growth, less is a fixed cost that "
        "larger sizes share. R² is that of a straight line.",
        "",
        "| what | lengths | milliseconds | exponent | R² |",
        "|---|---|---|--:|--:|",
        *(_growth_row(growth) for growth in results["growths"]),
        "",
    ]
    return "\n".join(lines)


def _compiled_section(compiled: list[dict[str, Any]]) -> list[str]:
    """Rows of compiled functions; none where they were not measured."""
    if not compiled:
        return []
    return [
        "### Compiled, milliseconds",
        "",
        "Each side by `torch.compile(fullgraph=True)`, with latents in the dtype named; the plain "
        "formula casts them to float32, as ours does. On the CPU this is CPU time. In brackets the "
        "95 % bootstrap interval of the median ratio over rounds.",
        "",
        "| function | plain | ours | ratio | limit | |",
        "|---|--:|--:|--:|--:|---|",
        *(_compiled_row(result) for result in compiled),
        "",
    ]


def _compiled_row(result: dict[str, Any]) -> str:
    low, ratio, high = result["time_ratio"]
    cells = [
        result["name"],
        *(_milliseconds(result["seconds"][name]) for name in ("plain", "ours")),
        f"{ratio:.3f} ({low:.3f}..{high:.3f})",
        _limit(result["time_limit"]),
        met(ratio, result["time_limit"]),
    ]
    return f"| {' | '.join(cells)} |"


def met(ratio: float, limit: float | None) -> str:
    """Verdict on a ratio."""
    return "" if limit is None else "met" if ratio <= limit else "MISSED"


def _time_row(pair: dict[str, Any]) -> str:
    low, ratio, high = pair["time_ratio"]
    cells = [
        pair["name"],
        *(_milliseconds(pair["seconds"].get(name)) for name in ("plain", "ours")),
        f"{ratio:.3g} ({low:.3g}..{high:.3g})",
        _limit(pair["time_limit"]),
        met(ratio, pair["time_limit"]),
        *(_milliseconds(pair["seconds"].get(f"{name} compiled")) for name in ("plain", "ours")),
    ]
    return f"| {' | '.join(cells)} |"


def _memory_row(pair: dict[str, Any]) -> str:
    plain, ours = pair["bytes"]["plain"], pair["bytes"]["ours"]
    cells = [
        pair["name"],
        f"{plain / 2**20:.1f}",
        f"{ours / 2**20:.1f}",
        f"{ours / plain:.2f}",
        _limit(pair["memory_limit"]),
        met(ours / plain, pair["memory_limit"]),
    ]
    return f"| {' | '.join(cells)} |"


def _growth_row(growth: dict[str, Any]) -> str:
    cells = [
        growth["name"],
        ", ".join(map(str, growth["lengths"])),
        ", ".join(f"{1e3 * seconds:.3g}" for seconds in growth["seconds"]),
        f"{growth['exponent']:.2f}",
        f"{growth['r_squared']:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g}"


def _limit(limit: float | None) -> str:
    return "" if limit is None else f"{limit:g}"
