"""GRPO, Guard, DPPO and distillation against loops over units; importance; first ratios."""

import math
import re
from dataclasses import replace

import pytest
import torch
from objective_worlds import (
    NOISE_LEVEL,
    Recorded,
    advantages,
    assert_equals_loop,
    clean_samples,
    gradients,
    key,
    near,
    recorded_trajectory,
    validity,
)

from mteditflow import CPS, DanceSDE, FlowSDE
from mteditflow.objectives import DPPO, GRPO, Distillation, Guard
from tests.loops import some

TINY = {"rtol": 1e-9, "atol": 1e-12}  # all in float64
KINDS = {"flow": FlowSDE, "dance": DanceSDE, "cps": CPS}


def make(kind, **options):
    return kind(stochastic_steps=3, noise_level=NOISE_LEVEL, **options)


def run(objective, *, velocity=None, samples=None, old_is_current=False, values=None):
    velocity = velocity or Recorded()
    if samples is None:
        solver = KINDS[objective.solver](NOISE_LEVEL)
        samples = recorded_trajectory(velocity.policies["old"], solver=solver)
    values = advantages() if values is None else values
    (units,) = objective.units(samples, values, validity(), key=key())
    output = objective(velocity, samples, units, old_is_current=old_is_current)
    return velocity, samples, units, output


class Step:
    """One stored step under every policy, by the formulas of the solvers."""

    def __init__(self, objective, velocity, samples, units, unit):
        b, n, k = units.rows[unit, 0].tolist()
        x, self.next = samples.latents[b, n, k], samples.latents[b, n, k + 1]
        s, after = float(samples.sigmas[n, k]), float(samples.sigmas[n, k + 1])
        assert velocity.at(units, unit)[0].equal(x[None])
        self.elements, self.reduction = x.numel(), samples.reduction
        self.recorded = samples.log_prob[b, n, k]
        self.advantage = float(units.advantage[unit, 0])
        d, a, at = s - after, objective.noise_level, torch.tensor([[b, n]])
        self.means = {}
        for name, policy in velocity.policies.items():
            v = policy(x[None], torch.tensor([s], dtype=torch.float64), at)[0]
            v = v if name == "current" else v.detach()
            noise, clean = x + (1 - s) * v, x - s * v
            if objective.solver == "cps":
                kept = math.cos(a * math.pi / 2)
                self.means[name] = (1 - after) * clean + after * kept * noise
                self.std = after * math.sin(a * math.pi / 2)
                self.moves = (1 - after) * s - after * kept * (1 - s)  # of the mean, by -v
            else:
                g = a if objective.solver == "dance" else a * math.sqrt(s / (1 - min(s, 0.8)))
                self.means[name] = x - v * d - g * g / (2 * s) * noise * d
                self.std = g * math.sqrt(d)
                self.moves = d + g * g / (2 * s) * (1 - s) * d

    def reduce(self, x):
        return x.mean() if self.reduction == "mean" else x.sum()

    def log_prob(self, policy):
        square = (self.next - self.means[policy]).square() / (2 * self.std**2)
        return self.reduce(-square - math.log(self.std) - math.log(2 * math.pi) / 2)

    def kl(self, one, other):
        return self.reduce((self.means[one] - self.means[other]).square()) / (2 * self.std**2)


def finish(objective, step, loss, metrics):
    """Importance weight and KL to the reference, as every replay has them."""
    if objective.importance_cap is not None:
        weight = float(
            torch.exp(step.log_prob("old") - step.recorded).clamp(max=objective.importance_cap)
        )
        loss, metrics = weight * loss, {**metrics, "importance_weight": weight}
    metrics = {"policy_loss": loss, **metrics}
    if objective.kl_coef > 0:
        metrics["kl"] = step.kl("current", "reference")
        loss = loss + objective.kl_coef * metrics["kl"]
    return loss, metrics


def surrogate(ratio, advantage, low, high):
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def grpo_loop(objective, step):
    start = step.recorded if objective.importance_cap is None else step.log_prob("old")
    ratio = torch.exp(step.log_prob("current") - start)
    low, high = objective.clip_low, objective.clip_high
    beyond = float(ratio > 1 + high) + float(ratio < 1 - low)
    loss = surrogate(ratio, step.advantage, low, high)
    estimate = -ratio.log() if step.reduction == "mean" else ratio - 1 - ratio.log()
    metrics = {"ratio": ratio, "clip_fraction": beyond, "old_kl": estimate}
    return finish(objective, step, loss, metrics)


def guard_loop(objective, step, steps=4):
    z = (step.next - step.means["old"]) / step.std
    ratio = torch.exp(step.reduce(z * (step.means["current"] - step.means["old"])))
    low, high = objective.clip_low, objective.clip_high
    loss = surrogate(ratio, step.advantage, low, high) / step.moves / steps
    beyond = float(ratio > 1 + high) + float(ratio < 1 - low)
    metrics = {"ratio": ratio, "clip_fraction": beyond, "old_kl": step.kl("current", "old")}
    return finish(objective, step, loss, metrics)


def dppo_loop(objective, step):
    start = step.recorded if objective.importance_cap is None else step.log_prob("old")
    ratio = torch.exp(step.log_prob("current") - start)
    kl = step.kl("current", "old").detach()
    away = (float(ratio.detach()) - 1) * step.advantage > 0
    beyond = bool(kl > objective.threshold)
    loss = ratio * 0 if beyond and away else -ratio * step.advantage
    return finish(objective, step, loss, {"old_kl": kl, "beyond": float(beyond)})


LOOPS = {
    "grpo": (lambda **x: make(GRPO, clip_low=0.004, clip_high=0.007, **x), grpo_loop),
    "guard": (lambda **x: make(Guard, clip_low=0.003, clip_high=0.002, **x), guard_loop),
    "dppo": (lambda **x: make(DPPO, threshold=2e-4, **x), dppo_loop),
}


def assert_is_loop(name, *, reduction="mean", stale=None, **options):
    build, loop = LOOPS[name]
    objective, velocity = build(**options), Recorded()
    sampler = (
        velocity.policies["old"] if stale is None else near(velocity.policies["old"], 9, stale)
    )
    solver = KINDS[objective.solver](NOISE_LEVEL)
    samples = recorded_trajectory(sampler, reduction=reduction, solver=solver)
    _, _, units, output = run(objective, velocity=velocity, samples=samples)

    def of_unit(unit):
        return loop(objective, Step(objective, velocity, samples, units, unit))

    assert_equals_loop(output, units, velocity, of_unit, **TINY)
    return output


# loops


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("name", LOOPS)
def test_a_replay_is_a_loop_over_units(name, kl_coef, reduction):
    output = assert_is_loop(name, reduction=reduction, kl_coef=kl_coef)
    share = output.metrics["beyond" if name == "dppo" else "clip_fraction"].mean()
    if reduction == "mean":
        assert 0.1 < float(share) < 0.9  # both sides of the clip are tried


@pytest.mark.parametrize("solver", ["dance", "cps"])
@pytest.mark.parametrize("name", LOOPS)
def test_every_solver_is_a_loop_over_units(name, solver):
    assert_is_loop(name, solver=solver, kl_coef=0.2)


@pytest.mark.parametrize("name", LOOPS)
def test_importance_weights_are_a_loop_over_units(name):
    output = assert_is_loop(name, stale=0.2, importance_cap=1.02, kl_coef=0.2)
    weight = output.metrics["importance_weight"]
    assert bool((weight == 1.02).any())
    assert bool((weight < 0.99).any())
    assert bool(((weight > 1.0) & (weight < 1.02)).any())


def test_distillation_is_a_loop_over_steps():
    velocity, objective = Recorded(), Distillation()
    samples = recorded_trajectory(velocity.policies["old"])
    (units,) = objective.units(samples, key=key())
    output = objective(velocity, samples, units)

    def loop(unit):
        b, n, k = units.rows[unit, 0].tolist()
        row = samples.latents[b, n, k][None], samples.sigmas[n, k][None], torch.tensor([[b, n]])
        student, teacher = (velocity.policies[p](*row) for p in ("current", "teacher"))
        loss = (student - teacher.detach()).square().mean()
        return loss, {"policy_loss": loss}

    assert_equals_loop(output, units, velocity, loop, **TINY)
    assert velocity.asked() == ["current", "teacher"]
    assert [call[4] for call in velocity.calls] == [True, False]
    existing = samples.turn_mask[..., None].expand(-1, -1, 4).nonzero()  # the ODE step, too
    assert torch.equal(units.rows[:, 0], existing)


# meaning of gradients


class LogProbs:
    """Velocities by row, so that gradients can be read per unit."""

    def __init__(self, policy):
        self.policy, self.asked, self.found = policy, [], None

    def __call__(self, policy, x_t, sigma, at):
        self.asked.append(policy)
        v = self.policy(x_t, sigma, at).detach()
        if policy == "current":
            self.found = v.requires_grad_()
            return self.found
        return v


def unit_gradients(objective, values=None):
    velocity = Recorded()
    old = velocity.policies["old"]
    samples = recorded_trajectory(old)
    rows = LogProbs(old)
    _, _, units, output = run(objective, velocity=rows, samples=samples, values=values)
    (found,) = torch.autograd.grad(output.loss.sum(), rows.found)
    return found, samples, units, rows


def log_prob_gradient(samples, units, velocity):
    """Gradient of each row's mean log-prob by its velocity, with the solver as a black box."""
    v = velocity.found.detach().requires_grad_()
    x, after, s, s_after, _ = samples.steps_at(units.rows[:, 0])
    mean, std = FlowSDE(NOISE_LEVEL)(x, v, s, s_after)
    log_prob = (-(after - mean).square() / (2 * std.square())).flatten(1).mean(dim=1)
    return torch.autograd.grad(log_prob.sum(), v)[0], std.flatten(), s, s_after


@pytest.mark.parametrize("kind", [GRPO, DPPO])
def test_on_policy_gradient_by_log_prob_is_minus_the_advantage(kind):
    found, samples, units, velocity = unit_gradients(make(kind))
    by_log_prob, *_ = log_prob_gradient(samples, units, velocity)
    expected = -units.advantage[..., None] * by_log_prob
    torch.testing.assert_close(found, expected)


def test_on_policy_gradient_of_guard_has_one_scale_at_every_step():
    """By z, the noise of the step: -advantage z / elements / S, whatever the step."""
    found, samples, units, velocity = unit_gradients(make(Guard))
    x, after, s, s_after, _ = samples.steps_at(units.rows[:, 0])
    mean, std = FlowSDE(NOISE_LEVEL)(x, velocity.found.detach(), s, s_after)
    z = (after - mean) / std
    torch.testing.assert_close(found, units.advantage[..., None] * z / 6 / 4)


# who is asked


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("name", LOOPS)
def test_policies_are_called_once_where_they_matter(name, cap, kl_coef):
    velocity, *_ = run(LOOPS[name][0](importance_cap=cap, kl_coef=kl_coef))
    expected = {"current"} | ({"reference"} if kl_coef else set())
    if cap is not None or name != "grpo":
        expected.add("old")
    assert sorted(velocity.asked()) == sorted(expected)
    assert {call[0] for call in velocity.calls if call[4]} == {"current"}


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("name", LOOPS)
def test_the_old_policy_is_not_called_where_it_is_the_current_one(name, cap):
    found = []
    for old_is_current in (True, False):
        velocity = Recorded(by=0.0)
        _, _, _, output = run(
            LOOPS[name][0](importance_cap=cap), velocity=velocity, old_is_current=old_is_current
        )
        found.append((output, gradients(output.loss.sum(), velocity.parameters())))
        assert not (old_is_current and "old" in velocity.asked())
    (short, short_gradient), (long, long_gradient) = found
    torch.testing.assert_close(short.loss, long.loss)
    torch.testing.assert_close(short_gradient, long_gradient)
    for name_, x in some(short.metrics.items()):
        torch.testing.assert_close(x, long.metrics[name_])


@pytest.mark.parametrize("name", LOOPS)
def test_only_the_current_policy_gets_a_gradient(name):
    velocity, _, _, output = run(LOOPS[name][0](kl_coef=0.1, importance_cap=1.5))
    output.loss.sum().backward()
    others = [p for other in ("old", "reference") for p in velocity.policies[other].parameters()]
    assert all(p.grad is None for p in some(others))
    assert all(bool(p.grad.any()) for p in some(velocity.parameters()))


# importance


@pytest.mark.parametrize("name", LOOPS)
def test_importance_of_a_sampler_that_is_the_old_policy_is_that_of_no_cap(name):
    plain, capped = LOOPS[name][0](), LOOPS[name][0](importance_cap=2.0)
    (v, _, units, expected), (w, _, _, found) = run(plain), run(capped)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(
        found.metrics["importance_weight"], torch.ones(len(units), dtype=torch.float64)
    )
    torch.testing.assert_close(
        gradients(found.loss.sum(), w.parameters()),
        gradients(expected.loss.sum(), v.parameters()),
    )


# ratios of a fresh rollout


@pytest.mark.parametrize("kind", [GRPO, Guard, DPPO])
def test_a_fresh_rollout_passes_and_another_one_does_not(kind):
    velocity, objective = Recorded(by=0.0), make(kind)
    samples = recorded_trajectory(velocity.policies["current"])
    options = {"trajectories": 4, "size": 5}
    check = objective.check_ratios(velocity, samples, **options)
    assert check.ok
    assert check.tolerance == pytest.approx(1e-5)
    assert set(velocity.asked()) == {"current"}
    assert not any(call[4] for call in some(velocity.calls))
    assert max(len(call[1]) for call in velocity.calls) == 5
    assert {int(b) for call in velocity.calls for b in call[3][:, 0]} == {0, 1, 2, 3}
    moved = samples.log_prob.clone()
    moved[3, 1, 1] += 1e-3
    perturbed = replace(samples, log_prob=moved)
    check = objective.check_ratios(velocity, perturbed, **options)
    assert not check.ok
    assert "at step 1" in check.verdict
    assert objective.check_ratios(velocity, perturbed, trajectories=3, size=5).ok
    assert objective.check_ratios(velocity, perturbed, share=100.0, **options).ok


def test_a_check_of_float64_log_probs_is_made_in_float64():
    velocity, objective = Recorded(by=0.0), make(GRPO)
    samples = recorded_trajectory(velocity.policies["current"], reduction="sum")
    large = samples.log_prob.abs() > 4  # spacing of float32 there: 4.8e-7
    moved = replace(samples, log_prob=samples.log_prob + torch.where(large, 2e-7, 0.0))
    options = {"trajectories": 8, "size": 100, "share": 1e-3}  # a tolerance of 1e-7
    assert objective.check_ratios(velocity, samples, **options).ok
    check = objective.check_ratios(velocity, moved, **options)
    assert not check.ok
    assert check.deviation.nan_to_num().max().item() == pytest.approx(2e-7, rel=1e-6)


def test_ratios_are_checked_against_the_nearer_clip_bound_above_0():
    for kind in (GRPO, Guard):
        scales = [
            make(kind, clip_low=low, clip_high=high).ratio_scale
            for low, high in ((2e-3, 1e-3), (1e-3, 2e-3), (0.0, 2e-3), (2e-3, 0.0), (0.0, 0.0))
        ]
        assert scales == [1e-3, 1e-3, 2e-3, 2e-3, 1e-4]
    assert DPPO().ratio_scale == 1e-4


def test_a_check_refuses_what_it_cannot_check():
    velocity, objective = Recorded(), make(GRPO)
    samples = recorded_trajectory(velocity.policies["current"])
    for options, message in (
        ({"trajectories": 0, "size": 1}, "trajectories: expected an integer >= 1, got 0"),
        ({"trajectories": 1, "size": 0}, "size: expected an integer >= 1, got 0"),
        ({"trajectories": 1, "size": 1, "share": -1.0}, "share: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            objective.check_ratios(velocity, samples, **options)
    with pytest.raises(ValueError, match="samples: expected stored steps"):
        objective.check_ratios(velocity, clean_samples(), trajectories=1, size=1)


# small ratios, sampling, hyperparameters


def test_old_kl_of_float32_log_probs_is_an_estimate_that_is_not_negative():
    """At ratios of 1e-5 the square is below what float32 resolves beside the ratio."""
    policies = Recorded(by=5e-5).policies
    exact = recorded_trajectory(policies["old"], reduction="sum")
    samples = replace(
        exact,
        log_prob=exact.log_prob.float(),
        latents=exact.latents.float(),
        sigmas=exact.sigmas.float(),
    )

    def velocity(policy, x_t, sigma, at):
        return policies[policy](x_t, sigma, at).float()

    *_, output = run(make(GRPO), velocity=velocity, samples=samples)
    ratio = output.metrics["ratio"].double()
    assert 0 < float((ratio - 1).abs().max()) < 1e-3
    kl = output.metrics["old_kl"]
    assert kl.dtype == torch.float32
    assert bool((kl >= 0).all())
    large = (ratio - 1).abs() > 2e-5
    assert bool(large.any())
    expected = (ratio.log().square() / 2)[large]
    torch.testing.assert_close(kl.double()[large], expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize(("reduction", "by"), [("mean", 0.15), ("sum", 0.05)])
def test_old_kl_is_an_unbiased_estimate_of_the_exact_kl(reduction, by):
    """DPPO's is exact; for mean log-probs both are per element, so that thresholds agree."""
    errors, exact = [], []
    for seed in range(40):
        velocity = Recorded(by=by)
        samples = recorded_trajectory(
            velocity.policies["old"], reduction=reduction, seed=1000 * seed
        )
        *_, estimated = run(make(GRPO), velocity=velocity, samples=samples)
        *_, known = run(make(DPPO), velocity=velocity, samples=samples)
        errors.append(estimated.metrics["old_kl"] - known.metrics["old_kl"])
        exact.append(known.metrics["old_kl"])
    error, kl = torch.cat(errors), torch.cat(exact).mean()
    noise = float(error.std()) / len(error) ** 0.5
    assert abs(float(error.mean())) < 4 * noise
    assert float(kl) > 8 * noise


def test_sampling_asks_for_the_solver_and_the_window():
    objective = GRPO(solver="dance", noise_level=0.3, stochastic_steps=2, window_interval=3)
    assert objective.sampling(0, steps=4) == (DanceSDE(0.3), range(2))
    assert [objective.sampling(k, steps=4).stochastic_steps.start for k in range(12)] == [
        *[0] * 3,
        *[1] * 3,
        *[2] * 3,
        *[0] * 3,
    ]
    still = GRPO(stochastic_steps=4)
    assert still.sampling(99, steps=4) == (FlowSDE(0.9), range(4))
    with pytest.raises(
        ValueError, match="stochastic_steps: expected at most the 4 steps of a turn"
    ):
        GRPO(stochastic_steps=5).sampling(0, steps=4)
    assert (GRPO().old_decay(7), GRPO.samples_with) == (0.0, "current")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GRPO(solver="euler"), "solver: expected one of ['flow', 'dance', 'cps']"),
        (lambda: GRPO(noise_level=0.0), "noise_level: expected a finite number in (0, inf]"),
        (lambda: GRPO(solver="cps", noise_level=2.0), "noise_level: expected a finite number in"),
        (lambda: GRPO(stochastic_steps=0), "stochastic_steps: expected an integer >= 1, got 0"),
        (lambda: GRPO(window_interval=-1), "window_interval: expected an integer >= 0, got -1"),
        (lambda: GRPO(share=0.0), "share: expected a finite number in (0, 1], got 0.0"),
        (lambda: Guard(kl_coef=-1.0), "kl_coef: expected a finite number in [0, inf], got -1.0"),
        (lambda: DPPO(importance_cap=0.5), "importance_cap: expected a finite number in [1, inf]"),
        (lambda: GRPO(clip_low=1.0), "clip_low: expected a finite number in [0, 1), got 1.0"),
        (lambda: Guard(clip_high=-1.0), "clip_high: expected a finite number in [0, inf]"),
        (lambda: DPPO(threshold=-1.0), "threshold: expected a finite number in [0, inf]"),
        (lambda: Distillation(share=1.5), "share: expected a finite number in (0, 1], got 1.5"),
    ],
)
def test_hyperparameters_out_of_range(build, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        build()
