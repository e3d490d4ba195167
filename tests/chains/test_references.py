"""Which images a turn is given: what a record may say, and where those images count."""

import pytest
from PIL import Image
from typer.testing import CliRunner

from mteditflow.chains import (
    Chain,
    ChainDataset,
    ChainError,
    read_chains,
    shared,
    split_chains,
    write_chains,
)
from mteditflow.chains.__main__ import app

TWO = {"id": "7", "image": "7.png", "instructions": ["Add the hat", "Undo it"]}
SEEN = [["last", "hat.png"], ["original", "last"]]


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("7", "8", "9", "hat")):
        Image.new("RGB", (4, 2), (number, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_record_says_it_or_the_usual_holds():
    plain = Chain(**TWO)
    assert plain.seen() == (("last",), ("last",))
    assert plain.seen("original") == (("last",), ("original", "last"))
    assert plain.first_turns(1).seen("original") == (("last",),)
    chain = Chain(**TWO, references=SEEN)
    assert chain.seen("original") == chain.seen() == chain.references
    assert chain.further_images == ("hat.png",)
    assert chain.first_turns(1).references == (("last", "hat.png"),)
    with pytest.raises(ValueError, match=r"history: expected one of \['last', 'original'\]"):
        plain.seen("all")


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([["last"]], "references: expected one entry for each of the 2 instructions, got 1"),
        (
            [["last"], ["first"]],
            "references[1][0]: expected 'original', 'last' or the path of an image, got 'first'",
        ),
        (
            [["original", "last"], ["last"]],
            "references[0]: expected each image once ('last' of turn 1 is the original), got "
            "['original', 'last']",
        ),
        (
            [["last"], ["a/b", "last", "a/b"]],
            "references[1]: expected each image once, got ['a/b', 'last', 'a/b']",
        ),
        ([["last"], "last"], "references[1]: expected a list, got 'last'"),
    ],
)
def test_what_no_turn_can_be_given_is_refused(references, message):
    with pytest.raises(ChainError) as caught:
        Chain.from_record(TWO | {"references": references})
    assert str(caught.value) == message
    if message.startswith("references: "):
        with pytest.raises(ChainError, match="expected none in a chain without a reference image"):
            Chain.from_record(TWO | {"image": None, "references": [["last"], ["last"]]})


def test_further_images_are_looked_for_as_reference_images_are(folder):
    file = folder / "chains.jsonl"

    def reason(name, **options):
        record = TWO | {"references": [["last"], ["last", name]]}
        file.write_text(Chain(**record).to_json())
        found = read_chains(file, strict=False, **options)
        return found.skipped[0].reason if found.skipped else None

    assert reason("hat.png", check_images=True) is None
    assert reason("none.png") is None
    missing = reason("none.png", check_images=True)
    assert missing == f"references: expected a file, got {str(folder / 'none.png')!r}"
    assert reason("../hat.png").startswith(f"references: expected a path within {str(folder)!r}")
    assert reason("../hat.png", allow_outside=True) is None
    remote = "https://x/hat.png"
    assert reason(remote) is None
    assert reason(remote, check_images=True).startswith("references: expected a file, got the addr")


def test_their_paths_lead_where_they_led_from_another_folder(folder):
    (folder / "last").mkdir()
    names = ("last/hat", "./last", "https://x/y.png", "/a/b.png")
    chain = Chain(**TWO, references=[["last", *names], ["original"]], root=folder)
    write_chains([chain], folder / "last" / "a.jsonl")
    (moved,) = read_chains(folder / "last" / "a.jsonl", allow_outside=True).chains
    assert moved.image == "../7.png"
    assert moved.references == (("last", "./hat", "./.", *names[2:]), ("original",))
    write_chains([moved], folder / "b.jsonl")
    (back,) = read_chains(folder / "b.jsonl", allow_outside=True).chains
    assert back.references == (("last", "last/hat", "./last", *names[2:]), ("original",))


@pytest.mark.parametrize("format", ["edit-r2", "seed-data-edit", "imgedit-multi-turn"])
def test_other_formats_keep_them_as_they_keep_any_field(format, folder):  # noqa: A002
    chain = Chain(**TWO, references=SEEN, root=folder)
    file = folder / f"x.{'json' if format.startswith('imgedit') else 'jsonl'}"
    write_chains([chain], file, format=format)
    (read,) = read_chains(file, format=format).chains
    assert read.references == chain.references


def test_a_conversion_tells_of_further_images_outside_of_its_folder(folder):
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    chain = Chain(**TWO | {"image": "out/7.png"}, references=SEEN, root=folder)
    write_chains([chain], folder / "in" / "a.jsonl")
    words = ["convert", str(folder / "in" / "a.jsonl"), str(folder / "out" / "b.jsonl")]
    told = CliRunner().invoke(app, [*words, "--allow-outside"])
    assert told.exit_code == 0
    assert "images of 1 chains lie outside" in told.output


def test_chains_that_share_a_further_image_stay_on_one_side(folder):
    def chain(name, image, *further):
        seen = [["last", *further], ["last"]]
        return Chain(**TWO | {"id": name, "image": image}, references=seen, root=folder)

    (folder / "copy.png").write_bytes((folder / "hat.png").read_bytes())
    linked = [chain("a", "7.png", "hat.png"), chain("b", "8.png", "copy.png")]
    chains = [*linked, chain("c", "9.png"), chain("d", "8.png")]
    sides = set()
    for seed in range(8):
        split = split_chains(chains, held_out=1, seed=seed)
        assert not shared(split.train, split.held_out).any
        sides.add(tuple(x.id for x in split.held_out))
    assert sides == {("c",), ("a", "b", "d")}
    both = shared(linked[:1], linked[1:])
    assert both.images == (("a", "b"),)
    assert shared([chain("e", "hat.png")], linked).images == (("e", "a"), ("e", "b"))


def test_a_data_set_loads_them_as_it_loads_reference_images(folder):
    chain = Chain(**TWO, references=SEEN, root=folder)
    plain = Chain(**TWO | {"id": "8"}, root=folder)
    data = ChainDataset([chain, plain], transform=lambda image: image.resize((2, 2)))
    (word, hat), second = data.seen(0, "original")
    assert (word, second) == ("last", ["original", "last"])
    assert (hat.size, hat.getpixel((0, 0))) == ((2, 2), (3, 0, 0))
    assert data.seen(1, "original") == [["last"], ["original", "last"]]
    broken = Chain(**TWO, references=[["none.png"], ["last"]], root=folder)
    with pytest.raises(ChainError, match=r"chain '7': expected a readable image, got .*none\.png"):
        ChainDataset([broken]).seen(0)
    far = Chain(**TWO, references=[["https://x/y.png"], ["last"]], root=folder)
    with pytest.raises(ChainError, match=r"expected an image file, got 'https://x/y\.png'"):
        ChainDataset([far]).seen(0)
