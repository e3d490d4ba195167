"""Pre-training, as short as it goes: both families, and edits without their instruction."""

import json

import pytest
import torch
from mteditflow_examples.shapes.editor import Family, load_editor
from mteditflow_examples.shapes.pretrain import BUILD, main, without

from tests.loops import some


@pytest.mark.parametrize("family", Family)
def test_pretraining_runs_and_its_weights_load(family, tmp_path):
    out = tmp_path / "tiny.safetensors"
    main(
        family,
        seed=5,
        steps=3,
        horizon=5,
        careless_steps=2,
        corruption=0.5,
        careless_rate=0.4,
        batch=4,
        chains=4,
        unprompted=0.5,
        start=None,
        out=out,
    )
    build, sizes = BUILD[family]
    trained = load_editor(out).transformer.state_dict()
    fresh = build(seed=5, **sizes).transformer.state_dict()
    assert all(weight.isfinite().all() for weight in some(trained.values()))
    assert any(not torch.equal(trained[name], fresh[name]) for name in fresh)
    card = json.loads(out.with_suffix(".json").read_text())
    assert (card["family"], card["build"]) == (family.value, {"seed": 5} | sizes)
    assert f"--family {family.value} --seed 5 " in card["command"]


def test_a_share_of_edits_goes_without_instruction():
    texts = [f"Add {n}" for n in range(1000)]
    given = without(texts, 0.1, seed=0)
    assert 70 < given.count("") < 130
    assert all(new in ("", old) for new, old in some(zip(given, texts, strict=True)))
    assert given == without(texts, 0.1, seed=0) != without(texts, 0.1, seed=1)
    assert without(texts, 0.0, seed=0) == texts
