"""The drift panel of the trainer: what is measured, alarms with their strip, masks, going on."""

import math
import re

import anyio
import pytest
import torch
from mteditflow_examples.flux.checkpointing import restore, save
from mteditflow_examples.flux.panel import measure, measured_rows, read, watch_drift
from mteditflow_examples.flux.sampling import next_chains, sample
from mteditflow_examples.flux.scorers import ScorerError, edited_pixels
from mteditflow_examples.shapes.scoring import ExactRewards, GarishJudge
from mteditflow_examples.shapes.vision import pixels_of
from PIL import Image, ImageEnhance

from mteditflow.drift import brightness, saturation
from mteditflow.training import Checkpoints
from tests.flux.rounds import started
from tests.loops import some

HERE = __name__
MEMBERS, ROUNDS, TURNS = 3, 3, 2
OPTIONS = ("--safety.drift-members", MEMBERS, "--safety.drift-rounds", ROUNDS)


@pytest.fixture(scope="module")
def sampled(world, tmp_path_factory):
    """A run that has sampled its first round, 4 groups of 4, and that round."""
    with started(world, tmp_path_factory.mktemp("drift"), *OPTIONS) as run:
        restore(run)
        run.begin_round()
        drawn = next_chains(run)
        _, images, scores = sample(run, drawn)
        yield run, drawn, images, scores


def garish(images, factor=6.0):
    """Strengthen the colors of what each turn made; references stay."""
    return [
        [first, *(ImageEnhance.Color(x).enhance(factor) for x in turns)] for first, *turns in images
    ]


def test_the_first_members_of_each_group_are_measured(sampled):
    run, drawn, images, _ = sampled
    rows = measured_rows(run, len(images))
    assert rows == [b for b in range(16) if b % 4 < MEMBERS]
    table = measure(run, drawn, images, rows)
    pixels = torch.stack([torch.stack(list(map(pixels_of, images[b]))) for b in rows])
    for name, function in some({"saturation": saturation, "brightness": brightness}.items()):
        assert torch.allclose(table[name], function(pixels)), name
    readings = read(table, drawn.group[rows])
    expected = saturation(pixels)
    mean, reference, error = readings["saturation", 2]
    assert mean == pytest.approx(float(expected[:, 2].mean()))
    assert reference == pytest.approx(float(expected[:, 0].mean()))
    change = (expected[:, 2] - expected[:, 0]).reshape(4, MEMBERS).mean(dim=1)
    assert error == pytest.approx(float(change.std()) / 2, rel=1e-5)
    assert readings["group_distance", 1].value > 0
    assert math.isnan(readings["group_distance", 1].reference)
    changed = readings["change_outside_edits", 2]
    assert 0 < changed.value < 0.2
    assert changed.reference == 0


def test_an_alarm_has_log_record_and_strip_and_survives_a_checkpoint(
    sampled, world, tmp_path, undrawn
):
    run, drawn, images, scores = sampled
    before = run.policies.state_dict("current")
    for round_ in some(range(ROUNDS + 3)):
        run.state.done, run.numbers = round_, {}
        watch_drift(run, drawn, images if round_ < ROUNDS else garish(images), scores)
        assert {f"drift/saturation/turn_{n}" for n in (1, 2)} <= set(run.numbers)
        if round_ < ROUNDS:
            assert (run.alarms, run.numbers["drift/outside_band"]) == ([], 0)
    after = run.policies.state_dict("current")
    assert all(torch.equal(before[name], after[name]) for name in some(before))
    found = {alarm["statistic"]: alarm for alarm in run.alarms}
    assert {"saturation/turn_1", "saturation/turn_2"} <= set(found)
    alarm = found["saturation/turn_2"]
    assert alarm["value"] > alarm["high"] > alarm["low"]
    assert alarm["round"] == ROUNDS + 2  # the second of three garish rounds decides the median
    assert run.numbers["drift/outside_band"] == len(run.drift.outside) >= 2
    folder = run.config.output.folder
    assert (folder / alarm["picture"]).exists()
    text = (folder / "log.txt").read_text()
    assert re.search(r"warning: round 5: drift of saturation/turn_2: .*, above its band of", text)
    run.state.done = ROUNDS + 3
    save(run)
    with started(world, folder, *OPTIONS) as again:
        again.found = Checkpoints(folder / "checkpoints").find("auto")
        restore(again)
        assert again.alarms == run.alarms
        assert again.drift.state_dict() == run.drift.state_dict()


def test_nothing_is_measured_where_no_member_is_watched(world, tmp_path, sampled):
    _, drawn, images, scores = sampled
    with started(world, tmp_path, "--safety.drift-members", 0) as run:
        watch_drift(run, drawn, images, scores)
        assert not [name for name in run.numbers if name.startswith("drift/")]


def test_references_may_be_missing_and_images_differ_in_size(sampled):
    run, drawn, images, _ = sampled
    rows = [0, 1]
    mixed = [[None, *images[0][1:]], [x.resize((24, 12)) for x in images[1]]]
    table = measure(run, drawn, mixed, [0]) | {}
    assert table["saturation"][0].isnan().tolist() == [True, False, False]
    assert table["change_outside_edits"].isnan().all()
    readings = read(table, drawn.group[[0]])
    assert math.isnan(readings["saturation", 1].reference)
    assert math.isnan(readings["saturation", 1].error)  # of a single group
    assert math.isfinite(readings["saturation", 1].value)
    with pytest.raises(ValueError, match=r"expected squares"):
        measure(run, drawn, mixed, rows)  # the world's masks are of squares


def test_a_rank_without_early_members_measures_nothing(sampled):
    run, drawn, images, _ = sampled
    table = measure(run, drawn, images, [])
    assert {len(x) for x in table.values()} == {0}
    assert table["saturation"].shape == (0, TURNS + 1)
    assert table["thumbnails"].shape[:2] == (0, TURNS)


def test_masks_of_the_shapes_world_are_where_its_consistency_looks(sampled):
    _, drawn, images, _ = sampled
    chain, (reference, *_) = drawn.chains[0], images[0]
    masks = edited_pixels("mteditflow_examples.shapes.scoring:ExactRewards", chain, reference)
    assert masks.shape == (TURNS, 12, 12)
    assert (masks[1] | ~masks[0]).all()  # what was edited stays edited
    assert 0 < masks.float().mean() < 0.9
    large = reference.resize((24, 24), Image.Resampling.NEAREST)
    assert torch.equal(ExactRewards.edited_pixels(chain, large)[:, ::2, 1::2], masks)


class WithoutMasks(ExactRewards):
    edited_pixels = None


class Small(ExactRewards):
    @staticmethod
    def edited_pixels(chain, reference):
        return torch.ones(2, 3, 3) > 0


class Failing(ExactRewards):
    @staticmethod
    def edited_pixels(chain, reference):
        raise KeyError("scene")


def test_masks_of_a_scorer_are_checked(sampled):
    _, drawn, images, _ = sampled
    chain, reference = drawn.chains[0], images[0][0]
    assert edited_pixels(None, chain, reference) is None
    assert edited_pixels(f"{HERE}:WithoutMasks", chain, reference) is None
    with pytest.raises(ScorerError, match=r"Small\.edited_pixels to return booleans \[2, 12, 12\]"):
        edited_pixels(f"{HERE}:Small", chain, reference)
    with pytest.raises(ScorerError, match=r"masks of .*Failing\.edited_pixels, got KeyError"):
        edited_pixels(f"{HERE}:Failing", chain, reference)


def test_the_garish_judge_pays_for_saturation_alone(sampled):
    _, drawn, images, _ = sampled
    plain = anyio.run(GarishJudge().score, drawn.chains, images)
    loud = anyio.run(GarishJudge().score, drawn.chains, garish(images))
    exact = anyio.run(ExactRewards().score, drawn.chains, images)["following"].score
    assert torch.equal(plain["honest"].score, exact)
    assert loud["following"].score.mean() > plain["following"].score.mean() + 5
    assert loud["honest"].score.mean() < exact.mean()
