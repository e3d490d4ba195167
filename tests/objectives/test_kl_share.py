"""The KL on a share of the units: unbiased, spread evenly, and fewer forward passes."""

import pytest
import torch
from objective_worlds import (
    NOISE_LEVEL,
    Recorded,
    advantages,
    clean_samples,
    gradients,
    key,
    recorded_trajectory,
    validity,
)

from mteditflow.objectives import AWM, DPO, DPPO, GRPO, NFT, CleanSamples, Guard, Renoise, RoundKey
from tests.loops import some

SHARE = 0.25
KINDS = {
    "nft": lambda **x: NFT(renoise=Renoise(levels=2), **x),
    "awm": AWM,
    "grpo": lambda **x: GRPO(stochastic_steps=3, noise_level=NOISE_LEVEL, **x),
    "guard": lambda **x: Guard(stochastic_steps=3, noise_level=NOISE_LEVEL, **x),
    "dppo": lambda **x: DPPO(stochastic_steps=3, noise_level=NOISE_LEVEL, **x),
}


def samples_of(objective, velocity):
    if objective.samples_with == "old":
        return clean_samples()
    return recorded_trajectory(velocity.policies["old"])


def drawn(objective, samples, **options):
    (units,) = objective.units(samples, advantages(), validity(), **options)
    return units


def in_parts(objective, velocity, samples, units, size):
    """Loss and KL of all units, computed in micro-batches."""
    outputs = [objective(velocity, samples, part) for part in units.split(size)]
    loss = torch.cat([output.loss for output in outputs])
    return loss, torch.cat([output.metrics["kl"] for output in outputs])


@pytest.mark.parametrize("name", KINDS)
def test_the_kl_of_the_share_averages_to_the_whole_kl(name, monkeypatch):
    """Four starts take every unit once: their mean is the whole KL, and so is its gradient."""
    velocity, whole = Recorded(), KINDS[name](kl_coef=0.3)
    samples, part = samples_of(whole, velocity), KINDS[name](kl_coef=0.3, kl_share=SHARE)
    units = drawn(whole, samples, key=RoundKey(0, 0))
    expected = whole(velocity, samples, units)
    means, slopes, taken = [], [], []
    number = RoundKey.number
    for quarter in range(4):
        start = int((quarter + 0.5) * 2**61)
        monkeypatch.setattr(
            RoundKey, "number", lambda s, p, *x, a=start: a if p == "kl" else number(s, p, *x)
        )
        own = drawn(part, samples, key=RoundKey(0, 0))
        assert torch.equal(own.rows, units.rows)
        taken.append(own.kl_weight > 0)
        assert set(own.kl_weight.tolist()) <= {0.0, 4.0}
        output = part(velocity, samples, own)
        rest = output.loss - 0.3 * output.metrics["kl"]
        torch.testing.assert_close(rest, expected.loss - 0.3 * expected.metrics["kl"])
        means.append(output.metrics["kl"])
        slopes.append(gradients(output.loss.sum(), velocity.parameters()))
    assert torch.stack(taken).sum(dim=0).eq(1).all()
    torch.testing.assert_close(torch.stack(means).mean(dim=0), expected.metrics["kl"])
    slope = gradients(expected.loss.sum(), velocity.parameters())
    torch.testing.assert_close(torch.stack(slopes).mean(dim=0), slope)


@pytest.mark.parametrize("name", ["nft", "grpo"])
@pytest.mark.parametrize("share", [0.25, 0.3, 1 / 3])
def test_each_unit_is_taken_with_probability_share(name, share):
    objective = KINDS[name](kl_coef=1.0, kl_share=share)
    samples, rounds = samples_of(objective, Recorded()), 400
    taken = torch.stack(
        [drawn(objective, samples, key=RoundKey(7, r)).kl_weight > 0 for r in range(rounds)]
    ).double()
    deviation = (taken.mean(dim=0) - share).abs() / (share * (1 - share) / rounds) ** 0.5
    assert deviation.max() < 4.5
    trajectory = drawn(objective, samples, key=RoundKey(7, 0)).rows[:, 0, 0]
    for b in some(trajectory.unique()):
        own = taken[:, trajectory == b]
        assert ((own.sum(dim=1) - share * own.shape[1]).abs() < 1).all()


@pytest.mark.parametrize("name", KINDS)
def test_the_reference_is_evaluated_on_the_share_alone(name):
    """A micro-batch without any evaluates one row, of weight 0."""
    velocity, objective = Recorded(), KINDS[name](kl_coef=1.0, kl_share=SHARE)
    samples = samples_of(objective, velocity)
    units = drawn(objective, samples, key=key())
    for part in some(units.split(4)):
        velocity.calls.clear()
        objective(velocity, samples, part, old_is_current=True)
        rows = {call[0]: len(call[1]) for call in velocity.calls}
        wanted = max(int((part.kl_weight > 0).sum()), 1)
        assert rows == {"current": len(part), "reference": wanted}


@pytest.mark.parametrize("name", KINDS)
def test_micro_batches_and_ranks_draw_the_same_units(name):
    velocity, objective = Recorded(), KINDS[name](kl_coef=1.0, kl_share=SHARE)
    samples = samples_of(objective, velocity)
    units = drawn(objective, samples, key=RoundKey(3, 1))
    loss, kl = in_parts(objective, velocity, samples, units, len(units))
    for size in (1, 3):
        for found, whole in zip(
            in_parts(objective, velocity, samples, units, size), (loss, kl), strict=True
        ):
            torch.testing.assert_close(found, whole)
    second, clean = units.rows[:, 0, 0] >= 4, isinstance(samples, CleanSamples)
    half = (
        CleanSamples(samples.clean[4:], samples.group[4:], samples.turn_mask[4:])
        if clean
        else (samples.select(slice(4, 8)))
    )
    (own,) = objective.units(half, advantages()[4:], validity()[4:], key=RoundKey(3, 1, first=4))
    assert torch.equal(own.kl_weight, units.kl_weight[second])


def test_an_idle_unit_evaluates_the_reference_without_effect():
    velocity, objective = Recorded(), KINDS["nft"](kl_coef=1.0, kl_share=SHARE)
    samples = clean_samples()
    idle = drawn(objective, samples, key=key()).idle()
    output = objective(velocity, samples, idle)
    assert velocity.asked().count("reference") == 1
    assert output.loss.tolist() == [0.0]
    assert output.metrics["kl"].tolist() == [0.0]
    assert not gradients(output.loss.sum(), velocity.parameters()).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NFT(kl_share=0.5), "kl_share: has an effect only where kl_coef > 0, got 0.5"),
        (lambda: GRPO(kl_share=0.5), "kl_share: has an effect only where kl_coef > 0, got 0.5"),
        (lambda: NFT(kl_coef=1.0, kl_share=0.0), r"kl_share: expected .* in \(0, 1\], got 0.0"),
        (lambda: NFT(kl_coef=1.0, norm_coef=1.0, kl_share=0.5), "expected 1 where norm_coef > 0"),
        (lambda: DPO(kl_coef=1.0, kl_share=0.5), "kl_share: expected 1 for DPO"),
    ],
)
def test_a_share_without_an_effect_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
