"""A model that plans from what the request says, by rule; and a detector that sees colors.

Pictures are gray walls with up to four boxes of plain colors. The model reads the objects from the
pixels of the data URL, and the pool and the edit type from the words of the prompt; nothing is
shared with the planner but the wire. For the same request it answers the same, so that runs can be
compared, and `nonsense` of its answers are wrong in one of the ways below.
"""

import base64
import io
import json
import random
import re
from dataclasses import dataclass

import anyio
import numpy as np
import torch
from PIL import Image

from mteditflow.planner.plan import Planner
from mteditflow.planner.run import plan_folder
from mteditflow.rewards.transport.chat import ChatClient
from mteditflow.testing.endpoint import completion

COLORS = {
    "red": (200, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 60, 200),
    "yellow": (230, 210, 40),
    "white": (250, 250, 250),
}
GRAY, POISON = (128, 128, 128), (129, 128, 128)
SEEN = COLORS | {"wall": GRAY}
NEW = ["lamp", "bench", "cat", "tree", "kite", "drum", "boat", "clock", "chair", "vase", "dog"]
WORDS = ["silver", "violet", "orange", "brown"]


def picture(colors, *, poison=False):
    """A gray wall, 96 x 96, with a box of each color; `poison` makes every answer nonsense."""
    image = Image.new("RGB", (96, 96), POISON if poison else GRAY)
    for i, color in enumerate(colors):
        left, top = 8 + 44 * (i % 2), 8 + 44 * (i // 2)
        image.paste(COLORS[color], (left, top, left + 32, top + 32))
    return image


def write_pictures(folder, count, *, poisoned=()):
    """Write some pictures with two to four boxes each, one of them in a folder below."""
    (folder / "more").mkdir(parents=True)
    for i in range(count):
        colors = random.Random(i).sample(sorted(COLORS), 2 + i % 3)
        path = folder / ("more" if i % 4 == 3 else "") / f"{i:02d}.png"
        picture(colors, poison=i in poisoned).save(path)


def sees_colors(images, names):
    """A detector: the box around all pixels of the color that a name says; the wall is gray."""
    found = []
    for image, asked in zip(images, names, strict=True):
        (name,) = asked
        words = [word for word in name.split() if word in SEEN]
        color = torch.tensor(SEEN[words[0]] if words else (0, 0, 0), dtype=torch.uint8)
        rows, columns = (image == color[:, None, None]).all(0).nonzero(as_tuple=True)
        corners = [
            [x.min(), y.min(), x.max() + 1, y.max() + 1] for x, y in [(columns, rows)] if len(x)
        ]
        found.append(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
    return found


@dataclass
class ScriptedModel:
    """Answers chat completions; `nonsense` is the share of its answers that are wrong."""

    nonsense: float = 0.0

    def __call__(self, request):
        *images, text = request["messages"][0]["content"]
        if "response_format" not in request:  # of a client that asks whether there is a model
            return completion("ok")
        (image,) = images
        data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
        pixels = np.array(Image.open(io.BytesIO(data)))
        chance = random.Random(f"{request['seed']} {data} {text['text']}")
        poisoned = tuple(pixels[0, 0]) == POISON
        if "List the objects" in text["text"]:
            return completion(json.dumps({"objects": list_objects(pixels)}))
        answer = plan_edit(text["text"], chance)
        if poisoned or chance.random() < self.nonsense:
            return spoilt(answer, chance)
        return completion(json.dumps(answer))


def list_objects(pixels):
    seen = {tuple(x) for x in pixels.reshape(-1, 3).tolist()}
    objects = [
        {
            "name": f"{color} box",
            "color": color,
            "material": "plastic",
            "text": "Open" if color == "white" else None,
            "count": 1,
            "foreground": color != "yellow",
        }
        for color, rgb in COLORS.items()
        if rgb in seen
    ]
    nothing = {"color": None, "material": None, "text": None, "count": None}
    return [
        *objects,
        {"name": "wall", "foreground": False, **nothing},
        {"name": "unicorn", "foreground": True, **nothing},
    ]


def plan_edit(prompt, chance):
    """A sensible edit, from the words of the prompt alone."""
    task = re.search(r"Its type is (\w+)", prompt)[1]
    objects = [json.loads(line) for line in prompt.splitlines() if line.startswith('{"name"')]
    used = re.search(r"none of: (.*?)\. The edit", prompt)[1].split(", ")
    new = chance.choice([name for name in NEW if name not in used])
    target = chance.choice(objects)
    other = chance.choice([x for x in objects if x is not target] or [target])["name"]
    target, count = target["name"], (target["count"] or 1) + 1
    place = chance.choice(["left", "right", "above", "below"])
    word = chance.choice([w for w in WORDS if not any(w in name.split() for name in used)])
    written = [x for x in objects if x["text"]]
    stay = re.search(r"saying that (.*) stay as they are", prompt)
    kept = re.findall(r'"([^"]+)"', stay[1]) if stay else []
    if task == "subject_add":
        slots = {"name": new, "position": place, "reference": other}
        said = f"Put a {new} {place} of the {other}."
    elif task == "subject_remove":
        slots, said = {"target": target}, f"Take the {target} away."
    elif task == "subject_replace":
        slots, said = {"target": target, "name": new}, f"Make the {target} a {new}."
    elif task == "position_change":
        slots = {"target": target, "position": place, "reference": other}
        said = f"Move the {target} to the {place} of the {other}."
    elif task == "count_change":
        slots, said = {"target": target, "count": count}, f"I want {count} of the {target}."
    elif task == "color_alter":
        slots, said = {"target": target, "color": word}, f"Paint the {target} {word}."
    elif task == "material_alter":
        slots, said = {"target": target, "material": "glass"}, f"Make the {target} of glass."
    elif task == "background_change":
        slots, said = {"background": "a beach"}, f"Put a beach behind {' and '.join(kept)}."
    elif written:
        slots = {"new": "It's 5", "old": written[0]["text"], "target": written[0]["name"]}
        said = f"Let the {slots['target']} say 'It's 5', not '{slots['old']}'."
    else:
        slots, said = {"new": "Hello"}, "Write 'Hello' somewhere."
    return {"edit": slots, "instruction": chance.choice([said, f'"{said}"', f"{said}\n"])}


def spoilt(answer, chance):
    """One of the ways to answer wrongly."""
    edit, said = dict(answer["edit"]), answer["instruction"]
    first = next(iter(edit))
    return chance.choice(
        [
            completion(json.dumps({"edit": {**edit, first: "dragon [7]"}, "instruction": said})),
            completion(json.dumps({"edit": {**edit, "extra": 1}, "instruction": said})),
            completion(json.dumps({"edit": {}, "instruction": said})),
            completion(json.dumps({"edit": edit, "instruction": "Make it nicer."})),
            completion(json.dumps(edit)),
            completion(json.dumps(answer)[:-9]),
            completion(f"Sure! Here it is: {json.dumps(answer)}"),
            completion("I'm sorry, but I can't help with that."),
            completion(json.dumps(answer), finish_reason="length"),
            completion(None, refusal="No."),
            completion(""),
        ]
    )


def plan_all(url, folder, output, *, images_in_flight=16, patience=20.0, **settings):
    """Plan two chains for each image of a folder."""
    client = ChatClient(
        [url],
        "scripted",
        temperature=0.7,
        timeout=20.0,
        attempts=6,
        back_off=0.0,
        patience=patience,
    )
    planner = Planner(client, sees_colors, **settings)
    return anyio.run(
        lambda: plan_folder(
            planner,
            folder,
            output,
            chains_per_image=2,
            images_in_flight=images_in_flight,
            progress=False,
        )
    )
