"""Each new way in which a pipeline talks to its transformer: what is proved, refused and mixed."""

import pytest
import torch
from tiny_pipelines import FAMILIES
from tiny_pipelines.base import normal
from tiny_pipelines.checks import Case, replay

import mteditflow as mt
from mteditflow.pipelines import Recorder, ReplayError, Rollout
from mteditflow.pipelines.conditioning import Entries, Rows, map_kinds, readings, select_rows
from mteditflow.pipelines.flow_times import Time, find_grid, in_units
from mteditflow.pipelines.recognize import find_sample, in_memory, memory_axes
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
    "a time per token": ("WanPipeline, Wan 2.2 TI2V-5B", "classifier-free"),
    "channels behind the sample": ("WanImageToVideoPipeline", "classifier-free"),
}


@pytest.fixture(params=FORMS)
def form(request):
    """A fresh pipeline, and its call of two trajectories."""
    name, kind = FORMS[request.param]
    case = Case(FAMILIES[name], kind)

    def call(generators=None):
        dtype = case.model.dtype
        given = {
            name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in case.given(0, 2).items()
        }
        given |= {"num_inference_steps": STEPS, "output_type": "latent"}
        case.pipeline(**given, generator=generators)

    return case.pipeline, call


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
    rollout = recorder.rollout(group=[0, 1])
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
    rollout, both = recorder.rollout(group=[0, 1]), torch.arange(2)
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
    return recorder.rollout(group=list(range(len(embeds))))


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


def test_list_entries_changed_afterwards_change_nothing(z_image):
    embeds = [normal(n, 32, seed=n) for n in (3, 5)]
    with Recorder(z_image, SOLVER, generators=mt.trajectory_generators(0, 2)) as recorder:
        call_z_image(z_image, embeds, guidance_scale=0.0)
    rollout = recorder.rollout(group=[0, 1])
    embeds[1].zero_()
    rows = all_rows(rollout)
    replayed = replay(rollout, z_image.transformer, SOLVER, rows).detach()
    torch.testing.assert_close(replayed, rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6)


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
        given = family.inputs(0, 2) | family.options | {"true_cfg_scale": 1.0}
        given["image"] = given["image"].resize(size)
        generators = mt.trajectory_generators(0, 2)
        with Recorder(pipeline, SOLVER, generators=generators) as recorder:
            pipeline(**given, num_inference_steps=2, output_type="latent", generator=generators)
        parts.append(recorder.rollout(group=[0, 1]))
    rollout, calls = Rollout.concatenate(parts), []
    rows = all_rows(rollout)
    hook = pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    replayed = replay(rollout, pipeline.transformer, SOLVER, rows).detach()
    hook.remove()
    assert len(calls) == 2
    torch.testing.assert_close(replayed, rollout.trajectory.log_prob[rows], rtol=0, atol=1e-6)


# Places and arguments, on tensors alone.


def beside(axis, start, extra):
    """An argument of which the sample is a part."""

    def argument(sample):
        shape = list(sample.shape)
        shape[axis] = extra
        before, after = torch.randn(shape).tensor_split((start,), dim=axis)
        return torch.cat([before, sample, after], dim=axis)

    return argument


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(
    ("argument", "told"),
    [
        (lambda x: x, "`x` is it"),
        (lambda x: list(x), "`x` is it as a list of its rows"),
        (lambda x: list(x.unsqueeze(2)), "`x` is it as a list of its rows"),
        (lambda x: x.unsqueeze(3), "`x` is it"),
        (beside(1, 0, 2), "`x` begins with it on axis 1"),
        (beside(3, 0, 9), "`x` begins with it on axis 3"),
        (beside(1, 4, 4), "`x` holds it behind a prefix on axis 1"),
        (beside(2, 3, 5), "`x` holds it behind a prefix on axis 2"),
    ],
)
def test_a_sample_is_found_in_any_place_and_put_there_again(argument, told, copies):
    sample = torch.randn(2, 3, 4, 5)
    rows = torch.cat([sample] * copies)
    held = argument(rows)
    place = find_sample({"y": torch.randn(2, 3), "x": held}, sample)
    assert str(place) == told + (", twice along the batch" if copies == 2 else "")
    part, rest = place.split(held, rows)
    assert torch.equal(part, rows)
    again = place.join(rows, rest)
    assert type(again) is type(held)
    assert all(torch.equal(one, other) for one, other in zip(some(again), held, strict=True))
    more = 1000 * torch.randn_like(rows)  # larger than the velocity, and not like it
    for output in (held, rows, torch.cat([more, rows], dim=1), torch.cat([rows, more], dim=3)):
        seen = place.with_output(
            output, rows, -sample, [output]
        )  # pipelines may turn the velocity round
        assert torch.equal(seen.velocity(output, rows), rows)
    with pytest.raises(ReplayError, match="of which no part has the shape of the sample"):
        place.with_output(rows[..., :2], rows, sample, [rows[..., :2]]).velocity(
            rows[..., :2], rows
        )
    assert place.split(argument(torch.cat([rows, rows])), rows) is None


def test_a_sample_that_is_not_there_is_told_by_what_is():
    sample = torch.randn(2, 3, 4)
    mixed = torch.where(torch.arange(4) < 1, 0.0, sample)
    with pytest.raises(ReplayError, match="x has its shape, and equals it in 75% of its numbers"):
        find_sample({"x": mixed}, sample)
    with pytest.raises(ReplayError, match=r"\['x'\] may hold it in another layout"):
        find_sample({"x": sample.transpose(1, 2), "y": torch.zeros(5)}, sample)


def test_a_sample_is_found_once_or_twice_along_the_batch():
    sample = torch.randn(2, 3, 4)
    for copies, held in ((1, sample), (2, torch.cat([sample, sample]))):
        place = find_sample({"x": held.bfloat16(), "y": held + 1}, sample)
        assert (place.name, place.dtype, place.copies) == ("x", torch.bfloat16, copies)
    with pytest.raises(ReplayError, match="once or twice along the batch, but none does"):
        find_sample({"x": torch.cat([sample, sample.flip(0)])}, sample)


def test_times_of_a_grid_that_shifts_its_sigmas_alone():
    """As CogView4's, at the recorded flow times exactly and between them by the shift's inverse."""
    timesteps = torch.tensor([1000.0, 750.0, 500.0, 250.0])
    u = timesteps / 1000
    sigmas = 3 * u / (1 + 2 * u)
    grid = find_grid(sigmas, timesteps, 1000)
    assert torch.equal(grid.timestep(sigmas), timesteps)
    between = torch.tensor([0.9, 0.3])
    inverse = 1000 * between / (3 - 2 * between)
    torch.testing.assert_close(grid.timestep(between), inverse, rtol=1e-5, atol=0)
    plain = find_grid(u, timesteps, 1000)
    assert torch.equal(plain.timestep(between), between * 1000)
    with pytest.raises(ReplayError, match="no known function of its sigmas"):
        find_grid(u.square(), timesteps, 1000)


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (2, 0, 1)])
def test_a_sample_lies_in_memory_as_it_did(axes):
    x = torch.randn(2, 3, 4)
    laid = in_memory(x, axes)
    assert torch.equal(laid, x)
    assert memory_axes(laid) == axes
    assert memory_axes(in_memory(laid, (0, 1, 2))) == (0, 1, 2)
    assert memory_axes(torch.ones(3, 1, 2).transpose(0, 1)) == (0, 1, 2)


SHAPES = [[(1, 2, 2)], [(1, 2, 2)]]
TENSORS = [torch.zeros(3, 4), torch.ones(5, 4)]


@pytest.mark.parametrize(
    ("value", "listed", "expected"),
    [
        (SHAPES, False, Entries(tuple(SHAPES))),
        (TENSORS, True, Entries(tuple(TENSORS))),
        (TENSORS, False, Entries(tuple(TENSORS))),
        ([{"size": 1}, {"size": 2}], False, Entries(({"size": 1}, {"size": 2}))),
        ((0.5, 32), False, (0.5, 32)),
        ([1, 2, 3], False, [1, 2, 3]),
        ("ab", False, "ab"),
    ],
)
def test_what_belongs_to_rows_is_read_likeliest_first(value, listed, expected):
    assert readings("x", value, 2, listed)[0] == expected
    assert value in readings("x", value, 2, listed)


def test_axes_of_the_batch_are_read_likeliest_first():
    def axes(*shape, batch=2, name="x"):
        found = readings(name, torch.zeros(shape), batch, False)
        return [x.axis if isinstance(x, Rows) else None for x in found]

    assert axes(2, 5) == axes(2) == axes(2, 5, 4) == [0, None]
    assert axes(7, 2, 5) == [1, None]
    assert axes(2, 2, 5) == [0, 1, None]
    assert axes(7, 2) == axes(3) == axes(2, 3, name="img_ids") == [None]


def test_blocks_of_a_controlnet_have_rows_each():
    blocks = [torch.zeros(2, 5), torch.ones(2, 5)]
    first, *others = readings("x", blocks, 2, False)
    assert [type(block) for block in first] == [Rows, Rows]
    assert isinstance(others[-1], Entries)


def test_rows_are_picked_along_their_own_axis():
    x, y = torch.arange(12).reshape(2, 3, 2), -torch.arange(18).reshape(2, 3, 3)[..., :2]
    one, other = Rows(x, 1), Rows(y, 1)
    device = torch.device("cpu")
    assert torch.equal(select_rows([one] * 2, [2, 0], device), x[:, [2, 0]])
    mixed = torch.stack([x[:, 2], y[:, 1]], dim=1)
    assert torch.equal(select_rows([one, other], [2, 1], device), mixed)


def test_kinds_tell_apart_what_a_proof_does_not_cover():
    """A later turn is proved again where its arguments can be read in another way."""
    x = torch.zeros(2)
    held = [x, None, 1, Rows(x), Rows(x, 1), [x], (x,), [x, x], {"b": x}]
    kinds = {map_kinds({"a": value}) for value in held} | {map_kinds({"b": x})}
    assert len(kinds) == len(held) + 1
    assert map_kinds({"a": [Rows(x), x]}) == map_kinds({"a": [Rows(torch.ones(5)), x + 1]})


def test_one_time_of_a_call_stays_one_where_all_rows_have_it():
    time = Time("timestep", torch.float32, (), in_units, single=True)
    assert time.argument(torch.tensor([500.0, 500.0])).tolist() == [0.5]
    assert time.argument(torch.tensor([500.0, 250.0])).tolist() == [0.5, 0.25]
    each = time._replace(single=False, axes=(3,))
    assert each.argument(torch.tensor([500.0, 500.0])).tolist() == [[0.5] * 3] * 2


def test_rows_along_the_second_axis_leave_those_along_the_first():
    """States per layer may hold a square tensor beside one whose only batch axis is the first."""
    square, flat = torch.zeros(2, 2, 3), torch.zeros(2, 5)
    read = readings("states", {"square": square, "flat": flat}, batch=2, listed=False)
    axes = [(r["square"].axis, r["flat"].axis) for r in read if isinstance(r["flat"], Rows)]
    assert axes == [(0, 0), (1, 0)]


def test_the_velocity_of_guided_outputs_may_be_like_another_part_of_one_of_them():
    sample = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(0))
    reference = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(1))
    conditional, unconditional = sample + 0.1 * reference, sample
    velocity = unconditional + 20 * (conditional - unconditional)
    outputs = [torch.cat([x, reference], dim=1) for x in (conditional, unconditional)]
    place = find_sample({"hidden_states": torch.cat([sample, reference], dim=1)}, sample)
    for output in some(outputs):
        alone = place.with_output(output, sample, velocity, [output])
        assert alone.output.start == 6  # what a single branch would mean
        assert place.with_output(output, sample, velocity, outputs).output.start == 0
