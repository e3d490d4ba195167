"""Content consistency again, in float64 and by other means than the library's: the reference.

Masks are comparisons of coordinates, the share of a patch is a difference of the mask's integral,
pooling and averaging are loops, crops are PIL's. It shares nothing with the library but the
features, which both get from ``HashedFeatures``.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from PIL import Image

from mteditflow.rewards import Features

SIZE = 512


class HashedFeatures:
    """Random tokens that follow from the pixels of an image: float64, of any grid."""

    def __init__(self, channels=6, registers=4, grid=(14, 14), size=(224, 224), shift=0.5):
        self.channels, self.registers, self.grid, self.size = channels, registers, grid, size
        self.shift, self.calls = shift, []

    def tokens(self, image):
        """[1 + R + P, C] of an RGB image, uint8 [H, W, 3]."""
        data = np.ascontiguousarray(image)
        digest = hashlib.sha256(repr(data.shape).encode() + data.tobytes()).digest()
        random = np.random.default_rng(list(digest))
        count = 1 + self.registers + self.grid[0] * self.grid[1]
        return random.normal(size=(count, self.channels)) + self.shift

    def __call__(self, images):
        self.calls.append(len(images))
        found = [torch.from_numpy(self.tokens(x.permute(1, 2, 0).numpy())) for x in images]
        tokens, first = torch.stack(found), 1 + self.registers
        return Features(tokens[:, 0], tokens[:, 1:first], tokens[:, first:], self.grid, self.size)


def cosine(u, v):
    return float(u @ v) / math.sqrt(float(u @ u) * float(v @ v))


def corners(box):
    """Whole pixels of a box inside the image, or None."""
    if not all(math.isfinite(value) for value in box):
        return None
    return [min(max(math.trunc(value), 0), SIZE) for value in box]


def object_terms(source, edited, boxes, features, tokens):
    """(feature term, L1 term) of RGB images of 512 x 512, by boxes found in the source."""
    feature, pixel = [], []
    for box in boxes:
        cut = corners(box)
        if cut is None or cut[2] <= cut[0] or cut[3] <= cut[1]:
            continue
        a, b = (np.asarray(image.crop(cut)) for image in (source, edited))
        pixel.append(1 - float(np.abs(a / 255 - b / 255).mean()))
        a, b = features.tokens(a), features.tokens(b)
        first = 1 if tokens == "compat" else 1 + features.registers
        means = [sum(row for row in x[first:]) / len(x[first:]) for x in (a, b)]
        feature.append(0.5 * cosine(a[0], b[0]) + 0.5 * cosine(*means))
    if not feature:
        return (0.0, 0.0) if tokens == "compat" else (None, None)
    return sum(feature) / len(feature), sum(pixel) / len(pixel)


def background(boxes, tokens):
    """float64 [512, 512], 1 where no box is."""
    y, x = np.mgrid[:SIZE, :SIZE]
    covered = np.zeros((SIZE, SIZE), dtype=bool)
    for box in boxes:
        cut = corners(box)
        if cut is not None:
            x1, y1, x2, y2 = cut
            if tokens == "compat":
                covered |= (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)
            else:
                covered |= (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    return 1.0 - covered


def exact_shares(mask, grid):
    """Mean of the mask over each cell of the grid, by the mask's integral at the cell's corners."""
    integral = np.zeros((SIZE + 1, SIZE + 1))
    integral[1:, 1:] = mask.cumsum(0).cumsum(1)
    points = np.arange(SIZE + 1)
    for axis, cells in enumerate(grid):
        edges = np.arange(cells + 1) * SIZE / cells
        integral = np.apply_along_axis(lambda f, e=edges: np.interp(e, points, f), axis, integral)
    inside = integral[1:, 1:] - integral[:-1, 1:] - integral[1:, :-1] + integral[:-1, :-1]
    return inside * grid[0] * grid[1] / SIZE**2


def pil_nearest(count):
    """The pixels that PIL's NEAREST takes of 512: it adds up its steps, with their rounding."""
    step, place, taken = SIZE / count, SIZE / count / 2, []
    for _ in range(count):
        taken.append(int(place))
        place += step
    return taken


def compat_shares(mask, count, size):
    """The mask by PIL's NEAREST to the model's size, then by means of overlapping bins."""
    height, width = size
    best, grid = math.inf, None
    for d in range(1, count + 1):
        if count % d == 0 and abs((count // d) / d - height / width) < best:
            best, grid = abs((count // d) / d - height / width), (count // d, d)
    rows, columns = pil_nearest(height), pil_nearest(width)
    seen = mask[rows][:, columns]
    shares = np.zeros(grid)
    for r in range(grid[0]):
        for c in range(grid[1]):
            top, bottom = r * height // grid[0], -(-(r + 1) * height // grid[0])
            left, right = c * width // grid[1], -(-(c + 1) * width // grid[1])
            shares[r, c] = seen[top:bottom, left:right].mean()
    return shares


def background_terms(source, edited, boxes, features, tokens):
    """(feature term, L1 term), by the boxes found in both images."""
    mask = background(boxes, tokens)
    a, b = np.asarray(source), np.asarray(edited)
    difference = np.abs(a / 255 - b / 255).mean(axis=2)
    pixel = 1 - float((difference * mask).sum() / mask.sum()) if mask.any() else None
    first = 1 if tokens == "compat" else 1 + features.registers
    a, b = features.tokens(a)[first:], features.tokens(b)[first:]
    compat = tokens == "compat"
    shares = (
        compat_shares(mask, len(a), features.size) if compat else exact_shares(mask, features.grid)
    ).ravel()
    total = [np.zeros(features.channels), np.zeros(features.channels)]
    weights = 0.0
    for share, u, v in zip(shares, a, b, strict=True):
        if share >= 0.5 - 1e-12:  # the integral is rounded
            weights += share
            total[0] += share * u / math.sqrt(u @ u)
            total[1] += share * v / math.sqrt(v @ v)
    if weights == 0:
        return (0.0 if compat else None), pixel
    return cosine(*(x / (weights + (1e-6 if compat else 0)) for x in total)), pixel


def reference(source, edited, pair, boxes, features, tokens):
    """Four terms of a pair; ``boxes(image, names)`` is what the detector finds."""
    source, edited = (
        image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        for image in (source, edited)
    )
    objects = backgrounds = (None, None)
    if pair.unchanged_objects and (pair.background or tokens == "strict"):
        found = boxes(source, pair.unchanged_objects)
        objects = object_terms(source, edited, found, features, tokens)
    if pair.all_objects and pair.background:
        found = [*boxes(source, pair.all_objects), *boxes(edited, pair.all_objects)]
        backgrounds = background_terms(source, edited, found, features, tokens)
    return {
        "object": objects[0],
        "background": backgrounds[0],
        "object_l1": objects[1],
        "background_l1": backgrounds[1],
    }
