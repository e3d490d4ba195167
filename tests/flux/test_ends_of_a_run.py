"""Ends of a run: flat rounds, lost scores, a scorer that raises; what is written and saved."""

import json
import math
import sys
from concurrent.futures import Future

import pytest
import torch
from mteditflow_examples import train_flux
from mteditflow_examples.flux.advantages import round_rewards
from mteditflow_examples.flux.config import Rewards
from mteditflow_examples.flux.reporting import refuse_flat_rewards
from mteditflow_examples.flux.run import FlatRewardsError, Stopped
from mteditflow_examples.flux.sampling import await_all
from mteditflow_examples.flux.scorers import ScorerError
from mteditflow_examples.flux.scoring import scoring
from mteditflow_examples.shapes.scoring import ExactRewards
from PIL import Image

from mteditflow.chains import read_chains
from mteditflow.rewards import LIKERT, Fault, Lost, TurnScores
from mteditflow.training import Checkpoints
from tests.flux.rounds import started
from tests.flux.test_updating import NO_KL, lines_of
from tests.flux.worlds import options, weights
from tests.loops import some
from tests.processes import free_port
from tests.samples_of_scores import turn_scores

pytestmark = pytest.mark.usefixtures("undrawn")
ROUNDS = 3  # of two updates; more would end a run with max-skipped 1, if they counted as skipped


class Flat:
    """Scores every turn alike."""

    lost, scale = False, LIKERT

    async def score(self, chains, images):
        mask = torch.ones(len(chains), chains[0].turns, dtype=torch.bool)
        score = torch.full(mask.shape, 3.0)
        lost = {}
        if self.lost:
            lost = {
                tuple(at): Lost(Fault.timeout, "no answer", 1) for at in mask.nonzero().tolist()
            }
            score = torch.full(mask.shape, math.nan)
        same = TurnScores(torch.full(mask.shape, 0.5), mask, {})
        return {
            "following": TurnScores(score, mask, lost),
            "consistency": same,
            "strict": same,
        }


class Lossy(Flat):
    """Loses every score."""

    lost = True


class Breaking(ExactRewards):
    """Scores a round, then raises."""

    calls = 0

    async def score(self, chains, images):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("out of quota")
        return await super().score(chains, images)


def program(world, output, monkeypatch, *more, objective):
    """Run the trainer as a user starts it, but in this process; its exit code."""
    given = options(world, output, "--data.held-out", "None", *more, objective=objective)
    monkeypatch.setattr(sys, "argv", ["train_flux.py", *given])
    try:
        train_flux.main()
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("grpo", NO_KL),
        ("nft", ("objective:dpo", "--objective.dpo-beta", 10)),
        ("nft", ("--rewards.groups", "informative")),
    ],
)
def test_flat_rounds_make_no_update_and_never_end_a_run_without_a_limit(
    world, tmp_path, objective, more, monkeypatch
):
    more = (*more, "--training.rounds", ROUNDS, "--rewards.scorer", f"{__name__}:Flat")
    more = (*more, "--safety.max-flat", "None")
    more += ("--safety.max-skipped", 1, "--data.groups", 2, "--data.group-size", 2)
    assert program(world, tmp_path, monkeypatch, *more, objective=objective) == 0
    lines = lines_of(tmp_path)
    assert [line["training/empty_updates"] for line in lines] == [2] * ROUNDS
    assert [line["training/skipped_updates"] for line in lines] == [0] * ROUNDS
    assert not any({"training/loss", "training/grad_norm"} & line.keys() for line in some(lines))
    state = json.loads(
        (tmp_path / "checkpoints" / f"round-{ROUNDS:06d}" / "state.json").read_text()
    )
    assert (state["updates"], state["skipped"]) == (0, 0)
    moved = [x for name, x in weights(tmp_path, done=ROUNDS).items() if "lora_B" in name]
    assert moved
    assert not any(x.any() for x in some(moved))  # as they began
    assert state["flat"] == ROUNDS
    told = (tmp_path / "log.txt").read_text()
    assert (
        told.count("warning: round 3: expected rewards that differ within a group, got none") == 1
    )
    assert "following: mean 0.5, standard deviation in groups at most 0;" in told


@pytest.mark.parametrize(("limit", "saved"), [(10, 2), (2, 1)])
def test_flat_rounds_alone_fail_a_run_at_its_limit_or_at_its_end(
    world, tmp_path, monkeypatch, limit, saved
):
    more = ("--training.rounds", 2, "--rewards.scorer", f"{__name__}:Flat", "--data.groups", 2)
    more += ("--data.group-size", 2, "--safety.max-flat", limit)
    assert program(world, tmp_path, monkeypatch, *more, objective="nft") == 1
    lines, told = lines_of(tmp_path), (tmp_path / "log.txt").read_text()
    assert [line["round"] for line in lines] == [1, 2]  # that of the round in progress, too
    assert lines[0]["training/flat_updates"] == 2
    error = "error: safety.max_flat: expected rewards that differ within a group, got none in 2 rou"
    assert error in told
    assert ("all of this run, which took 0 optimizer steps" in told) == (limit == 10)
    state = Checkpoints(tmp_path / "checkpoints").latest().state
    assert (state["flat"], state["updates"]) == (saved, 0)  # the round of the stop is not counted


def test_rewards_that_differ_again_end_a_count_of_flat_rounds(world, tmp_path):
    scores = {x: turn_scores([[3, 4]] * 4) for x in ("following", "consistency")}
    nothing = {x: turn_scores([[math.nan, math.nan]] * 4) for x in scores}
    flat, valid = torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool)
    with started(world, tmp_path, "--safety.max-flat", 3) as run_:
        group = torch.zeros(4, dtype=torch.long)
        found = round_rewards(run_.config.rewards, scores, group)
        missing = round_rewards(run_.config.rewards, nothing, group)
        for advantage, count in ((flat, 1), (flat, 2), (flat + 1, 0), (flat, 1)):
            refuse_flat_rewards(run_, found, advantage, valid)
            assert run_.state.flat == count
        refuse_flat_rewards(run_, found, torch.full_like(flat, math.nan), ~valid)
        with pytest.raises(FlatRewardsError, match=r"got none in 3 rounds .*100% NaN, 0% lost"):
            refuse_flat_rewards(run_, missing, flat, valid)
        assert run_.state.flat == 2  # a resumed run repeats this round


def test_lost_rewards_end_a_run(world, tmp_path, monkeypatch):
    more = (*NO_KL, "--rewards.scorer", f"{__name__}:Lossy", "--data.groups", 2)
    assert program(world, tmp_path, monkeypatch, *more, objective="grpo") == 1
    told = (tmp_path / "log.txt").read_text()
    assert "error: rewards.max_invalid: following: 100% of 8 rewards are invalid" in told
    assert "nothing to measure" not in told  # lost is not unmeasured
    (line,) = lines_of(tmp_path)  # of the round that ended the run
    assert (line["round"], line["invalid_share"], line["lost/time-out"]) == (1, 1, 8)


def test_a_run_outlives_its_pictures_and_is_saved_where_its_scorer_raises(
    world, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mteditflow.training.pictures.write_picture", full)
    more = ("--rewards.scorer", f"{__name__}:Breaking", "--output.checkpoint-every", 9)
    more += ("--output.strips-every", 1, "--data.groups", 2)
    assert program(world, tmp_path, monkeypatch, *more, objective="nft") == 1
    told = (tmp_path / "log.txt").read_text()
    full_disk = "is not written: [Errno 28] No space left on device"
    assert f"warning: round 1: the picture chains {full_disk}" in told
    assert f"warning: round 1: the picture rewards {full_disk}" in told
    assert f"error: rewards.scorer: expected {__name__}:Breaking to score 8 chains, got " in told
    assert "RuntimeError: out of quota (test_ends_of_a_run.py, line " in told
    assert [line["round"] for line in lines_of(tmp_path)] == [1]
    assert Checkpoints(tmp_path / "checkpoints").latest().round == 1  # not due before round 9


def test_a_scorer_that_raises_on_one_rank_ends_all_of_them(world, tmp_path, monkeypatch):
    good, bad = Future(), Future()
    good.set_result({})
    bad.set_exception(ScorerError("rewards.scorer: \u00e9"))
    with started(world, tmp_path) as run_:
        with pytest.raises(ScorerError, match=r"^rewards.scorer: \u00e9$"):
            await_all(run_, [good, bad], "rewards")
        assert bad.exception().everywhere  # so that all may save
        assert await_all(run_, [good], "rewards") == [{}]
        other = torch.tensor([*"on rank 1: \u00e9\n".encode()], dtype=torch.uint8)
        ranks = {torch.uint8: lambda own: torch.cat([own, other])}

        def gathered(own):
            return (ranks.get(own.dtype, lambda x: x)(own),), slice(0, len(own))

        monkeypatch.setattr("mteditflow_examples.flux.sampling.gather_ranks", gathered)
        with pytest.raises(ScorerError, match=r"^on rank 1: \u00e9$"):
            await_all(run_, [good], "rewards")


def test_a_judge_that_is_out_is_explained_once(world, tmp_path, monkeypatch):
    judge = Rewards(judge=(f"http://127.0.0.1:{free_port()}/v1",), judge_model="x")
    chain = read_chains(world / "train.jsonl", check_images=False).chains[0].first_turns(1)
    image = Image.new("RGB", (8, 8))
    stop = iter((None, None, Stopped("SIGTERM")))

    def requested():
        if (signal := next(stop)) is not None:
            raise signal

    with started(world, tmp_path) as run:
        monkeypatch.setattr(run, "stop_if_requested", requested)
        # The error leaves the block of scoring, which then cancels the requests in flight.
        with pytest.raises(Stopped), scoring(judge, tmp_path / "judge.sqlite") as run.submit:
            await_all(run, [run.submit([chain] * 4, [[image, image]] * 4)], "rewards")
    told = (tmp_path / "log.txt").read_text()
    said = f"waiting for {judge.judge[0]}: each request waits up to 300 s for a server"
    assert told.count("each request waits") == told.count(said) == 1
    assert "20% of a reward are lost (rewards.max_invalid)" in told
