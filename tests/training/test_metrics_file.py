"""Whole lines only, at whatever byte a run is killed."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.training.metrics_file import MetricsFile, read_metrics
from tests.loops import some

NUMBERS = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "round"), st.floats(), max_size=4
)


def same(a, b):
    return a == b or (math.isnan(b) and not math.isfinite(a))


@given(st.lists(NUMBERS, min_size=1, max_size=4))
def test_numbers_come_back_and_what_is_not_finite_is_nan(tmp_path_factory, rounds):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    file = MetricsFile(path)
    for i, numbers in enumerate(rounds):
        file.append(i, numbers)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    for i, (old, new) in some(enumerate(zip(rounds, read_metrics(path), strict=True))):
        assert new.pop("round") == i
        assert list(new) == list(old)
        assert all(map(same, old.values(), new.values()))


def test_a_file_cut_at_any_byte_keeps_its_whole_lines_and_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for i in range(3):
        file.append(i, {"reward/following": i / 3})
    whole = path.read_bytes()
    for cut in some(range(len(whole) + 1)):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        assert [line["round"] for line in read_metrics(path)] == list(range(lines))
        again = MetricsFile(path)
        for i in range(lines, 3):
            again.append(i, {"reward/following": i / 3})
        assert path.read_bytes() == whole


@given(st.sets(st.integers(0, 20)), st.integers(0, 21))
def test_rewinding_drops_that_round_and_later_ones(tmp_path_factory, rounds, to):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    file = MetricsFile(path)
    for i in sorted(rounds):
        file.append(i, {"kl": math.nan, "reward": i / 7})
    before = read_metrics(path)
    file.rewind(to)
    kept = [line for line in before if line["round"] < to]
    assert [(x["round"], x["reward"]) for x in read_metrics(path)] == [
        (x["round"], x["reward"]) for x in kept
    ]
    file.append(to, {})
    assert read_metrics(path)[-1] == {"round": to}


def test_a_kill_while_rewinding_leaves_the_old_file(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {})
    file.append(2, {})

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        file.rewind(1)
    assert [line["round"] for line in read_metrics(file.path)] == [1, 2]


@pytest.mark.parametrize("later", [0, 3])
def test_a_round_is_not_recorded_twice(tmp_path, later):
    MetricsFile(tmp_path / "metrics.jsonl").append(3, {})
    with pytest.raises(ValueError, match=rf"expected one after 3, .*got {later}; rewind first"):
        MetricsFile(tmp_path / "metrics.jsonl").append(later, {})


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"kl": 1.0}',
        '{"round": 2, "kl": {}}',
        "",
        '{"round": Infinity}',
        pytest.param('{"round": 2, "kl": 1' + 400 * "0" + "}", id="beyond a float"),
        pytest.param('{"round": 2, "kl": ' + 100_000 * "[", id="brackets"),
    ],
)
def test_a_line_of_something_else_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected an object of numbers"):
        read_metrics(path)


@pytest.mark.parametrize("rounds", [(1, 2, 2, 3), (1, 3, 2), (1, 1)])
def test_rounds_of_two_writers_are_named(tmp_path, rounds):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"round": {n}}}\n' for n in rounds))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:[23]: expected a round after [123], "):
        read_metrics(path)


def test_no_file_has_no_rounds(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
