"""Policies that start from a LoRA: continued or frozen, with the base or the start as reference."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import (
    as_kohya,
    average_of,
    build,
    change,
    config,
    one_process,
    velocity,
    velocity_of_file,
    wrapped,
)
from tiny import roll_out

from mteditflow.pipelines import LoraPolicies, Start, read_lora
from mteditflow.pipelines.lora_files import joined, without
from mteditflow.testing import check_average, check_saved
from mteditflow.training import shard_model
from tests.loops import some

__all__ = ["build", "velocity"]  # fixtures
FILE = "pytorch_lora_weights.safetensors"
PATTERNS = {"alpha_pattern": {"to_q": 3}, "rank_pattern": {"to_k": 2, "to_out.0": 8}}
#: Options of a start, and those of adapters on it.
STARTS = {
    "continued": ({}, {}, {}),
    "continued to the start": ({}, {"reference": "start"}, {"lora_alpha": 5}),
    "continued patterns": (PATTERNS, {}, PATTERNS | {"lora_alpha": 2}),
    "frozen": (PATTERNS | {"use_rslora": True}, {"frozen": True}, {"r": 2}),
    "frozen to the start": (
        {"target_modules": ["to_q", "to_v"]},
        {"frozen": True, "reference": "start"},
        {"lora_dropout": 0.5},
    ),
}


@pytest.fixture(scope="module")
def written(build, tmp_path_factory):
    """Writes a LoRA of some options that is no no-op; returns its folder."""
    folders = {}

    def write(options):
        key = str(sorted(options.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("start")
            pipeline = build()
            policies = LoraPolicies(pipeline.transformer, config(**options))
            change(policies, seed=3)
            policies.save(pipeline, folders[key])
        return folders[key]

    return write


@pytest.mark.parametrize("name", STARTS)
def test_all_promises_hold(name, build, velocity, written, tmp_path):
    of_start, kept, options = STARTS[name]
    folder, pipeline = written(of_start), build()
    model = pipeline.transformer
    base, started = velocity(model).detach(), velocity_of_file(build, velocity, folder)
    weights = list(model.state_dict().values())
    before = [x.clone() for x in weights]
    start = Start(read_lora(type(pipeline), folder), **kept)
    policies = LoraPolicies(model, config(**options), ema=True, start=start)

    def reference():
        with policies.use("reference"):
            return velocity(model).detach()

    # A no-op on the start, for all policies; the reference is the base or the start.
    assert (started - base).abs().max() > 1e-3
    torch.testing.assert_close(velocity(model).detach(), started, rtol=0, atol=1e-5)
    for policy in ("current", "old", "ema"):
        with policies.use(policy):
            assert torch.equal(velocity(model), velocity(model))
            torch.testing.assert_close(velocity(model).detach(), started, rtol=0, atol=1e-5)
    at_first = reference()
    if start.reference == "base":
        assert torch.equal(at_first, base)
    else:
        torch.testing.assert_close(at_first, started, rtol=0, atol=1e-5)
    if kept == {"frozen": True, "reference": "start"}:
        assert torch.equal(at_first, velocity(model).detach())  # B = 0 adds exact zeros

    # Exactly the trained weights, each once, and a gradient for each layer.
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, policies.parameters())) == sorted(map(id, trained))
    velocity(model).square().sum().backward()
    assert all(p.grad is not None for p in some(trained))
    assert all(p.grad is None for p in some(policies.old_parameters()))

    # Saved and loaded, here and in a plain pipeline, as one LoRA.
    check_saved(
        lambda: velocity(model),
        lambda: change(policies),
        lambda: policies.save(pipeline, tmp_path),
        lambda: policies.load(pipeline, tmp_path),
        elsewhere=lambda: velocity_of_file(build, velocity, tmp_path),
        tolerance=1e-5,
    )
    assert torch.equal(reference(), at_first)
    assert all(torch.equal(x, y) for x, y in some(zip(weights, before, strict=True)))
    check_average(average_of(policies), examples=1)


def test_both_families_start_from_a_file_and_save_one(pipeline, tmp_path):
    rollout = roll_out(pipeline, turns=1)
    rows = torch.tensor([0, 1])
    given = rollout.trajectory.clean[:, 0], torch.tensor([0.3, 0.8]), rows, rows * 0
    kind, kept = type(pipeline.transformer), pipeline.transformer.state_dict()
    kept = {name: x.clone() for name, x in kept.items()}

    def plain(folder=None):
        fresh = kind.from_config(pipeline.transformer.config).eval()
        fresh.load_state_dict(kept)
        made = type(pipeline)(**(pipeline.components | {"transformer": fresh}))
        if folder is not None:
            made.load_lora_weights(folder)
        return made, rollout.velocity(fresh, *given).detach()

    first, base = plain()
    policies = LoraPolicies(first.transformer, config())
    change(policies)
    policies.save(first, tmp_path / "first")
    start = Start(read_lora(type(pipeline), tmp_path / "first"), frozen=True)
    second, _ = plain()
    policies = LoraPolicies(second.transformer, config(r=2), start=start)
    change(policies, seed=1)
    policies.save(second, tmp_path / "second")
    moved = rollout.velocity(second.transformer, *given).detach()
    torch.testing.assert_close(plain(tmp_path / "second")[1], moved, rtol=0, atol=1e-5)
    started = plain(tmp_path / "first")[1]
    assert min((started - base).abs().max(), (moved - started).abs().max()) > 1e-3


def test_a_run_resumes_on_the_start(build, velocity, written):
    """From a state, which holds the adapters alone, and the same file."""
    pipeline = build()
    start = Start(read_lora(type(pipeline), written({})), frozen=True)
    policies = LoraPolicies(pipeline.transformer, config(r=2), start=start)
    change(policies)
    policies.update_old(decay=0.5)
    fresh = LoraPolicies(build().transformer, config(r=2), seed=1, start=start)
    for policy in ("current", "old"):
        fresh.load_state_dict(policies.state_dict(policy), policy)
        with policies.use(policy), fresh.use(policy):
            assert torch.equal(velocity(fresh.model), velocity(policies.model))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("wrap", ["sharded", "ddp"])
def test_a_start_is_frozen_in_a_wrapper(wrap, build, velocity, written, tmp_path):
    pipeline = build()
    model = pipeline.transformer
    start = Start(read_lora(type(pipeline), written({})), frozen=True, reference="start")
    policies = LoraPolicies(model, config(r=2), start=start)
    started = velocity(model).detach()
    change(policies)
    with one_process(tmp_path):
        if wrap == "sharded":
            shard_model(model, blocks=model._no_split_modules)
        else:
            model = wrapped(wrap, model)
        moved = velocity(model)
        assert (moved - started).abs().max() > 1e-3
        moved.square().sum().backward()
        assert all(x.grad is not None for x in some(policies.parameters()))
        with policies.use("reference"), torch.no_grad():
            torch.testing.assert_close(velocity(model), started, rtol=0, atol=1e-6)
        policies.save(pipeline, tmp_path / "lora")
        found = velocity_of_file(build, velocity, tmp_path / "lora")
        torch.testing.assert_close(found, moved.detach(), rtol=0, atol=1e-5)
        policies.load(pipeline, tmp_path / "lora", policy="old")
        with policies.use("old"), torch.no_grad():
            torch.testing.assert_close(velocity(model), found, rtol=0, atol=1e-5)


def test_two_adapters_are_written_as_their_sum():
    # [[1], [0]] [[1, 2]] + [[0, 1], [1, 0]] = [[1, 3], [1, 0]]
    first = {"x.lora_A.weight": torch.tensor([[1.0, 2.0]])}
    first["x.lora_B.weight"] = torch.tensor([[1.0], [0.0]])
    second = {"x.lora_A.weight": torch.eye(2), "x.lora_B.weight": torch.eye(2).flip(0)}
    second |= {"y.lora_A.weight": torch.ones(1, 2), "y.lora_B.weight": torch.ones(2, 1)}
    both = joined(first, second)
    product = both["x.lora_B.weight"] @ both["x.lora_A.weight"]
    assert product.tolist() == [[1.0, 3.0], [1.0, 0.0]]
    assert torch.equal(both["y.lora_B.weight"], second["y.lora_B.weight"])
    left = without(both, first)
    assert left.keys() == second.keys()
    assert all(torch.equal(left[name], x) for name, x in some(second.items()))
    assert without(first, first) == {}


def test_a_file_of_another_start_is_refused(build, written, tmp_path):
    pipeline = build()
    start = Start(read_lora(type(pipeline), written({})), frozen=True)
    policies = LoraPolicies(pipeline.transformer, config(), start=start)
    kept = [p.clone() for p in policies.parameters()]
    for folder in some([written(PATTERNS), written({"lora_alpha": 7})]):
        with pytest.raises(ValueError, match="expected the frozen start in the file, got other we"):
            policies.load(pipeline, folder)
    assert all(torch.equal(p, x) for p, x in some(zip(policies.parameters(), kept, strict=True)))


@pytest.mark.parametrize(
    ("of_start", "kept", "options", "message"),
    [
        ({}, {}, {"r": 8}, r"^start: expected rank 8 of the adapter, got 4 in .*to_q\.lora_A"),
        (PATTERNS, {}, {}, r"^start: expected rank 4 of the adapter, got (2|8) in "),
        (
            {},
            {},
            {"target_modules": ["to_q"]},
            r"^start: expected the layers of the adapter, got others, as \['single_.*to_k",
        ),
        ({}, {"frozen": True}, {"lora_bias": True}, r"^config\.lora_bias: expected False above a"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(of_start, kept, options, message, build, written):
    start = Start(read_lora(type(build()), written(of_start)), **kept)
    with pytest.raises(ValueError, match=message):
        LoraPolicies(build().transformer, config(**options), start=start)


def test_a_start_of_another_model_is_refused(build):
    pair = {"nowhere.lora_A.weight": torch.ones(1, 2), "nowhere.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(ValueError, match=r"^start: "):
        LoraPolicies(build().transformer, config(), start=Start(pair, frozen=True))
    pair = {"proj_out.lora_A.weight": torch.ones(1, 2), "proj_out.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(ValueError, match=r"^start: expected shape \[1, 32\] of proj_out\.lora_A"):
        LoraPolicies(build().transformer, config(), start=Start(pair, frozen=True))
    with pytest.raises(ValueError, match=r"^reference: expected one of \['base', 'start'\], got"):
        Start(pair, reference="old")


# Files.


def test_a_file_of_another_trainer_is_read_with_its_alpha(build, tmp_path):
    layer = "transformer_blocks.0.attn.to_out.0"
    weights = {
        f"{layer}.lora_A.weight": torch.ones(4, 32),
        f"{layer}.lora_B.weight": torch.ones(32, 4),
    }
    save_file(as_kohya(weights), tmp_path / "kohya.safetensors")  # alpha 10, rank 4
    found = read_lora(type(build()), tmp_path / "kohya.safetensors")
    assert found.keys() == weights.keys()
    product = found[f"{layer}.lora_B.weight"] @ found[f"{layer}.lora_A.weight"]
    assert torch.equal(product, torch.full((32, 32), 10.0))  # 4 * 10 / 4


def test_half_precision_is_read_as_float32(build, written, tmp_path):
    halves = {k: x.half() for k, x in load_file(written({}) / FILE).items()}
    save_file(halves, tmp_path / FILE)
    assert {x.dtype for x in read_lora(type(build()), tmp_path).values()} == {torch.float32}


def test_what_is_no_lora_of_the_transformer_is_refused(build, written, tmp_path):
    kind, whole = type(build()), load_file(written({}) / FILE)
    with pytest.raises(FileNotFoundError, match="expected a LoRA in diffusers' format, got no fil"):
        read_lora(kind, tmp_path)
    missing = sorted(whole)[0]
    for state in (
        whole | {"text_encoder.q.lora_A.weight": torch.ones(1, 1)},
        whole | {"transformer.x.lora_B.bias": torch.ones(1)},
        {name: x for name, x in whole.items() if name != missing},
    ):
        save_file(state, tmp_path / FILE)
        with pytest.raises(ValueError, match="expected a LoRA of the transformer alone, two "):
            read_lora(kind, tmp_path)
    torch.save(whole, tmp_path / "pickled.safetensors")
    with pytest.raises((OSError, ValueError), match=r"pickled\.safetensors"):
        read_lora(kind, tmp_path / "pickled.safetensors")
