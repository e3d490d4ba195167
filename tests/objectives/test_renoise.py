"""Re-noising: distributions against closed forms, what a group shares, what is refused."""

import math
import re
from statistics import NormalDist

import pytest
import torch
from objective_worlds import Recorded, key, recorded_trajectory

from mteditflow.objectives import NFT, Buckets, CleanSamples, Renoise, RoundKey
from mteditflow.objectives.forward import renoise
from tests.loops import some

MANY = 2000
GROUPS = torch.arange(MANY) // 4


def drawn(how, *, turns=1, samples=None, source=None):
    """Units of many trajectories and what they are re-noised to."""
    samples = samples or CleanSamples(torch.ones(MANY, turns, 2), GROUPS)
    objective = NFT(renoise=how)
    values = torch.ones(len(samples.group))
    (units,) = objective.units(samples, values, key=source or RoundKey(0, 0))
    return units, renoise(samples, units, how)


def largest_gap(sample, cdf):
    """Kolmogorov-Smirnov distance of a sample to a distribution."""
    ordered = sample.double().sort().values
    expected = torch.tensor([cdf(float(x)) for x in ordered])
    steps = torch.arange(len(ordered) + 1) / len(ordered)
    return float(torch.max((steps[1:] - expected).abs(), (steps[:-1] - expected).abs()).max())


def shifted(shift):
    """Distribution of shift u / (1 + (shift - 1) u): the inverse is the shift by 1 / shift."""
    return lambda s: s / (s + (1 - s) * shift)


def logit_normal(mean, std, shift=1.0):
    def cdf(s):
        u = shifted(shift)(s)
        return NormalDist(mean, std).cdf(math.log(u / (1 - u)))

    return cdf


# distributions


@pytest.mark.parametrize(
    ("how", "cdf"),
    [
        (Renoise(), lambda s: s),
        (Renoise(shift=3.0), shifted(3.0)),
        (Renoise(shift=0.5), shifted(0.5)),
        (Renoise(distribution="logit_normal"), logit_normal(0, 1)),
        (Renoise(distribution="logit_normal", mean=-0.5, std=0.7), logit_normal(-0.5, 0.7)),
        (
            Renoise(distribution="logit_normal", mean=0.5, std=2.0, shift=3.0),
            logit_normal(0.5, 2.0, 3.0),
        ),
    ],
)
@pytest.mark.parametrize("stratified", [False, True])
def test_flow_times_have_their_distribution(how, cdf, stratified):
    options = {"levels": 2, "stratified": stratified}
    how = Renoise(**{**vars(how), **options})
    _, states = drawn(how)
    assert len(states.sigma) == 2 * MANY
    assert largest_gap(states.sigma, cdf) < 1.95 / math.sqrt(2 * MANY)  # 0.1 % of draws are beyond


def test_logits_have_their_mean_and_std():
    _, states = drawn(Renoise(distribution="logit_normal", mean=-1.0, std=0.5))
    logit = torch.logit(states.sigma.double())
    assert float(logit.mean()) == pytest.approx(-1.0, abs=4 * 0.5 / math.sqrt(MANY))
    assert float(logit.std()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * MANY))


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_levels_of_a_turn_fall_into_one_stratum_each(distribution):
    levels = 5
    how = Renoise(distribution=distribution, levels=levels, stratified=True, shift=2.0)
    units, states = drawn(how)
    bounds = how.flow_time(torch.arange(levels + 1) / levels)
    assert torch.equal(bounds[[0, -1]], torch.tensor([0.0, 1.0]))
    level = units.rows[:, 0, 2]
    assert bool((bounds[level] - 1e-6 <= states.sigma).all())
    assert bool((states.sigma <= bounds[level + 1] + 1e-6).all())
    turns = level.view(MANY, levels)
    assert torch.equal(turns, torch.arange(levels).expand(MANY, levels))


def test_without_strata_levels_are_independent():
    _, states = drawn(Renoise(levels=2))
    first, second = states.sigma.double().view(MANY, 2).unbind(1)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / math.sqrt(MANY)


def test_strata_lower_the_variance_of_a_turns_mean():
    plain, even = (
        float(drawn(Renoise(levels=4, stratified=s))[1].sigma.view(MANY, 4).mean(1).var())
        for s in (False, True)
    )
    assert plain == pytest.approx(1 / 12 / 4, rel=0.15)
    assert even == pytest.approx(1 / 12 / 4**3, rel=0.15)


@pytest.mark.parametrize("stratified", [False, True])
def test_a_grid_visits_stored_flow_times_alone_and_equally_often(stratified):
    samples = recorded_trajectory(Recorded().policies["old"])
    how = Renoise(distribution="grid", levels=400, stratified=stratified)
    _, states = drawn(how, samples=samples)
    grid = samples.sigmas[0, :-1].float()
    assert torch.equal(states.sigma.unique(), grid.sort().values)
    counts = torch.stack([(states.sigma == s).sum() for s in grid]).double()
    expected = len(states.sigma) / len(grid)
    if stratified:
        assert counts.tolist() == [expected] * len(grid)
    else:
        assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi square, 3, 0.1 %


def test_a_grid_is_that_of_the_row_s_own_turn():
    samples = recorded_trajectory(Recorded().policies["old"])
    sigmas = samples.sigmas.clone()
    sigmas[1] = torch.tensor([0.9, 0.7, 0.5, 0.2, 0.1])
    samples = type(samples)(**{**vars(samples), "sigmas": sigmas})
    units, states = drawn(Renoise(distribution="grid", levels=50), samples=samples)
    for turn in range(3):
        own = states.sigma[units.rows[:, 0, 1] == turn]
        assert set(own.tolist()) == set(sigmas[turn, :-1].float().tolist())


def test_a_grid_needs_stored_steps():
    with pytest.raises(ValueError, match="renoise: expected samples with stored steps for the"):
        drawn(Renoise(distribution="grid"))


# the path, and the noise


def test_states_lie_on_the_path_from_clean_latent_to_noise():
    clean = torch.randn(MANY, 1, 2, generator=key())
    _, states = drawn(Renoise(), samples=CleanSamples(clean, GROUPS))
    sigma, own = states.sigma[:, None], clean[:, 0]
    noise = states.target + own
    torch.testing.assert_close(states.x_t, (1 - sigma) * own + sigma * noise)
    assert states.x_t.dtype == states.target.dtype == states.sigma.dtype == torch.float32
    assert largest_gap(noise.flatten(), NormalDist().cdf) < 1.95 / math.sqrt(2 * MANY)
    assert abs(float((noise[:, 0] * noise[:, 1]).mean())) < 4 / math.sqrt(MANY)
    centered = states.sigma - 0.5
    for moment in (noise[:, 0], noise[:, 0].square() - 1):  # noise is independent of flow time
        assert abs(float((centered * moment).mean())) < 4 * 0.29 * 1.5 / math.sqrt(MANY)


def test_half_precision_latents_are_noised_in_float32():
    clean = torch.randn(4, 1, 2, generator=key()).bfloat16()
    _, states = drawn(Renoise(), samples=CleanSamples(clean, torch.zeros(4).long()))
    assert states.x_t.dtype == states.target.dtype == torch.float32


def test_noise_is_that_of_the_units_however_often_it_is_asked_for():
    units, states = drawn(Renoise())
    samples = CleanSamples(torch.ones(MANY, 1, 2), GROUPS)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    again = renoise(samples, units, Renoise())
    part = renoise(samples, units[3:5], Renoise())
    assert torch.equal(torch.get_rng_state(), before)
    for one, other, own in some(zip(states, again, part, strict=True)):
        assert torch.equal(one, other)
        assert torch.equal(one[3:5], own)


# shared


@pytest.mark.parametrize("source", [lambda: RoundKey(0, 0), key])
@pytest.mark.parametrize("shared", [False, True])
def test_members_of_a_group_share_flow_time_and_noise_at_a_turn_and_level(shared, source):
    count, turns, levels = 64, 3, 2
    group = torch.arange(count) % 16 - 5
    samples = CleanSamples(torch.zeros(count, turns, 2), group)
    how = Renoise(levels=levels, shared=shared)
    units, states = drawn(how, samples=samples, source=source())
    places = {}
    for (b, n, k), s, noise in zip(
        units.rows[:, 0].tolist(), states.sigma.tolist(), states.target.tolist(), strict=True
    ):
        places.setdefault((int(group[b]), n, k), set()).add((s, *noise))
    assert len(places) == 16 * turns * levels
    sizes = {len(own) for own in places.values()}
    assert sizes == ({1} if shared else {4})
    everything = set().union(*places.values())
    assert len(everything) == sum(len(own) for own in places.values())  # none is met twice
    assert len({s for s, *_ in everything}) == len(everything)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_groups_of_unsigned_ids_share_the_noise_of_signed_ones(dtype):
    group, how = torch.tensor([3, 3, 7]), Renoise(shared=True)
    clean = torch.zeros(3, 1, 2)
    _, expected = drawn(how, samples=CleanSamples(clean, group))
    _, found = drawn(how, samples=CleanSamples(clean, group.to(dtype)))
    assert torch.equal(found.target, expected.target)
    both = Buckets([CleanSamples(clean, group), CleanSamples(clean, group.to(dtype))])
    assert both.group.tolist() == [3, 3, 7, 3, 3, 7]


def test_shared_flow_times_can_be_stratified():
    units, states = drawn(Renoise(levels=4, shared=True, stratified=True))
    level = units.rows[:, 0, 2]
    assert torch.equal((states.sigma * 4).long().clamp(max=3), level)
    by_group = states.sigma.view(MANY // 4, 4, 4)  # group, member, level
    assert torch.equal(by_group, by_group[:, :1].expand_as(by_group))


# errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"distribution": "normal"},
            ValueError,
            "distribution: expected one of ['uniform', 'logit_normal', 'grid'], got 'normal'",
        ),
        ({"levels": 0}, ValueError, "levels: expected an integer >= 1, got 0"),
        ({"levels": 1.0}, TypeError, "levels: expected an integer, got float"),
        ({"shift": 0.0}, ValueError, "shift: expected a finite number in (0, inf], got 0.0"),
        ({"std": 0.0}, ValueError, "std: expected a finite number in (0, inf], got 0.0"),
        ({"mean": math.nan}, ValueError, "mean: expected a finite number"),
        (
            {"mean": 0.5},
            ValueError,
            "mean, std: expected 0.0 and 1.0 for 'uniform', which has none, got 0.5 and 1.0",
        ),
        ({"distribution": "grid", "std": 2.0}, ValueError, "mean, std: expected 0.0 and 1.0 for"),
        (
            {"distribution": "grid", "shift": 3.0},
            ValueError,
            "shift: expected 1.0 for 'grid', got 3.0",
        ),
        ({"stratified": True}, ValueError, "levels: expected 2 or more where stratified, got 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        Renoise(**options)


def test_extreme_quantiles_stay_flow_times():
    ends = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24, 1.0])
    for how in (
        Renoise(shift=5.0),
        Renoise(distribution="logit_normal", mean=3.0, std=4.0),
        Renoise(distribution="logit_normal", mean=-30.0, shift=0.01),
    ):
        sigma = how.flow_time(ends)
        assert bool(((sigma >= 0) & (sigma <= 1)).all())
        assert sigma[[0, -1]].tolist() == [0.0, 1.0]
        assert torch.equal(sigma, sigma.sort().values)
