import codecs
import gzip
import json
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mteditflow.chains import (
    FORMATS,
    Chain,
    ChainError,
    Skipped,
    iter_chains,
    read_chains,
    recognize,
)
from tests.chains.samples import FILES, png_header
from tests.loops import some

GOOD = '{"id": "1", "image": "1.png", "instructions": ["Remove the cat"]}'


def exactly(text):
    return f"^{re.escape(text)}$"


def written(folder, content, name="chains.jsonl"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def line(number, **fields):
    return json.dumps({"id": str(number), "image": "x.png", "instructions": ["do"], **fields})


def reasons(path, **options):
    reading = read_chains(path, strict=False, **options)
    return {skipped.line: skipped.reason for skipped in reading.skipped}


# Recognition


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognised_by_its_content(name, tmp_path):
    assert recognize(FILES[name]).name == name
    content, chains = FILES[name].read_bytes(), read_chains(FILES[name]).chains
    for number, changed in enumerate(
        (codecs.BOM_UTF8 + content, b"\n \r\n" + content, content.replace(b"\n", b"\r\n"))
    ):
        path = written(tmp_path, changed, f"{number}")
        assert recognize(path).name == name
        for chain, other in some(zip(read_chains(path).chains, chains, strict=True)):
            assert chain.to_record() | {"id": ""} == other.to_record() | {"id": ""}


def test_an_object_on_one_line_is_recognised(tmp_path):
    entry = {"id": "a.png", "prompt": "Add a hat", "edit_type": "add"}
    path = written(tmp_path, json.dumps({"1": entry, "2": entry}))
    assert recognize(path).name == "imgedit"
    assert len(read_chains(path).chains) == 2


def test_broken_lines_before_the_first_good_one_do_not_hide_the_format(tmp_path):
    path = written(tmp_path, "{broken\n[]\n\n" + GOOD)
    reading = read_chains(path, strict=False)
    assert [chain.id for chain in reading.chains] == ["1"]
    assert [skipped.line for skipped in reading.skipped] == [1, 2]


@pytest.mark.parametrize(
    ("content", "got"),
    [
        *((content, "no record") for content in ("", "\n\n", "hello", "[]", "{")),
        ('{"a": 1}', "the keys ['a']"),
        ("a,b\n1,2\n", "the keys ['a', 'b']"),
        (
            "image_index,turns\n0,1\n",
            "the keys ['image_index', 'turns']; the nearest is edival, wh",
        ),
        (
            '[{"imag": "a.png", "instruction": ["Add a dog"]}]',
            "the keys ['imag', 'instruction']; the nearest is edit-r2, which needs ['image']",
        ),
        (
            '{"a": 1, "b": 2, "c": 3}\n{"promp": "Add a dog", "image": "a.png"}\n',
            "the keys ['image', 'promp']; the nearest is flow-grpo, which needs ['prompt']",
        ),
        (
            '{"1": {"id": "a.png", "prompts": "Add a dog"}}',
            "the keys ['id', 'prompts']; the nearest is imgedit, which needs ['prompt']",
        ),
    ],
)
def test_what_cannot_be_told_lists_the_formats_what_was_seen_and_what_is_near(
    content, got, tmp_path
):
    path = written(tmp_path, content)
    expected = f"{path}: expected content of one of the formats {', '.join(FORMATS)}, got {got}"
    with pytest.raises(ChainError) as caught:
        read_chains(path, strict=False)
    assert str(caught.value)[: len(expected)] == expected


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (GOOD.encode("utf-16"), "UTF-16 or UTF-32; save it as UTF-8"),
        (GOOD.encode("utf-32"), "UTF-16 or UTF-32; save it as UTF-8"),
        (GOOD.encode("utf-16-le"), "a file with NUL bytes"),
        (b"\0", "a file with NUL bytes"),
        (b"no record\n" * 300 + b"\0", "a file with NUL bytes"),
        (gzip.compress(GOOD.encode(), mtime=0), "a compressed file; unpack it first"),
        (b"PK\x03\x04 and so on", "a compressed file; unpack it first"),
    ],
    ids=["utf-16", "utf-32", "utf-16-le", "nul", "nul at 3,000", "gzip", "zip"],
)
def test_what_is_no_text_is_named(content, got, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(ChainError, match=exactly(f"{path}: expected UTF-8 text, got {got}")):
        read_chains(path, strict=False)


def test_nul_bytes_beside_good_lines_cost_their_own_line(tmp_path):
    reading = read_chains(written(tmp_path, "\0\0\n" + GOOD), strict=False)
    assert [chain.id for chain in reading.chains] == ["1"]
    assert [skipped.line for skipped in reading.skipped] == [1]


def test_unknown_format_and_missing_file(tmp_path):
    message = f"format: expected one of {list(FORMATS)}, got 'csv'"
    with pytest.raises(ValueError, match=exactly(message)):
        read_chains(FILES["native"], format="csv")
    with pytest.raises(FileNotFoundError):
        read_chains(tmp_path / "none.jsonl")


# Strict and lenient


def test_strict_stops_with_file_line_and_reason_and_lenient_goes_on(tmp_path):
    path = written(tmp_path, f"{GOOD}\n\n{line(2, image=3)}\n{line(3)}\n{line(4, id=None)}\n")
    with pytest.raises(ChainError, match=exactly(f"{path}:3: image: expected text, got 3")):
        read_chains(path)
    reading = read_chains(path, strict=False)
    assert [chain.id for chain in reading.chains] == ["1", "3"]
    assert reading.skipped == (
        Skipped(path, 3, "image: expected text, got 3"),
        Skipped(path, 5, "id: expected text, got None"),
    )
    assert str(reading.skipped[1]) == f"{path}:5: id: expected text, got None"


def test_duplicate_ids_name_the_first_line(tmp_path):
    path = written(tmp_path, "\n".join([line(1), line(2), line(1), line(1)]))
    assert reasons(path) == dict.fromkeys(
        (3, 4), "id: expected a new one, got '1' again, as on line 1"
    )
    with pytest.raises(ChainError, match=r":3: id: expected a new one"):
        read_chains(path)


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_file_is_bad_whatever_its_format(name, tmp_path):
    path = written(tmp_path, b"")
    reading = read_chains(path, format=name, strict=False)
    assert reading.chains == ()
    assert [skipped.line for skipped in reading.skipped] == [1]
    with pytest.raises(ChainError, match=rf"{re.escape(str(path))}:1: expected "):
        read_chains(path, format=name)


def test_images_are_looked_for_only_where_asked(tmp_path):
    lines = [line(1, image="here.png"), line(2), line(3, image="https://a.example/b.png")]
    path = written(tmp_path, "\n".join([*lines, line(4, image="folder"), line(5, image="\0")]))
    Image.new("RGB", (1, 1)).save(tmp_path / "here.png")
    (tmp_path / "folder").mkdir()
    assert len(read_chains(path).chains) == 5
    found = reasons(path, check_images=True)
    assert found.keys() == {2, 3, 4, 5}
    assert found[2] == f"image: expected a file, got {str(tmp_path / 'x.png')!r}"
    assert found[3] == "image: expected a file, got the address 'https://a.example/b.png'"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (1, 1)).save(elsewhere / "x.png")
    assert reasons(path, check_images=True, images=elsewhere).keys() == {1, 3, 4, 5}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_begins_unlike_one_is_bad(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "still.png", "GIF")
    colors = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    colors[0].save(tmp_path / "moving.gif", save_all=True, append_images=colors[1:])
    (tmp_path / "none.png").touch()
    (tmp_path / "page.png").write_bytes(b"<html>404</html>")
    (tmp_path / "huge.png").write_bytes(png_header(13_000, 13_000))
    images = ["still.png", "moving.gif", "none.png", "page.png", "huge.png"]
    path = written(tmp_path, "\n".join(line(n, image=x) for n, x in enumerate(images)))
    found = reasons(path, check_images=True)
    assert found.keys() == {2, 3, 4, 5}  # a picture's name need not say its format
    assert all(x.startswith("image: expected a readable image, got ") for x in some(found.values()))
    assert "(ValueError: expected one still image, got 2 frames" in found[2]
    assert "(UnidentifiedImageError: " in found[4]
    assert "got 13000 x 13000" in found[5]


@pytest.mark.parametrize("name", ["n" * 256 + ".png", "a" * 10**6, "\0.png"])
def test_a_name_that_the_system_refuses_costs_its_own_chain(name, tmp_path):
    path = written(tmp_path, "\n".join([line(1, image=name), line(2, image="here.png")]))
    Image.new("RGB", (1, 1)).save(tmp_path / "here.png")
    reading = read_chains(path, strict=False, check_images=True)
    assert [chain.id for chain in reading.chains] == ["2"]
    (skipped,) = reading.skipped
    assert skipped.reason.startswith("image: expected a file, got ")
    assert len(skipped.reason) < 500


def test_a_name_that_is_not_unicode_costs_its_own_chain(tmp_path):
    path = written(tmp_path, '{"id": "1", "image": "\\udcff.png", "instructions": ["do"]}\n' + GOOD)
    assert reasons(path) == {1: "image: expected valid Unicode text, got '\\udcff.png'"}


@pytest.mark.parametrize("image", ["../x.png", "deep/../../x.png", "/etc/passwd", ".."])
def test_an_image_outside_of_the_folder_has_to_be_allowed(image, tmp_path):
    path = written(tmp_path, line(1, image=image))
    reason = f"image: expected a path within {str(tmp_path)!r}, got {image!r}; --allow-outside"
    assert reasons(path)[1].startswith(reason)
    (chain,) = read_chains(path, allow_outside=True).chains
    assert chain.image == image
    within = ["deep/../x.png", str(tmp_path / "x.png"), "..x.png", "https://a.example/../b.png"]
    path = written(tmp_path, "\n".join(line(n, image=x) for n, x in enumerate(within)))
    assert [chain.image for chain in read_chains(path).chains] == within


def test_a_link_within_the_folder_may_lead_anywhere(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "images" / "x.png")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "photos").symlink_to(tmp_path / "images")
    path = written(tmp_path / "lists", line(1, image="photos/x.png"))
    assert read_chains(path, check_images=True).chains[0].image_path.is_file()


def test_images_are_relative_to_the_file_or_to_a_folder(tmp_path):
    path = written(tmp_path, GOOD)
    assert read_chains(path).chains[0].image_path == tmp_path / "1.png"
    chain = read_chains(path, images="photos").chains[0]
    assert chain.image_path.as_posix() == "photos/1.png"


# Lines


BAD_LINES = {
    "broken": (b'{"id": ', "expected one JSON object, got '{\"id\":' (Expecting value"),
    "list": (b"[1]", "expected one JSON object, got '[1]'"),
    "number": (b"12", "expected one JSON object, got '12'"),
    "two objects": (b"{} {}", "expected one JSON object, got '{} {}' (Extra data"),
    "NaN": (b'{"a": NaN}', "expected one JSON object, got '{\"a\": NaN}' (NaN is not JSON)"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not JSON)"),
    "key twice": (b'{"b": 1, "a": 1, "a": 2}', "(the key 'a' occurs twice)"),
    "deep key twice": (b'{"b": [{"a": 1, "a": 2}]}', "(the key 'a' occurs twice)"),
    "Latin-1": ('{"id": "\u00fc"}'.encode("latin-1"), "expected UTF-8 text, got byte 0xfc"),
    "UTF-16": ('{"id": "1"}'.encode("utf-16"), "expected UTF-8 text, got byte 0xff"),
    "deep": (b'{"a": ' + b"[" * 10**5, 'expected one JSON object, got \'{"a": [[['),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", "expected one JSON object"),
    "control character": (b'{"id": "a\x01"}', "Invalid control character"),
}


@pytest.mark.parametrize(("raw", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_cost_no_other(raw, reason, tmp_path):
    path = written(tmp_path, GOOD.encode() + b"\n" + raw + b"\n" + line(2).encode())
    reading = read_chains(path, strict=False)
    assert [chain.id for chain in reading.chains] == ["1", "2"]
    (skipped,) = reading.skipped
    assert skipped.line == 2
    assert reason in skipped.reason
    assert len(skipped.reason) < 300
    assert "\n" not in skipped.reason


def test_unicode_and_line_separators_within_text(tmp_path):
    text = "学堂 \u2028 \x85 \x1c \U0001f600 e\u0301"
    path = written(tmp_path, json.dumps(json.loads(line(1, further=text)), ensure_ascii=False))
    (chain,) = read_chains(path).chains
    assert chain.further == text


def test_long_lines(tmp_path):
    long = "x" * 3_000_000
    path = written(tmp_path, line(1, instructions=[long]) + "\n" + line(2))
    assert [len(chain.instructions[0]) for chain in read_chains(path).chains] == [len(long), 2]


def test_a_file_is_read_line_by_line(tmp_path):
    path = written(tmp_path, "\n".join(line(n, note="x" * 1000) for n in range(5000)))
    tracemalloc.start()
    count = sum(isinstance(found, Chain) for found in iter_chains(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5000
    assert peak < 3_000_000 < path.stat().st_size  # ids and line numbers are kept


# Whatever comes

BITS = [b'"', b"'", *(bytes([x]) for x in b"[]{},:\n\\\x00\xff"), b"\\ud800", b"null", b"True"]


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(max_examples=60)
def test_no_damage_to_a_file_raises_anything_else(name, data, tmp_path_factory):
    content = bytearray(FILES[name].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(0, 20))
        content[place : place + length] = data.draw(st.binary(max_size=3) | st.sampled_from(BITS))
    path = written(tmp_path_factory.getbasetemp(), bytes(content), f"damaged-{name}")
    reading = read_chains(path, format=name, strict=False)
    for found in some([*reading.chains, *reading.skipped]):  # nothing is lost without a word
        if isinstance(found, Chain):
            assert Chain.from_record(json.loads(found.to_json())).to_record().keys()
        else:
            assert found.reason.isprintable()
            assert 1 <= found.line <= content.count(b"\n") + 1


BITS = [
    b'"',
    b"'",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b"\n",
    b"\\",
    b"\\ud800",
    b"null",
    b"\x00",
    b"\xff",
]
