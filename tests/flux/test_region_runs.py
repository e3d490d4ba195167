"""Runs whose rewards count in regions: refusals, masks and boxes, the same weights again."""

import json
import sys

import anyio
import pytest
import torch
from mteditflow_examples import train_flux
from mteditflow_examples.flux.advantages import (
    reward_advantages,
    round_rewards,
    turn_advantages,
    turn_signals,
)
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError, Rewards
from mteditflow_examples.flux.regions import token_advantages
from mteditflow_examples.flux.sampling import next_chains, sample
from mteditflow_examples.flux.scorers import ScorerError
from mteditflow_examples.flux.scoring import check_services, own_scorer
from mteditflow_examples.shapes.scoring import ExactRewards, boxed
from PIL import Image

from mteditflow.chains import Chain
from mteditflow.rewards import BINARY, TurnScores
from tests.flux.rounds import started
from tests.flux.worlds import weights
from tests.glossary import undocumented
from tests.loops import some

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = ("--data.groups", 2, "--data.group-size", 2, "--training.batch", 32)
ON = ("--rewards.regions", "--rewards.credit", "turn")
BOXES = ("--rewards.scorer", "mteditflow_examples.shapes.scoring:BoxedRewards")


def sampled(run):
    """A round up to its advantages: what was drawn, made and scored, and the rewards' parts."""
    run.first_round = 0
    run.begin_round()
    drawn = next_chains(run)
    rollout, images, scores = sample(run, drawn)
    config = run.config.rewards
    rewards = round_rewards(config, scores, drawn.group)
    signals, own = turn_signals(config, rewards, {})
    whole = turn_advantages(config, rewards, signals, own)
    return drawn, rollout, images, whole, reward_advantages(config, rewards, signals, own)


def test_parts_of_rewards_add_up_and_count_in_their_regions(world, tmp_path):
    still = ("--data.identity-share", 0.4, "--rewards.weights.identity", 0.5, "--data.turns", 3)
    with started(world, tmp_path, *SMALL, *ON, *still) as run:
        drawn, rollout, images, whole, parts = sampled(run)
        assert set(parts) == {"following", "consistency", "identity"}
        limit = run.config.rewards.advantage_limit
        torch.testing.assert_close(sum(parts.values()).clamp(-limit, limit), whole.value)
        found = token_advantages(run, drawn, rollout, images, parts)
        regions = [run.submit.regions(drawn.chains, [
            [own[0], *(x for x, edit in zip(own[1:], edits, strict=True) if edit)]
            for own, edits in zip(images, drawn.edits.tolist(), strict=True)
        ]).result()]  # fmt: skip
        assert run.numbers["regions/clamped"] <= 1
    latent = rollout.trajectory.latents.shape[3:]
    assert found.shape == (*drawn.edits.shape, latent[0], 1)
    side = int(latent[0] ** 0.5)
    tile = 12 // side
    edit = 0
    for b, edits in some(enumerate(drawn.edits.tolist())):
        edit = 0
        for n, asked in some(enumerate(edits)):
            if not asked:  # no scorer sees it: its reward counts everywhere
                assert found[b, n].eq(found[b, n, 0]).all()
                continue
            expected = torch.zeros(side, side)
            for name in ("following", "consistency"):
                mask = regions[0][name][b, edit]
                share = mask.unflatten(0, (side, tile)).unflatten(2, (side, tile)).mean((1, 3))
                expected += parts[name][b, n] * (share / share.mean() if share.any() else 1)
            flat = expected.flatten().clamp(-limit, limit)
            torch.testing.assert_close(found[b, n, :, 0], flat)
            edit += 1


def test_a_region_of_all_tokens_trains_as_a_turn_does(world, tmp_path, monkeypatch):
    """Masks of ones: the weights of a run without regions."""

    async def regions(self, chains, images):
        return {"following": torch.ones(len(images), len(images[0]) - 1, 12, 12)}

    more = (*SMALL, "--training.rounds", 1, "--output.checkpoint-every", 1)
    for name, given in (("turns", ()), ("tokens", ("--rewards.regions",))):
        monkeypatch.setattr(ExactRewards, "regions", regions)
        with started(world, tmp_path / name, *more, *given) as run:
            train_flux.train(run)
    ours, theirs = (weights(tmp_path / name, done=1) for name in ("turns", "tokens"))
    for key in some(ours):
        # Of steps of 1e-3: Adam divides gradients of rounding's size by their own.
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-4, rtol=1e-3)


def log(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: x for k, x in line.items() if not k.startswith("seconds/")} for line in lines]


def test_a_filled_run_by_regions_goes_on_to_the_same_weights(world, tmp_path):
    """All in one: boxes, a share outside, and groups in place of those that train nothing."""
    more = (*BOXES, *ON, "--rewards.region-outside", 0.2, "--rewards.groups", "informative",
            "--data.extra-groups", 2, "--training.rounds", 2, "--output.checkpoint-every", 1,
            "--output.keep", 9)  # fmt: skip
    with started(world, tmp_path / "whole", *SMALL, *more) as run:
        train_flux.train(run)
    again = ("--output.resume", tmp_path / "whole" / "checkpoints" / "round-000001")
    with started(world, tmp_path / "again", *SMALL, *more, *again) as run:
        train_flux.train(run)
        assert run.first_round == 1
    whole, resumed = (log(tmp_path / x) for x in ("whole", "again"))
    assert whole[1:] == resumed
    assert 0 < whole[0]["regions/following"] < whole[0]["regions/consistency"] < 1
    assert 0 <= whole[0]["regions/clamped"] < 1
    assert undocumented(name for line in some(whole) for name in line) == []
    assert all(line["filling/trajectories"] in (0, 2, 4) for line in some(whole))
    for name in some(("current", "old", "optimizer")):
        ours, theirs = (weights(tmp_path / x, name, done=2) for x in ("whole", "again"))
        assert all(torch.equal(ours[k], theirs[k]) for k in some(ours))


def test_boxes_are_the_smallest_around_the_pixels_of_a_cell():
    mask = torch.rand(20, 12, 12, generator=torch.Generator().manual_seed(0)) > 0.9
    for own, found in some(zip(mask, boxed(mask, cell=6), strict=True)):
        expected = torch.zeros_like(own)
        for y, x in ((0, 0), (0, 6), (6, 0), (6, 6)):
            places = own[y : y + 6, x : x + 6].nonzero()
            if len(places):
                (top, left), (bottom, right) = places.amin(0).tolist(), places.amax(0).tolist()
                expected[y + top : y + bottom + 1, x + left : x + right + 1] = True
        assert torch.equal(found, expected)


UNSOUND = [
    (["shapes-nft", "objective:dpo", "--rewards.regions"],
     r"^rewards\.regions: expected an objective that takes advantages of tokens, one of "
     r"\['nft', 'awm', 'flow_awr'\], got dpo"),
    (["shapes-nft", "--rewards.regions", "--rewards.fusion", "rewards"],
     r"^rewards\.fusion: expected advantages where rewards\.regions is on"),
    (["shapes-nft", "--rewards.regions", "--data.fit", "buckets"],
     r"^rewards\.regions: expected data\.fit square, got buckets"),
    (["kontext-nft", "--rewards.regions", "--rewards.judge", "http://a/v1",
      "--rewards.judge-model", "x", "--rewards.consistency", "http://b"],
     r"^rewards\.regions: expected a rewards\.scorer that gives regions"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), UNSOUND)
def test_what_cannot_be_kept_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words)


class Scorer:
    scale = BINARY

    async def score(self, chains, images):
        return {"following": TurnScores(torch.ones(1, 1), torch.ones(1, 1) > 0, {})}


class Giving(Scorer):
    given = None

    async def regions(self, chains, images):
        return self.given


def test_a_scorer_without_regions_or_with_wrong_ones_is_named(monkeypatch):
    monkeypatch.syspath_prepend("tests/flux")
    here = f"{__name__}:Scorer"
    config = Rewards(scorer=here, regions=True)
    with pytest.raises(ConfigError, match=r"with the method async def regions.*Scorer without"):
        check_services(config)
    assert __name__ in sys.modules
    chains, images = (
        [Chain(id="a", image="x.png", instructions=("a",))],
        [[Image.new("RGB", (4, 2))] * 2],
    )
    path = f"{__name__}:Giving"
    check_services(Rewards(scorer=path, regions=True))
    scorer = own_scorer(config, path)
    for given, message in some([
        ([1], r"returned regions: expected a dictionary of tensors, got list"),
        ({"a": 1}, r"returned regions\['a'\]: expected a tensor, got int"),
        ({"a": torch.ones(1, 1, 4, 2)}, r"expected \[B, N, H, W\] = \[1, 1, 2, 4\], got \[1, 1, 4"),
        ({"a": torch.full((1, 1, 2, 4), 2.0)}, r"expected shares in \[0, 1\]"),
    ]):  # fmt: skip
        monkeypatch.setattr(Giving, "given", given)
        with pytest.raises(ScorerError, match=message):
            anyio.run(scorer.regions, chains, images)
    monkeypatch.setattr(Giving, "given", {"a": torch.ones(1, 1, 2, 4, dtype=torch.bool)})
    assert anyio.run(scorer.regions, chains, images)["a"].dtype == torch.float32
