"""Statistics of pictures: closed forms, laws, shapes and dtypes, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.drift import (
    brightness,
    color_entropy,
    edge_density,
    group_distance,
    high_frequency_share,
    saturation,
    sharpness,
    thumbnails,
)
from mteditflow.testing.law import other_defaults
from tests.loops import some

SINGLE = (sharpness, color_entropy, brightness, saturation, edge_density, high_frequency_share)
# What a constant, added to every channel, does not change.
SHIFT_INVARIANT = (sharpness, saturation, edge_density, high_frequency_share)
# What turning or mirroring the picture does not change.
RIGID = (sharpness, color_entropy, brightness, saturation, edge_density, high_frequency_share)


def noise(*shape, seed=0, low=0.2, high=0.6):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def gray(luma):
    return luma.expand(3, *luma.shape)


def checkerboard(cell=1, size=8):
    place = torch.arange(size, dtype=torch.float64) // cell
    return gray((place[:, None] + place) % 2)


@pytest.mark.parametrize("function", SINGLE)
def test_a_flat_picture_of_any_color_has_only_its_color(function):
    color = torch.tensor([0.9, 0.3, 0.6]).reshape(3, 1, 1).expand(3, 5, 7)
    expected = {brightness: 0.2126 * 0.9 + 0.7152 * 0.3 + 0.0722 * 0.6, saturation: 0.6}
    assert float(function(color)) == pytest.approx(expected.get(function, 0.0), abs=1e-6)


@pytest.mark.parametrize(
    ("function", "images", "expected"),
    [
        # Every neighbor is the other color: 4 y - sum = 4 or -4, as often.
        (sharpness, checkerboard(), 16.0),
        # Of step 1 / 2 between columns 2 and 3 of 6: 0.5 and -0.5 in the two columns of 4 inside.
        (sharpness, gray((torch.arange(6) >= 3).double().expand(6, 6) / 2), 0.125),
        (sharpness, gray(torch.linspace(0, 1, 9).double().expand(5, 9)), 0.0),  # a ramp
        (color_entropy, checkerboard(), 1.0),
        # Four of eight levels of gray, as often each: two bits.
        (color_entropy, gray(torch.tensor([[0.0, 0.3, 0.6, 0.9]])), 2.0),
        # Shares 3/4 and 1/4: 3/4 log2(4/3) + 1/4 log2 4.
        (color_entropy, gray(torch.tensor([[0.0, 0.0, 0.0, 1.0]])), 0.811278),
        (brightness, checkerboard(), 0.5),
        (brightness, torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1), 0.7152),
        (saturation, checkerboard(), 0.0),
        (saturation, torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.5, 0.5]]).reshape(3, 1, 2), 0.5),
        (edge_density, checkerboard(), 0.0),  # both sides of every pixel are alike
        (edge_density, checkerboard(cell=4), 20 / 36),  # of 6 x 6 inside, 2 rows and 2 columns
        (high_frequency_share, checkerboard(size=2), 1.0),
    ],
)
def test_closed_forms(function, images, expected):
    assert float(function(images)) == pytest.approx(expected, abs=1e-6)


def test_a_height_of_a_step_is_compared_with_the_threshold():
    step = gray((torch.arange(8) >= 4).double().expand(8, 8) * 0.3)
    found = [float(edge_density(step, threshold=x)) for x in (0.0, 0.29, 0.31)]
    assert found == pytest.approx([2 / 6, 2 / 6, 0.0])


@pytest.mark.parametrize("k", range(1, 16))
@pytest.mark.parametrize("axis", [0, 1])
def test_a_cosine_is_fine_from_the_cutoff_on(k, axis):
    """Coefficient k of 16 rows has k / 32 cycles a pixel, all of it on one side of the cutoff."""
    wave = torch.cos(math.pi * k * (torch.arange(16, dtype=torch.float64) + 0.5) / 16)
    luma = (0.5 + 0.4 * wave)[:, None].expand(16, 10)
    images = gray(luma if axis == 0 else luma.T)
    assert float(high_frequency_share(images, cutoff=0.25)) == pytest.approx(
        float(k >= 8), abs=1e-9
    )


def test_the_share_of_detail_is_that_of_the_whole_cosine_transform():
    images = noise(3, 12, 9)
    luma = np.tensordot([0.2126, 0.7152, 0.0722], images.numpy(), axes=1)
    fine = total = 0.0
    for k in range(12):
        down = np.cos(np.pi * k * (np.arange(12) + 0.5) / 12) * np.sqrt((1 + (k > 0)) / 12)
        for m in range(9):
            across = np.cos(np.pi * m * (np.arange(9) + 0.5) / 9) * np.sqrt((1 + (m > 0)) / 9)
            energy = float(down @ luma @ across) ** 2 if k or m else 0.0
            total += energy
            fine += energy if k / 24 >= 0.2 or m / 18 >= 0.2 else 0.0
    assert float(high_frequency_share(images, cutoff=0.2)) == pytest.approx(fine / total, rel=1e-9)


def test_blur_lowers_what_is_fine_and_noise_raises_it():
    images = noise(3, 24, 24)
    kernel = torch.full((3, 1, 3, 3), 1 / 9, dtype=torch.float64)
    blurred = torch.nn.functional.conv2d(images[None], kernel, groups=3)[0]
    for function in some((sharpness, edge_density, high_frequency_share)):
        assert function(blurred) < 0.7 * function(images), function
        assert function(images) < function((images + noise(3, 24, 24, seed=1) - 0.4).clamp(0, 1))


@pytest.mark.parametrize("function", SHIFT_INVARIANT)
@given(shift=st.floats(-0.2, 0.4))
def test_a_shift_of_all_channels_changes_nothing(function, shift):
    images = noise(2, 3, 7, 6)
    assert function(images + shift).tolist() == pytest.approx(function(images).tolist(), abs=1e-9)


@pytest.mark.parametrize("function", RIGID)
def test_turning_and_mirroring_change_nothing(function):
    images = noise(3, 8, 8)
    for other in some((images.flip(-1), images.flip(-2), images.mT, images.rot90(dims=(-2, -1)))):
        assert float(function(other)) == pytest.approx(float(function(images)), rel=1e-9)


def test_contrast_scales_what_is_linear_and_what_is_square():
    images = noise(3, 8, 8)
    assert sharpness(images / 2) == pytest.approx(float(sharpness(images)) / 4)
    assert saturation(images / 2) == pytest.approx(float(saturation(images)) / 2)
    assert brightness(images / 2) == pytest.approx(float(brightness(images)) / 2)
    assert high_frequency_share(images / 2) == pytest.approx(float(high_frequency_share(images)))


def test_entropy_does_not_see_places():
    images = noise(3, 6, 6, low=0.0, high=1.0)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(2))
    shuffled = images.flatten(1)[:, order].reshape(3, 6, 6)
    assert color_entropy(shuffled) == pytest.approx(float(color_entropy(images)))
    assert 0 < float(color_entropy(images)) <= math.log2(36) + 1e-9


@pytest.mark.parametrize("function", [*SINGLE, thumbnails])
def test_leading_axes_are_kept_and_bytes_are_divided(function):
    bytes_ = (255 * noise(2, 4, 3, 6, 5)).round().to(torch.uint8)
    whole = function(bytes_)
    assert whole.shape[:2] == (2, 4)
    assert whole.dtype == torch.float32
    for b, n in some([(0, 0), (1, 3)]):
        alone = function(bytes_[b, n])
        assert torch.allclose(whole[b, n], alone, atol=1e-6)
        assert torch.allclose(function(bytes_[b, n].float() / 255), alone)
    assert function(bytes_.double() / 255).dtype == torch.float64
    assert not function((bytes_.float() / 255).requires_grad_()).requires_grad
    with other_defaults(torch.float64):
        again = function(bytes_)
    assert again.dtype == torch.float32
    assert torch.equal(again, whole)


@pytest.mark.parametrize("function", [*SINGLE, thumbnails])
def test_what_is_no_picture_is_refused(function):
    with pytest.raises(
        ValueError, match=r"images: expected shape \[\.\.\., 3, height, width\], got"
    ):
        function(torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"images: expected a non-empty tensor"):
        function(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\], got 255"):
        function(torch.full((3, 4, 4), 255.0))
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\], got nan"):
        function(torch.full((3, 4, 4), math.nan))
    with pytest.raises(TypeError, match=r"images: expected uint8 or floating point"):
        function(torch.zeros(3, 4, 4, dtype=torch.long))
    with pytest.raises(TypeError, match=r"images: expected a torch.Tensor, got ndarray"):
        function(np.zeros((3, 4, 4)))


def test_numbers_out_of_range_are_refused():
    images = noise(3, 4, 4)
    for function in some((sharpness, edge_density)):
        with pytest.raises(ValueError, match=r"expected sides of at least 3 pixels, got \[2, 4\]"):
            function(images[:, :2])
    with pytest.raises(ValueError, match=r"threshold: expected a finite number in \[0, inf\]"):
        edge_density(images, threshold=-1)
    with pytest.raises(ValueError, match=r"cutoff: expected a finite number in \(0, 0\.5\]"):
        high_frequency_share(images, cutoff=0.6)
    with pytest.raises(ValueError, match="bins: expected an integer <= 64"):
        color_entropy(images, bins=65)
    with pytest.raises(ValueError, match="side: expected an integer >= 1"):
        thumbnails(images, side=0)


def test_thumbnails_are_means_of_cells():
    images = noise(3, 4, 6)
    cells = images.reshape(3, 2, 2, 2, 3).mean(dim=(2, 4)).flatten()
    assert thumbnails(images, side=2).tolist() == pytest.approx(cells.tolist())


def test_group_distance_is_the_loop():
    features = noise(6, 2, 5)
    group = torch.tensor([3, 1, 3, 3, 1, 9])
    expected = torch.full((6, 2), torch.nan, dtype=torch.float64)
    for b in range(6):
        others = [j for j in range(6) if j != b and group[j] == group[b]]
        for n in range(2):
            gaps = [(features[b, n] - features[j, n]).square().mean().sqrt() for j in others]
            expected[b, n] = sum(gaps) / len(gaps) if gaps else math.nan
    found = group_distance(features, group)
    assert torch.allclose(found, expected, equal_nan=True)
    assert torch.allclose(group_distance(features[:, 0], group), expected[:, 0], equal_nan=True)
    order = torch.tensor([5, 3, 1, 0, 2, 4])
    again = group_distance(features[order], group[order])
    assert torch.allclose(again, found[order], equal_nan=True)


def test_a_group_that_is_one_picture_has_no_distance():
    features = noise(4, 7).float()
    group = torch.tensor([0, 0, 1, 1])
    collapsed = features[[0, 0, 2, 2]]
    assert group_distance(collapsed, group).tolist() == [0.0] * 4
    assert (group_distance(features, group) > 0.05).all()


def test_features_of_no_group_are_refused():
    with pytest.raises(ValueError, match=r"group: expected one id for each of the 2 samples"):
        group_distance(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="features: expected finite numbers, got nan"):
        group_distance(torch.full((2, 3), math.nan), [0, 0])
    with pytest.raises(TypeError, match="features: expected a floating-point tensor"):
        group_distance(torch.zeros(2, 3, dtype=torch.uint8), [0, 0])
