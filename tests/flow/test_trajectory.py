"""Trajectories: what is validated, how they are cut, joined, moved and stored."""

import dataclasses
import json
import math
import pathlib
import re

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mteditflow import Steps, Trajectory
from tests.loops import some

B, N, S = 4, 3, 2
seeds = st.integers(0, 2**31)


def fields_of(seed=0, *, b=B, n=N, s=S, latent=(2, 3), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(b, n, s + 1, *latent, generator=generator).to(dtype),
        "sigmas": torch.linspace(1, 0, s + 1).expand(n, -1),
        "log_prob": torch.randn(b, n, s, generator=generator),
        "stochastic": torch.arange(n * s).reshape(n, s) % 3 != 2,
        "group": torch.arange(b) // 2,
        "turn_mask": torch.arange(n) <= torch.arange(b)[:, None],  # ragged: 1, 2, 3, 3 turns
        "reduction": "mean",
    }


def make(seed=0, /, **changes):
    sizes = {k: changes.pop(k) for k in ("b", "n", "s", "latent", "dtype") if k in changes}
    return Trajectory(**{**fields_of(seed, **sizes), **changes})


TENSORS = ("latents", "sigmas", "log_prob", "stochastic", "group", "turn_mask")
PER_TRAJECTORY = ("latents", "log_prob", "group", "turn_mask")


def assert_same(one, other):
    assert one.reduction == other.reduction
    for name in TENSORS:
        x, y = getattr(one, name), getattr(other, name)
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name


# ---------------------------------------------------------------------------------- validation


def test_fields_are_kept():
    fields = fields_of()
    trajectory = Trajectory(**fields)
    for name in TENSORS:
        assert getattr(trajectory, name) is fields[name]
    assert len(trajectory) == B
    assert repr(trajectory) == (
        "Trajectory(B=4, N=3, S=2, latent=[2, 3], dtype=torch.float32, device=cpu)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        trajectory.reduction = "sum"
    assert hash(trajectory) is not None
    assert trajectory != make()  # identity: tensors have no truth


def test_clean_and_step_mask():
    trajectory = make()
    assert torch.equal(trajectory.clean, trajectory.latents[:, :, S])
    assert trajectory.clean.shape == (B, N, 2, 3)
    for b in some(range(B)):
        for n in some(range(N)):
            for s in some(range(S)):
                expected = bool(trajectory.turn_mask[b, n]) and bool(trajectory.stochastic[n, s])
                assert bool(trajectory.step_mask[b, n, s]) == expected
    assert trajectory.step_mask.shape == (B, N, S)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("latents", torch.zeros(4, 3, 3), ValueError, r"\[B, N, S \+ 1, \.\.\.\], got \[4, 3, 3\]"),
        ("latents", torch.zeros(4, 3, 3, 0), ValueError, r"non-empty tensor .* got \[4, 3, 3, 0\]"),
        ("latents", torch.zeros(4, 3, 1, 2), ValueError, r"at least one step .* got 1$"),
        ("latents", torch.zeros(4, 3, 3, 2).long(), TypeError, "floating-point .* torch.int64"),
        ("latents", None, TypeError, "expected a torch.Tensor, got NoneType"),
        ("sigmas", torch.zeros(3, 2), ValueError, r"shape \[N, S \+ 1\] = \[3, 3\], got \[3, 2\]"),
        ("sigmas", torch.zeros(3), ValueError, r"\[N, S \+ 1\] = \[3, 3\], got \[3\]"),
        ("sigmas", torch.zeros(3, 3).half(), TypeError, "float32 or float64, got torch.float16"),
        ("log_prob", torch.zeros(4, 3, 3), ValueError, r"\[B, N, S\] = \[4, 3, 2\], got"),
        ("log_prob", torch.zeros(4, 3, 2).bfloat16(), TypeError, "got torch.bfloat16"),
        ("stochastic", torch.ones(4, 3, 2).bool(), ValueError, r"\[N, S\] = \[3, 2\], got"),
        ("stochastic", torch.ones(3, 2), TypeError, "boolean mask, got torch.float32"),
        ("group", torch.zeros(3).long(), ValueError, r"\[B\] = \[4\], got \[3\]"),
        ("group", torch.zeros(4), TypeError, "expected integer ids, got torch.float32"),
        ("group", torch.zeros(4).bool(), TypeError, "expected integer ids, got torch.bool"),
        ("group", torch.zeros(4).cfloat(), TypeError, "expected integer ids, got torch.complex64"),
        ("group", [0, 0, 1, 1], TypeError, "expected a torch.Tensor, got list"),
        ("turn_mask", torch.ones(4, 2).bool(), ValueError, r"\[B, N\] = \[4, 3\], got \[4, 2\]"),
        ("turn_mask", torch.ones(4, 3).int(), TypeError, "boolean mask, got torch.int32"),
        ("reduction", "max", ValueError, r"one of \['mean', 'sum'\], got 'max'"),
        ("reduction", None, ValueError, r"one of \['mean', 'sum'\], got None"),
        ("log_prob", torch.zeros(4, 3, 2, device="meta"), ValueError,
         "expected the device of latents, cpu, got meta"),
        ("turn_mask", torch.ones(4, 3, device="meta").bool(), ValueError, "device of latents, cpu"),
    ],
)  # fmt: skip
def test_wrong_fields(name, value, error, message):
    with pytest.raises(error, match=rf"^{name}: .*{message}"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([1.0, 0.5, 0.5], r"strictly decreasing grids, a fall > 0, got 0\.0 at index \[1, 1\]"),
        ([0.0, 0.5, 1.0], r"strictly decreasing grids, a fall > 0, got -0\.5 at index \[1, 0\]"),
        ([1.5, 0.5, 0.0], r"values in \[0, 1\], got 1\.5 at index \[1, 0\]"),
        ([1.0, 0.5, -0.5], r"values in \[0, 1\], got -0\.5 at index \[1, 2\]"),
        ([1.0, math.nan, 0.0], r"values in \[0, 1\], got nan at index \[1, 1\]"),
    ],
)
def test_wrong_grids(grid, message):
    sigmas = torch.tensor([[1.0, 0.5, 0.0], grid, [0.9, 0.5, 0.1]])
    with pytest.raises(ValueError, match=rf"^sigmas: expected {message}$"):
        make(sigmas=sigmas)


def test_trajectories_without_turns():
    mask = fields_of()["turn_mask"].clone()
    mask[2] = False
    with pytest.raises(
        ValueError, match=r"^turn_mask: expected at least one turn .* got False at index \[2\]$"
    ):
        make(turn_mask=mask)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_of_existing_turns_are_finite(value):
    for name, inside in (("latents", (1, 1, 2, 0, 1)), ("log_prob", (1, 1, 1))):
        x = fields_of()[name].clone()
        x[inside] = value
        index = r", ".join(map(str, inside))
        message = (
            rf"^{name}: expected finite values in existing turns, got .* at index \[{index}\]$"
        )
        with pytest.raises(ValueError, match=message):
            make(**{name: x})
        x = fields_of()[name].clone()
        x[0, 1] = value  # trajectory 0 has one turn
        assert make(**{name: x}).latents.shape == (4, 3, 3, 2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_latents_may_have_any_precision(dtype):
    trajectory = make(dtype=dtype)
    assert trajectory.clean.dtype == dtype
    assert trajectory.log_prob.dtype == torch.float32
    assert make(group=torch.zeros(4, dtype=torch.int32)).group.dtype == torch.int32


# --------------------------------------------------------------------------------------- steps


@given(seeds, st.integers(1, 9))
def test_steps_is_its_loop(seed, m):
    trajectory = make(seed)
    generator = torch.Generator().manual_seed(seed)
    index = [torch.randint(size, (m,), generator=generator) for size in (B, N, S)]
    rows = trajectory.steps(*index)
    assert isinstance(rows, Steps)
    for k, (b, n, s) in some(enumerate(zip(*(i.tolist() for i in index), strict=True))):
        assert torch.equal(rows.x_t[k], trajectory.latents[b, n, s])
        assert torch.equal(rows.next_x[k], trajectory.latents[b, n, s + 1])
        assert rows.sigma[k] == trajectory.sigmas[n, s]
        assert rows.next_sigma[k] == trajectory.sigmas[n, s + 1]
        assert rows.log_prob[k] == trajectory.log_prob[b, n, s]
    assert [x.shape for x in rows] == [(m, 2, 3), (m, 2, 3), (m,), (m,), (m,)]
    narrow = trajectory.steps(*(i.int() for i in index))
    assert all(torch.equal(x, y) for x, y in some(zip(narrow, rows, strict=True)))


def test_steps_of_the_mask():
    trajectory = make()
    rows = trajectory.steps(*trajectory.step_mask.nonzero(as_tuple=True))
    assert torch.equal(rows.log_prob, trajectory.log_prob[trajectory.step_mask])
    assert torch.equal(rows.x_t, trajectory.latents[:, :, :-1][trajectory.step_mask])
    assert torch.equal(rows.next_x, trajectory.latents[:, :, 1:][trajectory.step_mask])
    nothing = trajectory.steps(*(torch.zeros(0, dtype=torch.int64),) * 3)
    assert nothing.x_t.shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("position", "name", "size"), [(0, "trajectory", B), (1, "turn", N), (2, "step", S)]
)
def test_steps_errors(position, name, size):
    trajectory, zero = make(), torch.zeros(2, dtype=torch.int64)

    def call(index):
        return trajectory.steps(*(index if k == position else zero for k in range(3)))

    call(torch.tensor([0, size - 1]))
    for wrong in (-1, size):
        message = rf"^{name}: expected indices in 0\.\.{size - 1}, got {wrong} at index \[1\]$"
        with pytest.raises(ValueError, match=message):
            call(torch.tensor([0, wrong]))
    for dtype in (torch.bool, torch.uint8, torch.float32):
        with pytest.raises(TypeError, match=rf"^{name}: expected int64 or int32 indices, got"):
            call(zero.to(dtype))
    if position > 0:
        with pytest.raises(ValueError, match=rf"^{name}: .* of trajectory = \[2\], got \[3\]$"):
            call(torch.zeros(3, dtype=torch.int64))
    else:
        with pytest.raises(
            ValueError, match=r"^trajectory: expected shape \[M\] = \[2\], got \[2, "
        ):
            trajectory.steps(*(torch.zeros(2, 1, dtype=torch.int64),) * 3)
    with pytest.raises(
        TypeError,
        match=rf"^{name}: expected a torch.Tensor, got list; convert it with torch.as_tensor$",
    ):
        call([0, 0])


# ------------------------------------------------------------------------ select and concatenate


def test_rows_of_one_index_tensor_are_those_of_its_columns():
    trajectory = make(3)
    rows = trajectory.step_mask.nonzero()
    for ours, theirs in some(
        zip(trajectory.steps_at(rows), trajectory.steps(*rows.T), strict=True)
    ):
        assert torch.equal(ours, theirs)
    at = torch.tensor([[3, 2], [0, 0], [3, 2]])
    for dtype in (torch.int64, torch.int32):
        clean = trajectory.clean_at(at.to(dtype))
        assert torch.equal(clean, torch.stack([trajectory.latents[b, n, S] for b, n in at]))
    assert trajectory.clean_at(at[:0]).shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([[0, 3]], ValueError, r"^turn: expected indices in 0\.\.2, got 3 at index \[0\]$"),
        ([[-1, 0]], ValueError, r"^trajectory: expected indices in 0\.\.3, got -1"),
        ([[0.0, 0.0]], TypeError, r"^trajectory: expected int64 or int32 indices, got torch.float"),
        ([0, 0], ValueError, r"^at: expected shape \[M, 2\] = \[2, 2\], got \[2\]$"),
        ([[0, 0, 0]], ValueError, r"^at: expected shape \[M, 2\] = \[1, 2\], got \[1, 3\]$"),
    ],
)
def test_clean_at_errors(index, error, message):
    with pytest.raises(error, match=message):
        make().clean_at(torch.tensor(index))


def test_steps_at_errors():
    with pytest.raises(ValueError, match=r"^rows: expected shape \[M, 3\] = \[1, 3\]"):
        make().steps_at(torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match=r"^step: expected indices in 0\.\.1, got 2"):
        make().steps_at(torch.tensor([[0, 0, 2]]))


def test_select_golden():
    trajectory = make()
    for index in (torch.tensor([3, 1]), slice(1, 3), trajectory.group == 0):
        part = trajectory.select(index)
        for name in PER_TRAJECTORY:
            assert torch.equal(getattr(part, name), getattr(trajectory, name)[index])
        assert part.sigmas is trajectory.sigmas
        assert part.stochastic is trajectory.stochastic
        assert part.reduction == "mean"
    assert trajectory.select(torch.tensor([3, 1])).group.tolist() == [1, 0]
    assert len(trajectory.select(torch.tensor([2, 2, 2]))) == 3


def test_indices_that_torch_reads_as_a_mask_are_refused():
    with pytest.raises(TypeError, match=r"^index: expected int64 or int32 .* got torch\.uint8"):
        make().select(torch.tensor([1, 0], dtype=torch.uint8))


def test_select_errors():
    trajectory = make()
    with pytest.raises(ValueError, match=r"^latents: expected a non-empty tensor"):
        trajectory.select(trajectory.group == 7)
    with pytest.raises(IndexError):
        trajectory.select(torch.tensor([4]))
    with pytest.raises(IndexError):
        trajectory.select(torch.tensor([True, False]))


@given(seeds, st.integers(1, B - 1))
def test_select_and_concatenate_laws(seed, cut):
    trajectory = make(seed)
    parts = [trajectory.select(slice(None, cut)), trajectory.select(slice(cut, None))]
    assert_same(Trajectory.concatenate(parts), trajectory)
    assert_same(Trajectory.concatenate([trajectory]), trajectory)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    mixed = trajectory.select(order)
    assert_same(mixed.select(torch.argsort(order)), trajectory)
    # A gather of the selection is the selection of a gather.
    rows, at = torch.arange(B), torch.zeros(B, dtype=torch.int64)
    for x, y in some(zip(mixed.steps(rows, at, at), trajectory.steps(order, at, at), strict=True)):
        assert torch.equal(x, y)
    other = make(seed + 1)
    joined = Trajectory.concatenate([trajectory, other, trajectory])
    assert len(joined) == 3 * B
    assert_same(joined.select(slice(B, 2 * B)), other)
    assert joined.group.tolist() == [0, 0, 1, 1] * 3


def test_concatenate_errors():
    first = make()
    with pytest.raises(ValueError, match=r"^parts: expected at least one Trajectory, got none$"):
        Trajectory.concatenate([])
    shifted = first.sigmas**2
    for change, error, message in (
        ({"sigmas": shifted}, ValueError, "sigmas: differs from that of parts[0]"),
        ({"stochastic": ~first.stochastic}, ValueError, "stochastic: differs from that of parts"),
        ({"reduction": "sum"}, ValueError, "reduction: expected one of ['mean'], got 'sum'"),
        ({"latent": (2, 4)}, ValueError, "latents: expected shape [B, ...] like parts[0] = [4, 3"),
        ({"dtype": torch.bfloat16}, TypeError, "latents: expected torch.float32, got torch.bfloat"),
        ({"log_prob": first.log_prob.double()}, TypeError, "log_prob: expected torch.float32, got"),
        ({"group": first.group.int()}, TypeError, "group: expected torch.int64, got torch.int32"),
        ({"sigmas": first.sigmas.double()}, TypeError, "sigmas: expected torch.float32, got torch"),
        ({"n": 2}, ValueError, "sigmas: differs from that of parts[0]"),
        ({"s": 3}, ValueError, "sigmas: differs from that of parts[0]"),
    ):
        with pytest.raises(error) as raised:
            Trajectory.concatenate([first, first, make(**change)])
        assert str(raised.value).startswith(f"parts[2].{message}")
    with pytest.raises(ValueError, match=r"^parts\[1\]\.latents: expected device cpu, got meta$"):
        Trajectory.concatenate([first, first.to("meta")])


# ------------------------------------------------------------------------------------------- to


def test_to():
    trajectory = make(dtype=torch.bfloat16)
    same = trajectory.to("cpu")
    assert same is not trajectory
    assert_same(same, trajectory)
    for non_blocking in (False, True):
        moved = trajectory.to("meta", non_blocking=non_blocking)
        assert isinstance(moved, Trajectory)
        assert moved.reduction == "mean"
        for name in TENSORS:
            x, y = getattr(moved, name), getattr(trajectory, name)
            assert x.device.type == "meta"
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert trajectory.latents.device.type == "cpu"
    assert repr(moved).endswith("dtype=torch.bfloat16, device=meta)")


@pytest.mark.parametrize(("options", "expected"), [({}, False), ({"non_blocking": True}, True)])
def test_to_passes_non_blocking_on_and_reads_nothing(monkeypatch, options, expected):
    trajectory, seen = make(), []

    def spy(x, device, *, non_blocking):
        seen.append((device, non_blocking))
        return torch.full_like(x, math.nan) if x.is_floating_point() else x

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", spy)
        moved = trajectory.to("cuda", **options)
    assert seen == [("cuda", expected)] * len(TENSORS)
    assert moved.latents.isnan().all()  # what has not arrived is not validated


# -------------------------------------------------------------------------------------- storage


@settings(max_examples=15)
@given(
    seed=seeds,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    reduction=st.sampled_from(["mean", "sum"]),
    ids=st.sampled_from([torch.int64, torch.int32]),
)
def test_save_and_load(tmp_path_factory, seed, dtype, reduction, ids):
    path = tmp_path_factory.getbasetemp() / "trajectory.safetensors"
    group = torch.tensor([2**31 - 1, -5, 0, 0], dtype=ids)
    trajectory = make(seed, dtype=dtype, reduction=reduction, group=group)
    trajectory.save(path)
    assert_same(Trajectory.load(path), trajectory)
    assert_same(Trajectory.load(str(path)), trajectory)
    part = trajectory.select(slice(1, 3))
    part.save(path)
    assert_same(Trajectory.load(path), part)


def test_the_official_package_reads_and_writes_the_same(tmp_path):
    trajectory = make(dtype=torch.bfloat16, group=torch.tensor([2**60, 1, 2, 3]))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    trajectory.save(ours)
    with safetensors.safe_open(ours, "pt") as file:
        metadata = file.metadata()
    assert metadata == {"format": "mteditflow.Trajectory/1", "reduction": "mean"}
    read = safetensors.torch.load_file(ours)
    assert set(read) == set(TENSORS)
    for name in TENSORS:
        assert read[name].dtype == getattr(trajectory, name).dtype
        assert torch.equal(read[name], getattr(trajectory, name))
    safetensors.torch.save_file(read, theirs, metadata)
    assert_same(Trajectory.load(theirs), trajectory)


def test_load_refuses_other_files(tmp_path):
    path, metadata = tmp_path / "x", {"format": "mteditflow.Trajectory/1", "reduction": "mean"}
    tensors = {name: getattr(make(), name).contiguous() for name in TENSORS}

    def load(tensors, metadata):
        safetensors.torch.save_file(tensors, path, metadata)
        return Trajectory.load(path)

    assert len(load(tensors, metadata)) == B
    for other in ({}, {"format": "pt"}):
        message = rf"{path}: expected format 'mteditflow.Trajectory/1', got "
        with pytest.raises(ValueError, match=message + repr(other.get("format"))):
            load(tensors, other)
    few = {name: tensors[name] for name in TENSORS if name != "group"}
    for wrong in (few, {**tensors, "x": torch.zeros(1)}):
        with pytest.raises(
            ValueError, match=r": expected tensors \['group', 'latents', .*, got \["
        ):
            load(wrong, metadata)
    wrong = {**tensors, "group": tensors["group"].float()}
    with pytest.raises(ValueError, match="not a valid trajectory, group: expected integer ids"):
        load(wrong, metadata)
    wrong = {**tensors, "group": tensors["group"][:2].clone()}
    with pytest.raises(ValueError, match=r"not a valid trajectory, group: expected shape \[B\]"):
        load(wrong, metadata)
    with pytest.raises(ValueError, match=r"valid trajectory, reduction: expected .* got ''"):
        load(tensors, {"format": metadata["format"]})
    with pytest.raises(FileNotFoundError):
        Trajectory.load(tmp_path / "none")


@settings(max_examples=60)
@given(st.data())
def test_damaged_files_raise_value_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    whole, damaged = folder / "whole", folder / "damaged"
    if not whole.exists():
        make().save(whole)
    content = bytearray(whole.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        damaged.write_bytes(bytes(content[: data.draw(st.integers(0, len(content) - 1))]))
        with pytest.raises(ValueError, match="safetensors"):
            Trajectory.load(damaged)
        return
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged.write_bytes(bytes(content))
    try:
        loaded = Trajectory.load(damaged)
    except ValueError:
        return
    expected = make()  # what is left is data that a trajectory may hold
    assert loaded.latents.shape == expected.latents.shape
    assert loaded.group.dtype == expected.group.dtype


def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, trajectory = tmp_path / "x", make()
    trajectory.save(path)

    def fail(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr(pathlib.Path, "replace", fail)
    with pytest.raises(OSError, match="disk on fire"):
        make(1).save(path)
    assert_same(Trajectory.load(path), trajectory)
    assert list(tmp_path.iterdir()) == [path]


def rewritten(path, shape):
    """Give the file's first tensor, emptied, another shape in the header."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    start, end = header["latents"]["data_offsets"]
    stored = body[start:end] if 0 not in shape else b""
    kept = body[:start] + body[end:]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [place - (end - start) for place in entry["data_offsets"]]
    header["latents"] |= {"shape": shape, "data_offsets": [len(kept), len(kept) + len(stored)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + kept + stored)


@pytest.mark.parametrize(
    "shape",
    [
        [0], [0, 1, 2, 3], [0] * 70, [0, 2**40, 2, 3], [0, 2**62, 2**62, 3], [2**63 - 1, 0, 3, 3],
        [0, 2**63, 1, 1], [2**64 - 1, 0, 1, 1], [2**40, 2**40, 2**40], [2**64], [-1, 2, 3, 4],
        [1], [7, 7], [], ["4", 3], [1e9], None,
    ],
    ids=str,
)  # fmt: skip
def test_a_file_of_absurd_shapes(tmp_path, shape):
    path = tmp_path / "t.safetensors"
    make().save(path)
    if shape is None or any(not isinstance(size, int) for size in shape):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header["latents"]["shape"] = shape
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    else:
        rewritten(path, shape)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Trajectory.load(path)


def test_unsigned_group_ids_of_any_width():
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        trajectory = make(group=torch.tensor([0, 0, 9, 9]).to(dtype))
        assert trajectory.select(slice(1, 3)).group.tolist() == [0, 9]
