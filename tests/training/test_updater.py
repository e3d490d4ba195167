"""An update is the weighted mean's gradient whatever the micro-batches; finite, or not taken."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mteditflow.training import Updater


def linear_rows(seed=0, rows=12):
    """A model, and quantities of rows under it with weights, as functions of the row's index."""
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(2, rows, 3, generator=generator)
    weight = (torch.rand(rows, generator=generator) > 0.3).float()
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 3, generator=generator))

    def losses(part):
        loss = (model(x[part]) - target[part]).square().mean(dim=1)
        return {"loss": loss, "size": x[part].norm(dim=1)}, weight[part]

    return model, losses, weight


def stepped(parts, *, max_grad_norm=1e9, seed=0):
    model, losses, _ = linear_rows(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    updater = Updater(optimizer, lambda: list(model.parameters()), max_grad_norm=max_grad_norm)
    update = updater.step(parts, losses)
    return before - model.weight.detach(), update


@given(size=st.sampled_from([1, 2, 5, 8, 12]), seed=st.integers(0, 5))
def test_micro_batches_do_not_change_the_gradient(size, seed):
    gradient, update = stepped(torch.arange(12).split(size), seed=seed)
    model, losses, weight = linear_rows(seed)
    quantities, _ = losses(torch.arange(12))
    expected = (weight * quantities["loss"]).sum() / weight.sum()
    (wanted,) = torch.autograd.grad(expected, model.weight)
    assert torch.allclose(gradient, wanted, rtol=1e-6, atol=1e-6)
    assert update.taken
    assert update.reason == ""
    assert update.means["loss"] == pytest.approx(expected.item(), rel=1e-6)
    size_mean = float((weight * quantities["size"]).sum() / weight.sum())
    assert update.means["size"] == pytest.approx(size_mean, rel=1e-6)
    assert update.grad_norm == pytest.approx(float(wanted.norm()), rel=1e-5)


def test_a_row_of_no_weight_is_as_if_it_were_not_there():
    weight = linear_rows()[2]
    kept = weight.nonzero().flatten()
    all_rows, _ = stepped([torch.arange(12)])
    counted, _ = stepped([kept])
    assert torch.allclose(all_rows, counted, atol=1e-7)


def test_gradients_are_clipped_after_the_mean():
    whole, unclipped = stepped([torch.arange(12)])
    clipped, update = stepped(torch.arange(12).split(5), max_grad_norm=0.01)
    assert update.grad_norm == pytest.approx(unclipped.grad_norm, rel=1e-5)
    assert clipped.norm() == pytest.approx(0.01, rel=1e-4)
    assert torch.allclose(clipped / clipped.norm(), whole / whole.norm(), atol=1e-5)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_is_not_taken(broken):
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    updater = Updater(optimizer, lambda: [weight], max_grad_norm=1.0)

    def losses(part):
        if broken == "loss":
            return {"loss": weight.log() * torch.tensor([1.0, math.inf])[part]}, torch.ones(1)
        return {"loss": (weight - 2).sqrt() + 0 * part}, torch.ones(1)  # finite; slope is not

    update = updater.step(torch.arange(2).split(1), losses)
    assert not update.taken
    assert broken in update.reason
    assert "not finite" in update.reason
    assert weight.item() == 2.0
    assert weight.grad is None
    assert not optimizer.state
    good = updater.step([torch.arange(1)], lambda part: ({"loss": weight}, torch.ones(1)))
    assert good.taken
    assert weight.item() < 2.0


def test_rows_without_weight_alone_are_no_update():
    weight = nn.Parameter(torch.ones(1))
    updater = Updater(torch.optim.SGD([weight], lr=1.0), lambda: [weight], max_grad_norm=1.0)
    update = updater.step([torch.arange(1)], lambda part: ({"loss": weight}, torch.zeros(1)))
    assert (update.taken, update.reason) == (False, "no row has a weight")
    assert weight.item() == 1.0


def test_errors():
    with pytest.raises(ValueError, match="max_grad_norm: expected a finite number in"):
        Updater(torch.optim.SGD([nn.Parameter(torch.ones(1))]), list, max_grad_norm=0.0)
