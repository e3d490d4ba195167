"""Panels of drift: what is drawn of metrics, bands and alarms."""

import math

import pytest

from mteditflow.drift import DriftWatch, Reading
from mteditflow.training.pictures import draw_drift

ROUNDS = 8


def lines(reference=True):
    """Saturation of two turns and the variety of one; rounds 1 to 8."""
    return [
        {
            "round": i,
            "reward/x": 0.5,
            "drift/saturation/turn_1": 0.25,
            "drift/saturation/turn_2": 0.25 if i < 7 else 0.75,
            **({"drift/saturation/reference": 0.125} if reference else {}),
            "drift/group_distance/turn_1": 0.1 * i,
            "drift/outside_band": 0.0,
        }
        for i in range(1, ROUNDS + 1)
    ]


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_panels_curves_band_reference_and_alarms():
    watch = DriftWatch(baseline=3, width=1)
    for line in lines():
        watch.check(
            {
                f"saturation/turn_{n}": Reading(line[f"drift/saturation/turn_{n}"], 0.125, 0.0625)
                for n in (1, 2)
            }
        )
    alarm = {"round": 8, "statistic": "saturation/turn_2", "value": 0.75}
    first, second = draw_drift(lines(), [alarm], watch=watch, title="A run").axes
    assert [x.get_title(loc="left") for x in (first, second)] == ["saturation", "group distance"]
    assert labels(first) == ["band of turn 2", "turn 1", "turn 2", "reference", "alarm"]
    curves = dict(zip(labels(first)[1:], first.get_lines(), strict=True))
    assert curves["turn 2"].get_ydata().tolist() == [0.25] * 6 + [0.75] * 2
    assert curves["reference"].get_ydata().tolist() == [0.125] * ROUNDS
    assert (curves["alarm"].get_xdata().tolist(), curves["alarm"].get_ydata().tolist()) == (
        [8],
        [0.75],
    )
    (band,) = first.collections  # from the reference, 0.125, to 0.125 + 0.125 + 0.0625
    y = band.get_paths()[0].vertices[:, 1]
    assert (y.min(), y.max()) == (0.125, 0.3125)
    assert labels(second) == ["turn 1", "first rounds"]
    assert second.get_lines()[1].get_ydata()[0] == pytest.approx(0.3)  # the median of 5 rounds


def test_the_band_ends_with_the_range_and_two_baselines_differ_in_their_dashes():
    watch = DriftWatch(baseline=3, width=1)
    names = ("saturation/turn_2", "group_distance/turn_1")
    for line in lines():
        watch.check({name: Reading(line[f"drift/{name}"], math.nan, 9.0) for name in names})
    shares, distance = draw_drift(lines(reference=False), watch=watch, title="").axes
    for axes, ends in ((shares, (0, 1)), (distance, (0, 9.2))):
        (band,) = axes.collections
        y = band.get_paths()[0].vertices[:, 1]
        assert (y.min(), y.max()) == pytest.approx(ends, abs=0.05)
    first, second = draw_drift(lines(), title="").axes
    dashes = [axes.get_lines()[-1].get_linestyle() for axes in (first, second)]
    assert [labels(axes)[-1] for axes in (first, second)] == ["reference", "first rounds"]
    assert len(set(dashes)) == 2


def test_without_watch_and_references_there_is_the_level_of_the_first_rounds():
    (first, _) = draw_drift(lines(reference=False), early=3, title="").axes
    assert labels(first) == ["turn 1", "turn 2", "first rounds"]
    assert not first.collections


def test_rounds_without_a_statistic_are_gaps():
    metrics = [{"round": 0.0}, *lines()]
    (first, _) = draw_drift(metrics, title="").axes
    assert math.isnan(first.get_lines()[0].get_ydata()[0])


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="metrics: expected drift statistics of some round"):
        draw_drift([{"round": 1, "reward/x": 1.0, "drift/outside_band": 0.0}], title="")
