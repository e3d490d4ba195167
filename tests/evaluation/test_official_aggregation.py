"""The 572 chains of EdiVal-Bench: metrics of synthetic scores equal the official aggregation."""

import pytest
import torch

from mteditflow.chains import read_chains
from mteditflow.evaluation import Evaluation, report_of
from mteditflow.rewards import ConsistencyScores, PairScores, TurnScores
from mteditflow.rewards.consistency.pairs import pairs_of
from tests.evaluation.edival_scores import FILE, TURNS, drawn, official, rows
from tests.loops import some
from tests.samples_of_scores import few_resamples

__all__ = ["few_resamples"]  # a fixture of every test here
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"EdiVal-Bench is not there: {FILE}")
IMAGES, WITHOUT = 572, {"compat": 65, "strict": 1}  # images, and those without CC at every turn


def pair_scores(chain, turn, pair, *, compat):
    """Of the terms that our pairs ask for, as the scorer answers."""
    kinds = [] if compat and not pair.background else ["object"] * bool(pair.unchanged_objects)
    kinds += ["background"] * bool(pair.background and pair.all_objects)
    return PairScores(**{kind: drawn(chain.id, turn, kind) for kind in kinds})


def evaluation_of(chains, *, compat):
    answers = [
        [pair_scores(chain, t, pair, compat=compat) for t, pair in enumerate(pairs_of(chain), 1)]
        for chain in chains
    ]
    found = ConsistencyScores.collect(answers, [chain.turns for chain in chains])
    following = [[drawn(c.id, t, "following") for t in range(1, TURNS + 1)] for c in chains]
    parts = {
        name: TurnScores(getattr(found, name), found.turn_mask, {})
        for name in ("object", "background")
    }
    terms = {"following": TurnScores(torch.tensor(following), found.turn_mask, {})}
    terms |= {"consistency": found.scores, **parts}
    words = [chain.instructions for chain in chains]
    return Evaluation(0, [chain.id for chain in chains], words, terms, success_at=1)


@pytest.mark.parametrize("tokens", ["compat", "strict"])
def test_metrics_equal_the_official_aggregation(tokens):
    """Also for the images without any CC, which count in IF and Marginal."""
    reading = read_chains(FILE)
    found = evaluation_of(reading.chains, compat=tokens == "compat")
    expected = official(rows(), compat=tokens == "compat")
    names = ("instruction_following", "marginal", "content_consistency")
    for turn, numbers in some(enumerate(expected)):
        ours = [found.estimates[name][turn] for name in names]
        assert ours == pytest.approx(numbers[:3], abs=2e-5)
        assert found.counts["content_consistency"][turn] == numbers[3]
        overall = (numbers[0] * numbers[2]) ** 0.5
        assert found.estimates["overall"][turn] == pytest.approx(overall, abs=2e-5)
    for name in some(names[:2]):
        assert found.counts[name] == [IMAGES] * TURNS
    without = ~found.terms["consistency"].measured.any(dim=1)
    assert int(without.sum()) == WITHOUT[tokens]
    report = report_of(found, reading.chains, title="x", left_out={})
    assert (report.asked, report.scored, report.lost, report.invalid_share) == (
        IMAGES,
        IMAGES,
        {},
        0,
    )
    assert report.unmeasured["consistency"] == TURNS * IMAGES - sum(n[3] for n in expected)
