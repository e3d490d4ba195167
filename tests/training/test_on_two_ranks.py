"""Two processes over gloo, the model sharded by FSDP2: what is kept and loaded is as on one.

One pair of processes does it all, for starting them is what takes time.
"""

import gc

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mteditflow._sharding import local
from mteditflow.objectives import NFT, CleanSamples, RoundKey
from mteditflow.pipelines import LoraPolicies
from mteditflow.training import (
    Checkpoints,
    Termination,
    Updater,
    load_optimizer_state,
    most_parts,
    optimizer_state,
    shard_model,
)
from tests.loops import some

WORLD, BATCH, POLICIES = 2, 8, ("current", "old", "ema")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)  # 5 rows over 2 ranks: shards of 3 and 2

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 5), nn.Linear(5, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


class Learner:
    """Model, policies and optimizer, trained on this rank's share of each batch."""

    def __init__(self, rank=0, world=1, dtype=torch.float32, *, shard=True):
        self.rank, self.world, self.dtype = rank, world, dtype
        torch.manual_seed(0)
        self.model = Model().to(dtype)
        config = LoraConfig(r=3, target_modules=["enter", "linear", "leave"])
        self.policies = LoraPolicies(self.model, config, ema=True)
        if world > 1 and shard == "sums":  # what an Updater expects
            shard_model(self.model, blocks=["Block"])
        elif world > 1 and shard:
            for block in self.model.blocks:
                fully_shard(block)
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.policies.parameters(), lr=0.03)

    def train(self, first, last):
        """Updates first to last - 1; the old policy lags behind in some and not in others."""
        for update in some(range(first, last)):
            generator = torch.Generator().manual_seed(update)
            batch = torch.randn(BATCH, 3, generator=generator).to(self.dtype)
            own = batch.chunk(self.world)[self.rank]
            velocity = self.model(own)
            assert self.policies.old_equals_current == (update % 2 == 0)
            old = self.policies.old_velocity(velocity, lambda x=own: self.model(x))
            with torch.no_grad(), self.policies.use("reference"):
                reference = self.model(own)
            loss = (velocity - 1).square() + (velocity - old).square() + (velocity - reference) ** 2
            self.optimizer.zero_grad()
            loss.mean().backward()
            self.optimizer.step()
            with torch.no_grad(), self.policies.use("ema"):
                self.model(own)  # leaves FSDP's root gathered
            self.policies.update_old(decay=0.5 if update % 2 == 0 else 0.0)
            self.policies.update_ema(decay=0.9)

    def update_on_uneven_rows(self):
        """Two passes of two updates; of the last quarter of the trajectories no row is valid.

        Returns:
            Micro-batches with rows, and idle ones, of each update of this rank; and its means.
        """
        generator = torch.Generator().manual_seed(0)
        clean = torch.randn(BATCH, 2, 3, generator=generator)
        advantage = torch.randn(BATCH, 2, generator=generator)
        valid = torch.ones(BATCH, 2, dtype=torch.bool)
        valid[5:], valid[1, 0] = False, False
        size = BATCH // self.world
        own = slice(self.rank * size, (self.rank + 1) * size)
        samples, objective = CleanSamples(clean[own], torch.arange(size) // 2), NFT(kl_coef=0.1)
        updater = Updater(self.optimizer, self.policies.parameters, max_grad_norm=0.5)

        def velocity(policy, x_t, sigma, at):
            if policy == "current":
                return self.model(x_t)
            with self.policies.use(policy):
                return self.model(x_t)

        def losses(part):
            equal = self.policies.old_equals_current
            return objective(velocity, samples, part, old_is_current=equal)

        counts, means = [], []
        for epoch in range(2):
            key = RoundKey(0, 0, first=own.start, epoch=epoch)
            given = (samples, advantage[own], valid[own])
            for units in some(objective.units(*given, key=key, minibatches=2)):
                parts = units.split(2, parts=most_parts(units, 2))
                update = updater.step(parts, losses, count=units.count)
                assert update.outcome == "taken"
                kept = sum(bool(part.mask.any()) for part in parts)
                counts.append((kept, len(parts) - kept))
                means.append(dict(update.means))
        nothing = torch.zeros_like(valid)[own]
        for units in some(objective.units(samples, advantage[own], nothing, key=key)):
            assert most_parts(units, 2) == 0
            assert updater.step([], losses, count=0).outcome == "empty"
        return counts, means

    def snapshot(self):
        tensors, values = optimizer_state(self.optimizer)
        weights = {name: self.policies.state_dict(name) for name in POLICIES}
        return weights | {"optimizer": tensors}, {"optimizer": values}

    def resume(self, checkpoint):
        for name in POLICIES:
            self.policies.load_state_dict(checkpoint.tensors(name), name)
        load_optimizer_state(
            self.optimizer, checkpoint.tensors("optimizer"), checkpoint.state["optimizer"]
        )


def same(left, right):
    """Whether two snapshots are equal to the bit, and plain."""
    assert left[1] == right[1]
    for name in (*POLICIES, "optimizer"):
        assert left[0][name].keys() == right[0][name].keys()
        for key, x in some(left[0][name].items()):
            assert not isinstance(x, DTensor)
            assert torch.equal(x, right[0][name][key]), (name, key)
    return True


def work(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        resume_train_and_save(rank, Checkpoints(folder))
        half_precision_trains(rank)
        one_verdict_for_all_ranks(rank)
        uneven_rows_are_one_update(rank, folder.with_name("uneven.safetensors"))
        one_rank_asked_is_all_ranks_told(rank)
        replicas_of_each_configuration_stay_equal(rank)
    finally:
        gc.collect()  # before the interpreter ends, so that gloo's threads hold nothing of it
        dist.destroy_process_group()


def resume_train_and_save(rank, checkpoints):
    """Load what one process has saved, train on, save for one process; resume to the bit."""
    stored, learner = checkpoints.latest(), Learner(rank, WORLD)
    learner.resume(stored)
    assert all(isinstance(weight, DTensor) for weight in some(learner.policies.parameters()))
    loaded = {name: stored.tensors(name) for name in (*POLICIES, "optimizer")}
    assert same(learner.snapshot(), (loaded, stored.state))
    learner.train(3, 5)
    tensors, state = learner.snapshot()
    dist.barrier()  # the other rank has read the latest
    if rank == 0:
        checkpoints.save(5, tensors, state)
    dist.barrier()
    resumed = Learner(rank, WORLD)
    resumed.resume(checkpoints.latest())
    for one in (learner, resumed):
        one.train(5, 7)
    assert same(learner.snapshot(), resumed.snapshot())


def half_precision_trains(rank):
    """Float32 adapters in a bfloat16 model: FSDP2 minds only the dtypes of what is trained."""
    learner = Learner(rank, WORLD, torch.bfloat16)
    assert {x.dtype for x in learner.model.parameters()} == {torch.bfloat16, torch.float32}
    learner.train(0, 2)
    assert all(x.dtype == torch.float32 for x in some(learner.policies.state_dict("ema").values()))


def one_verdict_for_all_ranks(rank):
    """A difference that one rank alone can see."""
    policies = Learner(rank, WORLD).policies
    if rank == 1:
        local(policies.old_parameters()[0]).add_(1.0)
    assert not policies.old_equals_current
    policies.update_old(decay=0.0)
    assert policies.old_equals_current


def uneven_rows_are_one_update(rank, alone):
    """Replicas and shards of different numbers of rows end with the weights of one process."""
    expected = load_file(alone)
    for shard in (False, "sums"):
        learner = Learner(rank, WORLD, shard=shard)
        counts, means = learner.update_on_uneven_rows()
        idle = [x for _, x in counts]
        assert (max(idle) > 0) == (rank == 1)  # it has one trajectory of five
        assert min(kept for kept, _ in counts) == (0 if rank == 1 else 2), counts
        for name, x in some(learner.policies.state_dict("current").items()):
            torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-7)
        for i, update in some(enumerate(means)):
            loss = torch.tensor(update["loss"])
            torch.testing.assert_close(loss, expected[f"loss {i}"], rtol=1e-5, atol=1e-7)


def one_rank_asked_is_all_ranks_told(rank):
    for asked in (None, 0, 1):
        termination = Termination()
        termination.signal = "SIGTERM" if asked == rank else None
        assert termination.agreed() == (asked is not None)


#: Options of adapters that DDP could treat otherwise; see tests/pipelines/test_adapters.py.
CONFIGURATIONS = (
    {"lora_bias": True},
    {"use_rslora": True, "rank_pattern": {"enter": 2}, "alpha_pattern": {"leave": 3}},
    {"init_lora_weights": "gaussian", "target_modules": "all-linear"},
    {"layers_to_transform": [1], "layers_pattern": "blocks", "target_modules": ["linear"]},
    {"target_modules": ["enter", "linear"], "exclude_modules": ["enter"]},
)


def replicas_of_each_configuration_stay_equal(rank):
    """DDP gets a gradient for all that is trained, and gives each rank that of both halves."""
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for options in CONFIGURATIONS:
        made = []
        for _ in range(2):
            torch.manual_seed(0)
            config = LoraConfig(**{"r": 3, "target_modules": ["enter", "linear"]} | options)
            made.append(LoraPolicies(Model(), config))
            with torch.no_grad():
                for weight in made[-1].parameters():
                    weight.add_(0.1)
        shared, alone = made
        model = DistributedDataParallel(shared.model)
        model(rows.chunk(2)[rank]).square().mean().backward()
        alone.model(rows).square().mean().backward()
        pairs = zip(shared.parameters(), alone.parameters(), strict=True)
        for ours, theirs in some(pairs):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_two_ranks_do_as_one(tmp_path):
    alone, checkpoints = Learner(), Checkpoints(tmp_path / "checkpoints")
    alone.train(0, 3)
    checkpoints.save(3, *alone.snapshot())
    lone = Learner()
    _, means = lone.update_on_uneven_rows()
    losses = {f"loss {i}": torch.tensor(update["loss"]) for i, update in enumerate(means)}
    weights = lone.policies.state_dict("current")
    save_file(weights | losses, tmp_path / "uneven.safetensors")
    torch.multiprocessing.spawn(work, args=(tmp_path / "store", checkpoints.folder), nprocs=WORLD)
    alone.train(3, 5)
    expected, stored = alone.snapshot()[0], checkpoints.latest()
    assert stored.round == 5
    for name in (*POLICIES, "optimizer"):
        for key, x in some(stored.tensors(name).items()):
            torch.testing.assert_close(x, expected[name][key], rtol=1e-5, atol=1e-7)
    resumed = Learner()
    resumed.resume(stored)
    loaded = {name: stored.tensors(name) for name in (*POLICIES, "optimizer")}
    assert same(resumed.snapshot(), (loaded, stored.state))
