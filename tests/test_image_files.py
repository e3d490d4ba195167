"""Image files of others: a list of formats, a bound on pixels, and no other way to open one."""

import ast
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from PIL import EpsImagePlugin, Image
from PIL.ExifTags import Base

from mteditflow._images import (
    BOMBS,
    FILE_FORMATS,
    MAX_PIXELS,
    UNREADABLE,
    check_image,
    read_image,
)
from mteditflow.chains import Chain, ChainDataset, ChainError, EditedImages
from mteditflow.evaluation.benchmarks import Item
from mteditflow.evaluation.benchmarks.items import _load
from mteditflow.planner.run import open_image
from mteditflow.rewards.consistency.wire import Limits
from tests.chains.samples import png_header
from tests.loops import some

ROOT = Path(__file__).parents[1]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def of_dataset(path):
    return ChainDataset([Chain(id="7", image=path.name, instructions=["Do"], root=path.parent)])[0]


def of_edits(path):
    chain = Chain(id="7", image="7.png", instructions=["Do"])
    folder = EditedImages(path.parent)
    folder.path(chain, 1).parent.mkdir()
    path.rename(folder.path(chain, 1))
    return folder.load(chain)


def of_benchmark(path):
    return _load(Item("7", "add", "Do", path, path))


READERS = [read_image, check_image, open_image, of_dataset, of_edits, of_benchmark]


@pytest.mark.parametrize("read", READERS)
def test_a_file_of_another_format_starts_no_program(read, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *x, **y: started.append(x))
    (tmp_path / "x.png").write_bytes(EPS)
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "EPS"  # PIL itself takes it
    with pytest.raises((OSError, ChainError), match="cannot identify image file"):
        read(tmp_path / "x.png")
    assert not started


@pytest.mark.parametrize("size", [(13_000, 13_000), (4096, 4097)])
@pytest.mark.parametrize("read", READERS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_they_are_decoded(read, size, tmp_path):
    (tmp_path / "x.png").write_bytes(png_header(*size))
    expected = rf"expected at most {MAX_PIXELS} pixels, got {size[0]} x {size[1]}; make the image"
    with pytest.raises(ValueError, match=expected):
        read(tmp_path / "x.png")


def test_the_bound_is_that_of_the_server(tmp_path):
    assert Limits().max_pixels == MAX_PIXELS == 4096**2
    (tmp_path / "x.png").write_bytes(png_header(4096, 4096))
    assert check_image(tmp_path / "x.png") == (4096, 4096)


@pytest.mark.parametrize("kind", FILE_FORMATS)
def test_every_format_of_the_list_is_read(kind, tmp_path):
    Image.new("RGB", (3, 2), (200, 0, 0)).save(tmp_path / "x", kind)
    image = read_image(tmp_path / "x")
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert image.getpixel((1, 1))[0] > 180


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
@pytest.mark.parametrize("read", READERS)
def test_one_frame_of_several_is_not_taken_in_silence(read, kind, tmp_path):
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "x.png", kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="expected one still image, got 3 frames"):
        read(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["MPO", "TIFF"])
def test_previews_behind_a_picture_do_not_matter(kind, tmp_path):
    first, second = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (8, 4), "blue")
    first.save(tmp_path / "x", kind, save_all=True, append_images=[second])
    image = read_image(tmp_path / "x")
    assert image.size == (16, 8)
    assert image.getpixel((4, 4))[0] > 180


@pytest.mark.parametrize(
    ("mode", "kind", "turned", "size"),
    [
        *[("CMYK", "JPEG", 1, (4, 2)), ("L", "PNG", 1, (4, 2)), ("1", "PNG", 1, (4, 2))],
        *[("P", "PNG", 1, (4, 2)), ("LA", "PNG", 1, (4, 2)), ("RGB", "JPEG", 6, (2, 4))],
        *[("RGB", "PNG", 8, (2, 4)), ("RGB", "JPEG", 99, (4, 2))],
    ],
)
def test_every_kind_of_pixel_becomes_upright_rgb(mode, kind, turned, size, tmp_path):
    exif = Image.Exif()
    exif[Base.Orientation] = turned
    Image.new("RGB", (4, 2), "white").convert(mode).save(tmp_path / "x", kind, exif=exif)
    image = read_image(tmp_path / "x")
    assert (image.mode, image.size) == ("RGB", size)
    assert image.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PIL, about a TIFF's directory
@pytest.mark.parametrize("kind", FILE_FORMATS)
def test_a_file_cut_or_changed_anywhere_raises_what_readers_expect(kind, tmp_path):
    random, path = Random(0), tmp_path / "x"
    Image.effect_noise((16, 12), 90).convert("RGB").save(path, kind)
    whole, refused = path.read_bytes(), 0
    for _ in range(40):
        part = bytearray(whole[: random.randrange(1, len(whole))])
        part[random.randrange(len(part))] = random.randrange(256)
        path.write_bytes(part)
        with suppress(*UNREADABLE, *BOMBS):
            read_image(path)
            refused -= 1
        refused += 1
    assert refused > 20


@pytest.mark.parametrize("letter", ["a", "\u5b66"])
def test_edits_of_a_chain_with_a_long_id_have_a_folder_of_their_own(letter, tmp_path):
    edited = EditedImages(tmp_path)
    chains = [Chain(id=letter * 400 + end, image="7.png", instructions=["Do"]) for end in "xy"]
    assert not any(edited.complete(chain) for chain in some(chains))
    for chain, color in zip(chains, ((1, 2, 3), (4, 5, 6)), strict=True):
        edited.write(chain, [Image.new("RGB", (1, 1), color)])
    assert [edited.load(chain)[0].getpixel((0, 0)) for chain in chains] == [(1, 2, 3), (4, 5, 6)]


def test_every_opening_of_an_image_names_its_formats():
    files = [
        x for room in ("mteditflow", "examples", "benchmarks") for x in (ROOT / room).rglob("*.py")
    ]
    calls = [
        (path.relative_to(ROOT).as_posix(), node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    assert len(calls) >= 3  # files, the wire, pictures of our own
    free = [path for path, call in calls if "formats" not in {x.arg for x in call.keywords}]
    assert not free
