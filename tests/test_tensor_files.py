"""Tensor files and atomic writes: round trips, lazy bits, damage, full disks."""

import errno
import functools
import json
import os
import re
import resource

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mteditflow._files import (
    load_tensors,
    save_tensors,
    write_all_atomically,
    write_atomically,
)

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
shapes = st.lists(st.integers(0, 3), max_size=3)


def some_tensor(dtype, shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50
    return x > 0 if dtype == torch.bool else x.to(dtype)


def described(tensors):
    """Dtype, shape and bytes of each; so that NaN equals NaN."""
    plain = {name: x.resolve_conj().resolve_neg().contiguous() for name, x in tensors.items()}
    return {
        name: (x.dtype, x.shape, x.reshape(-1).view(torch.uint8).tolist())
        for name, x in plain.items()
    }


def assert_same(ours, expected):
    assert described(ours) == described(expected)


def write_file(path, header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


@given(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=5))
def test_round_trip(tmp_path_factory, specs):
    folder = tmp_path_factory.mktemp("round")
    tensors = {f"t{k}": some_tensor(*spec, seed=k) for k, spec in enumerate(specs)}
    metadata = {"a": "1", "ü": "é\n"}
    save_tensors(folder / "x", tensors, metadata)
    loaded, read = load_tensors(folder / "x")
    assert_same(loaded, tensors)
    assert read == metadata
    assert_same(safetensors.torch.load_file(folder / "x"), tensors)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(12).reshape(3, 4).T,
        torch.arange(3).expand(2, 3),
        torch.arange(10)[3:7],
        torch.ones(2, requires_grad=True),
        torch.tensor(1.5),
        torch.tensor([float("nan"), float("inf")]),
        torch.complex(torch.arange(3.0), torch.arange(1.0, 4.0)).conj().imag,  # the negative bit
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.arange(12.0).reshape(3, 4)[:, 1:3],
    ],
)
def test_any_layout(tmp_path, x):
    save_tensors(tmp_path / "x", {"x": x}, {})
    assert_same(load_tensors(tmp_path / "x")[0], {"x": x.detach()})


def test_no_metadata(tmp_path):
    save_tensors(tmp_path / "x", {"x": torch.zeros(1)})
    assert load_tensors(tmp_path / "x") == ({"x": torch.zeros(1)}, {})


def test_tensors_that_share_memory_are_written_one_by_one(tmp_path):
    whole = torch.arange(6.0)
    tensors = {"whole": whole, "same": whole, "part": whole[:2], "rest": whole[2:]}
    save_tensors(tmp_path / "x", tensors)
    assert_same(load_tensors(tmp_path / "x")[0], tensors)


def test_loaded_tensors_are_their_own(tmp_path):
    """They can be written to and outlive the file."""
    path = tmp_path / "x"
    save_tensors(path, {"x": torch.zeros(4), "y": torch.ones(4)}, {})
    loaded, _ = load_tensors(path)
    path.write_bytes(b"")
    loaded["x"] += 1
    assert torch.equal(loaded["x"], loaded["y"])
    assert torch.equal(loaded["y"], torch.ones(4))


def test_sparse_tensors_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^x: expected a dense tensor, got layout torch\.sparse"):
        save_tensors(tmp_path / "x", {"x": torch.eye(2).to_sparse()})
    assert not list(tmp_path.iterdir())


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ([], b""),
        ("x", b""),
        (b"", b""),
        (b"{", b""),
        (b"\xff\xff\xff", b""),
        (b"[" * 100_000, b""),
        ({"__metadata__": 3}, b""),
        ({"__metadata__": {"a": 3}}, b""),
        ({"x": 3}, b""),
        ({"x": {**F32, "shape": None}}, bytes(8)),
        ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        ({"x": {**F32, "dtype": ["F32"]}}, bytes(8)),
        ({"x": {**F32, "shape": [-2]}}, bytes(8)),
        ({"x": {**F32, "shape": [-1, -2]}}, bytes(8)),
        ({"x": {**F32, "shape": "2"}}, bytes(8)),
        ({"x": {**F32, "data_offsets": [0.0, 8.0]}}, bytes(8)),
        ({"x": {**F32, "data_offsets": [-8, 0]}}, bytes(8)),
        ({"x": {**F32, "data_offsets": [0]}}, bytes(8)),
        ({"x": {**F32, "data_offsets": []}}, bytes(8)),
        ({"x": {**F32, "data_offsets": [0, 4, 8]}}, bytes(8)),
        ({"x": {**F32, "data_offsets": [8, 0]}}, bytes(8)),
        ({"x": {**F32, "shape": [3]}}, bytes(8)),
        ({"x": {**F32, "shape": [2**62, 2**62]}}, bytes(8)),
        ({"x": F32}, bytes(7)),
        ({"x": F32}, bytes(9)),
        ({"x": F32, "y": F32}, bytes(8)),
        ({"x": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
        ({}, bytes(1)),
    ],
)
def test_damaged_files(tmp_path, header, data):
    path = write_file(tmp_path / "x", header, data)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: not a safetensors file, or "):
        load_tensors(path)


@pytest.mark.parametrize("size", range(8))
def test_stub(tmp_path, size):
    path = tmp_path / "x"
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match="not a safetensors file, or damaged"):
        load_tensors(path)


def test_header_length_beyond_the_file(tmp_path):
    path = tmp_path / "x"
    for length in (3, 2**40, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match="not a safetensors file, or damaged"):
            load_tensors(path)
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert load_tensors(path) == ({}, {})


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "x")


@functools.cache
def example_bytes(folder):
    tensors = {
        "latents": some_tensor(torch.bfloat16, (2, 3)),
        "mask": some_tensor(torch.bool, (5,)),
        "group": some_tensor(torch.int64, (2,)),
        "nothing": torch.zeros(0, 3),
    }
    save_tensors(folder / "example", tensors, {"format": "x"})
    return (folder / "example").read_bytes()


@settings(max_examples=100)
@given(st.data())
def test_fuzz(tmp_path_factory, data):
    """A changed file is refused with ValueError, or the official package reads the same in it."""
    folder = tmp_path_factory.getbasetemp()
    content = bytearray(example_bytes(folder))
    kind = data.draw(st.sampled_from(["cut", "flip", "insert", "delete", "append"]))
    length = 8 + int.from_bytes(content[:8], "little")
    at = data.draw(st.integers(0, length + 8), label="at")
    if kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "flip":
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
    elif kind == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    elif kind == "delete":
        del content[at : at + data.draw(st.integers(1, 4))]
    else:
        content += data.draw(st.binary(min_size=1, max_size=9))
    path = folder / "damaged"
    path.write_bytes(bytes(content))
    try:
        tensors, _ = load_tensors(path)
    except ValueError:
        return
    assert kind in ("flip", "insert", "delete")
    assert sum(x.nbytes for x in tensors.values()) <= len(content)


@given(
    st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(-3, 20), st.floats(), st.sampled_from(["F32", ""])
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(["x", "__metadata__", "dtype", "shape", "data_offsets"]), inner
            ),
        ),
        max_leaves=12,
    ),
    st.binary(max_size=16),
)
def test_fuzz_headers(tmp_path_factory, header, data):
    path = write_file(tmp_path_factory.getbasetemp() / "header", header, data)
    try:
        tensors, metadata = load_tensors(path)
    except ValueError:
        return
    assert sum(x.nbytes for x in tensors.values()) == len(data)
    assert {type(value) for value in metadata.values()} <= {str}


# ----------------------------------------------------------------------------------- atomicity


def fail(*_):
    raise OSError("disk on fire")


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "x"
    save_tensors(path, {"x": torch.zeros(3)}, {})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="disk on fire"):
            save_tensors(path, {"x": torch.ones(3)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save_tensors(path, {"x": torch.ones(3)}, {})
    assert torch.equal(load_tensors(path)[0]["x"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error(tmp_path):
    """A file size limit stands in for the disk; a writer through a mapping would be killed."""
    path = tmp_path / "x"
    save_tensors(path, {"x": torch.zeros(3)}, {})
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save_tensors(path, {"x": torch.zeros(1 << 16)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_file_is_replaced_not_written_into(tmp_path):
    """Who has the old file open goes on reading the old one."""
    path = tmp_path / "x"
    save_tensors(path, {"x": torch.zeros(3)}, {})
    before = path.read_bytes()
    with path.open("rb") as reader:
        save_tensors(os.fspath(path), {"x": torch.ones(3)}, {})
        assert reader.read() == before
    assert path.read_bytes() != before


def test_bytes_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "made" / "x.json"
    write_atomically(path, b"first")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk on fire"):
            write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_tensors(tmp_path / "none" / "x", {"x": torch.zeros(3)}, {})


def test_files_of_a_report_are_all_new_or_all_old_and_the_one_that_failed_is_named(
    tmp_path, monkeypatch
):
    """The disk is full at the second of three files."""
    old = dict.fromkeys("abc", b"old")
    write_all_atomically(tmp_path, old)
    calls, sync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as found:
        write_all_atomically(tmp_path, dict.fromkeys("abc", b"new"))
    assert found.value.filename == str(tmp_path / "b")
    assert {x.name: x.read_bytes() for x in tmp_path.iterdir()} == old
