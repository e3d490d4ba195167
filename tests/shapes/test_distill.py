"""Distillation of the tiny Kontext: what it writes, and what the shipped LoRA does."""

import json

import pytest
import torch
from diffusers import FluxKontextPipeline
from mteditflow_examples.shapes.distill import FILE, main
from mteditflow_examples.shapes.editor import TEXT_TOKENS, Family
from mteditflow_examples.shapes.files import write_world
from mteditflow_examples.shapes.world import IMAGE_SIZE

from mteditflow.chains import ChainDataset, read_chains
from mteditflow.objectives import keyed_generator
from mteditflow.pipelines import Editor, LoraPolicies, read_lora
from tests.loops import some

SIDE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "max_sequence_length": TEXT_TOKENS}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, Family.kontext, seed=0, counts=(2, 8), turns=1)
    return folder


def test_it_writes_a_lora_and_a_card_and_the_same_again(world, tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for out in files:
        main(world, seed=0, steps=2, rounds=1, chains=2, updates=2, batch=2, out=out)
    weights, again = (read_lora(FluxKontextPipeline, file) for file in files)
    assert all(torch.equal(again[name], x) for name, x in some(weights.items()))
    assert any(x.any() for name, x in some(weights.items()) if ".lora_B." in name)
    card = json.loads(files[0].with_suffix(".json").read_text())
    assert card["command"].endswith(
        "--seed 0 --steps 2 --rounds 1 --chains 2 --updates 2 --batch 2"
    )
    assert card["parameters"] == sum(x.numel() for x in weights.values())


def test_with_the_shipped_lora_two_steps_end_nearer_to_where_four_do(world):
    assert FILE.stat().st_size < 300_000
    assert len(json.loads(FILE.with_suffix(".json").read_text())["held_out"]["overall"]) == 3
    editor = Editor.load(world / "model", call=SIDE | {"guidance_scale": 1.0})
    weights = read_lora(type(editor.pipeline), FILE)
    config = editor.lora(rank=1, alpha=1)
    policies = LoraPolicies(editor.transformer, config, few_steps=weights)
    chains = ChainDataset(read_chains(world / "held_out.jsonl").chains).__getitems__(range(8))

    def clean(steps, few_steps):
        with policies.use("reference", few_steps=few_steps):
            (part,) = editor.roll_out(
                [example.image for example in chains],
                [example.chain.instructions for example in chains],
                generators=[keyed_generator(0, "noise", row) for row in range(8)],
                group=torch.arange(8),
                batch=8,
                call={"num_inference_steps": steps},
            )
        return part.rollout.trajectory.clean

    wanted = clean(4, few_steps=False)
    distilled = (clean(2, few_steps=True) - wanted).square().mean()
    assert distilled < 0.9 * (clean(2, few_steps=False) - wanted).square().mean()
