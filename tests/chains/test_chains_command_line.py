"""The commands of chains of edits."""

import json
import os

import pytest
from PIL import Image
from typer.testing import CliRunner

from mteditflow.chains import (
    FORMATS,
    NO_CHANGE,
    Chain,
    Shared,
    no_change_chains,
    read_chains,
    recognize,
    split_chains,
    write_chains,
)
from mteditflow.chains.__main__ import app
from tests.chains.samples import FILES
from tests.loops import some
from tests.processes import ended

GOOD = '{"id": "%s", "image": "%s.png", "instructions": ["Remove the cat"]}\n'


def run(*arguments):
    result = CliRunner().invoke(app, [str(x) for x in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.fixture
def mixed(tmp_path):
    """Two chains, of which one has an image, between broken lines."""
    path = tmp_path / "mixed.jsonl"
    path.write_text(GOOD % (1, 1) + '{"id": "2"}\n' + GOOD % (3, 3) + "{\n", encoding="utf-8")
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    return path


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("told", [True, False])
def test_convert_every_format_to_the_native_one(name, told, tmp_path):
    target = tmp_path / "out.jsonl"
    result = run("convert", FILES[name], target, *["--from", name] * told)
    assert result.exit_code == 0, result.stderr
    converted = read_chains(target, allow_outside=True).chains
    original = read_chains(FILES[name]).chains
    without_root = [chain.model_copy(update={"root": target.parent}) for chain in original]
    assert [x.model_copy(update={"image": ""}) for x in converted] == [
        x.model_copy(update={"image": ""}) for x in without_root
    ]
    written = result.stdout.splitlines()[0]
    assert written == f"{len(original)} chains written to {target} (native), 0 left out"
    assert result.stderr == ""


def test_convert_says_what_the_format_leaves_out_and_rewrites_paths(tmp_path):
    target = tmp_path / "out.csv"
    result = run("convert", FILES["edival"], target, "--to", "edival", "--images", "photos")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1] == f"edival leaves out: {FORMATS['edival'].loses}"
    native = tmp_path / "out.jsonl"
    run("convert", FILES["edival"], native, "--images", tmp_path / "photos")
    assert json.loads(native.read_text(encoding="utf-8").splitlines()[0])["image"] == (
        "photos/4_input_raw.jpg"
    )


def test_convert_stops_at_a_bad_line_and_writes_nothing(mixed, tmp_path):
    target = tmp_path / "out.jsonl"
    result = run("convert", mixed, target)
    assert result.exit_code == 2
    assert result.stderr == f"error: SOURCE: {mixed}:2: image: expected this field, got none\n"
    assert result.stdout == ""
    assert not target.exists()


def test_convert_stops_at_a_chain_that_the_format_cannot_hold(tmp_path):
    target = tmp_path / "out.jsonl"
    result = run("convert", FILES["native"], target, "--to", "flow-grpo")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: flow-grpo cannot hold chain '7': expected a chain of one turn, got 2 turns\n"
    )
    assert not target.exists()


def test_lenient_leaves_out_lists_and_counts(mixed, tmp_path):
    target = tmp_path / "out.jsonl"
    result = run("convert", mixed, target, "--lenient")
    assert result.exit_code == 0
    assert result.stdout == f"2 chains written to {target} (native), 2 left out\n"
    lines = result.stderr.splitlines()
    assert lines[0] == f"{mixed}:2: image: expected this field, got none"
    assert lines[1].startswith(f"{mixed}:4: expected one JSON object, got '{{'")
    refusing = run("convert", FILES["native"], target, "--to", "flow-grpo", "--lenient")
    assert refusing.stderr == "chain '7': expected a chain of one turn, got 2 turns\n"
    assert refusing.stdout.splitlines() == [
        f"1 chains written to {target} (flow-grpo), 1 left out",
        f"images of 1 chains lie outside {tmp_path}: to read them, give --allow-outside",
    ]


def test_lenient_keeps_the_old_file_where_nothing_is_left(mixed, tmp_path):
    (target := tmp_path / "out.jsonl").write_text("old")
    result = run("convert", mixed, target, "--to", "magicbrush", "--lenient")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[0].startswith(f"{mixed}:2: image")
    assert result.stderr.endswith(
        f"error: {mixed}: expected chains that magicbrush can hold, got none; nothing is written\n"
    )
    assert target.read_text() == "old"


def test_control_characters_of_a_name_are_not_printed(mixed, tmp_path):
    result = run("convert", mixed, tmp_path / "a\n\x1b[31m.jsonl", "--lenient")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    assert "\\n\\x1b[31m.jsonl (native)" in result.stdout


def test_a_file_is_not_converted_into_itself(mixed, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(mixed)
    old = mixed.read_bytes()
    for target in some([mixed, tmp_path / "link.jsonl"]):
        result = run("convert", mixed, target, "--lenient")
        assert result.exit_code == 2
        assert result.stderr.startswith("error: source, target: expected different files, got ")
    assert mixed.read_bytes() == old


def test_a_pipe_is_no_file_of_chains(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for words in some([["check"], ["check", "--format", "native"], ["convert"]]):
        result = run(*words, tmp_path / "pipe", *[tmp_path / "out"] * (words[0] == "convert"))
        assert result.exit_code == 2
        assert "expected a file, got a device or a pipe" in result.stderr


def test_check(mixed, tmp_path):
    result = run("check", mixed)
    assert result.exit_code == 1
    assert result.stdout == f"{mixed} (native): 1 chains (1 of 1 turns), 3 bad\n"
    assert f"{mixed}:3: image: expected a file, got {str(tmp_path / '3.png')!r}\n" in result.stderr
    result = run("check", mixed, "--no-check-images")
    assert result.stdout == f"{mixed} (native): 2 chains (2 of 1 turns), 2 bad\n"
    good = run("check", FILES["edival"], "--no-check-images", "--format", "edival")
    assert good.exit_code == 0
    expected = f"{FILES['edival']} (edival): 2 chains (1 of 1 turns, 1 of 3 turns), 0 bad\n"
    assert (good.stdout, good.stderr) == (expected, "")


def test_many_bad_lines_are_cut_short(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(GOOD % (1, 1) + "{}\n" * 25, encoding="utf-8")
    result = run("check", path, "--no-check-images")
    assert len(result.stderr.splitlines()) == 21
    assert result.stderr.endswith("... and 5 more\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["check", "none.jsonl"],
            "error: FILE: [Errno 2] No such file or directory: 'none.jsonl'\n",
        ),
        (["check", "."], "error: FILE: [Errno 21] Is a directory: '.'\n"),
        (["check", __file__], "expected content of one of the formats native, edival"),
        (["check", FILES["native"], "--format", "csv"], "error: format: expected one of ['native'"),
        (["convert", FILES["native"], "x", "--to", "csv"], "error: format: expected one of ['na"),
        (["convert", "none.jsonl", "x"], "error: SOURCE: [Errno 2] No such file or directory"),
        (["convert", FILES["native"], "no/x"], "error: [Errno 2] No such file or directory"),
    ],
)
def test_errors_are_one_line_on_stderr(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_images_outside_of_the_folder_need_an_option_of_every_command(tmp_path):
    (tmp_path / "lists").mkdir()
    source = tmp_path / "lists" / "x.jsonl"
    source.write_text(GOOD % (1, "../1") + GOOD % (2, "../1"), encoding="utf-8")
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    sides = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for command, code in (
        (["check", source], 1),
        (["convert", source, sides[0]], 2),
        (["split", source, *sides, "--replace", "--by", "chain", "--count", 1], 2),
    ):
        refused = run(*command)
        assert refused.exit_code == code
        assert "--allow-outside (allow_outside=True) accepts it" in refused.stderr
        assert run(*command, "--allow-outside").exit_code == 0
    assert ids(sides[0]) + ids(sides[1]) in (["1", "2"], ["2", "1"])


def test_convert_says_that_images_lie_outside_of_the_new_folder(tmp_path):
    source = tmp_path / "x.jsonl"
    source.write_text(GOOD % (1, 1), encoding="utf-8")
    (tmp_path / "lists").mkdir()
    told = run("convert", source, tmp_path / "lists" / "y.jsonl").stdout.splitlines()[-1]
    where = tmp_path / "lists"
    assert told == f"images of 1 chains lie outside {where}: to read them, give --allow-outside"
    assert "outside" not in run("convert", source, tmp_path / "y.jsonl").stdout


SPLIT = ["split", FILES["native"], "a.jsonl", "b.jsonl"]


@pytest.fixture
def pictured(tmp_path):
    """Six chains of three pictures; one of them stands under two names."""
    lines = []
    for i in range(6):
        Image.new("RGB", (2, 2), ("red", "green", "blue")[i // 2]).save(tmp_path / f"{i}.png")
        image = i if i in (0, 1) else i // 2 * 2
        record = {"id": str(i), "image": f"{image}.png", "instructions": ["Remove the cat"]}
        lines.append(json.dumps(record))
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def ids(path):
    return [chain.id for chain in read_chains(path).chains]


def parted(source, *options, suffix=".jsonl"):
    """Ids of both sides."""
    sides = [source.with_name(f"{name}{suffix}") for name in ("train", "held_out")]
    result = run("split", source, *sides, "--replace", *options)
    assert result.exit_code == 0, result.stderr
    return [ids(side) for side in sides]


@pytest.mark.parametrize("seed", range(5))
def test_a_split_by_image_shares_no_picture_under_any_name(pictured, seed):
    train, held_out = parted(pictured, "--count", 1, "--seed", seed)
    assert sorted(train + held_out) == list("012345")
    assert held_out in (["0", "1"], ["2", "3"], ["4", "5"])
    assert [train, held_out] == parted(pictured, "--count", 1, "--seed", seed)
    lines = pictured.read_text().splitlines()
    pictured.write_text("\n".join(reversed(lines)))  # the order of the file does not matter
    assert sorted(parted(pictured, "--count", 1, "--seed", seed)[1]) == held_out


def test_seeds_hold_out_different_pictures_and_more_chains_keep_those(pictured):
    found = {tuple(parted(pictured, "--count", 2, "--seed", seed)[1]) for seed in range(9)}
    assert len(found) == 3
    few, many = (set(parted(pictured, "--count", n, "--seed", 4)[1]) for n in (2, 3))
    assert few < many
    assert len(many) == 4


def test_a_split_by_chain_holds_out_as_many_as_asked_for(pictured):
    assert [len(side) for side in parted(pictured, "--count", 3, "--by", "chain")] == [3, 3]


def test_a_csv_is_split_by_chain_not_by_line_and_stays_a_csv(tmp_path):
    chains = []
    for i in range(4):
        Image.new("RGB", (2, 2), (60 * i, 0, 0)).save(tmp_path / f"{i}_input_raw.jpg", "PNG")
        names = {"unchanged_objects": (("a, b",),) * 2, "all_objects": (('c"d',),) * 2}
        chain = Chain(
            id=str(i), image=f"{i}_input_raw.jpg", instructions=("Add a, b\nor c", "Do it"),
            formatted_instructions=("x", "y"), task_types=("subject_add", "color_alter"),
            background_consistency=(True, False), available_objects=(("a",),) * 2, root=tmp_path,
            **names,
        )  # fmt: skip
        chains.append(chain)
    write_chains(chains, tmp_path / "all.csv", format="edival")
    train, held_out = parted(tmp_path / "all.csv", "--count", 1, suffix=".csv")
    assert (len(train), len(held_out)) == (3, 1)
    kept = [
        *read_chains(tmp_path / "train.csv").chains,
        *read_chains(tmp_path / "held_out.csv").chains,
    ]
    assert sorted(kept, key=lambda x: x.id) == list(read_chains(tmp_path / "all.csv").chains)
    assert recognize(tmp_path / "held_out.csv").name == "edival"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_split_into_its_own(name, tmp_path):
    source = tmp_path / FILES[name].name
    source.write_bytes(FILES[name].read_bytes())
    before = read_chains(source).chains
    if len(before) < 2:
        pytest.skip("one chain")
    sides = parted(source, "--by", "chain", "--count", 1, suffix=source.suffix)
    assert sorted(joined for side in sides for joined in side) == sorted(x.id for x in before)
    assert recognize(source.with_name(f"train{source.suffix}")).name == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split", "none.jsonl", "a", "b"], "error: SOURCE: [Errno 2] No such file"),
        ([*SPLIT, "--by", "line"], "Invalid value for '--by'"),
        ([*SPLIT, "--count", "0"], "Invalid value for '--count'"),
        ([*SPLIT, "--seed", "x"], "Invalid value for '--seed'"),
        ([*SPLIT, "--by", "chain", "--count", "99"], "held_out: expected fewer chains"),
        (SPLIT, "image: expected a file"),
        (
            ["split", FILES["native"], "a.jsonl", "a.jsonl"],
            "expected different files, got a.jsonl",
        ),
        (["split", FILES["native"], "no/a", "b"], "expected folders that exist, got no"),
        (["split", FILES["native"]], "Missing argument"),
        (["split", FILES["edival"], "a.jsonl", "b.csv"], "expected names of the kind of edival"),
        (["split", FILES["native"], "a.jsonl", "b.csv"], "expected names of the kind of native"),
    ],
)
def test_a_bad_split_is_one_line_and_writes_nothing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_function_behind_it_names_its_argument():
    with pytest.raises(ValueError, match=r"^held_out: expected"):
        split_chains([], held_out=0)
    one = Chain(id="1", image="https://a.example/1.png", instructions=("Add a dog",))
    for by in some(["image", "chain"]):
        with pytest.raises(ValueError, match=f"of 1 with 1 different {by}s"):
            split_chains([one], held_out=1, by=by)


def test_what_is_shared_is_shown_up_to_three():
    assert str(Shared(("a", "b", "c"), ())) == "3 chain ids (a, b, c)"
    assert str(Shared(("a", "b", "c", "d"), ())) == "4 chain ids (a, b, c, ...)"


def test_a_split_that_fails_half_way_leaves_both_files_and_names_one(pictured, monkeypatch):
    """The disk is full at the second file; the first is the old one, too."""
    parted(pictured, "--count", 1)
    sides = [pictured.with_name(f"{x}.jsonl") for x in ("train", "held_out")]
    old = [side.read_bytes() for side in sides]
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = run("split", pictured, *sides, "--replace", "--count", 4, "--seed", 1)
    assert (result.exit_code, len(calls)) == (1, 2)
    assert result.stderr == f"error: [Errno 28] No space left on device: '{sides[1]}'\n"
    assert [side.read_bytes() for side in sides] == old
    assert not list(pictured.parent.glob(".*"))


def test_a_split_does_not_replace_files_in_silence(pictured):
    parted(pictured, "--count", 1)
    sides = [pictured.with_name(f"{x}.jsonl") for x in ("train", "held_out")]
    old = [side.read_bytes() for side in sides]
    result = run("split", pictured, *sides, "--count", 4, "--seed", 1)
    assert result.exit_code == 2
    assert f"expected new files, got {sides[0]} and {sides[1]}; --replace" in result.stderr
    assert [side.read_bytes() for side in sides] == old
    folder = pictured.with_name("folder")
    folder.mkdir()
    result = run("split", pictured, sides[0], folder, "--replace", "--count", 1)
    assert result.stderr == f"error: [Errno 21] Is a directory: '{folder}'\n"
    assert sides[0].read_bytes() == old[0]


def test_no_change_makes_a_chain_of_each_image_of_a_folder(tmp_path):
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "deep/c.png"):
        Image.new("RGB", (2, 2)).save(images / name)
    target = tmp_path / "no_change.jsonl"
    result = run("no-change", images, target, "--turns", 6)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"3 chains of 6 turns written to {target} (native)\n"
    chains = read_chains(target, check_images=True).chains
    assert [chain.id for chain in chains] == ["a.jpg", "b.png", "deep/c.png"]
    assert [chain.image for chain in chains] == [f"images/{chain.id}" for chain in chains]
    assert {chain.task_types for chain in some(chains)} == {(NO_CHANGE,) * 6}
    words = chains[0].instructions
    assert (len(set(words)), words[:2]) == (4, words[4:])  # four wordings by turns
    result = run("no-change", images, tmp_path / "x" / "y.jsonl", "--instruction", "Keep it")
    assert result.exit_code == 2  # no such folder
    (tmp_path / "x").mkdir()
    result = run("no-change", images, tmp_path / "x" / "y.jsonl", "--instruction", "Keep it")
    assert "--allow-outside" in result.stdout
    reading = read_chains(tmp_path / "x" / "y.jsonl", allow_outside=True, check_images=True)
    assert reading.chains[0].instructions == ("Keep it",) * 20


def test_no_change_refuses_what_is_no_image_and_blank_words(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    result = run("no-change", tmp_path, tmp_path / "out.jsonl")
    assert result.exit_code == 2
    assert "images: expected a readable image, got" in result.stderr
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    result = run("no-change", tmp_path, tmp_path / "out.jsonl", "--instruction", " ")
    assert (result.exit_code, result.stderr) == (
        2, "error: instruction: expected text that is not empty, got ' '\n"
    )  # fmt: skip
    assert "expected .jpeg, .jpg, .png, .webp files" in run(
        "no-change", FILES["native"].parent, tmp_path / "out.jsonl"
    ).stderr.replace("\n", " ")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(ValueError, match="instructions: expected at least one"):
        no_change_chains(["a.png"], turns=2, instructions=())


def test_formats_are_listed():
    listed = run("formats").stdout
    assert all(name in listed for name in some(FORMATS))


def test_as_a_module(mixed, tmp_path):
    shown = ended(["-m", "mteditflow.chains", "check", mixed], tmp_path)
    assert shown.code == 1
    assert "Traceback" not in shown.err
    assert shown.out == f"{mixed} (native): 1 chains (1 of 1 turns), 3 bad\n"


def test_markup_in_data_is_printed_as_it_is(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(GOOD % ("[red]a[/red]", "[/]") * 2, encoding="utf-8")
    assert "got '[red]a[/red]' again" in run("check", path, "--no-check-images").stderr


def test_convert_back_and_forth_by_files_alone(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.jsonl"
    chains = read_chains(FILES["edival"]).chains
    write_chains(chains, first, format="edival")
    assert run("convert", first, second).exit_code == 0
    assert run("convert", second, tmp_path / "c.csv", "--to", "edival").exit_code == 0
    assert (tmp_path / "c.csv").read_bytes() == first.read_bytes()
