"""OCR with the real model of rapidocr, on text that PIL draws."""

import pytest
from PIL import Image, ImageDraw, ImageFont

from mteditflow.evaluation import RapidOcr


@pytest.fixture(scope="module")
def read():
    return RapidOcr(threads=1)


def sign(text, *, size, place=(30, 30), shape=(256, 128), mode="RGB"):
    image = Image.new("RGB", shape, (30, 90, 160))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).multiline_text(place, text, fill="white", font=font)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (sign("Houston", size=36), "Houston"),
        (sign("SOFTBALL\nTEAM 42", size=32, place=(20, 20), mode="RGBA"), "SOFTBALL TEAM 42"),
        (sign("open", size=14, place=(8, 8), shape=(64, 32), mode="L"), "open"),
        (sign("", size=14), ""),
    ],
    ids=["word", "lines", "small", "nothing"],
)
def test_text_is_read(read, image, expected):
    assert read(image) == expected
