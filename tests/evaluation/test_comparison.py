"""Paired differences at the last turn."""

import numpy as np
import pytest
import torch

from mteditflow.evaluation.comparison import compare
from mteditflow.metrics import paired_difference_interval, wilson_interval
from tests.loops import some
from tests.samples_of_scores import evaluation, few_resamples, nan, reference_metrics, resampled

__all__ = ["few_resamples"]  # a fixture of every test here


def estimates(pair):
    return [float(interval.estimate) for interval in pair]


def test_equal_evaluations_differ_by_exactly_nothing():
    generator = torch.Generator().manual_seed(0)
    following = (torch.rand(20, 3, generator=generator) < 0.6).float()
    following[3, 1] = nan
    consistency = torch.rand(20, 3, generator=generator)
    same = [evaluation(following.tolist(), consistency.tolist(), after=i) for i in (0, 7)]
    found = compare(*same)
    assert (found.before, found.after, found.turn) == (0, 7, 3)
    counts = {"instruction_following": 19, "marginal": 20, "content_consistency": 20, "overall": 19}
    assert found.chains == counts
    pairs = [*found.marginal_ratio.values(), found.conditional_success]
    for interval in some((*found.difference.values(), *(x.difference for x in pairs))):
        assert float(interval.estimate) == 0
        assert interval.low <= 0 <= interval.high
    for name in some(found.difference):  # no chain changed, of so few
        assert found.difference[name].low < 0 < found.difference[name].high
    assert all(x.difference.low < 0 < x.difference.high for x in some(pairs))
    for pair in some(pairs):
        assert list(map(float, pair.before)) == list(map(float, pair.after))


def test_golden_difference_over_the_chains_that_count_in_both():
    before = evaluation([[1, 0], [1, 1], [1, nan], [1, 0]], [[0.5, 0.5]] * 4, lost=[(2, 1)])
    after = evaluation([[1, 1], [1, 1], [1, 1], [0, 1]], [[0.5, 0.6]] * 4, after=9)
    found = compare(before, after)
    assert list(found.chains.values()) == [3, 3, 4, 3]
    estimate = {name: float(x.estimate) for name, x in found.difference.items()}
    assert estimate["marginal"] == pytest.approx(100 - 100 / 3)
    assert estimate["instruction_following"] == pytest.approx(100 / 3)
    assert estimate["content_consistency"] == pytest.approx(10)
    ratio, given = found.marginal_ratio["marginal"], found.conditional_success
    assert estimates(ratio) == pytest.approx([1 / 3, 1.5, 1.5 - 1 / 3])
    assert estimates(given) == pytest.approx([100 / 3, 100, 200 / 3])


def test_the_ratio_of_marginals_is_no_share_of_the_success_at_turn_1():
    """One chain succeeds at turn 1 and fails at turn 2, two the other way round."""
    found = compare(*[evaluation([[5, 1], [1, 5], [1, 5]], success_at=5)] * 2)
    assert estimates(found.marginal_ratio["marginal"]) == [2, 2, 0]
    assert estimates(found.conditional_success) == [0, 0, 0]


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
        ratios = [x[1, -1] / x[1, 0] for x in (old, new)]
        given = []
        for success, _ in scores:
            last = [success[c][-1] for c in rows if success[c][0]]
            given.append(100 * sum(last) / len(last))
        pairs = [[before, after, after - before] for before, after in (ratios, given)]
        return np.array([*(new - old)[:, -1], *pairs[0], *pairs[1]])

    expected = list(zip(*resampled(differences, 30), strict=True))
    metrics, pairs = expected[:-6], expected[-6:]
    found = compare(*runs)
    for (name, interval), expected in some(zip(found.difference.items(), metrics, strict=True)):
        share = name in ("instruction_following", "marginal")  # Newcombe's interval, not this
        number = [float(x) for x in interval][: 1 if share else 3]
        assert number == pytest.approx(list(expected)[: len(number)], abs=1e-3)
    last = [torch.tensor(success)[:, -1:] for success, _ in scores]
    newcombe = [100 * float(x) for x in paired_difference_interval(*last)]
    assert [float(x) for x in found.difference["marginal"]] == pytest.approx(newcombe, abs=1e-3)
    given = found.conditional_success
    intervals = (*found.marginal_ratio["marginal"], given.difference)
    for interval, expected in zip(intervals, [*pairs[:3], pairs[5]], strict=True):
        assert [float(x) for x in interval] == pytest.approx(list(expected), abs=1e-3)
    for interval, (success, _) in some(zip(given, scores, strict=False)):
        those = [row[-1] for row in success if row[0]]
        wilson = [100 * float(x) for x in wilson_interval(sum(those), len(those))]
        assert [float(x) for x in interval] == pytest.approx(wilson, abs=1e-3)


def test_differences_and_ratios_of_few_chains_that_agree_keep_a_width():
    found = compare(evaluation([[1, 1], [1, 1]]), evaluation([[1, 1], [1, 1]]))
    ratio, given = found.marginal_ratio["marginal"], found.conditional_success
    for interval in (found.difference["marginal"], *ratio, *given):
        assert interval.low < interval.high
        assert interval.low <= interval.estimate <= interval.high


def test_no_ratio_to_no_success_and_nothing_compared_without_chains():
    nothing = compare(evaluation([[0, 1]]), evaluation([[1, 1]]))
    ratio, given = nothing.marginal_ratio["marginal"], nothing.conditional_success
    assert estimates(ratio) == pytest.approx([nan, 1, nan], nan_ok=True)
    assert estimates(given) == pytest.approx([nan, 100, nan], nan_ok=True)
    none = compare(evaluation([[nan], [1]]), evaluation([[1], [nan]]))
    assert none.chains == {"instruction_following": 0, "marginal": 0}
    assert bool(none.difference["marginal"].estimate.isnan())


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (evaluation([[1], [1], [0]]), "chain_ids"),
        (evaluation([[1, 1], [0, 1]]), "instructions"),
        (evaluation([[1], [0]], success_at=0.5), "success_at"),
    ],
)
def test_evaluations_of_other_chains_are_not_compared(other, name):
    with pytest.raises(ValueError, match=f"after: expected the {name} of before, got others"):
        compare(evaluation([[1], [0]]), other)


def test_other_terms_are_named():
    message = (
        r"after: expected the terms \['following'\] of before, got \['consistency', 'following'\]"
    )
    with pytest.raises(ValueError, match=message):
        compare(evaluation([[1], [0]]), evaluation([[1], [0]], [[1], [1]]))
