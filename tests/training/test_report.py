"""report.json: everything a run has shown, in what JSON can hold."""

import json
from datetime import date
from enum import Enum
from pathlib import Path

import pytest
import torch

import mteditflow
from mteditflow.evaluation.comparison import compare
from mteditflow.training.report import run_report, write_report
from tests.samples_of_scores import evaluation, few_resamples, nan

__all__ = ["few_resamples"]  # a fixture of every test here


class Objective(Enum):
    nft = "nft"


CONFIG = {"learning_rate": 1e-5, "model": Path("models/x"), "objective": Objective.nft, "k": None}
METRICS = [
    {
        "round": 1,
        "trajectories": 8.0,
        "invalid_share": 0.25,
        "lost/time-out": 2.0,
        "seconds/a": 3.0,
    },
    {"round": 2, "trajectories": 8.0, "invalid_share": 0.0, "seconds/a": 3.0, "seconds/b": 2.0},
    {"round": 3, "trajectories": 4.0, "invalid_share": 0.5, "lost/refusal": 3.0, "seconds/a": nan},
]


def pair():
    before = evaluation(
        [[1, 0], [1, 1], [1, nan]], [[0.5, 0.5]] * 3, lost=[(2, 1)], whole=[[1, 0]] * 3
    )
    after = evaluation([[1, 1]] * 3, [[0.5, 0.6]] * 3, whole=[[1, 1]] * 3, after=3)
    return before, after


def test_golden_report(tmp_path):
    before, after = pair()
    metrics = [line for line in METRICS if line.get("seconds/a") == 3.0]
    write_report(tmp_path, run_report(before, after, metrics, config=CONFIG, seed=7))
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert (report["seed"], report["rounds"], report["held_out_chains"]) == (7, 2, 3)
    assert report["config"] == {
        "learning_rate": 1e-5,
        "model": "models/x",
        "objective": str(Objective.nft),
        "k": None,
    }
    assert report["before"]["counted_chains"] == 2
    assert report["before"]["lost_scores"] == {"time-out": 1}
    assert report["before"]["marginal"] == [100, 50]
    assert report["after"]["round"] == 3
    assert report["after"]["whole"] == [1, 1]
    assert report["after"]["content_consistency"] == pytest.approx([50, 60])
    for name in before.names:
        for low, high in report["after"][f"{name}_interval"]:
            assert low <= high
    gain, found = report["difference_at_last_turn"], compare(before, after)
    assert (gain["turn"], gain["chains"]) == (2, 2)
    assert gain["marginal"] == 50
    assert gain["kept"] == {"marginal": [0.5, 1.0], "whole": [0.0, 1.0]}
    assert gain["marginal_kept_difference"] == 50
    for name, interval in found.difference.items():
        assert gain[name] == pytest.approx(float(interval.estimate), abs=1e-4)
        ends = [float(interval.low), float(interval.high)]
        assert gain[f"{name}_interval"] == pytest.approx(ends, abs=1e-4)
    assert report["seconds"] == 8
    assert report["time"] == {"a": [6, 0.75], "b": [2, 0.25]}
    assert report["date"] == date.today().isoformat()
    assert report["threads"] == torch.get_num_threads()
    assert report["versions"]["mteditflow"] == mteditflow.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"]


def test_lost_and_invalid_shares_are_of_all_trajectories():
    report = run_report(*pair(), METRICS, config={}, seed=0)
    assert report["invalid_reward_share"] == pytest.approx((0.25 * 8 + 0.5 * 4) / 20)
    assert report["lost_answers"] == {"share": 0.25, "reasons": {"refusal": 3, "time-out": 2}}
    assert report["seconds"] == 8  # a round whose seconds are not known adds none


def test_a_run_of_no_rounds_and_no_scores_has_a_report(tmp_path):
    none = evaluation([[nan, nan]])
    report = run_report(none, none, [], config={}, seed=0)
    write_report(tmp_path, report)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["after"]["marginal"] == [None, None]
    assert report["difference_at_last_turn"]["marginal_interval"] == [None, None]
    assert (report["seconds"], report["invalid_reward_share"]) == (0, 0)
