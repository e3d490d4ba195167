"""The trainer's benchmarks measure what they say; the code for full size runs here, tiny."""

import json
import time
from pathlib import Path

import pytest
import torch
from mteditflow_examples.shapes.editor import build_kontext

from benchmarks import (
    plain_nft,
    rewards_page,
    trainer,
    trainer_cost,
    trainer_full_size,
    trainer_memory,
)
from benchmarks.gpu_models import tiny_size
from benchmarks.trainer_batch import ForwardCounter
from benchmarks.trainer_parts import (
    ModelClock,
    first_batch,
    make_world,
)
from mteditflow.pipelines import LoraPolicies
from tests.loops import some

ROOT = Path(__file__).parents[1]
SMALL = ("--data.groups", 2, "--data.group-size", 2, "--data.turns", 1)
SMALL += ("--sampling.steps", 2, "--training.minibatches", 1)
FAMILIES = pytest.mark.parametrize("name", ["kontext", "klein"])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), counts=(4, 1))


@pytest.mark.parametrize(("name", "weights"), [("kontext", 11.90e9), ("klein", 9.08e9)])
def test_full_sizes_have_the_weights_of_their_models(name, weights):
    size = trainer_full_size.SIZES[name]
    model, vae = (
        trainer_full_size.made(*part, "meta", torch.bfloat16)
        for part in (size.transformer, size.vae)
    )
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(weights, rel=1e-3)
    assert sum(p.numel() for p in vae.parameters()) == pytest.approx(84e6, rel=0.01)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@FAMILIES
def test_full_size_makes_a_section(name, tmp_path, monkeypatch):
    monkeypatch.setitem(trainer_full_size.SIZES, name, tiny_size(name))
    monkeypatch.setattr(trainer_full_size, "TURNS", 2)
    given = ["trainer", "--full-size", name, "--device", "cpu", "--dtype", "float32"]
    given += ["--batch", "2", "--rounds", "1", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", given)
    assert trainer.main()
    (section,) = json.loads((tmp_path / "trainer.json").read_text()).values()
    rows = {row[0]: row[1:] for row in section["tables"][0]["rows"]}
    branches, turns, steps = (1 if name == "kontext" else 2), trainer_full_size.TURNS, 2
    calls = branches * turns * steps * (1 if name == "kontext" else 2)  # klein: one at a time
    assert rows["rollout, recorded"][-1] == rows["rollout, plain calls"][-1] == calls
    micro_batches = turns * 2 // 2
    assert rows["update, old = current"][-1] == 2 * branches * micro_batches
    assert rows["update, old differs"][-1] == 3 * branches * micro_batches
    assert rows["update, plain loop"][1:] == [
        pytest.approx(rows["update, old differs"][1]),
        *rows["update, plain loop"][2:4],
        3 * branches * micro_batches,
    ]
    assert all(seconds > 0 and flop > 0 for seconds, flop, *_ in some(rows.values()))


@FAMILIES
def test_the_plain_loop_computes_the_velocity_of_the_replay(name):
    size = tiny_size(name)
    editor = trainer_full_size.build_editor(size, device="cpu", dtype=torch.float32, compiled=False)
    policies = LoraPolicies(editor.transformer, editor.lora(rank=2, alpha=2))
    rollout = trainer_full_size.roll_out(editor, size, 2)
    loop = plain_nft.PlainLoop(rollout, policies, torch.optim.SGD(policies.parameters()), "cpu", 2)
    clean, sigma = rollout.trajectory.clean[:1, 0], torch.tensor([0.5])
    first = torch.tensor([0])
    with torch.no_grad():
        ours = rollout.velocity(policies.model, clean, sigma, first, first)
        torch.testing.assert_close(loop.forward(clean, sigma), ours, rtol=1e-4, atol=1e-5)


def test_flop_are_those_of_the_products():
    size = tiny_size("kontext")
    editor = trainer_full_size.build_editor(size, device="cpu", dtype=torch.float32, compiled=False)
    calls = []
    with trainer_full_size.shapes_of_calls(editor.transformer, calls):
        trainer_full_size.roll_out(editor, size, 1)
    assert len(calls) == size.steps * trainer_full_size.TURNS
    forward, both = trainer_full_size.flops_of(size, calls[0])
    hidden, tokens, texts = 64, 72, 10
    blocks = 2 * 12 * hidden**2 * (tokens + texts) * 4  # 1 + 3 blocks of 12 h^2 weights a token
    assert 0.9 * blocks < forward < 1.5 * blocks
    assert 2 * forward < both < 2.5 * forward  # no gradients of frozen weights


class Slow(torch.autograd.Function):
    """Takes its time in the backward pass."""

    @staticmethod
    def forward(context, x, work):
        context.work = work
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        context.work()
        return gradient, None


def test_the_clock_of_models_counts_backward_passes_and_nothing_else():
    now = [0.0]

    class Model(torch.nn.Module):
        def forward(self, x):
            now[0] += 1
            return (Slow.apply(x, lambda: advance(10)),)

    def advance(by):
        now[0] += by

    model = Model()
    pipeline = type("Pipeline", (), {"transformer": model, "vae": Vae(lambda: advance(100))})()
    clock = ModelClock(pipeline, [], lambda: now[0])
    x = torch.ones(1, requires_grad=True)
    pipeline.vae.encode()
    advance(1000)
    branches = model(x)[0] + model(x)[0]  # two branches: one backward pass, counted once
    Slow.apply(branches, lambda: advance(10_000)).sum().backward()
    assert clock.seconds == {
        "VAE": 100,
        "transformer, forward": 2,
        "transformer, backward": 20,
    }


class Vae:
    def __init__(self, work):
        self.encode = self.decode = work


def test_rounds_are_measured_without_the_scorer(world, tmp_path):
    found = trainer_cost.measure_rounds(
        "shapes-nft", world, tmp_path, *SMALL, rounds=2, clock=time.thread_time
    )
    (seconds,) = found
    kinds = {*trainer_cost.MODELS} - {"text encoders"}  # embeddings may be known from before
    assert kinds <= seconds.keys()
    assert 0 < trainer_cost.share_outside(seconds) < 1


def test_one_forward_is_saved_while_old_equals_current(world, tmp_path):
    row = trainer_cost.skipping_row(0.1, world, tmp_path, *SMALL, rounds=2)
    cells = dict(zip(trainer_cost.UPDATES, row, strict=True))
    assert cells["forwards, old = current"] == 2
    assert cells["forwards, old differs"] == 3


def test_a_recorded_call_gives_the_same_images(monkeypatch):
    monkeypatch.setitem(trainer_cost.SIZES, "tiny", ({}, 12, 2, 2))
    row = trainer_cost.recording_row("tiny", 1, rounds=2)
    assert row[:3] == ["tiny", 2, 1]
    pipeline, made = build_kontext(), []
    monkeypatch.setattr(trainer_cost, "edit", keeping(trainer_cost.edit, made))
    trainer_cost.edit(pipeline, 2, 1, 2)
    trainer_cost.record(pipeline, 2, 1, 2, verify=True)
    assert made[0] == made[1]


def keeping(call, made):
    def called(*args):
        made.append([image.tobytes() for image in call(*args)])

    return called


@pytest.mark.parametrize(("objective", "members"), [("nft", 4), ("grpo", 2)])
def test_peak_memory_does_not_grow_with_turns(objective, members, world, tmp_path):
    more = ("--data.group-size", members)
    row = trainer_memory.peak_row(objective, "turns", (1, 3), world, tmp_path, *more)
    cells = dict(zip(trainer_memory.PEAKS, row, strict=True))
    assert cells["rows of an update"] == "4, 12"  # of GRPO each turn has two steps
    assert cells[""] == "met"
    assert cells["largest / smallest"] <= trainer_memory.GROWN
    small, large = map(float, cells["trajectories, MiB"].split(", "))
    assert large == pytest.approx(3 * small, rel=0.05)


def test_checkpointing_takes_less_memory(world, tmp_path):
    more = (*SMALL, "--data.group-size", 4)
    row = trainer_memory.choice_row("tiny", 8, world, tmp_path, *more, rounds=2)
    name, rows, size, peak, _, checkpointed, _, _ = row
    assert (name, rows, size) == ("tiny", 8, 8)
    assert float(checkpointed) < 0.6 * float(peak)


def test_rows_with_a_graph_are_counted_apart(world, tmp_path):
    with first_batch("shapes-nft", world, tmp_path, *SMALL, "--objective.kl-coef", 0.1) as batch:
        counter = ForwardCounter(batch.policies.model)
        batch.losses(batch.units())
        assert counter.lap() == (2, 4, 4)
        assert counter.lap() == (0, 0, 0)


def test_the_page_is_made_from_the_stored_results():
    stored = json.loads((ROOT / "benchmarks" / "trainer.json").read_text())
    page = (ROOT / "benchmarks" / "trainer.md").read_text()
    assert page == rewards_page.render(stored, trainer.HEADER)
    assert "MISSED" not in page
