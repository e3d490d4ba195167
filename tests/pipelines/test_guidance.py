"""Guidance and its rescalings: golden values, recovery from tensors, what is refused, gradients."""

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.pipelines.ltx.pipeline_ltx import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipelines.base import prompts
from tiny_pipelines.checks import replay
from tiny_pipelines.modular import KLEIN, klein_base

from mteditflow import FlowSDE, trajectory_generators
from mteditflow.pipelines import Recorder, ReplayError
from mteditflow.pipelines.guidance import (
    Combination,
    Guidance,
    NormLimit,
    StdMix,
    TokenNorm,
    find_guidance,
    find_guider,
    find_sign,
    mismatch,
)

RESCALINGS = [TokenNorm(), NormLimit(1.0), NormLimit(0.85), StdMix(0.7), StdMix(1.0)]


def branches(*shape, dtype=torch.float32, seed=0):
    """Two branches that are alike, as those of a trained model."""
    generator = torch.Generator().manual_seed(seed)
    one, change = torch.randn(2, *(shape or (2, 50, 8)), generator=generator)
    return [one.to(dtype), (one + 0.3 * change).to(dtype)]


# Golden values, worked out by hand.


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (Guidance(0, 3.0), [4.0, -5.0]),  # [1, 1] + 3 ([2, -1] - [1, 1])
        (Guidance(1, 3.0), [-1.0, 5.0]),  # [2, -1] + 3 ([1, 1] - [2, -1])
        (Guidance(0, 2.0, from_positive=True), [4.0, -5.0]),  # [2, -1] + 2 [1, -2]
    ],
)
def test_guidance_is_that_of_the_formula(guidance, expected):
    made = guidance([torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 1.0]])])
    assert made.tolist() == [expected]


COMBINED = [[[3.0, 4.0], [0.0, 2.0]]]  # norms 5 and 2, sqrt(29) in all


@pytest.mark.parametrize(
    ("rescaling", "positive", "expected"),
    [
        (TokenNorm(), [[[10.0, 0.0], [3.0, 4.0]]], [[[6.0, 8.0], [0.0, 5.0]]]),
        (NormLimit(1.0), [[[29**0.5, 0.0], [0.0, 0.0]]], COMBINED),
        (NormLimit(0.5), [[[29**0.5, 0.0], [0.0, 0.0]]], [[[1.5, 2.0], [0.0, 1.0]]]),
        (NormLimit(2.0), [[[29**0.5, 0.0], [0.0, 0.0]]], COMBINED),
        (StdMix(1.0), [[[6.0, 8.0], [0.0, 4.0]]], [[[6.0, 8.0], [0.0, 4.0]]]),
        (StdMix(0.5), [[[6.0, 8.0], [0.0, 4.0]]], [[[4.5, 6.0], [0.0, 3.0]]]),
    ],
)
def test_rescalings_are_those_of_their_formulas(rescaling, positive, expected):
    made = rescaling(torch.tensor(COMBINED), torch.tensor(positive))
    torch.testing.assert_close(made, torch.tensor(expected), rtol=1e-6, atol=0)


def test_the_mix_of_standard_deviations_is_the_pipelines_own():
    combined, positive = branches()
    assert torch.equal(
        StdMix(0.7)(combined, positive),
        rescale_noise_cfg(combined, positive, guidance_rescale=0.7),
    )


# Recovered from the tensors.


@pytest.mark.parametrize("scale", [1.7, 4.0, 7.5, -2.0, 0.0, 1.0, 1.25])
@pytest.mark.parametrize("positive", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_guidance_is_recovered_exactly(scale, positive, dtype):
    velocities = [torch.randn(2, 50, 3).to(dtype) for _ in range(2)]
    velocity = Guidance(positive, scale)(velocities)
    found = find_guidance(velocities, velocity)
    assert torch.equal(found(velocities), velocity)
    assert not mismatch(velocities, found, velocity)
    assert scale <= 1 or found == Guidance(positive, scale)


@pytest.mark.parametrize("rescaling", [None, *RESCALINGS])
@pytest.mark.parametrize("from_positive", [False, True])
@pytest.mark.parametrize("positive", [0, 1])
def test_rescaled_guidance_is_recovered_as_it_was_given(rescaling, from_positive, positive):
    velocities = branches()
    guidance = Guidance(positive, 4.5, from_positive, rescaling)
    assert find_guidance(velocities, guidance(velocities)) == guidance


@pytest.mark.parametrize("scale", [4.0, 2.5])
def test_the_norm_of_tokens_is_recovered_in_half_precision(scale):
    velocities = branches(2, 200, 64, dtype=torch.bfloat16)
    guidance = Guidance(0, scale, rescaling=TokenNorm())
    assert find_guidance(velocities, guidance(velocities)) == guidance


def test_an_odd_scale_is_found_in_full_precision():
    velocities = branches()
    for rescaling in (None, TokenNorm(), StdMix(0.7)):
        velocity = Guidance(0, 3.14159265, rescaling=rescaling)(velocities)
        found = find_guidance(velocities, velocity)
        assert found.scale == pytest.approx(3.14159265, abs=1e-6)
        assert found.rescaling == rescaling


def test_guidance_written_in_another_order_is_accepted_to_rounding():
    one, other = branches()
    velocity = 3.7 * one - 2.7 * other
    found = find_guidance([one, other], velocity)
    torch.testing.assert_close(found([one, other]), velocity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rescaling", [None, *RESCALINGS])
@pytest.mark.parametrize("scale", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seed", range(3))
def test_the_sign_is_found_under_any_guidance(rescaling, scale, sign, seed):
    velocities = [
        torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed + k)) for k in (0, 9)
    ]
    velocity = Guidance(0, scale, rescaling=rescaling)(velocities)
    assert find_sign(velocities, sign * velocity) == sign
    assert find_sign(velocities[:1], sign * velocities[0]) == sign


# Proved.


@pytest.mark.parametrize(
    "guidance", [None, *(Guidance(0, 3.0, rescaling=r) for r in [None, *RESCALINGS])]
)
def test_a_mismatch_of_a_few_roundings_counts_for_one_branch_alone(guidance):
    velocities = branches()
    velocity = velocities[0] if guidance is None else guidance(velocities)
    assert not mismatch(velocities, guidance, velocity)
    assert mismatch(velocities, guidance, velocity * (1 + 1e-7)) == (guidance is None)
    assert mismatch(velocities, guidance, velocity * (1 + 1e-4))


def test_equal_branches_hide_the_scale():
    one = torch.randn(2, 3)
    assert find_guidance([one, one.clone()], one) is None


@pytest.mark.parametrize("rescaling", [None, TokenNorm(), StdMix(0.7)])
@settings(max_examples=10)
@given(factor=st.floats(0.05, 3.0).filter(lambda x: abs(x - 1) > 1e-3))
def test_a_velocity_of_another_length_is_refused(rescaling, factor):
    velocities = branches()
    velocity = factor * Guidance(0, 4.5, rescaling=rescaling)(velocities)
    with pytest.raises(ReplayError, match="rescaled or otherwise modified guidance"):
        find_guidance(velocities, velocity)


@pytest.mark.parametrize("rescaling", RESCALINGS)
def test_a_velocity_changed_in_one_element_is_refused(rescaling):
    velocities = branches()
    velocity = Guidance(0, 4.5, rescaling=rescaling)(velocities)
    velocity[0, 0, 0] *= 1.01
    with pytest.raises(ReplayError, match="rescaled or otherwise modified guidance"):
        find_guidance(velocities, velocity)


@pytest.mark.parametrize("rescaling", [None, *RESCALINGS])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_the_first_step_showed_must_hold_at_all(rescaling, sign):
    combination, guidance = Combination(), Guidance(1, 4.5, rescaling=rescaling)
    first, later = branches(), branches(seed=1)
    assert not combination.mismatch(first, sign * guidance(first))
    assert (combination.sign, combination.guidance) == (sign, guidance)
    assert not combination.mismatch(later, sign * guidance(later))
    for other in (
        -guidance(later),
        guidance._replace(scale=4.6)(later),
        guidance._replace(rescaling=StdMix(0.2))(later),
    ):
        assert combination.mismatch(later, sign * other)


def longer(ratio, seed=0):
    """Branches that guidance of scale 5 makes longer than the positive one by this ratio."""
    one, other = torch.randn(2, 2, 50, 8, generator=torch.Generator().manual_seed(seed)).flatten(2)
    across = other - one * (other * one).sum(1, keepdim=True) / one.square().sum(1, keepdim=True)
    across *= one.norm(dim=1, keepdim=True) / across.norm(dim=1, keepdim=True)
    return [x.unflatten(1, (50, 8)) for x in (one, one - across * (ratio**2 - 1) ** 0.5 / 5)]


def test_a_limit_on_norms_may_be_reached_late():
    guidance = Guidance(0, 5.0, from_positive=True, rescaling=NormLimit(1.2))
    combination = Combination()
    for ratio, seed in ((1.1, 0), (1.05, 1), (1.5, 2), (1.1, 3)):
        velocities = longer(ratio, seed)
        assert not combination.mismatch(velocities, guidance(velocities))
        rescaling = NormLimit(1.2) if seed >= 2 else None
        assert combination.guidance == guidance._replace(rescaling=rescaling)


def test_a_limit_that_an_earlier_step_ignored_is_refused():
    plain = Guidance(0, 5.0, from_positive=True)
    combination = Combination()
    first, later = longer(1.4), longer(1.5, seed=1)
    assert not combination.mismatch(first, plain(first))
    assert combination.mismatch(later, plain._replace(rescaling=NormLimit(1.2))(later))


# Guiders of a pipeline, which are called again.


def tangential(scale):
    return TangentialClassifierFreeGuidance(guidance_scale=scale)


@pytest.mark.parametrize("positive", [0, 1])
def test_a_guider_is_found_by_what_it_makes_of_the_branches(positive):
    guider, velocities = tangential(4.0), branches()
    velocity = guider.forward(velocities[positive], velocities[1 - positive]).pred
    found = find_guider([tangential(3.0), guider], velocities, velocity)
    assert found == find_guider([tangential(4.0)], velocities, velocity)
    assert found.positive == positive
    guider.guidance_scale = 9.0  # the copy is that of the step
    assert torch.equal(found(velocities), velocity)
    assert find_guider([tangential(4.0)], velocities, velocity + 1e-6) is None


def test_guiders_with_other_settings_are_other_guidance():
    velocities = branches()
    made = [tangential(scale).forward(*velocities).pred for scale in (3.0, 4.0)]
    three, four = (
        find_guider([tangential(scale)], velocities, velocity)
        for scale, velocity in zip((3.0, 4.0), made, strict=True)
    )
    assert three != four


def test_an_attribute_that_is_set_later_makes_other_guidance():
    """The configuration of a guider does not follow its attributes."""
    velocities, found = branches(), []
    guider = tangential(4.0)
    for scale in (4.0, 9.0, 4.0):
        guider.guidance_scale = scale
        velocity = guider.forward(*velocities).pred
        found.append(find_guider([guider], velocities, velocity))
    first, other, again = found
    assert first == again != other
    assert not torch.equal(first(velocities), other(velocities))


def test_turns_with_other_settings_of_a_guider_are_replayed_in_one_batch():
    pipeline = klein_base(guider=tangential(4.0))
    solver, generators = FlowSDE(0.7), trajectory_generators(0, 2)
    given = KLEIN | {"num_inference_steps": 2, "output_type": "latent", "generator": generators}
    with Recorder(pipeline, solver, generators=generators) as recorder:
        for turn, scale in enumerate((4.0, 9.0)):
            pipeline.guider.guidance_scale = scale
            pipeline(**prompts(turn, 2) | given)
    rollout = recorder.rollout(group=[0, 1])
    rows = rollout.trajectory.step_mask.nonzero(as_tuple=True)
    with torch.no_grad():
        replayed = replay(rollout, pipeline.transformer, solver, rows)
    stored = rollout.trajectory.log_prob[rows]
    torch.testing.assert_close(replayed, stored, rtol=0, atol=1e-5)


def test_guiders_that_hold_objects_are_like_none_but_themselves():
    velocities, guider = branches(), tangential(4.0)
    guider.scales = {1.0, 2.0}
    velocity = guider.forward(*velocities).pred
    one, other = (find_guider([guider], velocities, velocity) for _ in range(2))
    assert one == one
    assert one != other


def test_equal_branches_hide_which_of_them_a_guider_took_for_the_positive_one():
    one = branches()[0]
    made = tangential(4.0).forward(one, one.clone()).pred
    assert find_guider([tangential(4.0)], [one, one.clone()], made) is None


def test_a_guider_with_a_momentum_is_not_called_again():
    guider = AdaptiveProjectedGuidance(
        guidance_scale=4.0, eta=0.5, adaptive_projected_guidance_momentum=-0.5
    )
    guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(1000.0))
    guider.prepare_inputs({"x": (torch.zeros(1), torch.zeros(1))})
    velocities = branches()
    velocity = guider.forward(*velocities).pred
    assert find_guider([guider], velocities, velocity) is None


def test_a_guider_of_other_branches_is_none():
    """It is given a conditional and a skipped branch, which it would take for another pair."""
    guider = SkipLayerGuidance(
        guidance_scale=1.0,
        skip_layer_guidance_layers=[0],
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    )
    guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(900.0))
    conditional, skipped = velocities = branches()
    velocity = guider.forward(conditional, pred_cond_skip=skipped).pred
    assert find_guider([guider], velocities, velocity) is None


def test_gradients_of_a_guider_are_those_of_its_function():
    velocities = branches(2, 3, 4, dtype=torch.float64)
    velocity = AdaptiveProjectedGuidance(guidance_scale=4.0, eta=0.5).forward(*velocities).pred
    guiders = [AdaptiveProjectedGuidance(guidance_scale=4.0, eta=0.5)]
    found = find_guider(guiders, velocities, velocity)
    leaves = [x.requires_grad_() for x in velocities]
    assert torch.autograd.gradcheck(lambda *both: found(both), leaves)


# Gradients.


@pytest.mark.parametrize("rescaling", RESCALINGS)
def test_gradients_are_those_of_the_formula(rescaling):
    velocities = [x.requires_grad_() for x in branches(2, 3, 4, dtype=torch.float64)]
    guidance = Guidance(0, 4.5, rescaling=rescaling)
    assert torch.autograd.gradcheck(lambda *both: guidance(both), velocities)
