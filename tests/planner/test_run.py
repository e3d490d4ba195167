"""Planning a folder through the wire: a scripted model, a detector that sees colors, and kills."""

import asyncio
import json
import os
import random
import re
import signal
import time
from itertools import repeat
from pathlib import Path

import anyio
import pytest
from PIL import Image

from mteditflow.chains import Chain
from mteditflow.planner import parse_formatted
from mteditflow.planner.plan import PlanningStoppedError
from mteditflow.planner.run import Journal, RefusedChain, in_order, open_image, refused_path
from mteditflow.testing.endpoint import ScriptedServer, closed_port, late
from tests.loops import some
from tests.planner.scripted_model import ScriptedModel, picture, plan_all, write_pictures
from tests.planner.simulator import check_record
from tests.processes import Process

POISONED = 5


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten pictures, one of which the model always answers wrongly, and a file that is none."""
    folder = tmp_path_factory.mktemp("planner") / "images"
    write_pictures(folder, 10, poisoned={POISONED})
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def model():
    with ScriptedServer(ScriptedModel(nonsense=0.25)) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(images, model):
    """What an undisturbed run writes: chains, and refused chains."""
    output = images.parent / "undisturbed.jsonl"
    planned = plan_all(model.url, images, output)
    return planned, output


def both(output):
    # the port of the endpoint stands in the details
    refused = output.with_suffix(".refused.jsonl").read_text()
    return output.read_text(), re.sub(r"127\.0\.0\.1:\d+", "", refused)


def test_every_chain_makes_sense(undisturbed):
    planned, _ = undisturbed
    assert len(planned.chains) == 18
    for chain in some(planned.chains):
        objects = chain.planner["objects"]
        assert chain.turns == 3
        assert chain.image.startswith("images/")
        assert chain.image_path.is_file()
        check_record(objects, chain.to_record())
        assert chain.planner["left_out"] == {
            "wall": "fills the image",
            "unicorn": "not found by the detector",
        }
        # the detector found neither the unicorn nor, as a thing, the wall
        assert all(set(x["name"].split()) - {"wall", "unicorn"} for x in some(objects))
        assert all(x["name"].endswith(" box") for x in some(objects))


def test_the_words_of_an_instruction_name_every_slot(undisturbed):
    planned, _ = undisturbed
    tasks = set()
    for chain in some(planned.chains):
        for said, formatted in some(
            zip(chain.instructions, chain.formatted_instructions, strict=True)
        ):
            tasks.add(parse_formatted(formatted).task)
            assert said == said.strip()
            assert not set('[]\n"') & set(said)
            for slot in some(re.findall(r"\[([^\]]+)\]", formatted)):
                assert slot in said
    assert len(tasks) == 9  # all types were drawn in these 54 steps


def test_edit_types_are_not_repeated_but_for_an_addition(undisturbed):
    planned, _ = undisturbed
    for chain in some(planned.chains):
        others = [task for task in chain.task_types if task != "subject_add"]
        assert len(set(others)) == len(others)


def test_refused_chains_are_counted_with_their_reason(undisturbed):
    planned, output = undisturbed
    assert planned.refused["image cannot be read"] == 2
    assert sum(planned.refused.values()) == 4
    assert all(x.startswith(("image ", "edit: ")) for x in some(planned.refused))
    refused = list(Journal(output.with_suffix(".refused.jsonl")).read(RefusedChain))
    assert [x.id for x in refused] == ["05.png#0", "05.png#1", "broken.jpg#0", "broken.jpg#1"]
    assert "after 6 attempts" in refused[0].detail
    assert "UnidentifiedImageError" in refused[2].detail


def test_a_bad_line_of_a_journal_is_named_by_file_and_number(tmp_path):
    good = RefusedChain(id="1", image="1.png", reason="x", detail="y").model_dump_json()
    (tmp_path / "x.jsonl").write_text(f'{good}\n{{"id": 2}}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: "):
        list(Journal(tmp_path / "x.jsonl").read(RefusedChain))


def test_each_edit_has_a_seed_of_its_own(model, undisturbed):
    assert len({request.json["seed"] for request in model.requests}) > len(undisturbed[0].chains)


def test_the_order_is_that_of_the_images(undisturbed):
    planned, output = undisturbed
    ids = [chain.id for chain in planned.chains]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert [Chain.model_validate_json(x).id for x in output.read_text().splitlines()] == ids


def test_each_question_has_the_image_and_a_schema(model, undisturbed):
    bodies = [request.json for request in model.requests]
    for body in some(bodies):
        image, text = body["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        assert "Answer with JSON alone" in text["text"]
        schema = body["response_format"]["json_schema"]["schema"]
        assert schema["additionalProperties"] is False
        assert schema["required"] == list(schema["properties"])


@pytest.mark.parametrize("images_in_flight", [1, 3])
def test_the_same_again_however_many_at_a_time(
    images, model, undisturbed, tmp_path, images_in_flight
):
    # paths are relative to the file, so the run is to write beside the first one
    output = images.parent / f"again_{images_in_flight}.jsonl"
    plan_all(model.url, images, output, images_in_flight=images_in_flight)
    assert both(output) == both(undisturbed[1])


def test_another_seed_draws_other_chains(images, model, undisturbed):
    output = images.parent / "another.jsonl"
    planned = plan_all(model.url, images, output, seed=1, turns=2)
    assert {chain.turns for chain in planned.chains} == {2}
    first = [chain.task_types[:2] for chain in undisturbed[0].chains]
    assert [chain.task_types for chain in planned.chains] != first


# resuming


def test_a_finished_run_asks_nothing(images, model, undisturbed):
    before, asked = both(undisturbed[1]), len(model.requests)
    plan_all(model.url, images, undisturbed[1])
    assert both(undisturbed[1]) == before
    assert len(model.requests) == asked


@pytest.mark.parametrize("seed", range(4))
def test_cut_anywhere_the_run_ends_with_the_same_files(images, model, undisturbed, seed):
    chance = random.Random(seed)
    output = images.parent / f"cut_{seed}.jsonl"
    for suffix in (".jsonl", ".refused.jsonl"):
        whole = undisturbed[1].with_suffix(suffix).read_bytes()
        output.with_suffix(suffix).write_bytes(whole[: chance.randrange(len(whole) + 1)])
    plan_all(model.url, images, output)
    assert both(output) == both(undisturbed[1])


@pytest.mark.slow
def test_killed_again_and_again_the_run_ends_with_the_same_files(images, undisturbed):
    output = images.parent / "killed.jsonl"
    command, errors = ["-m", "tests.planner.plan_in_subprocess"], images.parent / "errors"
    kills = 0
    with ScriptedServer(ScriptedModel(nonsense=0.25), script=repeat(late(0.05))) as server:
        for lines in (2, 7):
            process = Process([*command, server.url, images, output], errors=errors)
            while process.poll() is None and count_lines(output) < lines:
                time.sleep(0.005)
            assert process.poll() is None, errors.read_text()
            process.kill()
            kills += process.wait() == -signal.SIGKILL
            whole = both(undisturbed[1])[0].encode()
            assert whole.startswith(output.read_bytes())
        assert count_lines(output) < len(undisturbed[0].chains)
        plan_all(server.url, images, output)
    assert kills == 2
    assert both(output) == both(undisturbed[1])


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_refused_chains_are_tried_again_once_their_file_is_gone(tmp_path):
    folder, output = tmp_path / "images", tmp_path / "chains.jsonl"
    write_pictures(folder, 3, poisoned={1})
    with ScriptedServer(ScriptedModel()) as server:
        assert sum(plan_all(server.url, folder, output).refused.values()) == 2
        picture(["red", "blue"]).save(folder / "01.png")
        assert sum(plan_all(server.url, folder, output).refused.values()) == 2
        output.with_suffix(".refused.jsonl").unlink()
        planned = plan_all(server.url, folder, output)
    assert not planned.refused
    assert [chain.id for chain in planned.chains] == [
        *("00.png#0", "00.png#1", "02.png#0", "02.png#1", "01.png#0", "01.png#1")
    ]


def test_a_dead_endpoint_stops_the_run_and_refuses_nothing(images, undisturbed):
    output = images.parent / "dead.jsonl"
    port = closed_port()
    with pytest.raises(PlanningStoppedError, match=r"^planning stopped: no (connection|endpoint)"):
        plan_all(f"http://127.0.0.1:{port}/v1", images, output, patience=0.0)
    assert not output.read_text()
    assert not output.with_suffix(".refused.jsonl").read_text()
    with ScriptedServer(ScriptedModel(nonsense=0.25), port=port) as server:
        plan_all(server.url, images, output)
    assert both(output) == both(undisturbed[1])


def test_two_outputs_share_no_file(tmp_path, images, model):
    for version in ("v1", "v2"):
        plan_all(model.url, images, tmp_path / f"x.{version}")
        refused = list(Journal(tmp_path / f"x.{version}.refused").read(RefusedChain))
        assert len(refused) == 4
    names = [Path(x) for x in ("x", "x.v1", "x.v2", "x.jsonl", "x.v1.jsonl", "y/x.jsonl")]
    assert len({*names, *map(refused_path, names)}) == 2 * len(names)


def test_a_name_that_is_not_utf_8_costs_its_own_image(tmp_path):
    folder, output = tmp_path / "images", tmp_path / "chains.jsonl"
    write_pictures(folder, 1)
    data = (folder / "00.png").read_bytes()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(data)
    with ScriptedServer(ScriptedModel()) as server:
        for _ in range(2):  # the second time nothing is left to do
            planned = plan_all(server.url, folder, output)
            assert [chain.id for chain in planned.chains] == ["00.png#0", "00.png#1"]
            assert planned.refused == {"image cannot be read": 2}
    refused = Journal(refused_path(output)).read(RefusedChain)
    assert [x.id for x in refused] == ["caf\\xe9.png#0", "caf\\xe9.png#1"]


# what cannot go on


def test_chains_of_other_settings_are_not_mixed(images, model, undisturbed):
    with pytest.raises(
        ValueError, match=r"expected chains planned with .*'seed': 3.*, got .*'seed': 0"
    ):
        plan_all(model.url, images, undisturbed[1], seed=3)


def test_a_line_that_is_no_chain_is_named(images, model, tmp_path):
    output = tmp_path / "chains.jsonl"
    output.write_text('{"id": "1"}\n')
    with pytest.raises(ValueError, match=r"chains\.jsonl:1: image: expected this field"):
        plan_all(model.url, images, output)


def test_a_folder_without_images(model, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"folder: expected \.jpeg, \.jpg, \.png, \.webp files in"):
        plan_all(model.url, tmp_path, tmp_path / "chains.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]  # nothing was begun


# parts


def test_images_are_upright_rgb_and_bounded(tmp_path):
    wide = Image.new("L", (3000, 1500), 7)
    exif = wide.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    wide.save(tmp_path / "wide.jpg", exif=exif)
    image = open_image(tmp_path / "wide.jpg")
    assert (image.mode, image.size) == ("RGB", (512, 1024))


def test_in_order_keeps_order_and_limit():
    taken, running, most = [], 0, 0

    async def work(job):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(random.Random(job).uniform(0, 0.01))
        running -= 1
        return job

    anyio.run(lambda: in_order(work, range(40), taken.append, limit=5))
    assert taken == list(range(40))
    assert most == 5


def test_in_order_cancels_what_is_under_way():
    taken = []

    async def work(job):
        if job == 2:
            raise ValueError("job 2")
        await anyio.sleep(0 if job < 2 else 600)
        return job

    async def main():
        with pytest.raises(ValueError, match="job 2"), anyio.fail_after(30):
            await in_order(work, range(10), taken.append, limit=4)
        return len(asyncio.all_tasks())

    assert anyio.run(main) == 1  # this one alone
    assert taken == [0, 1]


def test_a_journal_holds_whole_lines(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    record = json.dumps({"id": "ä", "image": "b", "reason": "c", "detail": "d"}, ensure_ascii=False)
    Journal(path).append(record)
    with path.open("ab") as file:
        file.write(record.encode()[:9])  # in the middle of a character
    journal = Journal(path)
    journal.append(record)
    assert path.read_text(encoding="utf-8") == f"{record}\n{record}\n"
    assert [x.id for x in journal.read(RefusedChain)] == ["ä", "ä"]
