import json
from pathlib import Path

import jsonschema_rs
import pytest
from hypothesis import given
from pydantic import ValidationError

import mteditflow.chains
from mteditflow.chains import (
    TASK_TYPES,
    Chain,
    ChainDataset,
    ChainError,
    read_chains,
    shared,
    write_chains,
)
from mteditflow.chains.record import first_error
from tests.chains.samples import chains
from tests.loops import some

MINIMAL = {"id": "7", "image": "7.png", "instructions": ["Remove the cat", "Add a dog"]}
SHIPPED = Path(mteditflow.chains.__file__).parent / "chain.schema.json"


def one_by_one(**fields):
    return MINIMAL | fields


def validator():
    return jsonschema_rs.validator_for(json.loads(SHIPPED.read_text(encoding="utf-8")))


def test_the_schema_that_is_shipped_is_that_of_the_model():
    schema = Chain.model_json_schema()
    expected = json.dumps(schema, indent=2) + "\n"
    assert SHIPPED.read_text(encoding="utf-8") == expected, "write it again from the model"
    assert "root" not in schema["properties"]
    assert all(field["description"] for field in some(schema["properties"].values()))
    assert schema["required"] == ["id", "image", "instructions"]
    assert jsonschema_rs.meta.is_valid(schema)


@given(chains())
def test_what_is_written_satisfies_the_schema(chain):
    validator().validate(json.loads(chain.to_json()))


BAD = {
    "no id": {key: x for key, x in MINIMAL.items() if key != "id"},
    "empty id": one_by_one(id=""),
    "blank image": one_by_one(image=" \n"),
    "number as id": one_by_one(id=7),
    "no instruction": one_by_one(instructions=[]),
    "text for a list": one_by_one(instructions="Remove the cat"),
    "blank instruction": one_by_one(instructions=["Remove the cat", " "]),
    "unknown type": one_by_one(task_types=["subject_add", "crop"]),
    "number for true": one_by_one(background_consistency=[1, 0]),
    "word for true": one_by_one(background_consistency=["yes", "no"]),
    "flat objects": one_by_one(all_objects=["cat", "dog"]),
    "no name": one_by_one(unchanged_objects=[["cat"], [None]]),
    "no image of a turn": one_by_one(references=[["last"], []]),
}


@pytest.mark.parametrize("record", BAD.values(), ids=BAD)
def test_model_and_schema_refuse_the_same(record):
    assert not validator().is_valid(record)
    with pytest.raises(ChainError):
        Chain.from_record(record)


def test_errors_are_one_line_with_field_expectation_and_what_came():
    def reason(record):
        with pytest.raises(ChainError) as caught:
            Chain.from_record(record)
        return str(caught.value)

    names = ", ".join(f"'{x}'" for x in TASK_TYPES[:-1]) + f" or '{TASK_TYPES[-1]}'"
    assert {name: reason(record) for name, record in BAD.items()} == {
        "no id": "id: expected this field, got none",
        "empty id": "id: expected text that is not empty, got ''",
        "blank image": r"image: expected text that is not empty, got ' \n'",
        "number as id": "id: expected text, got 7",
        "no instruction": "instructions: expected at least one entry, got []",
        "text for a list": "instructions: expected a list, got 'Remove the cat'",
        "blank instruction": "instructions[1]: expected text that is not empty, got ' '",
        "unknown type": f"task_types[1]: expected {names}, got 'crop'",
        "number for true": "background_consistency[0]: expected true or false, got 1",
        "word for true": "background_consistency[0]: expected true or false, got 'yes'",
        "flat objects": "all_objects[0]: expected a list, got 'cat'",
        "no name": "unchanged_objects[1][0]: expected text, got None",
        "no image of a turn": "references[1]: expected at least one entry, got []",
    }
    ragged = one_by_one(task_types=["subject_add"])
    expected = "task_types: expected one entry for each of the 2 instructions, got 1"
    assert reason(ragged) == expected
    assert reason(one_by_one(root="/etc")) == "root: expected no key of this reserved name"
    assert reason(one_by_one(id="\ud800")).startswith("id: expected valid Unicode text, got ")
    assert len(reason(one_by_one(id=["x" * 10**6]))) < 150


def test_a_validation_error_of_any_model_is_told_in_one_line():
    with pytest.raises(ValidationError) as caught:
        Chain(id="7", image="7.png", instructions=3)
    assert first_error(caught.value) == "instructions: expected a list, got 3"


@pytest.mark.parametrize("name", [x for x in Chain.model_fields if x.endswith(("s", "y"))])
def test_every_list_over_turns_has_n_entries(name):
    entry = {"task_types": "subject_add", "background_consistency": True}.get(name, "x")
    entries = [["last"]] * 3 if name == "references" else [entry] * 3
    entries = [[entry]] * 3 if name.endswith("objects") else entries
    fields = {name: entries} if name != "instructions" else {"task_types": ["subject_add"] * 2}
    fields = {"instructions": entries if name == "instructions" else ["do"] * 2} | fields
    with pytest.raises(ValueError, match=r"expected one entry for each of the \d instructions"):
        Chain(id="1", image="1.png", **fields)


def test_unknown_keys_are_kept_in_order_even_null_and_names_of_methods():
    text = '"zoo": null, "turns": {"b": 1, "a": [null]}, "copy": 1.5, "answer": 123456789012345678'
    line = f'{{"id": "7", "image": "7.png", "instructions": ["x"], {text}}}'
    chain = Chain.from_record(json.loads(line))
    assert chain.to_json() == line
    assert chain.turns == 1


@given(chains())
def test_a_record_is_the_chain(chain):
    assert Chain.from_record(json.loads(chain.to_json())) == chain
    assert Chain.from_record(chain.to_record()) == chain


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, Path("x")])
def test_what_json_cannot_hold_is_not_written(value):
    chain = Chain(**MINIMAL, further=value)
    with pytest.raises(ChainError, match=r"^expected values that JSON can hold: "):
        chain.to_json()


def test_the_root_leads_to_the_image_and_is_not_written():
    chain = Chain(**MINIMAL, root="photos")
    assert chain.image_path == Path("photos/7.png")
    assert "photos" not in chain.to_json()
    assert Chain(**MINIMAL | {"image": "/a/7.png"}, root="photos").image_path == Path("/a/7.png")


def test_chains_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Chain(**MINIMAL).id = "8"


def test_the_first_turns_of_a_chain_are_a_chain():
    chain = Chain(
        id="7",
        image="7.png",
        instructions=("Remove the cat", "Add a dog", "Make it snow"),
        unchanged_objects=(("tree",), ("tree",), ()),
        background_consistency=(True, True, False),
        root="folder",
        note="kept",
    )
    cut = chain.first_turns(2)
    assert cut == Chain(
        id="7",
        image="7.png",
        instructions=("Remove the cat", "Add a dog"),
        unchanged_objects=(("tree",), ("tree",)),
        background_consistency=(True, True),
        root="folder",
        note="kept",
    )
    assert chain.first_turns(3) == chain
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=rf"turns: expected one of 1..3, got {wrong}"):
            chain.first_turns(wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object, got []"),
        ("", "expected JSON, got '' (EOF while parsing a value at line 1 column 0)"),
        ('{"id": 7', "expected JSON, got '{\"id\": 7' (EOF while parsing an object at line 1"),
    ],
)
def test_a_fault_of_the_whole_text_names_no_place(text, message):
    with pytest.raises(ValidationError) as caught:
        Chain.model_validate_json(text)
    assert first_error(caught.value).startswith(message)


# Text to image.

TEXT = {"id": "7", "image": None, "instructions": ["A red cat"]}


def test_a_chain_may_say_that_it_has_no_image_but_not_forget_it():
    chain = Chain.from_record(TEXT)
    assert json.loads(chain.to_json()) == TEXT
    assert validator().is_valid(TEXT)
    assert not chain.image_is_remote
    for name in ("reference", "image_path"):
        with pytest.raises(ChainError, match="chain '7': expected a reference image, got none"):
            getattr(chain, name)
    with pytest.raises(ChainError, match="image: expected this field, got none"):
        Chain.from_record({"id": "7", "instructions": ["A red cat"]})


def test_chains_without_images_are_written_read_loaded_and_split(tmp_path):
    texts = ["A red cat", "A dog", "A red cat"]
    chains = [Chain.from_record(TEXT | {"id": str(k), "instructions": [x]})
              for k, x in enumerate(texts)]  # fmt: skip
    file = tmp_path / "a" / "x.jsonl"
    file.parent.mkdir()
    write_chains(chains, file)
    found = read_chains(file, check_images=True).chains
    assert [chain.to_record() for chain in found] == [chain.to_record() for chain in chains]
    assert ChainDataset(found, transform=len)[0].image is None
    assert shared(found[:1], found[1:]).images == (("0", "2"),)
    with pytest.raises(ChainError, match=r"flow-grpo cannot hold .*expected a reference image"):
        write_chains(chains, tmp_path / "y.jsonl", format="flow-grpo")
