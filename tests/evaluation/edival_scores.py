"""Synthetic scores of EdiVal-Bench's images, and the official aggregation of them in plain Python.

Written apart from the library: its own reader of the CSV, its own rule for which terms of
consistency exist, its own means. Every number depends on (image, turn, kind) alone.
"""

from __future__ import annotations

import ast
import csv
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[2]
TURNS = 3
FILE = (
    Path(os.environ.get("MTEDITFLOW_SHARED", ROOT.parent / "shared")) / "data" / "edival_bench.csv"
)


def rows(file: Path = FILE) -> Mapping[str, list[Mapping[str, str]]]:
    """Rows of the CSV by image, in the order of turns."""
    images: dict[str, list[Mapping[str, str]]] = {}
    with file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            images.setdefault(row["image_index"], []).append(row)
    return {name: sorted(own, key=lambda row: int(row["turns"])) for name, own in images.items()}


def drawn(image: str, turn: int, kind: str) -> float:
    """A number of an image at a turn (from 1): "following" is 0 or 1, a term is in [0.5, 1]."""
    number = random.Random(f"{image}/{turn}/{kind}").random()
    return float(number < 0.85 - 0.15 * turn) if kind == "following" else 0.5 + number / 2


def terms_of(row: Mapping[str, str], *, compat: bool) -> Iterator[str]:
    """Terms of consistency that there is something to measure for at a turn."""
    kept = row["bg_consistency"].strip().lower() == "true"
    if compat and not kept:
        return  # the public scorer has no consistency at all then
    if ast.literal_eval(row["unchanged_objects"]):
        yield "object"
    if kept and ast.literal_eval(row["all_objects"]):
        yield "background"


def official(images: Mapping[str, list[Mapping[str, str]]], *, compat: bool) -> list[list[float]]:
    """IF, Marginal and CC in percent and the number of images with CC, turn by turn.

    IF and Marginal over ALL images; CC is the mean of the means of both terms, each over the images
    that have it.
    """
    result = []
    for turn in range(1, TURNS + 1):
        so_far = [all(drawn(x, t, "following") for t in range(1, turn + 1)) for x in images]
        own = [drawn(x, turn, "following") for x in images]
        found: dict[str, list[float]] = {"object": [], "background": []}
        measured = 0
        for name, of_image in images.items():
            terms = list(terms_of(of_image[turn - 1], compat=compat))
            measured += bool(terms)
            for term in terms:
                found[term].append(drawn(name, turn, term))
        consistency = fmean(fmean(values) for values in found.values())
        result.append([100 * fmean(so_far), 100 * fmean(own), 100 * consistency, measured])
    return result
