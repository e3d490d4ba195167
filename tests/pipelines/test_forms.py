"""Each new way in which a pipeline talks to its transformer: what is proved, refused and mixed."""

import pytest
import torch
from families import FAMILIES, normal
from tiny import replay

import mteditflow as mt
from mteditflow.pipelines import Recorder, ReplayError, Rollout
from mteditflow.pipelines.conditioning import Entries, Rows, branch_of, by_row
from mteditflow.pipelines.recognize import (
    LAYOUTS,
    Frames,
    Prefix,
    Whole,
    find_sample,
    find_time,
    in_memory,
    memory_axes,
)
from tests.loops import some

SOLVER = mt.FlowSDE(0.7)
STEPS = 3
FORMS = {
    "both branches in one call": ("StableDiffusion3Pipeline", "classifier-free"),
    "norm of tokens": ("QwenImagePipeline", "classifier-free, norm rescaled"),
    "standard deviation": ("LTXPipeline", "classifier-free, std rescaled"),
    "another order in memory": ("LTXPipeline", "none"),
    "lists and the opposite sign": ("ZImagePipeline", "none"),
    "lists of both branches": ("ZImagePipeline", "classifier-free"),
    "limit on norms": ("ZImagePipeline", "classifier-free, norm limited"),
    "a time per token": ("WanPipeline, expand_timesteps", "classifier-free"),
    "channels behind the sample": ("WanImageToVideoPipeline", "classifier-free"),
}


@pytest.fixture(params=FORMS)
def form(request):
    """A fresh pipeline, and its call of two trajectories."""
    name, kind = FORMS[request.param]
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = family.build()

    def call(generators=None):
        given = family.inputs(0) | family.options | family.guided[kind]
        given |= {"num_inference_steps": STEPS, "output_type": "latent"}
        pipeline(**given, generator=generators)

    return pipeline, call


# Proved at every step.


@pytest.mark.parametrize("change", [lambda v: 1.001 * v, torch.neg, lambda v: v.flip(0)])
def test_refuses_a_velocity_changed_at_the_last_step(form, change):
    pipeline, call = form
    recorder, seen = Recorder(pipeline), []
    stepped = recorder.stepped

    def late(step, velocity, timestep):
        seen.append(velocity)
        stepped(step, change(velocity) if len(seen) == STEPS else velocity, timestep)

    recorder.stepped = late
    with pytest.raises(ReplayError, match="velocity"), recorder:
        call()


def test_refuses_a_sample_changed_before_the_transformer(form):
    pipeline, call = form
    calls = []

    def last(_model, args, given):
        calls.append(1)
        name = "hidden_states" if "hidden_states" in given else None
        held = given[name] if name else args[0]
        if len(calls) < 3:
            return args, given
        other = [1.01 * x for x in held] if isinstance(held, list) else 1.01 * held
        return (args, given | {name: other}) if name else ((other, *args[1:]), given)

    pipeline.transformer.register_forward_pre_hook(last, with_kwargs=True)
    with pytest.raises(ReplayError, match="does not hold the sample"), Recorder(pipeline):
        call()


def test_refuses_prompts_changed_at_a_later_step(form):
    pipeline, call = form
    calls = []

    def change(_model, args, given):
        calls.append(1)
        if len(calls) < 3:
            return args, given
        if "encoder_hidden_states" in given:
            held = {"encoder_hidden_states": given["encoder_hidden_states"] + 1}
            return args, given | held
        return (*args[:2], [x + 1 for x in args[2]]), given

    pipeline.transformer.register_forward_pre_hook(change, with_kwargs=True)
    with pytest.raises(ReplayError, match="changes over the steps"), Recorder(pipeline):
        call()


def test_recorded_in_inference_mode_it_replays_with_gradients(form):
    pipeline, call = form
    generators = mt.trajectory_generators(0, 2)
    with torch.inference_mode(), Recorder(pipeline, SOLVER, generators=generators) as recorder:
        call(generators)
    rollout = recorder.rollout(group=[0, 0])
    rows = all_rows(rollout)
    replayed = replay(rollout, pipeline.transformer.requires_grad_(True), SOLVER, rows)
    stored = rollout.trajectory.log_prob[rows]
    torch.testing.assert_close(replayed.detach(), stored, rtol=0, atol=1e-6)
    replayed.sum().backward()
    gradients = [p.grad for p in pipeline.transformer.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in some(gradients))
    assert max(gradient.abs().max() for gradient in gradients) > 0


def test_half_precision_is_replayed_bit_for_bit(form):
    pipeline, call = form
    pipeline.to(torch.bfloat16)
    generators = mt.trajectory_generators(0, 2)
    with Recorder(pipeline, SOLVER, generators=generators) as recorder:
        call(generators)
    rollout, both = recorder.rollout(group=[0, 0]), torch.arange(2)
    for step in range(STEPS):
        rows = (both, torch.zeros_like(both), torch.full_like(both, step))
        replayed = replay(rollout, pipeline.transformer, SOLVER, rows).detach()
        torch.testing.assert_close(replayed, rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6)


# Lists with an entry per trajectory.


@pytest.fixture
def z_image():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES["ZImagePipeline"].build()


def call_z_image(pipeline, embeds, **more):
    """A call with embeddings of prompts of any lengths."""
    given = {"negative_prompt_embeds": [-x[:2] for x in embeds], "output_type": "latent"}
    given |= {"height": 8, "width": 8, "num_inference_steps": STEPS}
    pipeline(prompt_embeds=embeds, **given | more)


def roll_out(pipeline, embeds, *, seed=0, **recording):
    """A rollout of such a call."""
    generators = mt.trajectory_generators(seed, len(embeds))
    with Recorder(pipeline, SOLVER, generators=generators, **recording) as recorder:
        call_z_image(pipeline, embeds, generator=generators)
    return recorder.rollout(group=[0] * len(embeds))


def all_rows(rollout):
    """Rows of every step, shuffled."""
    rows = torch.stack(rollout.trajectory.step_mask.nonzero(as_tuple=True))
    return tuple(rows[:, torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))])


def test_prompts_of_other_lengths_and_batches_share_a_call(z_image):
    lengths = ((3, 6, 4), (5,), (2, 40))
    parts = [
        roll_out(z_image, [normal(n, 32, seed=n) for n in part], seed=k)
        for k, part in enumerate(lengths)
    ]
    rollout = Rollout.concatenate(parts).select(torch.tensor([5, 0, 3, 2]))
    rows, calls = all_rows(rollout), []
    hook = z_image.transformer.register_forward_hook(lambda *_: calls.append(1))
    replayed = replay(rollout, z_image.transformer, SOLVER, rows).detach()
    hook.remove()
    assert len(calls) == 1
    torch.testing.assert_close(replayed, rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6)


def test_a_list_entry_changed_in_place_is_noticed(z_image):
    embeds = [normal(n, 32, seed=n) for n in (3, 5)]
    with Recorder(z_image, SOLVER, generators=mt.trajectory_generators(0, 2)) as recorder:
        call_z_image(z_image, embeds, guidance_scale=0.0)
    embeds[1].zero_()
    with pytest.raises(ReplayError, match="cap_feats: changed in place"):
        recorder.rollout(group=[0, 0])


def test_storage_owns_the_entries_of_lists(z_image):
    embeds = [normal(n, 32, seed=n) for n in (3, 5)]
    rollout = roll_out(z_image, embeds, storage="cpu").to("cpu")
    embeds[1].zero_()
    rows = all_rows(rollout)
    replayed = replay(rollout, z_image.transformer, SOLVER, rows).detach()
    torch.testing.assert_close(replayed, rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6)


def test_references_of_other_sizes_are_called_apart():
    """Their sizes are in lists that the transformer reads for the first image alone."""
    family = FAMILIES["QwenImageEditPipeline"]
    pipeline = family.build()
    parts = []
    for size in ((64, 128), (128, 64)):  # as many tokens each
        given = family.inputs(0) | family.options | {"true_cfg_scale": 1.0}
        given["image"] = given["image"].resize(size)
        generators = mt.trajectory_generators(0, 2)
        with Recorder(pipeline, SOLVER, generators=generators) as recorder:
            pipeline(**given, num_inference_steps=1, output_type="latent", generator=generators)
        parts.append(recorder.rollout(group=[0, 0]))
    rollout, calls = Rollout.concatenate(parts), []
    rows = all_rows(rollout)
    hook = pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    replayed = replay(rollout, pipeline.transformer, SOLVER, rows).detach()
    hook.remove()
    assert len(calls) == 2
    torch.testing.assert_close(replayed, rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6)


# Layouts and arguments, on tensors alone.


@pytest.mark.parametrize(
    ("layout", "shape", "rest"),
    [(Whole(), (2, 3, 4), None), (Prefix(), (2, 3, 4), (2, 5, 4)), (Frames(), (2, 3, 4, 5), None)],
)
def test_what_is_joined_is_split_again_by_its_own_layout_alone(layout, shape, rest):
    sample = torch.randn(shape)
    behind = None if rest is None else torch.randn(rest)
    argument = layout.join(sample, behind)
    parts = layout.split(argument, sample)
    assert torch.equal(parts[0], sample)
    assert (parts[1] is None) if rest is None else torch.equal(parts[1], behind)
    assert torch.equal(layout.velocity(argument, sample), sample)
    assert [type(other) for other in LAYOUTS if other.split(argument, sample)] == [type(layout)]
    assert layout.split(argument, torch.cat([sample, sample])) is None


def test_a_sample_is_found_once_or_twice_along_the_batch():
    sample = torch.randn(2, 3, 4)
    for copies, held in ((1, sample), (2, torch.cat([sample, sample]))):
        place = find_sample({"x": held.bfloat16(), "y": held + 1}, sample)
        assert (place.name, place.dtype, place.copies) == ("x", torch.bfloat16, copies)
    with pytest.raises(ReplayError, match="once or twice along the batch, but none does"):
        find_sample({"x": torch.cat([sample, sample.flip(0)])}, sample)


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (2, 0, 1)])
def test_a_sample_lies_in_memory_as_it_did(axes):
    x = torch.randn(2, 3, 4)
    laid = in_memory(x, axes)
    assert torch.equal(laid, x)
    assert memory_axes(laid) == axes
    assert memory_axes(in_memory(laid, (0, 1, 2))) == (0, 1, 2)
    assert memory_axes(torch.ones(3, 1, 2).transpose(0, 1)) == (0, 1, 2)


def test_a_time_per_token_is_read_from_the_argument_of_that_name_alone():
    timestep = torch.tensor(873.0)
    tokens = torch.full((2, 5), 873.0)
    assert find_time({"timestep": tokens, "mask": torch.ones(2, 5)}, timestep) == "timestep"
    with pytest.raises(ReplayError, match="none of"):
        find_time({"t": tokens}, timestep)
    tokens[:, 0] = 0
    with pytest.raises(ReplayError, match="none of"):
        find_time({"timestep": tokens}, timestep)


SHAPES = [[(1, 2, 2)], [(1, 2, 2)]]
TENSORS = [torch.zeros(3, 4), torch.ones(5, 4)]


@pytest.mark.parametrize(
    ("value", "listed", "shared", "expected"),
    [
        (SHAPES, False, (), Entries(tuple(SHAPES))),
        (TENSORS, True, (), Entries(tuple(TENSORS))),
        (TENSORS, True, ("x",), TENSORS),
        ((0.5, 32), False, (), (0.5, 32)),
        ([1, 2, 3], False, (), [1, 2, 3]),
        ("ab", False, (), "ab"),
    ],
)
def test_what_belongs_to_rows_is_wrapped(value, listed, shared, expected):
    assert by_row("x", value, 2, shared, listed) == expected


@pytest.mark.parametrize("value", [TENSORS, [[1], [2]], [{}, {}], [None, (1,)]])
def test_lists_as_long_as_the_batch_that_could_be_either_are_refused(value):
    with pytest.raises(ReplayError, match="x: a list as long as the batch"):
        by_row("x", value, 2, (), False)


def test_a_branch_has_its_share_of_rows_and_all_of_the_rest():
    shared = torch.zeros(3)
    tree = {"a": Rows(torch.arange(4)), "b": [Entries((1, 2, 3, 4)), shared], "c": 5}
    one, other = (branch_of(tree, index, 2) for index in (0, 1))
    assert one["a"].tensor.tolist() == [0, 1]
    assert other["a"].tensor.tolist() == [2, 3]
    assert [branch["b"][0].values for branch in (one, other)] == [(1, 2), (3, 4)]
    assert one["b"][1] is other["b"][1] is shared
    assert branch_of(tree, 0, 1) is tree
