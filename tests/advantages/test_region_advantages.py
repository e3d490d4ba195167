"""Regions: coverage by hand and by loops, weights and layouts, advantages of tokens, errors."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import (
    box_coverage,
    mask_coverage,
    region_advantage,
    token_tile,
    token_weights,
)

F64 = torch.float64


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mask_loop(mask, tile):
    """Mean over the pixels of each token that exist, one by one."""
    height, width = mask.shape
    rows, columns = math.ceil(height / tile), math.ceil(width / tile)
    found = []
    for i in range(rows):
        for j in range(columns):
            pixels = [
                float(mask[y, x])
                for y in range(i * tile, min((i + 1) * tile, height))
                for x in range(j * tile, min((j + 1) * tile, width))
            ]
            found.append(sum(pixels) / len(pixels))
    return torch.tensor(found, dtype=F64).view(rows, columns)


@pytest.mark.parametrize(("size", "tile"), [((8, 12), 4), ((7, 10), 4), ((3, 5), 1), ((2, 3), 9)])
def test_a_mask_covers_the_mean_of_its_pixels(size, tile):
    mask = rand(2, 3, *size)
    found = mask_coverage(mask, tile)
    for b in range(2):
        for r in range(3):
            torch.testing.assert_close(found[b, r], mask_loop(mask[b, r], tile))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**20))
def test_whole_empty_and_complement_are_exact(height, width, tile, seed):
    mask = rand(height, width, seed=seed) > 0.5
    covered, rest = mask_coverage(mask, tile), mask_coverage(~mask, tile)
    assert covered.dtype == torch.float32
    torch.testing.assert_close(covered + rest, torch.ones_like(rest))
    assert mask_coverage(torch.ones_like(mask), tile).eq(1).all()
    assert mask_coverage(torch.zeros_like(mask), tile).eq(0).all()


def test_a_box_by_hand():
    # tokens of 4 x 4; [1.5, 5] x [0, 2]: 2.5 of 4 wide and 2 of 4 high, then 1 of 4 wide
    found = box_coverage(torch.tensor([[1.5, 0.0, 5.0, 2.0]], dtype=F64), (4, 8), 4)
    assert found.tolist() == [[2.5 * 2 / 16, 1 * 2 / 16]]
    # the second token has 2 of its 4 columns in the picture, of which the box has 1
    found = box_coverage(torch.tensor([[1.5, 0.0, 5.0, 2.0]], dtype=F64), (4, 6), 4)
    assert found.tolist() == [[2.5 * 2 / 16, 1 * 2 / 8]]
    assert box_coverage([], (4, 6), 4).tolist() == [[0, 0]]
    assert box_coverage([[-5, -5, 99, 99]], (4, 6), 4).tolist() == [[1, 1]]


@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 2**20))
def test_boxes_on_pixels_are_masks(count, tile, seed):
    height, width = 7, 9
    a, b = (rand(count, 2, seed=seed + k) * torch.tensor([width, height]) for k in (0, 1))
    boxes = torch.cat([torch.minimum(a, b), torch.maximum(a, b)], dim=1).round()
    mask = torch.zeros(height, width, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.long().tolist():
        mask[y1:y2, x1:x2] = True
    torch.testing.assert_close(
        box_coverage(boxes, (height, width), tile), mask_coverage(mask.double(), tile)
    )


def test_boxes_between_pixels_are_masks_of_a_finer_picture():
    boxes = torch.tensor([[0.25, 1.5, 3.75, 2.0], [3.0, 0.5, 5.0, 9.0]], dtype=F64)
    mask = torch.zeros(16, 24)
    for x1, y1, x2, y2 in (4 * boxes).long().tolist():
        mask[y1:y2, x1:x2] = 1
    torch.testing.assert_close(box_coverage(boxes, (4, 6), 2), mask_coverage(mask, 8).double())


def test_tiles():
    assert token_tile((1024, 64), (512, 512)) == 16  # FLUX at 512: 8 * 2
    assert token_tile((16, 64, 96), (512, 768)) == 8
    assert token_tile((16, 1, 32, 32), (512, 512)) == 16
    assert token_tile(torch.zeros(6, 4).shape, (4, 6)) == 2
    for latent, size in (
        ((6, 4), (4, 4)),
        ((8, 4), (16, 16)),
        ((4, 2, 3), (4, 4)),
        ((4, 9, 9), (4, 4)),
    ):
        with pytest.raises(ValueError, match=r"^latent: expected tokens that are whole squares"):
            token_tile(latent, size)


@pytest.mark.parametrize("outside", [0.0, 0.25])
def test_weights_are_of_mean_one_of_square_one_or_shares(outside):
    coverage = rand(2, 3, 4, 5)
    share = outside + (1 - outside) * coverage
    mean, rms, none = (
        token_weights(coverage, (4, 4, 5), outside=outside, normalization=how).squeeze(2)
        for how in ("mean", "rms", "none")
    )
    torch.testing.assert_close(mean.mean(dim=(-2, -1)), torch.ones(2, 3, dtype=F64))
    torch.testing.assert_close(rms.square().mean(dim=(-2, -1)), torch.ones(2, 3, dtype=F64))
    torch.testing.assert_close(none, share)
    for weight in (mean, rms):
        ratio = weight / share
        torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio))


@pytest.mark.parametrize("how", ["mean", "rms", "none"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_whole_picture_and_an_empty_region_are_the_broadcast(how, value):
    for latent in ((6, 4), (8, 4), (4, 2, 3), (4, 1, 2, 3)):
        weight = token_weights(torch.full((5, 2, 3), value), latent, normalization=how)
        assert weight.eq(1).all()
        assert torch.broadcast_shapes(weight.shape[1:], latent) == latent


@pytest.mark.parametrize(("how", "weight"), [("mean", 4.0), ("rms", 2.0)])
def test_weights_of_one_token_do_not_depend_on_its_share(how, weight):
    for share in (1.0, 1e-200, 5e-324):
        coverage = torch.tensor([[share, 0.0], [0.0, 0.0]], dtype=torch.float64)
        found = token_weights(coverage, (4, 8), normalization=how)
        assert found.flatten().tolist() == [weight, 0.0, 0.0, 0.0]


def test_layouts_are_those_of_packed_and_unpacked_latents():
    """Packed as FLUX does it, a latent of token numbers has them in the order of the weights."""
    rows, columns = 2, 3
    number = torch.arange(rows * columns).view(rows, columns)
    unpacked = number.repeat_interleave(2, 0).repeat_interleave(2, 1).expand(1, 4, 4, 6)
    packed = unpacked.view(1, 4, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    packed = packed.reshape(rows * columns, 16)
    coverage = number.double() / 5
    weight = token_weights(coverage, packed.shape, normalization="none")
    torch.testing.assert_close(weight.expand_as(packed), packed.double() / 5)
    latent = number.expand(4, rows, columns)
    weight = token_weights(coverage, latent.shape, normalization="none")
    torch.testing.assert_close(weight.expand_as(latent), latent.double() / 5)
    padded = token_weights(coverage, (8, 16))
    assert padded.mean() == pytest.approx(1)
    assert padded[-2:].eq(1).all()


def test_an_advantage_is_the_sum_of_the_rewards_at_their_tokens():
    advantages = {name: rand(2, 3, seed=k) - 0.5 for k, name in enumerate(("if", "cc", "strict"))}
    inside = rand(2, 3, 4, 5, seed=9)
    weights = {
        "if": token_weights(inside, (20, 64)),
        "cc": token_weights(1 - inside, (20, 64), outside=0.1),
    }
    found = region_advantage(advantages, weights)
    for b in range(2):
        for n in range(3):
            for p in range(20):
                expected = advantages["strict"][b, n] + sum(
                    advantages[name][b, n] * weights[name][b, n, p, 0] for name in ("if", "cc")
                )
                assert float(found[b, n, p, 0]) == pytest.approx(float(expected))
    # Every reward weighs as much over all tokens as if it were broadcast.
    torch.testing.assert_close(found.mean(dim=(2, 3)), sum(advantages.values()))


def test_errors():
    with pytest.raises(ValueError, match=r"^mask: expected values in \[0, 1\], got 2.0 at index"):
        mask_coverage(torch.full((2, 2), 2.0), 1)
    with pytest.raises(TypeError, match=r"^mask: expected float32 or float64"):
        mask_coverage(torch.zeros(2, 2).half(), 1)
    with pytest.raises(ValueError, match=r"^tile: expected an integer >= 1, got 0"):
        mask_coverage(torch.zeros(2, 2), 0)
    with pytest.raises(ValueError, match=r"^boxes: expected shape \[K, 4\], got \[1, 3\]"):
        box_coverage([[0.0, 1.0, 2.0]], (4, 4), 2)
    with pytest.raises(ValueError, match=r"^boxes: expected x1 <= x2 and y1 <= y2, got 3.0"):
        box_coverage([[3.0, 1.0, 2.0, 2.0]], (4, 4), 2)
    with pytest.raises(ValueError, match=r"^boxes: expected finite numbers, got nan"):
        box_coverage([[0.0, 1.0, math.nan, 2.0]], (4, 4), 2)
    with pytest.raises(ValueError, match=r"^size: expected height and width, got 3 numbers"):
        box_coverage([], (4, 4, 3), 2)
    with pytest.raises(
        ValueError, match=re.escape("expected the 2 x 2 tokens of coverage, got [3")
    ):
        token_weights(torch.zeros(2, 2), (3, 64))
    with pytest.raises(
        ValueError, match=r"^latent: expected \(L, C\) or \(C, ..., h, w\), got \[4\]"
    ):
        token_weights(torch.zeros(2, 2), (4,))
    with pytest.raises(TypeError, match=r"^latent: expected a shape, got int"):
        token_weights(torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match=r"^outside: expected a finite number in \[0, 1\], got -1"):
        token_weights(torch.zeros(2, 2), (4, 64), outside=-1)
    with pytest.raises(ValueError, match=r"^normalization: expected one of"):
        token_weights(torch.zeros(2, 2), (4, 64), normalization="sum")
    one = {"if": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match=r"^weights: expected names among \['if'\]"):
        region_advantage(one, {"cc": torch.zeros(1, 2, 4, 1)})
    with pytest.raises(ValueError, match=r"^weights: expected names among \['if'\], at least one"):
        region_advantage(one, {})
    with pytest.raises(ValueError, match=r"^weights\['if'\]: expected shape \[B, N, ...\]"):
        region_advantage(one, {"if": torch.zeros(1, 3, 4, 1)})
