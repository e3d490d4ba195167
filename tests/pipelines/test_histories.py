"""What each turn is given: the original, the last image, further ones; as plain calls have it."""

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from mteditflow_examples.shapes.editor import build_klein, build_kontext, call_options
from tiny_pipelines.base import picture
from tiny_pipelines.checks import replay

from mteditflow import FlowSDE, trajectory_generators
from mteditflow.pipelines import Editor, LoraPolicies, Rollout, RolloutVelocity
from tests.loops import some
from tests.tiny_editors import CALLS, PROMPTS, build

SOLVER = FlowSDE(0.7)
STEPS = {"num_inference_steps": 2}
BUILD = {
    "klein": lambda: build_klein(image_size=8),
    "flux2": lambda: build("flux2"),
    "qwen-edit": lambda: build("qwen-edit"),
}
TURNS = [PROMPTS[:2], PROMPTS[:2], PROMPTS[1:]]
ORIGINAL = [["last"], ["original", "last"]]
HAT = picture(64, 128, seed=9)
SEEN = [ORIGINAL, ORIGINAL, [["original", HAT], ["last"]]]


@pytest.fixture(scope="module", params=BUILD)
def family(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    """Qwen-Image-Edit works with a megapixel; here with less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit_plus, "VAE_IMAGE_SIZE", 128 * 128)
        patch.setattr(edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64)
        yield


@pytest.fixture(scope="module")
def call(family):
    if family in CALLS:
        return CALLS[family] | STEPS
    options = call_options(build_klein(image_size=8), steps=2)
    del options["output_type"]
    return options


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("histories")
    BUILD[family]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def editor(folder, call):
    return Editor.load(folder, call=call)


def references():
    return [picture(64, seed=b // 2) for b in range(3)]  # the first two are equal


def roll_out(editor):
    parts = editor.roll_out(
        references(),
        TURNS,
        generators=trajectory_generators(10, 3),
        group=torch.tensor([0, 0, 1]),
        batch=3,
        solver=SOLVER,
        seen=SEEN,
    )
    return Rollout.concatenate([part.rollout for part in parts])


def bytes_of(images):
    return [[image.tobytes() for image in chain] for chain in images]


def test_edits_equal_plain_calls_with_lists_of_images(editor, folder, call):
    plain = DiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    expected = []
    rows = zip(references(), TURNS, SEEN, trajectory_generators(10, 3), strict=True)
    for original, prompts, seen, generator in rows:
        turns, named = [], {"original": original, "last": original}
        for prompt, names in zip(prompts, seen, strict=True):
            images = [named[name] if isinstance(name, str) else name for name in names]
            made = plain(image=images, prompt=prompt, generator=generator, **call).images[0]
            named["last"] = made
            turns.append(made)
        expected.append(turns)
    run = {"batch": 3, "seen": SEEN}
    found = editor.edit(references(), TURNS, generators=trajectory_generators(10, 3), **run)
    assert bytes_of(found) == bytes_of(expected)
    usual = editor.edit(references(), TURNS, generators=trajectory_generators(10, 3), batch=3)
    for b, turn in some([(0, 1), (1, 1), (2, 0)]):
        assert found[b][turn].tobytes() != usual[b][turn].tobytes()
    assert found[0][0].tobytes() == usual[0][0].tobytes()


def test_turns_of_other_numbers_of_references_replay_and_mix_in_one_call(editor):
    rollout = roll_out(editor)
    trajectory = rollout.trajectory
    rows = tuple(trajectory.step_mask.nonzero(as_tuple=True))
    for row in some(list(zip(*rows, strict=True))):
        one = tuple(x[None] for x in row)
        ratio = replay(rollout, editor.transformer, SOLVER, one) - trajectory.log_prob[row]
        assert ratio.detach().abs().max() == 0
    policies = LoraPolicies(editor.transformer, editor.lora(rank=2, alpha=4))
    velocity = RolloutVelocity(policies, rollout)
    at = trajectory.turn_mask.nonzero()
    clean = rollout.clean_at(at)
    sigma = torch.full((len(at),), 0.5)
    lengths = []
    hook = editor.transformer.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["hidden_states"].shape[:2]), with_kwargs=True
    )
    together = velocity("current", clean + 0.5, sigma, at)
    hook.remove()
    assert len({tokens for _, tokens in lengths}) >= 2
    together.square().sum().backward()
    assert any(x.grad is not None and x.grad.abs().sum() > 0 for x in policies.parameters())
    for m in some(range(len(at))):
        alone = velocity("current", clean[m : m + 1] + 0.5, sigma[:1], at[m : m + 1])
        torch.testing.assert_close(together[m : m + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("seen", "kind", "message"),
    [
        ([ORIGINAL], ValueError, "expected one entry per reference, 3, got 1"),
        ([ORIGINAL, ORIGINAL, [["last"]]], ValueError, "each of 2 turns, got 1 in row 2"),
        ([ORIGINAL, [["last"], []], ORIGINAL], ValueError, r"got \[\] at turn 2 in row 1"),
        ([ORIGINAL, ["last", "last"], ORIGINAL], ValueError, "got 'last' at turn 1 in row 1"),
        ([[["first"], ["last"]], *SEEN[1:]], ValueError, "expected 'original' or 'last', got 'fi"),
        ([[[HAT.convert("L")], ["last"]], *SEEN[1:]], TypeError, "or RGB images, got L at turn 1"),
        ([[[None], ["last"]], *SEEN[1:]], TypeError, "or RGB images, got NoneType at turn 1 in"),
    ],
)
def test_what_no_turn_can_be_given_is_refused(editor, seen, kind, message):
    with pytest.raises(kind, match=f"seen: .*{message}"):
        editor.edit(references(), TURNS, generators=trajectory_generators(0, 3), batch=1, seen=seen)


def test_a_family_of_one_reference_takes_the_last_image_alone(tmp_path):
    kontext = build_kontext(image_size=8)
    kontext.save_pretrained(tmp_path)
    options = call_options(kontext, steps=2)
    del options["output_type"]
    editor = Editor.load(tmp_path, call=options)
    run = {"batch": 3}
    usual = editor.edit(references(), TURNS, generators=trajectory_generators(1, 3), **run)
    last = [[["last"]] * 2] * 3
    same = editor.edit(
        references(), TURNS, generators=trajectory_generators(1, 3), seen=last, **run
    )
    assert bytes_of(same) == bytes_of(usual)
    message = (
        r"seen: expected \['last'\] for a FluxKontextPipeline, which takes one reference image, "
        r"got \['original', 'last'\] at turn 2 in row 0"
    )
    with pytest.raises(ValueError, match=message):
        editor.edit(references(), TURNS, generators=trajectory_generators(1, 3), seen=SEEN, **run)
