"""The world on disk: what a trainer loads is the shipped editor and the demo's own chains."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from mteditflow_examples.shapes import files
from mteditflow_examples.shapes.editor import Family, call_options, load_editor
from mteditflow_examples.shapes.files import SPLITS, write_world
from mteditflow_examples.shapes.served import chain_of
from mteditflow_examples.shapes.vision import pixels_of
from mteditflow_examples.shapes.world import make_chains
from PIL import Image

from mteditflow.chains import ChainDataset, read_chains
from tests.loops import some

COUNTS = (3, 2)


@pytest.fixture(scope="module", params=list(Family))
def world(request, tmp_path_factory):
    family = request.param
    folder = tmp_path_factory.mktemp(family.value) / "new" / "world"
    return family, folder, write_world(folder, family, seed=5, counts=COUNTS, turns=2)


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_chains_are_those_of_the_demo_and_their_pictures_say_so(world):
    family, folder, _ = world
    side = 12 if family is Family.kontext else 96
    for split, count in zip(SPLITS, COUNTS, strict=True):
        reading = read_chains(folder / f"{split}.jsonl", check_images=True)
        chains = make_chains(count, turns=2, seed=5, split=split, linked=1.0)
        for example, chain in some(zip(ChainDataset(reading.chains), chains, strict=True)):
            assert example.image.size == (side, side)
            blocks = pixels_of(example.image)[:, :: side // 12, :: side // 12]
            again = blocks.repeat_interleave(side // 12, 1).repeat_interleave(side // 12, 2)
            assert torch.equal(again, pixels_of(example.image))
            assert chain_of(blocks, example.chain.instructions).states == chain.states


@pytest.mark.filterwarnings("ignore")
def test_the_model_is_the_shipped_editor_and_edits_the_pictures(world):
    family, folder, _ = world
    loaded, shipped = DiffusionPipeline.from_pretrained(folder / "model"), load_editor(family.value)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(shipped)
    [chain, *_] = read_chains(folder / "train.jsonl").chains
    with Image.open(chain.image_path) as image:
        made = [
            pipeline(
                image=image.convert("RGB"),
                prompt=chain.instructions[0],
                generator=torch.Generator().manual_seed(0),
                **call_options(pipeline) | {"output_type": "pil"},
            ).images[0]
            for pipeline in (loaded, shipped)
        ]
    assert made[0].size == image.size
    assert torch.equal(*map(pixels_of, made))


def test_nothing_unsafe_and_nothing_half_written_is_left(world):
    _, folder, said = world
    written = content(folder)
    safe = {".json", ".jsonl", ".jinja", ".png", ".safetensors"}
    assert {path.suffix for path in written} <= safe
    assert not list(folder.rglob(".*"))
    assert len(list((folder / "images").iterdir())) == sum(COUNTS)
    assert [line.partition(":")[0] for line in said] == [
        str(folder / name) for name in ("model", "train.jsonl", "held_out.jsonl")
    ]


def test_written_again_it_is_the_same_and_leaves_the_rest_alone(world):
    family, folder, _ = world
    before = content(folder)
    (folder / "notes.txt").write_text("mine")
    write_world(folder, family, seed=5, counts=COUNTS, turns=2)
    (folder / "notes.txt").unlink()
    assert content(folder) == before


def test_a_write_that_fails_leaves_what_was_there(world, monkeypatch):
    family, folder, _ = world
    before = content(folder)

    class Full:
        def save_pretrained(self, part):
            part.mkdir()
            (part / "model_index.json").write_text("{")
            raise OSError("no space left")

    monkeypatch.setattr(files, "load_editor", lambda name: Full())
    with pytest.raises(OSError, match="no space left"):
        write_world(folder, family, seed=6, counts=COUNTS, turns=2)
    assert content(folder) == before
    assert json.loads((folder / "model" / "model_index.json").read_text())


def test_the_command_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files.logging, "disable_progress_bar", lambda: None)
    files.main(tmp_path, Family.kontext, seed=0, train_chains=2, held_out=1, turns=1)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'train.jsonl'}: 2 chains of 1 turns" in said
    assert read_chains(tmp_path / "held_out.jsonl").chains[0].turns == 1
