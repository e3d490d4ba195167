"""Cases that a first user of the objectives broke: each was silent or a bare exception."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mteditflow as mt
from mteditflow.objectives import (
    AWM,
    DPO,
    GRPO,
    NFT,
    OBJECTIVES,
    Buckets,
    BucketVelocity,
    CleanSamples,
    Distillation,
    ForwardObjective,
    Renoise,
    RoundKey,
    Velocity,
    training_rows,
)
from mteditflow.training import Updater
from tests.loops import some
from tests.objectives.test_objective_defaults import advantage, trajectory, velocity


def clean_samples():
    """Trajectory 0 has no first turn, and NaN there."""
    clean = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0))
    clean[0, 0] = torch.nan
    turn_mask = torch.ones(4, 2, dtype=torch.bool)
    turn_mask[0, 0] = False
    return CleanSamples(clean, torch.tensor([0, 0, 1, 1]), turn_mask)


def test_an_idle_unit_uses_a_turn_that_exists():
    samples, model = clean_samples(), torch.nn.Linear(8, 8)
    nothing = torch.zeros(4, dtype=torch.bool)
    (units,) = NFT().units(samples, advantage, nothing, key=RoundKey(0, 0))
    assert len(units) == 0
    idle = units.idle()
    assert bool(samples.turn_mask[idle.rows[0, 0, 0], idle.rows[0, 0, 1]])
    output = NFT()(lambda policy, x_t, sigma, at: model(x_t), samples, idle)
    output.loss.sum().backward()
    assert output.loss.tolist() == [0.0]
    assert all(not p.grad.any() for p in some(model.parameters()))


def updater_of(model, parameters):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return Updater(optimizer, parameters, max_grad_norm=1e-3)


@pytest.mark.parametrize("broken", [False, True])
def test_an_updater_clips_and_checks_what_model_parameters_gives(broken):
    model = torch.nn.Linear(6, 6)
    before = [p.detach().clone() for p in model.parameters()]
    (units,) = NFT(loss="plain").units(trajectory, advantage, key=RoundKey(0, 0))

    def losses(part):
        output = NFT(loss="plain")(
            lambda policy, x_t, sigma, at: 100 * model(x_t), trajectory, part, old_is_current=True
        )
        return output._replace(loss=output.loss * torch.nan) if broken else output

    update = updater_of(model, model.parameters).step([units], losses, count=units.count)
    moved = sum(float((p - q).detach().square().sum()) for p, q in zip(model.parameters(), before))  # noqa: B905
    if broken:
        assert update.outcome == "skipped"
        assert moved == 0
    else:
        assert update.grad_norm > 1
        assert moved**0.5 == pytest.approx(1e-3, rel=1e-3)


def test_an_updater_refuses_a_list_and_an_empty_model():
    model = torch.nn.Linear(6, 6)
    with pytest.raises(TypeError, match=r"^parameters: expected a callable such as model\."):
        updater_of(model, list(model.parameters()))
    (units,) = NFT().units(trajectory, advantage, key=RoundKey(0, 0))
    updater = updater_of(model, lambda: iter(()))
    with pytest.raises(ValueError, match="parameters: expected at least one, got none"):
        updater.step(
            [units],
            lambda part: NFT()(lambda p, x, s, at: model(x), trajectory, part),
            count=units.count,
        )


def test_an_update_of_idle_units_alone_is_empty():
    model = torch.nn.Linear(6, 6)
    nothing = torch.zeros(4, dtype=torch.bool)
    (units,) = NFT().units(trajectory, advantage, nothing, key=RoundKey(0, 0))
    update = updater_of(model, model.parameters).step(
        units.split(4, parts=1),
        lambda part: NFT()(lambda p, x, s, at: model(x), trajectory, part),
        count=0,
    )
    assert update.outcome == "empty"
    assert all(p.grad is None for p in some(model.parameters()))


def test_units_of_another_objective_are_refused():
    key = RoundKey(0, 0)
    (nft,) = NFT().units(trajectory, advantage, key=key)
    (dpo,) = DPO().units(trajectory, advantage, key=key)
    (grpo,) = GRPO(stochastic_steps=2).units(trajectory, advantage, key=key)
    for objective, units in (
        (GRPO(), nft),
        (GRPO(), dpo),
        (NFT(), dpo[:1]),
        (AWM(), dpo[:1]),
        (NFT(), grpo),
        (DPO(), nft),
        (Distillation(), nft),
    ):
        with pytest.raises(ValueError, match=r"^units: expected those of this objective, K = \d"):
            objective(velocity, trajectory, units)


@pytest.mark.parametrize("objective", [NFT(), AWM(), DPO(), Distillation(), GRPO()])
def test_no_gradient_flows_into_the_samples(objective):
    latents = trajectory.latents.clone().requires_grad_()
    samples = mt.Trajectory(
        latents,
        trajectory.sigmas,
        trajectory.log_prob,
        trajectory.stochastic,
        trajectory.group,
        trajectory.turn_mask,
        trajectory.reduction,
    )
    own = advantage if objective.card.rewarded else None
    (units,) = objective.units(samples, own, key=RoundKey(0, 0))
    weight = torch.ones(6, requires_grad=True)
    output = objective(
        lambda policy, x_t, sigma, at: x_t * weight, samples, units, old_is_current=False
    )
    output.loss.sum().backward()
    assert latents.grad is None
    assert weight.grad is not None


def states_for(objective, dtype):
    """States at which an objective calls a velocity, for samples of a dtype; all are finite."""
    samples = replace(trajectory, latents=trajectory.latents.to(dtype))
    own = advantage if objective.card.rewarded else None
    (units,) = objective.units(samples, own, key=RoundKey(0, 0))
    seen = []

    def record(policy, x_t, sigma, at):
        seen.append((x_t, sigma))
        return velocity(policy, x_t.float(), sigma, at)

    objective(record, samples, units)
    return seen


@pytest.mark.parametrize("name", OBJECTIVES)
def test_states_are_float32_where_renoised_and_stored_where_replayed(name):
    """As docs/loop.md and the docstring of ``Velocity`` state, which name every objective."""
    kind = OBJECTIVES[name]
    renoises = issubclass(kind, ForwardObjective)
    for x_t, sigma in some(states_for(kind(), torch.bfloat16)):
        assert x_t.dtype == (torch.float32 if renoises else torch.bfloat16)
        assert bool(((sigma >= 0) & (sigma <= 1)).all())
    page = (Path(__file__).parents[2] / "docs" / "loop.md").read_text()
    for text in (page.replace("\n> ", "\n"), inspect.getdoc(Velocity.__call__)):
        listed = re.search(
            r"re-noise.*?\(([^)]*)\).*?\(([^)]*)\)", text[text.index("float32") :], re.S
        )
        assert kind.__name__ in listed[1 if renoises else 2]


def output_of_diffusers(x):
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=x)


def outputs_of_models():
    """Wrong outputs at x_t [M, 6], and what the error says of them."""
    shape = r"^velocity: expected a tensor of the shape of x_t, \[\d+, 6\], got "
    other = r"^velocity: expected the shape of x_t, \[\d+, 6\], got "
    return {
        "tuple": (lambda x: (x,), TypeError, shape + r"tuple; return its tensor, \[0\]"),
        "output": (
            output_of_diffusers,
            TypeError,
            shape + r"Transformer.*; return its \.sample$",
        ),
        "none": (lambda x: None, TypeError, shape + "NoneType$"),
        "array": (lambda x: x.detach().numpy(), TypeError, shape + "ndarray$"),
        "integers": (lambda x: x.long(), TypeError, "^velocity: expected a floating-point tensor"),
        "wider": (lambda x: x.repeat(1, 2), ValueError, other + r"\[\d+, 12\]$"),
        "narrow": (lambda x: x[:, :1], ValueError, other + r"\[\d+, 1\]$"),
        "row": (lambda x: x[:1], ValueError, other + r"\[1, 6\]$"),
        "turns": (lambda x: x[:, None], ValueError, r"\[B, N, \.\.\.\] with an axis of turns"),
    }


WRONG = outputs_of_models()


@pytest.mark.parametrize("policy", ["current", "old", "reference", "teacher"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_outputs_of_a_velocity_are_refused(case, policy):
    objective = {
        "current": GRPO(),
        "old": NFT(),
        "reference": NFT(kl_coef=0.1, kl_share=0.5),
        "teacher": Distillation(),
    }[policy]
    wrong, error, message = WRONG[case]
    own = advantage if objective.card.rewarded else None
    (units,) = objective.units(trajectory, own, key=RoundKey(0, 0))

    def one_is_wrong(requested, x_t, sigma, at):
        right = velocity(requested, x_t, sigma, at)
        return wrong(right) if requested == policy else right

    with pytest.raises(error, match=message):
        objective(one_is_wrong, trajectory, units)


def test_tokens_of_references_that_were_not_cut_off_are_named():
    samples = CleanSamples(torch.randn(4, 1, 5, 6), trajectory.group)
    (units,) = NFT().units(samples, advantage, key=RoundKey(0, 0))
    message = r"x_t, \[4, 5, 6\], got \[4, 10, 6\]; cut off the .* images, velocity\[:, :5\]$"
    with pytest.raises(ValueError, match=message):
        NFT()(lambda policy, x_t, sigma, at: torch.cat([x_t, x_t], dim=1), samples, units)


def test_a_wrong_output_of_a_bucket_is_refused():
    samples = Buckets([clean_samples(), clean_samples()])
    right = lambda policy, x_t, sigma, at: x_t  # noqa: E731
    both = BucketVelocity(samples, [right, lambda *given: (right(*given),)])
    with pytest.raises(
        TypeError, match=r"^velocity: expected a tensor of the shape of x_t.* tuple"
    ):
        both("current", torch.zeros(2, 8), torch.zeros(2), torch.tensor([[1, 0], [5, 0]]))


def test_wrong_types_of_renoise_are_refused():
    for given in ({"stratified": "no", "levels": 2}, {"shared": None}):
        with pytest.raises(TypeError, match="expected True or False, got"):
            Renoise(**given)
    for given in ({"levels": 2}, None):
        with pytest.raises(TypeError, match="renoise: expected Renoise, got"):
            NFT(renoise=given)


def test_a_rollout_without_stochastic_steps_is_refused():
    deterministic = mt.Trajectory(
        trajectory.latents,
        trajectory.sigmas,
        trajectory.log_prob,
        torch.zeros_like(trajectory.stochastic),
        trajectory.group,
        trajectory.turn_mask,
        trajectory.reduction,
    )
    with pytest.raises(ValueError, match="samples: expected stochastic steps, got none; roll out"):
        GRPO().units(deterministic, advantage, key=RoundKey(0, 0))


def test_the_smallest_share_draws_a_step_of_every_turn():
    exists = torch.ones(3, 2, 10, dtype=torch.bool)
    exists[0, 1] = False  # a turn without steps has none to draw
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    (rows,) = training_rows(exists, generators=generators, share=1e-5)
    assert rows[:, :2].tolist() == [[0, 0], [1, 0], [1, 1], [2, 0], [2, 1]]


def test_an_adapted_weight_stays_in_its_bounds():
    low = high = mt.AdaptiveKL(target=1.0, value=1.0, rate=1.0, minimum=0.1, maximum=4.0)
    for _ in range(50):
        low, high = low.update(0.0), high.update(1e9)
    assert (low.value, high.value) == (0.1, 4.0)
    with pytest.raises(ValueError, match=re.escape("value: expected a finite number in [0.1, 4]")):
        mt.AdaptiveKL(target=1.0, value=5.0, minimum=0.1, maximum=4.0)
