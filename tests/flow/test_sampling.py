"""Rolling a velocity function out: noise per trajectory, turns on turns, windows, hand loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mteditflow import (
    CPS,
    ODE,
    DanceSDE,
    FlowSDE,
    Transition,
    batched_noise,
    gaussian_log_prob,
    rollout,
    sliding_window,
    trajectory_generators,
    uniform_sigmas,
)
from tests.loops import some

SOLVERS = [ODE(), FlowSDE(0.7), DanceSDE(0.3), CPS(0.6)]
solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
seeds = st.integers(0, 2**31)
B, N, S, SHAPE = 3, 2, 4, (3, 6)


def velocity(x_t, sigma, *, reference, turn):
    """Something that depends on all its arguments, row by row."""
    s = sigma.to(x_t.dtype).reshape(-1, *(1,) * (x_t.ndim - 1))
    v = 0.5 * x_t * s + torch.sin(x_t).flip(-1) + 0.1 * turn
    return v if reference is None else v - 0.3 * reference


def roll(b=B, n=N, s=S, *, solver=SOLVERS[1], seed=0, dtype=torch.float32, shape=SHAPE, **options):
    noise = torch.stack(
        [batched_noise(shape, trajectory_generators(seed + 100 * k, b)) for k in range(n)], dim=1
    ).to(dtype)
    options = {
        "generators": trajectory_generators(seed + 5000, b), "reduction": "mean",
        "reference": batched_noise(shape, trajectory_generators(seed + 9000, b)), **options,
    }  # fmt: skip
    return rollout(velocity, noise, uniform_sigmas(s), solver=solver, **options)


# ----------------------------------------------------------------------------------------- noise


def test_generators():
    generators = trajectory_generators(7, 3)
    assert [g.initial_seed() for g in generators] == [7, 8, 9]
    assert all(g.device.type == "cpu" for g in some(generators))
    expected = torch.randn(4, generator=torch.Generator().manual_seed(8))
    assert torch.equal(torch.randn(4, generator=generators[1]), expected)
    assert trajectory_generators(0, 1)[0].initial_seed() == 0
    with pytest.raises(ValueError, match=r"^seed: expected an integer >= 0, got -1$"):
        trajectory_generators(-1, 2)
    with pytest.raises(ValueError, match=r"^count: expected an integer >= 1, got 0$"):
        trajectory_generators(0, 0)
    with pytest.raises(TypeError, match=r"^seed: expected an integer, got float$"):
        trajectory_generators(0.0, 2)
    with pytest.raises(TypeError, match=r"^count: expected an integer, got bool$"):
        trajectory_generators(0, True)


def test_noise_golden():
    noise = batched_noise((2, 3), trajectory_generators(7, 2))
    for k in range(2):
        expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(7 + k))
        assert torch.equal(noise[k], expected)
    assert noise.dtype == torch.float32


@given(seeds, st.integers(1, 5), st.lists(st.integers(1, 4), max_size=3))
def test_noise_laws(seed, b, shape):
    whole = batched_noise(shape, trajectory_generators(seed, b))
    assert whole.shape == (b, *shape)
    parts = [batched_noise(shape, trajectory_generators(seed + k, 1)) for k in range(b)]
    assert torch.equal(torch.cat(parts), whole)
    generators = trajectory_generators(seed, b)
    first, second = (batched_noise(shape, generators) for _ in range(2))  # they advance
    assert torch.equal(first, whole)
    assert bool((first != second).any())
    assert torch.equal(batched_noise(shape, trajectory_generators(seed, b)[::-1]), whole.flip(0))


def test_noise_is_standard_gaussian():
    noise = batched_noise((20_000,), trajectory_generators(0, 2))
    assert noise.mean().item() == pytest.approx(0, abs=4 / math.sqrt(40_000))
    assert noise.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / 40_000))
    assert (noise[0] * noise[1]).mean().item() == pytest.approx(0, abs=4 / math.sqrt(20_000))


def test_noise_options():
    generators = trajectory_generators(0, 2)
    assert batched_noise((2,), generators, dtype=torch.float64).dtype == torch.float64
    assert batched_noise((2,), generators, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert batched_noise((2,), generators, device="meta").device.type == "meta"
    assert batched_noise((2,), generators).device.type == "cpu"
    with pytest.raises(ValueError, match=r"^generators: expected at least one, got none$"):
        batched_noise((2,), [])


# --------------------------------------------------------------------------------------- rollout


def test_rollout_golden():
    """Two turns of two Euler steps, by hand: v = x halves, v = reference subtracts.

    Turn 0, v = x: 8 -> 8 - 8/2 = 4 -> 4 - 4/2 = 2. Turn 1, v = x + reference, reference 2, from
    4: 4 - 6/2 = 1 -> 1 - 3/2 = -1/2.
    """
    calls = []

    def double(x_t, sigma, *, reference, turn):
        calls.append((x_t.item(), sigma.tolist(), turn))
        return x_t if reference is None else x_t + reference

    trajectory = rollout(
        double, torch.tensor([[[8.0], [4.0]]]), torch.tensor([1.0, 0.5, 0.0]), solver=ODE(),
        generators=trajectory_generators(0, 1), reduction="mean",
    )  # fmt: skip
    assert trajectory.latents.tolist() == [[[[8.0], [4.0], [2.0]], [[4.0], [1.0], [-0.5]]]]
    assert calls == [(8.0, [1.0], 0), (4.0, [0.5], 0), (4.0, [1.0], 1), (1.0, [0.5], 1)]
    assert trajectory.sigmas.tolist() == [[1.0, 0.5, 0.0]] * 2
    assert trajectory.log_prob.tolist() == [[[0.0, 0.0], [0.0, 0.0]]]
    assert trajectory.stochastic.tolist() == [[False, False], [False, False]]
    assert trajectory.group.tolist() == [0]
    assert trajectory.turn_mask.tolist() == [[True, True]]
    assert trajectory.reduction == "mean"


@solvers
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rollout_is_its_loop(solver, reduction, dtype):
    """One trajectory at a time, one step at a time."""
    steps = {0, 2, 3}
    rolled = roll(solver=solver, reduction=reduction, dtype=dtype, stochastic_steps=steps)
    assert rolled.latents.dtype == dtype
    sigmas = uniform_sigmas(S)
    for b in some(range(B)):
        generator = torch.Generator().manual_seed(5000 + b)
        reference = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(9000 + b))[None]
        for n in some(range(N)):
            x = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(100 * n + b))
            x = x[None].to(dtype)
            for s in some(range(S)):
                assert torch.equal(rolled.latents[b, n, s], x[0])
                v = velocity(x, sigmas[s : s + 1], reference=reference, turn=n)
                used = solver if s in steps else ODE()
                mean, std = used(x, v, sigmas[s : s + 1], sigmas[s + 1 : s + 2])
                random = std.item() > 0
                assert rolled.stochastic[n, s].item() == random
                x = mean
                if random:
                    z = torch.randn(*SHAPE, generator=generator, dtype=mean.dtype)[None]
                    x = mean + std * z
                x = x.to(dtype)
                torch.testing.assert_close(rolled.latents[b, n, s + 1], x[0])
                x = rolled.latents[b : b + 1, n, s + 1]
                log_prob = gaussian_log_prob(x, mean, std, reduction=reduction)[0]
                assert torch.equal(rolled.log_prob[b, n, s], log_prob)
                assert random or log_prob == 0
            reference = x
    assert rolled.reduction == reduction


@solvers
@settings(max_examples=10)
@given(seed=seeds, cut=st.integers(1, 3))
def test_batching_does_not_change_a_trajectory(solver, seed, cut):
    whole = roll(4, solver=solver, seed=seed)
    for start, stop in ((0, cut), (cut, 4)):
        part = roll(stop - start, solver=solver, seed=seed + start)
        for name in ("latents", "log_prob"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[start:stop])
        assert torch.equal(part.stochastic, whole.stochastic)


@solvers
def test_replay_has_ratio_one(solver):
    """All steps of all trajectories and turns as one shuffled batch."""
    rolled = roll(5, 3, solver=solver)
    index = [i[torch.randperm(5 * 3 * S, generator=torch.Generator().manual_seed(0))]
             for i in torch.ones(5, 3, S).nonzero(as_tuple=True)]  # fmt: skip
    rows = rolled.steps(*index)
    given_reference = batched_noise(SHAPE, trajectory_generators(9000, 5))
    references = torch.cat([given_reference[:, None], rolled.clean[:, :-1]], dim=1)
    velocities = [
        velocity(rows.x_t[k : k + 1], rows.sigma[k : k + 1],
                 reference=references[b, n][None], turn=n)
        for k, (b, n) in enumerate(zip(index[0].tolist(), index[1].tolist(), strict=True))
    ]  # fmt: skip
    transition = solver(rows.x_t, torch.cat(velocities), rows.sigma, rows.next_sigma)
    log_prob = gaussian_log_prob(rows.next_x, *transition, reduction="mean")
    assert torch.equal((log_prob - rows.log_prob).exp(), torch.ones(5 * 3 * S))


@pytest.mark.parametrize("solver", [FlowSDE(0.0), DanceSDE(0.0), CPS(0.0)])
def test_noise_level_zero_is_the_ode_bit_for_bit(solver):
    still, ode = roll(solver=solver), roll(solver=ODE())
    assert torch.equal(still.latents, ode.latents)
    assert not still.stochastic.any()
    assert torch.equal(still.log_prob, torch.zeros(B, N, S))


def test_window():
    generators = trajectory_generators(5000, B)
    window = sliding_window(1, size=2, steps=S)
    rolled = roll(stochastic_steps=window, generators=generators)
    assert rolled.stochastic.tolist() == [[False, True, True, False]] * N
    assert bool((rolled.log_prob[:, :, [0, 3]] == 0).all())
    assert bool((rolled.log_prob[:, :, [1, 2]] != 0).all())
    # Deterministic steps draw nothing: two turns of two steps is what each generator gave.
    fresh = trajectory_generators(5000, B)
    for _ in range(4):
        batched_noise(SHAPE, fresh)
    for used, expected in some(zip(generators, fresh, strict=True)):
        assert torch.equal(used.get_state(), expected.get_state())
    ode = roll(solver=ODE())
    for none in ((), [], set(), range(0)):
        assert torch.equal(roll(stochastic_steps=none).latents, ode.latents)
    everything = roll(stochastic_steps=range(S))
    assert torch.equal(everything.latents, roll(stochastic_steps=None).latents)
    # The last step of CPS, to sigma 0, has no noise even where it is allowed.
    assert roll(solver=CPS(0.5)).stochastic.tolist() == [[True, True, True, False]] * N


def test_turns_are_given_the_clean_latent_of_the_turn_before():
    seen = {}

    def watch(x_t, sigma, *, reference, turn):
        seen.setdefault(turn, []).append(reference)
        return velocity(x_t, sigma, reference=reference, turn=turn)

    noise = batched_noise((3, *SHAPE), trajectory_generators(0, B))
    options = {"solver": FlowSDE(0.7), "reduction": "mean"}
    first = batched_noise((7,), trajectory_generators(50, B))[:, :6]
    for reference in (None, first[:, None]):  # the first may have its own shape
        seen.clear()
        rolled = rollout(
            watch, noise, uniform_sigmas(S), generators=trajectory_generators(9, B),
            reference=reference, **options,
        )  # fmt: skip
        assert sorted(seen) == [0, 1, 2]
        assert [len(seen[n]) for n in range(3)] == [S, S, S]
        assert all(r is reference for r in some(seen[0]))
        for n in (1, 2):
            assert all(torch.equal(r, rolled.clean[:, n - 1]) for r in some(seen[n]))
        assert torch.equal(rolled.latents[:, :, 0], noise)


def test_turns_alone_are_the_chain():
    """A chain is its turns, one by one, handed on by hand."""
    sigmas, noise = uniform_sigmas(S), batched_noise((3, *SHAPE), trajectory_generators(0, B))
    generators = trajectory_generators(9, B)

    def later(turn):
        return lambda x, s, *, reference, turn, k=turn: velocity(x, s, reference=reference, turn=k)

    options = {"solver": DanceSDE(0.4), "reduction": "sum"}
    chain = rollout(velocity, noise, sigmas, generators=trajectory_generators(9, B), **options)
    reference = None
    for n in range(3):
        turn = rollout(
            later(n), noise[:, n : n + 1], sigmas, generators=generators, reference=reference,
            **options,
        )  # fmt: skip
        assert torch.equal(turn.latents[:, 0], chain.latents[:, n])
        assert torch.equal(turn.log_prob[:, 0], chain.log_prob[:, n])
        reference = turn.clean[:, 0]


def test_a_gaussian_chain():
    """Each turn adds N(1, 1/4) to the one before: after n turns mean n and variance n / 4.

    The velocity of clean ~ N(reference + 1, 1/4), as in test_sde_marginals; the ODE carries the
    whole distribution, here of 20,000 elements, within 5 standard errors and its own bias.
    """

    def to_the_next(x_t, sigma, *, reference, turn):
        s, mean = sigma[:, None], reference + 1
        variance = (1 - s) ** 2 / 4 + s**2
        return -mean + (s - (1 - s) / 4) / variance * (x_t - (1 - s) * mean)

    noise = batched_noise((3, 10_000), trajectory_generators(0, 2))
    clean = rollout(
        to_the_next, noise, uniform_sigmas(200), solver=ODE(), reduction="mean",
        generators=trajectory_generators(0, 2), reference=torch.zeros(2, 10_000),
    ).clean  # fmt: skip
    for n in range(1, 4):
        x = clean[:, n - 1]
        standard_error = math.sqrt(n / 4 / 20_000)
        assert x.mean().item() == pytest.approx(n, abs=5 * standard_error)
        assert x.var().item() == pytest.approx(n / 4, rel=5 * math.sqrt(2 / 20_000) + 0.02)


def test_ragged_chains():
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    rolled = roll(n=3, turn_mask=mask, group=torch.tensor([5, 5, 9]))
    assert torch.equal(rolled.turn_mask, mask)
    assert rolled.group.tolist() == [5, 5, 9]
    assert torch.equal(rolled.latents, roll(n=3).latents)  # the mask does not steer
    assert torch.equal(rolled.step_mask, mask[:, :, None].expand(3, 3, S))

    def fails_later(x_t, sigma, *, reference, turn):
        v = velocity(x_t, sigma, reference=reference, turn=turn)
        v[1] = math.nan if turn > 0 else v[1]
        return v

    options = {"solver": ODE(), "generators": trajectory_generators(0, 3), "reduction": "mean"}
    noise = batched_noise((3, *SHAPE), trajectory_generators(0, 3))
    rolled = rollout(fails_later, noise, uniform_sigmas(S), turn_mask=mask, **options)
    assert rolled.latents[1, 1:].isnan().any()
    with pytest.raises(
        ValueError, match=r"^l.*: expected finite values in existing turns, got nan"
    ):
        rollout(fails_later, noise, uniform_sigmas(S), **options)


def test_nothing_has_a_gradient():
    weight = torch.ones(1, requires_grad=True)
    rolled = rollout(
        lambda x_t, sigma, *, reference, turn: weight * x_t, torch.ones(1, 1, 2), uniform_sigmas(2),
        solver=FlowSDE(0.7), generators=trajectory_generators(0, 1), reduction="mean",
    )  # fmt: skip
    assert not rolled.latents.requires_grad
    assert not rolled.log_prob.requires_grad


def test_default_groups_and_precision():
    rolled = roll(dtype=torch.bfloat16)
    assert rolled.group.tolist() == [0, 1, 2]
    assert rolled.group.dtype == torch.int64
    assert rolled.turn_mask.all()
    assert (rolled.log_prob.dtype, rolled.sigmas.dtype) == (torch.float32, torch.float32)
    noise = torch.zeros(1, 1, 2)
    options = {"solver": ODE(), "generators": trajectory_generators(0, 1), "reduction": "sum"}
    for dtype, kept in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        rolled = rollout(velocity, noise, torch.tensor([1.0, 0.0]).to(dtype), **options)
        assert rolled.sigmas.dtype == kept
        assert rolled.latents.dtype == torch.float32


def test_a_solver_of_ones_own():
    def jump(x_t, velocity, sigma, next_sigma):
        return Transition(x_t - velocity, torch.full((len(x_t), 1, 1), 0.5))

    rolled = roll(solver=jump, n=1, s=1)
    z = batched_noise(SHAPE, trajectory_generators(5000, B))
    reference = batched_noise(SHAPE, trajectory_generators(9000, B))
    x = rolled.latents[:, 0, 0]
    expected = x - velocity(x, torch.ones(B), reference=reference, turn=0) + 0.5 * z
    torch.testing.assert_close(rolled.clean[:, 0], expected)
    assert rolled.stochastic.all()


def test_errors():
    noise, generators = torch.zeros(B, N, 2), trajectory_generators(0, B)

    def call(velocity=velocity, noise=noise, sigmas=(1.0, 0.5, 0.0), **options):
        options = {"solver": FlowSDE(0.7), "generators": generators, "reduction": "mean", **options}
        return rollout(velocity, noise, torch.as_tensor(sigmas), **options)

    def never(x_t, sigma, *, reference, turn):
        raise AssertionError("called before all arguments were checked")

    assert call().latents.shape == (B, N, 3, 2)
    for options, error, message in (
        ({"noise": torch.zeros(B, N)}, ValueError, r"noise: .* \[B, N, \.\.\.\], got \[3, 2\]"),
        ({"noise": torch.zeros(0, N, 2)}, ValueError, r"noise: expected a non-empty tensor"),
        ({"noise": noise.long()}, TypeError, "noise: expected a floating-point tensor"),
        ({"reference": torch.zeros(2, 2)}, ValueError,
         r"reference: expected one row per trajectory, 3, got 2"),
        ({"sigmas": [1.0]}, ValueError, r"sigmas: expected shape \[S \+ 1\] with S >= 1, got \[1"),
        ({"sigmas": [[1.0, 0.0]]}, ValueError, r"sigmas: expected shape \[S \+ 1\] .* got \[1, 2"),
        ({"sigmas": 1.0}, ValueError, r"sigmas: expected shape \[S \+ 1\] with S >= 1, got \[\]"),
        ({"sigmas": [1.0, 0.5, 0.5]}, ValueError,
         r"sigmas: expected a strictly decreasing grid, a fall > 0, got 0\.0 at index \[1\]"),
        ({"sigmas": [0.0, 1.0]}, ValueError, r"sigmas: .* a fall > 0, got -1\.0 at index \[0\]"),
        ({"generators": generators[:2]}, ValueError,
         "generators: expected one per trajectory, 3, got 2"),
        ({"reduction": "max"}, ValueError, r"reduction: expected one of .* got 'max'"),
        ({"stochastic_steps": [0, 2]}, ValueError,
         r"stochastic_steps: expected indices in 0\.\.1, got 2"),
        ({"stochastic_steps": [-1]}, ValueError, "stochastic_steps: expected indices .* got -1"),
        ({"group": torch.zeros(2)}, ValueError, r"group: expected shape \[B\] = \[3\], got \[2\]"),
        ({"turn_mask": torch.ones(3, 3).bool()}, ValueError,
         r"turn_mask: expected shape \[B, N\] = \[3, 2\], got \[3, 3\]"),
        ({"turn_mask": torch.ones(3, 2)}, TypeError, "turn_mask: expected a boolean mask"),
    ):  # fmt: skip
        with pytest.raises(error, match=rf"^{message}"):
            call(never, **options)
    with pytest.raises(
        ValueError, match=r"^velocity: expected shape of x_t = \[3, 2\], got \[3\]$"
    ):
        call(lambda x_t, sigma, *, reference, turn: x_t[:, 0])
    with pytest.raises(TypeError, match=r"^velocity: expected a torch.Tensor, got float$"):
        call(lambda x_t, sigma, *, reference, turn: 1.0)
    with pytest.raises(TypeError, match=r"^velocity: expected a floating-point tensor, got"):
        call(lambda x_t, sigma, *, reference, turn: x_t.long())
    for grid in ([1.5, 0.5], [0.5, -0.5]):
        with pytest.raises(ValueError, match=r"sigma: expected values in \[0, 1\]"):
            call(sigmas=grid)
    with pytest.raises(ValueError, match=r"^l.*: expected finite values in existing turns, got"):
        call(lambda x_t, sigma, *, reference, turn: x_t * math.nan)
    with pytest.raises(TypeError, match=r"^group: expected integer ids, got torch.float32$"):
        call(group=torch.zeros(3))


def test_generators_are_made_on_the_device_that_is_asked_for():
    with pytest.raises(RuntimeError, match="META"):
        trajectory_generators(0, 1, device="meta")


def test_a_rollout_of_float64_draws_float64_noise():
    x = torch.zeros(1, 1, 3, dtype=torch.float64)
    rolled = rollout(
        lambda x_t, sigma, *, reference, turn: torch.zeros_like(x_t),
        x,
        torch.tensor([1.0, 0.5], dtype=torch.float64),
        solver=DanceSDE(1.0),
        generators=trajectory_generators(3, 1),
        reduction="sum",
    )
    z = torch.randn(3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(rolled.clean[0, 0], 0.5**0.5 * z, rtol=1e-12, atol=0)


def test_the_grid_goes_where_the_noise_is():
    """A grid on a device without values cannot be copied to the noise's: the rollout tries to."""
    with pytest.raises((NotImplementedError, RuntimeError), match="Cannot copy out of meta"):
        rollout(
            lambda x_t, sigma, *, reference, turn: x_t,
            torch.zeros(1, 1, 3),
            torch.ones(2, device="meta"),
            solver=ODE(),
            generators=trajectory_generators(0, 1),
            reduction="sum",
        )
