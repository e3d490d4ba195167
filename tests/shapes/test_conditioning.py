"""Pre-training calls the transformer as the pipelines do, to the last bit."""

import pytest
import torch
from mteditflow_examples.shapes.conditioning import Conditioner
from mteditflow_examples.shapes.editor import build_klein, build_kontext, call_options, enlarge
from mteditflow_examples.shapes.vision import to_pil
from mteditflow_examples.shapes.world import draw, draw_index, make_chains

from tests.loops import some

CHAINS = make_chains(3, turns=1, seed=0, split="train")
PICTURES = torch.stack([draw(chain.initial) for chain in CHAINS])
PROMPTS = [chain.instructions[0] for chain in CHAINS]


def recorded(pipeline, klein, **options):
    """The first two calls of the transformer: what it was given, and what it made of that."""
    calls = []

    def keep(module, args, given, output):
        calls.append((given, output[0]))

    hook = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    pipeline(
        image=to_pil(enlarge(PICTURES[0])) if klein else to_pil(PICTURES[0]),
        prompt=PROMPTS[0],
        generator=torch.Generator().manual_seed(0),
        **call_options(pipeline) | options,
    )
    hook.remove()
    return calls[:2]


def replayed(conditioner, given, row):
    x_t, reference = given["hidden_states"].chunk(2, dim=1)
    with torch.no_grad():
        velocity = conditioner.velocity(x_t, given["timestep"], reference, torch.tensor([row]))
    return velocity, reference


@pytest.mark.parametrize("build", [build_kontext, build_klein])
def test_the_call_is_that_of_the_pipeline_bit_for_bit(build):
    pipeline, klein = build(), build is build_klein
    conditioner = Conditioner(pipeline, [*PROMPTS, ""])
    for given, output in some(recorded(pipeline, klein)):
        velocity, reference = replayed(conditioner, given, 0)
        assert torch.equal(velocity, output[:, : velocity.shape[1]])
        assert (conditioner.encode(PICTURES[:1]) - reference).abs().max() < 5e-3  # 8 bits a channel


def test_an_edit_without_instruction_is_what_guidance_asks_klein_for():
    pipeline = build_klein()
    conditioner = Conditioner(pipeline, [*PROMPTS, ""])
    calls = recorded(pipeline, klein=True, guidance_scale=4.0)
    for (given, output), row in zip(calls, (0, conditioner.row[""]), strict=True):
        velocity, _ = replayed(conditioner, given, row)
        assert torch.equal(velocity, output[:, : velocity.shape[1]])
    assert not torch.equal(calls[0][1], calls[1][1])


@pytest.mark.parametrize("build", [build_kontext, build_klein])
def test_drawings_are_encoded_by_looking_their_colours_up(build):
    conditioner = Conditioner(build(), PROMPTS)
    index = torch.stack([torch.from_numpy(draw_index(chain.initial)) for chain in CHAINS])
    looked_up, encoded = conditioner.encode_index(index), conditioner.encode(PICTURES)
    assert looked_up.shape == encoded.shape == (3, 36, 16)
    assert (looked_up - encoded).abs().max() < 1e-3
