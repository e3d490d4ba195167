"""Who samples: the pipeline's own scheduler, a user's subclass, another solver, a cache."""

import copy

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    UniPCMultistepScheduler,
)
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from PIL import Image
from tiny import picture
from tiny_pipelines import FAMILIES
from tiny_pipelines.checks import Case, replay

from mteditflow import FlowSDE, trajectory_generators
from mteditflow.pipelines import FlowMatchSDEScheduler, Recorder, ReplayError
from tests.loops import some

STEPS = 4


@pytest.fixture
def flux():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES["FluxPipeline"].build()


def options(batch=2, steps=STEPS, **more):
    """Of a call that returns latents."""
    given = {"prompt": ["Remove the square", "Add a red star"][:batch], "height": 8, "width": 8}
    given |= {"num_inference_steps": steps, "output_type": "latent", "max_sequence_length": 16}
    return given | {"generator": trajectory_generators(0, batch)} | more


def record(pipeline, solver=None, *, recording=None, **given):
    """A call's latents, and its rollout."""
    call = options(**given)
    with Recorder(pipeline, solver, generators=call["generator"], **(recording or {})) as recorder:
        latents = pipeline(**call)[0]
    return latents, recorder.rollout(group=list(range(len(latents))))


def largest_deviation(rollout, model, solver):
    """Of log-probs of all steps, from the stored ones."""
    rows = rollout.trajectory.step_mask.nonzero(as_tuple=True)
    with torch.no_grad():
        replayed = replay(rollout, model, solver, rows)
    return (replayed - rollout.trajectory.log_prob[rows]).abs().max().item()


# What happens after the last step.


def halving(steps, in_place=False):
    """A callback that halves the latents after the last step."""

    def halve(_pipeline, step, _timestep, given):
        x = given["latents"]
        if step == steps - 1:
            return {"latents": x.mul_(0.5) if in_place else x * 0.5}
        return {}

    return halve


@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("output", ["latent", "pt"])
def test_latents_changed_after_the_last_step_are_refused_under_a_solver(
    flux, steps, in_place, output
):
    callback = halving(steps, in_place)
    message = "latents changed in place" if in_place else "latents changed after the last step"
    with pytest.raises(ReplayError, match=message):
        record(flux, FlowSDE(0.7), steps=steps, output_type=output, callback_on_step_end=callback)
    assert type(flux.scheduler) is FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize("in_place", [False, True])
def test_without_a_solver_the_clean_latents_are_those_that_are_returned(flux, steps, in_place):
    first = record(flux, steps=steps)[1].trajectory
    latents, rollout = record(flux, steps=steps, callback_on_step_end=halving(steps, in_place))
    trajectory = rollout.trajectory
    assert trajectory.latents.shape[1:3] == (1, 2)
    assert torch.equal(trajectory.clean[:, 0], latents)
    assert torch.equal(trajectory.clean, 0.5 * first.clean)
    assert torch.equal(trajectory.latents[:, :, 0], first.latents[:, :, 0])
    assert not trajectory.step_mask.any()


def test_turns_of_one_chain_have_the_same_steps(flux):
    """Where one turn has its ends alone, all have."""
    with Recorder(flux) as recorder:
        first = flux(**options())[0]
        second = flux(**options(), callback_on_step_end=halving(STEPS))[0]
    trajectory = recorder.rollout(group=[0, 1]).trajectory
    assert torch.equal(trajectory.clean, torch.stack([first, second], dim=1))
    assert trajectory.latents.shape[1:3] == (2, 2)
    assert trajectory.sigmas.tolist() == [[1.0, 0.0]] * 2


@pytest.mark.parametrize("steps", [1, STEPS])
def test_a_callback_that_looks_and_copies_is_none_of_our_business(flux, steps):
    seen = []

    class Keeper:
        def __call__(self, _pipeline, _step, _timestep, given):
            self.last = given["latents"]
            seen.append(self.last.clone())
            return {"latents": given["latents"].clone()}

    latents, rollout = record(flux, steps=steps, callback_on_step_end=Keeper())
    assert torch.equal(rollout.trajectory.clean[:, 0], latents)
    assert torch.equal(rollout.trajectory.latents[:, 0, 1:], torch.stack(seen, dim=1))


def test_what_a_callback_keeps_is_not_what_the_pipeline_goes_on_with(flux):
    class Halver:
        def __call__(self, _pipeline, _step, _timestep, given):
            self.last = given["latents"]
            return {"latents": given["latents"] * 0.5}

    latents, rollout = record(flux, steps=1, callback_on_step_end=Halver())
    assert torch.equal(rollout.trajectory.clean[:, 0], latents)


@pytest.mark.parametrize("steps", [1, STEPS])
def test_a_half_mask_is_painted_over_without_a_solver_alone(flux, steps):
    pipeline = FluxInpaintPipeline(**flux.components)
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 8))
    given = {"image": picture(pipeline), "mask_image": mask, "strength": 1.0, "steps": steps}
    with pytest.raises(ReplayError, match=r"changed .* as by a callback or a mask"):
        record(pipeline, FlowSDE(0.7), **given)
    latents, rollout = record(pipeline, **given)
    assert torch.equal(rollout.trajectory.clean[:, 0], latents)
    at = (torch.rand(2), torch.arange(2), torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        assert rollout.velocity(pipeline.transformer, latents, *at).isfinite().all()


def own_loop(pipeline, times, steps=2, held=lambda x: x):
    """A user's own loop over the pipeline's parts; ``times`` gives what it loops over."""
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _model, _args, given: seen.append(given), with_kwargs=True
    )
    pipeline(**options(steps=1))
    hook.remove()
    with Recorder(pipeline) as recorder:
        pipeline.scheduler.set_timesteps(steps, mu=1.0)
        x = seen[0]["hidden_states"]
        for t in times(pipeline.scheduler.timesteps):
            given = seen[0] | {"hidden_states": x, "timestep": t.expand(2) / 1000}
            x = held(pipeline.scheduler.step(pipeline.transformer(**given)[0], t, x)[0])
    return x, recorder.rollout(group=[0, 1])


def test_a_loop_of_ones_own_is_recorded(flux):
    x, rollout = own_loop(flux, lambda timesteps: timesteps)
    assert torch.equal(rollout.trajectory.clean[:, 0], x)


@pytest.mark.parametrize(
    "held", [torch.Tensor.double, torch.clone, lambda x: torch.cat([x, x + 1], dim=1)]
)
def test_the_last_latents_may_be_held_as_a_copy_or_a_part(flux, held):
    x, rollout = own_loop(flux, lambda timesteps: timesteps, steps=1, held=held)
    clean = rollout.trajectory.clean[:, 0]
    assert torch.equal(clean, x[:, : clean.shape[1]].float())


def test_methods_of_the_recorder_may_be_wrapped_by_others(flux, monkeypatch):
    """As by a profiler or a checker of types, whose frames lie between ours."""

    def wrapped(method):
        return lambda *args, **kwargs: method(*args, **kwargs)

    monkeypatch.setattr(Recorder, "ended", wrapped(Recorder.ended))
    monkeypatch.setattr(Recorder, "stepped", wrapped(Recorder.stepped))
    latents, rollout = record(flux, FlowSDE(0.7))
    assert torch.equal(rollout.trajectory.clean[:, 0], latents)


def test_a_step_in_a_function_of_its_own_is_not_looked_for_in_other_frames(flux):
    """Where the function has returned, a variable of the same name elsewhere is another tensor."""
    seen = []
    hook = flux.transformer.register_forward_pre_hook(
        lambda _model, _args, given: seen.append(given), with_kwargs=True
    )
    flux(**options(steps=1))
    hook.remove()

    def advance(x, t, halve):
        given = seen[0] | {"hidden_states": x, "timestep": t.expand(2) / 1000}
        step = flux.scheduler.step(flux.transformer(**given)[0], t, x)[0]
        return step * 0.5 if halve else step

    def loop(start, halve):
        states = [start]
        flux.scheduler.set_timesteps(1, mu=1.0)
        for t in flux.scheduler.timesteps:
            y = advance(states[-1], t, halve)
        return y

    x = torch.randn(seen[0]["hidden_states"].shape)
    with Recorder(flux) as recorder:
        y = loop(x.clone(), halve=False)
    assert torch.equal(recorder.rollout(group=[0, 1]).trajectory.clean[:, 0], y)
    with pytest.raises(ReplayError, match="does not hold the result of its last"), Recorder(flux):
        loop(x + 1, halve=True)


def test_a_loop_whose_end_is_not_seen_is_refused(flux):
    with pytest.raises(ReplayError, match=r"was not observed.*for t in scheduler\.timesteps"):
        own_loop(flux, lambda timesteps: [timesteps[i] for i in range(2)])


def test_a_look_at_the_timesteps_in_a_callback_is_not_the_end_of_the_loop(flux):
    def look_and_halve(pipeline, step, t, given):
        last = list(pipeline.scheduler.timesteps).index(t) == STEPS - 1
        return {"latents": given["latents"] * 0.5} if last else {}

    latents, rollout = record(flux, callback_on_step_end=look_and_halve)
    assert torch.equal(rollout.trajectory.clean[:, 0], latents)
    with pytest.raises(ReplayError, match="changed after the last step"):
        record(flux, FlowSDE(0.7), callback_on_step_end=look_and_halve)


def test_a_change_in_place_under_inference_mode_is_seen(flux):
    def shrink(_pipeline, step, _timestep, given):
        if step == 0:
            given["latents"].mul_(0.9)
        return {}

    with torch.inference_mode(), pytest.raises(ReplayError, match="latents changed"):
        record(flux, FlowSDE(0.7), callback_on_step_end=shrink)


def test_a_scheduler_replaced_while_it_records_is_refused(flux):
    recorder = Recorder(flux)

    def calls():
        with recorder:
            flux(**options())
            flux.scheduler = FlowMatchEulerDiscreteScheduler()
            flux(**options())

    with pytest.raises(ReplayError, match=r"pipeline\.scheduler was replaced"):
        calls()
    with pytest.raises(ValueError, match="recording failed: pipeline"):
        recorder.rollout(group=[0, 1])


# The pipeline's own scheduler, as it is.


def test_the_scheduler_is_that_of_the_moment_of_entering(flux):
    recorder = Recorder(flux)
    flux.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    plain = flux(**options())[0]
    with recorder:
        recorded = flux(**options())[0]
    assert torch.equal(recorded, plain)


class Named(FlowMatchEulerDiscreteScheduler):
    """A user's subclass with a name that the recorder's scheduler has too."""

    reduction = "none"


def test_names_that_would_be_overwritten_are_refused(flux):
    flux.scheduler = Named()
    with pytest.raises(ValueError, match=r"a Named without the names \['reduction'\]"):
        Recorder(flux)


class OwnSDE(FlowMatchSDEScheduler):
    """A user's subclass of the library's scheduler."""


def test_a_subclass_of_the_librarys_scheduler_is_taken(flux):
    flux.scheduler = OwnSDE.from_config(flux.scheduler.config)
    solver = FlowSDE(0.7)
    assert largest_deviation(record(flux, solver)[1], flux.transformer, solver) < 1e-6


@pytest.mark.parametrize("steps", [[True, False], [0.5]])
def test_stochastic_steps_are_indices(flux, steps):
    with pytest.raises(TypeError, match="stochastic_steps: expected indices of steps, got"):
        Recorder(flux, FlowSDE(0.7), stochastic_steps=steps)


def test_stochastic_steps_and_generators_may_be_iterators(flux):
    expected = record(flux, FlowSDE(0.7), recording={"stochastic_steps": [1]})[1]
    call = options()
    iterators = {"stochastic_steps": iter([1]), "generators": iter(call["generator"])}
    with Recorder(flux, FlowSDE(0.7), **iterators) as recorder:
        flux(**call)
    got = recorder.rollout(group=[0, 1])
    assert got.trajectory.stochastic[0].tolist() == [False, True, False, False]
    assert torch.equal(got.trajectory.latents, expected.trajectory.latents)


class Stretched(FlowMatchEulerDiscreteScheduler):
    """A user's subclass with another grid, and an attribute of its own."""

    power: float = 1.0

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        super().set_timesteps(num_inference_steps, device, sigmas, mu)
        self.sigmas = self.sigmas**self.power
        self.timesteps = self.sigmas[:-1] * 1000


class Doubled(FlowMatchEulerDiscreteScheduler):
    """A user's subclass that steps twice as far."""

    def step(self, model_output, *args, **kwargs):
        return super().step(2 * model_output, *args, **kwargs)


class Empty(FlowMatchEulerDiscreteScheduler):
    """A user's subclass that changes nothing."""


@pytest.mark.parametrize("kind", [Stretched, Doubled, Empty])
def test_a_users_subclass_samples_as_it_does_without_the_recorder(flux, kind):
    flux.scheduler = kind.from_config(flux.scheduler.config)
    flux.scheduler.power = 2.0
    flux.scheduler.set_shift(2.5)
    plain = flux(**options())[0]
    own = flux.scheduler
    recorded, rollout = record(flux)
    assert flux.scheduler is own
    assert torch.equal(recorded, plain)
    assert torch.equal(rollout.trajectory.clean[:, 0], plain)


def test_a_users_grid_takes_sde_steps_and_a_users_step_does_not(flux):
    solver = FlowSDE(0.7)
    flux.scheduler = Stretched.from_config(flux.scheduler.config)
    flux.scheduler.power = 2.0
    rollout = record(flux, solver)[1]
    flux(**options())
    torch.testing.assert_close(rollout.trajectory.sigmas[0], flux.scheduler.sigmas)
    assert largest_deviation(rollout, flux.transformer, solver) < 1e-6
    flux.scheduler = Doubled.from_config(flux.scheduler.config)
    with pytest.raises(ValueError, match=r"solver: expected None, because Doubled has a `step`"):
        Recorder(flux, solver)


def test_it_begins_within_the_grid_at_a_strength_below_one(flux):
    pipeline, solver = FluxImg2ImgPipeline(**flux.components), FlowSDE(0.7)
    given = {"image": picture(pipeline), "strength": 0.5}
    plain = pipeline(**options(**given))[0]
    recorded, rollout = record(pipeline, **given)
    assert torch.equal(recorded, plain)
    assert rollout.trajectory.latents.shape[2] == 3  # two of four steps are taken
    stochastic = {"stochastic_steps": [1]}
    rollout = record(pipeline, solver, recording=stochastic, **given)[1]
    assert rollout.trajectory.stochastic.tolist() == [[False, True]]
    assert largest_deviation(rollout, pipeline.transformer, solver) < 1e-6
    with pytest.raises(ValueError, match="stochastic_steps: expected indices of the 2 steps"):
        record(pipeline, solver, recording={"stochastic_steps": [2]}, **given)


def test_a_copy_of_the_scheduler_copies_no_pipeline(flux):
    generators = trajectory_generators(0, 1)
    with Recorder(flux, FlowSDE(0.7), generators=generators) as recorder:
        flux.scheduler.set_timesteps(2, mu=1.0)
        copied = copy.deepcopy(flux.scheduler)
        assert copied.observer is recorder
        assert copied.generators[0] is generators[0]
        assert copied.sigmas is not flux.scheduler.sigmas
        assert torch.equal(copied.sigmas, flux.scheduler.sigmas)
        assert type(copied) is type(flux.scheduler) is FlowMatchSDEScheduler


def test_a_second_sample_beside_the_first_is_refused(flux):
    """As LTX-2's sound: a copy of the scheduler takes its steps."""

    def sound(pipeline, _step, t, _given):
        other = copy.deepcopy(pipeline.scheduler)
        other.step(torch.zeros(2, 4), t, torch.zeros(2, 4))
        return {}

    with pytest.raises(ReplayError, match="without a call of the transformer: a second sample"):
        record(flux, callback_on_step_end=sound)


def test_a_grid_of_which_no_step_is_taken_is_no_turn(flux):
    with Recorder(flux) as recorder:
        flux(**options())
        flux.scheduler.set_timesteps(2, mu=1.0)
    assert recorder.rollout(group=[0, 1]).turn_mask.shape == (2, 1)


# Other samplers, whose final latents are all that NFT needs.

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
DYNAMIC = {"use_dynamic_shifting": True, "time_shift_type": "exponential"}
SAMPLERS = {
    "DPMSolver++": lambda: DPMSolverMultistepScheduler(**FLOW, **DYNAMIC, solver_order=2),
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW, **DYNAMIC),
    "Heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
@pytest.mark.parametrize(
    ("name", "family", "guided"),
    [
        ("DPMSolver++", "FluxPipeline", {}),
        ("DPMSolver++", "FluxPipeline", {"negative_prompt": ["", ""], "true_cfg_scale": 2.0}),
        ("UniPC", "FluxPipeline", {}),
        ("Heun", "StableDiffusion3Pipeline", {"guidance_scale": 2.0}),
    ],
)
def test_any_flow_sampler_gives_clean_latents_and_conditioning(name, family, guided):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flux = FAMILIES[family].build()
    flux.scheduler = own = SAMPLERS[name]()
    plain = flux(**options(**guided))[0]
    recorded, rollout = record(flux, **guided)
    assert flux.scheduler is own
    assert torch.equal(recorded, plain)
    trajectory = rollout.trajectory
    assert torch.equal(trajectory.clean[:, 0], plain)
    assert trajectory.latents.shape[1:3] == (1, 2)
    assert trajectory.sigmas[0, 1] == 0
    assert not trajectory.step_mask.any()
    with pytest.raises(ValueError, match=r"has a `step` of its own"):
        Recorder(flux, FlowSDE(0.7))

    flux.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler = record(flux, **guided)[1]
    both, turn = torch.arange(2), torch.zeros(2, dtype=torch.int64)
    at = (trajectory.clean[:, 0], torch.tensor([0.35, 0.8]), both, turn)
    with torch.no_grad():
        velocities = [x.velocity(flux.transformer, *at) for x in (rollout, euler)]
    assert torch.equal(*velocities)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        # Loops over the rest of the timesteps, and sets no begin index.
        ("WanVideoToVideoPipeline", lambda: UniPCMultistepScheduler(**FLOW, flow_shift=3.0)),
        ("StableDiffusion3Img2ImgPipeline", SAMPLERS["Heun"]),
    ],
)
def test_another_sampler_begins_within_the_grid_at_a_strength_below_one(name, scheduler):
    case = Case(FAMILIES[name], "none")
    case.pipeline.scheduler = scheduler()
    plain = case.call(0, 1, trajectory_generators(0, 1), "latent")
    with Recorder(case.pipeline) as recorder:
        recorded = case.call(0, 1, trajectory_generators(0, 1), "latent")
    trajectory = recorder.rollout(group=[0]).trajectory
    assert torch.equal(recorded, plain)
    assert torch.equal(trajectory.clean[:, 0], plain)
    assert 0.4 < trajectory.sigmas[0, 0] < 0.9


def test_a_cache_samples_without_a_solver_alone(flux):
    """What it samples is trained on without it; its steps have no density."""
    plain = record(flux)[1]
    flux.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    recorder = Recorder(flux, FlowSDE(0.7), generators=trajectory_generators(0, 2))
    message = (
        "^solver: expected None, because the model has an enabled cache, whose outputs depend on"
    )
    with pytest.raises(ValueError, match=message), recorder:
        pass
    cached, rollout = record(flux)
    trajectory = rollout.trajectory
    assert not torch.equal(trajectory.clean, plain.trajectory.clean)
    assert torch.equal(trajectory.clean[:, 0], cached)
    assert not trajectory.step_mask.any()
    both, turn = torch.arange(2), torch.zeros(2, dtype=torch.int64)
    at = (trajectory.clean[:, 0], torch.tensor([0.35, 0.8]), both, turn)
    with pytest.raises(ValueError, match=r"model: expected one without .* call disable_cache"):
        rollout.velocity(flux.transformer, *at)
    flux.transformer.disable_cache()
    with torch.no_grad():
        velocities = [x.velocity(flux.transformer, *at) for x in (rollout, plain)]
    assert torch.equal(*velocities)


@pytest.mark.parametrize("steps", [3, 4])
def test_a_cache_without_contexts_starts_anew_in_the_proof(flux, steps):
    """Pyramid attention broadcast keeps rows of the last batch, whose size the proof's is not."""
    flux.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 950),
            current_timestep_callback=lambda: flux._current_timestep,
        )
    )
    plain = flux(**options(num_inference_steps=steps)).images
    with Recorder(flux) as recorder:
        recorded = flux(**options(num_inference_steps=steps)).images
    assert torch.equal(plain, recorded)
    assert torch.equal(recorder.rollout(group=[0, 1]).trajectory.clean[:, 0], recorded)


# Groups.


def test_members_of_a_group_share_what_the_first_turn_is_conditioned_on(flux):
    call = options(prompt=["Remove the square", "Remove the square"])
    with Recorder(flux) as recorder:
        flux(**call)
        flux(**options())
    assert recorder.rollout(group=[0, 0]).turn_mask.all()
    with Recorder(flux) as recorder:
        flux(**options())
    with pytest.raises(ValueError, match=r"group: .* trajectories 0 and 1 of group 7 differ in"):
        recorder.rollout(group=[7, 7])


def test_prompts_that_meet_other_images_are_found(flux):
    """Kontext repeats images by turns and prompts one by one."""
    kontext = FAMILIES["FluxKontextPipeline"].build()
    family = FAMILIES["FluxKontextPipeline"]
    images = [picture(kontext, seed) for seed in (0, 1)]
    given = family.inputs(0, 2) | family.options | {"image": images, "output_type": "latent"}
    with Recorder(kontext) as recorder:
        kontext(**given, num_inference_steps=1, num_images_per_prompt=2)
    assert len(some(recorder.rollout(group=[0, 1, 2, 3]).group)) == 4
    with pytest.raises(ValueError, match="order prompts and images differently"):
        recorder.rollout(group=[0, 0, 1, 1])
