"""Rows of a round: all once, equal parts of every group, and no matter how ranks are cut."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.objectives import keyed_generator, training_rows
from tests.loops import some


def generators(count, first=0):
    return [keyed_generator(7, "rows", first + i) for i in range(count)]


def test_every_existing_row_once_in_order():
    exists = torch.tensor([[[True, False], [True, True]], [[False, True], [False, False]]])
    (rows,) = training_rows(exists, generators=generators(2))
    assert rows.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 1]]


@pytest.mark.parametrize(
    ("steps", "share", "kept"),
    [(10, 0.1, 1), (25, 0.6, 15), (100, 0.07, 7), (3000, 0.007, 21), (3, 0.4, 2), (9, 0.01, 1)],
)
def test_rounding_of_a_share_draws_no_step_more(steps, share, kept):
    exists = torch.ones(1, 2, steps, dtype=torch.bool)
    (rows,) = training_rows(exists, generators=generators(1), share=share)
    assert rows[:, 1].bincount().tolist() == [kept, kept]


@given(
    strata=st.integers(1, 5),
    minibatches=st.integers(1, 4),
    turns=st.integers(1, 3),
    steps=st.integers(1, 6),
    share=st.floats(0.05, 1.0),
)
def test_a_share_of_each_turn_and_each_trajectory_in_one_minibatch(
    strata, minibatches, turns, steps, share
):
    exists = torch.ones(strata * minibatches, turns, steps, dtype=torch.bool)
    exists[0, 0, steps // 2 :] = False
    drawn = training_rows(
        exists, generators=generators(len(exists)), share=share, minibatches=minibatches
    )
    assert len(drawn) == minibatches
    rows = torch.cat(drawn)
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)
    assert bool(exists[rows.unbind(dim=1)].all())
    for b, own in some(enumerate(exists)):
        for n, turn in some(enumerate(own)):
            count = int(((rows[:, 0] == b) & (rows[:, 1] == n)).sum())
            there = int(turn.sum())
            assert count == min(max(math.ceil(there * share - 1e-4), 1), there)
    for minibatch in some(drawn):
        held = minibatch[:, 0].unique()
        assert (held // minibatches).unique().tolist() == (held // minibatches).tolist()


@given(
    ranks=st.sampled_from([1, 2, 4]), minibatches=st.sampled_from([1, 2]), seed=st.integers(0, 9)
)
def test_ranks_draw_what_one_process_would(ranks, minibatches, seed):
    exists = torch.rand(8, 3, 4, generator=torch.Generator().manual_seed(seed)) < 0.8
    options = {"share": 0.5, "minibatches": minibatches}
    alone = training_rows(exists, generators=generators(8), **options)
    size = 8 // ranks
    parts = [
        training_rows(
            exists[r * size : (r + 1) * size], generators=generators(size, r * size), **options
        )
        for r in range(ranks)
    ]
    for k, expected in some(enumerate(alone)):
        shifted = [part[k] + torch.tensor([r * size, 0, 0]) for r, part in enumerate(parts)]
        assert torch.equal(torch.cat(shifted), expected)


def test_shares_are_drawn_uniformly_and_anew():
    exists = torch.ones(1, 1, 4, dtype=torch.bool)
    counts = torch.zeros(4)
    for seed in range(2000):
        (rows,) = training_rows(exists, generators=[keyed_generator(seed)], share=0.25)
        counts[rows[:, 2]] += 1
    assert ((counts - 500).abs() < 100).all(), counts  # five standard deviations


def test_neighbours_go_to_minibatches_uniformly():
    exists = torch.ones(2, 1, 1, dtype=torch.bool)
    first = sum(
        training_rows(exists, generators=generators(2, 2 * seed), minibatches=2)[0][0, 0].item()
        for seed in range(1000)
    )
    assert abs(first - 500) < 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minibatches": 2}, r"minibatches: expected a divisor of the 3 trajectories, got 2"),
        ({"minibatches": 0}, r"minibatches: expected an integer >= 1, got 0"),
        ({"share": 0.0}, r"share: expected a finite number in \(0, 1\]"),
        ({"generators": generators(2)}, r"generators: expected one per trajectory, 3, got 2"),
    ],
)
def test_errors(options, message):
    exists = torch.ones(3, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        training_rows(exists, **({"generators": generators(3)} | options))


def test_rows_want_booleans():
    with pytest.raises(TypeError, match=r"exists: expected booleans, got torch\.float32"):
        training_rows(torch.ones(1, 1, 1), generators=generators(1))
