"""What mutation testing found unproved of the diagnostics."""

import torch

import mteditflow as mt


def test_variance_ratio_weighs_groups_by_their_valid_members():
    reward = torch.tensor([0.0, 2.0, 0.0, 4.0, 9.0])
    other = torch.tensor([0.0, 1.0, 0.0, 1.0, 9.0])
    group = torch.tensor([0, 0, 1, 1, 1])
    valid = torch.tensor([True, True, True, True, False])
    # Variances 1 and 4 over 1/4 and 1/4, each for two valid trajectories.
    assert mt.variance_ratio(reward, other, group, valid=valid) == 10
    assert mt.variance_ratio(reward[:4], other[:4], group[:4]) == 10


def test_ratios_of_one_trajectory_need_no_batch_axis():
    check = mt.check_ratio(torch.zeros(3), torch.zeros(3), clip=1e-4)
    assert check.ok
    assert check.deviation.tolist() == [0, 0, 0]
