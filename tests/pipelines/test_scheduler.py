"""FlowMatchSDEScheduler: a drop-in for the stock scheduler, with steps that can be replayed."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHAIN, call, picture

from mteditflow import (
    CPS,
    ODE,
    DanceSDE,
    FlowSDE,
    batched_noise,
    gaussian_log_prob,
    rollout,
    trajectory_generators,
)
from mteditflow.pipelines import FlowMatchSDEScheduler
from tests.loops import some

SOLVERS = [FlowSDE(0.7), DanceSDE(0.3), CPS(0.6)]
CONFIGS = [
    {},
    {"shift": 3.0},
    {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.0},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"shift_terminal": 0.1},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
]


def make(config=None, **given):
    stock = FlowMatchEulerDiscreteScheduler(**(config or {}))
    return FlowMatchSDEScheduler.from_config(stock.config, **given)


def run(scheduler, x, steps=4, mu=0.7, velocity=torch.sin):
    """The denoising loop of every pipeline."""
    scheduler.set_timesteps(steps, mu=mu)
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x), timestep, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ode_is_the_stock_scheduler_bit_for_bit(config, dtype):
    x = torch.randn(2, 5, 3).to(dtype)
    stock = FlowMatchEulerDiscreteScheduler(**config)
    ours = make(config)
    assert torch.equal(run(ours, x), run(stock, x))
    assert torch.equal(ours.sigmas, stock.sigmas)
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert not any(step.stochastic for step in some(ours.steps))
    assert all((step.log_prob == 0).all() for step in some(ours.steps))


def test_a_pipeline_takes_it_in_place_of_its_own(pipeline):
    def image():
        generators = trajectory_generators(0, 1)
        return call(pipeline, [picture(pipeline)], [CHAIN[0][0]], generators)[0]

    before = image()
    pipeline.scheduler = FlowMatchSDEScheduler.from_config(pipeline.scheduler.config)
    assert image().tobytes() == before.tobytes()
    generators = trajectory_generators(0, 1)
    pipeline.scheduler.sample_with(FlowSDE(0.7), generators=generators)
    assert image().tobytes() != before.tobytes()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_config_stays_that_of_the_stock_scheduler(config, tmp_path):
    stock = FlowMatchEulerDiscreteScheduler(**config)
    ours = FlowMatchSDEScheduler.from_config(stock.config, solver=FlowSDE(0.7))
    back = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    public = {k: v for k, v in stock.config.items() if not k.startswith("_")}
    assert {k: v for k, v in back.config.items() if not k.startswith("_")} == public
    ours.save_pretrained(tmp_path)
    again = FlowMatchSDEScheduler.from_pretrained(tmp_path, solver=CPS(0.5), reduction="sum")
    assert {k: v for k, v in again.config.items() if not k.startswith("_")} == public
    assert (again.solver, again.reduction) == (CPS(0.5), "sum")
    unused = FlowMatchSDEScheduler.from_config(stock.config, return_unused_kwargs=True, nothing=1)
    assert unused[1] == {"nothing": 1}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps_are_those_of_the_core_sampler(solver, reduction):
    generators = trajectory_generators(5, 3)
    noise = batched_noise((4, 2), trajectory_generators(0, 3))
    scheduler = make(solver=solver, generators=trajectory_generators(5, 3), reduction=reduction)
    run(scheduler, noise)
    expected = rollout(
        lambda x, sigma, **_: torch.sin(x),
        noise[:, None],
        scheduler.sigmas,
        solver=solver,
        generators=generators,
        reduction=reduction,
    )
    for index, step in some(enumerate(scheduler.steps)):
        assert torch.equal(step.x_t, expected.latents[:, 0, index])
        assert torch.equal(step.next_x, expected.latents[:, 0, index + 1])
        assert torch.equal(step.log_prob, expected.log_prob[:, 0, index])
        assert torch.equal(step.sigma, expected.sigmas[0, index].expand(3))
        assert torch.equal(step.next_sigma, expected.sigmas[0, index + 1].expand(3))
        assert step.stochastic == bool(expected.stochastic[0, index])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_prob_is_the_density_of_the_value_that_goes_on(solver, dtype):
    scheduler = make(solver=solver, generators=trajectory_generators(0, 2), reduction="sum")
    x = torch.randn(2, 6).to(dtype)
    run(scheduler, x)
    for index, step in some(enumerate(scheduler.steps[:-1])):
        assert step.next_x is scheduler.steps[index + 1].x_t
        assert step.next_x.dtype == dtype
        assert step.log_prob.dtype == torch.float32
        velocity = torch.sin(step.x_t)
        mean, std = solver(step.x_t, velocity, step.sigma, step.next_sigma)
        normal = torch.distributions.Normal(mean.double(), std.double())
        expected = normal.log_prob(step.next_x.double()).sum(dim=1)
        torch.testing.assert_close(step.log_prob.double(), expected, rtol=1e-5, atol=1e-5)


@given(members=st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
def test_batching_does_not_change_a_trajectory(members):
    def sample(of):
        x = batched_noise((3, 2), [trajectory_generators(b, 1)[0] for b in of])
        generators = [trajectory_generators(100 + b, 1)[0] for b in of]
        scheduler = make(solver=FlowSDE(0.7), generators=generators)
        return run(scheduler, x), torch.stack([step.log_prob for step in scheduler.steps])

    everyone, all_log_probs = sample(range(5))
    some, log_probs = sample(members)
    torch.testing.assert_close(some, everyone[members], rtol=0, atol=1e-6)
    torch.testing.assert_close(log_probs, all_log_probs[:, members], rtol=0, atol=1e-6)


def test_outside_the_window_steps_are_stock_and_draw_nothing():
    generators = trajectory_generators(0, 2)
    scheduler = make(solver=DanceSDE(0.5), generators=generators, stochastic_steps=range(1, 3))
    x = torch.randn(2, 4)
    run(scheduler, x)
    assert [step.stochastic for step in scheduler.steps] == [False, True, True, False]
    stock = FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(4)
    for index in (0, 3):
        step = scheduler.steps[index]
        stock._step_index = index
        same = stock.step(torch.sin(step.x_t), stock.timesteps[index], step.x_t).prev_sample
        assert torch.equal(step.next_x, same)
        assert (step.log_prob == 0).all()
    reference = trajectory_generators(0, 2)
    for _ in range(2):
        batched_noise((4,), reference)
    for ours, theirs in some(zip(generators, reference, strict=True)):
        assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("solver", [FlowSDE(0.0), DanceSDE(0.0), CPS(0.0), ODE()])
def test_without_noise_it_is_the_stock_scheduler_and_needs_no_generators(solver):
    x = torch.randn(2, 4)
    assert torch.equal(run(make(solver=solver), x), run(FlowMatchEulerDiscreteScheduler(), x))


def test_the_last_cps_step_is_deterministic_because_its_std_is_zero():
    scheduler = make(solver=CPS(0.5), generators=trajectory_generators(0, 1))
    run(scheduler, torch.randn(1, 4))
    assert [step.stochastic for step in scheduler.steps] == [True, True, True, False]


def test_a_new_grid_forgets_the_steps_of_the_last_call():
    scheduler = make()
    run(scheduler, torch.randn(1, 4))
    assert len(scheduler.steps) == 4
    run(scheduler, torch.randn(1, 4), steps=2)
    assert len(scheduler.steps) == 2


def test_returns_the_output_class_by_default():
    scheduler = make()
    scheduler.set_timesteps(2)
    x = torch.randn(1, 4)
    output = scheduler.step(x, scheduler.timesteps[0], x)
    assert torch.equal(output.prev_sample, scheduler.steps[0].next_x)


def test_replay_of_a_stored_step_gives_its_log_prob():
    solver = FlowSDE(0.7)
    scheduler = make(solver=solver, generators=trajectory_generators(0, 2))
    run(scheduler, torch.randn(2, 4))
    for x_t, next_x, sigma, next_sigma, log_prob, _ in some(scheduler.steps):
        transition = solver(x_t, torch.sin(x_t), sigma, next_sigma)
        assert torch.equal(gaussian_log_prob(next_x, *transition, reduction="mean"), log_prob)


@pytest.mark.parametrize("other", [DDIMScheduler, FlowMatchHeunDiscreteScheduler])
def test_refuses_the_config_of_another_scheduler(other, tmp_path):
    other().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"that of a {other.__name__}"):
        FlowMatchSDEScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchSDEScheduler])
def test_takes_the_saved_config_of_either_scheduler(kind, tmp_path):
    kind(shift=2.5).save_pretrained(tmp_path)
    assert FlowMatchSDEScheduler.from_pretrained(tmp_path).config.shift == 2.5


def test_refuses_a_nameless_config_with_foreign_keys():
    with pytest.raises(ValueError, match="that of a scheduler with beta_end, beta_schedule"):
        FlowMatchSDEScheduler.from_config(DDIMScheduler().config)


def test_refuses_a_config_whose_steps_are_not_a_solvers():
    with pytest.raises(ValueError, match="config: expected stochastic_sampling=False"):
        make({"stochastic_sampling": True}).set_timesteps(2)


def test_sigmas_that_count_from_data_are_the_same_flow():
    """Mochi's: its velocity points from noise to data."""
    x, config = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), {"shift": 2.0}
    stock = FlowMatchEulerDiscreteScheduler(**config, invert_sigmas=True)
    made = make(config | {"invert_sigmas": True})
    assert torch.equal(run(made, x), run(stock, x))
    paths = []
    for inverted, sign in ((False, 1), (True, -1)):
        generators = trajectory_generators(0, 2)
        scheduler = make(
            config | {"invert_sigmas": inverted}, solver=FlowSDE(0.7), generators=generators
        )
        run(scheduler, x, velocity=lambda x, sign=sign: sign * torch.sin(x))
        paths.append(torch.stack([step.next_x for step in scheduler.steps]))
        assert round(scheduler.steps[0].sigma[0].item(), 6) == 1.0
        assert scheduler.steps[-1].next_sigma.tolist() == [0.0, 0.0]
    torch.testing.assert_close(*paths)


def test_times_per_token_are_taken_where_they_are_the_samples():
    x = torch.randn(1, 4, 3)
    plain, tokens = make(), make()
    for scheduler in (plain, tokens):
        scheduler.set_timesteps(2)
    first = plain.step(x, plain.timesteps[0], x)
    timestep = tokens.timesteps[0]
    same = tokens.step(-x, timestep, x, per_token_timesteps=timestep.expand(1, 4))
    torch.testing.assert_close(same.prev_sample, first.prev_sample)
    with pytest.raises(ValueError, match="per_token_timesteps: expected them to equal"):
        tokens.step(x, timestep, x, per_token_timesteps=torch.zeros(1, 4))


def test_the_pipelines_generator_is_taken_and_not_used():
    x = torch.zeros(1, 4)
    taken = torch.Generator().manual_seed(3)
    before, ends = taken.get_state(), []
    for more in ({}, {"generator": taken}):
        scheduler = make(solver=FlowSDE(0.7), generators=trajectory_generators(0, 1))
        scheduler.set_timesteps(2)
        ends.append(scheduler.step(x, scheduler.timesteps[0], x, **more).prev_sample)
    assert torch.equal(*ends)
    assert torch.equal(taken.get_state(), before)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("s_churn", 1.0, "s_churn: expected its default 0.0, because"),
        ("s_tmin", 0.1, "s_tmin: expected its default"),
        ("s_tmax", 1.0, "s_tmax: expected its default inf"),
        ("s_noise", 1.1, "s_noise: expected its default"),
    ],
)
def test_refuses_options_it_would_ignore(option, value, message):
    scheduler = make()
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=message):
        scheduler.step(x, scheduler.timesteps[0], x, **{option: value})
    assert scheduler.steps == ()


@pytest.mark.parametrize(("count", "got"), [(None, None), (1, 1), (3, 3)])
def test_refuses_another_number_of_generators_than_trajectories(count, got):
    generators = None if count is None else trajectory_generators(0, count)
    scheduler = make(solver=FlowSDE(0.7), generators=generators)
    with pytest.raises(ValueError, match=f"generators: .* 2 for this batch, got {got}"):
        run(scheduler, torch.zeros(2, 4))


def test_refuses_a_window_beyond_the_grid():
    with pytest.raises(ValueError, match=r"indices of the 4 steps, got \[3, 4\]"):
        run(make(solver=FlowSDE(0.7), stochastic_steps=range(3, 5)), torch.zeros(1, 2))


def test_refuses_a_step_without_a_grid():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="set_timesteps to have been called before"):
        make().step(x, 1000.0, x)


def test_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="reduction: expected one of"):
        make(reduction="median")


@pytest.mark.parametrize("sigmas", [[0.5, 1.0], [0.5, 0.5], [1.5, 0.5]])
def test_refuses_a_grid_that_does_not_fall(sigmas):
    with pytest.raises(ValueError, match="sigmas: expected a grid that falls"):
        make().set_timesteps(sigmas=sigmas)
