"""Chains whose references differ in shape: sampled, trained and evaluated at their own."""

import json

import pytest
import torch
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError, DistillationConfig
from mteditflow_examples.flux.loading import fitting
from mteditflow_examples.flux.sampling import next_chains, sample, velocity_of
from mteditflow_examples.flux.updating import check_first_ratios, update
from PIL import Image

from mteditflow.chains import read_chains, write_chains
from mteditflow.objectives import Buckets
from mteditflow.pipelines import Editor, aspect_buckets, fit_to_bucket
from mteditflow.training import Updater
from tests.flux.family_runs import Brightness
from tests.flux.rounds import started
from tests.flux.worlds import options, run, weights
from tests.loops import some

SIZES = [(30, 15), (13, 12), (17, 31), (15, 12)]  # of the references, in turn
SHAPES = {(16, 8), (12, 12), (8, 16)}  # that they come to, in multiples of 4 pixels
SCORER = f"{Brightness.__module__}:Brightness"
BUCKETS = ("--data.fit", "buckets", "--data.bucket-multiple", 4, "--rewards.scorer", SCORER)


@pytest.fixture(scope="module")
def shaped(world, tmp_path_factory):
    """The world with references of several shapes."""
    folder = tmp_path_factory.mktemp("shaped")
    (folder / "images").mkdir()
    (folder / "model").symlink_to(world / "model")
    for name in ("train", "held_out"):
        chains = read_chains(world / f"{name}.jsonl").chains
        moved = []
        for number, chain in enumerate(chains):
            path = f"images/{name}-{number}.png"
            size = SIZES[number % len(SIZES)]
            with Image.open(world / chain.image) as image:
                image.resize(size).save(folder / path)
            record = json.loads(chain.to_json())
            moved.append(type(chain).from_record({**record, "image": path}, root=str(folder)))
        write_chains(moved, folder / f"{name}.jsonl")
    return folder


def size_of(path):
    with Image.open(path) as image:
        return image.size


def weighted(*more, rounds=2):
    return (*BUCKETS, "--rewards.weights.consistency", 0, "--training.rounds", rounds, *more)


@pytest.mark.parametrize("objective", ["nft", "grpo"])
def test_a_round_is_recorded_in_buckets_and_replays(shaped, tmp_path, objective):
    with started(shaped, tmp_path, *weighted(), objective=objective) as own:
        drawn = next_chains(own)
        samples, images, _ = sample(own, drawn)
        assert {chain[0].size for chain in images} <= SHAPES
        assert isinstance(samples, Buckets)
        for chain in some(images):
            assert len({image.size for image in chain}) == 1
        velocity = velocity_of(own.policies, samples)
        if objective == "grpo":
            check_first_ratios(own, velocity, samples)  # raises
        gradients = []
        for batch in (1, 8):
            own.optimizer.zero_grad()
            updater = Updater(own.optimizer, own.policies.parameters, max_grad_norm=1e9)
            object.__setattr__(own.config.training, "batch", batch)
            before = [x.detach().clone() for x in own.policies.parameters()]
            advantage = torch.linspace(-1, 1, len(samples))[:, None].expand(-1, 2)
            update(own, updater, velocity, samples, advantage, torch.ones(len(samples), 2).bool())
            after = [x.detach().clone() for x in own.policies.parameters()]
            gradients.append([b - a for a, b in zip(before, after, strict=True)])
            with torch.no_grad():
                for x, old in zip(own.policies.parameters(), before, strict=True):
                    x.copy_(old)
            own.optimizer.state.clear()
        for one, other in some(list(zip(*gradients, strict=True))):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_runs_of_several_shapes_end_the_same_when_cut(shaped, tmp_path):
    run(*options(shaped, tmp_path / "whole", *weighted("--output.strips-every", 1)))
    run(*options(shaped, tmp_path / "cut", *weighted(rounds=1)))
    run(*options(shaped, tmp_path / "cut", *weighted()))
    whole, cut = (weights(tmp_path / name, done=2) for name in ("whole", "cut"))
    assert all(torch.equal(x, cut[name]) for name, x in some(whole.items()))
    held_out = tmp_path / "whole" / "evaluations" / "round-000002"
    assert {size_of(path) for path in held_out.rglob("*.png")} == SHAPES
    assert (tmp_path / "whole" / "pictures" / "round-000001-chains.png").exists()
    record = (tmp_path / "whole" / "evaluations" / "round-000002.json").read_text()
    assert r"\"buckets\": 4" in record


def test_buckets_of_one_shape_are_the_square_run(world, tmp_path):
    """Where all references are square the two ways train the same weights."""
    square = ("--rewards.scorer", SCORER, "--rewards.weights.consistency", 0)
    run(*options(world, tmp_path / "square", *square, "--training.rounds", 1))
    run(*options(world, tmp_path / "buckets", *weighted(rounds=1)))
    one, other = (weights(tmp_path / name, done=1) for name in ("square", "buckets"))
    assert all(torch.equal(x, other[name]) for name, x in some(one.items()))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.bucket-multiple", 8], "data.bucket_multiple: has an effect only where data.fit"),
        ([*BUCKETS[:2], "--data.bucket-multiple", 0], "data.bucket_multiple"),
    ],
)
def test_fields_without_an_effect_are_refused(world, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        parse(options(world, tmp_path, *more))


def test_a_multiple_that_leaves_no_shapes_of_the_area_is_refused(world, tmp_path):
    more = ("--data.fit", "buckets", "--data.bucket-multiple", 5)
    config = parse(options(world, tmp_path, *more))
    with pytest.raises(ConfigError, match=r"data\.bucket_multiple: expected at most a third"):
        fitting(config)


def test_distillation_takes_squares(world, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.fit: expected square for distillation"):
        parse(["shapes-nft", "--data.fit", "buckets"], DistillationConfig)


@pytest.mark.parametrize("area", [144, 512 * 512, 1024 * 1024])
def test_buckets_have_the_area_the_multiple_and_both_orientations(area):
    multiple = 4 if area == 144 else 64
    buckets = aspect_buckets(area, multiple)
    assert {size[::-1] for size in buckets} == set(buckets)
    assert all(x % multiple == 0 for size in some(buckets) for x in some(size))
    assert all(max(size) <= 2 * min(size) for size in some(buckets))
    root = round(area**0.5)
    assert (root, root) in buckets
    assert all(abs(w * h - area) <= multiple * max(w, h) / 2 for w, h in some(buckets))
    for size in some(buckets):
        assert fit_to_bucket(Image.new("RGB", size), buckets).size == size


def test_a_half_given_size_is_refused(world):
    for call in some([{"height": None}, {"height": None, "width": 12}, {"width": None}]):
        with pytest.raises(ValueError, match="call: expected height and width as numbers, or both"):
            Editor.load(world / "model", call=call)
