"""Runs of MT-OPSD: worn pictures, what the teacher is shown, promotion, going on."""

import json

import pytest
import torch
from mteditflow_examples import self_distillation
from mteditflow_examples.flux import drifting, promotion
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError, DistillationConfig
from mteditflow_examples.flux.sampling import next_chains
from mteditflow_examples.shapes.vision import pixels_of

from mteditflow.rewards import Fault, Lost, TurnScores, pixel_change
from mteditflow.training import SessionCounts
from tests.flux.rounds import started
from tests.flux.worlds import options, weights
from tests.glossary import undocumented
from tests.loops import some

pytestmark = pytest.mark.usefixtures("undrawn")

DRIFT = (
    *("objective:mt_opsd", "--data.drift", 2, "--data.groups", 2, "--data.group-size", 4),
    *("--training.batch", 32, "--training.learning-rate", 1e-2),
)


def begun(world, output, *more, family="kontext"):
    return started(world, output, *DRIFT, *more, family=family, kind=DistillationConfig)


def drifted(run):
    """The first round before its update, and its chains."""
    run.first_round = 0
    run.begin_round()
    drawn = next_chains(run)
    return drawn, drifting.drift(run, drawn)


def loss_of(run, round_):
    (units,) = run.objective.units(round_.samples, key=run.key)
    return run.objective(round_.velocity, round_.samples, units), units


@pytest.mark.parametrize("family", ["kontext", "klein"])
def test_each_trajectory_edits_its_own_worn_picture(family, request, tmp_path, monkeypatch):
    world = request.getfixturevalue("world" if family == "kontext" else "klein_world")
    recorded = {}
    own = drifting._record
    monkeypatch.setattr(
        drifting,
        "_record",
        lambda run, images, texts, purpose: (
            recorded.setdefault(purpose, (images, texts)) and own(run, images, texts, purpose)
        ),
    )
    with begun(world, tmp_path, family=family) as run:
        drawn, round_ = drifted(run)
        worn, asked = recorded["noise"]
        clean, edits = recorded["clean noise"]
        text = run.config.data.identity_instruction
        still = round_.samples.identity.tolist()
        assert 0 < sum(still) < 8
        first = [chain.instructions[0] for chain in drawn.chains]
        assert asked == [text if x else e for x, e in zip(still, first, strict=True)]
        assert (clean, edits) == (list(drawn.references[::4]), first[::4])
        # Two turns of the same picture by other noise: no two are alike.
        assert len({image.tobytes() for image in worn}) > 2
        apart = [pixel_change(*pair) for pair in zip(drawn.references, worn, strict=True)]
        assert sum(apart) / 8 / 2 <= run.numbers["chains/change"] < 255  # by each of two turns
        # The latents of the given pictures, as the pipeline itself encodes them.
        pixels = torch.stack([pixels_of(image) for image in worn]) / 127.5 - 1
        pipeline = run.editor.pipeline
        latents = pipeline._encode_vae_image(pixels, None)
        packed = pipeline._pack_latents(latents, *(latents.shape if family == "kontext" else ()))
        torch.testing.assert_close(round_.samples.given, packed, rtol=1e-4, atol=1e-4)
        output, units = loss_of(run, round_)
        assert output.loss.detach().isfinite().all()
        assert len(units) == 16


def test_what_has_not_worn_out_teaches_a_student_like_its_teacher_nothing(
    world, tmp_path, monkeypatch
):
    """I~ = I0 and v_S = v_T at the start of a run: edits have loss 0; the rest have not."""
    monkeypatch.setattr(drifting, "_wear_out", lambda run, references, text: list(references))
    with begun(world, tmp_path) as run:
        _, round_ = drifted(run)
        output, units = loss_of(run, round_)
        still = round_.samples.identity[units.rows[:, 0, 0]]
        assert float(output.loss.detach()[~still].max()) < 1e-10
        assert float(output.loss.detach()[still].min()) > 1e-6
        output.loss.sum().backward()
        taught = run.policies.state_dict("old")
        assert all(torch.equal(taught[k], x) for k, x in some(run.policies.state_dict().items()))
        assert any(x.grad is not None and x.grad.any() for x in run.policies.parameters())


def log(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: x for k, x in line.items() if not k.startswith("seconds/")} for line in lines]


GATE = ("--teacher.every", 2, "--teacher.turns", 3, 2)


def test_a_run_with_curriculum_and_gate_goes_on_to_the_same_weights(world, tmp_path, monkeypatch):
    """Depth 1 to 2; the second round's student is promoted; resumed after it, within a streak."""
    seen = []

    def promotes(gains, **margins):
        seen.append((gains, margins))
        return True

    monkeypatch.setattr(promotion, "promotes", promotes)
    more = (
        *("--growth.first", 1, "--growth.change", 255, "--growth.patience", 3),
        *(*GATE, "--teacher.sessions", world / "held_out.jsonl", "--teacher.collapse-margin", 5),
        *("--training.rounds", 4, "--output.checkpoint-every", 1, "--output.keep", 9),
    )
    with begun(world, tmp_path / "whole", *more) as run:
        self_distillation.train(run)
        assert (run.method, run.state.depth.depth) == ("MT-OPSD", 2)
        assert len(run.state.teacher) == 2
        state = run.state.teacher
    whole = log(tmp_path / "whole")
    assert [line["chains/turns"] for line in whole] == [1, 1, 1, 2]
    assert undocumented(name for line in some(whole) for name in line) == []
    assert ["teacher/promoted" in line for line in whole] == [False, True, False, True]
    assert seen[0][1] == {"success_margin": 2, "collapse_margin": 5}
    again = ("--output.resume", tmp_path / "whole" / "checkpoints" / "round-000002")
    with begun(world, tmp_path / "again", *more, *again) as run:
        self_distillation.train(run)
        assert (run.first_round, run.state.teacher) == (2, state)
    assert log(tmp_path / "again") == whole[2:]
    for name in some(("current", "old", "optimizer")):
        ours, theirs = (weights(tmp_path / x, name, done=4) for x in ("whole", "again"))
        assert all(torch.equal(ours[k], theirs[k]) for k in some(ours))
    before, promoted, after = (weights(tmp_path / "whole", "old", done=x) for x in (1, 2, 3))
    assert any(not torch.equal(before[k], x) for k, x in promoted.items())
    assert all(torch.equal(promoted[k], x) for k, x in some(after.items()))
    current = weights(tmp_path / "whole", "current", done=2)
    assert all(torch.equal(current[k], x) for k, x in some(promoted.items()))


def test_a_teacher_stays_where_its_student_is_no_better(world, tmp_path):
    more = ("--teacher.sessions", world / "held_out.jsonl", "--teacher.every", 1)
    with begun(world, tmp_path, *more, "--teacher.turns", 3) as run:
        run.first_round = 0
        run.begin_round()
        promotion.promote_if_due(run)
        counts = run.state.teacher
        assert run.numbers["teacher/promoted"] == 0
        assert run.numbers["teacher/more_successes/turn_3"] == 0
        assert counts == [SessionCounts(*counts[0])]


@pytest.mark.parametrize("term", ["following", "consistency"])
def test_a_teacher_stays_where_sessions_lost_a_score_of_any_term(
    world, tmp_path, monkeypatch, term
):
    collect = promotion.collect

    def losing(run, waiting):
        terms = collect(run, waiting)
        score, where = terms[term].score.clone(), (0, 1)
        score[where] = torch.nan
        lost = {where: Lost(Fault.timeout, "no answer", 1)}
        return terms | {term: TurnScores(score, terms[term].turn_mask, lost)}

    monkeypatch.setattr(promotion, "collect", losing)
    more = ("--teacher.sessions", world / "held_out.jsonl", "--teacher.every", 1)
    with begun(world, tmp_path, *more, "--teacher.turns", 3) as run:
        run.first_round = 0
        run.begin_round()
        promotion.promote_if_due(run)
        assert run.state.teacher is None
        assert "teacher/promoted" not in run.numbers
        assert "sessions lost scores" in (tmp_path / "log.txt").read_text()


def test_sessions_that_are_trained_on_are_refused(world, tmp_path):
    more = ("--teacher.sessions", world / "train.jsonl", "--teacher.turns", 3)
    with (
        pytest.raises(ConfigError, match=r"teacher\.sessions: expected nothing that is in data\."),
        begun(world, tmp_path, *more),
    ):
        pass


REFUSED = {
    ("--teacher.every", 2): "teacher.every: has an effect only where teacher.sessions is given",
    ("--teacher.turns", 2): "teacher.turns: has an effect only where",
    ("--teacher.success-margin", 9): "teacher.success_margin: has an effect only where",
    ("--teacher.collapse-margin", 9): "teacher.collapse_margin: has an effect only where",
    ("--teacher.degraded", 0.1): "teacher.degraded: has an effect only where",
    ("--teacher.path", "x"): "teacher.path: has an effect only where the objective is distillation",
    ("--data.identity-share", 0.1): "data.identity_share: has an effect only where the objective",
    ("--data.history", "original"): "data.history: expected last for mt_opsd, got original",
    ("--growth.first", 2, "--growth.every", 1): "growth.first: expected fewer than the 2 of data.d",
}


@pytest.mark.parametrize("words", REFUSED, ids=lambda words: words[0])
def test_options_that_nothing_would_read_are_refused(words, tmp_path):
    given = options(tmp_path, tmp_path, *DRIFT)
    parse(given, DistillationConfig)
    with pytest.raises(ConfigError, match=REFUSED[words].replace(".", r"\.")):
        parse([*given, *map(str, words)], DistillationConfig)


def test_drift_and_sessions_are_refused_for_plain_distillation(tmp_path):
    given = options(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.drift: has an effect only where .* mt_opsd"):
        parse([*given, "--data.drift", "4"], DistillationConfig)
    with pytest.raises(ConfigError, match=r"teacher\.sessions: has an effect only where .*mt_opsd"):
        parse([*given, "--teacher.sessions", "x"], DistillationConfig)
    with pytest.raises(ConfigError, match=r"objective: expected one of \['distillation', 'mt_op"):
        parse([*given, "objective:nft"], DistillationConfig)
