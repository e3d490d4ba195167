"""Objects of an image: a model lists them, and only those that a detector finds are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from mteditflow.chains.record import first_error, shorten
from mteditflow.planner.answers import read_json, strict_object
from mteditflow.planner.pool import ListedObject
from mteditflow.rewards import AnswerError, Fault
from mteditflow.rewards.consistency.regions import clean_names
from mteditflow.rewards.consistency.scorer import Detector

OBJECTS_MAX = 12
NAMES_AT_ONCE = 4  # names in one batch of the detector
SIDE_MAX, AREA_MAX = 0.9, 0.4  # largest side and area of a box, as shares of the image's

LISTING_PROMPT = f"""\
List the objects in the image above that somebody might want to edit, the most striking first, at \
most {OBJECTS_MAX}. Several things of one kind that look alike are one object with a count.

Give for each of them:
name: one to four words in lower case that tell it apart from every other object of the image, \
with its color or material only where that is needed; no name twice
color: its main color, one or two words, null if it has none in particular
material: what it is made of, one or two words, null if that is not plain
text: what is written on it, exactly, null if nothing is
count: how many of it there are, at most 20, null if that cannot be counted
foreground: true for a thing, false for a part of the background such as sky, wall, road or grass

Answer with JSON alone, of this form:
{{"objects": [{{"name": ..., "color": ..., "material": ..., "text": ..., "count": ..., \
"foreground": ...}}, ...]}}"""


class _Listing(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    objects: list[Any]


class Listing(NamedTuple):
    """Objects as a model listed them.

    Attributes:
        objects: objects with a unique name; their invalid attributes are set to unknown.
        left_out: reason by "<name>" for each object that is left out, and by "<name>: <attribute>"
            for each invalid attribute.
    """

    objects: tuple[ListedObject, ...]
    left_out: dict[str, str]


def listing_schema() -> dict[str, Any]:
    """Return the JSON schema of the answer to ``LISTING_PROMPT``."""
    properties = ListedObject.model_json_schema()["properties"]
    objects = {"type": "array", "maxItems": OBJECTS_MAX, "items": strict_object(properties)}
    return strict_object({"objects": objects})


def read_objects(text: str) -> Listing:
    """Parse the answer to ``LISTING_PROMPT``; an invalid entry or attribute drops only itself.

    Args:
        text: answer of the model.

    Raises:
        AnswerError: the answer has another form, or all of its objects are invalid.

    Example:
        >>> listing = read_objects('{"objects": [{"name": "cat", "color": null, "count": 0}]}')
        >>> listing.objects[0].name, listing.left_out
        ('cat', {'cat: count': 'expected greater than or equal to 1, got 0'})
    """
    listed = read_json(text, _Listing).objects
    objects: dict[str, ListedObject] = {}
    left_out: dict[str, str] = {}
    for number, each in enumerate(listed):
        found, name, faults = _read_object(each, f"objects[{number}]")
        if found is None:
            left_out |= faults
        elif name.casefold() in objects:
            left_out[f"{name} (objects[{number}])"] = "expected a unique name, got it twice"
        elif len(objects) == OBJECTS_MAX:
            left_out[name] = f"expected at most {OBJECTS_MAX} objects, got another one"
        else:
            objects[name.casefold()] = found
            left_out |= faults
    if listed and not objects:
        place, reason = next(iter(left_out.items()))
        raise AnswerError(Fault.format, f"{place}: {reason}")
    return Listing(tuple(objects.values()), left_out)


def _read_object(each: Any, place: str) -> tuple[ListedObject | None, str, dict[str, str]]:
    """Return one object without its invalid attributes (``None`` if its name is), name, faults."""
    if not isinstance(each, dict):
        return None, place, {place: f"expected an object, got {shorten(each)}"}
    faults = {key: fault for key, x in each.items() if (fault := _fault(key, x)) is not None}
    if "name" not in each or "name" in faults:
        return None, place, {place: faults.get("name", "expected a name, got none")}
    found = ListedObject(**{key: x for key, x in each.items() if key not in faults})
    return found, found.name, {f"{found.name}: {key}": fault for key, fault in faults.items()}


def _fault(key: str, value: Any) -> str | None:
    """Return the fault of an attribute; ``None`` if it is valid."""
    try:
        ListedObject(**{"name": "any", key: value})
    except ValidationError as error:
        return first_error(error).removeprefix(f"{key}: ")
    return None


def find_objects(
    detector: Detector, image: Image.Image, objects: Sequence[ListedObject]
) -> dict[str, list[list[float]]]:
    """Detect each object with a query of its own, so that no box is assigned to another one.

    Args:
        detector: detector whose threshold is the planner's, 0.35 by default.
        image: image of mode RGB.
        objects: objects to detect.

    Returns:
        Boxes by name: x1, y1, x2, y2 in pixels.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    names = [x.name for x in objects]
    boxes: dict[str, list[list[float]]] = {}
    for start in range(0, len(names), NAMES_AT_ONCE):
        some = names[start : start + NAMES_AT_ONCE]
        found = detector([pixels] * len(some), [clean_names([name]) for name in some])
        boxes |= {name: x.tolist() for name, x in zip(some, found, strict=True)}
    return boxes


def fits(box: Sequence[float], size: tuple[int, int]) -> bool:
    """Return whether a box encloses one object rather than the whole image.

    Args:
        box: x1, y1, x2, y2 in pixels.
        size: width and height of the image, in pixels.

    Returns:
        False if a side is longer than 0.9 of the image's and the area is above 0.4 of the image's.

    Example:
        >>> fits((0, 0, 95, 40), (100, 100)), fits((0, 0, 95, 50), (100, 100))
        (True, False)
    """
    width, height = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
    return not (max(width, height) > SIDE_MAX and width * height > AREA_MAX)


def sift(
    objects: Sequence[ListedObject],
    boxes: Mapping[str, Sequence[Sequence[float]]],
    size: tuple[int, int],
) -> tuple[tuple[ListedObject, ...], dict[str, str]]:
    """Split objects into those that a detector has found, and the others.

    Args:
        objects: objects that a model listed.
        boxes: boxes that the detector found, by name, in pixels.
        size: width and height of the image, in pixels.

    Returns:
        The objects with at least one box that ``fits``, and the reasons for the others by name.

    Example:
        >>> objects = [ListedObject(name="cat"), ListedObject(name="sky")]
        >>> boxes = {"cat": [(0, 0, 9, 9)], "sky": [(0, 0, 99, 60)]}
        >>> kept, left_out = sift(objects, boxes, (99, 99))
        >>> left_out
        {'sky': 'fills the image'}
    """
    left_out = {}
    for listed in objects:
        found = boxes[listed.name]
        if not any(fits(box, size) for box in found):
            left_out[listed.name] = "fills the image" if found else "not found by the detector"
    return tuple(x for x in objects if x.name not in left_out), left_out
