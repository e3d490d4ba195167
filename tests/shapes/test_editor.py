import json

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxKontextPipeline
from PIL import Image

from examples.shapes.editor import (
    WEIGHTS,
    build_klein,
    build_kontext,
    call_options,
    enlarge,
    load_editor,
    save_weights,
    shrink,
)
from examples.shapes.world import WORDS, draw, make_chains, possible_edits
from tests.loops import some
from tests.shapes import rolling
from tests.shapes.rolling import evaluate, metrics_of, samples_of

CHAINS = make_chains(4, turns=1, seed=0, split="train")
IMAGES = torch.stack([draw(chain.initial) for chain in CHAINS])
PROMPTS = [chain.instructions[0] for chain in CHAINS]


def generators(count=4):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def edit_kontext(pipeline):
    return pipeline(
        image=IMAGES, prompt=PROMPTS, generator=generators(), **call_options(pipeline)
    ).images


def edit_klein(pipeline):
    pixels = (enlarge(IMAGES[0]).permute(1, 2, 0) * 255).round().to(torch.uint8)
    return pipeline(
        image=Image.fromarray(pixels.numpy()),
        prompt=PROMPTS[0],
        generator=torch.Generator().manual_seed(0),
        **call_options(pipeline),
    ).images


FAMILIES = {
    "kontext": (build_kontext, FluxKontextPipeline, edit_kontext),
    "klein": (build_klein, Flux2KleinPipeline, edit_klein),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_builders_give_the_real_classes_and_leave_the_global_generator_alone(family):
    build, kind, edit = FAMILIES[family]
    before = torch.get_rng_state()
    pipeline = build(seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert type(pipeline) is kind
    assert sum(weight.numel() for weight in pipeline.transformer.parameters()) < 500_000
    images = edit(pipeline)
    assert images.shape[1:] == ((3, 12, 12) if family == "kontext" else (3, 96, 96))
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_seeds_give_equal_editors(family):
    build, _, edit = FAMILIES[family]
    assert torch.equal(edit(build(seed=1)), edit(build(seed=1)))
    assert not torch.equal(edit(build(seed=1)), edit(build(seed=2)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_saved_and_loaded_editors_make_equal_images(family, tmp_path):
    build, kind, edit = FAMILIES[family]
    pipeline = build(seed=0)
    pipeline.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(edit(pipeline), edit(loaded))


def test_kontexts_autoencoder_is_the_identity():
    vae = build_kontext().vae
    x = 2 * torch.rand((2, 3, 12, 12), generator=torch.Generator().manual_seed(0)) - 1
    posterior = vae.encode(x).latent_dist
    assert (posterior.mode()[:, :3] - x).abs().max() < 1e-4
    assert (
        posterior.sample(torch.Generator().manual_seed(0)) - posterior.mode()
    ).abs().max() < 1e-4
    assert (vae.decode(posterior.mode()).sample - x).abs().max() < 1e-4


def test_kleins_autoencoder_is_the_identity_on_enlarged_pictures():
    vae = build_klein().vae
    x = 2 * IMAGES - 1
    latents = vae.encode(enlarge(x)).latent_dist.mode()
    assert latents.shape[2:] == x.shape[2:]
    assert (latents[:, :3] - x).abs().max() < 1e-4
    assert (shrink(vae.decode(latents).sample) - x).abs().max() < 1e-4
    assert torch.equal(shrink(enlarge(x)), x)


def test_every_word_has_a_token_of_its_own_and_instructions_fit():
    kontext, klein = build_kontext(), build_klein()
    text = call_options(kontext)["max_sequence_length"]
    for tokenizer in (kontext.tokenizer_2, klein.tokenizer):
        ids = {tuple(tokenizer(word, add_special_tokens=False).input_ids) for word in WORDS}
        assert len(ids) == len(WORDS)
        assert all(len(tokens) == 1 for tokens in some(ids))
        for chain in some(make_chains(20, turns=3, seed=0, split="train")):
            for edit in some(possible_edits(chain.initial)):
                assert len(tokenizer(edit.instruction).input_ids) <= text


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_survive_a_round_trip(family, tmp_path):
    build, _, edit = FAMILIES[family]
    options = {"seed": 4, "num_single_layers": 1}
    pipeline = build(**options)
    with torch.no_grad():
        for weight in pipeline.transformer.parameters():
            weight.mul_(1.25)
    card = {"family": family, "build": options, "command": "none"}
    save_weights(pipeline.transformer, tmp_path / "weights.safetensors", card)
    assert json.loads((tmp_path / "weights.json").read_text()) == card
    assert torch.equal(edit(load_editor(tmp_path / "weights.safetensors")), edit(pipeline))


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_weights_are_small_and_tell_how_they_were_made(family):
    assert (WEIGHTS / f"{family}.safetensors").stat().st_size < 2_000_000
    card = json.loads((WEIGHTS / f"{family}.json").read_text())
    assert card["family"] == family
    assert card["command"].startswith("python -m examples.shapes.pretrain ")
    assert {"seed", "torch", "diffusers", "transformers", "parameters", "seconds"} <= set(card)


def test_the_shipped_editor_is_able_but_shows_the_disease():
    """Turn by turn it gets worse, as judged by the instruction and by the whole picture."""
    chains = make_chains(128, turns=3, seed=123, split="held_out", linked=1.0)
    scores, pictures = evaluate(load_editor(), chains, seed=0, steps=4)
    assert pictures.shape == (128, 3, 3, 12, 12)
    names = ("following", "marginal", "consistency", "overall", "strict", "strict_marginal")
    percent = dict(zip(names, metrics_of(*samples_of(scores)).tolist(), strict=True))
    untrained, _ = evaluate(build_kontext(), chains[:16], seed=0, steps=4)
    assert not untrained.success.any()
    assert percent["marginal"][0] > 25
    assert percent["consistency"][0] > 90
    assert percent["following"][2] < percent["following"][0] / 2
    assert percent["marginal"][2] < percent["marginal"][0] - 4
    assert percent["strict_marginal"][2] < 0.6 * percent["strict_marginal"][0]


def test_the_shipped_klein_is_able_with_and_without_guidance(monkeypatch):
    chains = make_chains(16, turns=1, seed=123, split="held_out", linked=1.0)
    editor = load_editor("klein")
    assert not editor.config.is_distilled
    success = []
    for scale in (1.0, 4.0):
        guided = call_options(editor) | {"guidance_scale": scale}
        monkeypatch.setattr(rolling, "call_options", lambda *_, given=guided, **__: given)
        scores, _ = evaluate(editor, chains, seed=0, steps=4)
        success.append(100 * float(scores.success.float().mean()))
        assert scores.consistency.mean() > 0.85
    assert success[0] > 20
    assert success[1] > 20


def test_evaluation_is_repeatable():
    editor = load_editor()
    chains = make_chains(8, turns=2, seed=1, split="held_out")
    first, second = (evaluate(editor, chains, seed=5, steps=4)[1] for _ in range(2))
    assert torch.equal(first, second)
