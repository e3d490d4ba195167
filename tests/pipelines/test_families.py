"""Families beside Kontext and klein, and classes that are not listed: they are the plain calls."""

import inspect
from collections import Counter

import pytest
import torch
from diffusers import (
    BriaFiboEditPipeline,
    DiffusionPipeline,
    DreamLitePipeline,
    FluxFillPipeline,
    JoyImageEditPipeline,
    LongCatImagePipeline,
    LTXPipeline,
    ZImageOmniPipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from tiny_pipelines import FAMILIES as TABLE
from tiny_pipelines.base import picture
from tiny_pipelines.checks import replay

from mteditflow import FlowSDE, trajectory_generators
from mteditflow.pipelines import (
    FAMILIES,
    Editor,
    LoraPolicies,
    Recorder,
    ReplayError,
    Rollout,
    RolloutVelocity,
    describe,
)
from mteditflow.pipelines.families import endings, find_family
from mteditflow.pipelines.signatures import foreign_inputs
from tests.loops import some
from tests.tiny_editors import BUILD, CALLS, PROMPTS, build

SOLVER = FlowSDE(0.7)
STEPS = {"num_inference_steps": 2}
UNGUIDED = {
    "flux2": {"guidance_scale": 1.0},
    "qwen-edit": {"true_cfg_scale": 1.0},
    "z-image": {"guidance_scale": 0.0},
    "sd3.5": {"guidance_scale": 1.0},
}
MAKERS = ("z-image", "sd3.5")  # of images from texts
EDITORS = ("flux2", "qwen-edit")
# Layers of the last block whose outputs, of the text, no later one reads.
LAST_OF_TEXT = {"attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"}


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    """Qwen-Image-Edit works with a megapixel; here with less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit_plus, "VAE_IMAGE_SIZE", 256 * 256)
        patch.setattr(edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One directory per family, as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("families")
    for name in BUILD:
        build(name).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module", params=BUILD)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def plain(saved, family):
    """The whole pipeline, as its users load it."""
    pipeline = DiffusionPipeline.from_pretrained(saved / family)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def load(saved, family):
    def load_editor(**call):
        return Editor.load(saved / family, call=CALLS[family] | STEPS | call)

    return load_editor


@pytest.fixture
def editor(load):
    return load()


def chains(name, batch=2):
    """References of several shapes and two turns each; of text to image none, and one turn."""
    if name in MAKERS:
        return [None] * batch, [[PROMPTS[b % 3]] for b in range(batch)]
    references = [picture(64, 64 if b % 2 else 128, seed=b) for b in range(batch)]
    return references, [[PROMPTS[b % 3], PROMPTS[(b + 1) % 3]] for b in range(batch)]


def called(pipeline, image, prompt, generator, options):
    given = {} if image is None else {"image": [image]}
    return pipeline(prompt=prompt, generator=[generator], **given, **options).images[0]


def plain_edits(pipeline, name, options, batch=2):
    """Each chain by calls of the whole pipeline with prompts."""
    found = []
    for image, chain, generator in zip(
        *chains(name, batch), trajectory_generators(10, batch), strict=True
    ):
        turns = []
        for prompt in chain:
            turns.append(called(pipeline, image, prompt, generator, options))
            image = turns[-1]
        found.append(turns)
    return found


def edits(editor, name, batch=2, size=1, **more):
    given = {"generators": trajectory_generators(10, batch), "batch": size}
    return editor.edit(*chains(name, batch), **given, **more)


def parts_of(editor, name, batch=2, size=2, **options):
    references, instructions = chains(name, batch)
    parts = editor.roll_out(
        references,
        instructions,
        generators=trajectory_generators(10, batch),
        group=torch.arange(batch),
        batch=size,
        **{"solver": SOLVER, **options},
    )
    return list(parts)


def bytes_of(images):
    return [[image.tobytes() for image in chain] for chain in images]


def adapters(editor):
    """Policies whose current one is far from the reference."""
    policies = LoraPolicies(editor.transformer, editor.lora(rank=2, alpha=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policies.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return policies


# They are the plain pipeline.


@pytest.mark.parametrize("guided", [True, False])
def test_edits_equal_calls_of_the_whole_pipeline_bit_for_bit(load, plain, family, guided):
    more = {} if guided else UNGUIDED[family]
    expected = plain_edits(plain, family, CALLS[family] | STEPS | more)
    assert bytes_of(edits(load(**more), family)) == bytes_of(expected)
    assert len({image for chain in bytes_of(expected) for image in chain}) == sum(
        map(len, expected)
    )


def test_what_acts_on_prompts_alone_does_not_act_on_the_negative_one(saved):
    name, more = "sd3.5", {"clip_skip": 1}
    plain = DiffusionPipeline.from_pretrained(saved / name)
    plain.set_progress_bar_config(disable=True)
    expected = plain_edits(plain, name, CALLS[name] | STEPS | more)
    editor = Editor.load(saved / name, call=CALLS[name] | STEPS | more)
    assert bytes_of(edits(editor, name)) == bytes_of(expected)


def latents_of(editor, name, **options):
    parts = parts_of(editor, name, size=1, **options)
    return Rollout.concatenate([part.rollout for part in parts]).trajectory


def plain_trajectory(pipeline, name, solver):
    """What a recorder gets of calls of the whole pipeline."""
    rollouts = []
    references, instructions = chains(name)
    for b, generator in enumerate(trajectory_generators(10, 2)):
        image = references[b]
        with Recorder(pipeline, solver, generators=[generator]) as recorder:
            for prompt in instructions[b]:
                image = called(pipeline, image, prompt, generator, CALLS[name] | STEPS)
        rollouts.append(recorder.rollout(group=[b]))
    return Rollout.concatenate(rollouts).trajectory


def test_guidance_and_its_negative_prompt_change_latents(load, family):
    usual = latents_of(load(), family, solver=None).latents
    other = latents_of(load(**UNGUIDED[family]), family, solver=None).latents
    assert not torch.allclose(other, usual, atol=1e-3)
    if family != "flux2":  # whose scale is embedded
        editor = load(negative_prompt="Add a blue circle")
        other = latents_of(editor, family, solver=None).latents
        assert not torch.allclose(other, usual, atol=1e-3)


def test_a_rollout_equals_recorded_calls_of_the_whole_pipeline(editor, plain, family):
    found = latents_of(editor, family)
    expected = plain_trajectory(plain, family, SOLVER)
    for name in ("latents", "sigmas", "log_prob", "stochastic"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.stochastic.any()


@pytest.mark.parametrize("name", MAKERS)
def test_texts_of_other_lengths_are_made_into_images_in_one_call(saved, name):
    editor = Editor.load(saved / name, call=CALLS[name] | STEPS)
    (part,) = parts_of(editor, name, batch=3, size=3, solver=None)
    alone = Rollout.concatenate(
        [one.rollout for one in parts_of(editor, name, batch=3, size=1, solver=None)]
    )
    latents = part.rollout.trajectory.latents
    torch.testing.assert_close(latents, alone.trajectory.latents, rtol=0, atol=1e-5)
    assert [len(chain) for chain in part.images] == [1, 1, 1]
    counts = Counter()
    editor.transformer.register_forward_hook(lambda *_: counts.update(["call"]))
    edits(editor, name, batch=3, size=3)
    assert counts["call"] == 2 if name == "z-image" else counts["call"] <= 4


# They train.


def test_every_adapter_gets_gradients_of_grpo_and_nft(editor, family):
    policies = adapters(editor)
    (part, *_) = parts_of(editor, family, batch=1)
    rollout = part.rollout
    rows = tuple(rollout.trajectory.step_mask.nonzero(as_tuple=True))
    log_prob = replay(rollout, editor.transformer, SOLVER, rows)
    assert ((log_prob - rollout.trajectory.log_prob[rows]).exp() - 1).abs().max() <= 1e-5
    at = rollout.trajectory.turn_mask.nonzero()
    clean = rollout.trajectory.latents[at[:, 0], at[:, 1], -1]
    velocity = RolloutVelocity(policies, rollout)
    predicted = velocity("current", clean + 0.5, torch.full((len(at),), 0.5), at)
    for loss in (log_prob.sum(), predicted.square().sum()):
        gradients = torch.autograd.grad(loss, list(policies.parameters()), allow_unused=True)
        reached = {
            name: g is not None and bool(g.abs().sum() > 0)
            for name, g in zip(policies.state_dict("current"), gradients, strict=False)
        }
        missed = [name for name, there in reached.items() if not there]
        assert {endings([name])[0].partition(".lora")[0] for name in missed} <= LAST_OF_TEXT
        assert len(missed) < len(reached) / 2


def test_its_lora_gives_the_same_latents_in_a_plain_pipeline(saved, editor, family, tmp_path):
    base = latents_of(editor, family, solver=None).latents
    adapters(editor).save(editor.pipeline, tmp_path)
    tuned = latents_of(editor, family, solver=None).latents
    assert not torch.allclose(tuned, base, atol=1e-3)
    pipeline = DiffusionPipeline.from_pretrained(saved / family)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path)
    assert torch.equal(plain_trajectory(pipeline, family, None).latents, tuned)


def test_the_record_is_proven_on_the_first_call(load, family, monkeypatch):
    editor = load(**UNGUIDED[family])
    forward = type(editor.transformer).forward
    wobble = iter(range(10_000))

    def unstable(self, *args, **kwargs):
        (output,) = forward(self, *args, **kwargs)
        more = next(wobble)
        return ([x + more for x in output] if isinstance(output, list) else output + more,)

    unstable.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(editor.transformer), "forward", unstable)
    with pytest.raises(ReplayError, match="replayed from its record"):
        parts_of(editor, family, batch=1)


# What is done once.


def test_instructions_are_embedded_once_and_the_sampler_has_no_text_encoder(
    load, plain, family, monkeypatch
):
    counts = Counter()
    forward = type(plain.text_encoder).forward
    monkeypatch.setattr(
        type(plain.text_encoder),
        "forward",
        lambda *args, **kwargs: (counts.update(["call"]), forward(*args, **kwargs))[1],
    )
    editor = load()
    assert all(getattr(editor.pipeline, part) is None for part in some(editor.family.text_parts))
    edits(editor, family)
    first = counts["call"]
    edits(editor, family)
    parts_of(editor, family, solver=None)
    assert counts["call"] == first  # Qwen-Image-Edit saw the same pictures again


def test_qwen_edit_embeds_an_instruction_with_the_picture_of_its_turn(saved):
    name = "qwen-edit"
    editor = Editor.load(saved / name, call=CALLS[name] | STEPS | UNGUIDED[name])
    asked = []
    encode = editor._prompts._encode
    editor._prompts._encode = lambda x: (asked.append(x), encode(x))[1]
    images = [picture(64, seed=b // 2) for b in range(3)]  # of which two are equal
    editor.edit(images, [PROMPTS[:2]] * 3, generators=trajectory_generators(0, 3), batch=3)
    assert [x.text for x in asked] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 3
    first, other = (editor._prompts([x])[x][0] for x in asked[:2])
    assert first.shape == other.shape
    assert not torch.equal(first, other)


# Descriptions.


def test_named_families_are_described(family, saved):
    found = find_family(type(build(family)).__name__)
    assert (found.name, found.assumptions) == (family, ())
    assert (found.references == "none") == (family in MAKERS)
    assert found.takes_batch == (family in MAKERS)
    assert found.guidance == ("true_cfg_scale" if family == "qwen-edit" else "guidance_scale")
    model = build(family).transformer
    layers = endings(found.layers(model, None))
    assert not [name for name in layers if "norm" in name or "mod" in name]
    expected = {"flux2": "ff.linear_in", "qwen-edit": "img_mlp.net.2", "sd3.5": "attn2.to_q"}
    assert {expected.get(family, "feed_forward.w1"), "attn.to_q"} & set(layers)


def test_the_size_of_a_reference_in_the_model(saved):
    for name, expected in some({"flux2": (128, 64), "qwen-edit": (352, 192)}.items()):
        assert Editor.load(saved / name).reference_size(133, 71) == expected
    assert Editor.load(saved / "z-image").reference_size(64, 64) is None


UNLISTED = {  # given embeddings once each, or every call its prompts
    "FluxPipeline": True,
    "QwenImagePipeline": True,
    "BriaFiboEditPipeline": False,
}


@pytest.mark.parametrize(("name", "cached"), UNLISTED.items())
def test_a_class_that_is_not_listed_works_and_says_what_was_assumed(name, cached, tmp_path):
    tiny = TABLE[name]
    guidance = list(tiny.guided.values())[-1]
    plain = tiny.build()
    plain.save_pretrained(tmp_path)
    given = tiny.inputs(0, 1)
    options = tiny.options | guidance | STEPS
    negative = options.get("negative_prompt", given.get("negative_prompt"))
    if negative is not None:
        options |= {"negative_prompt": negative[0]}
    editor = Editor.load(tmp_path, call=options)
    assert (editor.pipeline.text_encoder is None) == cached
    reference, prompt = given.get("image"), given["prompt"][0]
    run = {"generators": trajectory_generators(3, 1), "batch": 4}
    ((image,),) = editor.edit([reference], [[prompt]], **run)
    more = {} if reference is None else {"image": reference}
    generator = trajectory_generators(3, 1)[0]
    expected = plain(prompt=prompt, generator=generator, **more, **options).images[0]
    assert image.tobytes() == expected.tobytes()
    (part,) = editor.roll_out(
        [reference],
        [[prompt]],
        generators=trajectory_generators(3, 1),
        group=torch.zeros(1, dtype=torch.int64),
        batch=1,
    )
    assert part.images[0][0].tobytes() == image.tobytes()
    said = " ".join(editor.assumptions)
    assert f"{name} is not a listed family" in said
    assert ("embedded once each" in said) == cached
    assert "LoRA adapters are on" in said
    assert "to_q" in said
    assert "one reference image" in said or reference is None


def test_prompts_are_given_as_they_are_where_embeddings_may_mean_another_call():
    kinds = (BriaFiboEditPipeline, JoyImageEditPipeline, LongCatImagePipeline, ZImageOmniPipeline)
    for kind in some(kinds):
        found = find_family(kind.__name__)
        assert (found.embeddings, found.text_parts) == ((), ()), kind


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FluxFillPipeline, "edits an image by an instruction.* takes mask_image"),
        (LTXPipeline, "takes .*num_frames"),
        (DreamLitePipeline, "expected a pipeline with a transformer, got a DreamLitePipeline"),
    ],
)
def test_pipelines_of_other_inputs_are_refused(kind, message):
    with pytest.raises(ValueError, match=f"source: .*{message}"):
        find_family(kind.__name__)
    with pytest.raises(ValueError, match=f"source: .*{message}"):
        describe(kind)


def test_named_families_take_nothing_foreign_and_an_unknown_name_is_refused():
    assert not [x for family in some(FAMILIES) for x in foreign_inputs(family.pipeline)]
    for name in ("FluxModularPipeline", "Nothing", "AutoencoderKL"):
        with pytest.raises(ValueError, match=f"expected a pipeline of diffusers .* got {name}"):
            find_family(name)


def test_guidance_that_would_be_ignored_is_refused():
    kontext = FAMILIES[0]
    with pytest.raises(ValueError, match=r"expected a negative_prompt .* beside true_cfg_scale 2"):
        kontext.call_options({"true_cfg_scale": 2.0})


# References.


@pytest.mark.parametrize("name", MAKERS)
def test_text_to_image_takes_no_reference_and_one_turn(saved, name):
    editor = Editor.load(saved / name, call=CALLS[name] | STEPS)
    given = {"generators": trajectory_generators(0, 1), "batch": 1}
    with pytest.raises(TypeError, match=r"references: expected None for a .*, got RGB in row 0"):
        editor.edit([picture()], [PROMPTS[:1]], **given)
    with pytest.raises(ValueError, match=r"instructions: expected one turn for a .*, got 2 in row"):
        editor.edit([None], [PROMPTS[:2]], **given)


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_needs_a_reference(saved, name):
    editor = Editor.load(saved / name, call=CALLS[name] | STEPS)
    with pytest.raises(TypeError, match="references: expected RGB images of PIL, got NoneType"):
        editor.edit([None], [PROMPTS[:1]], generators=trajectory_generators(0, 1), batch=1)
