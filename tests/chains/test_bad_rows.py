"""A bad row or entry costs its own chain alone, and is counted; real files are read whole."""

import json
from pathlib import Path
from random import Random

import pytest

from mteditflow.chains import ChainError, read_chains
from mteditflow.chains.formats.edival import COLUMNS
from tests.loops import some

COUNT, TURNS, BAD = 30, 3, 14  # images of a file, rows of each, and the one whose row is bad


def read(folder, content, **options):
    path = folder / "file"
    path.write_bytes(content)
    return read_chains(path, strict=False, **options)


# EdiVal's CSV


def csv_lines(images=range(COUNT), turns=TURNS):
    """A header, then the rows of each image in order; row 1 + TURNS n + t is of turn t."""
    lines = [",".join(COLUMNS).encode() + b"\n"]
    for index in images:
        for turn in range(1, turns + 1):
            words = ("color_alter", 'Paint it \u00e9cru, "now"', "Paint [it]")
            types, texts, forms = ([word] * turn for word in words)
            cells = [index, turn, types, texts, forms, True, ["a"], ["a", "b"], ["a", "b"]]
            quoted = [str(x).replace('"', '""') for x in cells]
            lines.append((",".join(f'"{x}"' if "," in x else x for x in quoted) + "\n").encode())
    return lines


def row_of(turn):
    return 1 + TURNS * BAD + turn - 1


SPOILS = {
    "Latin-1": lambda row: row.replace("\u00e9".encode(), b"\xe9"),
    "huge cell": lambda row: row.replace(b"Paint", b"x" * 131_073, 1),
    "no closing quote": lambda row: row.rstrip()[:-1] + b"\n",
    "no opening quote": lambda row: row.replace(b'"', b"", 1),
    "quote within a cell": lambda row: row.replace(b"a', 'b", b"a\"x', 'b", 1),
    "cell too few": lambda row: row.replace(b"True,", b"", 1),
    "cell too many": lambda row: row.replace(b"True,", b"True,True,", 1),
    "NUL": lambda row: row.replace(b"True", b"Tr\0e"),
    "half of it": lambda row: row[: len(row) // 2] + b"\n",
    "no turn": lambda row: row.replace(b",True", b",maybe"),
    "garbage": lambda row: b"\xff\xfe garbage\n",
}


@pytest.mark.parametrize("turn", [1, 2, 3])
@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_bad_row_costs_its_own_image(spoil, turn, tmp_path):
    lines = csv_lines()
    lines[row_of(turn)] = spoilt = spoil(lines[row_of(turn)])
    assert spoilt not in csv_lines()
    reading = read(tmp_path, b"".join(lines))
    others = [str(n) for n in range(COUNT) if n != BAD]
    assert [chain.id for chain in reading.chains] == others
    assert {chain.turns for chain in reading.chains} == {TURNS}  # none is cut
    (skipped,) = reading.skipped
    assert skipped.line == row_of(turn) + 1
    assert skipped.reason.isprintable()
    with pytest.raises(ChainError, match=f":{row_of(turn) + 1}: "):
        read_chains(tmp_path / "file")


def test_a_quote_that_is_never_closed_is_told(tmp_path):
    for after in some([b"", b"x\n" * 100]):
        reading = read(tmp_path, b"".join(csv_lines()) + b'9,1,"[\n' + after)
        assert reading.skipped[0].reason.endswith("(unexpected end of data)")


def test_every_bad_row_costs_its_own_image_once(tmp_path):
    lines = csv_lines()
    for number, spoil in zip((2, 3, 30, 59, 60, 88), SPOILS.values(), strict=False):
        lines[number] = spoil(lines[number])
    reading = read(tmp_path, b"".join(lines))
    lost = {(number - 1) // TURNS for number in (2, 3, 30, 59, 60, 88)}
    assert [int(chain.id) for chain in reading.chains] == sorted({*range(COUNT)} - lost)
    assert [skipped.line for skipped in reading.skipped] == [3, 31, 60, 89]
    assert len(reading.chains) + len(reading.skipped) == COUNT


def test_bad_lines_of_no_image_count_once_in_a_row(tmp_path):
    lines = csv_lines()
    lines[1 + TURNS * 5 : 1 + TURNS * 5] = [b"more, or less\n", b"\xff\n", b"\n", b"1\n"]
    lines += [b"the end\n"]
    reading = read(tmp_path, b"".join(lines))
    assert len(reading.chains) == COUNT
    assert [skipped.line for skipped in reading.skipped] == [17, 96]


def test_cells_with_line_breaks_beside_a_bad_row(tmp_path):
    lines = csv_lines()
    broken = b"\"[\n\n'color_alter'\n]\""
    lines[1] = lines[1].replace(b"['color_alter']", broken)
    lines[4] = lines[4].rstrip()[:-1] + b"\n"
    lines[7] = lines[7].replace(b"['color_alter']", broken)
    reading = read(tmp_path, b"".join(lines))
    assert [chain.id for chain in reading.chains] == [str(n) for n in range(COUNT) if n != 1]
    assert [skipped.line for skipped in reading.skipped] == [8]  # three lines more above it


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_an_image_that_lacks_a_row_is_not_passed_as_whole(turn, tmp_path):
    lines = csv_lines()
    del lines[row_of(turn)]
    reading = read(tmp_path, b"".join(lines))
    assert [chain.id for chain in reading.chains] == [str(n) for n in range(COUNT) if n != BAD]
    (skipped,) = reading.skipped
    assert skipped.reason.startswith("turns: expected rows of turns 1")


@pytest.mark.parametrize("rows", [1, 2])
def test_a_file_that_is_cut_within_the_last_image(rows, tmp_path):
    reading = read(tmp_path, b"".join(csv_lines()[: 1 + TURNS * 20 + rows]))
    assert [chain.id for chain in reading.chains] == [str(n) for n in range(20)]
    (skipped,) = reading.skipped
    expected = "turns: expected rows of turns 1..3, as of the other images, got"
    assert skipped.reason == f"{expected} 1..{rows}: the file is cut"


def test_images_of_different_numbers_of_turns_are_whole(tmp_path):
    lines = csv_lines(range(COUNT)) + csv_lines(range(COUNT, COUNT + 3), turns=1)[1:]
    reading = read(tmp_path, b"".join(lines))
    assert len(reading.chains) == COUNT + 3
    assert not reading.skipped


# JSON documents


def entry(number):
    return {"id": f"{number}.png", "prompt": f'Add "{number}", \u00e9cru', "edit_type": "add"}


def records(count=COUNT):
    return [
        {"id": str(n), "image": f"{n}.png", "instructions": ["Add a dog"], "more": [{"a": n}]}
        for n in range(count)
    ]


DOCUMENTS = {
    "object": {str(n): entry(n) for n in range(COUNT)},
    "lists": {
        str(n): [{"input": "a", "mask": "b", "output": "c", "instruction": f"Add {n}"}]
        for n in range(COUNT)
    },
    "array": records(),
}
FAULTS = {  # texts around the number of the entry, and what is put in their place
    "comma between entries": (b"}, ", b"} "),
    "comma within": (b'", "', b'" "'),
    "colon": (b'": "', b'" "'),
    "closing quote": (b'", "', b', "'),
    "opening quote": (b'"', b""),
    "bracket": (b"{", b""),
    "not JSON": (b'": "', b'": nil, "x": "'),
    "byte": (b'": "', b'": "\xe9'),
}


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "lines"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_broken_entry_costs_no_other(kind, fault, indent, tmp_path):
    content = json.dumps(DOCUMENTS[kind], ensure_ascii=False).encode()
    part = json.dumps(
        DOCUMENTS[kind][str(BAD)] if kind != "array" else DOCUMENTS[kind][BAD], ensure_ascii=False
    ).encode()
    start = content.index(part)
    before, after = content[:start], content[start:]
    if kind == "lists" and fault == FAULTS["comma between entries"]:
        fault = (b"}], ", b"}] ")
    assert fault[0] in after
    content = before + after.replace(*fault, 1)
    if indent is not None:
        content = content.replace(b"}, ", b"},\n ").replace(b'", "', b'",\n  "')
    reading = read(tmp_path, content)
    assert len(reading.chains) + len(reading.skipped) == COUNT
    assert len(reading.skipped) == 1
    lost = {str(BAD), str(BAD + 1)} - {chain.id for chain in reading.chains}
    assert len(lost) == 1
    assert reading.skipped[0].reason.isprintable()
    assert len(reading.skipped[0].reason) < 400
    told = reading.skipped[0].reason == "expected UTF-8 text, got byte 0xe9"
    assert told is (fault == FAULTS["byte"])


def test_an_entry_with_its_keys_in_another_order_is_found_behind_a_broken_one(tmp_path):
    whole = {str(n): entry(n) for n in range(COUNT)}
    whole["15"] = dict(reversed(entry(15).items()))
    content = json.dumps(whole).replace('"14.png",', '"14.png"')
    reading = read(tmp_path, content.encode())
    assert [chain.id for chain in reading.chains] == [str(n) for n in range(COUNT) if n != 14]
    assert len(reading.skipped) == 1


def test_broken_entries_in_a_row_are_counted_one_by_one(tmp_path):
    content = json.dumps(DOCUMENTS["object"], indent=1)
    for number in (5, 6, 7, 20):
        content = content.replace(f'"{number}.png",', f'"{number}.png"')
    reading = read(tmp_path, content.encode())
    assert len(reading.chains) == COUNT - 4
    assert len(reading.skipped) == 4


def test_a_document_that_is_cut_keeps_what_is_whole(tmp_path):
    content = json.dumps(DOCUMENTS["array"]).encode()
    reading = read(tmp_path, content[: content.index(b'"14.png"')])
    assert [chain.id for chain in reading.chains] == [str(n) for n in range(14)]
    assert len(reading.skipped) == 1


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_what_follows_a_closing_bracket_too_many_is_read(kind, tmp_path):
    content = json.dumps(DOCUMENTS[kind])
    parts = content.split("}], " if kind == "lists" else "}, ")
    joint = "}]" if kind == "lists" else "}"
    head, tail = (f"{joint}, ".join(x) for x in (parts[:15], parts[15:]))
    end = "]" if kind == "array" else "}"
    reading = read(tmp_path, f"{head}{joint}{end}, {tail}".encode())
    assert len(reading.chains) == COUNT
    (skipped,) = reading.skipped
    assert skipped.reason.startswith("expected the end, got ', ")
    reading = read(tmp_path, (content + content).encode())
    assert len(reading.chains) == COUNT
    assert len(reading.skipped) == 1 + COUNT  # the end is none; then every id again


def test_a_document_without_its_first_bracket_is_read_by_its_format(tmp_path):
    content = "// entries\n" + json.dumps(DOCUMENTS["object"])
    reading = read(tmp_path, content.encode(), format="imgedit")
    assert len(reading.chains) == COUNT
    (skipped,) = reading.skipped
    assert skipped.reason.startswith("expected '{', got '// entries")


@pytest.mark.parametrize("number", ["1e999", "-1e400", "NaN", "-Infinity", "1" * 5000])
@pytest.mark.parametrize("kind", ["lines", "array"])
def test_a_number_that_no_float_can_hold_costs_its_own_record(kind, number, tmp_path):
    parts = [json.dumps(x) for x in records(3)]
    parts[1] = parts[1].replace('"a": 1', f'"a": {number}')
    content = "\n".join(parts) if kind == "lines" else f"[{', '.join(parts)}]"
    reading = read(tmp_path, content.encode())
    assert [chain.id for chain in reading.chains] == ["0", "2"]
    assert len(reading.skipped) == 1


# JSON arrays of what else stands in lines


def test_an_array_of_any_record_of_lines_is_read_as_the_lines_are(tmp_path):
    for name in ("native", "edit-r2", "pico-banana", "flow-grpo", "seed-data-edit"):
        (lines,) = (Path(__file__).parent / "data").glob(f"{name.replace('-', '_')}.jsonl")
        whole = [json.loads(line) for line in lines.read_bytes().split(b"\n") if line.strip()]
        expected = [chain.to_record() for chain in read_chains(lines).chains]
        for indent in (None, 2):
            path = tmp_path / "array.json"
            path.write_text(json.dumps(whole, indent=indent))
            assert [chain.to_record() for chain in read_chains(path).chains] == expected


def test_lines_after_a_list_are_no_array(tmp_path):
    lines = b'[{"a": 1}]\n' + json.dumps(records(1)[0]).encode()
    reading = read(tmp_path, lines, format="native")
    assert [chain.id for chain in reading.chains] == ["0"]
    assert [skipped.line for skipped in reading.skipped] == [1]


# A folder that datasets saved


def stored(folder, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra mteditflow[arrow]")
    folder.mkdir()
    table = pyarrow.Table.from_pylist(rows)
    for number, part in enumerate((table.slice(0, 2), table.slice(2))):
        with pyarrow.ipc.new_stream(str(folder / f"data-{number}.arrow"), table.schema) as stream:
            stream.write_table(part)
    state = {"_data_files": [{"filename": f"data-{number}.arrow"} for number in (0, 1)]}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_folder_of_datasets_is_read(tmp_path):
    rows = [{**x, "task_types": ["subject_add"] if n else None} for n, x in enumerate(records(4))]
    folder = stored(tmp_path / "train", rows)
    chains = read_chains(folder).chains
    assert [json.loads(chain.to_json()) for chain in chains] == [
        {key: x for key, x in row.items() if x is not None} for row in rows
    ]
    assert chains[0].image_path == tmp_path / "0.png"
    whole = (folder / "data-1.arrow").read_bytes()
    (folder / "data-1.arrow").write_bytes(whole[:-40])
    with pytest.raises(ChainError, match=r"data-1\.arrow: expected an Arrow file"):
        read_chains(folder)


def test_rows_with_the_image_itself_say_what_to_do(tmp_path):
    images = [{"bytes": b"PNG", "path": None}, {"bytes": None, "path": "1.png"}]
    rows = [{**x, "image": image} for x, image in zip(records(2), images, strict=True)]
    reading = read_chains(stored(tmp_path / "x", rows), strict=False)
    assert [chain.image for chain in reading.chains] == ["1.png"]
    assert reading.skipped[0].reason == (
        "image: expected the path of an image, got the image itself; write it to a file"
    )


def test_a_row_that_no_line_could_hold_costs_itself_alone(tmp_path):
    odd = [(1.0, None), (float("nan"), None), (2.0, b"pixels"), (3.0, None)]
    rows = [{**x, "n": n, "raw": raw} for x, (n, raw) in zip(records(4), odd, strict=True)]
    reading = read_chains(stored(tmp_path / "x", rows), strict=False)
    assert [chain.id for chain in reading.chains] == ["0", "3"]
    assert [skipped.line for skipped in reading.skipped] == [2, 3]
    assert all("expected values that JSON can hold" in x.reason for x in some(reading.skipped))


def test_a_damaged_arrow_file_is_one_error_and_ends_no_process(tmp_path):
    folder, random, refused = stored(tmp_path / "x", records(4)), Random(0), 0
    path = folder / "data-1.arrow"
    whole = path.read_bytes()
    for _ in range(60):  # without validation of the batches, some of these end the process
        part = bytearray(whole)
        part[random.randrange(len(part))] = random.randrange(256)
        path.write_bytes(part)
        try:
            reading = read_chains(folder, strict=False)
        except ChainError as error:
            assert "expected an Arrow file, got " in str(error)  # noqa: PT017
            refused += 1
        else:
            assert len(reading.chains) + len(reading.skipped) <= 4
    assert refused > 10


def test_a_folder_of_several_splits_names_them(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ChainError, match=r"the folder of one split, one of \['train', 'test'\]"):
        read_chains(tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        *[b"", b"{", b"[]", b"7", b"\xff\xfe", b"{}", b'{"_data_files": 7}', b"null"],
        *[b'{"_data_files": [7]}', b'{"_data_files": [{"filename": 7}]}', b"[" * 100_000],
    ],
)
def test_a_damaged_folder_of_datasets_is_one_error(state, tmp_path):
    for name in ("state.json", "dataset_dict.json"):
        (tmp_path / name).write_bytes(state)
        with pytest.raises(ChainError, match="expected a folder that datasets saved"):
            read_chains(tmp_path, strict=False)
        (tmp_path / name).unlink()


def test_a_folder_of_datasets_without_the_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    with pytest.raises(ChainError, match=r"pip install 'mteditflow\[arrow\]'"):
        read_chains(tmp_path)


# Real files

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("file", "name", "count", "turns"),
    [
        ("edival_bench.csv", "edival", 572, 3),
        ("edit_r2_cm_test.jsonl", "edit-r2", 360, 3),
        ("imgedit_basic_edit.json", "imgedit", 737, 1),
    ],
)
def test_real_files_are_read_whole(file, name, count, turns):
    if not (SHARED / file).is_file():
        pytest.skip(f"no {SHARED / file}: data of others, kept beside the repository")
    reading = read_chains(SHARED / file)
    assert len(reading.chains) == len({chain.id for chain in reading.chains}) == count
    assert not reading.skipped
    assert {chain.turns for chain in reading.chains} == {turns}
    quoted = [x for chain in reading.chains for x in chain.instructions if x.count('"') == 1]
    assert name != "edival" or not quoted
