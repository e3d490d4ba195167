"""Render scenes: shaded sprites composed over a background, 64 x 64 pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .scene import Scene, Thing

SIZE = 64
SCALE = 4  # supersampling: drawn at 4 times the size, then reduced
CELL = 25  # side of a place, pixels
CORNERS = {  # top left pixel of each place
    "back left": (4, 2),
    "back right": (35, 2),
    "front left": (4, 28),
    "front right": (35, 28),
}
HORIZON = 22  # first row of the ground, pixels
SIGN = (7, 54, 57, 63)  # left, top, right, bottom, pixels
PAIR = 0.62  # size of each of two things, relative to a single one
SOLID = 0.1  # opacity above which a pixel belongs to a thing
RGB = {
    "red": (222, 48, 44),
    "orange": (245, 135, 30),
    "yellow": (250, 215, 50),
    "green": (46, 160, 67),
    "blue": (40, 95, 215),
    "purple": (145, 60, 185),
}
SKY_AND_GROUND = {
    "meadow": ((120, 190, 250), (215, 238, 255), (120, 195, 90), (85, 160, 65)),
    "beach": ((70, 170, 230), (190, 230, 245), (245, 225, 165), (230, 200, 130)),
    "desert": ((250, 170, 110), (255, 225, 170), (225, 165, 100), (200, 130, 70)),
    "snow": ((165, 185, 205), (215, 225, 235), (250, 252, 255), (225, 233, 242)),
    "night": ((14, 18, 52), (44, 48, 100), (38, 62, 58), (24, 42, 42)),
}
WHITE, INK = (250, 250, 250), (35, 35, 40)

Color = tuple[int, int, int]
Picture = NDArray[np.uint8]


def draw(scene: Scene) -> Picture:
    """Render a scene, uint8 [64, 64, 3]."""
    picture = _background(scene.background).copy()
    layers = [sprite(thing) for thing in scene.things]  # in the order of PLACES: back row first
    if scene.text:
        layers.append(_sign(scene.text))
    for layer in layers:
        opacity = layer[..., 3:] / 255
        picture += opacity * (layer[..., :3] - picture)
    return picture.round().astype(np.uint8)


def thing_mask(thing: Thing) -> NDArray[np.bool_]:
    """Return the pixels of a thing and its shadow, bool [64, 64]."""
    return sprite(thing)[..., 3] > 255 * SOLID


@lru_cache(maxsize=4096)
def sprite(thing: Thing) -> NDArray[np.float32]:
    """Render a single thing, RGBA in 0..255, float32 [64, 64, 4]."""
    base = RGB[thing.color]
    plain = _thing_alone(thing, base)
    if thing.material != "plain":
        bright = sum(base) > 400
        other = _shade(base, 0.45) if bright else _mix(base, WHITE, 0.75)
        pattern = Image.fromarray(_pattern(thing.material))
        plain = Image.composite(_thing_alone(thing, other), plain, pattern)
    return np.asarray(plain.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32)


def _thing_alone(thing: Thing, color: Color) -> Image.Image:
    """Draw a thing at SCALE times the size, on a transparent background."""
    image = Image.new("RGBA", (SIZE * SCALE, SIZE * SCALE))
    pen = ImageDraw.Draw(image)
    x, y = CORNERS[thing.place]
    side = CELL * (1.0 if thing.count == "one" else PAIR)
    drop = CELL - side
    corners = [(x, y)] if thing.count == "one" else [(x, y + drop), (x + drop, y + drop)]
    for left, top in corners:
        _at(pen, left + side / 2, top + 0.95 * side, side)
        DRAWINGS[thing.kind](pen, color, left * SCALE, top * SCALE, side * SCALE)
    return image


def _at(pen: ImageDraw.ImageDraw, x: float, y: float, side: float) -> None:
    """Draw a shadow on the ground."""
    box = (x - 0.42 * side, y - 0.06 * side, x + 0.42 * side, y + 0.06 * side)
    pen.ellipse([SCALE * value for value in box], fill=(0, 0, 0, 90))


@lru_cache(maxsize=8)
def _pattern(material: str) -> Picture:
    """Return the mask of a material's second color, 0 or 255, at SCALE times the size."""
    y, x = np.mgrid[: SIZE * SCALE, : SIZE * SCALE] / SCALE
    stripes, dots = (x + y) % 10 < 5, np.hypot(x % 8 - 4, y % 8 - 4) < 2.3
    where = stripes if material == "striped" else dots
    return (255 * where).astype(np.uint8)


@lru_cache(maxsize=8)
def _background(name: str) -> NDArray[np.float32]:
    """Render sky and ground, float32 [64, 64, 3]."""
    top, low, near, far = (np.array(x, dtype=np.float32) for x in SKY_AND_GROUND[name])
    y = np.arange(SIZE, dtype=np.float32)[:, None, None]
    sky = top + (low - top) * y / HORIZON
    ground = near + (far - near) * (y - HORIZON) / (SIZE - HORIZON)
    return np.broadcast_to(np.where(y < HORIZON, sky, ground), (SIZE, SIZE, 3)).copy()


@lru_cache(maxsize=16)
def _sign(text: str) -> NDArray[np.float32]:
    """Render a word on a white sign, RGBA in 0..255, float32 [64, 64, 4]."""
    large = SIZE * SCALE
    image = Image.new("RGBA", (large, large))
    pen = ImageDraw.Draw(image)
    left, top, right, low = (SCALE * value for value in SIGN)
    pen.rounded_rectangle((left, top, right, low - 1), 2 * SCALE, fill=WHITE, outline=INK, width=3)
    font = ImageFont.load_default(10.5 * SCALE)
    pen.text(((left + right) / 2, (top + low) / 2), text, font=font, fill=INK, anchor="mm")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32)


def _mix(color: Color, other: Color, share: float) -> Color:
    return tuple(round(a + share * (b - a)) for a, b in zip(color, other, strict=True))  # type: ignore[return-value]


def _shade(color: Color, factor: float) -> Color:
    return tuple(min(255, round(factor * value)) for value in color)  # type: ignore[return-value]


def _points(
    x: float, y: float, side: float, *points: tuple[float, float]
) -> list[tuple[float, float]]:
    """Map points of the unit square to pixels of a place."""
    return [(x + a * side, y + b * side) for a, b in points]


def _house(pen: ImageDraw.ImageDraw, c: Color, x: float, y: float, s: float) -> None:
    pen.rectangle(_points(x, y, s, (0.14, 0.45), (0.86, 0.95)), fill=c)
    pen.polygon(_points(x, y, s, (0.03, 0.47), (0.5, 0.04), (0.97, 0.47)), fill=_shade(c, 0.6))
    pen.rectangle(_points(x, y, s, (0.42, 0.64), (0.6, 0.95)), fill=(85, 55, 35))
    pen.rectangle(_points(x, y, s, (0.2, 0.55), (0.36, 0.72)), fill=(205, 232, 250))


def _tree(pen: ImageDraw.ImageDraw, c: Color, x: float, y: float, s: float) -> None:
    pen.rectangle(_points(x, y, s, (0.43, 0.6), (0.57, 0.96)), fill=(110, 72, 42))
    pen.ellipse(_points(x, y, s, (0.12, 0.02), (0.88, 0.7)), fill=c)
    pen.ellipse(_points(x, y, s, (0.22, 0.09), (0.52, 0.36)), fill=_mix(c, WHITE, 0.3))


def _car(pen: ImageDraw.ImageDraw, c: Color, x: float, y: float, s: float) -> None:
    cabin = ((0.2, 0.46), (0.34, 0.2), (0.7, 0.2), (0.82, 0.46))
    pen.polygon(_points(x, y, s, *cabin), fill=_shade(c, 0.6))
    pen.polygon(
        _points(x, y, s, (0.3, 0.44), (0.39, 0.27), (0.5, 0.27), (0.5, 0.44)), fill=(205, 232, 250)
    )
    pen.rounded_rectangle(_points(x, y, s, (0.03, 0.44), (0.97, 0.8)), 0.1 * s, fill=c)
    for left in (0.13, 0.63):
        pen.ellipse(_points(x, y, s, (left, 0.68), (left + 0.24, 0.94)), fill=INK)
        pen.ellipse(
            _points(x, y, s, (left + 0.08, 0.77), (left + 0.16, 0.85)), fill=(190, 190, 195)
        )


def _ball(pen: ImageDraw.ImageDraw, c: Color, x: float, y: float, s: float) -> None:
    pen.ellipse(_points(x, y, s, (0.12, 0.18), (0.88, 0.94)), fill=_shade(c, 0.65))
    pen.ellipse(_points(x, y, s, (0.12, 0.16), (0.84, 0.87)), fill=c)
    pen.ellipse(_points(x, y, s, (0.27, 0.26), (0.5, 0.46)), fill=_mix(c, WHITE, 0.6))


def _mushroom(pen: ImageDraw.ImageDraw, c: Color, x: float, y: float, s: float) -> None:
    pen.rounded_rectangle(
        _points(x, y, s, (0.36, 0.45), (0.64, 0.95)), 0.08 * s, fill=(240, 228, 205)
    )
    pen.pieslice(_points(x, y, s, (0.06, 0.08), (0.94, 1.02)), 180, 360, fill=c)
    pen.rectangle(_points(x, y, s, (0.06, 0.53), (0.94, 0.57)), fill=_shade(c, 0.6))


def _flower(pen: ImageDraw.ImageDraw, c: Color, x: float, y: float, s: float) -> None:
    pen.line(_points(x, y, s, (0.5, 0.5), (0.5, 0.96)), fill=(50, 125, 50), width=round(0.08 * s))
    pen.ellipse(_points(x, y, s, (0.52, 0.72), (0.8, 0.86)), fill=(50, 125, 50))
    for k in range(5):
        a = 0.5 + 0.25 * math.sin(2 * math.pi * k / 5)
        b = 0.36 - 0.25 * math.cos(2 * math.pi * k / 5)
        pen.ellipse(_points(x, y, s, (a - 0.17, b - 0.17), (a + 0.17, b + 0.17)), fill=c)
    pen.ellipse(_points(x, y, s, (0.36, 0.22), (0.64, 0.5)), fill=(95, 65, 40))


def _balloon(pen: ImageDraw.ImageDraw, c: Color, x: float, y: float, s: float) -> None:
    pen.line(
        _points(x, y, s, (0.5, 0.7), (0.46, 0.82), (0.54, 0.96)), fill=INK, width=round(0.04 * s)
    )
    pen.polygon(_points(x, y, s, (0.42, 0.76), (0.58, 0.76), (0.5, 0.66)), fill=_shade(c, 0.6))
    pen.ellipse(_points(x, y, s, (0.2, 0.0), (0.8, 0.72)), fill=c)
    pen.ellipse(_points(x, y, s, (0.31, 0.1), (0.46, 0.32)), fill=_mix(c, WHITE, 0.6))


def _rocket(pen: ImageDraw.ImageDraw, c: Color, x: float, y: float, s: float) -> None:
    pen.polygon(_points(x, y, s, (0.4, 0.8), (0.6, 0.8), (0.5, 0.99)), fill=(255, 190, 60))
    pen.polygon(_points(x, y, s, (0.34, 0.5), (0.12, 0.86), (0.36, 0.8)), fill=_shade(c, 0.6))
    pen.polygon(_points(x, y, s, (0.66, 0.5), (0.88, 0.86), (0.64, 0.8)), fill=_shade(c, 0.6))
    pen.ellipse(_points(x, y, s, (0.3, 0.0), (0.7, 0.95)), fill=c)
    pen.rectangle(_points(x, y, s, (0.32, 0.8), (0.68, 0.96)), fill=(0, 0, 0, 0))
    pen.polygon(_points(x, y, s, (0.4, 0.8), (0.6, 0.8), (0.5, 0.99)), fill=(255, 190, 60))
    pen.ellipse(
        _points(x, y, s, (0.39, 0.27), (0.61, 0.49)),
        fill=(205, 232, 250),
        outline=INK,
        width=round(0.03 * s),
    )


DRAWINGS: dict[str, Callable[[ImageDraw.ImageDraw, Color, float, float, float], None]] = {
    "house": _house,
    "tree": _tree,
    "car": _car,
    "ball": _ball,
    "mushroom": _mushroom,
    "flower": _flower,
    "balloon": _balloon,
    "rocket": _rocket,
}
