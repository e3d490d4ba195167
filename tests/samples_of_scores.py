"""Scores by hand and by hypothesis, for the tests of what a run shows."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from mteditflow.evaluation.evaluation import Evaluation
from mteditflow.evaluation.provenance import Provenance
from mteditflow.metrics import bootstrap_interval
from mteditflow.rewards import Fault, Lost, TurnScores

nan = torch.nan


@pytest.fixture(autouse=True, scope="module")
def few_resamples():
    """200 instead of 2000."""
    few = partial(bootstrap_interval, resamples=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mteditflow.evaluation.intervals.bootstrap_interval", few)
        yield


def resampled(statistic, count):
    """An independent reference: numpy's percentiles of a statistic of lists of rows, 200 times."""
    draws = torch.randint(count, (200, count), generator=torch.Generator().manual_seed(0)).tolist()
    replicates = [statistic(rows) for rows in draws]
    return statistic(range(count)), *np.nanpercentile(replicates, [2.5, 97.5], axis=0)


def reference_metrics(success, consistency, rows):
    """IF, Marginal, CC and Overall in percent of some rows of lists, in plain Python."""
    turns = range(len(success[0]))
    following = [np.mean([all(success[c][: n + 1]) for c in rows]) for n in turns]
    marginal = [np.mean([success[c][n] for c in rows]) for n in turns]
    content = [np.mean([consistency[c][n] for c in rows]) for n in turns]
    both = [(a * b) ** 0.5 for a, b in zip(following, content, strict=True)]
    return 100 * np.array([following, marginal, content, both])


def turn_scores(rows, lost=(), dtype=torch.float32):
    """NaN where lost; ``None`` pads a chain that is shorter."""
    score = torch.tensor([[nan if x is None else x for x in row] for row in rows], dtype=dtype)
    mask = torch.tensor([[x is not None for x in row] for row in rows])
    why = {place: Lost(Fault.timeout, "no answer within 60 s", 4) for place in lost}
    return TurnScores(score, mask, why)


def evaluation(
    following, consistency=None, *, after=0, success_at=1, lost=(), provenance=None, **others
):
    terms = {"following": turn_scores(following, lost)}
    if consistency is not None:
        terms["consistency"] = turn_scores(consistency)
    terms |= {name: turn_scores(rows) for name, rows in others.items()}
    words = [[f"do {n}" for n, x in enumerate(row) if x is not None] for row in following]
    names, known = [f"c{i}" for i in range(len(words))], provenance or Provenance()
    return Evaluation(after, names, words, terms, success_at, known)


@st.composite
def any_evaluation(draw):
    """Of any size, with short chains, lost and unmeasured scores, in both precisions."""
    chains, turns = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    lengths = [draw(st.integers(1, turns)) for _ in range(chains)]
    mask = torch.tensor([[n < length for n in range(turns)] for length in lengths])
    terms = {}
    for name in ("following", *draw(st.sets(st.sampled_from(["consistency", "looks & style"])))):
        dtype, width = draw(st.sampled_from([(torch.float32, 32), (torch.float64, 64)]))
        most = 1 if name == "consistency" else 1e6
        number = st.floats(-most, most, width=width, allow_subnormal=True)
        rows = [[draw(number) if there else nan for there in row] for row in mask.tolist()]
        score, lost = torch.tensor(rows, dtype=dtype), {}
        for place in draw(st.sets(st.sampled_from(mask.nonzero().tolist()).map(tuple))):
            score[place] = nan
            if draw(st.booleans()):
                fault, detail = draw(st.sampled_from(Fault)), draw(st.text(max_size=8))
                lost[place] = Lost(fault, detail, draw(st.integers(1, 9)))
        terms[name] = TurnScores(score, mask, lost)
    words = [[draw(st.text(min_size=1, max_size=8)) for _ in range(n)] for n in lengths]
    names = draw(st.lists(st.text(max_size=6), min_size=chains, max_size=chains, unique=True))
    return Evaluation(draw(st.integers(0, 10**6)), names, words, terms, draw(st.floats(-9, 9)))
