"""The file format: round trips, the official package both ways, damage, atomic writes."""

import functools
import json
import os
import pathlib
import resource

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mteditflow._safetensors import load_tensors, save_tensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
shapes = st.lists(st.integers(0, 3), max_size=3)


def some_tensor(dtype, shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50
    return x > 0 if dtype == torch.bool else x.to(dtype)


def assert_same(ours, expected):
    assert set(ours) == set(expected)
    for name, x in expected.items():
        assert ours[name].dtype == x.dtype
        assert ours[name].shape == x.shape
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (ours[name], x)]
        assert torch.equal(*as_bytes), name  # bytes, so that NaN equals NaN


def write_file(path, header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


@given(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=5))
def test_round_trip_and_the_official_package(tmp_path_factory, specs):
    folder = tmp_path_factory.mktemp("round")
    tensors = {f"t{k}": some_tensor(*spec, seed=k) for k, spec in enumerate(specs)}
    metadata = {"a": "1", "ü": "é\n"}
    ours, theirs = folder / "ours", folder / "theirs"
    save_tensors(ours, tensors, metadata)
    loaded, read = load_tensors(ours)
    assert_same(loaded, tensors)
    assert read == metadata
    # They read ours ...
    assert_same(safetensors.torch.load_file(ours), tensors)
    with safetensors.safe_open(ours, "pt") as file:
        assert file.metadata() == metadata
    # ... and we read theirs.
    safetensors.torch.save_file(tensors, theirs, metadata)
    loaded, read = load_tensors(theirs)
    assert_same(loaded, tensors)
    assert read == metadata


def test_golden_file(tmp_path):
    """Byte by byte, by hand."""
    path = tmp_path / "x"
    save_tensors(path, {"b": torch.tensor([True]), "i": torch.tensor([258, -1])}, {"k": "v"})
    header = (
        b'{"__metadata__":{"k":"v"},"i":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
        b'"b":{"dtype":"BOOL","shape":[1],"data_offsets":[16,17]}}'
    )
    header += b" " * (-len(header) % 8)
    data = bytes([2, 1, 0, 0, 0, 0, 0, 0]) + b"\xff" * 8 + b"\x01"
    assert path.read_bytes() == len(header).to_bytes(8, "little") + header + data


def test_alignment(tmp_path):
    """Data start at a multiple of 8, and wide elements come first."""
    path = tmp_path / "x"
    for extra in range(9):
        tensors = {"b": torch.ones(3).bool(), "d": torch.ones(1).double(), "f": torch.ones(1)}
        save_tensors(path, tensors, {"k": "v" * extra})
        length = int.from_bytes(path.read_bytes()[:8], "little")
        assert length % 8 == 0
        header = json.loads(path.read_bytes()[8 : 8 + length])
        assert [header[name]["data_offsets"][0] for name in "dfb"] == [0, 8, 12]


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(12).reshape(3, 4).T,
        torch.arange(3).expand(2, 3),
        torch.arange(10)[3:7],
        torch.ones(2, requires_grad=True),
        torch.tensor(1.5),
        torch.tensor([float("nan"), float("inf")]),
    ],
)
def test_any_layout(tmp_path, x):
    save_tensors(tmp_path / "x", {"x": x}, {})
    assert_same(load_tensors(tmp_path / "x")[0], {"x": x.detach()})


def test_no_metadata(tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "x")
    assert load_tensors(tmp_path / "x") == ({"x": torch.zeros(1)}, {})


def test_loaded_tensors_are_their_own(tmp_path):
    """They can be written to and outlive the file."""
    path = tmp_path / "x"
    save_tensors(path, {"x": torch.zeros(4), "y": torch.ones(4)}, {})
    loaded, _ = load_tensors(path)
    path.write_bytes(b"")
    loaded["x"] += 1
    assert torch.equal(loaded["x"], loaded["y"])
    assert torch.equal(loaded["y"], torch.ones(4))


def test_unknown_dtype(tmp_path):
    with pytest.raises(TypeError, match=r"^x: cannot store torch.complex64; stored are \[torch.f"):
        save_tensors(tmp_path / "x", {"x": torch.zeros(1, dtype=torch.complex64)}, {})
    assert not list(tmp_path.iterdir())


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ([], b"", "expected an object, got list"),
        ("x", b"", "expected an object, got str"),
        (b"", b"", "damaged safetensors header"),
        (b"{", b"", "damaged safetensors header"),
        (b"\xff\xff\xff", b"", "damaged safetensors header"),
        (b"[" * 100_000, b"", "damaged safetensors header"),
        ({"__metadata__": 3}, b"", "header, expected __metadata__ to hold strings$"),
        ({"__metadata__": None}, b"", "header, expected __metadata__ to hold strings$"),
        ({"__metadata__": {"a": 3}}, b"", "header, expected __metadata__ to hold strings$"),
        ({"x": 3}, b"", "x: expected dtype, shape and data_offsets"),
        ({"x": {**F32, "shape": None}}, bytes(8), r"x: expected shape of integers >= 0, got None"),
        ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8), "x: expected dtype, shape and data_off"),
        ({"x": {**F32, "dtype": "F8_E4M3"}}, bytes(8), r"x: dtype 'F8_E4M3' is none of \['F64'"),
        ({"x": {**F32, "dtype": ["F32"]}}, bytes(8), r"x: dtype \['F32'\] is none of"),
        ({"x": {**F32, "shape": [-2]}}, bytes(8), "x: expected shape of integers >= 0"),
        ({"x": {**F32, "shape": [-1, -2]}}, bytes(8), "x: expected shape of integers >= 0"),
        ({"x": {**F32, "shape": [2.0]}}, bytes(8), "x: expected shape of integers >= 0"),
        ({"x": {**F32, "shape": [True, 2]}}, bytes(8), "x: expected shape of integers >= 0"),
        ({"x": {**F32, "shape": "2"}}, bytes(8), "x: expected shape of integers >= 0"),
        ({"x": {**F32, "data_offsets": [0.0, 8.0]}}, bytes(8), "x: expected data_offsets of int"),
        ({"x": {**F32, "data_offsets": [-8, 0]}}, bytes(8), "x: expected data_offsets of integers"),
        ({"x": {**F32, "data_offsets": [0]}}, bytes(8), r"x: \[0\] does not span 8 bytes"),
        ({"x": {**F32, "data_offsets": []}}, bytes(8), r"x: \[\] does not span 8 bytes"),
        ({"x": {**F32, "data_offsets": [0, 4, 8]}}, bytes(8), r"x: \[0, 4, 8\] does not span 8"),
        ({"x": {**F32, "data_offsets": [8, 0]}}, bytes(8), r"x: \[8, 0\] does not span 8 bytes"),
        ({"x": {**F32, "shape": [3]}}, bytes(8), r"x: \[0, 8\] does not span 12 bytes"),
        ({"x": {**F32, "shape": [2**62, 2**62]}}, bytes(8), "x: .* does not span"),
        ({"x": F32}, bytes(7), "tensors do not fill the 7 bytes of data"),
        ({"x": F32}, bytes(9), "tensors do not fill the 9 bytes of data"),
        ({"x": F32, "y": F32}, bytes(8), "tensors do not fill the 8 bytes of data"),
        ({"x": {**F32, "data_offsets": [4, 12]}}, bytes(12), "tensors do not fill the 12 bytes"),
        ({}, bytes(1), "tensors do not fill the 1 bytes of data without gap or overlap"),
        ({"x": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\x01\x02",
         "x: expected bytes 0 and 1 for booleans, got 2"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path, header, data, message):
    path = write_file(tmp_path / "x", header, data)
    with pytest.raises(ValueError, match=message) as error:
        load_tensors(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("size", range(8))
def test_stub(tmp_path, size):
    path = tmp_path / "x"
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match="not a safetensors file, or cut short"):
        load_tensors(path)


def test_header_length_beyond_the_file(tmp_path):
    path = tmp_path / "x"
    for length in (3, 2**40, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match="not a safetensors file, or cut short"):
            load_tensors(path)
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert load_tensors(path) == ({}, {})


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x"
    save_tensors(path, {"x": torch.zeros(4)}, {})
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(pathlib.Path, "stat", lambda _: before)
    with pytest.raises(ValueError, match=rf"^{path}: x: cut short$"):
        load_tensors(path)


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
    assert_same(tensors, safetensors.torch.load_file(path))


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
    assert all(isinstance(value, str) for value in metadata.values())


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


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_tensors(tmp_path / "none" / "x", {"x": torch.zeros(3)}, {})
