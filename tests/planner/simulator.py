"""The rules of the object pool written a second time: from the text alone, things by numbers."""

import re

from tests.loops import some


def simulate(listed, texts):
    """Replay formatted instructions; yields what a chain records after each of them.

    Args:
        listed: the objects as dictionaries: name, color, material, foreground.
        texts: formatted instructions.
    """
    things = [dict(x, born="image") for x in listed]
    names = [thing["name"] for thing in things]
    scarred, background = set(), True
    alive = dict(enumerate(things))
    for text in texts:
        slots = re.findall(r"\[([^\]]*)\]", text)
        number = {thing["name"]: i for i, thing in alive.items()}
        before, hit = set(alive), set()
        if text.startswith("Add text"):
            names += ["text"] * ("text" not in names)
        elif text.startswith("Add"):
            things.append({"name": slots[0], "born": "edit", "color": None, "material": None})
            alive[len(things) - 1] = things[-1]
        elif text.startswith("Change the background"):
            background = False
            alive = {i: x for i, x in alive.items() if x["born"] == "image" and x["foreground"]}
        elif text.startswith("Remove"):
            del alive[number[slots[0]]]
        elif text.startswith("Change the position"):
            hit = {number[slots[0]], number[slots[2]]}
        elif text.startswith("Replace the text"):
            hit = {number[slots[1]]}
        elif text.startswith("Replace"):
            hit = {number[slots[0]]}
            things[number[slots[0]]]["name"] = slots[1]
        else:
            attribute, thing = text.split()[2], things[number[slots[0]]]
            hit = {number[slots[0]]}
            if attribute != "count":
                thing["name"] = rename(thing["name"], thing[attribute], slots[1])
                thing[attribute] = slots[1]
        scarred |= hit
        names += [x["name"] for x in alive.values() if x["name"] not in names]
        originals = {i for i, x in alive.items() if x["born"] == "image"}
        yield {
            "available_objects": {x["name"] for x in alive.values()},
            "unchanged_objects": {alive[i]["name"] for i in originals - scarred},
            "turn_unchanged_objects": {alive[i]["name"] for i in set(alive) & before - hit},
            "all_objects": set(names),
            "background_consistency": background,
        }


def rename(name, old, new):
    """Substitute runs of whole words, by comparing lists of words."""
    words, target = name.split(" "), (old or "").lower().split(" ")
    for start in range(len(words)):
        if [word.lower() for word in words[start : start + len(target)]] == target:
            return " ".join([*words[:start], new, *words[start + len(target) :]])
    return f"{new} {name}"


def check_record(listed, fields):
    """Compare the fields of a chain, a dictionary, with those of the simulator."""
    replayed = list(simulate(listed, fields["formatted_instructions"]))
    assert len(replayed) == len(fields["task_types"])
    for turn, expected in some(enumerate(replayed)):
        got = {name: fields[name][turn] for name in expected}
        assert got.pop("background_consistency") == expected.pop("background_consistency")
        assert all(len(set(names)) == len(names) for names in some(got.values()))
        assert {name: set(names) for name, names in got.items()} == expected
