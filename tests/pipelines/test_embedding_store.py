"""Embeddings on disk: found again by what made them, and made before the transformer moves in."""

import pytest
import torch
from mteditflow_examples.shapes.editor import build_klein, build_kontext, call_options
from tiny import CHAIN, picture
from tiny_editors import build as build_tiny
from torch import nn

from mteditflow import trajectory_generators
from mteditflow.pipelines import Editor, Prompts
from mteditflow.pipelines.embedding_store import EmbeddingStore
from mteditflow.pipelines.prompts import Instruction
from tests.loops import some

EMBEDDINGS = [
    [torch.ones(1, 2), None, [torch.zeros(3, dtype=torch.bfloat16), torch.ones(0)]],
    [None],
    [],
    [[], torch.tensor([[True, False]])],
]


class Encoder(nn.Module):
    """Counts what it embeds."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, text):
        self.asked.append(text)
        return [torch.full((1, 3), float(len(text)))]


def prompts(encoder, folder, made_by="a", capacity=1):
    store = EmbeddingStore(folder, made_by)
    return Prompts(encoder, [encoder], "cpu", capacity=capacity, store=store)


def equal(one, other):
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one is other is None or (one.dtype == other.dtype and torch.equal(one, other))


@pytest.mark.parametrize("embeddings", EMBEDDINGS)
def test_embeddings_of_any_form_come_back(tmp_path, embeddings):
    store = EmbeddingStore(tmp_path / "new" / "folder", "a")
    store.write("Add a cat", embeddings)
    assert equal(store.read("Add a cat"), embeddings)
    assert store.read("Add a dog") is None


def test_another_run_finds_them_and_another_model_does_not(tmp_path):
    first, second, other = Encoder(), Encoder(), Encoder()
    found = prompts(first, tmp_path)(["Add", "Remove it"])
    again = prompts(second, tmp_path)(["Remove it", "Add", "Zoom"])
    assert second.asked == ["Zoom"]
    assert all(torch.equal(again[text][0], found[text][0]) for text in some(found))
    prompts(other, tmp_path, made_by="b")(["Add"])
    assert other.asked == ["Add"]


def test_what_the_host_forgets_is_read_again(tmp_path):
    encoder = Encoder()
    look_up = prompts(encoder, tmp_path, capacity=1)
    look_up(["Add", "Zoom"])
    look_up(["Add"])
    assert encoder.asked == ["Add", "Zoom"]


def test_what_is_prepared_is_embedded_once_and_not_kept_on_the_host(tmp_path):
    encoder = Encoder()
    look_up = prompts(encoder, tmp_path, capacity=8)
    assert look_up.prepare(["Add", "Zoom", "Add"]) == 2
    assert look_up.prepare(["Zoom", "Remove it"]) == 1
    assert encoder.asked == ["Add", "Zoom", "Remove it"]
    (file,) = [x for x in tmp_path.rglob("*.safetensors") if b"Zoom" not in x.read_bytes()][:1]
    file.unlink()
    look_up(["Add", "Zoom", "Remove it"])
    assert len(encoder.asked) == 4


def test_what_is_stored_is_not_read_at_the_start(tmp_path, monkeypatch):
    encoder = Encoder()
    look_up = prompts(encoder, tmp_path)
    look_up.prepare(["Add"])
    monkeypatch.setattr(EmbeddingStore, "read", lambda *_: pytest.fail("read"))
    assert look_up.prepare(["Add", "Zoom"]) == 1
    (file, _) = sorted(tmp_path.rglob("*.safetensors"))
    whole = file.read_bytes()
    for damaged in some([whole[:20], b"", whole[:-1], whole.replace(b"about", b"ab0ut")]):
        file.write_bytes(damaged)  # seen in the header: made while the encoders are at work
        assert prompts(Encoder(), tmp_path).prepare(["Add", "Zoom"]) == 1
        assert file.read_bytes() == whole


def test_damaged_numbers_are_found_when_they_are_looked_up(tmp_path):
    first, second = Encoder(), Encoder()
    prompts(first, tmp_path).prepare(["Add"])
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    look_up = prompts(second, tmp_path)
    assert look_up.prepare(["Add"]) == 0
    assert torch.equal(look_up(["Add"])["Add"][0], torch.full((1, 3), 3.0))
    assert second.asked == ["Add"]
    assert file.read_bytes() == whole


def test_a_damaged_file_is_made_again(tmp_path):
    encoder = Encoder()
    prompts(encoder, tmp_path)(["Add"])
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])  # one bit of one number
    for damaged in some([whole[:20], b"", whole.replace(b"about", b"ab0ut"), flipped]):
        file.write_bytes(damaged)
        prompts(encoder, tmp_path)(["Add"])
        assert file.read_bytes() == whole
    assert encoder.asked == ["Add"] * 5


def test_a_file_of_another_instruction_is_made_again(tmp_path):
    store = EmbeddingStore(tmp_path, "a")
    for number, text in enumerate(("Add", "Zoom")):
        store.write(text, [torch.tensor([number])])
    add, zoom = (store._path(text) for text in ("Add", "Zoom"))
    add.write_bytes(zoom.read_bytes())
    assert store.read("Add") is None


def test_a_store_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        prompts(Encoder(), tmp_path / "file")(["Add"])


def test_nothing_is_prepared_without_a_store():
    with pytest.raises(ValueError, match="prompts: expected a store"):
        Prompts(Encoder(), [], "cpu", capacity=1).prepare(["Add"])


def test_instructions_differ_by_text_side_and_picture(tmp_path):
    store = EmbeddingStore(tmp_path, "a")
    image, other = picture(build_kontext(), 0), picture(build_kontext(), 1)
    asked = [
        Instruction("Add"),
        Instruction("Add", negative=True),
        Instruction.about("Add", image),
        Instruction.about("Add", other),
    ]
    for number, instruction in enumerate(asked):
        store.write(instruction, [torch.tensor([number])])
    assert [int(store.read(x)[0]) for x in asked] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    for name, build in {"kontext": build_kontext, "klein": build_klein}.items():
        build().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", ["kontext", "klein"])
def test_an_editor_embeds_ahead_and_edits_the_same(saved, tmp_path, name):
    build = {"kontext": build_kontext, "klein": build_klein}[name]
    plain, call = build(), call_options(build(), steps=2)
    del call["output_type"]
    call |= {"guidance_scale": 4.0} if name == "klein" else {}
    references, chains = [picture(plain, 0)], [CHAIN[0]]

    def edited(editor):
        images = editor.edit(references, chains, generators=trajectory_generators(0, 1), batch=1)
        return [image.tobytes() for image in images[0]]

    expected = edited(Editor.load(saved / name, call=call))
    for _ in range(2):
        editor = Editor.load(
            saved / name,
            call=call,
            encoder_device="cpu",
            prompt_folder=tmp_path / "store",
            instructions=chains[0],
        )
        editor._prompts._encoders.append(Untouchable())
        assert edited(editor) == expected
    files = len(list((tmp_path / "store").rglob("*.safetensors")))
    assert files == len(set(chains[0])) + (name == "klein")  # its negative prompt
    longer = call | {"max_sequence_length": 9}
    Editor.load(saved / name, call=longer, prompt_folder=tmp_path / "store", instructions=chains[0])
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 2 * files


class Untouchable(nn.Module):
    """An encoder that must not be moved, because nothing is left to embed."""

    def parameters(self, recurse=True):
        raise AssertionError("the encoders were moved")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kontext", {"instructions": ["Add"]}, "prompt_folder: expected a folder for the 1"),
        ("qwen-edit", {"prompt_folder": "x"}, "prompt_folder: .* reads each turn's image"),
        ("kontext", {"quantize": "int4"}, r"quantize: expected one of .*, got 'int4'"),
    ],
)
def test_options_that_would_be_ignored_are_refused(saved, tmp_path, name, options, message):
    folder = saved / name
    if not folder.exists():
        build_tiny(name).save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        Editor.load(folder, **options)
