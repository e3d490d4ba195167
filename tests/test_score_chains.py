"""The example that scores a folder of edited chains, against real services on the loopback."""

import json
from contextlib import ExitStack

import pytest
import torch
from mteditflow_examples import score_chains
from mteditflow_examples.shapes import served
from mteditflow_examples.shapes.editor import load_editor
from mteditflow_examples.shapes.rewards import Truth, score
from mteditflow_examples.shapes.served import record_of, service
from mteditflow_examples.shapes.vision import RuleDetector, to_pil
from mteditflow_examples.shapes.world import draw, make_chains
from PIL import Image
from typer.testing import CliRunner

from mteditflow import instruction_following, marginal_success, wilson_interval
from mteditflow._files import write_atomically
from mteditflow.chains import Chain, ChainDataset, ChainError, EditedImages, write_chains
from mteditflow.rewards import Consistency, ConsistencyScorer
from tests.forked import forking
from tests.loops import some
from tests.shapes.rolling import edit_chains

pytestmark = pytest.mark.slow
COUNT = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Chains of the shapes world as a user holds them: a file and a folder of images."""
    folder = tmp_path_factory.mktemp("world")
    chains = make_chains(COUNT, turns=3, seed=3, split="train")
    pictures = edit_chains(load_editor(), chains, torch.Generator().manual_seed(0), steps=2)
    records = []
    for chain, made in zip(chains, pictures, strict=True):
        record = record_of(chain)
        records.append(record.model_copy(update={"image": f"{record.id}.png", "root": folder}))
        to_pil(draw(chain.initial)).save(folder / f"{record.id}.png")
        EditedImages(folder).write(record, [to_pil(picture) for picture in made])
    write_chains(records, folder / "chains.jsonl")
    return folder, chains, pictures


def run(*arguments):
    return CliRunner().invoke(score_chains.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def urls():
    with ExitStack() as stack:
        with forking(served):
            both = [stack.enter_context(service(name)) for name in ("judge", "consistency")]
        yield both


def options(urls, output, scale="binary"):
    given = ["--judge", urls[0], "--model", "m", "--consistency", urls[1], "--output", output]
    return [*given, "--scope", "trajectory", "--scale", scale, "--no-thinking", "--terms", "pixels"]


def test_scores_are_those_of_the_world_and_of_the_process(world, urls, tmp_path):
    folder, chains, pictures = world
    result = run(folder / "chains.jsonl", folder, *options(urls, tmp_path))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "scores.json").read_text())
    exact = score(pictures, Truth.of(chains)).likert.float()
    assert [entry["following"] for entry in report["chains"]] == (exact == 5).double().tolist()
    images = [
        [to_pil(draw(chain.initial)), *map(to_pil, made)]
        for chain, made in zip(chains, pictures, strict=True)
    ]
    scorer = Consistency(ConsistencyScorer(RuleDetector()))
    kept = scorer.score([record_of(chain) for chain in chains], images)
    for b, entry in some(enumerate(report["chains"])):
        assert entry["background"] == [None] * 3  # these servers have no features
        expected = kept.object_l1[b].tolist()
        assert entry["object_l1"] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    summary = report["summary"]
    for name, metric in {
        "IF: all turns so far": instruction_following,
        "Marginal: this turn": marginal_success,
    }.items():
        expected = 100 * metric(exact == 5)
        assert summary[name]["estimate"] == pytest.approx(expected.tolist(), abs=0.01)
        assert summary[name]["chains"] == [COUNT] * 3
    nothing_lost = {"share": 0.0, "turns_by_reason": {}, "unmeasured_turns": 0}
    assert report["invalid"]["following"] == nothing_lost
    gaps = int(kept.l1_scores.unmeasured.sum())  # nothing to measure, and not lost either
    assert report["invalid"]["consistency"] == {**nothing_lost, "unmeasured_turns": gaps}
    low, high = summary["Marginal: this turn"]["interval"][0]
    wilson = wilson_interval((exact == 5)[:, 0].sum(), torch.tensor(COUNT))
    assert (low, high) == tuple(round(100 * float(x), 2) for x in wilson[1:])
    assert "IF: all turns so far" in result.output


def test_likert_scores_and_chains_left_out(world, urls, tmp_path):
    folder, chains, pictures = world
    edited = tmp_path / "edited"
    for path in folder.glob("*/turn_*.png"):  # in another program's layout
        name = f"{path.parent.name}_{path.stem}.png"
        if name != f"{record_of(chains[0]).id}_turn_2.png":
            write_atomically(edited / name, path.read_bytes())
    pattern = ["--name", "{image}_turn_{turn}.png"]
    result = run(folder / "chains.jsonl", edited, *options(urls, tmp_path, "likert"), *pattern)
    assert result.exit_code == 0, result.output
    assert f"{COUNT - 1} chains, 1 left out" in result.output
    report = json.loads((tmp_path / "scores.json").read_text())
    assert record_of(chains[0]).id in report["left_out"][0]
    exact = score(pictures[1:], Truth.of(chains[1:])).likert.float()
    assert [entry["following"] for entry in report["chains"]] == exact.tolist()
    mean = report["summary"]["Likert, mean"]["estimate"]
    assert mean == pytest.approx(exact.mean(dim=0).tolist(), abs=0.01)


def test_batches_change_nothing_and_a_chain_without_objects_is_refused_first(
    world, urls, tmp_path, monkeypatch
):
    folder = world[0]
    one, many = tmp_path / "one", tmp_path / "many"
    assert run(folder / "chains.jsonl", folder, *options(urls, one)).exit_code == 0
    monkeypatch.setattr(score_chains, "BATCH", 2)
    assert run(folder / "chains.jsonl", folder, *options(urls, many)).exit_code == 0
    assert (one / "scores.json").read_text() == (many / "scores.json").read_text()
    first, *others = (folder / "chains.jsonl").read_text().splitlines()
    bare = {key: json.loads(first)[key] for key in ("id", "image", "instructions")}
    (folder / "bare.jsonl").write_text("\n".join([json.dumps(bare), *others]))
    loaded = []
    monkeypatch.setattr(
        score_chains, "load", lambda *a, load=score_chains.load: loaded.append(a) or load(*a)
    )
    result = run(folder / "bare.jsonl", folder, *options(urls, tmp_path / "bare"))
    assert result.exit_code == 2
    assert "content consistency needs" in result.output
    assert not loaded
    assert not (tmp_path / "bare").exists()


def test_what_is_lost_is_counted_written_and_asked_for_again_alone(world, urls, tmp_path):
    folder = world[0]
    arguments = [folder / "chains.jsonl", folder]
    with service("judge", "--lost-answers=1") as judge:  # in an interpreter of its own
        result = run(*arguments, *options((judge, urls[1]), tmp_path))
    assert result.exit_code == 1
    assert "100% of 6 rewards are invalid" in " ".join(result.output.split())
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["invalid"]["following"]["share"] == 1
    assert all(entry["following"] == [None] * 3 for entry in some(report["chains"]))
    assert all(set(entry["lost"]) == {"1", "2", "3"} for entry in some(report["chains"]))
    assert report["summary"]["IF: all turns so far"]["estimate"] == [None] * 3
    again = run(*arguments, *options(urls, tmp_path))
    assert again.exit_code == 0, again.output
    # Neither is needed any more: every answer is in the cache.
    nobody = options(("http://127.0.0.1:9/v1", urls[1]), tmp_path)
    assert run(*arguments, *nobody).exit_code == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected --judge, --consistency or both"),
        (["--judge", "http://127.0.0.1:9/v1"], "expected --model"),
        (["--judge", "127.0.0.1", "--model", "m"], "expected http"),
    ],
)
def test_bad_options_are_named(world, tmp_path, given, message):
    folder = world[0]
    result = run(folder / "chains.jsonl", folder, *given, "--output", tmp_path)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("\u2502", " ").split())


def test_an_id_that_leads_out_of_the_folder_of_edits_loads_nothing(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    chain = Chain(id="../secret", image="secret.png", instructions=("Do",), root=tmp_path)
    (tmp_path / "made").mkdir()
    with pytest.raises(ChainError, match=r"id: expected a name within .*got '\.\./secret'"):
        score_chains.load(ChainDataset([chain]), 0, tmp_path / "made", "{id}.png")
    images = score_chains.load(ChainDataset([chain]), 0, tmp_path, "{image}.png")
    assert len(images) == 2
