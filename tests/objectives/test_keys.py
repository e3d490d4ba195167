"""Streams are functions of their keys: the same everywhere, and unrelated for other keys."""

import pytest
import torch

from mteditflow.objectives import keyed_generator


def draws(*key):
    return torch.randn(1000, generator=keyed_generator(*key))


def test_the_stream_of_a_key_is_fixed_for_good():
    generator = keyed_generator(0, "noise", 3, 17)
    assert generator.initial_seed() == 5247667940783718396  # blake2b of '[0, "noise", 3, 17]'
    assert torch.equal(draws(0, "noise", 3, 17), draws(0, "noise", 3, 17))


@pytest.mark.parametrize(
    "other", [(1, "noise", 3, 17), (0, "rows", 3, 17), (0, "noise", 31, 7), (0, "noise", 3), ("0",)]
)
def test_other_keys_give_independent_streams(other):
    first, second = draws(0, "noise", 3, 17), draws(*other)
    assert abs(float((first * second).mean())) < 5 / 1000**0.5


def test_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    keyed_generator(1)
    assert torch.equal(torch.rand(1), expected)


def test_errors():
    with pytest.raises(ValueError, match="key: expected at least one integer or string, got none"):
        keyed_generator()
    for wrong in (1.0, True, None):
        with pytest.raises(TypeError, match="key: expected integers and strings"):
            keyed_generator(0, wrong)
