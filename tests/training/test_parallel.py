"""Gradients are sums over ranks, replicated or sharded, and equal those of one process."""

import math
import re
import warnings
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch import nn

from mteditflow._sharding import whole
from mteditflow.objectives import Output, Units
from mteditflow.pipelines import LoraPolicies
from mteditflow.rewards import Fault, Lost, TurnScores
from mteditflow.training import (
    Updater,
    gather_scores,
    parallel,
    partition_model,
    shard_model,
    sum_gradients,
)
from tests.loops import some
from tests.training.in_ranks import in_ranks

ROWS = 8


class Block(nn.Sequential):
    """A frozen layer and a trained one."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4))


def build():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def units_of(trajectories):
    rows = torch.nn.functional.pad(trajectories[:, None, None], (0, 2))
    mask = torch.ones(len(rows), 1, dtype=torch.bool)
    return Units(rows, mask, None, None, count=len(rows))


def train(model, rows):
    """Three updates on these rows of a fixed data set; means and norms of each, and weights."""
    x, target = torch.randn(2, ROWS, 4, generator=torch.Generator().manual_seed(1))
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    updater = Updater(
        torch.optim.AdamW(trained(model), lr=0.1), lambda: trained(model), max_grad_norm=0.05
    )

    own = units_of(rows[weight[rows] > 0])

    def losses(part):
        row = part.rows[:, 0, 0]
        return Output((model(x[row]) - target[row]).square().mean(dim=1), {})

    updates = [updater.step(own.split(2), losses, count=own.count) for _ in range(3)]
    told = [[u.means["loss"], u.grad_norm, u.outcome == "taken"] for u in updates]
    return told, torch.cat([whole(p).flatten() for p in trained(model)]).tolist()


def own_rows():
    size = ROWS // dist.get_world_size()
    return torch.arange(ROWS)[dist.get_rank() * size :][:size]


def replicated():
    return train(build(), own_rows())


def sharded():
    model = build()
    shard_model(model, blocks=["Block"])
    return train(model, own_rows())


def partitioned():
    """Weights of the base outside of passes, then as ``train`` with an adapter for each block."""
    from tests.flux.over_gloo_alone import without_extension

    without_extension()
    model = build().requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        partition_model(model)
    said = [str(x.message) for x in caught if x.category is UserWarning]
    base = list(model.parameters())
    sizes = [weight.numel() for weight in base]
    adapted(model)
    trained = train(model, own_rows())
    return [said, sizes, [weight.numel() for weight in base], trained]


def adapted(model):
    """The model with one adapter for each block."""
    LoraPolicies(model, LoraConfig(r=1, target_modules=["0.1", "1.0"]))
    return model


def broken_on_one_rank():
    weight = nn.Parameter(torch.ones(1))
    updater = Updater(torch.optim.SGD([weight], lr=0.1), lambda: [weight], max_grad_norm=1.0)
    factor = math.nan if dist.get_rank() == 1 else 1.0
    update = updater.step(
        [units_of(torch.arange(1))], lambda part: Output(weight * factor, {}), count=1
    )
    return update.outcome, update.reason, weight.item()


def unused_on_one_rank():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    (weights[dist.get_rank()] * (dist.get_rank() + 1)).sum().backward()
    weights.append(nn.Parameter(torch.ones(1)))  # on no rank
    sum_gradients(weights)
    return [None if weight.grad is None else weight.grad.tolist() for weight in weights]


def gathered_scores():
    rank = dist.get_rank()
    score = torch.tensor([[5.0, 1 / 3]]) if rank == 0 else torch.tensor([[1.0], [math.nan]])
    lost = {} if rank == 0 else {(1, 0): Lost(Fault.timeout, "no answer", 2)}
    scores = TurnScores(score, torch.ones_like(score) > 0, lost)
    terms, own = gather_scores({"following": scores})
    found = terms["following"]
    assert str(found.lost[2, 0]) == str(Lost(Fault.timeout, "no answer", 2))
    return found.score.nan_to_num(-1).tolist(), found.turn_mask.tolist(), [own.start, own.stop]


def several():
    return {
        "replicated": replicated(),
        "sharded": sharded(),
        "partitioned": partitioned() if find_spec("deepspeed") else None,
        "broken": broken_on_one_rank(),
        "unused": unused_on_one_rank(),
        "gathered": gathered_scores(),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks found; they start once."""
    return in_ranks("tests.training.test_parallel:several", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_updates_are_those_of_one_process(how, found):
    told, weights = train(build(), torch.arange(ROWS))
    for rank in some(found):
        other_told, other = rank[how]
        assert torch.allclose(torch.tensor(other), torch.tensor(weights), rtol=1e-6, atol=1e-7)
        for ours, theirs in some(zip(told, other_told, strict=True)):
            assert theirs == pytest.approx(ours, rel=1e-6)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs mteditflow[zero]")
def test_a_partitioned_base_model_trains_its_adapters_as_one_process(found):
    told, weights = train(adapted(build().requires_grad_(False)), torch.arange(ROWS))
    for rank in some(found):
        said, before, after, (other_told, other) = rank["partitioned"]
        assert before == after == [0] * 8
        assert len(other) == len(weights) == 16  # of two adapters, whole on every rank
        assert torch.allclose(torch.tensor(other), torch.tensor(weights), rtol=1e-6, atol=1e-7)
        for ours, theirs in some(zip(told, other_told, strict=True)):
            assert theirs == pytest.approx(ours, rel=1e-6)
        (warning,) = (line for line in said if "partition_model" in line)
        assert "without gradient checkpointing all gathered weights are kept" in warning


def test_ranks_skip_together_sum_what_some_lack_and_collect_scores(found):
    third = float(torch.tensor(1 / 3))
    for rank in some(found):
        assert rank["broken"] == ["skipped", "not finite: loss and gradient", 1.0]
        assert rank["unused"] == [[1.0, 1.0], [2.0, 2.0, 2.0], None]
        score, mask, _ = rank["gathered"]
        assert score == [[5.0, third], [1.0, -1.0], [-1.0, -1.0]]
        assert mask == [[True, True], [True, False], [True, False]]
    assert [rank["gathered"][2] for rank in found] == [[0, 1], [1, 3]]


def test_one_process_has_nothing_to_sum_or_shard():
    weight = nn.Parameter(torch.ones(1))
    weight.sum().backward()
    sum_gradients([weight])
    assert weight.grad.item() == 1.0
    with pytest.raises(RuntimeError, match="shard_model: expected several processes"):
        shard_model(build(), blocks=["Linear"])
    with pytest.raises(ValueError, match="terms: expected at least one, got none"):
        gather_scores({})


@pytest.fixture
def deepspeed(monkeypatch):
    """An installed deepspeed of any version, as far as its metadata say."""

    def install(version):
        def found(name):
            if version is None:
                raise PackageNotFoundError(name)
            return version

        monkeypatch.setattr(parallel, "version", found)

    install("0.19.8")
    return install


ADAPTED = get_peft_model(build(), LoraConfig(r=1, target_modules=["0.0"]))


@pytest.mark.parametrize(
    ("model", "zero", "message"),
    [
        (ADAPTED, {}, "model: expected one without adapters, which would be partitioned too"),
        (ADAPTED.base_model.model, {}, "model: expected one without adapters"),
        (build(), {"stage": 2}, r"zero\.stage: expected 3, got 2"),
        (
            build(),
            {"memory_efficient_linear": True},
            r"zero\.memory_efficient_linear: expected False, got True",
        ),
        (
            build(),
            {"offload_optimizer": {"device": "cpu"}},
            r"zero\.offload_optimizer: expected none, since there is no optimizer in it",
        ),
    ],
)
def test_what_deepspeed_would_do_to_adapters_and_to_the_process_is_refused(
    deepspeed, model, zero, message
):
    with pytest.raises(ValueError, match=f"^{message}"):
        partition_model(model, zero)


@pytest.mark.parametrize("found", [None, "0.16.9", "0.19.0", "0.19.7+cu130"])
def test_deepspeed_that_is_absent_or_too_old_is_refused(deepspeed, found):
    deepspeed(found)
    message = f"deepspeed: expected 0.19.8 or newer, got {found or 'none'}; pip install"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}"):
        partition_model(build())


@pytest.mark.parametrize("found", ["0.19.8", "0.19.10+cu130", "0.20", "1.0.0"])
def test_one_process_has_nothing_to_partition(deepspeed, found):
    deepspeed(found)
    with pytest.raises(RuntimeError, match=r"^partition_model: expected several processes"):
        partition_model(build(), {"offload_optimizer": {"device": "none"}})
