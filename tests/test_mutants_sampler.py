"""What mutation testing found unproved of rollouts."""

import pytest
import torch

import mteditflow as mt


def test_generators_are_made_on_the_device_that_is_asked_for():
    with pytest.raises(RuntimeError, match="META"):
        mt.trajectory_generators(0, 1, device="meta")


def test_a_rollout_of_float64_draws_float64_noise():
    x = torch.zeros(1, 1, 3, dtype=torch.float64)
    rolled = mt.rollout(
        lambda x_t, sigma, *, reference, turn: torch.zeros_like(x_t),
        x,
        torch.tensor([1.0, 0.5], dtype=torch.float64),
        solver=mt.DanceSDE(1.0),
        generators=mt.trajectory_generators(3, 1),
        reduction="sum",
    )
    z = torch.randn(3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(rolled.clean[0, 0], 0.5**0.5 * z, rtol=1e-12, atol=0)


def test_the_grid_goes_where_the_noise_is():
    """A grid on a device without values cannot be copied to the noise's: the rollout tries to."""
    with pytest.raises((NotImplementedError, RuntimeError), match="Cannot copy out of meta"):
        mt.rollout(
            lambda x_t, sigma, *, reference, turn: x_t,
            torch.zeros(1, 1, 3),
            torch.ones(2, device="meta"),
            solver=mt.ODE(),
            generators=mt.trajectory_generators(0, 1),
            reduction="sum",
        )
