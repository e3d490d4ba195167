"""The optimizer's state: through files, onto a fresh optimizer, to the bit."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load, save
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mteditflow.training import load_optimizer_state, optimizer_state
from tests.loops import some

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (4,), (), (2, 3)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step(optimizer, parameters, seed):
    """The third parameter has no gradient at first, as a layer that was not used."""
    generator = torch.Generator().manual_seed(seed)
    for position, weight in enumerate(parameters):
        gradient = torch.randn(weight.shape, generator=generator)
        weight.grad = None if position == 2 and seed < 2 else gradient
    optimizer.step()


def through_files(tensors, values):
    return load(save(tensors)), json.loads(json.dumps(values))


@pytest.mark.parametrize("made", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("stepped", [False, True])
def test_the_next_steps_are_those_of_the_undisturbed(made, steps, stepped):
    parameters = weights()
    optimizer = made(parameters)
    for seed in range(steps):
        step(optimizer, parameters, seed)
    stored = through_files(*optimizer_state(optimizer))
    others = [nn.Parameter(weight.detach().clone()) for weight in parameters]
    resumed = made(others)
    if stepped:
        step(resumed, others, 99)
        with torch.no_grad():
            for other, weight in zip(others, parameters, strict=True):
                other.copy_(weight)
    load_optimizer_state(resumed, *stored)
    for seed in range(steps, steps + 3):
        step(optimizer, parameters, seed)
        step(resumed, others, seed)
    assert all(torch.equal(a, b) for a, b in some(zip(parameters, others, strict=True)))
    (tensors, values), (their_tensors, their_values) = map(optimizer_state, (optimizer, resumed))
    assert values == their_values
    assert tensors.keys() == their_tensors.keys()  # plain SGD keeps none
    assert all(map(torch.equal, tensors.values(), map(their_tensors.get, tensors)))


def test_groups_and_options_are_restored():
    first, second = weights()[:2]
    groups = [{"params": [first], "lr": 0.5, "initial_lr": 0.7}, {"params": [second]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    stored = through_files(*optimizer_state(optimizer))
    resumed = torch.optim.AdamW([{"params": [first], "extra": 1}, {"params": [second]}], lr=9.0)
    load_optimizer_state(resumed, *stored)
    for group, expected in some(zip(resumed.param_groups, optimizer.param_groups, strict=True)):
        assert group == expected
        assert isinstance(group["betas"], tuple)


def test_state_is_a_copy_and_so_is_what_is_loaded():
    parameters = weights()
    optimizer = OPTIMIZERS["adamw"](parameters)
    step(optimizer, parameters, 0)
    tensors, values = optimizer_state(optimizer)
    load_optimizer_state(optimizer, tensors, values)
    kept = {name: x.clone() for name, x in tensors.items()}
    step(optimizer, parameters, 1)
    assert all(torch.equal(tensors[name], x) for name, x in some(kept.items()))


def test_dtypes_stay_as_stored():
    """Optimizer.load_state_dict would make a float32 average of a bfloat16 weight bfloat16."""
    weight = nn.Parameter(torch.ones(2).bfloat16())
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"average": torch.tensor([1.00001, 2.0]), "count": 3, "kind": None}
    stored = through_files(*optimizer_state(optimizer))
    resumed = torch.optim.SGD([weight], lr=0.1)
    load_optimizer_state(resumed, *stored)
    held = resumed.state[weight]
    assert torch.equal(held["average"], torch.tensor([1.00001, 2.0]))
    assert (held["count"], held["kind"]) == (3, None)


@pytest.mark.parametrize(("capturable", "place"), [(False, "cpu"), (True, "meta")])
def test_step_counts_are_where_torch_wants_them(capturable, place):
    """On the CPU, unless the optimizer is capturable; the averages are where the weight is."""
    here, elsewhere = (nn.Parameter(torch.ones(2, device=device)) for device in ("cpu", "meta"))
    optimizer = torch.optim.AdamW([here])
    here.grad = torch.ones(2)
    optimizer.step()
    tensors, values = optimizer_state(optimizer)
    values["groups"][0]["capturable"] = capturable
    resumed = torch.optim.AdamW([elsewhere])
    load_optimizer_state(resumed, tensors, values)
    held = resumed.state[elsewhere]
    assert (held["step"].device.type, held["exp_avg"].device.type) == (place, "meta")


def test_accelerates_wrapper_is_looked_into():
    parameters = weights()
    try:
        wrapped = Accelerator(cpu=True).prepare(OPTIMIZERS["adamw"](parameters))
        step(wrapped, parameters, 0)
        tensors, values = optimizer_state(wrapped)
        assert "0.exp_avg" in tensors
        load_optimizer_state(wrapped, tensors, values)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def unchanged(optimizer, *stored, match):
    before = optimizer_state(optimizer)
    with pytest.raises(ValueError, match=match):
        load_optimizer_state(optimizer, *stored)
    tensors, values = optimizer_state(optimizer)
    assert values == before[1]
    assert all(torch.equal(tensors[name], x) for name, x in some(before[0].items()))


def test_another_optimizers_state_is_refused_and_changes_nothing():
    parameters = weights()
    optimizer = OPTIMIZERS["adamw"](parameters)
    step(optimizer, parameters, 0)
    tensors, values = optimizer_state(optimizer)
    fewer = optimizer_state(torch.optim.AdamW(parameters[:2]))
    unchanged(optimizer, *fewer, match=r"values: expected the state of parameters \[\[\[3, 4\]")
    missing = {name: x for name, x in tensors.items() if name != "0.exp_avg"}
    unchanged(optimizer, missing, values, match=r"missing or left over are \['0.exp_avg'\]")
    unchanged(optimizer, tensors | {"x": torch.ones(1)}, values, match=r"left over are \['x'\]")


def test_refuses_what_it_cannot_store():
    parameters = weights()
    optimizer = torch.optim.LBFGS(parameters, history_size=2)
    for _ in range(3):
        optimizer.step(lambda: sum((weight**2).sum() for weight in parameters))
    optimizer.state[parameters[0]]["old"] = [torch.ones(1)]
    with pytest.raises(TypeError, match="cannot store Tensor"):
        optimizer_state(optimizer)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer"):
        optimizer_state(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"got deepspeed\.runtime\.ZeroOptimizer"):
        optimizer_state(type("ZeroOptimizer", (), {"__module__": "deepspeed.runtime"})())


@pytest.fixture(scope="module")
def mesh():
    """A mesh of this process alone, over which DTensors are made as on many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def sharded(mesh, seed=0):
    """The weights that have an axis, split over it."""
    split = [distribute_tensor(x.detach(), mesh, [Shard(0)]) for x in weights(seed) if x.ndim]
    return [nn.Parameter(x) for x in split]


def test_sharded_state_is_stored_whole_and_placed_as_its_parameter(mesh):
    plain, split = [x for x in weights() if x.ndim], sharded(mesh)
    optimizers = [OPTIMIZERS["adamw"](parameters) for parameters in (plain, split)]
    generator = torch.Generator().manual_seed(0)
    for one, other in zip(plain, split, strict=True):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = distribute_tensor(one.grad, mesh, [Shard(0)])
    for optimizer in optimizers:
        optimizer.step()
    (whole, same_values), (tensors, values) = map(optimizer_state, optimizers)
    assert values == same_values
    assert tensors.keys() == whole.keys()
    for name, x in some(tensors.items()):
        assert not isinstance(x, DTensor)
        torch.testing.assert_close(x, whole[name])
    fresh = sharded(mesh)
    resumed = OPTIMIZERS["adamw"](fresh)
    load_optimizer_state(resumed, *through_files(tensors, values))
    for weight in some(fresh):
        held = resumed.state[weight]
        assert held["exp_avg"].placements == held["exp_avg_sq"].placements == (Shard(0),)
        assert not isinstance(held["step"], DTensor)
    again, _ = optimizer_state(resumed)
    assert all(torch.equal(again[name], x) for name, x in some(tensors.items()))


@pytest.mark.parametrize("other", ["placements", "shape", "plain parameter"])
def test_state_that_is_sharded_otherwise_than_its_parameter_is_refused(mesh, other):
    split = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    weight = nn.Parameter(torch.ones(4, 2) if other == "plain parameter" else split)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    average = distribute_tensor(
        torch.ones(4 if other == "shape" else (4, 2)),
        mesh,
        [Replicate() if other == "placements" else Shard(0)],
    )
    optimizer.state[weight] = {"average": average}
    with pytest.raises(TypeError, match=r"^0\.average: expected it to be sharded as its param"):
        optimizer_state(optimizer)
