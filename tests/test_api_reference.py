"""docs/api.md and the pages of Sphinx: current, complete, and every name of them documented."""

import importlib
import pkgutil
import re

import pytest

import mteditflow
from docs.render_api import FOLDER, PAGE, areas, page, reference
from tests.loops import some

PACKAGES = ["mteditflow"] + [
    module.name
    for module in pkgutil.walk_packages(mteditflow.__path__, "mteditflow.")
    if module.ispkg and hasattr(importlib.import_module(module.name), "__all__")
]
STALE = "run python -m docs.render_api"


@pytest.fixture(scope="module")
def shown():
    return areas()


def test_page_is_current(shown):
    assert PAGE.read_text() == page(shown), STALE


def test_pages_of_the_reference_are_current(shown):
    written = {file.name: file.read_text() for file in FOLDER.glob("*.rst")}
    assert written == reference(shown), STALE


@pytest.mark.parametrize("package", PACKAGES)
def test_both_have_every_public_name(package):
    public = set(importlib.import_module(package).__all__)
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    own = "".join(s for s in sections if re.match(rf"{re.escape(package)}(: .*)?\n", s))
    assert set(re.findall(r"^\| \[`(\w+)", own, flags=re.MULTILINE)) == public
    pages = "".join(file.read_text() for file in FOLDER.glob("*.rst"))
    assert set(re.findall(rf"^\.\. [\w:]+:: {package}\.(\w+)$", pages, re.MULTILINE)) >= public


def test_every_name_says_in_one_line_what_it_is_and_where(shown):
    for row in some(re.findall(r"^\| \[.*$", PAGE.read_text(), flags=re.MULTILINE)):
        call, source, about = re.fullmatch(r"\| \[`(.*)`\]\(\.\./(.*)\) \| (.*) \|", row).groups()
        assert (PAGE.parents[1] / source).is_file(), row
        assert about.endswith((".", "?", ":")), row
        assert " at 0x" not in call, row
