"""Folders of single edits, and a judge that answers every rubric as a test wants."""

import base64
import io
import json
import re

from PIL import Image

from mteditflow.testing.endpoint import completion


def picture(value):
    return Image.new("RGB", (8, 8), (value, 0, 0))


def images_of(request):
    """The images that a request shows, in order."""
    parts = request["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in urls]


def values_of(request):
    """The red of each image that a request shows, in order."""
    return [image.getpixel((0, 0))[0] for image in images_of(request)]


def text_of(request):
    return "\n".join(p["text"] for p in request["messages"][0]["content"] if p["type"] == "text")


def criteria_of(request):
    """Names and the range of the numbers that the schema asks for."""
    properties = request["response_format"]["json_schema"]["schema"]["properties"]
    return {name: own["enum"] for name, own in properties.items() if name != "analysis"}


def rating(rate):
    """A judge: ``rate`` maps the red of the edited image and a criterion's name to a number.

    It says ok to what is no question of a rubric, as to whether it is there.
    """

    def answer(request):
        if "response_format" not in request:
            return completion("ok")
        made = values_of(request)[-1]
        scores = {name: rate(made, name) for name in criteria_of(request)}
        return completion(json.dumps({"analysis": "As seen.", **scores}))

    return answer


def save(folder, pictures):
    """Write pictures of one color each: path under the folder to its red."""
    for name, value in pictures.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(path)


def lines_of(output):
    return re.sub(r"\s+", " ", output)
