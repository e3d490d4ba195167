"""The bootstrap over chains: equal to the library's, paired, of fixed seeds."""

import pytest
import torch
from findings.resampling import chain_values, ends, resampled

from mteditflow.evaluation import Evaluation
from mteditflow.rewards import TurnScores


def evaluation(seed, skill=0.6, chains=60, turns=3):
    generator = torch.Generator().manual_seed(seed)
    passed = torch.rand(chains, turns, generator=generator) < skill
    kept = 0.9 + 0.1 * torch.rand(chains, turns, generator=generator)
    scores = {"following": 1 + 4.0 * passed, "consistency": kept, "strict": passed.float()}
    terms = {k: TurnScores(x, torch.ones(chains, turns) > 0, {}) for k, x in scores.items()}
    names = [f"chain {c}" for c in range(chains)]
    return Evaluation(0, names, [["Do it"] * turns] * chains, terms, success_at=5)


def test_values_of_chains_have_the_metrics_for_means():
    own = evaluation(0)
    for name, values in chain_values(own).items():
        scale = 100 if name == "strict" else 1
        assert float(values.mean()) == pytest.approx(scale * own.estimates[name][-1], rel=1e-5)


def test_one_seeds_intervals_are_those_of_the_library():
    own = evaluation(1)
    for name, table in resampled([[own]]).items():
        low, high = ends(table[:, 0])
        known, scale = own.metrics[name], 100 if name == "strict" else 1
        width = scale * float(known.high[-1] - known.low[-1])
        assert low == pytest.approx(scale * float(known.low[-1]), abs=0.15 * width)
        assert high == pytest.approx(scale * float(known.high[-1]), abs=0.15 * width)


def test_settings_are_resampled_alike_and_seeds_each_for_itself():
    first, second = [evaluation(0), evaluation(1)], [evaluation(2, 0.9), evaluation(3, 0.9)]
    tables = resampled([first, first, second])
    torch.testing.assert_close(tables["overall"][:, 0], tables["overall"][:, 1])
    assert ends(tables["overall"][:, 2] - tables["overall"][:, 0])[0] > 0
    alone = [resampled([[x]])["strict"].std() for x in first]
    joined = tables["strict"][:, 0].std()
    assert joined == pytest.approx(float(torch.stack(alone).norm()) / 2, rel=0.1)


def test_a_statistic_of_two_means_is_of_the_resampled_ones():
    tables = resampled([[evaluation(4)]], resamples=50)
    shares = tables["instruction_following"] * tables["content_consistency"]
    torch.testing.assert_close(tables["overall"], shares.sqrt())
    assert tables["overall"].shape == (50, 1)
