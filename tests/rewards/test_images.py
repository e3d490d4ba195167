"""Images on the wire: lossless, only pixels, and nothing but ValueError for what is no image."""

import base64
import io
import random
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, PngImagePlugin

from mteditflow.rewards.images import decode_image, pixel_change, png_bytes, png_data_url, to_rgb

pixels = arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)))


def encode(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@given(pixels)
def test_pixels_survive(values):
    url = png_data_url(Image.fromarray(values))
    head, _, data = url.partition(",")
    decoded = decode_image(base64.b64decode(data, validate=True), max_pixels=81)
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(decoded), values)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_of_eight_bits_becomes_rgb(mode):
    image = Image.new(mode, (3, 2))
    assert to_rgb("image", image).mode == "RGB"
    np.testing.assert_array_equal(to_rgb("image", image), image.convert("RGB"))


def test_an_rgb_image_is_not_copied():
    image = Image.new("RGB", (3, 2))
    assert to_rgb("image", image) is image


def test_equal_pixels_give_equal_bytes_whatever_the_image_carries_along():
    plain = Image.new("RGB", (4, 4), (9, 8, 7))
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "Turn 1: 5")
    carrying = Image.open(io.BytesIO(encode(plain, "PNG", pnginfo=text, dpi=(300, 300))))
    carrying.info["icc_profile"] = b"profile"
    assert png_bytes(carrying) == png_bytes(plain)
    assert b"Turn 1" not in png_bytes(carrying)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("cat.png", TypeError, "image 3: expected a PIL image, got str"),
        (
            Image.new("I;16", (2, 2)),
            ValueError,
            "image 3: expected 8 bits .*, got mode I;16",
        ),
        (Image.new("F", (2, 2)), ValueError, "image 3: expected 8 bits a channel, got mode F"),
        (Image.new("RGB", (0, 2)), ValueError, "image 3: expected at least one pixel, got 0 x 2"),
    ],
)
def test_what_cannot_be_sent_is_named(image, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        to_rgb("image 3", image)


def test_a_file_cut_short_is_named():
    data = png_bytes(Image.effect_noise((32, 32), 50))
    image = Image.open(io.BytesIO(data[:-200]))
    with pytest.raises(ValueError, match=r"^reference: expected a readable image, got .*truncated"):
        to_rgb("reference", image)


def bomb():
    """A PNG that claims 40,000 x 40,000 pixels."""
    data = bytearray(encode(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected PNG or WebP, got 0 bytes of something else"),
        (b"<html>", "expected PNG or WebP, got 6 bytes of something else"),
        (encode(frames[0], "JPEG"), "expected PNG or WebP, got [0-9]+ bytes of something else"),
        (png_bytes(frames[0])[:-30], "expected a readable image, got .*"),
        (png_bytes(Image.new("L", (9, 8))), "expected at most 64 pixels, got 9 x 8"),
        (bomb(), "expected at most 64 pixels, got more"),
        (
            encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
            "expected one still image, got 2 frames",
        ),
        (
            encode(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:]),
            "expected one still image, got 2 frames",
        ),
        (encode(Image.new("I;16", (2, 2)), "PNG"), "expected 8 bits a channel, got mode I;16"),
    ],
)
def test_what_is_not_one_image_is_refused(data, message):
    with pytest.raises(ValueError, match=f"^image: {message}$"):
        decode_image(data, max_pixels=64)


def test_lossless_webp_is_read():
    noise = Image.effect_noise((8, 8), 90).convert("RGB")
    decoded = decode_image(encode(noise, "WEBP", lossless=True), max_pixels=64)
    np.testing.assert_array_equal(decoded, noise)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_mutated_files_raise_nothing_but_value_errors(file_format):
    rng = random.Random(0)
    good = encode(Image.effect_noise((16, 16), 90).convert("RGB"), file_format, lossless=True)
    outcomes = set()
    for _ in range(3000):
        data = bytearray(good[: rng.choice((len(good), rng.randrange(len(good))))])
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(min(len(data), rng.choice((40, len(good)))))] = rng.randrange(
                    256
                )
        try:
            outcomes.add(decode_image(bytes(data), max_pixels=10**6).mode)
        except ValueError:
            outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


@given(pixels, pixels)
def test_the_change_of_pixels_is_their_mean_absolute_difference(first, second):
    before, after = Image.fromarray(first), Image.fromarray(second)
    if first.shape != second.shape:
        with pytest.raises(ValueError, match="after: expected the size of before"):
            pixel_change(before, after)
        return
    expected = np.abs(first.astype(float) - second.astype(float)).mean()
    assert pixel_change(before, after) == pytest.approx(expected)
    assert pixel_change(before, before) == 0
