"""Every program with wrong inputs: one line, exit code 2, nothing loaded, nothing written.

Those of evaluation are in ``tests/evaluation/test_wrong_inputs.py``, those of ``mteditflow check``
in ``tests/testing/test_check_command.py``.
"""

import json
import socket

import pytest
import torch
from mteditflow_examples import (
    ablations,
    demo,
    evidence,
    lost_rewards,
    self_distillation,
    train_flux,
)
from mteditflow_examples.shapes import files as shapes_files
from PIL import Image
from safetensors.torch import save_file

from mteditflow.chains.__main__ import app as chains_app
from mteditflow.pipelines import Editor
from mteditflow.planner.__main__ import app as planner
from mteditflow.rewards.__main__ import app as judge
from mteditflow.rewards.consistency.models import DinoV3, GroundingDino
from mteditflow.rewards.server.__main__ import TOKEN_VARIABLE
from mteditflow.rewards.server.__main__ import app as server
from mteditflow.testing.endpoint import ScriptedServer
from tests.flux.worlds import make_world, options
from tests.loops import some
from tests.planner.scripted_model import ScriptedModel, write_pictures
from tests.refusals import refusal

NOBODY = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def load(*_, **__):
        pytest.fail("a model was loaded")

    for kind, name in (
        (Editor, "load"),
        (GroundingDino, "from_pretrained"),
        (DinoV3, "from_pretrained"),
    ):
        monkeypatch.setattr(kind, name, load)
    for name in (TOKEN_VARIABLE, "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A world to train in, pictures to plan for, and files that are something else."""
    root = make_world(tmp_path_factory.mktemp("refusals") / "world")
    (root / "empty").write_text("")
    (root / "binary").write_bytes(bytes(range(256)))
    (root / "folder").mkdir()
    (root / "broken.toml").write_text("objective = ")
    (root / "wrong.toml").write_text('objective = "grpo"\n[training]\nround = 3\n')
    (root / "other_model").mkdir()
    (root / "other_model" / "model_index.json").write_text('{"_class_name": "Nobody"}')
    for name, rank in (("no_lora", None), ("lora_of_4", 4)):
        (root / name).mkdir()
        file = root / name / "pytorch_lora_weights.safetensors"
        if rank is None:
            file.write_bytes(b"no weights")
        else:
            save_file({"transformer.x.lora_A.weight": torch.zeros(rank, 8)}, file)
    write_pictures(root / "pictures", 2)
    (root / "no_pictures").mkdir()
    chain = {"id": "a#0", "image": "a.png", "instructions": ["Add a dog"]}
    (root / "of_others.jsonl").write_text(json.dumps(chain) + "\n")
    (root / "no_chains.jsonl").write_text('{"id": 8}\n')
    (root / "half.jsonl").write_bytes(b"\x89PNG")
    (root / "bad.jsonl").write_text("")
    (root / "bad.refused.jsonl").write_text("{}\n")
    Image.new("RGB", (8, 8)).save(root / "picture.png")
    (root / "empty_token").write_text("\n")
    (root / "odd_token").write_text("two words")
    return root


def refused(program, root, tmp_path, words):
    return refusal(program, words, root=root, scratch=tmp_path)


JUDGED = [
    *("--rewards.scorer", "None", "--rewards.judge-model", "m"),
    *("--rewards.consistency", NOBODY, "--rewards.judge"),
]
# Words after those of a short run in the world, and what the line says.
RUNS = {
    "no such option": (["--training.round", 3], "Unrecognized options: --training.round"),
    "no value": (["--training.rounds"], "--training.rounds: expected a value, got none"),
    "no number": (["--training.rounds", "x"], "--training.rounds: expected a whole number"),
    "no such choice": (["--model.dtype", "int8"], "--model.dtype: expected one of bfloat16"),
    "a switch of old": (
        ["--model.shard"],
        "--model.shard: expected a value, got none",
    ),
    "shards in one process": (["--model.shard", "zero3"], "model.shard: expected none in one proc"),
    "a stray word": (["nft"], "expected no further value, got 'nft'"),
    "out of range": (["--training.rounds", 0], "training.rounds: input should be greater than"),
    "two fields at once": (
        ["--training.rounds", 0, "--data.groups", 0],
        "data.groups: input should be greater",
    ),
    "no chains": (["--data.chains", "ROOT/none.jsonl"], "data.chains: expected a file of chains"),
    "a folder for a file": (
        ["--data.chains", "ROOT/folder"],
        "data.chains: expected a file of chains, got the folder ROOT/folder",
    ),
    "no path": (["--data.chains", ""], "data.chains: expected a file of chains, got the folder ."),
    "a seed without bounds": (["--training.seed", 2**64], "training.seed: expected"),
    "a name that no file can have": (["x" * 5000], "Unrecognized options: xxx"),
    "JSON without end": (
        [*JUDGED, NOBODY, "--rewards.extra-body", "[" * 9999],
        "expected a JSON object",
    ),
    "an empty file": (
        ["--data.chains", "ROOT/empty"],
        "data.chains: ROOT/empty: expected content",
    ),
    "a binary file": (
        ["--data.chains", "ROOT/binary"],
        "data.chains: ROOT/binary: expected UTF-8 text, got a file with NUL bytes",
    ),
    "no held-out chains": (["--data.held-out", "ROOT/none"], "data.held_out: expected a file"),
    "held out and trained on": (["--data.held-out", "ROOT/train.jsonl"], "got 16 chain ids"),
    "longer than any chain": (["--data.turns", 9], "data.turns: expected chains of 9 turns"),
    "more groups than chains": (["--data.groups", 99], "data.groups: expected at most the 16"),
    "no divisor": (["--training.minibatches", 7], "training.minibatches: expected a divisor"),
    "no model": (["--model.path", "ROOT/none"], "model.path: expected a folder with model_index"),
    "a folder without a model": (["--model.path", "ROOT/folder"], "model.path: expected a folder"),
    "a model of no known family": (["--model.path", "ROOT/other_model"], "model.path: ROOT/other"),
    "no such checkpoint": (["--output.resume", "missing"], "output.resume: expected auto, best"),
    "a folder without a checkpoint": (["--output.resume", "ROOT/folder"], "output.resume: ROOT"),
    "best of none": (["--output.resume", "best"], "output.resume: OUT/checkpoints: no checkpoint"),
    "no such tracker": (["--output.trackers", "paper"], "output.trackers: expected names among"),
    "a file for the output": (["--output.folder", "ROOT/empty"], "output.folder: expected a fold"),
    "output in a file": (["--output.folder", "ROOT/empty/x"], "output.folder: expected a folder"),
    "no such scorer": (["--rewards.scorer", "no:Thing"], "rewards.scorer: expected module:name"),
    "a threshold off the scale": (["--rewards.success", 7], "rewards.success: expected a finite"),
    "no URL": ([*JUDGED, "judge"], "expected http"),
    "a URL without /v1": ([*JUDGED, "http://127.0.0.1:9"], "end in /v1"),
    "a dead judge": ([*JUDGED, NOBODY], f"rewards.judge: expected an answer from {NOBODY}, got no"),
    "no JSON": ([*JUDGED, NOBODY, "--rewards.extra-body", "{"], "expected a JSON object"),
}
TRAINER = RUNS | {
    "no such preset": (None, ["nft"], "preset: expected one of"),
    "no such file": (None, ["ROOT/none.toml"], "none.toml: cannot be read"),
    "a broken file": (None, ["ROOT/broken.toml"], "broken.toml: Invalid value"),
    "a file with an unknown field": (None, ["ROOT/wrong.toml"], "training.round: unexpected"),
    "an objective of another kind": (["objective:grpo"], "objective: expected one of ['nft', 'aw"),
    "two objectives": (["objective:awm", "objective:dpo"], "objective: expected one, got"),
    "a field of another objective": (["--objective.clip-low", 1], "--objective.clip-low"),
    "an unknown section": (["--help", "nothing"], "--help: expected a section among"),
}
DISTILLATION = {k: v for k, v in RUNS.items() if k != "no such scorer"} | {
    "no such preset": (None, ["nft"], "preset: expected one of"),
    "an objective": (["objective:nft"], "objective: expected one of ['distillation', 'mt_"),
    "weights of rewards": (["--rewards.weights.following", 2], "rewards.weights: has an effect"),
    "no teacher": (["--teacher.path", "ROOT/none"], "teacher.path: expected a folder with pytorc"),
    "a teacher that is none": (["--teacher.path", "ROOT/no_lora"], "teacher.path: expected a fol"),
    "a teacher of another rank": (
        ["--teacher.path", "ROOT/lora_of_4"],
        "LoRA of rank 16, as model.lora_rank, got [4]",
    ),
}
PROGRAMS = {"train": (train_flux.main, TRAINER), "distill": (self_distillation.main, DISTILLATION)}
OF_RUNS = [(name, case) for name, (_, cases) in PROGRAMS.items() for case in cases]


@pytest.mark.parametrize(("name", "case"), OF_RUNS)
def test_trainers(root, tmp_path, name, case):
    program, cases = PROGRAMS[name]
    *alone, words, message = cases[case]
    given = words if alone else [*options(root, "OUT"), *words]
    said = refused(program, root, tmp_path, given)
    places = message.replace("ROOT", str(root)).replace("OUT", str(tmp_path / "out"))
    assert places in said


DEMO = {
    "no such objective": (["--objective", "ppo"], "'ppo' is not one of"),
    "another case": (["--objective", "NFT"], "'NFT' is not one of"),
    "an empty objective": (["--objective", ""], "'' is not one of"),
    "no objective": (["--objective"], "'--objective' requires an argument"),
    "a negative seed": (["--seed", -1], "Invalid value for '--seed'"),
    "a seed that is no number": (["--seed", "x"], "Invalid value for '--seed'"),
    "half a seed": (["--seed", 0.5], "Invalid value for '--seed'"),
    "an empty seed": (["--seed", ""], "Invalid value for '--seed'"),
    "no seed": (["--seed"], "'--seed' requires an argument"),
    "a file for the output": (["--output", "ROOT/empty"], "output.folder: expected a folder, got"),
    "output in a file": (["--output", "ROOT/empty/x"], "output.folder: expected a folder, got"),
    "output deep in a file": (["--output", "ROOT/picture.png/x/y"], "output.folder: expected a"),
    "no output": (["--output"], "'--output' requires an argument"),
    "no such option": (["--rounds", 3], "No such option: --rounds"),
    "no such short option": (["-s", 3], "No such option: -s"),
    "a stray word": (["nft"], "unexpected extra argument"),
}


@pytest.mark.parametrize("case", DEMO)
def test_demo(root, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    words, message = DEMO[case]
    assert message in refused(demo.app, root, tmp_path, words)


PLAN = ["plan", "ROOT/pictures", "OUT", "--model", "m", "--detector", "tiny", "--endpoint"]
ASKS = [*PLAN, NOBODY]


def instead(place, word):
    return [*ASKS[:place], word, *ASKS[place + 1 :]]


PLANNER = {
    "no folder": (instead(1, "ROOT/none"), "No such file"),
    "a file for the folder": (instead(1, "ROOT/empty"), "Not a directory"),
    "no pictures": (instead(1, "ROOT/no_pictures"), "folder: expected .jpeg, .jpg, .png, .webp"),
    "a folder for the file": (instead(2, "ROOT/folder"), "Is a directory"),
    "a picture for the file": (instead(2, "ROOT/picture.png"), "expected lines of JSON objects"),
    "a file of one half line": (instead(2, "ROOT/half.jsonl"), "expected lines of JSON objects"),
    "a file in a file": (instead(2, "ROOT/empty/x.jsonl"), "ROOT/empty"),
    "chains of others": (instead(2, "ROOT/of_others.jsonl"), "expected chains planned with"),
    "no chains": (instead(2, "ROOT/no_chains.jsonl"), "no_chains.jsonl:1: "),
    "a bad file of refused ones": (instead(2, "ROOT/bad.jsonl"), "bad.refused.jsonl:1: "),
    "too many turns": ([*ASKS, "--turns", 10], "turns: expected at most 9"),
    "no turns": ([*ASKS, "--turns", 0], "turns: expected an integer >= 1, got 0"),
    "a seed that is no number": ([*ASKS, "--seed", "x"], "Invalid value for '--seed'"),
    "an unknown type": ([*ASKS, "--weight", "nicer=1"], "weights: expected one of"),
    "a weight without a number": ([*ASKS, "--weight", "subject_add"], "weight: expected TYPE=NUM"),
    "a negative weight": ([*ASKS, "--weight", "subject_add=-1"], "weights['subject_add']"),
    "a temperature below 0": ([*ASKS, "--temperature", -1], "temperature: expected a finite"),
    "no chains of an image": ([*ASKS, "--chains-per-image", 0], "Invalid value for '--chains-per"),
    "nothing at a time": ([*ASKS, "--concurrency", 0], "Invalid value for '--concurrency'"),
    "no attempt": ([*ASKS, "--attempts", 0], "attempts: expected an integer >= 1, got 0"),
    "no time": ([*ASKS, "--timeout", 0], "timeout: expected a finite number"),
    "a URL without /v1": (
        [*PLAN, "http://127.0.0.1:9"],
        "endpoints: expected URLs that end in /v1",
    ),
    "no URL": ([*PLAN, "localhost"], "expected http"),
    "a dead endpoint": (ASKS, f"endpoint: expected an answer from {NOBODY}, got no connection"),
    "no endpoint": (PLAN[:-1], "Missing option '--endpoint'"),
    "no detector": ([*ASKS, "--detector", "nowhere/at/all"], "detector: expected a folder with"),
    "a folder without one": ([*ASKS, "--detector", "ROOT/folder"], "detector: expected a folder"),
    "no such device": ([*ASKS, "--device", "abacus"], "device: expected a device of torch"),
    "no JSON": ([*ASKS, "--extra-body", "{"], "expected a JSON object"),
    "stats of no file": (["stats", "ROOT/none"], "No such file"),
    "stats of a folder": (["stats", "ROOT/folder"], "ROOT/folder"),
    "stats of a picture": (
        ["stats", "ROOT/picture.png"],
        "expected UTF-8 text, got a file with NUL bytes",
    ),
    "stats, a plot of no kind": (["stats", "ROOT/train.jsonl", "--plot", "OUT.xyz"], "xyz"),
    "no such command": (["draw"], "No such command 'draw'"),
}


@pytest.mark.parametrize("case", PLANNER)
def test_planner(root, tmp_path, case):
    words, message = PLANNER[case]
    assert message.replace("ROOT", str(root)) in refused(planner, root, tmp_path, words)


def test_a_planner_with_a_file_for_its_cache_that_is_none(root, tmp_path):
    with ScriptedServer(ScriptedModel()) as model:
        words = [*PLAN, model.url, "--cache", "ROOT/picture.png"]
        assert "not usable as a cache" in refused(planner, root, tmp_path, words)


SERVE = {
    "other machines without a token": (["--host", "0.0.0.0"], "host: expected the loopback, or a"),
    "no such host": (["--host", "no.such.host", "--token-file", "ROOT/empty"], "token: expected"),
    "a port that is none": (["--port", 70000], "Invalid value for '--port'"),
    "a port that is no number": (["--port", "http"], "Invalid value for '--port'"),
    "no token file": (["--token-file", "ROOT/none"], "Invalid value for '--token-file'"),
    "a folder for it": (["--token-file", "ROOT/folder"], "Invalid value for '--token-file'"),
    "an empty token": (["--token-file", "ROOT/empty_token"], "token: expected one in ROOT/empty_t"),
    "a token of two words": (["--token-file", "ROOT/odd_token"], "token: expected printable ASCII"),
    "a binary token": (["--token-file", "ROOT/binary"], "can't decode"),
    "no detector": (["--detector", "nowhere/at/all"], "detector: expected a folder with config"),
    "no features": (["--features", "ROOT/folder"], "features: expected a folder with config"),
    "no such device": (["--device", "abacus"], "device: expected a device of torch that is here"),
    "a device that is not here": (["--device", "cuda:99"], "device: expected a device of torch"),
    "a threshold above 1": (["--threshold", 2], "Invalid value for '--threshold'"),
    "unknown tokens": (["--tokens", "loose"], "Invalid value for '--tokens'"),
    "no body": (["--max-body", 0], "Invalid value for '--max-body'"),
    "no pixels": (["--max-total-pixels", 0], "Invalid value for '--max-total-pixels'"),
    "no requests": (["--max-requests", 0], "Invalid value for '--max-requests'"),
    "a negative wait": (["--max-wait", -1], "Invalid value for '--max-wait'"),
    "a wait of NaN": (["--max-wait", "nan"], "Invalid value for '--max-wait'"),
    "a grace of NaN": (["--grace", "nan"], "Invalid value for '--grace'"),
    "no such option": (["--workers", 2], "No such option: --workers"),
    "a stray word": (["now"], "unexpected extra argument"),
}


@pytest.mark.parametrize("case", SERVE)
def test_serve(root, tmp_path, case):
    words, message = SERVE[case]
    assert message.replace("ROOT", str(root)) in refused(server, root, tmp_path, words)


def test_serve_where_the_port_is_in_use(root, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refused(server, root, tmp_path, ["--port", port])
    assert f"127.0.0.1:{port}: cannot be listened on: Address already in use" in said


def test_serve_with_an_empty_token_in_the_environment(root, tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "\n")
    assert f"token: expected one in {TOKEN_VARIABLE}, got nothing" in refused(
        server, root, tmp_path, []
    )


CHECK = ["check", NOBODY, "--model", "m"]
JUDGE = {
    "no endpoint": (["check", "--model", "m"], "Missing argument"),
    "no model": (CHECK[:2], "Missing option '--model'"),
    "no URL": (["check", "localhost:8000", *CHECK[2:]], "expected http"),
    "a URL without /v1": (["check", "http://127.0.0.1:9", *CHECK[2:]], "end in /v1"),
    "no images": ([*CHECK, "--images", 0], "Invalid value for '--images'"),
    "images that are no number": ([*CHECK, "--images", "x"], "Invalid value for '--images'"),
    "an unknown format": ([*CHECK, "--answer-format", "xml"], "'xml' is not one of"),
    "no tokens": ([*CHECK, "--answer-tokens", 0], "Invalid value for '--answer-tokens'"),
    "negative tokens": ([*CHECK, "--reasoning-tokens", -1], "Invalid value for '--reasoning"),
    "half JSON": ([*CHECK, "--extra-body", "{"], "expected a JSON object, got '{'"),
    "no object": ([*CHECK, "--extra-body", "[1]"], "expected a JSON object"),
    "NaN": ([*CHECK, "--extra-body", '{"top_p": NaN}'], "extra_body: expected JSON values"),
    "what the client sets": ([*CHECK, "--extra-body", '{"messages": []}'], "got 'messages'"),
    "a template of no JSON": ([*CHECK, "--chat-template-kwargs", "a=1"], "expected a JSON object"),
    "no time": ([*CHECK, "--timeout", 0], "timeout: expected a finite number"),
    "negative time": ([*CHECK, "--timeout", -1], "Invalid value for '--timeout'"),
    "no such option": ([*CHECK, "--turns", 3], "No such option: --turns"),
    "no such command": (["ask"], "No such command 'ask'"),
}


@pytest.mark.parametrize("case", JUDGE)
def test_judge(root, tmp_path, case):
    words, message = JUDGE[case]
    assert message in refused(judge, root, tmp_path, words)


CHAINS = {
    "no such file": (["check", "ROOT/none"], "No such file"),
    "a folder": (["check", "ROOT/folder"], "Is a directory"),
    "an empty file": (["check", "ROOT/empty"], "expected content of one of the formats"),
    "a binary file": (["check", "ROOT/binary"], "expected UTF-8 text, got a file with NUL bytes"),
    "an unknown format": (["check", "ROOT/train.jsonl", "--format", "x"], "expected one of "),
    "no file": (["check"], "Missing argument 'file'"),
    "nothing to convert": (["convert", "ROOT/none", "OUT"], "No such file"),
    "from an unknown format": (
        ["convert", "ROOT/train.jsonl", "OUT", "--from", "x"],
        "expected one of ",
    ),
    "to an unknown format": (["convert", "ROOT/train.jsonl", "OUT", "--to", "x"], "expected one"),
    "into a folder": (["convert", "ROOT/train.jsonl", "ROOT/folder"], "ROOT/folder"),
    "into a folder that is none": (["convert", "ROOT/train.jsonl", "ROOT/empty/x"], "ROOT/empty"),
    "a bad line": (
        ["convert", "ROOT/no_chains.jsonl", "OUT", "--from", "native"],
        "no_chains.jsonl:1: ",
    ),
    "more held out than there are": (
        ["split", "ROOT/train.jsonl", "OUT", "OUT.2", "--count", 16],
        "held_out: expected ",
    ),
    "two names of one file": (
        ["split", "ROOT/train.jsonl", "OUT", "OUT"],
        "expected different files, got",
    ),
    "no such folder": (["split", "ROOT/train.jsonl", "OUT/x", "OUT/y"], "folders that exist"),
    "nothing held out": (["split", "ROOT/train.jsonl", "OUT", "OUT.2", "--count", 0], "'--count'"),
    "no such command": (["draw"], "No such command 'draw'"),
}
WORLD = {
    "no output": ([], "Missing argument 'output'"),
    "a file for the output": (["ROOT/empty"], "output: expected a folder, got the file"),
    "output in a file": (["ROOT/empty/x"], "output: expected a folder, got the file"),
    "output deep in a file": (["ROOT/picture.png/x/y"], "output: expected a folder, got the file"),
    "no such family": (["OUT", "--family", "sdxl"], "'sdxl' is not one of"),
    "an empty family": (["OUT", "--family", ""], "'' is not one of"),
    "a seed that is no number": (["OUT", "--seed", "x"], "Invalid value for '--seed'"),
    "half a seed": (["OUT", "--seed", 0.5], "Invalid value for '--seed'"),
    "no chains": (["OUT", "--train-chains", 0], "Invalid value for '--train-chains'"),
    "chains that are no number": (["OUT", "--train-chains", "x"], "Invalid value for '--train-ch"),
    "no chains held out": (["OUT", "--held-out", 0], "Invalid value for '--held-out'"),
    "fewer than none held out": (["OUT", "--held-out", -1], "Invalid value for '--held-out'"),
    "no turns": (["OUT", "--turns", 0], "Invalid value for '--turns'"),
    "no number of turns": (["OUT", "--turns"], "'--turns' requires an argument"),
    "no such option": (["OUT", "--chains", 3], "No such option: --chains"),
    "a stray word": (["OUT", "kontext"], "unexpected extra argument"),
}
STUDY = {
    "no seed": (["--seeds", ""], "seeds: expected integers separated by commas, got ''"),
    "a seed that is no number": (["--seeds", "0,x"], "seeds: expected integers separated by"),
    "half a seed": (["--seeds", "0.5"], "seeds: expected integers separated by commas"),
    "a negative seed": (["--seeds", "-1"], "seeds: expected an integer >= 0, got -1"),
    "a seed twice": (["--seeds", "1,0,1"], "seeds: expected each once, got '1,0,1'"),
    "a comma at the end": (["--seeds", "1,"], "seeds: expected integers separated by commas"),
    "no value": (["--seeds"], "'--seeds' requires an argument"),
    "a file for the runs": (["--runs", "ROOT/empty"], "runs: expected a folder, got the file"),
    "runs in a file": (["--runs", "ROOT/empty/x"], "runs: expected a folder, got the file"),
    "a file for the pages": (["--docs", "ROOT/empty"], "docs: expected a folder, got the file"),
    "pages in a file": (["--docs", "ROOT/picture.png/x"], "docs: expected a folder, got the file"),
    "no workers": (["--workers", 0], "Invalid value for '--workers'"),
    "workers that are no number": (["--workers", "two"], "Invalid value for '--workers'"),
    "no such option": (["--short"], "No such option: --short"),
    "a stray word": (["findings"], "unexpected extra argument"),
}
ABLATIONS = {
    "no study": ([], "Missing argument 'study'"),
    "no such study": (["losses"], "'losses' is not one of"),
    "an empty study": ([""], "'' is not one of"),
    "two studies": (["findings", "objectives"], "unexpected extra argument"),
    "fewer workers than none": (["findings", "--workers", -1], "Invalid value for '--workers'"),
    "workers that are no number": (["findings", "--workers", "x"], "Invalid value for '--work"),
    "half a worker": (["findings", "--workers", 0.5], "Invalid value for '--workers'"),
    "no number of workers": (["findings", "--workers"], "'--workers' requires an argument"),
    "a file for the runs": (["findings", "--runs", "ROOT/empty"], "runs: expected a folder"),
    "runs in a file": (["findings", "--runs", "ROOT/empty/x"], "runs: expected a folder"),
    "no runs": (["findings", "--runs"], "'--runs' requires an argument"),
    "a file for the pages": (["findings", "--docs", "ROOT/empty"], "docs: expected a folder"),
    "pages in a file": (["findings", "--short", "--docs", "ROOT/empty/x"], "docs: expected a"),
    "no such option": (["findings", "--seeds", 3], "No such option: --seeds"),
    "a value for a flag": (["findings", "--short=yes"], "--short"),
}
ONES = {
    "chains": (chains_app, CHAINS),
    "world": (shapes_files.app, WORLD),
    "evidence": (evidence.app, STUDY),
    "lost rewards": (lost_rewards.app, STUDY),
    "ablations": (ablations.app, ABLATIONS),
}


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, (_, cases) in ONES.items() for case in cases]
)
def test_other_programs(root, tmp_path, monkeypatch, name, case):
    monkeypatch.chdir(tmp_path)
    program, cases = ONES[name]
    words, message = cases[case]
    assert message.replace("ROOT", str(root)) in refused(program, root, tmp_path, words)


def test_each_program_has_fifteen_wrong_inputs():
    own = (TRAINER, DISTILLATION, DEMO, PLANNER, SERVE, JUDGE, *(x for _, x in ONES.values()))
    assert all(len(cases) >= 15 for cases in some(own))
