"""Advantages of latent tokens in units: constants, softmax, what is left out, what refuses them."""

import pytest
import torch

from mteditflow.objectives import (
    AWM,
    NFT,
    OBJECTIVES,
    CleanSamples,
    FlowAWR,
    RoundKey,
)
from tests.loops import some

B, N, L, C = 4, 2, 6, 3
GROUP = torch.tensor([0, 0, 1, 1])
KEY = RoundKey(0, 0)
TOKENS = {
    "nft": NFT(),
    "nft, plain": NFT(loss="plain", kl_coef=0.1),
    "flow_awr": FlowAWR(temperature=0.7),
    "flow_awr, linear": FlowAWR(temperature=None),
    "flow_awr, exact": FlowAWR(form="exact"),
    "awm": AWM(clip_low=0.1, clip_high=0.1),
    "awm, huber": AWM(weighting="huber", old_kl_coef=0.5),
}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Policy(torch.nn.Module):
    """A velocity of the latent that is another for every policy."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(rand(C, C, seed=1))

    def forward(self, policy, x_t, sigma, at):
        shift = {"current": 0.0, "old": 0.01, "reference": 0.02}[policy]
        return x_t.double() @ (self.theta + shift)


SAMPLES = CleanSamples(rand(B, N, L, C), GROUP)


def trained(objective, advantage, valid=None):
    """Loss of each unit, gradient, and the units."""
    policy = Policy()
    (units,) = objective.units(SAMPLES, advantage, valid, key=KEY)
    parts = [objective(policy, SAMPLES, part) for part in units.split(3)]
    loss = torch.cat([part.loss for part in parts])
    (loss.sum() / units.count).backward()
    return loss.detach(), policy.theta.grad, units


@pytest.mark.parametrize("name", TOKENS)
def test_one_that_is_equal_over_tokens_is_that_of_the_turn(name):
    advantage = rand(B, N, seed=2)
    valid = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    over_tokens = advantage[..., None, None].expand(B, N, L, 1)
    (loss, gradient, _), (theirs, other, _) = (
        trained(TOKENS[name], x, valid) for x in (advantage, over_tokens)
    )
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(gradient, other)


def test_the_softmax_of_a_group_is_taken_token_by_token():
    advantage = rand(B, N, L, 1, seed=3)
    (units,) = FlowAWR(temperature=0.7).units(SAMPLES, advantage, key=KEY)
    for (b, n, _), own in some(zip(units.rows[:, 0].tolist(), units.advantage[:, 0], strict=True)):
        members = (GROUP[b] == GROUP).nonzero()[:, 0]
        weight = (advantage[:, n] / 0.7).exp()
        torch.testing.assert_close(own, weight[b] / weight[members].mean(dim=0) - 1)


def test_a_row_is_left_out_where_all_of_its_tokens_are_zero():
    advantage = torch.zeros(B, N, L, 1, dtype=torch.float64)
    advantage[1, 0, 4] = 0.5
    (units,) = AWM().units(SAMPLES, advantage, key=KEY)
    assert units.rows[:, 0].tolist() == [[1, 0, 0]]
    assert units.count == B * N
    idle = units.split(1, parts=2)[1]
    assert idle.advantage.shape == (1, 1, L, 1)
    assert AWM()(Policy(), SAMPLES, idle).loss.tolist() == [0]


def test_a_lost_turn_is_never_read():
    advantage = rand(B, N, L, 1, seed=4)
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[2, 1], advantage[2, 1] = False, torch.nan
    loss, gradient, units = trained(NFT(), advantage, valid)
    assert len(units) == B * N - 1
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    with pytest.raises(
        ValueError, match=r"^advantage: expected finite values where valid, got nan"
    ):
        NFT().units(SAMPLES, advantage, key=KEY)


@pytest.mark.parametrize("name", [name for name, kind in OBJECTIVES.items() if kind.card.rewarded])
def test_whether_an_objective_takes_them_is_on_its_card(name):
    objective, advantage = OBJECTIVES[name](), rand(B, N, L, 1)
    if objective.card.tokens:
        assert objective.units(SAMPLES, advantage, key=KEY)
        return
    with pytest.raises(ValueError, match=r"^(advantage|samples): expected"):
        objective.units(SAMPLES, advantage, key=KEY)
