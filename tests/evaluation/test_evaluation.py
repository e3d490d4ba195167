"""Metrics of held-out chains: by hand, against the demo's, and to a file and back."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from mteditflow.evaluation import JudgedBy, Provenance
from mteditflow.evaluation.evaluation import Evaluation
from mteditflow.metrics import wilson_interval
from tests.loops import some
from tests.samples_of_scores import (
    any_evaluation,
    evaluation,
    few_resamples,
    nan,
    reference_metrics,
    resampled,
    turn_scores,
)

__all__ = ["few_resamples"]  # a fixture of every test here


def test_golden_metrics_of_likert_scores():
    """Marginal 3/4, 2/4; IF 3/4, 1/4; CC 0.6, 0.4; Overall sqrt(IF CC); whole by its mean."""
    found = evaluation(
        [[5, 4], [5, 5], [5, 3], [1, 5]],
        [[0.6, 0.4]] * 4,
        whole=[[1, 0], [0, 0], [1, 1], [1, 1]],
        success_at=5,
    )
    estimates = {name: x.estimate.tolist() for name, x in found.metrics.items()}
    assert list(estimates) == [
        *("instruction_following", "marginal", "content_consistency", "overall", "whole")
    ]
    assert estimates["instruction_following"] == [75, 25]
    assert estimates["marginal"] == [75, 50]
    assert estimates["content_consistency"] == pytest.approx([60, 40])
    assert estimates["overall"] == pytest.approx([67.082, 31.623], abs=1e-3)
    assert estimates["whole"] == [0.75, 0.5]
    assert found.score == pytest.approx(31.623, abs=1e-3)
    assert found.numbers["held_out/overall/turn_2"] == found.score
    assert found.numbers["held_out/invalid_share"] == 0


def test_metrics_equal_those_of_a_loop_in_plain_python():
    """The same estimates and, from the same draws, the same intervals."""
    generator = torch.Generator().manual_seed(1)
    success = (torch.rand(40, 3, generator=generator) < 0.7).tolist()
    consistency = torch.rand(40, 3, generator=generator).tolist()
    found = evaluation([[1 + 4 * x for x in row] for row in success], consistency, success_at=5)
    expected = resampled(lambda rows: reference_metrics(success, consistency, rows), 40)
    for i, name in some(enumerate(found.names)):
        assert found.estimates[name] == pytest.approx(expected[0][i].tolist(), abs=1e-3)
        if name in ("content_consistency", "overall"):
            for values, reference in some(zip(found.metrics[name], expected, strict=True)):
                assert values.tolist() == pytest.approx(reference[i].tolist(), abs=1e-3)
    for name in ("instruction_following", "marginal"):  # one outcome per chain
        for n, estimate in some(enumerate(found.estimates[name])):
            ends = [float(100 * x) for x in wilson_interval(estimate / 100 * 40, 40)[1:]]
            assert [float(x[n]) for x in found.metrics[name][1:]] == pytest.approx(ends, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_intervals_contain_the_estimate_and_are_none_without_spread(seed):
    rows = (torch.rand(25, 2, generator=torch.Generator().manual_seed(seed)) < 0.5).float()
    found = evaluation(rows.tolist(), rows.tolist(), always=[[0.5, 0.5]] * 25)
    for name in some(found.names[:4]):
        estimate, low, high = found.metrics[name]
        assert (low <= estimate).all()
        assert (estimate <= high).all()
    assert (found.metrics["overall"].low < found.metrics["overall"].high).all()
    always = found.metrics["always"]
    assert always.estimate.tolist() == [0.5, 0.5]
    assert bool(always.low.isnan().all() & always.high.isnan().all())


def test_a_chain_without_consistency_keeps_its_following():
    """Nothing was lost: IF is 50% over two chains, CC 90% over one."""
    found = evaluation([[1.0], [0.0]], [[0.9], [nan]])
    for name in ("instruction_following", "marginal"):
        assert found.metrics[name].estimate.tolist() == [50]
        assert found.counts[name] == [2]
    assert found.metrics["content_consistency"].estimate.tolist() == pytest.approx([90])
    assert found.counts["content_consistency"] == found.counts["overall"] == [1]
    assert found.score == pytest.approx(100 * (0.5 * 0.9) ** 0.5)
    assert (found.lost, found.unmeasured) == ({}, {"consistency": 1})
    assert found.numbers["held_out/invalid_share"] == 0
    assert found.numbers["held_out/chains/content_consistency/turn_1"] == 1
    assert found.complete.all()


def test_every_metric_is_over_the_chains_that_have_it():
    """A lost turn ends IF there, costs Marginal that turn, and consistency nothing."""
    found = evaluation(
        [[1, 0, 1], [1, nan, 1], [0, 1, 1], [nan, 1, 0]],
        [[0.5, 0.5, nan], [0.9, 0.9, 0.9], [0.7, nan, nan], [0.1, 0.1, 0.1]],
        lost=[(1, 1), (3, 0)],
    )
    assert found.counts == {
        "instruction_following": [3, 2, 2],
        "marginal": [3, 3, 4],
        "content_consistency": [4, 3, 2],
        "overall": [3, 2, 2],
    }
    assert found.estimates["instruction_following"] == pytest.approx([200 / 3, 0, 0])
    assert found.estimates["marginal"] == pytest.approx([200 / 3, 200 / 3, 75])
    assert found.estimates["content_consistency"] == pytest.approx([55, 50, 50])
    assert found.complete.tolist() == [True, False, True, False]
    assert found.numbers["held_out/invalid_share"] == 0.5
    assert (found.lost, found.unmeasured) == ({"time-out": 2}, {"consistency": 3})


def test_a_lost_consistency_is_lost_and_one_that_is_not_there_is_not():
    terms = {
        "following": turn_scores([[1, 1]] * 3),
        "consistency": turn_scores([[0.5, nan], [nan, nan], [0.5, nan]], lost=[(0, 1)]),
    }
    found = Evaluation(0, ["a", "b", "c"], [["x", "y"]] * 3, terms, success_at=1)
    assert found.complete.tolist() == [False, True, True]
    assert found.counts["instruction_following"] == [3, 3]
    assert found.counts["content_consistency"] == [2, 0]
    assert found.unmeasured == {"consistency": 4 - 1 + 0}


def test_few_chains_that_agree_do_not_look_certain():
    """Two of two: 34% to 100%; today's bootstrap gave 100% to 100%."""
    found = evaluation([[1, 0], [1, 0]]).metrics["marginal"]
    assert found.estimate.tolist() == [100, 0]
    assert found.low.tolist() == pytest.approx([34.2380, 0], abs=1e-3)
    assert found.high.tolist() == pytest.approx([100, 65.7620], abs=1e-3)


@pytest.mark.parametrize("value", [85.0, -0.2, 1.01])
@pytest.mark.parametrize("name", ["consistency", "background"])
def test_consistency_off_its_scale_is_refused_in_memory_and_in_a_file(tmp_path, name, value):
    judge = Provenance(judged_by=JudgedBy(scorer="mine:Scorer"))
    good = evaluation([[1]], [[0.5]], background=[[0.5]], provenance=judge)
    good.write(tmp_path / "e.json")
    terms = {**good.terms, name: turn_scores([[value]])}
    refused = f"{name}: expected scores in 0..1, got {value:g}"
    with pytest.raises(ValueError, match=re.escape(refused)):
        replace(good, terms=terms)
    record = json.loads((tmp_path / "e.json").read_text())
    record["terms"][name]["score"] = [[value]]
    (tmp_path / "e.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=re.escape(f"e.json: {refused}")):
        Evaluation.read(tmp_path / "e.json")


def test_a_cosine_may_be_negative_and_rounding_may_lead_beyond_1():
    judge = Provenance(judged_by=JudgedBy(judge="m", terms="features"))
    assert evaluation([[1, 1]], [[-0.9, 1 + 5e-6]], provenance=judge).terms
    with pytest.raises(ValueError, match=r"consistency: expected scores in -1..1, got -1.5"):
        evaluation([[1]], [[-1.5]], provenance=judge)


def test_a_score_that_is_text_is_refused(tmp_path):
    evaluation([[1.0]]).write(tmp_path / "e.json")
    text = (tmp_path / "e.json").read_text()
    (tmp_path / "e.json").write_text(text.replace("[[1.0]]", '[["1"]]'))
    with pytest.raises(ValueError, match=r"score\[0\]\[0\]: expected a valid number, got"):
        Evaluation.read(tmp_path / "e.json")


def test_a_reported_term_that_is_lost_leaves_the_chain_in():
    found = evaluation([[1], [0]], whole=[[nan], [0.25]])
    assert found.counts == {"instruction_following": [2], "marginal": [2], "whole": [1]}
    assert found.metrics["whole"].estimate.tolist() == [0.25]


def test_short_chains_leave_the_denominator_of_turns_that_they_do_not_have():
    found = evaluation([[1, 1, 0], [1, None, None], [0, 1, None]])
    assert found.metrics["marginal"].estimate.tolist() == pytest.approx([200 / 3, 100, 0])
    assert found.metrics["instruction_following"].estimate.tolist() == pytest.approx(
        [200 / 3, 50, 0]
    )


def test_without_consistency_the_score_is_that_of_following():
    found = evaluation([[1, 1], [1, 0]])
    assert list(found.metrics) == ["instruction_following", "marginal"]
    assert found.score == 50


def test_where_no_chain_counts_metrics_are_nan():
    found = evaluation([[nan, nan]], [[nan, nan]])
    assert set(map(tuple, found.counts.values())) == {(0, 0)}
    assert found.score != found.score
    assert all(
        bool(x.isnan().all()) for interval in some(found.metrics.values()) for x in some(interval)
    )


@given(any_evaluation())
def test_the_file_gives_back_every_score_bit_for_bit(tmp_path_factory, found):
    path = tmp_path_factory.getbasetemp() / "new" / "evaluation.json"
    found.write(path)
    again = Evaluation.read(path)
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN outside the JSON standard
    for name in ("round", "chain_ids", "instructions", "success_at"):
        assert getattr(again, name) == getattr(found, name)
    assert list(again.terms) == list(found.terms)
    for name, old in some(found.terms.items()):
        new = again.terms[name]
        assert new.score.dtype == old.score.dtype
        assert torch.equal(new.score.isnan(), old.score.isnan())
        assert torch.equal(new.score.nan_to_num(), old.score.nan_to_num())
        assert torch.equal(new.turn_mask, old.turn_mask)
        assert dict(new.lost) == dict(old.lost)
    assert [entry.name for entry in path.parent.iterdir()] == ["evaluation.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "evaluation.json"
    evaluation([[1]]).write(path)
    old = path.read_bytes()

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        evaluation([[0]]).write(path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"e\.json: .*JSON"),
        ('{"round": 0', r"e\.json: .*JSON"),
        ("[1, 2]", r"e\.json: "),
        ('{"round": 0, "success_at": 1, "chain_ids": [], "instructions": []}', "terms: expected"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, text, message):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Evaluation.read(tmp_path / "e.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("score", [[1.0], [1.0, 2.0]]), ("score", [[1.0]]), ("turn_mask", []), ("score", [])],
)
def test_scores_that_do_not_fit_are_named_with_their_file(tmp_path, field, value):
    path = tmp_path / "e.json"
    evaluation([[1.0, 0.0], [1.0, 1.0]]).write(path)
    record = json.loads(path.read_text())
    record["terms"]["following"][field] = value
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"e\.json: "):
        Evaluation.read(path)


SCORES = turn_scores([[1.0, 1.0]])
GOOD = {
    "round": 0,
    "chain_ids": ["a"],
    "instructions": [["x", "y"]],
    "terms": {"following": SCORES},
    "success_at": 1,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"round": -1}, ValueError, "round: expected an integer >= 0, got -1"),
        ({"success_at": nan}, ValueError, "success_at: expected a finite number"),
        ({"terms": {"consistency": SCORES}}, ValueError, r"'following' among them, got \['cons"),
        ({"chain_ids": ["a", "b"]}, ValueError, "chain_ids: expected 1 different names"),
        (
            {"instructions": [["x"]]},
            ValueError,
            r"expected one per turn, \[2\] by chain, got \[1\]",
        ),
        (
            {"terms": {"following": SCORES, "looks": turn_scores([[1.0]])}},
            ValueError,
            r"terms\['looks'\]: expected shape of 'following' = \[1, 2\], got \[1, 1\]",
        ),
        (
            {"terms": {"following": SCORES, "looks": turn_scores([[1.0, None]])}},
            ValueError,
            r"terms\['looks'\]: expected the turns of 'following', got others",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        Evaluation(**(GOOD | change))
