"""Checkpoints: whole or not there, whatever dies, breaks or fills up."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from itertools import count
from pathlib import Path

import pytest
import torch

from mteditflow.training import Checkpoints, checkpoint
from tests.loops import some

SAVER = Path(__file__).with_name("saving_until_killed.py")
FILES = ["manifest.json", "state.json", "model.safetensors", "optimizer.safetensors", "lora/a.bin"]


def add_lora(folder):
    (folder / "lora").mkdir()
    (folder / "lora" / "a.bin").write_bytes(bytes(range(100)))


def save(checkpoints, number, score=None, **more):
    tensors = {
        "model": {"weight": torch.full((4, 3), float(number)), "half": torch.ones(2).bfloat16()},
        "optimizer": {"0.step": torch.tensor(float(number))},
    }
    return checkpoints.save(number, tensors, {"round": number}, score=score, extra=add_lora, **more)


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "run" / "checkpoints")


def latest_without_warning(checkpoints):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return checkpoints.latest()


def test_a_manifest_whose_keys_were_sorted_is_whole(checkpoints):
    path = save(checkpoints, 1) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert latest_without_warning(checkpoints).round == 1


def test_a_count_out_of_range_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^keep_last: expected"):
        Checkpoints(tmp_path, keep_last=-1)


# What is saved comes back.


def test_what_was_saved_comes_back(checkpoints):
    path = save(checkpoints, 40, score=0.5)
    assert path == checkpoints.folder / "round-000040"
    assert names(checkpoints) == ["round-000040"]
    for found in (checkpoints.find("auto"), checkpoints.find("best"), checkpoints.find(path)):
        assert (found.path, found.round, found.score) == (path, 40, 0.5)
        assert found.state == {"round": 40}
        weights = found.tensors("model")
        assert torch.equal(weights["weight"], torch.full((4, 3), 40.0))
        assert weights["half"].dtype == torch.bfloat16
        assert (found.path / "lora" / "a.bin").read_bytes() == bytes(range(100))
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == set(FILES[1:])
    assert (manifest["format"], manifest["round"], manifest["score"]) == (1, 40, 0.5)


def test_nothing_is_there_before_the_first_save(checkpoints):
    assert checkpoints.find("auto") is None
    assert checkpoints.best() is None
    with pytest.raises(FileNotFoundError, match="no checkpoint with a score"):
        checkpoints.find("best")
    assert not checkpoints.folder.exists()


def test_a_path_that_is_nowhere(checkpoints):
    with pytest.raises(FileNotFoundError, match="expected 'auto', 'best' or a checkpoint's folder"):
        checkpoints.find(checkpoints.folder / "round-000007")


def test_tensors_that_were_not_saved(checkpoints):
    save(checkpoints, 0)
    with pytest.raises(FileNotFoundError, match=r"no tensors 'ema', only \['model', 'optimizer'\]"):
        checkpoints.latest().tensors("ema")


@pytest.mark.parametrize("stem", ["", "../model", "a/b", ".hidden"])
def test_refuses_names_that_are_no_file_names(checkpoints, stem):
    with pytest.raises(ValueError, match="tensors: expected names"):
        checkpoints.save(0, {stem: {}}, {})


def test_refuses_what_cannot_be_stored_before_writing(checkpoints):
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.save(0, {}, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match=r"^score: expected"):
        checkpoints.save(0, {}, {}, score=float("nan"))
    with pytest.raises(ValueError, match=r"^round: expected"):
        checkpoints.save(-1, {}, {})
    assert not checkpoints.folder.exists()


# What is kept.


@pytest.mark.parametrize(
    ("scores", "keep", "kept", "best"),
    [
        ([None] * 5, 2, [3, 4], None),
        ([0.9, 0.1, 0.2, 0.3], 2, [0, 2, 3], 0),
        ([0.9, 0.1, 0.9, 0.3], 1, [2, 3], 2),  # of equals the newer
        ([0.1, 0.2, 0.3], 1, [2], 2),
        ([0.5, None, None], 1, [0, 2], 0),
        ([-1.0, -2.0, -3.0], 1, [0, 2], 0),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, scores, keep, kept, best):
    checkpoints = Checkpoints(tmp_path, keep_last=keep)
    for number, score in enumerate(scores):
        save(checkpoints, number, score)
    assert names(checkpoints) == [f"round-{number:06d}" for number in kept]
    assert checkpoints.latest().round == len(scores) - 1
    found = checkpoints.best()
    assert (found.round if found else None) == best


def test_a_round_that_exists_is_replaced(checkpoints):
    save(checkpoints, 3, score=0.9)
    checkpoints.save(3, {}, {"second": True}, score=0.1)
    assert names(checkpoints) == ["round-000003"]
    assert checkpoints.best().state == {"second": True}


def test_a_run_resumed_from_an_older_round_goes_on_from_there(tmp_path):
    """Not from the newer rounds of the history that was given up."""
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for number in (10, 20, 30):
        save(checkpoints, number)
    save(checkpoints, 11)
    assert checkpoints.latest().round == 11
    save(checkpoints, 12)
    assert names(checkpoints) == ["round-000011", "round-000012"]


@pytest.mark.parametrize(("back_to", "given_up"), [(10, [11, 20]), (20, [11]), (11, [20])])
def test_going_back_sets_aside_what_was_saved_later_and_later_rounds(
    checkpoints, back_to, given_up
):
    """Round 11 was saved last: it is newer than round 20, and of an earlier round."""
    for number in (10, 20, 11):
        save(checkpoints, number)
    found = checkpoints.find(checkpoints.folder / f"round-{back_to:06d}")
    aside = checkpoints.set_aside_after(found)
    assert [path.name for path in aside] == [f"aside-1-round-{n:06d}" for n in given_up]
    assert [checkpoints.find(path).round for path in aside] == given_up  # whole, and still there
    assert latest_without_warning(checkpoints).round == back_to
    assert checkpoints.set_aside_after(found) == []
    with pytest.raises(ValueError, match=r"^checkpoint: expected one of .*, not set aside, got"):
        checkpoints.set_aside_after(checkpoints.find(aside[0]))


def test_of_two_of_one_round_the_one_saved_later_is_set_aside(checkpoints, tmp_path):
    """A kill between the two renames of a save leaves the replaced one beside the new one."""
    path = save(checkpoints, 1)
    shutil.copytree(path, tmp_path / "replaced")
    save(checkpoints, 1)
    replaced = path.with_name(".replaced-round-000001")
    (tmp_path / "replaced").rename(replaced)
    assert checkpoints.set_aside_after(checkpoints.find(path)) == []
    (aside,) = checkpoints.set_aside_after(checkpoints.find(replaced))
    assert aside.name == "aside-1-round-000001"
    assert latest_without_warning(checkpoints).path == replaced


# Damage.


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [truncate, empty, flip, lengthen, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped_and_named(checkpoints, name, damage):
    older = save(checkpoints, 1, score=0.1)
    path = save(checkpoints, 2, score=0.9)
    damage(path / name)
    for find in (checkpoints.latest, checkpoints.best, lambda: checkpoints.find("auto")):
        with pytest.warns(UserWarning, match=f"checkpoint skipped: .*round-000002: .*{name}"):
            found = find()
        assert found.path == older
    with pytest.raises(ValueError, match=name):
        checkpoints.find(path)
    save(checkpoints, 3)
    assert names(checkpoints) == ["round-000001", "round-000002", "round-000003"]


def test_damage_to_all_leaves_nothing(checkpoints):
    for number in range(2):
        empty(save(checkpoints, number) / "state.json")
    with pytest.warns(UserWarning, match="round-00000[01]"):
        assert checkpoints.latest() is None


def test_no_flipped_bit_of_the_manifest_goes_unseen(checkpoints):
    path = save(checkpoints, 1, score=0.25) / "manifest.json"
    data = path.read_bytes()
    body = checkpoint.read_manifest(path.parent)
    for position in some(range(len(data))):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with contextlib.suppress(checkpoint.DamagedError):
            assert checkpoint.read_manifest(path.parent) == body


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"checksum": 1}', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_something_else(checkpoints, text):
    path = save(checkpoints, 1)
    (path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match=r"manifest\.json"):
        assert checkpoints.latest() is None


def test_another_format_version_is_an_error_not_damage(checkpoints, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = save(checkpoints, 1)
    monkeypatch.undo()
    for which in ("auto", "best", path):
        with pytest.raises(ValueError, match="expected checkpoint format 1, got 2") as caught:
            checkpoints.find(which)
        assert not isinstance(caught.value, checkpoint.DamagedError)


# Failures while saving.


def test_a_file_that_cannot_be_written_leaves_the_old_ones(checkpoints):
    """A real limit of the system, which safetensors' writer meets as it would a full disk."""
    save(checkpoints, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            checkpoints.save(2, {"model": {"weight": torch.zeros(10_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(checkpoints) == ["round-000001"]
    assert latest_without_warning(checkpoints).round == 1


def count_calls(monkeypatch, name, fail_at=-1):
    """Replace a function of os by one that fails, as on a full disk, at its n-th call."""
    calls, original = [], getattr(os, name)

    def counted(*given, **named):
        calls.append(given)
        if len(calls) - 1 == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*given, **named)

    monkeypatch.setattr(os, name, counted)
    return calls


@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_a_full_disk_at_any_step_leaves_the_old_ones(tmp_path, monkeypatch, name):
    checkpoints = Checkpoints(tmp_path / "counted", keep_last=2)
    save(checkpoints, 1)
    with monkeypatch.context() as patch:
        calls = count_calls(patch, name)
        save(checkpoints, 1)
    assert len(calls) > 1
    for step in some(range(len(calls))):
        checkpoints = Checkpoints(tmp_path / str(step), keep_last=2)
        save(checkpoints, 0)
        save(checkpoints, 1)
        with monkeypatch.context() as patch:
            count_calls(patch, name, fail_at=step)
            with pytest.raises(OSError, match="No space left"):
                save(checkpoints, 1)
        assert latest_without_warning(checkpoints).round == 1
        save(checkpoints, 2)
        assert names(checkpoints) == ["round-000001", "round-000002"]


def test_everything_is_on_the_disk_before_the_name_is(checkpoints, monkeypatch):
    """Data, folder, rename, folder: in this order, and the manifest after the other files."""
    done, rename, fsync = [], os.rename, os.fsync

    def named(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source, target, **more):
        done.append(f"to {Path(target).name}")
        rename(source, target, **more)

    monkeypatch.setattr(os, "fsync", named)
    monkeypatch.setattr(os, "rename", renamed)
    save(checkpoints, 5)
    partial = done[-3]
    assert partial.startswith(".partial-")
    assert set(done[:-4]) == {"lora", *(Path(name).name for name in FILES[1:])}
    assert done[-4:] == ["manifest.json", partial, "to round-000005", "checkpoints"]


def test_leftovers_of_a_dead_writer_are_removed_by_the_next_save(checkpoints):
    path = save(checkpoints, 1)
    (checkpoints.folder / ".partial-1234" / "lora").mkdir(parents=True)
    path.rename(path.with_name(f".replaced-{path.name}"))  # killed between two renames
    assert latest_without_warning(checkpoints).round == 1
    save(checkpoints, 2)
    assert names(checkpoints) == ["round-000001", "round-000002"]


class Saver:
    """A process that saves, and lives as long as it is told to."""

    def __init__(self, folder):
        self.checkpoints, self.last = Checkpoints(folder, keep_last=2), -1
        self.process = subprocess.Popen(
            [sys.executable, SAVER, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait() == 0

    def live(self, amount, kind):
        """One life, and what a reader finds after it: whole, of one round, and nothing lost."""
        self.process.stdin.write(f"{amount} {kind}\n")
        self.process.stdin.flush()
        ended_by = int(self.process.stdout.readline())
        found = latest_without_warning(self.checkpoints)
        if found is not None:
            tensors = [found.tensors(name) for name in ("model", "optimizer")]
            values = {float(v) for held in tensors for x in held.values() for v in x}
            assert values == {float(found.round)} == {float(found.state["round"])}
            lora = (found.path / "lora" / "weights.txt").read_text().split()
            assert set(lora) == {str(found.round)}
            assert self.checkpoints.best().score >= found.score
        last = found.round if found else -1
        assert last >= self.last
        self.last = last
        return ended_by


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path):
    chance = random.Random(0)
    with Saver(tmp_path) as saver:
        assert saver.live(10**6, "step") == 0
        for life in range(12):
            kind = "fast" if life % 3 == 0 else "slow"
            assert saver.live(chance.uniform(0.005, 0.25), kind) == signal.SIGKILL
        for step in count():
            if saver.live(step, "step") == 0:
                break
    assert step > 40
    save(saver.checkpoints, saver.last + 1)
    assert all(name.startswith("round-") for name in some(names(saver.checkpoints)))
