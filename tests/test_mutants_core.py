"""What mutation testing found unproved: each test here kills mutants that all others let live."""

import pytest
import torch

import mteditflow as mt


def test_masked_mean_of_a_scalar_loss():
    assert mt.masked_mean(torch.tensor(2.0)) == 2
    assert mt.masked_mean(torch.tensor(2.0), torch.tensor(True)) == 2


@pytest.mark.parametrize("fuse", [mt.fuse_advantages, mt.fuse_rewards])
def test_fusion_checks_the_group(fuse):
    reward = {"a": torch.rand(2)}
    with pytest.raises(TypeError, match="group: expected integer ids"):
        fuse(reward, {"a": 1.0}, torch.rand(2))
    with pytest.raises(ValueError, match="group: expected shape"):
        fuse(reward, {"a": 1.0}, torch.zeros(3, dtype=torch.int64))


def test_metrics_of_half_precision_scores_are_float32():
    success = torch.ones(1000, 1, dtype=torch.float16)
    success[0] = 0
    assert mt.marginal_success(success).dtype == torch.float32
    torch.testing.assert_close(mt.instruction_following(success), torch.tensor([0.999]))


def test_consistency_terms_have_two_axes():
    with pytest.raises(ValueError, match="terms"):
        mt.content_consistency(torch.rand(2, 3, 4))


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
