"""An update is the mean's gradient over all valid units, however they are cut; or is not taken."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mteditflow.objectives import Output, Units
from mteditflow.training import Updater, most_parts

COUNT = 12


def units_of(rows, count=None):
    """Units of single rows, whose index is their trajectory."""
    rows = torch.as_tensor(rows)
    place = torch.stack([rows, torch.zeros_like(rows), torch.zeros_like(rows)], dim=1)
    mask = torch.ones(len(rows), 1, dtype=torch.bool)
    return Units(place[:, None], mask, None, None, len(rows) if count is None else count)


def linear_model(seed=0, rows=COUNT):
    """A model, its losses on units, and which rows weigh something."""
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(2, rows, 3, generator=generator)
    kept = torch.rand(rows, generator=generator) > 0.3
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 3, generator=generator))

    def losses(part):
        rows = part.rows[:, 0, 0]
        loss = (model(x[rows]) - target[rows]).square().mean(dim=1)
        exists = part.mask.any(dim=1)
        size = x[rows].norm(dim=1)
        return Output(torch.where(exists, loss, 0), {"size": torch.where(exists, size, 0)})

    return model, losses, kept


def stepped(parts, count, *, max_grad_norm=1e9, seed=0):
    model, losses, _ = linear_model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    updater = Updater(optimizer, lambda: list(model.parameters()), max_grad_norm=max_grad_norm)
    update = updater.step(parts, losses, count=count)
    return before - model.weight.detach(), update


@given(
    size=st.sampled_from([1, 2, 5, 8, 12]),
    idle=st.integers(0, 3),
    left_out=st.integers(0, 7),
    seed=st.integers(0, 5),
)
def test_micro_batches_do_not_change_the_gradient(size, idle, left_out, seed):
    """It is the sum over the units given, over the count of all valid ones."""
    model, losses, kept = linear_model(seed)
    units = units_of(kept.nonzero().flatten(), int(kept.sum()) + left_out)
    needed = -(-len(units) // size)
    gradient, update = stepped(units.split(size, parts=needed + idle), units.count, seed=seed)
    output = losses(units)
    expected = output.loss.sum() / units.count
    (wanted,) = torch.autograd.grad(expected, model.weight)
    assert torch.allclose(gradient, wanted, rtol=1e-6, atol=1e-6)
    assert update.outcome == "taken"
    assert update.reason == ""
    assert update.means["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert update.means["size"] == pytest.approx(float(output.metrics["size"].mean()), rel=1e-6)
    assert update.grad_norm == pytest.approx(float(wanted.norm()), rel=1e-5)


def test_a_masked_unit_is_as_if_it_were_not_there():
    kept = linear_model()[2]
    whole = units_of(range(COUNT))
    masked = dataclasses.replace(whole, mask=kept[:, None], count=int(kept.sum()))
    all_rows, one = stepped([masked], masked.count)
    counted, other = stepped([units_of(kept.nonzero().flatten())], masked.count)
    assert torch.allclose(all_rows, counted, atol=1e-7)
    assert one.means == pytest.approx(other.means)


def test_gradients_are_clipped_after_the_mean():
    units = units_of(range(COUNT))
    whole, unclipped = stepped([units], COUNT)
    clipped, update = stepped(units.split(5), COUNT, max_grad_norm=0.01)
    assert update.grad_norm == pytest.approx(unclipped.grad_norm, rel=1e-5)
    assert clipped.norm() == pytest.approx(0.01, rel=1e-4)
    assert torch.allclose(clipped / clipped.norm(), whole / whole.norm(), atol=1e-5)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_is_not_taken(broken):
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    updater = Updater(optimizer, lambda: [weight], max_grad_norm=1.0)

    def losses(part):
        row = part.rows[:, 0, 0]
        if broken == "loss":
            return Output(weight.log() * torch.tensor([1.0, math.inf])[row], {})
        return Output((weight - 2).sqrt() + 0 * row, {})  # finite; slope is not

    update = updater.step(units_of([0, 1]).split(1), losses, count=2)
    assert update.outcome == "skipped"
    assert broken in update.reason
    assert "not finite" in update.reason
    assert weight.item() == 2.0
    assert weight.grad is None
    assert not optimizer.state
    good = updater.step([units_of([0])], lambda part: Output(weight * 1, {}), count=1)
    assert good.outcome == "taken"
    assert weight.item() < 2.0


def test_no_units_are_no_update_and_move_nothing():
    """Not even by what the optimizer does without a gradient, such as momentum or decay."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    updater = Updater(optimizer, lambda: [weight], max_grad_norm=1.0)
    updater.step([units_of([0])], lambda part: Output(weight * 1, {}), count=1)
    moved, steps = weight.item(), optimizer.state[weight]["step"].item()
    update = updater.step([], lambda part: Output(weight * 1, {}), count=3)
    assert (update.outcome, update.reason, dict(update.means)) == ("empty", "", {})
    assert math.isnan(update.grad_norm)
    assert (weight.item(), optimizer.state[weight]["step"].item()) == (moved, steps)
    units = units_of([])
    assert units.split(4) == []
    assert most_parts(units, 4) == 0


def test_a_gradient_of_0_is_a_flat_update_and_moves_nothing():
    """Decay and momentum of an earlier step would move the weights without a reason."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    updater = Updater(optimizer, lambda: [weight], max_grad_norm=1.0)
    updater.step([units_of([0])], lambda part: Output(weight * 1, {}), count=1)
    moved, steps = weight.item(), optimizer.state[weight]["step"].item()
    update = updater.step(
        [units_of([0, 1])],
        lambda part: Output(weight * 0 + torch.tensor([3.0, 5.0]), {"kl": torch.ones(2)}),
        count=4,
    )
    assert (update.outcome, update.grad_norm, update.reason) == ("flat", 0.0, "")
    assert dict(update.means) == {"loss": 8 / 4, "kl": 1.0}
    assert (weight.item(), optimizer.state[weight]["step"].item()) == (moved, steps)
    assert weight.grad is None


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (4, 1), (5, 2), (12, 3)])
def test_parts_that_the_largest_rank_needs(count, parts):
    assert most_parts(units_of(range(count)), 4) == parts == len(units_of(range(count)).split(4))


def test_errors():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight])
    with pytest.raises(ValueError, match="max_grad_norm: expected a finite number in"):
        Updater(optimizer, list, max_grad_norm=0.0)
    updater = Updater(optimizer, lambda: [weight], max_grad_norm=1.0)
    with pytest.raises(ValueError, match="count: expected at least the 2 units given, got 1"):
        updater.step([units_of([0, 1])], lambda part: Output(weight * torch.ones(2), {}), count=1)
    with pytest.raises(ValueError, match="count: expected an integer"):
        updater.step([], lambda part: Output(weight, {}), count=-1)
    with pytest.raises(ValueError, match="size: expected an integer"):
        most_parts(units_of([0]), 0)
