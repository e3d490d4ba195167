"""The benchmarks measure what they say; memory, which no busy machine disturbs, is asserted."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure, report
from benchmarks.__main__ import main, measure_compiled, measure_growths, measure_pair
from benchmarks.cases import COMPILED_LIMIT, cases, compiled_cases, growths
from tests.loops import some

ROOT = Path(__file__).parents[1]
SMALL = {"latents": (4, 4, 32, 32), "samples": 60, "groups": 12}
NAMES = [case.name for case in cases("cpu", **SMALL)]


def small_case(name):
    return next(case for case in cases("cpu", **SMALL) if case.name == name)


@pytest.mark.parametrize("name", NAMES)
def test_ours_and_plain_agree(name):
    case = small_case(name)
    torch.testing.assert_close(
        case.run(case.ours), case.run(case.plain), rtol=1e-4, atol=1e-6, check_dtype=False
    )


@pytest.mark.parametrize("name", [name for name in NAMES if small_case(name).memory_limit])
def test_memory_keeps_its_limit(name):
    case = small_case(name)
    ours, plain = (
        measure.peak_bytes(lambda f=f: case.run(f), device="cpu") for f in (case.ours, case.plain)
    )
    assert ours <= case.memory_limit * plain


def test_peak_memory_is_counted_to_the_byte():
    def hold_three_at_a_time():
        a, b = torch.zeros(1024), torch.zeros(1024)
        (a + b).sum()
        del a
        torch.zeros(512)

    peak = measure.peak_bytes(hold_three_at_a_time, device="cpu")
    assert 3 * 4096 <= peak <= 3 * 4096 + 128  # and a scalar


def test_interleaved_times_tell_long_from_short():
    x = torch.randn(256, 256)
    seconds = measure.interleaved_seconds(
        {"short": lambda: x + 1, "long": lambda: [x @ x for _ in range(20)]},
        device="cpu",
        rounds=3,
        sample_seconds=1e-3,
    )
    low, median, high = measure.ratios(seconds["short"], seconds["long"])
    assert 0 < low <= median <= high < 0.5


def test_ratios_are_of_the_same_round():
    assert measure.ratios([1.0, 2.0, 30.0], [2.0, 4.0, 60.0]) == (0.5, 0.5, 0.5)


def test_the_median_lies_in_its_interval():
    assert measure.median_interval([2.0] * 5, [1.0] * 5) == (2.0, 2.0, 2.0)
    ours, plain = [1.0, 1.1, 0.9, 1.0, 5.0] * 4, [1.0] * 20
    low, median, high = measure.median_interval(ours, plain)
    assert 0.9 <= low <= median == 1.0 <= high < 5.0
    assert (low, median, high) == measure.median_interval(ours, plain)  # resampling is seeded


def test_compiled_cases_name_nft_and_the_step_in_both_precisions():
    found = compiled_cases("cpu", latents=SMALL["latents"])
    names = {case.name for case in found}
    for function in ("NFT loss, forward and backward", "SDE step with log-prob"):
        assert {f"{function}, float32", f"{function}, bfloat16"} <= names
    for case in some(found):
        assert case.time_limit == COMPILED_LIMIT
        assert str(case.inputs[0].dtype).endswith(case.name.rsplit(", ", 1)[1])
        torch.testing.assert_close(
            case.run(case.ours), case.run(case.plain), rtol=2e-2, atol=1e-6, check_dtype=False
        )


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_case_is_measured():
    case = compiled_cases("cpu", latents=SMALL["latents"])[-1]
    result = measure_compiled(case, device="cpu", rounds=2)
    low, ratio, high = result["time_ratio"]
    assert 0 < low <= ratio <= high
    assert set(result["seconds"]) == {"plain", "ours"}
    assert result["name"] == case.name


def test_straight_line_knows_linear_from_quadratic():
    assert measure.straight_line([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx((1, 1))
    assert measure.straight_line([1, 2, 4], [1.0, 4.0, 16.0])[0] == pytest.approx(2)


@pytest.mark.parametrize("name", [name for name in growths("cpu") if name.startswith("rollout")])
def test_rollouts_grow_along_the_axis_they_name(name):
    roll = growths("cpu", base=2, latent=(3,))[name]
    assert roll(6).log_prob.numel() == 3 * roll(2).log_prob.numel()


def results_of_a_small_run():
    return {
        "environment": report.environment("cpu"),
        "latents": list(SMALL["latents"]),
        "samples": SMALL["samples"],
        "groups": SMALL["groups"],
        "rounds": 2,
        "pairs": [
            measure_pair(small_case(NAMES[0]), device="cpu", rounds=2, compiled=False),
            measure_pair(small_case(NAMES[-1]), device="cpu", rounds=2, compiled=False),
        ],
        "growths": measure_growths(device="cpu", rounds=2, lengths=(1, 2, 3), base=2, latent=(4,))[
            :1
        ],
    }


def test_results_of_devices_stand_side_by_side(tmp_path):
    results = results_of_a_small_run()
    report.write(tmp_path, "cuda", results)
    report.write(tmp_path, "cpu", results)
    report.write(tmp_path, "cpu", results)
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"cpu", "cuda"}
    page = (tmp_path / "results.md").read_text()
    assert page.count("## cpu: ") == page.count("## cuda: ") == 1
    assert NAMES[0] in page
    assert report.environment("cpu")["torch"] in page


def test_the_page_shows_compiled_rows_where_there_are_any():
    results = results_of_a_small_run()
    assert "### Compiled" not in report.render({"cpu": results})
    row = {
        "name": "loss, bfloat16",
        "seconds": {"plain": 0.002, "ours": 0.0021},
        "time_ratio": (1.04, 1.06, 1.07),
        "time_limit": 1.05,
    }
    page = report.render({"cpu": {**results, "compiled": [row]}})
    assert "| loss, bfloat16 | 2 | 2.1 | 1.060 (1.040..1.070) | 1.05 | MISSED |" in page


def test_a_missed_limit_is_said():
    assert report.met(0.6, 0.5) == "MISSED"
    assert report.met(0.5, 0.5) == "met"
    assert report.met(0.6, None) == ""


def test_the_page_is_made_from_the_stored_results():
    stored = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    assert (ROOT / "benchmarks" / "results.md").read_text() == report.render(stored)


def test_command_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    said = capsys.readouterr().out
    for option in ("--device", "--threads", "--rounds", "--only", "--no-compile", "--output"):
        assert option in said


def test_a_folder_is_made_before_anything_is_measured(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    report.add_output(parser)
    made = parser.parse_args(["--output", str(tmp_path / "a" / "b")]).output
    assert made.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--output", str(tmp_path / "file")])
    assert ended.value.code == 2
    assert "--output: expected a folder, got" in capsys.readouterr().err
