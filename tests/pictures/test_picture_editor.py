import asyncio
import json

import pytest
import torch
from mteditflow_examples.pictures import autoencoder, pretrain
from mteditflow_examples.pictures.autoencoder import as_tensor, training_scenes, wear_of_trips
from mteditflow_examples.pictures.chains import make_chains
from mteditflow_examples.pictures.drawing import SIZE, draw
from mteditflow_examples.pictures.editor import STEPS, build_editor, load_editor
from mteditflow_examples.pictures.files import write_world
from mteditflow_examples.pictures.pretrain import encoded, single_edits, success_by_type
from mteditflow_examples.pictures.scoring import ExactRewards, record_of
from mteditflow_examples.pictures.weights_files import WEIGHTS
from mteditflow_examples.shapes.conditioning import Conditioner
from PIL import Image

from mteditflow.chains import ChainDataset, read_chains
from mteditflow.pipelines import Editor
from tests.loops import some

CALL = {"height": SIZE, "width": SIZE, "max_sequence_length": 10, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def careless():
    return load_editor("careless")


def test_weights_are_small_and_their_cards_name_their_commands():
    files = list(WEIGHTS.glob("*.safetensors"))
    assert {file.stem for file in files} == {"autoencoder", "competent", "careless"}
    assert sum(file.stat().st_size for file in files) < 10e6
    for file in some(files):
        card = json.loads(file.with_suffix(".json").read_text())
        assert card["command"].startswith("python -m mteditflow_examples.pictures.")
        assert {"seconds", "torch", "diffusers", "license", "parameters"} <= set(card)


def test_the_autoencoder_wears_a_picture_trip_by_trip(careless):
    held_out = make_chains(16, turns=1, seed=5, split="held_out")
    wear = wear_of_trips(careless.vae, as_tensor([chain.initial for chain in held_out]))
    values = list(wear.values())
    assert values == sorted(values)
    assert 0.005 < wear["1"] < 0.03
    assert wear["10"] > 1.5 * wear["1"]


def test_the_text_encoder_shows_the_order_of_words():
    pipeline = build_editor()
    texts = ["Paint the red house blue", "Paint the blue house red"]
    first, second = (pipeline.encode_prompt(x, None, max_sequence_length=10)[0] for x in texts)
    assert torch.equal(first, pipeline.encode_prompt(texts[0], None, max_sequence_length=10)[0])
    assert (first[0, 2] - second[0, 4]).norm() > 0.1 * first[0, 2].norm()  # "red" in both


def test_pretraining_calls_the_transformer_as_the_pipeline_does(careless):
    chain = make_chains(1, turns=1, seed=9, split="held_out")[0]
    reference = Image.fromarray(draw(chain.initial))
    calls = []

    def keep(module, args, given, output):
        calls.append((given, output[0]))

    hook = careless.transformer.register_forward_hook(keep, with_kwargs=True)
    careless(
        image=reference,
        prompt=chain.instructions[0],
        max_area=SIZE * SIZE,
        _auto_resize=False,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        **CALL,
    )
    hook.remove()
    assert len(calls) == STEPS
    conditioner = Conditioner(careless, chain.instructions)
    latents = conditioner.encode(torch.from_numpy(draw(chain.initial)).permute(2, 0, 1)[None] / 255)
    for given, output in some(calls):
        x_t, clean = given["hidden_states"].chunk(2, dim=1)
        with torch.no_grad():
            velocity = conditioner.velocity(x_t, given["timestep"], clean, torch.tensor([0]))
        assert torch.equal(velocity, output[:, : velocity.shape[1]])
        assert (clean - latents).abs().max() < 1e-4


def test_most_single_edits_of_the_competent_editor_succeed_and_the_careless_one_is_mixed(careless):
    edits = single_edits(96, seed=77, split="held_out")
    targets = [chain.edits[0].result for chain in edits]
    shares = []
    for pipeline in (load_editor("competent"), careless):
        conditioner = Conditioner(pipeline, [chain.instructions[0] for chain in edits])
        shares.append(success_by_type(conditioner, encoded(conditioner, edits, targets), seed=0))
    assert shares[0]["all"] > 0.75
    assert 0.15 < shares[1]["all"] < 0.65


def test_every_stage_runs_writes_its_weights_and_the_next_goes_on_from_there(tmp_path):
    autoencoder.main(seed=1, steps=2, batch=2, scenes=64, out=tmp_path / "autoencoder.safetensors")
    small = {"seed": 1, "steps": 2, "pairs": 64, "held_out": 32, "folder": tmp_path}
    pretrain.main("competent", rate=1.0, start=None, **small)
    first = load_editor("competent", folder=tmp_path).transformer.state_dict()
    start = tmp_path / "competent.safetensors"
    pretrain.main("competent", rate=0.5, start=start, **small)
    pretrain.main("careless", rate=1.0, start=None, **small)
    competent = load_editor("competent", folder=tmp_path).transformer.state_dict()
    careless = load_editor("careless", folder=tmp_path).transformer.state_dict()
    fresh = build_editor(seed=1).transformer.state_dict()
    assert set(competent) == set(careless) == set(fresh)
    assert any(not torch.equal(competent[name], fresh[name]) for name in fresh)
    assert any(not torch.equal(competent[name], first[name]) for name in fresh)
    assert any(not torch.equal(competent[name], careless[name]) for name in fresh)
    for stage in ("autoencoder", "competent", "careless"):
        card = json.loads((tmp_path / f"{stage}.json").read_text())
        assert "--seed 1 --steps 2" in card["command"]
    with pytest.raises(ValueError, match="name: expected 'competent' or 'careless', got 'bold'"):
        load_editor("bold")


def test_scenes_to_learn_from_are_of_the_training_split():
    scenes = training_scenes(64, seed=0)
    assert len(set(scenes)) == len(scenes) > 50
    assert {scene.split for scene in scenes} == {"train"}


def test_the_world_on_disk_loads_as_any_model_and_chains_do(tmp_path):
    counts = (3, 2, 2)
    lines = write_world(tmp_path, editor="careless", seed=3, counts=counts, turns=2, longest=4)
    assert len(lines) == 4
    editor = Editor.load(tmp_path / "model", call=CALL)
    for name, count, turns in (("train", 3, 2), ("held_out", 2, 4), ("no_change", 2, 4)):
        data = ChainDataset(read_chains(tmp_path / f"{name}.jsonl").chains)
        assert [len(example.chain.instructions) for example in some(data)] == [turns] * count
    references = [example.image for example in data]
    instructions = [example.chain.instructions for example in data]
    noise = [torch.Generator().manual_seed(k) for k in range(2)]
    edited = editor.edit(references, instructions, generators=noise, batch=2)
    images = [[first, *rest] for first, rest in zip(references, edited, strict=True)]
    terms = asyncio.run(ExactRewards().score([e.chain for e in data], images))
    wear = terms["wear"].score
    assert wear.shape == (2, 4)
    assert (wear > 0.003).all()
    made = make_chains(2, turns=4, seed=3, split="held_out")
    held_out = read_chains(tmp_path / "held_out.jsonl").chains
    assert [chain.id for chain in held_out] == [record_of(chain).id for chain in made]
