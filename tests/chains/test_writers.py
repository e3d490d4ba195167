import os
import re
import stat

import pytest

from mteditflow.chains import Chain, ChainError, Refused, Writing, read_chains, write_chains
from tests.loops import some


def chain(name="7", image="7.png", **fields):
    return Chain(id=name, image=image, instructions=["Remove the cat"], **fields)


def test_images_lead_where_they_led_from_another_folder(tmp_path):
    photos, lists = tmp_path / "photos", tmp_path / "a" / "lists"
    lists.mkdir(parents=True)
    images = ["7.png", "../7.png", "deep/ 7.png", "/abs/7.png", "https://a.example/7.png"]
    there = [chain(str(n), image, root=photos) for n, image in enumerate(images)]
    write_chains(there, lists / "x.jsonl")
    back = read_chains(lists / "x.jsonl", allow_outside=True).chains
    assert [x.image for x in back] == [
        "../../photos/7.png",
        "../../7.png",
        "../../photos/deep/ 7.png",
        *images[3:],
    ]
    for old, new in some(zip(there[:4], back[:4], strict=True)):
        assert os.path.abspath(old.image_path) == os.path.abspath(new.image_path)


def test_an_image_beside_the_file_keeps_its_path_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path, ".", "../" + tmp_path.name):
        write_chains([chain(image="./a/../7.png", root=root)], "x.jsonl")
        assert read_chains("x.jsonl").chains[0].image == "./a/../7.png"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("old", encoding="utf-8")

    def failing():
        yield chain()
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_chains(failing(), path)
    message = re.escape("native cannot hold chain '7': id: expected a new one, got it again")
    with pytest.raises(ChainError, match=f"^{message}$"):
        write_chains([chain(), chain()], path)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        write_chains([chain()], tmp_path / "none" / "x.jsonl")
    with pytest.raises(ValueError, match=r"^format: expected one of \['native', "):
        write_chains([chain()], path, format="csv")


def test_lenient_leaves_out_and_counts(tmp_path):
    drawn = [chain("1"), chain("2", further={1}), chain("1"), chain("3")]
    writing = write_chains(drawn, tmp_path / "x.jsonl", strict=False)
    assert writing == Writing(
        2,
        (
            Refused("2", writing.refused[0].reason),
            Refused("1", "id: expected a new one, got it again"),
        ),
    )
    assert [x.id for x in read_chains(tmp_path / "x.jsonl", allow_outside=True).chains] == [
        *("1", "3")
    ]


def test_a_file_may_be_replaced_by_its_own_conversion(tmp_path):
    path = tmp_path / "x.jsonl"
    write_chains([chain("1", root=tmp_path), chain("2", root=tmp_path)], path)
    write_chains(read_chains(path).chains, path, format="flow-grpo")
    assert [x.id for x in read_chains(path, format="flow-grpo").chains] == ["1", "2"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_half_a_surrogate_pair_survives(tmp_path):
    path = tmp_path / "x.jsonl"
    write_chains([chain(further="\ud800", more="\U0001f600", root=tmp_path)], path)
    (back,) = read_chains(path).chains
    assert (back.further, back.more) == ("\ud800", "\U0001f600")
    assert "\U0001f600" in path.read_text(encoding="utf-8")
