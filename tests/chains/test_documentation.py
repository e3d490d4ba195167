"""Everything in docs/chains.md that can run does, in a folder of small files of the same names."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mteditflow.chains import FORMATS, TASK_TYPES, Chain
from mteditflow.chains.__main__ import app
from mteditflow.chains.formats.imgedit import TYPES
from tests.chains.samples import FILES
from tests.loops import some

PAGE = (Path(__file__).parents[2] / "docs" / "chains.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(FILES["edival"], "oai_instruction_generation_output.csv")
    shutil.copy(FILES["pico-banana"], "multi-turn.jsonl")
    images = tmp_path / "input_images_resize_512"
    images.mkdir()
    for name in (4, 7):
        Image.new("RGB", (4, 4), (0, 30 * name, 0)).save(images / f"{name}_input_raw.jpg")
    return tmp_path


def test_every_command_and_every_program_runs(folder, capsys):
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) > 4
    for command in some(commands):
        start, arguments = command[: len(PREFIX)], shlex.split(command[len(PREFIX) :])
        assert start == PREFIX
        few = ["1" if word == "64" else word for word in arguments]  # the file has two chains
        result = CliRunner().invoke(app, few)
        assert result.exit_code == 0, command + result.stderr
    programs = "\n".join(blocks("python"))
    space = {}
    exec(compile(programs, "docs/chains.md", "exec"), space)
    assert space["sampler"].epoch == 3
    assert space["batch"].group.tolist() in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)
    assert "multi-turn.jsonl 1 image: expected a file" in capsys.readouterr().out


PREFIX = "python -m mteditflow.chains "


def test_the_record_that_is_shown_has_every_field():
    (shown,) = blocks("json")
    chain = Chain.from_record(json.loads(shown))
    assert chain.to_record().keys() == (Chain.model_fields.keys() - {"root"}) | {"photographer"}


def test_the_tables_are_complete():
    rows = {row.split("|")[1] for row in PAGE.splitlines() if row.startswith("| `")}
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert names == FORMATS.keys() | (Chain.model_fields.keys() - {"root"})
    assert all(f"`{kind}`" in PAGE for kind in some((*TASK_TYPES, *TYPES)))
    written = PAGE[PAGE.index("| written as") :].split("\n\n")[0].splitlines()
    for known in some(FORMATS.values()):
        (row,) = (row for row in written if f"`{known.name}`" in row.split("|")[1])
        assert row.split("|")[2].replace("`", "").strip() == known.loses
