"""The consistency server and what anyone may send: 2xx and 4xx, never 5xx, never a hang."""

import base64
import io
import struct
import warnings
import zlib

import pytest
import schemathesis
from consistency_world import color_scorer, pair, picture, request_of
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import CHECKS

from mteditflow.rewards.images import png_bytes
from mteditflow.rewards.server import Limits, create_app
from mteditflow.rewards.server.files import TooManyPixels, check_file

URL = "/v1/consistency"
PIXELS = 2**16
LIMITS = Limits(max_pixels=PIXELS, max_body=2**22)
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(*chunks, width=4, height=4, depth=8, color=2, interlace=0):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    return SIGNATURE + chunk(b"IHDR", header) + b"".join(chunks)


def riff(*chunks):
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def riff_chunk(name, body):
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


IMAGE = picture(1)
PNG = png_bytes(IMAGE)
WEBP = saved(IMAGE, "WEBP", lossless=True)
LOSSY = saved(IMAGE, "WEBP", quality=80)
ROWS = chunk(b"IDAT", zlib.compress(b"\0" * (1 + 4 * 3) * 4))
END = chunk(b"IEND", b"")
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
EXIF = Image.Exif()
EXIF[0x0112] = 6  # turned by 90 degrees


def interlaced(width, height):
    """Pixels of an interlaced RGB image: rows of its seven smaller ones."""
    rows = b""
    for n in range(7):
        here = [[x for x in range(width) if PASSES[y % 8][x % 8] == n + 1] for y in range(height)]
        rows += b"".join(b"\0" + b"\x55" * 3 * len(row) for row in here if row)
    return [chunk(b"IDAT", zlib.compress(rows))]


# In which pass each pixel of 8 x 8 comes (PNG specification, section 8.2).
PASSES = [
    [1, 6, 4, 6, 2, 6, 4, 6],
    [7, 7, 7, 7, 7, 7, 7, 7],
    [5, 6, 5, 6, 5, 6, 5, 6],
    [7, 7, 7, 7, 7, 7, 7, 7],
    [3, 6, 4, 6, 3, 6, 4, 6],
    [7, 7, 7, 7, 7, 7, 7, 7],
    [5, 6, 5, 6, 5, 6, 5, 6],
    [7, 7, 7, 7, 7, 7, 7, 7],
]


def text_bomb():
    return chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b" " * 2**26))


def profile_bomb():
    return chunk(b"iCCP", b"profile\0\0" + zlib.compress(b" " * 2**26))


def many_texts():
    return b"".join(chunk(b"tEXt", b"k%d\0" % n + b"x" * 1000) for n in range(500))


ACCEPTED = {
    "png": PNG,
    "interlaced": png(*interlaced(9, 5), END, interlace=1, width=9, height=5),
    "interlaced, one pixel": png(*interlaced(1, 1), END, interlace=1, width=1, height=1),
    "palette with transparency": saved(IMAGE.quantize(4), "PNG", transparency=0),
    "palette of 1 bit": saved(IMAGE.quantize(2), "PNG", bits=1),
    "gray": saved(IMAGE.convert("L"), "PNG"),
    "black and white": saved(IMAGE.convert("1"), "PNG"),
    "rgba": saved(IMAGE.convert("RGBA"), "PNG"),
    "gray and alpha": saved(IMAGE.convert("LA"), "PNG"),
    "exif": saved(IMAGE, "PNG", exif=EXIF),
    "profile": saved(IMAGE, "PNG", icc_profile=b"no profile at all"),
    "texts": png(many_texts(), ROWS, END),
    "lossless webp": WEBP,
    "lossless webp with alpha": saved(IMAGE.convert("RGBA"), "WEBP", lossless=True),
    "lossless webp with exif": saved(IMAGE, "WEBP", lossless=True, exif=EXIF),
}
REFUSED = {
    "nothing": (b"", "got nothing"),
    "text": (b"it is a cat", "got 11 bytes of something else"),
    "jpeg": (saved(IMAGE, "JPEG"), "got JPEG"),
    "gif": (saved(IMAGE, "GIF"), "got GIF"),
    "bmp": (saved(IMAGE, "BMP"), "got BMP"),
    "tiff": (saved(IMAGE, "TIFF"), "got TIFF"),
    "cmyk tiff": (saved(IMAGE.convert("CMYK"), "TIFF"), "got TIFF"),
    "svg": (SVG, "got SVG"),
    "xml": (b"<?xml version='1.0'?>" + SVG, "got XML"),
    "pdf": (saved(IMAGE, "PDF"), "got PDF"),
    "signature alone": (SIGNATURE, "got a truncated one"),
    "header alone": (png(), "got a truncated one"),
    "no pixels": (png(END), "a whole PNG of 52 bytes of pixels, got 0"),
    "more than its pixels": (
        png(chunk(b"IDAT", zlib.compress(b"\0" * 2**22)), END),
        "a whole PNG of 52 bytes of pixels, got more",
    ),
    "pixels without their checksum": (
        png(chunk(b"IDAT", zlib.compress(b"\0" * 52)[:-4]), END),
        "52 bytes of pixels, got 52",
    ),
    "no end": (png(ROWS), "got a truncated one"),
    "half of the pixels": (
        png(chunk(b"IDAT", zlib.compress(b"\0" * 13 * 2)), END),
        "a whole PNG of 52 bytes of pixels, got 26",
    ),
    "pixels that are no zlib": (png(chunk(b"IDAT", b"no zlib"), END), "got damaged pixels"),
    "truncated png": (PNG[:-5], "got a truncated one"),
    "wrong crc": (PNG[:-1] + b"\0", "a chunk with a wrong CRC"),
    "wrong crc of pixels": (png(ROWS[:-1] + b"\0", END), "a chunk with a wrong CRC"),
    "bytes after the end": (PNG + b"more", "one with bytes after its end"),
    "another chunk first": (SIGNATURE + END, "a PNG that begins with its header"),
    "short header": (SIGNATURE + chunk(b"IHDR", b"short") + END, "begins with its header"),
    "no width": (png(ROWS, END, width=0), "expected at least one pixel, got 0 x 4"),
    "no height": (png(ROWS, END, height=0), "expected at least one pixel, got 4 x 0"),
    "depth of none": (png(ROWS, END, depth=0), "of color type 2 and 0 bits"),
    "color of none": (png(ROWS, END, color=7), "of color type 7 and 8 bits"),
    "16 bits gray": (saved(Image.new("I;16", (4, 4)), "PNG"), "at most 8 bits a channel, got 16"),
    "9 bits rgb": (png(ROWS, END, depth=9), "at most 8 bits a channel, got 9"),
    "16 bits rgb": (png(ROWS, END, depth=16), "at most 8 bits a channel, got 16"),
    "palette of none": (png(ROWS, END, color=3), "got one without its palette"),
    "apng": (saved(IMAGE, "PNG", save_all=True, append_images=[picture(2)]), "an animated PNG"),
    "text bomb": (png(text_bomb(), ROWS, END), "readable image|PNG or WebP"),
    "lossy webp": (LOSSY, "got lossy WebP"),
    "lossy webp with alpha": (saved(IMAGE.convert("RGBA"), "WEBP"), "got lossy WebP"),
    "animated webp": (
        saved(IMAGE, "WEBP", save_all=True, append_images=[picture(2)], lossless=True),
        "an animated WebP",
    ),
    "truncated webp": (WEBP[:-9], "got a truncated one"),
    "long webp": (WEBP + b"more", "one with bytes after its end"),
    "half of a webp": (
        riff(riff_chunk(b"VP8L", WEBP[20 : len(WEBP) // 2])),
        "readable image|PNG or WebP",
    ),
    "webp of nothing": (riff(), "one without an image"),
    "webp of short pixels": (riff(riff_chunk(b"VP8L", b"\x2f")), "got a truncated one"),
    "webp of no pixels": (riff(riff_chunk(b"VP8L", b"\x2f\x03\xc0\0\0")), "PNG or WebP|readable"),
}
TOO_LARGE = {
    "bomb": png(chunk(b"IDAT", zlib.compress(b"\0" * 2**22, 9)), END, width=60000, height=60000),
    "a size of 2^31 - 1": png(ROWS, END, width=2**31 - 1, height=2**31 - 1),
    "a size of 2^32 - 1": png(ROWS, END, width=2**32 - 1, height=1),
    "webp": riff(riff_chunk(b"VP8L", b"\x2f\xff\xff\xff\x0f" + b"\0" * 20)),
}


@pytest.fixture(scope="module")
def client():
    # What is raised in the application becomes an answer of 500, as it would on a socket.
    app = create_app(color_scorer(), limits=LIMITS)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def send(client, data):
    """Send a file in the place of the second of two images."""
    body = request_of([IMAGE], [pair()])
    body["images"].append(base64.b64encode(data).decode())
    return client.post(URL, json=body)


@pytest.mark.parametrize("name", ACCEPTED)
def test_lossless_images_are_scored(client, name):
    response = send(client, ACCEPTED[name])
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_whole_still_lossless_image_is_refused_with_the_reason(client, name):
    import re

    data, message = REFUSED[name]
    response = send(client, data)
    assert response.status_code == 422, response.text
    detail = response.json()["detail"]
    assert detail.startswith("images[1]: ")
    assert re.search(message, detail), detail


@pytest.mark.parametrize("name", TOO_LARGE)
def test_sizes_are_refused_before_any_pixel_is_decoded(client, name, monkeypatch):
    monkeypatch.setattr(Image, "open", None)  # not even opened
    with pytest.raises(TooManyPixels, match=f"expected at most {PIXELS} pixels, got"):
        check_file(TOO_LARGE[name], max_pixels=PIXELS)
    monkeypatch.undo()
    assert send(client, TOO_LARGE[name]).status_code == 413


def test_a_profile_that_unpacks_to_64_mib_does_no_harm(client):
    assert send(client, png(profile_bomb(), ROWS, END)).status_code in (200, 422)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got nothing"),
        ("====", ""),
        ("a", ""),
        ("not base64!", "base64"),
        ("é", "ASCII"),
        ("data:image/png;base64," + base64.b64encode(PNG).decode(), "got a data URL"),
        (base64.b64encode(PNG).decode() + "\n", "base64"),
        (base64.urlsafe_b64encode(b"\xff\xfe\xfd" * 9).decode(), "base64"),
        ("\0" * 100, "base64"),
    ],
)
def test_what_is_not_base64_of_an_image_is_refused(client, text, message):
    body = request_of([IMAGE], [pair()])
    body["images"].append(text)
    response = client.post(URL, json=body)
    assert response.status_code == 422
    assert message in response.json()["detail"]


def test_metadata_and_orientation_change_no_score(client):
    plain, turned = (send(client, data).json() for data in (PNG, ACCEPTED["exif"]))
    assert plain == turned


mutations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "double", "insert", "swap"]),
        st.integers(0, 2**16),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data, steps):
    """Damage a file in some places."""
    for kind, place, value in steps:
        if not data:
            return data
        at = place % len(data)
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ (value or 1)]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + value :]
        elif kind == "double":
            data = data[:at] + data[at : at + value] + data[at:]
        elif kind == "insert":
            data = data[:at] + bytes([value]) * 4 + data[at:]
        else:
            data = data[at:] + data[:at]
    return data


def with_right_sums(data):
    """Write the right CRC after each chunk, as far as there are chunks, so that damage gets in."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        length = min(length, len(data) - at - 12)
        out += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return out


SEEDS = [
    *ACCEPTED.values(),
    LOSSY,
    *(data for data, _ in REFUSED.values() if 50 < len(data) < 5000),
]


@given(st.sampled_from(SEEDS), mutations, st.booleans())
@settings(max_examples=150)
def test_damaged_files_of_every_kind_are_scored_or_refused(client, data, steps, mend):
    damaged = mutate(data, steps)
    response = send(client, with_right_sums(damaged) if mend else damaged)
    assert response.status_code in (200, 413, 422), response.text


@given(st.binary(max_size=300))
def test_bytes_of_no_kind_are_refused(client, data):
    assert send(client, data).status_code == 422
    headers = {"Content-Type": "application/json"}
    assert client.post(URL, content=data, headers=headers).status_code == 422


# From the schema

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of schemathesis' own dependencies
    SCHEMA = schemathesis.openapi.from_asgi(
        "/openapi.json", create_app(color_scorer(), limits=LIMITS)
    )
# "is base64 of an image" and "is an index of one of the images" cannot be said in a schema
LEFT_OUT = [check for check in CHECKS.get_all() if check.__name__ == "positive_data_acceptance"]


@SCHEMA.parametrize()
@settings(max_examples=30)
def test_what_the_schema_says_is_what_the_server_does(case):
    case.call_and_validate(excluded_checks=LEFT_OUT)
