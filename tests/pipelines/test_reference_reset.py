"""A reference that is reset: it is the current policy of then, from every start, and resumes."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from mteditflow.pipelines import LoraPolicies, Start
from tests.loops import some

CONFIG = LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
X = torch.linspace(-1, 1, 8).view(2, 4)
STARTS = {
    "base": None,
    "continued": {},
    "continued to the start": {"reference": "start"},
    "frozen": {"frozen": True},
    "frozen to the start": {"frozen": True, "reference": "start"},
}


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(name, **options):
    """Policies whose current one has moved from its start, with a layer that has no adapter."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with torch.no_grad():
        for seed, weight in enumerate(model.parameters()):
            weight.copy_(drawn(seed, *weight.shape))
    weights = {"0.lora_A.weight": drawn(7, 2, 4), "0.lora_B.weight": drawn(8, 4, 2)}
    start = None if STARTS[name] is None else Start(weights, **STARTS[name])
    return LoraPolicies(model, CONFIG, start=start, **options)


def move(policies, seed):
    with torch.no_grad():
        for weight in policies.parameters():
            weight.add_(drawn(seed, *weight.shape))


def output(policies, policy):
    with policies.use(policy), torch.no_grad():
        return policies.model(X)


@pytest.mark.parametrize("name", STARTS)
def test_the_reference_is_the_current_policy_of_the_last_reset(name):
    """Before the first reset it is the one of the start, as without a slot for it."""
    policies, plain = made(name, resettable=True), made(name)
    for own in (policies, plain):
        move(own, 1)
    assert torch.equal(output(policies, "reference"), output(plain, "reference"))
    assert torch.equal(output(policies, "current"), output(plain, "current"))
    assert not policies.reference_was_reset
    for seed in (2, 3):
        then = output(policies, "current")
        assert not torch.equal(output(policies, "reference"), then)
        policies.reset_reference()
        move(policies, seed)
        assert torch.equal(output(policies, "reference"), then)
        assert not torch.equal(output(policies, "current"), then)
    assert policies.reference_was_reset
    assert not any(own.requires_grad for own in some(policies._parameters("reference")))
    assert len(policies.parameters()) == len(plain.parameters()) > 0


@pytest.mark.parametrize("name", STARTS)
def test_a_reset_reference_goes_on_from_its_state(name):
    policies = made(name, resettable=True)
    move(policies, 1)
    policies.reset_reference()
    move(policies, 2)
    again = made(name, resettable=True, seed=5)
    again.load_state_dict(policies.state_dict("reference"), "reference")
    again.load_state_dict(policies.state_dict())
    assert again.reference_was_reset
    for policy in ("reference", "current"):
        assert torch.equal(output(again, policy), output(policies, policy)), policy


def test_a_reset_leaves_the_other_policies_alone():
    policies = made("base", resettable=True, ema=True)
    move(policies, 1)
    before = [policies.state_dict(policy) for policy in ("current", "old", "ema")]
    policies.reset_reference()
    move(policies, 2)
    policies.load_state_dict(before[0])
    after = [policies.state_dict(policy) for policy in ("current", "old", "ema")]
    for ours, theirs in some(zip(before, after, strict=True)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(x, theirs[key]) for key, x in some(ours.items()))
    assert set(policies.state_dict("reference")) == set(before[0])


def test_what_cannot_be_reset_is_refused():
    with pytest.raises(ValueError, match="resettable: expected True"):
        made("base").reset_reference()
    policies = made("base", resettable=True)
    with pytest.raises(ValueError, match="expected a reference that was reset"):
        policies.state_dict("reference")
    with policies.use("old"), pytest.raises(RuntimeError, match="outside of use"):
        policies.reset_reference()
    assert not policies.reference_was_reset
