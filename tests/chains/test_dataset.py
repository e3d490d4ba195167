import contextlib
import io
import re

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from mteditflow.chains import Chain, ChainDataset, ChainError, GroupSampler, collate_chains
from tests.loops import some
from tests.processes import START_METHOD

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (90, 80, 70)]


def chain(image, folder, name="7"):
    return Chain(id=name, image=image, instructions=["Remove the cat"], root=folder)


def loaded(image, folder, **options):
    image.save(folder / "x.png", **options)
    return ChainDataset([chain("x.png", folder)])[0].image


@pytest.fixture
def folder(tmp_path):
    for number, color in enumerate(COLORS):
        Image.new("RGB", (4, 2), color).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def chains(folder):
    return [chain(f"{number}.png", folder, str(number)) for number in range(len(COLORS))]


def test_every_common_kind_becomes_rgb(tmp_path):
    for mode, color, expected in (
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("LA", (9, 0), (9, 9, 9)),
        ("RGBA", (1, 2, 3, 4), (1, 2, 3)),
    ):
        image = loaded(Image.new(mode, (3, 2), color), tmp_path)
        assert (image.mode, image.size, image.getpixel((2, 1))) == ("RGB", (3, 2), expected)


@pytest.mark.parametrize("transparency", [0, bytes([10, 200])])
def test_a_palette_with_transparency_shows_its_colours(transparency, tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putpixel((1, 0), 1)
    image = loaded(palette, tmp_path, transparency=transparency)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(1, 2, 3), (4, 5, 6)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    # what a camera writes, by the standard: row 0 of the stored image is the top, right, ...
    upright = Image.new("RGB", (3, 2))
    upright.putpixel((0, 0), (255, 0, 0))
    turned = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = loaded(turned, tmp_path, exif=exif)
    assert image.tobytes() == upright.tobytes()
    assert image.size == (3, 2)


def test_what_cannot_be_loaded_names_chain_and_path(folder, monkeypatch):
    def reason(name):
        with pytest.raises(ChainError) as caught:
            ChainDataset([chain(name, folder, "the chain")])[0]
        path = re.escape(repr(str(folder / name)))
        pattern = rf"chain 'the chain': expected a readable image, got {path} \((.*)\)"
        return re.fullmatch(pattern, str(caught.value))[1]

    (folder / "text.png").write_text("no image", encoding="utf-8")
    (folder / "empty.png").touch()
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "spoilt.png").write_bytes(whole[:20] + b"\0" * 20 + whole[40:])
    Image.new("I;16", (2, 2)).save(folder / "deep.png")
    assert reason("none.png").startswith("FileNotFoundError")
    assert reason("text.png").startswith("UnidentifiedImageError")
    assert reason("empty.png").startswith("UnidentifiedImageError")
    assert reason("cut.png").startswith(("OSError", "SyntaxError", "Unid"))
    assert reason("spoilt.png").startswith(("OSError", "SyntaxError", "ValueError", "Unid"))
    assert reason("deep.png") == "ValueError: expected 8 bits a channel, got mode I;16"
    (folder / "folder").mkdir()
    assert reason("folder").startswith("IsADirectoryError")
    message = r"^chain 'x': expected an image file, got 'https://a\.example/b\.png'$"
    with pytest.raises(ChainError, match=message):
        ChainDataset([chain("https://a.example/b.png", folder, "x")])[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    assert reason("0.png").startswith("DecompressionBombError")


def test_damage_anywhere_in_an_image_gives_a_picture_or_the_error(tmp_path):
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        whole = io.BytesIO()
        Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(whole, kind)
        content = whole.getvalue()
        for place in some(range(0, len(content), max(1, len(content) // 40))):
            damaged = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
            for end in (len(content), place):
                (tmp_path / "x").write_bytes(damaged[:end])
                with contextlib.suppress(ChainError):
                    assert ChainDataset([chain("x", tmp_path)])[0].image.mode == "RGB"


def test_group_is_the_index_also_from_the_end_and_in_a_subset(chains):
    dataset = ChainDataset(chains)
    assert len(dataset) == 5
    assert (dataset[-1].group, dataset[-1].chain) == (4, chains[4])
    assert [x.group for x in Subset(dataset, [3, 1])] == [3, 1]
    with pytest.raises(IndexError):
        dataset[5]


def to_tensor(image):
    return torch.tensor(image.getpixel((0, 0)))


def test_members_of_a_group_share_one_image_loaded_once(chains):
    calls = []
    dataset = ChainDataset(chains, transform=lambda image: calls.append(1) or image)
    examples = dataset.__getitems__([2, 2, 0, 2])
    assert [x.group for x in examples] == [2, 2, 0, 2]
    assert len(calls) == 2
    assert examples[0].image is examples[3].image


def test_collate(chains):
    batch = collate_chains([ChainDataset(chains)[n] for n in (1, 1, 4)])
    assert batch.chains == (chains[1], chains[1], chains[4])
    assert [image.getpixel((0, 0)) for image in batch.images] == [COLORS[n] for n in (1, 1, 4)]
    assert batch.group.tolist() == [1, 1, 4]
    assert batch.group.dtype == torch.int64
    stacked = collate_chains([ChainDataset(chains, transform=to_tensor)[n] for n in (1, 4)])
    assert stacked.images.tolist() == [list(COLORS[1]), list(COLORS[4])]
    sizes = iter([torch.zeros(2), torch.zeros(3)])
    dataset = ChainDataset(chains, transform=lambda _: next(sizes))
    ragged = collate_chains([dataset[0], dataset[1]])
    assert [len(x) for x in ragged.images] == [2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_gives_the_sampled_groups_and_resumes_in_spite_of_fetching_ahead(
    workers, chains
):
    dataset = ChainDataset(chains, transform=to_tensor)
    options = {"groups": 1, "group_size": 3, "seed": 5}

    def loader(sampler, workers=0):
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate_chains,
            num_workers=workers,
            multiprocessing_context=START_METHOD if workers else None,
        )

    expected = list(GroupSampler(dataset, **options))
    sampler = GroupSampler(dataset, **options)
    assert len(loader(sampler)) == 5
    seen, states = [], []
    for batch in some(loader(sampler, workers)):
        assert batch.images.tolist() == [list(COLORS[n]) for n in batch.group.tolist()]
        seen.append(batch.group.tolist())
        sampler.step()
        states.append(sampler.state_dict())
    assert seen == expected
    resumed = GroupSampler(dataset, **options)
    resumed.load_state_dict(states[1])
    assert [batch.group.tolist() for batch in loader(resumed)] == expected[2:]
