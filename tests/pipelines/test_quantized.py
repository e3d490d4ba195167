"""Training adapters on quantized bases: bitsandbytes 4 and 8 bit, torchao int8; ``make bases``.

diffusers refuses bitsandbytes without a GPU, though bitsandbytes has kernels for the CPU: that
check of diffusers' is lifted here, all else is as users have it.
"""

import logging

import pytest
import torch
from bases import SOLVER, TARGETS, falls, policies_on, replayed
from diffusers import BitsAndBytesConfig, TorchAoConfig
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from peft import LoraConfig
from tiny import roll_out
from tiny_pipelines.checks import replay

from mteditflow import clipped_surrogate_loss, interpolate, nft_loss, velocity_target
from mteditflow.pipelines import LoraPolicies
from tests.loops import some

pytestmark = [
    pytest.mark.bases,
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
]
KINDS = ["bitsandbytes 4 bit", "bitsandbytes 8 bit", "torchao int8"]
DTYPES = [torch.float32, torch.bfloat16]


def quantization(kind, dtype):
    """diffusers' configuration of a kind; skips where its package is absent."""
    if kind.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        if kind.endswith("8 bit"):
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    torchao = pytest.importorskip("torchao.quantization")
    if kind == "torchao int8":
        return TorchAoConfig(torchao.Int8WeightOnlyConfig())
    return TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig(), ["proj_out"])


@pytest.fixture
def on_cpu(monkeypatch):
    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        check = lambda *args, **kwargs: None  # noqa: E731
        monkeypatch.setattr(getattr(bnb_quantizer, name), "validate_environment", check)
    loud = logging.getLogger("bitsandbytes.autograd._functions")  # a line for each matmul
    monkeypatch.setattr(loud, "disabled", True)


@pytest.fixture
def load(pipeline, tmp_path, on_cpu):
    """Loads the transformer, saved to disk, in one of the kinds; None is unquantized."""
    pipeline.transformer.save_pretrained(tmp_path / "base")

    def loaded(kind, dtype):
        options = {} if kind is None else {"quantization_config": quantization(kind, dtype)}
        if kind is not None and kind.startswith("bitsandbytes"):
            options["device_map"] = {"": "cpu"}
        model = type(pipeline.transformer).from_pretrained(
            tmp_path / "base", torch_dtype=dtype, **options
        )
        made = type(pipeline)(**pipeline.components | {"transformer": model})
        for name, part in made.components.items():
            if isinstance(part, torch.nn.Module) and name != "transformer":
                part.to(dtype)
        made.set_progress_bar_config(disable=True)
        for layer in model.modules():  # whatever the processor
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
        return made

    return loaded


def velocity_at_half(rollout, model):
    """Velocity at re-noised clean latents of all turns, with its target."""
    rows = rollout.turn_mask.nonzero(as_tuple=True)
    clean, sigma = rollout.trajectory.clean[rows], torch.full((len(rows[0]),), 0.5)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean.dtype)
    x_t = interpolate(clean, noise, sigma)
    return rollout.velocity(model, x_t, sigma, *rows), velocity_target(clean, noise).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_is_one_and_both_objectives_train_the_adapter(load, kind, dtype):
    """In the batch as sampled to the last bit; in others within rounding of the log-prob."""
    pipeline = load(kind, dtype)
    model = pipeline.transformer
    policies = policies_on(pipeline)
    assert model.dtype == dtype  # though the adapters are float32, and klein has no biases
    with policies.use("reference"):
        before = replayed_reference(pipeline)
    rollout, deviation, gradients = replayed(pipeline, policies)
    assert deviation == 0
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in some(gradients))
    rows = rollout.step_mask.nonzero(as_tuple=True)
    stored = rollout.trajectory.log_prob[rows]
    advantage = torch.where(rows[0] == 0, 1.0, -1.0)

    def grpo():
        log_prob = replay(rollout, model, SOLVER, rows)
        clips = {"clip_low": 0.2, "clip_high": 0.2}
        return clipped_surrogate_loss(log_prob, stored, advantage, **clips).mean()

    def nft():
        velocity, target = velocity_at_half(rollout, model)
        old = policies.old_velocity(velocity, lambda: velocity_at_half(rollout, model)[0])
        return nft_loss(velocity, old, target, torch.ones(len(velocity)), nft_beta=1.0).mean()

    assert falls(grpo, policies)
    assert falls(nft, policies)
    with policies.use("reference"):
        assert torch.equal(replayed_reference(pipeline), before)


def replayed_reference(pipeline):
    """Latents of a deterministic rollout."""
    return roll_out(pipeline, turns=1, batch=1).trajectory.latents


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_into_quantized_and_plain_pipelines(load, kind, tmp_path):
    """By diffusers into a fresh pipeline of both kinds: the same velocity as of the policies."""
    pipeline = load(kind, torch.float32)
    policies = policies_on(pipeline)
    rollout = roll_out(pipeline, turns=1)
    policies.save(pipeline, tmp_path / "lora")
    for base in (kind, None):
        ours, fresh = load(base, torch.float32), load(base, torch.float32)
        with torch.no_grad():
            without, _ = velocity_at_half(rollout, fresh.transformer)
        LoraPolicies(ours.transformer, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)).load(
            ours, tmp_path / "lora"
        )
        fresh.load_lora_weights(tmp_path / "lora")
        with torch.no_grad():
            expected, _ = velocity_at_half(rollout, ours.transformer)
            loaded, _ = velocity_at_half(rollout, fresh.transformer)
            trained, _ = velocity_at_half(rollout, pipeline.transformer)
        assert torch.equal(loaded, expected)
        assert not torch.equal(loaded, without)
        assert torch.equal(loaded, trained) == (base == kind)


def test_refuses_a_base_that_stops_gradients(load):
    """torchao's dynamic int8 returns outputs that need a gradient and give none to the inputs."""
    pipeline = load("torchao dynamic int8", torch.float32)
    with pytest.raises(ValueError, match=r"model: expected layers that pass gradients.*Int8Tensor"):
        policies_on(pipeline)


def test_refuses_weights_that_this_processor_would_pack(load):
    """bitsandbytes' kernels for AVX512-BF16 change the weights while sampling, and pass nothing."""
    pipeline = load("bitsandbytes 4 bit", torch.float32)
    pipeline.transformer.transformer_blocks[0].attn.to_q.support_avx512bf16_for_cpu = True
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_q .* = False"):
        policies_on(pipeline)
