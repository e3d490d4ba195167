"""The editor gives what plain calls of the full pipeline give, and records it."""

import functools
import json
import shutil
from collections import Counter

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.pipelines.flux import pipeline_flux_kontext
from mteditflow_examples.shapes.editor import build_klein, build_kontext, call_options
from PIL import Image
from tiny import CHAIN, batches_of_rollout, picture
from tiny import roll_out as plain_roll_out
from tiny_pipelines.checks import replay

from mteditflow import FlowSDE, trajectory_generators
from mteditflow.pipelines import (
    FAMILIES,
    Editor,
    LoraPolicies,
    ReplayError,
    Rollout,
    references,
)
from tests.loops import some
from tests.processes import Process

SOLVER = FlowSDE(0.7)
STEPS = 2
BUILD = {"kontext": build_kontext, "klein": build_klein}
GUIDED = {
    "kontext": {"true_cfg_scale": 2.0, "negative_prompt": "Add a red star"},
    "klein": {"guidance_scale": 4.0},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One directory per family, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("editors")
    for name, build in BUILD.items():
        build().save_pretrained(folder / name)
    return folder


@pytest.fixture(params=BUILD)
def family(request):
    return request.param


@pytest.fixture
def plain(family):
    return BUILD[family]()


@pytest.fixture
def load(saved, family, plain):
    """Loads the family's editor, with the call options of the tiny models."""

    def load_editor(call=None, **options):
        return Editor.load(saved / family, call=given(plain) | (call or {}), **options)

    return load_editor


@pytest.fixture
def editor(load):
    return load()


def given(pipeline):
    options = call_options(pipeline, steps=STEPS)
    del options["output_type"]
    return options


def chains(pipeline, batch=4, turns=2):
    """References and instructions of groups of two."""
    references = [picture(pipeline, b // 2) for b in range(batch)]
    return references, [CHAIN[b // 2 % len(CHAIN)][:turns] for b in range(batch)]


def record(editor, pipeline, solver=SOLVER, batch=4, **options):
    references, instructions = chains(pipeline)
    parts = editor.roll_out(
        references,
        instructions,
        generators=trajectory_generators(10, 4),
        group=torch.tensor([0, 0, 1, 1]),
        batch=batch,
        solver=solver,
        **options,
    )
    return list(parts)


def joined(parts):
    return Rollout.concatenate([part.rollout for part in parts])


def edited(editor, pipeline, batch=4):
    generators = trajectory_generators(10, 4)
    return editor.edit(*chains(pipeline), generators=generators, batch=batch)


def bytes_of(images):
    return [[image.tobytes() for image in chain] for chain in images]


def plain_edit(pipeline, family, options, references, instructions, generators):
    """Each chain by calls of the full pipeline with prompts."""
    result = []
    for image, chain, generator in zip(references, instructions, generators, strict=True):
        turns = []
        for prompt in chain:
            one = [image], [prompt] if family == "kontext" else prompt
            image = pipeline(*one, generator=[generator], **options).images[0]
            turns.append(image)
        result.append(turns)
    return result


def adapters(editor, seed=0, **options):
    """Policies whose current one is far from the reference."""
    policies = LoraPolicies(
        editor.transformer, editor.lora(**{"rank": 4, "alpha": 8, **options}), seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policies.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return policies


def worst_ratio(editor, rollout, together):
    """Largest deviation from ratio 1, replayed in the batches in which it was sampled."""
    replayed = torch.zeros_like(rollout.trajectory.log_prob)
    for rows in batches_of_rollout(rollout, together=together):
        replayed[rows] = replay(rollout, editor.transformer, SOLVER, rows).detach()
    return ((replayed - rollout.trajectory.log_prob).exp() - 1).abs().max().item()


@pytest.fixture(scope="module")
def usual_edits(saved):
    """Images that the editor of each family makes of the usual chains without further options."""
    found = {}
    for name, build in BUILD.items():
        plain = build()
        found[name] = bytes_of(edited(Editor.load(saved / name, call=given(plain)), plain))
    return found


# It is the plain pipeline.


@pytest.mark.parametrize("guided", [False, True])
def test_editing_equals_calls_of_the_full_pipeline_bit_for_bit(
    load, plain, family, usual_edits, guided
):
    more = GUIDED[family] if guided else {}
    editor = load(more)
    expected = plain_edit(
        plain, family, given(plain) | more, *chains(plain), trajectory_generators(10, 4)
    )
    generators = trajectory_generators(10, 4)
    images = editor.edit(*chains(plain), generators=generators, batch=1)
    assert bytes_of(images) == bytes_of(expected)
    assert (bytes_of(images) != usual_edits[family]) or not guided
    assert len({chain[-1].tobytes() for chain in images}) == 4


def test_a_batch_of_kontext_equals_the_batched_call_of_the_full_pipeline(saved):
    plain = build_kontext()
    editor = Editor.load(saved / "kontext", call=given(plain))
    references, instructions = chains(plain)
    prompts, generators = [chain[0] for chain in instructions], trajectory_generators(10, 4)
    expected = plain(references, prompts, generator=generators, **given(plain)).images
    assert bytes_of([expected]) == bytes_of([[chain[0] for chain in edited(editor, plain)]])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_rollout_equals_recorded_calls_of_the_full_pipeline(load, plain, family, guidance):
    more = {}
    if guidance > 1:
        more = GUIDED[family] | {"true_cfg_scale" if family == "kontext" else "guidance_scale": 4.0}
    editor = load(more)
    expected = plain_roll_out(plain, SOLVER, batch=4, guidance=guidance, steps=STEPS)
    parts = editor.roll_out(
        [picture(plain, b) for b in range(4)],
        [CHAIN[b % len(CHAIN)][:2] for b in range(4)],
        generators=[trajectory_generators(10 + b, 1)[0] for b in range(4)],
        group=torch.arange(4),
        batch=4,
        solver=SOLVER,
    )
    trajectory = joined(parts).trajectory
    for name in ("latents", "sigmas", "log_prob", "stochastic", "group", "turn_mask"):
        assert torch.equal(getattr(trajectory, name), getattr(expected.trajectory, name)), name


def test_without_a_solver_the_recorded_images_are_the_edited_ones(
    editor, plain, family, usual_edits
):
    parts = record(editor, plain, solver=None)
    images = [chain for part in parts for chain in part.images]
    assert bytes_of(images) == usual_edits[family]
    assert not joined(parts).trajectory.stochastic.any()


@pytest.mark.parametrize("size", [(14, 10), (9, 13)])
@pytest.mark.parametrize("resize", [False, True])
def test_latents_of_a_reference_are_those_of_the_plain_call(saved, monkeypatch, size, resize):
    for module in (pipeline_flux_kontext, references):
        small = [(8, 16), (12, 12), (16, 8)]
        monkeypatch.setattr(module, "PREFERRED_KONTEXT_RESOLUTIONS", small)
    plain = build_kontext()
    more = {"_auto_resize": resize, "height": 8, "width": 12, "max_area": 96}
    editor = Editor.load(saved / "kontext", call=given(plain) | more)
    chain = [picture(plain).resize(size)], [CHAIN[0][:2]]
    expected = plain_edit(
        plain, "kontext", given(plain) | more, *chain, trajectory_generators(3, 1)
    )
    images = editor.edit(*chain, generators=trajectory_generators(3, 1), batch=1)
    assert bytes_of(images) == bytes_of(expected)
    assert images[0][0].size == (12, 8)


# Batches, parts and streams of noise.


def test_the_batch_does_not_change_the_result(editor, plain):
    alone = record(editor, plain, batch=1)
    assert [part.rows for part in alone] == [slice(b, b + 1) for b in range(4)]
    images = bytes_of(chain for part in alone for chain in part.images)
    latents = joined(alone).trajectory.latents
    for batch, count in ((3, 2), (8, 1)):
        parts = record(editor, plain, batch=batch)
        assert len(parts) == count
        torch.testing.assert_close(joined(parts).trajectory.latents, latents, rtol=0, atol=1e-5)
        assert bytes_of(chain for part in parts for chain in part.images) == images
        assert joined(parts).trajectory.group.tolist() == [0, 0, 1, 1]


def test_a_trajectory_depends_on_its_own_row_alone(editor, plain):
    references, instructions = chains(plain)
    whole = joined(record(editor, plain)).trajectory
    generators = trajectory_generators(10, 4)
    (part,) = editor.roll_out(
        references[2:3],
        instructions[2:3],
        generators=generators[2:3],
        group=torch.tensor([1]),
        batch=4,
        solver=SOLVER,
    )
    torch.testing.assert_close(
        part.rollout.trajectory.latents, whole.latents[2:3], rtol=0, atol=1e-5
    )


def test_a_part_ends_where_the_length_of_the_chain_or_the_size_changes(editor, plain):
    references, instructions = chains(plain)
    instructions[3] = instructions[3][:1]
    width, height = references[0].size
    references[0] = references[0].resize((2 * width, height))
    parts = list(
        editor.roll_out(
            references,
            instructions,
            generators=trajectory_generators(10, 4),
            group=torch.arange(4),
            batch=4,
            solver=SOLVER,
        )
    )
    assert [part.rows for part in parts] == [slice(0, 1), slice(1, 3), slice(3, 4)]
    assert [len(chain) for part in parts for chain in part.images] == [2, 2, 2, 1]
    assert joined(parts).trajectory.turn_mask.tolist() == [[True, True]] * 3 + [[True, False]]


def test_parts_are_sampled_when_they_are_asked_for_by_the_policy_of_that_moment(editor, plain):
    policies = adapters(editor)
    one_turn = chains(plain, turns=1)
    parts = editor.roll_out(
        *one_turn,
        generators=trajectory_generators(10, 4),
        group=torch.tensor([0, 0, 1, 1]),
        batch=2,
    )
    with policies.use("reference"):
        first = next(parts)
    second = next(parts)
    edit = functools.partial(editor.edit, *one_turn, batch=4)
    current = bytes_of(edit(generators=trajectory_generators(10, 4)))
    with policies.use("reference"):
        reference = bytes_of(edit(generators=trajectory_generators(10, 4)))
    assert bytes_of(first.images) == reference[:2] != current[:2]
    assert bytes_of(second.images) == current[2:]


def test_sampling_is_in_eval_mode_and_leaves_the_mode_as_it_was(editor, plain):
    adapters(editor, dropout=0.5)
    editor.transformer.train()
    images = bytes_of(record(editor, plain, solver=None)[0].images)
    assert editor.transformer.training
    editor.transformer.eval()
    assert bytes_of(record(editor, plain, solver=None)[0].images) == images
    assert not editor.transformer.training


# What is done once.


def count_calls(monkeypatch, owner, name):
    counts = Counter()
    original = getattr(owner, name)

    @functools.wraps(original)
    def counted(*args, **kwargs):
        counts[name] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return counts


def test_kontext_encodes_each_distinct_reference_once(saved, monkeypatch):
    plain = build_kontext()
    editor = Editor.load(saved / "kontext", call=given(plain))
    references, instructions = chains(plain, turns=1)
    counts = count_calls(monkeypatch, editor.pipeline.vae, "encode")
    generators = trajectory_generators(10, 4)
    editor.edit(
        [image.copy() for image in references], instructions, generators=generators, batch=2
    )
    assert counts["encode"] == 2


def test_instructions_are_embedded_once_and_the_sampler_has_no_text_encoder(
    load, plain, family, monkeypatch
):
    forwards = count_calls(monkeypatch, type(plain.text_encoder), "forward")
    editor = load(GUIDED[family])
    assert all(getattr(editor.pipeline, part) is None for part in some(editor.family.text_parts))
    edited(editor, plain)
    assert forwards["forward"] == 3 + 1  # of four instructions two are equal; one negative prompt
    edited(editor, plain)
    record(editor, plain)
    assert forwards["forward"] == 4


def test_instructions_are_encoded_where_the_encoders_are(load, family, plain, monkeypatch):
    devices = []
    original = type(plain).encode_prompt

    @functools.wraps(original)
    def spied(self, *args, **kwargs):
        if self.text_encoder is not None:
            devices.append(kwargs["device"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(plain), "encode_prompt", spied)
    load(device="cpu:0").edit(
        [picture(plain)], [CHAIN[0][:1]], generators=trajectory_generators(0, 1), batch=1
    )
    assert set(devices) == {torch.device("cpu", 0)}


# Options of loading.


def gradients(editor, policies, rollout):
    rows = tuple(index[:3] for index in rollout.trajectory.step_mask.nonzero(as_tuple=True))
    loss = replay(rollout, editor.transformer, SOLVER, rows).sum()
    return torch.autograd.grad(loss, policies.parameters())


def test_gradient_checkpointing_acts_in_eval_mode_and_changes_no_gradient(load, plain):
    found, runs = {}, {}
    for checkpointing in (False, True):
        editor = load(gradient_checkpointing=checkpointing)
        policies = adapters(editor)
        rollout = joined(record(editor, plain))
        counts = Counter()
        for block in editor.transformer.transformer_blocks:
            block.register_forward_pre_hook(lambda *_, counts=counts: counts.update(["run"]))
        found[checkpointing] = gradients(editor, policies, rollout)
        runs[checkpointing] = counts["run"]
    assert runs[True] == 2 * runs[False] > 0
    assert any(x.abs().max() > 0 for x in found[True])
    assert all(map(torch.equal, found[False], found[True]))


@pytest.fixture
def attention_backend():
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


def test_an_attention_backend_is_used_with_adapters_added_afterwards(
    load, plain, family, attention_backend
):
    editor = load(attention_backend="_native_math")
    adapters(editor)
    blocks = editor.transformer.transformer_blocks
    assert {str(b.attn.processor._attention_backend.value) for b in blocks} == {"_native_math"}
    rollout = joined(record(editor, plain))
    assert worst_ratio(editor, rollout, together=editor.family.takes_batch) <= 1e-6
    with pytest.raises(ValueError, match="must be one of"):
        load(attention_backend="fastest")


@pytest.mark.parametrize("option", ["vae_slicing", "vae_tiling"])
def test_a_vae_may_work_in_pieces(load, plain, family, usual_edits, option):
    editor = load(**{option: True})
    assert getattr(editor.pipeline.vae, f"use_{option.removeprefix('vae_')}")
    assert bytes_of(edited(editor, plain)) == usual_edits[family]
    assert bytes_of(record(editor, plain, solver=None)[0].images) == usual_edits[family]


def test_bfloat16_is_recorded_on_the_host_and_replayed_with_ratio_one(load, plain):
    editor = load(dtype=torch.bfloat16)
    adapters(editor)
    rollout = joined(record(editor, plain))
    assert rollout.trajectory.latents.dtype == torch.bfloat16
    assert rollout.trajectory.latents.device.type == "cpu"
    assert rollout.trajectory.log_prob.dtype == torch.float32
    assert worst_ratio(editor, rollout, together=editor.family.takes_batch) <= 1e-4


@pytest.fixture
def quick_compiler(monkeypatch):
    """All of torch.compile but the slow last part, which turns graphs into machine code."""
    limit = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    yield
    torch._dynamo.config.recompile_limit = limit


@pytest.mark.bases
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_give_the_same_rollout_and_gradients(saved, quick_compiler):
    found, plain = {}, build_kontext()
    for compiled in (False, True):
        editor = Editor.load(saved / "kontext", call=given(plain), compile_blocks=compiled)
        policies = adapters(editor, targets=["attn.to_q", "attn.to_v"])
        rollout = joined(record(editor, plain))
        assert worst_ratio(editor, rollout, together=True) <= 1e-5
        found[compiled] = [rollout.trajectory.latents, *gradients(editor, policies, rollout)]
        rows = tuple(index[:1] for index in rollout.trajectory.step_mask.nonzero(as_tuple=True))
        for policy in ("old", "reference"):
            with torch.no_grad(), policies.use(policy):
                found[compiled].append(replay(rollout, editor.transformer, SOLVER, rows))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for compiled, eager in some(zip(found[True], found[False], strict=True)):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_record_is_on_the_host_and_replays(load, plain):
    editor = load(device="cuda")
    rollout = joined(record(editor, plain))
    assert rollout.trajectory.latents.device.type == "cpu"
    index = rollout.trajectory.step_mask.nonzero(as_tuple=True)
    trajectory, turn, _ = index
    steps = rollout.trajectory.steps(*index)
    x_t, sigma = steps.x_t.cuda(), steps.sigma.cuda()
    velocity = rollout.velocity(editor.transformer, x_t, sigma, trajectory, turn)
    on_host = rollout.velocity(editor.transformer.cpu(), steps.x_t, steps.sigma, trajectory, turn)
    torch.testing.assert_close(velocity.cpu(), on_host, rtol=1e-3, atol=1e-4)


# Adapters.


def adapted(editor, **options):
    names = editor.lora(rank=2, alpha=4, **options).target_modules
    return {name for name, _ in editor.transformer.named_modules() if name in names}


def test_adapters_are_on_attention_and_feed_forward_of_both_kinds_of_blocks(editor):
    config = editor.lora(rank=8, alpha=16, dropout=0.1)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.1)
    linear = {n for n, m in editor.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    blocks = {name for name in linear if "blocks." in name and "norm" not in name}
    assert adapted(editor) == blocks
    assert adapted(editor, targets=["attn.to_q"]) == {n for n in blocks if n.endswith("attn.to_q")}


def test_a_target_that_matches_nothing_is_refused(editor):
    with pytest.raises(ValueError, match=r"targets: expected endings .* got 'attn.to_x'"):
        editor.lora(rank=4, alpha=8, targets=["attn.to_q", "attn.to_x"])
    with pytest.raises(ValueError, match="rank: expected an integer >= 1, got 0"):
        editor.lora(rank=0, alpha=8)


PLAIN_PROCESS = """
import json, sys, torch
from diffusers import DiffusionPipeline
from PIL import Image

torch.set_num_threads(1)
for job in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(job["model"])
    pipe.load_lora_weights(job["lora"])
    image, generator = Image.open(job["reference"]), torch.Generator().manual_seed(5)
    for turn, prompt in enumerate(job["chain"]):
        image = pipe(image, prompt, generator=[generator], **job["call"]).images[0]
        image.save(job["lora"] + f"/{turn}.png")
"""


@pytest.mark.slow
def test_its_lora_gives_the_same_images_in_a_plain_pipeline_of_another_process(saved, tmp_path):
    jobs, expected = [], []
    for name, build in BUILD.items():
        plain, folder = build(), tmp_path / name
        editor = Editor.load(saved / name, call=given(plain) | GUIDED[name])
        base = editor.edit(
            [picture(plain)], [CHAIN[0]], generators=trajectory_generators(5, 1), batch=1
        )
        adapters(editor).save(editor.pipeline, folder)
        images = editor.edit(
            [picture(plain)], [CHAIN[0]], generators=trajectory_generators(5, 1), batch=1
        )
        assert bytes_of(images) != bytes_of(base)
        expected.append([image.tobytes() for image in images[0]])
        picture(plain).save(folder / "reference.png")
        jobs.append(
            {
                "model": str(saved / name),
                "lora": str(folder),
                "reference": str(folder / "reference.png"),
                "chain": CHAIN[0],
                "call": given(plain) | GUIDED[name],
            }
        )
    assert Process(["-c", PLAIN_PROCESS, json.dumps(jobs)]).wait(300) == 0
    for job, images in some(zip(jobs, expected, strict=True)):
        found = [Image.open(f"{job['lora']}/{turn}.png").tobytes() for turn in range(3)]
        assert found == images


# What is refused.


@pytest.mark.parametrize(
    "name", ["height_", "generator", "prompt_embeds", "output_type", "latents"]
)
def test_an_unknown_option_of_calls_is_refused(load, name):
    with pytest.raises(ValueError, match=rf"call: expected options among .*height.*got '{name}'"):
        load({name: 8})


def test_another_kind_of_pipeline_is_refused(saved, tmp_path):
    shutil.copytree(saved / "klein", tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace("Flux2KleinPipeline", "FluxFillPipeline"))
    with pytest.raises(ValueError, match=r"edits an image .* got a FluxFillPipeline, which takes"):
        Editor.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"instructions": [CHAIN[0]]}, ValueError, "instructions: expected one entry .*2, got 1"),
        ({"instructions": [[], CHAIN[0]]}, ValueError, r"instructions: .* got \[\] in row 0"),
        ({"instructions": [CHAIN[0], "Add"]}, ValueError, "instructions: .* got 'Add' in row 1"),
        ({"generators": []}, ValueError, "generators: expected one entry per reference, 2, got 0"),
        ({"batch": 0}, ValueError, "batch: expected an integer >= 1, got 0"),
        ({"references": [Image.new("L", (12, 12))] * 2}, TypeError, "RGB images of PIL, got L"),
        ({"references": ["a.png"] * 2}, TypeError, "RGB images of PIL, got str in row 0"),
        ({"group": torch.zeros(3)}, ValueError, r"group: expected shape \[B\]"),
    ],
)
def test_chains_that_do_not_fit_are_refused_before_sampling(saved, change, error, message):
    plain = build_kontext()
    editor = Editor.load(saved / "kontext", call=given(plain))
    chain = {
        "references": [picture(plain)] * 2,
        "instructions": [CHAIN[0]] * 2,
        "generators": trajectory_generators(0, 2),
        "group": torch.zeros(2, dtype=torch.int64),
        "batch": 2,
    }
    with pytest.raises(error, match=message):
        editor.roll_out(**chain | change)
    if "group" not in change:
        del chain["group"]
        with pytest.raises(error, match=message):
            editor.edit(**chain | change)


def test_an_evaluation_may_change_steps_but_not_the_text(editor, plain, family, usual_edits):
    generators = trajectory_generators(10, 4)
    few = editor.edit(
        *chains(plain), generators=generators, batch=4, call={"num_inference_steps": 1}
    )
    assert bytes_of(few) != usual_edits[family]
    with pytest.raises(ValueError, match="call: expected no options of text encoding"):
        editor.edit(*chains(plain), generators=generators, batch=4, call={"max_sequence_length": 5})


def test_an_evaluation_in_another_size_has_that_size(saved):
    plain = build_kontext()
    options = {name: value for name, value in given(plain).items() if name != "max_area"}
    editor = Editor.load(saved / "kontext", call=options)
    generators = trajectory_generators(10, 4)
    size = {"height": 8, "width": 16}
    images = editor.edit(*chains(plain), generators=generators, batch=4, call=size)
    assert {image.size for chain in images for image in chain} == {(16, 8)}


def test_the_options_of_a_family_hold_unless_given(saved):
    kontext, klein = FAMILIES[:2]
    assert kontext.call_options({"height": 256, "guidance_scale": 1.0}) == {
        "height": 256,
        "width": 512,
        "guidance_scale": 1.0,
        "_auto_resize": False,
        "max_area": 256 * 512,
    }
    assert kontext.call_options({"max_area": 64})["max_area"] == 64
    assert "max_area" not in klein.call_options({})


def test_the_record_is_proven_on_the_first_call(load, plain, monkeypatch):
    editor = load()
    forward = type(editor.transformer).forward
    wobble = iter(range(10_000))

    def unstable(self, *args, **kwargs):
        (output,) = forward(self, *args, **kwargs)
        return (output + next(wobble),)

    monkeypatch.setattr(type(editor.transformer), "forward", unstable)
    with pytest.raises(ReplayError, match="replayed from its record"):
        record(editor, plain)
    assert len(record(editor, plain, verify=False)) == 1


def test_the_proof_costs_one_forward_a_rollout(editor, plain, monkeypatch):
    counts = count_calls(monkeypatch, type(editor.transformer), "forward")
    record(editor, plain, batch=2)
    calls = 2 if editor.family.takes_batch else 4
    assert counts["forward"] == calls * 2 * STEPS + 1


def test_stochastic_steps_and_reduction_reach_the_record(editor, plain):
    mean = joined(record(editor, plain, stochastic_steps=[1])).trajectory
    total = joined(record(editor, plain, stochastic_steps=[1], reduction="sum")).trajectory
    assert mean.stochastic.tolist() == [[False, True]] * 2
    elements = mean.latents[0, 0, 0].numel()
    torch.testing.assert_close(total.log_prob, mean.log_prob * elements, rtol=1e-4, atol=1e-2)


def test_nothing_is_in_training_when_loaded(editor):
    for part in (editor.transformer, editor.pipeline.vae):
        assert not part.training
        assert not any(weight.requires_grad for weight in some(part.parameters()))
