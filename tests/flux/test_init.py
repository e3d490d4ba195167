"""mteditflow init trainer: a whole copy that runs by itself, edits included, or nothing."""

import json
import os
import re
import resource
from pathlib import Path

import pytest
from mteditflow_examples import init

from mteditflow import __version__, cli
from tests.flux.worlds import ENVIRONMENT, options
from tests.loops import some
from tests.processes import Process, ended
from tests.refusals import call

SOURCE = Path(init.__file__).parent


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy, in a folder below one that is not there yet."""
    folder = tmp_path_factory.mktemp("copies") / "deep" / "mine"
    done = call(cli.main, ["init", "trainer", str(folder)])
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"Written to {folder}: README.md, distill.py, train.py, trainer.")
    return folder


def test_every_file_of_the_trainer_is_there_and_none_names_the_original(copied):
    inside = {x.relative_to(copied / "trainer") for x in copied.rglob("trainer/**/*.*")}
    expected = {
        x.relative_to(SOURCE / "flux")
        for x in (SOURCE / "flux").rglob("*.*")
        if "__pycache__" not in x.parts
    }
    assert inside == expected
    for file in some(x for x in copied.rglob("*") if x.is_file() and x.name != "README.md"):
        text = file.read_text()
        assert not re.search(r"mteditflow_examples\.flux|examples/|train_flux\b|\bflux/", text), (
            file
        )
    assert os.access(copied / "trainer" / "launch" / "two_nodes.sh", os.X_OK)


def test_readme_names_the_version_and_files_that_exist(copied):
    text = (copied / "README.md").read_text()
    assert f"mteditflow=={__version__}" in text
    paths = re.findall(r"`((?:trainer/|train\.py|distill\.py)[\w./]*)`", text)
    for path in some({*paths, *re.findall(r"trainer/launch/\w+\.yaml", text)}):
        assert (copied / path).exists(), path


def test_an_edited_copy_trains_and_is_what_runs(copied, world, tmp_path):
    """Edits of the script, of a module and of a preset, in one round."""
    for file, old, new in some([
        ("train.py", "run.begin_round()", 'run.begin_round(); run.numbers["of/script"] = 7.0'),
        ("trainer/updating.py", "def update(", 'print("module", __name__)\n\n\ndef update('),
        ("trainer/presets/shapes-nft.toml", "minibatches = 2", "minibatches = 1"),
    ]):  # fmt: skip
        text = (copied / file).read_text()
        assert text.count(old) == 1
        (copied / file).write_text(text.replace(old, new))
    with (copied / "train.py").open("a") as script:
        script.write("    print('mteditflow_examples.flux.updating' in sys.modules)\n")
    words = options(world, tmp_path / "run", "--training.rounds", 1, "--data.held-out", "None")
    words[words.index("--evaluation.every") + 1] = "1"
    log = tmp_path / "log"
    given = {"env": ENVIRONMENT, "output": log, "errors": log, "drawn": False}
    assert Process([str(copied / "train.py"), *words], **given).wait(120) == 0, log.read_text()
    said = log.read_text().splitlines()
    assert "module trainer.updating" in said
    assert said[-1] == "False"
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["of/script"] == 7.0
    (state,) = (tmp_path / "run" / "checkpoints").glob("*/state.json")
    assert '"minibatches": 1' in state.read_text()


@pytest.mark.parametrize("script", ["train.py", "distill.py"])
def test_help_of_the_copy_is_its_own(copied, script, tmp_path):
    done = ended([copied / script, "shapes-nft", "--help"], tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{script} shapes-nft: sections")


def test_a_folder_that_holds_anything_is_refused_and_stays(tmp_path):
    (folder := tmp_path / "full").mkdir()
    (folder / ".notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path, why in (
        (folder, f"DIR: expected a new or empty folder, got {folder} with .notes"),
        (tmp_path / "file", f"DIR: expected a folder, got the file {tmp_path / 'file'}"),
    ):
        done = call(cli.main, ["init", "trainer", str(path)])
        assert (done.code, done.out, done.err) == (2, "", f"error: {why}\n")
    assert [x.name for x in folder.iterdir()] == [".notes"]
    (tmp_path / "empty").mkdir()
    assert "train.py" in init.copy_trainer(tmp_path / "empty")


def test_a_copy_that_fails_leaves_no_file_and_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))  # some files are larger
    try:
        for folder in (tmp_path / "a" / "b", tmp_path / "empty"):
            with pytest.raises(OSError, match="File too large"):
                init.copy_trainer(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_bare_init_lists_what_can_be_copied():
    done = call(cli.main, ["init"])
    assert done.code == 2
    assert "trainer" in done.out + done.err
    done = call(cli.main, ["init", "nothing", "x"])
    assert done.code == 2
    assert done.err == "error: No such command 'nothing'.\n"
