"""FlowAWR's losses: by hand, loops, the Gaussian closed form, gradients, masks, errors."""

import math
import re
from functools import partial

import pytest
import torch

from mteditflow import exact_flow_awr_loss, flow_awr_loss, flow_matching_loss, softmax_advantage
from tests.loops import some

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def case(shape=(5, 2, 3), seed=0, dtype=torch.float64):
    """A velocity that wants a gradient, the old one, the target, an advantage >= -1."""
    generator = torch.Generator().manual_seed(seed)
    velocity, old, target = torch.randn(3, *shape, generator=generator, dtype=dtype)
    advantage = torch.rand(shape[0], generator=generator, dtype=dtype) * 3 - 1
    return velocity.requires_grad_(), old, target, advantage


def exact(velocity, old, target, advantage, **options):
    """The exact loss, with the arguments of the other."""
    return exact_flow_awr_loss(velocity, target, advantage, **options)


LOSSES = {"displaced": flow_awr_loss, "exact": exact}


def test_golden():
    velocity, old, target = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2)
    # displaced target (1, 0) + 2 * (0, 1) = (1, 2): errors 2 and -2
    assert flow_awr_loss(velocity, old, target, 2.0).tolist() == pytest.approx([4.0])
    # errors 2 and -1, weight 3
    assert exact_flow_awr_loss(velocity, target, 2.0).tolist() == pytest.approx([7.5])


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (2, 3, 5), (4, 2, 3, 2)])
def test_both_equal_their_loops(shape):
    velocity, old, target, advantage = case(shape)
    displaced, weighted = [], []
    for row in range(len(velocity)):
        a, size = advantage[row].item(), target[row].numel()
        rows = zip(*(x[row].flatten().tolist() for x in (velocity, old, target)), strict=True)
        errors = [(v - (o + a * (t - o)), v - t) for v, o, t in rows]
        displaced.append(sum(e**2 for e, _ in errors) / size)
        weighted.append((1 + a) * sum(e**2 for _, e in errors) / size)
    assert flow_awr_loss(velocity, old, target, advantage).tolist() == pytest.approx(displaced)
    assert exact_flow_awr_loss(velocity, target, advantage).tolist() == pytest.approx(weighted)


def test_displaced_targets_that_have_names():
    velocity, old, target, _ = case()
    sizes = {1.0: target, 0.0: old, -1.0: 2 * old - target}
    for advantage, expected in some(sizes.items()):
        torch.testing.assert_close(
            flow_awr_loss(velocity, old, target, advantage),
            (velocity - expected).square().mean(dim=(1, 2)),
        )


def test_forms_of_the_advantage():
    velocity, old, target, advantage = case()
    for loss in LOSSES.values():
        expected = loss(velocity, old, target, advantage)
        for form in (advantage.tolist(), advantage.numpy(), advantage[:, None, None]):
            torch.testing.assert_close(loss(velocity, old, target, form), expected)


# the Gaussian closed form

M, S, R, GAMMA, SIGMA = 0.3, 0.8, 0.7, 1.5, 0.6
DELTA, D = S**2 * R / GAMMA, (1 - SIGMA) ** 2 * S**2 + SIGMA**2


def old_optimum(x, sigma=SIGMA):
    """Velocity of the old policy N(m, s^2) at x."""
    spread = (1 - sigma) ** 2 * S**2 + sigma**2
    return -M + (sigma - (1 - sigma) * S**2) / spread * (x - (1 - sigma) * M)


def alpha(x, sigma=SIGMA):
    """Density of the tilted policy N(m + delta, s^2) at x over the old policy's."""
    spread = (1 - sigma) ** 2 * S**2 + sigma**2
    shift = (1 - sigma) * DELTA
    return torch.exp(shift * (x - (1 - sigma) * M) / spread - shift**2 / (2 * spread))


def posterior(x, sigma, count=200_001):
    """Clean latents on a fine grid, their posterior weights under the old policy, and velocities.

    Of x = (1 - sigma) c + sigma n with c ~ N(m, s^2) and n ~ N(0, 1).
    """
    clean = M + S * torch.linspace(-9, 9, count, dtype=torch.float64)
    noise = (x - (1 - sigma) * clean) / sigma
    log_weight = -((clean - M) ** 2) / (2 * S**2) - noise.square() / 2
    return clean, torch.softmax(log_weight, 0), noise - clean


def minimum(loss, x, sigma):
    """Velocity where the expected loss over the posterior at x is minimal: a Newton step is exact.

    The advantages are the tilted policy's density ratio over the old one's, minus 1.
    """
    clean, weight, target = posterior(x, sigma)
    advantage = torch.exp(DELTA * (clean - M) / S**2 - DELTA**2 / (2 * S**2)) - 1
    v = torch.zeros((), dtype=torch.float64, requires_grad=True)
    rows = v.expand(len(clean))[:, None]
    old = torch.full_like(rows, float(old_optimum(torch.tensor(x, dtype=torch.float64), sigma)))
    expected = (weight * loss(rows, old, target[:, None], advantage)).sum()
    (gradient,) = torch.autograd.grad(expected, v, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient, v)
    return float((-gradient / curvature).detach()), float(curvature.detach())


@pytest.mark.parametrize("x", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("sigma", [0.3, 0.6, 0.95])
def test_minima_are_those_of_the_gaussian_closed_form(x, sigma):
    spread = (1 - sigma) ** 2 * S**2 + sigma**2
    at = torch.tensor(x, dtype=torch.float64)
    old, shift, ratio = float(old_optimum(at, sigma)), -DELTA * sigma / spread, alpha(at, sigma)
    found, curvature = minimum(exact, x, sigma)
    assert found == pytest.approx(old + shift, abs=1e-8)
    assert curvature == pytest.approx(2 * float(ratio))  # 2 E[1 + A]
    found, curvature = minimum(flow_awr_loss, x, sigma)
    assert found == pytest.approx(old + float(ratio) * shift, abs=1e-8)
    assert curvature == pytest.approx(2.0)


def test_check_values_of_the_closed_form():
    x = torch.tensor(0.5, dtype=torch.float64)
    assert float(old_optimum(x)) == pytest.approx(-0.01730, abs=5e-6)
    assert pytest.approx(-0.38754, abs=5e-6) == -DELTA * SIGMA / D
    assert float(alpha(x)) == pytest.approx(1.08626, abs=5e-6)
    assert minimum(flow_awr_loss, 0.5, SIGMA)[0] == pytest.approx(-0.43828, abs=5e-6)


def test_alpha_is_one_in_the_mean_and_the_shift_vanishes_at_the_data():
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    x = (1 - SIGMA) * M + math.sqrt(D) * z  # states of the old policy
    assert float((torch.softmax(-(z**2) / 2, 0) * alpha(x)).sum()) == pytest.approx(1.0)
    near_noise, _ = minimum(flow_awr_loss, 0.5, 0.9999)
    at = torch.tensor(0.5, dtype=torch.float64)
    assert near_noise - float(old_optimum(at, 0.9999)) == pytest.approx(-DELTA, rel=2e-3)
    near_data, _ = minimum(exact, 0.5, 0.01)
    assert abs(near_data - float(old_optimum(at, 0.01))) < 0.02 * DELTA / S**2


def test_the_groups_softmax_is_the_density_ratio():
    """Mean displacement over large groups, against -alpha delta sigma / D averaged over x.

    In units of its standard error; groups of 4096, so that the bias of the softmax is below it.
    """
    generator = torch.Generator().manual_seed(0)
    clean = M + S * torch.randn(50 * 4096, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(clean), generator=generator, dtype=torch.float64)
    x, target = (1 - SIGMA) * clean + SIGMA * noise, noise - clean
    group = torch.arange(50).repeat_interleave(4096)
    advantage = softmax_advantage(R * clean, group, temperature=GAMMA)
    old = old_optimum(x)
    velocity = old.clone()[:, None].requires_grad_()
    flow_awr_loss(velocity, old[:, None], target[:, None], advantage).sum().backward()
    pull = -velocity.grad[:, 0] / 2  # A e
    error = float(pull.mean()) - -DELTA * SIGMA / D  # alpha is 1 in the mean
    assert abs(error) < 4 * float(pull.std()) / math.sqrt(len(pull))
    assert abs(error) < 0.01 * DELTA


# what the gradient means


def test_at_the_old_policy_the_gradient_pulls_to_good_samples_and_from_bad_ones():
    _, old, target, advantage = case()
    velocity = old.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        flow_awr_loss(velocity, old, target, advantage).sum(), velocity
    )
    expected = -2 * advantage[:, None, None] * (target - old) / target[0].numel()
    torch.testing.assert_close(gradient, expected)
    before, after = (flow_matching_loss(v, 0 * target, target) for v in (old, old - 0.1 * gradient))
    assert torch.equal(after < before, advantage > 0)
    assert bool((advantage > 0).any() and (advantage < 0).any())


def test_equal_rewards_give_no_gradient_at_the_old_policy_and_a_pull_to_it_elsewhere():
    velocity, old, target, _ = case()
    advantage = softmax_advantage(torch.full((5,), 0.3), torch.tensor([0, 0, 0, 1, 1]))
    for v, expected in ((old.clone().requires_grad_(), 0 * old), (velocity, 2 * (velocity - old))):
        loss = flow_awr_loss(v, old, target, advantage)
        (gradient,) = torch.autograd.grad(loss.sum(), v)
        torch.testing.assert_close(gradient, expected / target[0].numel())


def test_the_exact_loss_weighs_by_the_density_ratio():
    velocity, _, target, _ = case((3, 4))
    loss = exact_flow_awr_loss(velocity, target, torch.tensor([-1.0, 0.0, 2.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    weight = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(gradient, weight * 2 * (velocity - target) / 4)
    assert torch.equal(gradient[0], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradcheck(loss):
    velocity, old, target, advantage = case((3, 2, 2))

    def of_velocity(v):
        return loss(v, old, target, advantage)

    assert torch.autograd.gradcheck(of_velocity, velocity)
    assert torch.autograd.gradgradcheck(of_velocity, velocity)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_constants_get_no_gradient_and_masked_rows_add_nothing(loss):
    velocity, *constants = case()
    for x in constants:
        x.requires_grad_()
    valid = torch.tensor([True, False, True, True, False])
    with torch.no_grad():
        for x in (velocity, *constants):
            x[~valid] = torch.nan
    result = loss(velocity, *constants, valid=valid)
    result.sum().backward()
    assert all(x.grad is None for x in some(constants))
    assert torch.equal(result[~valid], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(velocity.grad[~valid], torch.zeros(2, 2, 3, dtype=torch.float64))
    assert torch.equal(result[valid], loss(velocity[valid], *(x[valid] for x in constants)))


# errors, dtypes, compilation


def test_errors():
    x = torch.zeros(2, 3)
    message = re.escape("old_velocity: expected the shape of velocity, [2, 3], got [1, 3]")
    with pytest.raises(ValueError, match=f"^{message}$"):
        flow_awr_loss(x, x[:1], x, 0.0)
    message = re.escape("target: expected the shape of velocity, [2, 3], got [1, 3]")
    with pytest.raises(ValueError, match=f"^{message}$"):
        exact_flow_awr_loss(x, x[:1], 0.0)
    with pytest.raises(ValueError, match=r"^advantage: expected finite values, got inf at"):
        flow_awr_loss(x, x, x, torch.tensor([0.0, torch.inf]))
    with pytest.raises(ValueError, match=r"^advantage: expected values >= -1, got -1.5 at"):
        exact_flow_awr_loss(x, x, torch.tensor([-1.5, 0.0]))
    with pytest.raises(ValueError, match=r"^advantage: expected a finite number in \[-1, inf\]"):
        exact_flow_awr_loss(x, x, -2.0)
    with pytest.raises(TypeError, match=r"^advantage: expected float32 or float64"):
        flow_awr_loss(x, x, x, torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"^advantage: expected one value per row"):
        flow_awr_loss(x, x, x, torch.zeros(2, 3))
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=r"^velocity: expected a non-empty tensor of shape"):
            loss(x[0], x[0], x[0], 0.0)
        with pytest.raises(TypeError, match=r"^target: expected a floating-point tensor"):
            loss(x, x, x.long(), 0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_dtype_and_device_are_kept(loss, device):
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        *latents, advantage = (x.to(device) for x in case())
        result = loss(*(x.to(dtype) for x in latents), advantage.to(expected))
        assert result.dtype == expected
        assert result.device.type == device


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_compiled_equals_eager(loss):
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    velocity, *rest = case(dtype=torch.float32)
    valid = torch.tensor([True, True, False, True, True])
    results = []
    for function in (compiled, loss):
        value = partial(function, valid=valid)(velocity, *rest)
        (gradient,) = torch.autograd.grad(value.sum(), velocity)
        results.append((value.detach(), gradient))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("loss", ["displaced", "exact"])
def test_an_infinite_advantage_is_refused(loss):
    x, advantage = torch.zeros(2, 3), torch.tensor([0.0, math.inf])
    call = partial(flow_awr_loss, x, x) if loss == "displaced" else partial(exact_flow_awr_loss, x)
    with pytest.raises(ValueError, match="advantage: expected finite values"):
        call(x, advantage)
