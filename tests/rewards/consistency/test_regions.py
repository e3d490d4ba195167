"""Boxes, masks and patch weights against exact fractions, PIL and closed forms."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mteditflow.rewards.consistency.regions import background_mask, pixel_boxes, with_area
from mteditflow.rewards.consistency.similarity import TOKENS, Features, nearest_grid, patch_weights

SIZE = (512, 512)

sides = st.integers(1, 24)
coordinate = st.one_of(
    st.floats(-100, 700, width=32), st.sampled_from([0.0, 511.99, 512.0, torch.nan, torch.inf])
)
boxes_of_any_kind = st.lists(st.tuples(*[coordinate] * 4), max_size=5)


def features_of(registers, grid, size=(224, 224)):
    """Features that say only how many tokens there are."""
    return Features(
        torch.zeros(1, 2), torch.zeros(1, registers, 2), torch.zeros(1, grid[0] * grid[1], 2),
        grid, size,
    )  # fmt: skip


def test_boxes_are_cut_to_whole_pixels_of_the_image():
    boxes = torch.tensor(
        [
            [0.0, 0.0, 512.0, 512.0],
            [10.9, 20.1, 30.9, 40.999],  # toward zero
            [-0.9, -50.0, 1e30, 700.0],  # beyond the image
            [600.0, 10.0, 700.0, 20.0],  # outside
            [5.2, 5.2, 5.9, 90.0],  # no pixel wide
            [9.0, 9.0, 3.0, 30.0],  # turned round
        ]
    )
    expected = [
        [0, 0, 512, 512], [10, 20, 30, 40], [0, 0, 512, 512],
        [512, 10, 512, 20], [5, 5, 5, 90], [9, 9, 3, 30],
    ]  # fmt: skip
    assert pixel_boxes(boxes, SIZE).tolist() == expected
    assert with_area(pixel_boxes(boxes, SIZE)).tolist() == expected[:3]


def test_height_and_width_are_not_mixed_up():
    assert pixel_boxes(torch.full((1, 4), 900.0), (10, 20)).tolist() == [[20, 10, 20, 10]]
    assert background_mask(torch.tensor([[1, 0, 2, 1]]), (2, 3)).tolist() == [
        [True, False, True], [True, True, True],
    ]  # fmt: skip


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_boxes_that_are_not_finite_are_dropped(value):
    boxes = torch.tensor([[1.0, 1.0, value, 9.0], [1.0, 2.0, 3.0, 4.0]])
    assert pixel_boxes(boxes, SIZE).tolist() == [[1, 2, 3, 4]]


def test_no_boxes_stay_no_boxes():
    none = pixel_boxes(torch.zeros(0, 4), SIZE)
    assert none.shape == with_area(none).shape == (0, 4)
    assert background_mask(none, SIZE).all()


def test_what_is_no_list_of_boxes_is_refused():
    with pytest.raises(ValueError, match=r"boxes: expected shape \[K, 4\], got \[4\]"):
        pixel_boxes(torch.zeros(4), SIZE)
    with pytest.raises(ValueError, match=r"boxes: expected shape \[K, 4\], got \[0\]"):
        pixel_boxes(torch.zeros(0), SIZE)
    with pytest.raises(TypeError, match="boxes: expected a floating-point tensor"):
        pixel_boxes(torch.zeros(1, 4, dtype=torch.int64), SIZE)


@given(boxes_of_any_kind, st.sampled_from(["strict", "compat"]))
def test_mask_is_the_union_of_the_boxes(boxes, tokens):
    """compat: as PIL draws rectangles, whose ends are inclusive."""
    cut = pixel_boxes(torch.tensor(boxes).view(-1, 4), SIZE)
    mask = background_mask(cut, SIZE, border=TOKENS[tokens].border)
    canvas = Image.new("L", SIZE, 255)
    draw = ImageDraw.Draw(canvas)
    last = 0 if tokens == "compat" else 1
    for x1, y1, x2, y2 in cut.tolist():
        if x2 - last >= x1 and y2 - last >= y1:
            draw.rectangle([x1, y1, x2 - last, y2 - last], fill=0)
    drawn = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(SIZE)
    assert torch.equal(mask, drawn == 255)


@given(st.data(), sides, sides, sides, sides)
def test_patch_weights_are_exact_shares(data, height, width, rows, columns):
    """Against fractions, also where patches cut pixels or are smaller than one."""
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = torch.tensor(bits).view(height, width)
    weights = patch_weights(mask, (rows, columns)).view(rows, columns)

    def overlap(cell, cells, pixel, pixels):
        low = max(Fraction(cell, cells), Fraction(pixel, pixels))
        high = min(Fraction(cell + 1, cells), Fraction(pixel + 1, pixels))
        return max(high - low, Fraction(0)) * cells

    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    share = sum(
        overlap(row, rows, y, height) * overlap(column, columns, x, width)
        for y in range(height)
        for x in range(width)
        if mask[y, x]
    )
    expected = float(share) if share >= Fraction(1, 2) else 0.0
    assert weights[row, column].item() == pytest.approx(expected, abs=1e-12)


def test_just_half_a_patch_counts_and_just_less_does_not():
    """Patches of a 512 x 512 image are 36.57 pixels; with 16 columns they would be 32."""
    for masked, expected in [(16, 0.5), (17, 0.0), (15, 17 / 32)]:
        mask = background_mask(torch.tensor([[0, 0, masked, 512]]), SIZE)
        assert patch_weights(mask, (1, 16))[:2].tolist() == [expected, 1.0]


def test_weights_of_half_the_image():
    """256 pixels are exactly 7 of 14 columns."""
    mask = background_mask(torch.tensor([[0, 0, 256, 512]]), SIZE)
    weights = patch_weights(mask, (14, 14)).view(14, 14)
    assert weights.tolist() == [[0.0] * 7 + [1.0] * 7] * 14


def test_compat_weights_are_misplaced_on_10_by_20():
    """Half the image: 10 of 20 columns of 200 tokens, of which the first 4 are registers."""
    rules, features = TOKENS["compat"], features_of(4, (14, 14))
    mask = background_mask(torch.tensor([[0, 0, 256, 512]]), SIZE, border=rules.border)
    weights = rules.weights(mask, features).view(10, 20)
    assert weights.tolist() == [[0.0] * 10 + [1.0] * 10] * 10


def test_compat_brings_the_mask_to_the_model_as_pil_does():
    """A grid of the model's own pixels shows the mask that the model would see.

    PIL, which the public scorer uses, adds up its steps of 512 / 224 and so takes the pixel before
    in the rows below, where the middle of a pixel falls on an edge between two.
    """
    before = torch.tensor([3, 10, 17, 24, *range(80, 224, 7)])
    taken = torch.tensor([(2 * i + 1) * 512 // 448 for i in range(224)])
    taken[before] -= 1
    mask = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) < 0.5
    weights = TOKENS["compat"].weights(mask, features_of(0, (224, 224))).view(224, 224)
    assert len(before) == 25
    assert torch.equal(weights, mask[taken][:, taken].double())


@pytest.mark.parametrize(
    ("count", "aspect", "grid"),
    [
        (200, 1.0, (10, 20)),  # 0.5 is nearer to 1 than 2 is
        (196, 1.0, (14, 14)),
        (396, 0.5, (12, 33)),
        (200, 2.0, (20, 10)),
        (200, 1.25, (20, 10)),  # as near as 10 x 20: the taller one
        (7, 1.0, (1, 7)),
        (1, 1.0, (1, 1)),
    ],
)
def test_grid_is_the_factor_pair_nearest_to_the_aspect_ratio(count, aspect, grid):
    assert nearest_grid(count, aspect) == grid
