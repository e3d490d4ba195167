"""What a run leaves behind in numbers: ``report.json``."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mteditflow._files import write_atomically
from mteditflow.evaluation.comparison import compare
from mteditflow.evaluation.evaluation import Evaluation
from mteditflow.metrics import Interval
from mteditflow.training.round_rewards import LOST
from mteditflow.training.run_log import SECONDS
from mteditflow.training.stopwatch import shares

PACKAGES = ("mteditflow", "torch", "diffusers", "transformers", "peft", "accelerate")


def run_report(
    before: Evaluation,
    after: Evaluation,
    metrics: Sequence[Mapping[str, float]],
    *,
    config: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Put everything that a run has shown into what JSON can hold.

    Args:
        before: of the model as it came.
        after: of the same chains, after training.
        metrics: ``RunLog.metrics``, with the names of ``RoundRewards.numbers``.
        config: the run's settings, of types that JSON has (paths and enumerations become text).
        seed: of the run.

    Returns:
        "before" and "after": metrics per turn, and their ends as "<metric>_interval";
        "difference_at_last_turn": paired, with "kept"; "seconds" and "time" by phase;
        "invalid_reward_share", "lost_answers" by reason; and what the run was made with. ``None``
        stands for a number that there is not.
    """
    report = {
        "seed": seed,
        "rounds": len(metrics),
        "held_out_chains": len(before),
        "before": evaluation_report(before),
        "after": evaluation_report(after),
        "difference_at_last_turn": comparison_report(before, after),
        **_totals(metrics),
        "config": config,
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    return {name: _plain(value) for name, value in report.items()}


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``report.json`` into the run's folder, atomically."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "report.json", text.encode())


def evaluation_report(evaluation: Evaluation) -> dict[str, Any]:
    """Return the metrics of an evaluation, rounded: per turn, each with its interval's ends."""
    metrics = _with_intervals(evaluation.metrics)
    counts = {"round": evaluation.round, "counted_chains": evaluation.counted}
    return counts | {"lost_scores": evaluation.lost} | metrics


def comparison_report(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Return the paired differences at the last turn, rounded, each with its interval's ends."""
    found = compare(before, after)
    kept = {f"{name}_kept_difference": x for name, x in found.kept_difference.items()}
    return {
        "turn": found.turn,
        "chains": found.chains,
        **_with_intervals({**found.difference, **kept}),
        "kept": {name: list(shares) for name, shares in found.kept.items()},
    }


def _with_intervals(metrics: Mapping[str, Interval]) -> dict[str, Any]:
    """Each metric as a number or a list of them, and beside it [low, high] or a list of these."""
    flat: dict[str, Any] = {}
    for name, interval in metrics.items():
        ends = torch.stack([interval.low, interval.high], dim=-1)
        flat[name], flat[f"{name}_interval"] = _rounded(interval.estimate), _rounded(ends)
    return flat


def _totals(metrics: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Sums over rounds: time by phase, invalid rewards, and lost answers by reason."""
    count = math.fsum(_known(line, "trajectories") for line in metrics)
    invalid = math.fsum(
        _known(line, "invalid_share") * _known(line, "trajectories") for line in metrics
    )
    seconds = _sums(metrics, SECONDS)
    lost = {name: int(total) for name, total in _sums(metrics, LOST).items()}
    return {
        "seconds": math.fsum(seconds.values()),
        "time": {name: [seconds[name], share] for name, share in shares(seconds).items()},
        "invalid_reward_share": invalid / max(count, 1),
        "lost_answers": {"share": sum(lost.values()) / max(count, 1), "reasons": lost},
    }


def _sums(metrics: Sequence[Mapping[str, float]], prefix: str) -> dict[str, float]:
    """Total of each number whose name begins so, without the prefix, the largest first."""
    names = dict.fromkeys(name for line in metrics for name in line if name.startswith(prefix))
    totals = {name: math.fsum(_known(line, name) for line in metrics) for name in names}
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    return {name.removeprefix(prefix): total for name, total in ranked}


def _known(line: Mapping[str, float], name: str) -> float:
    """A number of a round, 0 if there is none."""
    value = line.get(name, 0.0)
    return value if math.isfinite(value) else 0.0


def _rounded(x: Tensor) -> Any:
    """Numbers to the fourth place."""
    return ((1e4 * x.double()).round() / 1e4).tolist()


def _devices() -> list[str]:
    """The accelerators that this process sees, or the processor."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return names or [f"{platform.machine()}, {os.cpu_count()} cores"]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES if find_spec(name)}


def _plain(value: Any) -> Any:
    """What JSON holds: ``None`` for NaN, text for what it does not know."""
    if isinstance(value, Mapping):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
