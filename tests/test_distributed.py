"""Real processes over gloo: the same advantages, bit for bit, as on one process."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import multiprocessing as mp

from mteditflow import fuse_advantages, gather_ranks, group_advantage
from tests.loops import some
from tests.processes import START_METHOD

# Rows of each rank: groups are split over ranks, sizes differ, one rank may have nothing.
SPLITS = {2: [(5, 7), (12, 0), (0, 12)], 3: [(4, 4, 4), (1, 0, 11), (0, 9, 3)]}
ROWS, BIG = 12, 2**53


def exactly(message):
    return f"^{re.escape(message)}$"


def batch():
    generator = torch.Generator().manual_seed(0)
    reward, other = torch.rand(2, ROWS, generator=generator)
    group = torch.tensor([BIG, BIG + 1, 0, -7] * 3)
    valid = torch.rand(ROWS, generator=generator) > 0.2
    reward[~valid] = torch.nan
    table = torch.rand(ROWS, 2, 3, generator=generator, dtype=torch.float64)
    return reward, other, group, valid, table


def advantages(reward, other, group, valid):
    return torch.stack(
        [
            group_advantage(reward, group, valid=valid),
            group_advantage(reward, group, valid=valid, std="batch"),
            fuse_advantages({"a": reward, "b": other}, {"a": 1.0, "b": 0.2}, group, valid=valid),
        ],
        dim=1,
    )


def work(rank, world, store, out):
    """One process: gather each split, compute, keep the own rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        whole = batch()
        for number, counts in some(enumerate(SPLITS[world])):
            start = sum(counts[:rank])
            local = [x[start : start + counts[rank]] for x in whole]
            local[0] = local[0].requires_grad_()
            gathered, own = gather_ranks(*local)
            assert own == slice(start, start + counts[rank])
            for x, expected in some(zip(gathered, whole, strict=True)):
                assert x.dtype == expected.dtype
                assert not x.requires_grad
                assert torch.equal(x.nan_to_num(-1.0), expected.nan_to_num(-1.0))
            mine = {"own": advantages(*gathered[:4])[own].contiguous()}
            save_file(mine, f"{out}/{world}-{number}-{rank}.safetensors")
        nothing, own = gather_ranks(torch.zeros(0, 2, dtype=torch.int64))
        assert nothing[0].shape == (0, 2)
        assert own == slice(0, 0)
        alone = [dist.new_group([member]) for member in range(world)][rank]
        (mine,), own = gather_ranks(torch.full((rank + 1,), rank), process_group=alone)
        assert mine.tolist() == [rank] * (rank + 1)
        assert own == slice(0, rank + 1)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", SPLITS)
def test_advantages_do_not_depend_on_the_number_of_ranks(world, tmp_path):
    args = (world, tmp_path / "store", tmp_path)
    mp.start_processes(work, args=args, nprocs=world, start_method=START_METHOD)
    expected = advantages(*batch()[:4])
    assert expected.abs().sum() > 0
    for number in some(range(len(SPLITS[world]))):
        files = [f"{world}-{number}-{rank}.safetensors" for rank in range(world)]
        parts = [load_file(tmp_path / file)["own"] for file in files]
        assert torch.equal(torch.cat(parts), expected)


def test_one_rank_gathers_itself():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = batch()
        gathered, own = gather_ranks(*whole)
        assert own == slice(0, ROWS)
        for x, expected in some(zip(gathered, whole, strict=True)):
            assert x.dtype == expected.dtype
            assert torch.equal(x.nan_to_num(-1.0), expected.nan_to_num(-1.0))
        with pytest.raises(ValueError, match=r"^tensors\[1\]: expected "):
            gather_ranks(torch.zeros(2), torch.zeros(3))
    finally:
        dist.destroy_process_group()


def test_without_distributed_the_tensors_come_back():
    reward = torch.tensor([1.0, 2.0], requires_grad=True)
    group = torch.tensor([BIG, BIG + 1])
    (gathered, ids), own = gather_ranks(reward, group)
    assert own == slice(0, 2)
    assert gathered.data_ptr() == reward.data_ptr()
    assert not gathered.requires_grad
    assert ids.tolist() == [BIG, BIG + 1]
    (empty,), own = gather_ranks(torch.zeros(0))
    assert empty.shape == (0,)
    assert own == slice(0, 0)


def test_errors():
    with pytest.raises(
        ValueError, match=exactly("tensors: expected at least one tensor, got none")
    ):
        gather_ranks()
    expected = "expected [B_local, ...] with the B_local of tensors[0]"
    with pytest.raises(ValueError, match=exactly(f"tensors[1]: {expected}, got [3]")):
        gather_ranks(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=exactly(f"tensors[1]: {expected}, got []")):
        gather_ranks(torch.zeros(2), torch.tensor(1.0))
    with pytest.raises(ValueError, match=exactly(f"tensors[0]: {expected}, got []")):
        gather_ranks(torch.tensor(1.0))
    with pytest.raises(
        TypeError,
        match=r"^tensors\[1\]: expected a torch.Tensor, got list; convert it with torch.as_tensor$",
    ):
        gather_ranks(torch.zeros(2), [1, 2])
