"""Editors whose weights are quantized at load: the record, training, files; ``make bases``."""

import logging

import pytest
import torch
from mteditflow_examples.shapes.editor import build_kontext, call_options
from tiny import CHAIN, picture
from tiny_pipelines.checks import replay
from torch import nn

from mteditflow import FlowSDE, clipped_surrogate_loss, trajectory_generators
from mteditflow.pipelines import Editor, LoraPolicies, Rollout
from mteditflow.pipelines.prompts import working_on
from mteditflow.pipelines.quantization import QUANTIZATIONS, is_quantized, layers_in_blocks
from tests.loops import some

pytestmark = [
    pytest.mark.bases,
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
]
SOLVER = FlowSDE(0.7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "kontext"
    build_kontext().save_pretrained(folder)
    return folder


@pytest.fixture(params=QUANTIZATIONS)
def kind(request, monkeypatch):
    pytest.importorskip(QUANTIZATIONS[request.param])
    loud = logging.getLogger("bitsandbytes.autograd._functions")  # a line for each matmul
    monkeypatch.setattr(loud, "disabled", True)
    return request.param


def load(saved, **options):
    call = call_options(build_kontext(), steps=2)
    del call["output_type"]
    return Editor.load(saved, call=call, **options)


def rolled_out(editor):
    image = picture(build_kontext(), 0)
    parts = editor.roll_out(
        [image, image],
        [CHAIN[0][:2]] * 2,
        generators=trajectory_generators(0, 2),
        group=torch.tensor([0, 0]),
        batch=2,
        solver=SOLVER,
    )
    return Rollout.concatenate([part.rollout for part in parts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_editor_replays_and_trains(saved, kind, dtype, tmp_path):
    editor = load(saved, quantize=kind, dtype=dtype)
    model = editor.transformer
    names = layers_in_blocks(model)
    assert {*names} < {n for n, x in model.named_modules() if isinstance(x, nn.Linear)}
    assert is_quantized(model)
    assert model.dtype == dtype
    policies = LoraPolicies(model, editor.lora(rank=4, alpha=8))
    rollout = rolled_out(editor)
    rows = rollout.step_mask.nonzero(as_tuple=True)
    stored = rollout.trajectory.log_prob[rows]
    log_prob = replay(rollout, model, SOLVER, rows)
    assert (log_prob - stored).abs().max() < (1e-6 if dtype == torch.float32 else 2e-3)
    advantage = torch.where(rows[0] == 0, 1.0, -1.0)
    clipped_surrogate_loss(
        log_prob, stored, advantage, clip_low=0.2, clip_high=0.2
    ).mean().backward()
    gradients = [weight.grad for weight in policies.parameters()]
    assert all(g is not None and g.isfinite().all() for g in some(gradients))
    assert sum(g.abs().sum() for g in gradients) > 0
    policies.save(editor.pipeline, tmp_path / "lora")
    plain = load(saved)
    LoraPolicies(plain.transformer, plain.lora(rank=4, alpha=8)).load(
        plain.pipeline, tmp_path / "lora"
    )


def test_quantized_velocities_are_near_the_plain_ones(saved, kind):
    plain, quantized = (rolled_out(load(saved, quantize=k)) for k in (None, kind))
    moved = plain.trajectory.latents[:, :, 0] - plain.trajectory.latents[:, :, -1]
    apart = plain.trajectory.latents[:, :, -1] - quantized.trajectory.latents[:, :, -1]
    assert 0 < apart.norm() < (0.05 if kind == "int8" else 0.3) * moved.norm()


def test_text_encoders_are_quantized_but_for_what_stays_in_float32(saved, kind):
    editor = load(saved, quantize=kind)
    encoders = [x for x in editor._prompts._encoders if is_quantized(x)]
    assert [type(x).__name__ for x in encoders] == ["CLIPTextModel", "T5EncoderModel"]
    kept = [x for n, x in encoders[1].named_modules() if n.endswith(".wo")]
    assert all(type(x) is nn.Linear and type(x.weight) is nn.Parameter for x in some(kept))
    with working_on(encoders, torch.device("cpu")):
        pass
    assert all(is_quantized(x) for x in some(encoders))
