"""Paired differences at the last turn."""

import numpy as np
import pytest
import torch

from mteditflow.evaluation.comparison import compare
from tests.samples_of_scores import evaluation, few_resamples, nan, reference_metrics, resampled

__all__ = ["few_resamples"]  # a fixture of every test here


def test_equal_evaluations_differ_by_exactly_nothing():
    generator = torch.Generator().manual_seed(0)
    following = (torch.rand(20, 3, generator=generator) < 0.6).float()
    following[3, 1] = nan
    consistency = torch.rand(20, 3, generator=generator)
    same = [evaluation(following.tolist(), consistency.tolist(), after=i) for i in (0, 7)]
    found = compare(*same)
    assert (found.before, found.after, found.turn, found.chains) == (0, 7, 3, 19)
    for interval in (*found.difference.values(), *found.kept_difference.values()):
        assert [float(x) for x in interval] == [0, 0, 0]
    assert found.kept["marginal"][0] == found.kept["marginal"][1]


def test_golden_difference_over_the_chains_that_count_in_both():
    before = evaluation([[1, 0], [1, 1], [1, nan], [1, 0]], [[0.5, 0.5]] * 4, lost=[(2, 1)])
    after = evaluation([[1, 1], [1, 1], [1, 1], [0, 1]], [[0.5, 0.6]] * 4, after=9)
    found = compare(before, after)
    assert found.chains == 3
    estimate = {name: float(x.estimate) for name, x in found.difference.items()}
    assert estimate["marginal"] == pytest.approx(100 - 100 / 3)
    assert estimate["instruction_following"] == pytest.approx(100 / 3)
    assert estimate["content_consistency"] == pytest.approx(10)
    assert found.kept["marginal"] == pytest.approx((1 / 3, 1.5))
    assert float(found.kept_difference["marginal"].estimate) == pytest.approx(100 * (1.5 - 1 / 3))


def test_the_comparison_equals_that_of_a_loop_in_plain_python():
    generator = torch.Generator().manual_seed(2)
    runs, scores = [], []
    for chance in (0.5, 0.8):
        success = (torch.rand(30, 3, generator=generator) < chance).tolist()
        consistency = torch.rand(30, 3, generator=generator).tolist()
        scores.append((success, consistency))
        runs.append(evaluation([list(map(float, row)) for row in success], consistency))

    def differences(rows):
        old, new = (reference_metrics(*run, rows) for run in scores)
        kept = 100 * (new[1, -1] / new[1, 0] - old[1, -1] / old[1, 0])
        return np.array([*(new - old)[:, -1], kept])

    *metrics, kept = zip(*resampled(differences, 30), strict=True)
    found = compare(*runs)
    for interval, expected in zip(found.difference.values(), metrics, strict=True):
        assert [float(x) for x in interval] == pytest.approx(list(expected), abs=1e-3)
    interval = [float(x) for x in found.kept_difference["marginal"]]
    assert interval == pytest.approx(list(kept), abs=1e-3)


def test_nothing_kept_of_no_success_and_nothing_compared_without_chains():
    nothing = compare(evaluation([[0, 1]]), evaluation([[1, 1]]))
    assert nothing.kept["marginal"][0] != nothing.kept["marginal"][0]
    assert nothing.kept["marginal"][1] == 1
    none = compare(evaluation([[nan], [1]]), evaluation([[1], [nan]]))
    assert none.chains == 0
    assert bool(none.difference["marginal"].estimate.isnan())


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (evaluation([[1], [1], [0]]), "chain_ids"),
        (evaluation([[1, 1], [0, 1]]), "instructions"),
        (evaluation([[1], [0]], [[1], [1]]), "names"),
        (evaluation([[1], [0]], success_at=0.5), "success_at"),
    ],
)
def test_evaluations_of_other_chains_are_not_compared(other, name):
    with pytest.raises(ValueError, match=f"after: expected the {name} of before, got others"):
        compare(evaluation([[1], [0]]), other)
