"""Image files of others: a list of formats, a bound on pixels, and no other way to open one."""

import ast
import struct
import zlib
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from mteditflow._images import FILE_FORMATS, MAX_PIXELS, check_image, read_image
from mteditflow.chains import Chain, ChainDataset, ChainError, EditedImages
from mteditflow.evaluation.benchmarks import Item
from mteditflow.evaluation.benchmarks.items import _load
from mteditflow.planner.run import open_image
from mteditflow.rewards.consistency.wire import Limits

ROOT = Path(__file__).parents[1]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def png_header(width, height):
    """A PNG of that size with no pixels in it: 45 bytes that ask for up to gigabytes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(b""), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(x) - 4) + x + struct.pack(">I", zlib.crc32(x)) for x in chunks
    )


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


@pytest.mark.parametrize("letter", ["a", "\u5b66"])
def test_edits_of_a_chain_with_a_long_id_have_a_folder_of_their_own(letter, tmp_path):
    edited = EditedImages(tmp_path)
    chains = [Chain(id=letter * 400 + end, image="7.png", instructions=["Do"]) for end in "xy"]
    assert not any(edited.complete(chain) for chain in chains)
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
