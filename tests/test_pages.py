"""Pages for contributors: paths and functions that they name exist, and their example works."""

import ast
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from mteditflow.objectives import Objective
from tests.loops import some

ROOT = Path(__file__).parents[1]
PAGES = ("docs/architecture.md", "CONTRIBUTING.md", "docs/trust.md")
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)\)")
NAME = re.compile(r"`([A-Za-z_][\w.]*)`")
# A path of the worked example that is there only once somebody follows it.
EXAMPLE = re.compile(r"(?:losses|objectives)/(?:test_)?reinforce\.py$")


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def defined(file):
    """Names that a file defines at its top, and those of its classes as ``Class.name``."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {x.id for x in targets if isinstance(x, ast.Name)}
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            functions = (ast.FunctionDef, ast.AsyncFunctionDef)
            names |= {f"{node.name}.{x.name}" for x in node.body if isinstance(x, functions)}
    return names


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_define_what_they_name(page):
    links = LINK.findall(text(page))
    assert len(links) > 10
    for shown, path in some(links):
        target = ((ROOT / page).parent / path).resolve()
        assert target.exists(), f"{page}: {path} does not exist"
        name = NAME.fullmatch(shown)
        if name and target.suffix == ".py":
            assert name[1] in defined(target), f"{page}: {path} defines no {name[1]}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_the_text_exist(page):
    folders = r"(?:tests|examples|benchmarks|docs|mteditflow)/[\w./]*"
    named = re.findall(rf"`({folders})`", text(page))  # some pages link, and name none
    assert [x for x in named if not (EXAMPLE.search(x) or (ROOT / x).exists())] == []


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in some(re.findall(r"make ([a-z-]+)`", text(page))):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page}: make {target}"


def example():
    """Files of the worked example by path, in the order of CONTRIBUTING.md."""
    blocks = re.findall(r"^```python\n# ([\w/]+\.py)\n(.*?)^```", text(PAGES[1]), re.M | re.S)
    return dict(blocks)


def test_the_worked_example_is_an_objective_whose_tests_pass(monkeypatch):
    modules = {}
    for path, code in some(example().items()):
        assert max(map(len, code.splitlines())) <= 100  # as ruff wants it
        module = ModuleType(path.removesuffix(".py").replace("/", "."))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, path, "exec"), vars(module))
        modules[path] = module
    loss, objective, tests = modules.values()
    assert loss.__name__.startswith("mteditflow.losses.")
    kinds = [x for x in vars(objective).values() if getattr(x, "card", None)]
    assert all(issubclass(x, Objective) for x in some(kinds))
    assert any(x.__module__ == objective.__name__ for x in kinds)
    ran = [test() for name, test in vars(tests).items() if name.startswith("test_")]
    assert len(ran) >= 4
