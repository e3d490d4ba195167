"""Ranks simulated in one process, so that mutation testing sees the lines that only ranks run."""

import pytest
import torch
from torch import distributed as dist

from mteditflow import gather_ranks
from tests.loops import some


@pytest.fixture
def simulate(monkeypatch):
    """Pretend to be one of several ranks whose batches are known."""

    def start(rank, batches, group):
        def padded(x, rows):
            return torch.cat([x, x.new_zeros((rows - len(x), *x.shape[1:]))])

        def rounds():
            yield [torch.tensor([len(batch[0])], device="cpu") for batch in batches]
            longest = max(len(batch[0]) for batch in batches)
            for tensors in zip(*batches, strict=True):
                yield [padded(x.detach(), longest) for x in tensors]

        coming = rounds()

        def all_gather(slots, mine, group=None):
            assert group is expected_group
            of_all_ranks = next(coming)
            assert torch.equal(mine, of_all_ranks[rank])
            for slot, x in some(zip(slots, of_all_ranks, strict=True)):
                assert slot.dtype == x.dtype
                slot.copy_(x)

        def world_size(group=None):
            assert group is expected_group
            return len(batches)

        def own_rank(group=None):
            assert group is expected_group
            return rank

        expected_group = group
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "all_gather", all_gather)
        monkeypatch.setattr(dist, "get_world_size", world_size)
        monkeypatch.setattr(dist, "get_rank", own_rank)

    return start


@pytest.mark.parametrize("group", [None, object()])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_ragged_ranks(simulate, rank, group):
    batches = [
        (torch.rand(rows, requires_grad=True), 2**53 + torch.arange(rows), torch.ones(rows, 2) > 0)
        for rows in (2, 0, 3)
    ]
    simulate(rank, batches, group)
    gathered, own = gather_ranks(*batches[rank], process_group=group)
    assert own == [slice(0, 2), slice(2, 2), slice(2, 5)][rank]
    for position, x in some(enumerate(gathered)):
        expected = torch.cat([batch[position] for batch in batches])
        assert torch.equal(x, expected)
        assert x.dtype == expected.dtype
        assert not x.requires_grad


def test_counts_are_made_where_the_tensors_live(simulate):
    batches = [(torch.arange(3),), (torch.arange(1),)]
    simulate(0, batches, None)
    with torch.device("meta"):
        (gathered,), own = gather_ranks(*batches[0])
    assert gathered.tolist() == [0, 1, 2, 0]
    assert own == slice(0, 3)
