"""Drift monitoring of a run: statistics of its images, and alarms. Neither affects training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from mteditflow import gather_ranks, wear
from mteditflow.drift import (
    DriftAlarm,
    Reading,
    brightness,
    color_entropy,
    edge_density,
    group_distance,
    high_frequency_share,
    saturation,
    sharpness,
    thumbnails,
)
from mteditflow.evaluation.evaluation import FOLLOWING
from mteditflow.rewards import TurnScores

from .reporting import DRIFT, draw
from .run import Run
from .sampling import RoundChains, Scores
from .scorers import edited_pixels
from .scoring import scale_of

STATISTICS = {
    "sharpness": sharpness,
    "color_entropy": color_entropy,
    "brightness": brightness,
    "saturation": saturation,
    "edge_density": edge_density,
    "high_frequency_share": high_frequency_share,
}
OUTSIDE, VARIETY, THUMBNAILS = "change_outside_edits", "group_distance", "thumbnails"
COLUMN, TURN, PICTURE = "drift/", "/turn_", "drift"  # parts of metric and file names
SIDE = 8  # cells of a thumbnail along each axis
FEATURES = 3 * SIDE**2
PIXELS = 2**21  # pixels measured at once, to bound memory; at least one image
SHOWN = 3  # most strips in the picture of alarms


def watch_drift(
    run: Run, drawn: RoundChains, images: Sequence[Sequence[Image | None]], scores: Scores
) -> None:
    """Measure images of the round, log the statistics and alarms; a collective call.

    The first ``safety.drift_members`` trajectories of each group are measured. Neither statistics
    nor alarms affect training, and no alarm stops the run.
    """
    if run.drift is None:
        return
    with run.log.stopwatch.phase("drift"):
        rows = measured_rows(run, len(images))
        own = measure(run, drawn, images, rows)
        of_rank = [x.to(run.device) for x in (*own.values(), drawn.group[rows])]
        *values, group = (x.cpu() for x in gather_ranks(*of_rank)[0])
        readings = read(dict(zip(own, values, strict=True)), group)
        run.numbers |= _columns(readings)
        alarms = run.drift.check({f"{n}{TURN}{t}": x for (n, t), x in readings.items()})
        run.numbers[DRIFT] = len(run.drift.outside)
    if alarms:
        picture = f"pictures/round-{run.state.done + 1:06d}-{PICTURE}.png"
        _record(run, alarms, picture)
        if run.main and rows:
            _draw_alarms(run, alarms, drawn, images, scores, rows, own)


def _columns(readings: Mapping[tuple[str, int], Reading]) -> dict[str, float]:
    """Return metrics by name, per turn and for references, without NaN."""
    columns = {f"{COLUMN}{name}{TURN}{turn}": x.value for (name, turn), x in readings.items()}
    columns |= {f"{COLUMN}{name}/reference": x.reference for (name, _), x in readings.items()}
    return {name: x for name, x in columns.items() if math.isfinite(x)}


def measured_rows(run: Run, count: int) -> list[int]:
    """Return the rows on this rank of the first trajectories of each group of the round."""
    size, most = run.config.data.group_size, run.config.safety.drift_members
    return [b for b in range(count) if (run.key.first + b) % size < most]


def measure(
    run: Run, drawn: RoundChains, images: Sequence[Sequence[Image | None]], rows: Sequence[int]
) -> dict[str, Tensor]:
    """Measure R trajectories of N turns.

    Returns:
        Each statistic by name, float32 [R, N + 1] with the reference first; NaN for a missing
        reference, and for the change outside edits if the scorer gives no edited pixels.
        "thumbnails" is [R, N, F].
    """
    turns = drawn.edits.shape[1]
    # By identity, since members of a group share one reference image; it is measured once.
    pictures = {id(x): x for b in rows for x in images[b] if x is not None}
    found = _statistics(list(pictures.values()))
    place = {key: i for i, key in enumerate(pictures)}
    index = [[-1 if x is None else place[id(x)] for x in images[b]] for b in rows]
    where = torch.tensor(index, dtype=torch.int64, device="cpu").reshape(-1, turns + 1)
    table = {  # index -1, a missing reference, reads the appended NaN
        name: torch.cat([found[name], found[name].new_full((1,), math.nan)])[where]
        for name in STATISTICS
    }
    masks = {drawn.chains[b].id: _edited(run, drawn, images[b][0], b) for b in rows}
    table[OUTSIDE] = torch.full(where.shape, math.nan, dtype=torch.float32, device="cpu")
    for row, b in enumerate(rows):
        mask = masks[drawn.chains[b].id]
        if mask is not None:
            table[OUTSIDE][row, 0] = 0.0
            table[OUTSIDE][row, 1:] = _change_outside(images[b], mask)
    table[THUMBNAILS] = found[THUMBNAILS][where[:, 1:]]
    return table


def read(table: Mapping[str, Tensor], group: Tensor) -> dict[tuple[str, int], Reading]:
    """Return the mean of each statistic by (statistic, turn), with its standard error over groups.

    Args:
        table: statistics of all ranks, as returned by ``measure``.
        group: integer group id, [R].
    """
    readings = {}
    for name, value in _with_variety(table, group).items():
        reference, *turns = value.double().unbind(dim=1)
        for turn, own in enumerate(turns, start=1):
            # Value minus reference, as DriftWatch compares it: the content of the chains cancels.
            error = _error(own - reference.nan_to_num(0.0), group)
            mean, start = float(own.nanmean()), float(reference.nanmean())
            readings[name, turn] = Reading(mean, start, error)
    return readings


def _with_variety(table: Mapping[str, Tensor], group: Tensor) -> dict[str, Tensor]:
    """Replace the thumbnails by distances within groups, [R, N + 1]; NaN for references."""
    distance = group_distance(table[THUMBNAILS], group)
    variety = torch.cat([torch.full_like(distance[:, :1], math.nan), distance], dim=1)
    return {**{n: x for n, x in table.items() if n != THUMBNAILS}, VARIETY: variety}


def _error(change: Tensor, group: Tensor) -> float:
    """Return the standard error of a mean over groups; NaN for fewer than two groups."""
    means = torch.stack([change[group == g].nanmean() for g in group.unique()])
    means = means[means.isfinite()]
    return float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan


def _statistics(pictures: Sequence[Image]) -> dict[str, Tensor]:
    """Measure P images of any sizes in batches of one size: each statistic [P]."""
    parts: list[dict[str, Tensor]] = []
    for (width, height), same in groupby(pictures, key=lambda x: x.size):
        pixels = torch.stack([_pixels(x) for x in same])
        parts += map(_measured, pixels.split(max(1, PIXELS // (width * height))))
    if not parts:  # with split groups, this rank may have only later members
        nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
        return dict.fromkeys(STATISTICS, nothing) | {THUMBNAILS: nothing.reshape(0, FEATURES)}
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _measured(pixels: Tensor) -> dict[str, Tensor]:
    """Measure images of one size, uint8 [P, 3, H, W]."""
    found = {name: function(pixels) for name, function in STATISTICS.items()}
    return {**found, THUMBNAILS: thumbnails(pixels, side=SIDE)}


def _pixels(image: Image) -> Tensor:
    """Return the RGB pixels of an image, uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)


def _edited(run: Run, drawn: RoundChains, reference: Image | None, b: int) -> Tensor | None:
    """Return the pixels that turns may change, boolean [N, H, W]; None if not available."""
    if reference is None:
        return None
    masks = edited_pixels(run.config.rewards.scorer, drawn.chains[b], reference)
    if masks is None:
        return None
    every_turn = masks.new_zeros(drawn.edits.shape[1], *masks.shape[1:])
    every_turn[drawn.edits[b]] = masks  # turns between them ask for no change
    return every_turn


def _change_outside(images: Sequence[Image | None], edited: Tensor) -> Tensor:
    """Return the mean change of pixels outside all edits so far, [N]."""
    original, *turns = (_pixels(x).float() / 255 for x in images if x is not None)
    return wear(torch.stack(turns)[None], original[None], edited=edited[None])[0]


def _record(run: Run, alarms: Sequence[DriftAlarm], picture: str) -> None:
    """Write alarms to the log and to the run's list for the report."""
    number = run.state.done + 1
    for alarm in alarms:
        run.log.warning(f"round {number}: drift of {alarm}; see {picture}")
        bounds = {"low": alarm.band.low, "high": alarm.band.high}
        reading = {"round": number, "statistic": alarm.name, "value": alarm.value}
        run.alarms.append({**reading, **bounds, "picture": picture})


def _draw_alarms(
    run: Run,
    alarms: Sequence[DriftAlarm],
    drawn: RoundChains,
    images: Sequence[Sequence[Image | None]],
    scores: Scores,
    rows: Sequence[int],
    own: Mapping[str, Tensor],
) -> None:
    """Draw, for each of the first alarms, this rank's most extreme trajectory."""
    from mteditflow.training.pictures import Strip, draw_strips

    following, strips = scores[FOLLOWING], []
    values = _with_variety(own, drawn.group[list(rows)])
    for alarm in alarms[:SHOWN]:
        name, _, turn = alarm.name.rpartition(TURN)
        change = values[name][:, int(turn)] - values[name][:, 0].nan_to_num(0.0)
        order = (change if alarm.below else -change).nan_to_num(math.inf).argsort()
        b = rows[int(order[0])]
        shown = torch.full_like(following.score, math.nan, dtype=torch.float32)
        shown[list(rows)] = values[name][:, 1:].float()
        terms = {FOLLOWING: following, name: TurnScores(shown, following.turn_mask, {})}
        label = f"{name}, turn {turn}: {'low' if alarm.below else 'high'}"
        chain, words = drawn.chains[b], drawn.instructions[b]
        strips.append(Strip(chain.id, words, images[b], terms, b, label=label))
    title = f"Round {run.state.done + 1}, out of band: {', '.join(x.name for x in alarms)}"
    success = scale_of(run.config.rewards).success
    draw(run, PICTURE, draw_strips(strips, success_at=success, title=title))
