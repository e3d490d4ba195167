"""Counts over chains, as numbers, table and plot."""

import io

import pytest
from PIL import Image
from rich.console import Console

from mteditflow.chains import Chain
from mteditflow.planner.statistics import (
    category,
    draw_statistics,
    statistics,
    statistics_table,
)


def chain(tasks, names, number=1):
    return Chain(
        id=str(number),
        image="1.png",
        instructions=("do",) * len(tasks),
        task_types=tasks,
        all_objects=(names,) * len(tasks),
    )


CHAINS = [
    chain(("subject_add", "color_alter"), ("red chair", "old chairs", "cup of tea")),
    chain(("subject_add",), ("chair", "man in a hat")),
    Chain(id="3", image="3.png", instructions=("a", "b", "c")),
]


def test_golden_counts():
    counted = statistics(CHAINS)
    assert counted.steps == {"unknown": 3, "subject_add": 2, "color_alter": 1}
    assert counted.categories == {"chair": 2, "cup": 1, "man": 1, "unknown": 1}
    assert counted.turns == {1: 1, 2: 1, 3: 1}
    assert list(counted.steps) == ["unknown", "subject_add", "color_alter"]
    assert list(counted.categories) == ["chair", "cup", "man", "unknown"]


def test_no_chains_count_nothing():
    counted = statistics([])
    assert (counted.steps, counted.categories, counted.turns) == ({}, {}, {})


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "Red wooden chairs": "chair",
        "glass of water": "glass",
        "two glasses": "glass",
        "woman with a red bag": "woman",
        "people": "person",
        "school bus": "bus",
        "buses": "bus",
        "berries": "berry",
        "pie": "pie",
        "tie": "tie",
        "cookies": "cookie",
        "benches": "bench",
        "t-shirts": "t-shirt",
        "tennis": "tennis",
        "cactus": "cactus",
        "dress": "dress",
        "horses": "horse",
        "vases": "vase",
        "shoes": "shoe",
        "tomatoes": "tomato",
        "inside door of a car": "door",
        "on": "on",  # no head before a preposition: the word itself
        "café": "café",
        "…": "…",
    }.items(),
)
def test_the_category_is_the_head_noun(name, expected):
    assert category(name) == expected


def test_the_table_has_all_counts():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(statistics_table(statistics(CHAINS)))
    text = console.export_text()
    for part in ("3 chains, 6 steps", "subject add", "33.3%", "chair", "66.7%", "3 turns"):
        assert part in text


def test_the_plot_is_a_picture(tmp_path):
    many = [
        chain(("subject_add",), tuple(f"thing{i} x{i}" for i in range(40)), n) for n in range(3)
    ]
    for chains in (CHAINS, many):
        draw_statistics(statistics(chains), tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as image:
            image.load()
            assert image.width > 1000
