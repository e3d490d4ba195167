"""What the recorder refuses, with faults put into real pipelines; and that it always cleans up."""

import copy
import importlib
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from peft import LoraConfig
from tiny import CHAIN, STEPS, call, picture, roll_out
from tiny_pipelines.checks import replay

from mteditflow import ODE, FlowSDE, trajectory_generators
from mteditflow.pipelines import FlowMatchSDEScheduler, LoraPolicies, Recorder, ReplayError
from mteditflow.pipelines.conditioning import Rows
from mteditflow.pipelines.flow_times import CLOCKS, find_time, find_times
from mteditflow.pipelines.patterns import CallPattern
from mteditflow.pipelines.recognize import find_sample
from tests.loops import some


def edit(pipeline, guidance=1.0, **more):
    """One edit of one image."""
    generators = trajectory_generators(0, 1)
    return call(pipeline, [picture(pipeline)], [CHAIN[0][0]], generators, guidance, **more)


def record(pipeline, *, velocity=None, arguments=None, forward=None, **given):
    """Record one edit, with a change put between transformer and scheduler, or before it."""
    if arguments is not None:
        pipeline.transformer.register_forward_pre_hook(
            lambda _model, args, kwargs: (args, kwargs | arguments(kwargs)), with_kwargs=True
        )
    with Recorder(pipeline):
        if velocity is not None:
            step = pipeline.scheduler.step
            pipeline.scheduler.step = lambda v, *args, **kw: step(velocity(v), *args, **kw)
        if forward is not None:
            pipeline.transformer.forward = forward
        edit(pipeline, **given)


# Faults between transformer and scheduler.


@pytest.mark.parametrize(
    "change", [lambda v: v * (1 + 1e-5), lambda v: v + 1e-5, lambda v: v.flip(1)]
)
def test_refuses_a_velocity_changed_after_the_transformer(pipeline, change):
    with pytest.raises(ReplayError, match="velocity was changed"):
        record(pipeline, velocity=change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_refuses_a_velocity_changed_at_a_single_late_step(pipeline, guidance, dtype):
    seen = []

    def late(velocity):
        seen.append(velocity)
        return velocity * 1.02 if len(seen) == STEPS else velocity

    pipeline.to(dtype)
    with pytest.raises(ReplayError, match="velocity was changed"):
        record(pipeline, velocity=late, guidance=guidance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refuses_guidance_with_rescaled_norm(pipeline, dtype):
    pipeline.to(dtype)
    with pytest.raises(ReplayError, match="rescaled or otherwise modified"):
        record(pipeline, velocity=lambda v: v / v.norm(dim=-1, keepdim=True), guidance=3.0)


def test_refuses_guidance_whose_scale_changes(pipeline):
    outputs, factor = [], iter([1.0, 1.5, 1.0])
    pipeline.transformer.register_forward_hook(
        lambda _model, _args, output: outputs.append(output[0])
    )

    def scheduled(velocity):
        positive, negative = (output[:, : velocity.shape[1]] for output in outputs[-2:])
        return negative + 3.0 * next(factor) * (positive - negative)

    with pytest.raises(ReplayError, match="velocity was changed"):
        record(pipeline, velocity=scheduled, guidance=3.0)


def test_refuses_a_model_that_attends_otherwise_during_the_call(kontext):
    """As pipelines of perturbed attention guidance do, which put the processors back."""
    attention = kontext.transformer.transformer_blocks[0].attn
    own, perturbed = attention.processor, copy.copy(attention.processor)

    def restore(_pipeline, step, _timestep, _given):
        if step == STEPS - 1:
            attention.set_processor(own)
        return {}

    attention.set_processor(perturbed)
    with Recorder(kontext):
        edit(kontext)
    with pytest.raises(ReplayError, match="model: its attention processors during the call"):
        record(kontext, callback_on_step_end=restore)


def test_refuses_a_velocity_of_another_shape(pipeline):
    with pytest.raises(ReplayError, match="given a velocity"):
        record(pipeline, velocity=lambda v: v[:, :1].expand_as(v)[:, :1])


def test_refuses_a_nan(pipeline):
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.fill_(torch.nan)
    with pytest.raises(ReplayError, match="or is NaN"):
        record(pipeline)


def test_refuses_branches_that_hide_the_scale(kontext):
    with pytest.raises(ReplayError, match="hides the guidance scale"):
        record(kontext, guidance=3.0, negative_prompt=CHAIN[0][0])


# Faults in the transformer's arguments.


def test_refuses_a_flow_time_that_is_no_known_function_of_sigma(pipeline):
    with pytest.raises(ReplayError, match="should hold the scheduler's timestep 1000"):
        record(pipeline, arguments=lambda given: {"timestep": given["timestep"] * 0.9})


def test_refuses_a_clock_that_fits_the_first_step_only(pipeline):
    with pytest.raises(ReplayError, match="timestep is not a known function of sigma"):
        record(pipeline, arguments=lambda given: {"timestep": given["timestep"] ** 2})


def test_refuses_a_sample_that_the_transformer_does_not_get(pipeline):
    with pytest.raises(ReplayError, match=r"hold the scheduler's sample .* but none does"):
        record(pipeline, arguments=lambda given: {"hidden_states": given["hidden_states"] * 0.5})


def test_refuses_another_sample_at_a_later_step(pipeline):
    calls = []

    def halve(given):
        calls.append(1)
        return {"hidden_states": given["hidden_states"] * (0.5 if len(calls) == 2 else 1.0)}

    with pytest.raises(ReplayError, match="hidden_states does not hold the sample"):
        record(pipeline, arguments=halve)


def test_refuses_other_reference_tokens_at_a_later_step(pipeline):
    calls = []

    def drift(given):
        calls.append(1)
        tokens = given["hidden_states"].clone()
        tokens[:, -1] += float(len(calls) == 2)
        return {"hidden_states": tokens}

    with pytest.raises(ReplayError, match="hidden_states changes beside the sample"):
        record(pipeline, arguments=drift)


@pytest.mark.parametrize("later", [{"guidance": torch.ones(1)}, {"return_dict": True}])
def test_refuses_arguments_that_change_over_the_steps(pipeline, later):
    calls = []
    forward = pipeline.transformer.forward

    def change(_given):
        calls.append(1)
        return later if len(calls) == 2 else {}

    def ignoring(**given):
        return forward(**given | {"return_dict": False, "guidance": None})

    with pytest.raises(ReplayError, match=r"step 1: .* changes over the steps"):
        record(pipeline, arguments=change, forward=ignoring)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_refuses_autocast_that_changes_dtypes_on_the_way(pipeline):
    """A float32 pipeline starts in float32 and goes on in what autocast returns."""
    message = r"changes.* from torch.float32 to torch.bfloat16, as by autocast"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ReplayError, match=message):
        record(pipeline)


def test_refuses_prompts_that_change_over_the_steps(pipeline):
    def swap(_pipeline, _step, _timestep, given):
        return {"prompt_embeds": given["prompt_embeds"] + 1}

    watched = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(ReplayError, match="encoder_hidden_states changes over the steps"):
        record(pipeline, callback_on_step_end=swap, **watched)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 1.01, "latents changed between two steps"),
        (lambda x: x.mul_(1.01), "latents changed in place"),
    ],
)
def test_refuses_latents_changed_by_a_callback_under_a_solver(pipeline, change, message):
    def callback(_pipeline, _step, _timestep, given):
        return {"latents": change(given["latents"])}

    solver, generators = FlowSDE(0.7), trajectory_generators(0, 1)
    with (
        pytest.raises(ReplayError, match=message),
        Recorder(pipeline, solver, generators=generators),
    ):
        edit(pipeline, callback_on_step_end=callback)


def calling(pipeline, times):
    """A forward that calls the transformer more often: ``times(k)`` at its k-th call in all."""
    forward, calls = pipeline.transformer.forward, []

    def again(**given):
        calls.append(1)
        if len(calls) in times:
            pipeline.transformer(**given)
        return forward(**given)

    return again


def test_refuses_branches_at_different_times(pipeline):
    calls = []

    def later(given):
        calls.append(1)
        return {"timestep": given["timestep"] * (0.5 if len(calls) == 2 else 1.0)}

    with pytest.raises(ReplayError, match=r"hold the scheduler.s timestep 1000, .* none of"):
        record(pipeline, arguments=later, guidance=3.0)


def test_refuses_more_than_two_branches(pipeline):
    with pytest.raises(ReplayError, match="two under classifier-free guidance, got 3"):
        record(pipeline, forward=calling(pipeline, times=(1, 2)))


def test_refuses_branches_that_come_and_go(pipeline):
    with pytest.raises(ReplayError, match="both branches gave the same velocity"):
        record(pipeline, forward=calling(pipeline, times=(2,)))


class Grids(FluxTransformer2DModel):
    """Takes a list with an entry per image, as Qwen-Image-Edit does."""

    def forward(self, *args, img_shapes=None, **kwargs):
        return super().forward(*args, **kwargs)


class Table(FluxTransformer2DModel):
    """Reads a table that all images of a batch share, or lists of numbers, one per image."""

    def forward(self, hidden_states, *, table=None, img_shapes=None, blocks=None, **kwargs):
        scale = 1 if table is None else 1 + table.sum()
        if img_shapes is not None:
            scale = scale * torch.stack([shape["scale"] for shape in img_shapes])[:, None, None]
        if blocks is not None:
            (block,) = blocks
            scale = scale * (1 + block)
        return super().forward(hidden_states * scale, **kwargs)


def with_table(kontext, batch, given, **recording):
    """A recording of a transformer that is given more."""
    kontext.transformer.__class__ = Table
    kontext.transformer.register_forward_pre_hook(
        lambda _model, args, kwargs: (args, given | kwargs), with_kwargs=True
    )
    images, generators = [picture(kontext)] * batch, trajectory_generators(0, batch)
    with Recorder(kontext, **recording) as recorder:
        call(kontext, images, CHAIN[0][:batch], generators)
    return recorder.rollout(group=list(range(batch)))


def velocity_of(kontext, rollout, trajectory):
    """Velocity of the last step of one trajectory."""
    x_t, one = rollout.trajectory.clean[[trajectory], 0], torch.tensor([trajectory])
    return rollout.velocity(kontext.transformer, x_t, torch.ones(1), one, torch.tensor([0]))


@pytest.mark.parametrize("batch", [1, 2])
def test_what_looks_like_rows_and_is_shared_is_found_by_the_proof(kontext, batch):
    rollout = with_table(kontext, batch, {"table": torch.arange(1.0, 1 + batch)[:, None]})
    (stage,) = rollout.conditioning[0].stages
    assert isinstance(stage.calls[0].arguments["table"], torch.Tensor)
    assert velocity_of(kontext, rollout, 0).isfinite().all()


def test_without_the_proof_what_is_shared_is_named(kontext):
    given = {"table": torch.arange(1.0, 3.0)[:, None]}
    (stage,) = with_table(kontext, 2, given, verify=False).conditioning[0].stages
    assert isinstance(stage.calls[0].arguments["table"], Rows)
    rollout = with_table(kontext, 2, given, verify=False, shared=["table"])
    assert velocity_of(kontext, rollout, 0).isfinite().all()


def test_a_list_of_one_block_is_told_from_a_list_of_rows(kontext):
    """Of a batch of one both look the same; replays of two rows do not."""
    block = torch.full((1, 1, 1), 0.5)
    rollout = with_table(kontext, 1, {"blocks": [block]})
    both = torch.zeros(2, dtype=torch.int64)
    x_t = rollout.trajectory.clean[both, 0]
    velocity = rollout.velocity(kontext.transformer, x_t, torch.ones(2), both, both)
    assert torch.allclose(velocity[0], velocity_of(kontext, rollout, 0)[0], atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_list_with_an_entry_per_row_is_replayed_by_row(kontext, batch):
    """Each trajectory alone has its own likelihood again, whatever its place in the batch."""
    entries = [{"scale": torch.tensor(1.0 + b)} for b in range(batch)]
    solver, generators = FlowSDE(0.7), trajectory_generators(0, batch)
    recording = {"solver": solver, "generators": generators}
    rollout = with_table(kontext, batch, {"img_shapes": entries}, **recording)
    kontext.transformer._forward_pre_hooks.clear()  # the record alone gives the entries
    for b in some(range(batch)):
        rows = (torch.full((STEPS,), b), torch.zeros(STEPS, dtype=torch.int64), torch.arange(STEPS))
        with torch.no_grad():
            replayed = replay(rollout, kontext.transformer, solver, rows)
        stored = rollout.trajectory.log_prob[rows]
        torch.testing.assert_close(replayed, stored, rtol=0, atol=1e-5)


class Store:
    """Keeps what it is given, as a cache of keys and values does."""


def test_an_object_that_may_keep_a_state_is_refused_unless_named(kontext):
    held = [Store()]
    kontext.transformer.__class__ = Grids
    kontext.transformer.register_forward_pre_hook(
        lambda _model, args, kwargs: (args, {"img_shapes": held} | kwargs), with_kwargs=True
    )
    with pytest.raises(ReplayError, match="img_shapes holds a Store, which may keep a state"):
        record(kontext)
    with Recorder(kontext, shared=["img_shapes"]) as recorder:
        edit(kontext)
    assert len(recorder.rollout(group=[0])) == 1


class Cached(FluxTransformer2DModel):
    """Computes its first and last call of a turn, and keeps the difference for those between."""

    def forward(self, hidden_states, *args, **kwargs):
        number = getattr(self, "number", 0)
        self.number = (number + 1) % STEPS
        if number in (0, STEPS - 1):
            output = super().forward(hidden_states, *args, **kwargs)[0]
            self.kept = output - hidden_states
        return (hidden_states + self.kept,)


class Counting(FluxTransformer2DModel):
    """Is stronger in its first call."""

    def forward(self, *args, **kwargs):
        self.number = getattr(self, "number", 0) + 1
        return ((1.1 if self.number == 1 else 1.0) * super().forward(*args, **kwargs)[0],)


@pytest.mark.parametrize("kind", [Cached, Counting])
@pytest.mark.parametrize("batch", [1, 2])
def test_refuses_a_transformer_that_keeps_a_state(kontext, kind, batch):
    kontext.transformer.__class__ = kind
    images, generators = [picture(kontext)] * batch, trajectory_generators(0, batch)
    with pytest.raises(ReplayError, match="replayed from its record"), Recorder(kontext):
        call(kontext, images, CHAIN[0][:batch], generators)


def test_what_can_be_read_in_another_way_in_a_later_turn_is_proved_again(kontext):
    """A table that is as long as the batch in the second turn alone."""
    tables = [torch.tensor([[0.3]]), torch.tensor([[0.3], [1.7]])]
    kontext.transformer.__class__ = Table
    turn = [0]
    kontext.transformer.register_forward_pre_hook(
        lambda _model, args, kwargs: (args, {"table": tables[turn[0]]} | kwargs), with_kwargs=True
    )
    images, generators = [picture(kontext)] * 2, trajectory_generators(0, 2)
    with Recorder(kontext) as recorder:
        for turn[0] in (0, 1):
            call(kontext, images, CHAIN[0][:2], generators)
    rollout = recorder.rollout(group=[0, 1])
    held = [record.stages[0].calls[0].arguments["table"] for record in rollout.conditioning]
    assert [type(table) for table in held] == [torch.Tensor, torch.Tensor]


def test_arrays_are_copied_and_compared(kontext):
    kontext.transformer.__class__ = Grids
    held = np.array([1.0, 2.0, 3.0])
    kontext.transformer.register_forward_pre_hook(
        lambda _model, args, kwargs: (args, {"img_shapes": held} | kwargs), with_kwargs=True
    )
    with Recorder(kontext) as recorder:
        edit(kontext)
    held[0] = 5.0
    (stage,) = recorder.rollout(group=[0]).conditioning[0].stages
    assert stage.calls[0].arguments["img_shapes"].tolist() == [1.0, 2.0, 3.0]
    calls = []

    def change(_model, args, kwargs):
        calls.append(1)
        held[0] = len(calls)
        return args, {"img_shapes": held} | kwargs

    kontext.transformer.register_forward_pre_hook(change, with_kwargs=True)
    with pytest.raises(ReplayError, match="img_shapes changes over the steps"):
        record(kontext)


def test_a_zero_velocity_is_no_fault(kontext):
    with torch.no_grad():
        kontext.transformer.proj_out.weight.zero_()
        kontext.transformer.proj_out.bias.zero_()
    record(kontext)


def test_a_proof_that_the_transformer_breaks_off_is_told(kontext):
    class Picky(FluxTransformer2DModel):
        def forward(self, *args, **kwargs):
            if len(kwargs["hidden_states"]) != 1:
                raise RuntimeError("one image only")
            return super().forward(*args, **kwargs)

    kontext.transformer.__class__ = Picky
    with pytest.raises(ReplayError, match="raised RuntimeError: one image only: look for"):
        record(kontext)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refuses_dropout(pipeline, dtype):
    pipeline.to(dtype)
    adapters = LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v"], lora_dropout=1e-3)
    policies = LoraPolicies(pipeline.transformer, adapters)
    with torch.no_grad():
        for weight in policies.parameters():
            weight.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    pipeline.transformer.train()
    with pytest.raises(ReplayError, match=r"got .*lora_dropout.* \(Dropout\).*model\.eval"):
        record(pipeline)
    pipeline.transformer.eval()
    record(pipeline)


# Wrong pipelines and wrong use.


def test_refuses_a_pipeline_without_a_flow_scheduler(pipeline):
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=r"use_flow_sigmas=True and .*, got .* DDIM"):
        Recorder(pipeline)


def test_refuses_to_replace_a_scheduler_with_a_solver_by_one_without(pipeline):
    pipeline.scheduler = FlowMatchSDEScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="solver: expected one"):
        Recorder(pipeline)
    before = pipeline.scheduler
    generators = trajectory_generators(0, 1)
    with Recorder(pipeline, FlowSDE(0.7), generators=generators) as recorder:
        edit(pipeline)
    assert pipeline.scheduler is before
    assert recorder.rollout(group=[0]).trajectory.stochastic.all()


def test_refuses_what_is_no_pipeline():
    with pytest.raises(ValueError, match="got str with NoneType"):
        Recorder("pipeline")


def test_refuses_a_pipeline_without_a_transformer(pipeline):
    pipeline.transformer = None
    with pytest.raises(ValueError, match="the pipeline has no transformer"):
        Recorder(pipeline)


def test_refuses_nested_recorders(pipeline):
    with Recorder(pipeline) as recorder:
        inner = Recorder(pipeline, ODE())
        with pytest.raises(ValueError, match="already being recorded"), inner:
            pass
        edit(pipeline)
    assert len(recorder.rollout(group=[0])) == 1
    assert_clean(pipeline)


def test_refuses_to_record_twice(pipeline):
    recorder = Recorder(pipeline)
    with recorder:
        edit(pipeline)
    with pytest.raises(ValueError, match="make a new one for each rollout"), recorder:
        pass
    assert_clean(pipeline)


def test_refuses_a_rollout_of_nothing(pipeline):
    recorder = Recorder(pipeline)
    with pytest.raises(ValueError, match="at least one recorded pipeline call"):
        recorder.rollout(group=[0])
    with recorder:
        pass
    with pytest.raises(ValueError, match="at least one recorded pipeline call"):
        recorder.rollout(group=[0])


def test_refuses_groups_that_are_not_one_per_trajectory(pipeline):
    with Recorder(pipeline) as recorder:
        edit(pipeline)
    with pytest.raises(ValueError, match="group: expected shape"):
        recorder.rollout(group=[0, 0])
    with pytest.raises(TypeError, match="group: expected integer"):
        recorder.rollout(group=[0.5])


def test_refuses_turns_of_different_shape(kontext):
    with Recorder(kontext) as recorder:
        edit(kontext)
        edit(kontext, steps=STEPS + 1)
    with pytest.raises(ValueError, match=r"turns: expected latents .* of one shape"):
        recorder.rollout(group=[0])


def test_refuses_too_few_generators(kontext):
    recorder = Recorder(kontext, FlowSDE(0.7), generators=trajectory_generators(0, 2))
    with pytest.raises(ValueError, match=r"one torch\.Generator per trajectory, 1 for"), recorder:
        edit(kontext)


# Cleaning up.


def assert_clean(pipeline):
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    assert not pipeline.transformer._forward_hooks
    assert not pipeline.transformer._forward_hooks_with_kwargs


def test_leaves_the_pipeline_as_it_was(pipeline):
    scheduler, config = pipeline.scheduler, dict(pipeline.config)
    scheduler.set_shift(2.0)
    state = {k: v for k, v in vars(scheduler).items() if not isinstance(v, torch.Tensor)}
    with Recorder(pipeline, FlowSDE(0.7), generators=trajectory_generators(0, 1)):
        assert isinstance(pipeline.scheduler, FlowMatchSDEScheduler)
        assert pipeline.scheduler.shift == 2.0
        edit(pipeline)
    assert pipeline.scheduler is scheduler
    assert dict(pipeline.config) == config
    after = {k: v for k, v in vars(scheduler).items() if not isinstance(v, torch.Tensor)}
    assert after == state
    assert_clean(pipeline)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_cleans_up_after_an_interruption(pipeline, error):
    def stop(*_):
        raise error("stop")

    recorder = Recorder(pipeline)
    with pytest.raises(error, match="stop"), recorder:
        edit(pipeline, callback_on_step_end=stop)
    assert_clean(pipeline)
    with pytest.raises(ValueError, match="recording failed: stop"):
        recorder.rollout(group=[0])
    roll_out(pipeline, turns=1, batch=1)


def test_notices_a_turn_that_was_stopped_halfway(pipeline):
    def stop(pipe, step, _timestep, given):
        pipe._interrupt = step == 1
        return given

    recorder = Recorder(pipeline)
    with pytest.raises(ReplayError, match=f"turn 0 ended after 2 of {STEPS} steps"), recorder:
        edit(pipeline, callback_on_step_end=stop)
    assert_clean(pipeline)
    with pytest.raises(ReplayError, match="only whole turns"):
        recorder.rollout(group=[0])


def test_calls_of_the_transformer_outside_the_loop_do_not_matter(pipeline):
    seen = []
    handle = pipeline.transformer.register_forward_hook(
        lambda _model, _args, kwargs, _output: seen.append(kwargs), with_kwargs=True
    )
    edit(pipeline)
    handle.remove()
    with Recorder(pipeline) as recorder:
        pipeline.transformer(**seen[0])
        pipeline.scheduler.set_timesteps(2)
        edit(pipeline)
        pipeline.transformer(**seen[0])
    assert recorder.rollout(group=[0]).trajectory.turn_mask.shape == (1, 1)


# Recognition, on tensors alone.


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_clock_is_found_again(clock, dtype):
    timesteps = torch.linspace(1000, 17.7, 40)
    times = clock(timesteps, dtype)[:, None].expand(-1, 3)
    found = find_time("t", times, timesteps, 3)
    assert torch.equal(found.argument(timesteps), times[:, 0])


def test_time_is_found_by_value():
    timestep = torch.tensor(873.0)
    arguments = {"u": torch.full((2,), 0.873), "scale": torch.tensor([3.5, 3.5]), "flag": True}
    assert find_times(arguments, timestep) == ["u"]
    assert find_times(arguments | {"v": torch.tensor(0.873)}, timestep) == ["u", "v"]
    tokens = {"timestep": torch.full((2, 5), 873.0), "mask": torch.full((2, 5), 0.873)}
    assert find_times(tokens, timestep) == ["timestep"]
    tokens["timestep"][:, 0] = 0
    with pytest.raises(ReplayError, match="none of"):
        find_times(tokens, timestep)


def held(**times):
    """A call, by what its possible times held at each step."""
    return CallPattern(None, None, {}, None, {n: [*map(torch.tensor, x)] for n, x in times.items()})


def test_the_flow_time_is_what_moves():
    assert held(timestep=[1.0, 0.5], guidance=[1.0, 1.0]).time_names() == ["timestep"]
    assert held(timestep_r=[1.0, 0.5], timestep=[1.0, 0.5]).time_names() == [
        "timestep_r",
        "timestep",
    ]
    assert held(u=[1.0, 0.5]).time_names() == ["u"]
    assert held(timestep=[1.0], guidance=[1.0]).time_names() == ["timestep"]
    assert held(u=[1.0]).time_names() == ["u"]
    for unclear in (held(u=[1.0, 1.0]), held(u=[1.0], v=[1.0])):
        with pytest.raises(ReplayError, match="holds the flow time is unclear among"):
            unclear.time_names()


def test_sample_must_be_held_once():
    sample = torch.randn(2, 3, 4)
    twice = {"a": sample, "b": torch.cat([sample, sample], dim=1), "c": torch.zeros(2, 3, 4)}
    with pytest.raises(ReplayError, match="several do: `a` is it; `b` begins with it on"):
        find_sample(twice, sample)


# Missing extras.


@pytest.mark.parametrize("missing", ["diffusers", "peft"])
def test_names_the_extra_that_is_missing(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "mteditflow.pipelines")
    message = rf"needs {missing}: pip install 'mteditflow\[diffusers\]'"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("mteditflow.pipelines")
