"""The site: links and anchors of all pages lead somewhere, on GitHub and there; its extensions."""

import io
import json
import re
from pathlib import Path

import pytest
from sphinx.application import Sphinx

from docs import site_links
from docs.render_notebooks import notebooks
from docs.site_notebooks import page_of

# MyST reads an attribute that Sphinx 11 will not have.
pytestmark = pytest.mark.filterwarnings("ignore:'myst_parser:PendingDeprecationWarning")
ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md"))
PAGES += sorted(ROOT.glob("examples/*/README.md")) + notebooks()
LINK = re.compile(r"\]\((?!https?:|data:)([^)\s#]*)(?:#([^)\s]*))?\)")
FENCED = re.compile(r"^( *)(`{3,})[^`\n]*\n.*?^\1\2$", flags=re.MULTILINE | re.DOTALL)


def prose(file):
    """A page without its code."""
    text = file.read_text(encoding="utf-8")
    text = page_of(json.loads(text)) if file.suffix == ".ipynb" else text
    return FENCED.sub("", text)


def anchors(file):
    """The anchors that GitHub gives the headings of a page."""
    names = []
    for heading in re.findall(r"^#+ +(.*?) *$", prose(file), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        names.append(f"{name}-{names.count(name)}" if name in names else name)
    return names


def leads_somewhere(file, path, anchor):
    """Whether a link of a page is to a file of the repository, and its anchor to a heading."""
    target = (file.parent / path).resolve() if path else file
    there = target.exists() and target.is_relative_to(ROOT)
    return there and (not anchor or anchor in anchors(target))


@pytest.mark.parametrize("file", PAGES, ids=lambda x: x.relative_to(ROOT).as_posix())
def test_links_and_anchors_lead_somewhere(file):
    assert [link for link in LINK.findall(prose(file)) if not leads_somewhere(file, *link)] == []


def test_every_page_is_in_the_navigation_once():
    index = (ROOT / "docs" / "index.rst").read_text()
    shown = re.findall(r"^   [^:\n]+ <([\w/]+)>$", index, flags=re.MULTILINE)
    files = [*ROOT.glob("docs/*.md"), *notebooks(), ROOT / "docs/api/index.rst"]
    pages = [x.relative_to(ROOT / "docs").with_suffix("").as_posix() for x in files]
    assert sorted(shown) == sorted(pages)


def test_the_landing_page_shows_the_loss_of_the_readme():
    fenced = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    index = (ROOT / "docs" / "index.rst").read_text()
    assert "".join(f"   {x}".rstrip() + "\n" for x in fenced.splitlines()) in index


BOOK = {
    "cells": [
        {"cell_type": "markdown", "source": ["# A book\n", "\n", "[code](../../lib/code.py)"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["one\n"]},
                {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}},
            ],
        },
    ]
}
FILES = {
    "CHANGELOG.md": "# Changes\n\n[a page](docs/index.md#second-part)\n",
    "lib/code.py": "def answer():\n    return 42\n",
    "lib/other.py": "",
    "docs/changelog.md": "# Changes\n\nelsewhere\n",
    "docs/data.json": "{}",
    "docs/drawn.svg": '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "docs/index.md": """\
# A site

[code](../lib/code.py) [folder](../lib) [log](../CHANGELOG.md)
[data](data.json) [below](#second-part)

![drawn](drawn.svg)

## Second part

```{toctree}
changelog
books/book
```
""",
    "docs/books/book.ipynb": json.dumps(BOOK),
}


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds a small repository with the extensions of the site; its warnings."""

    def built(**changed):
        for path, text in (FILES | changed).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        monkeypatch.setattr(site_links, "ROOT", tmp_path)
        folder, warnings = tmp_path / "docs", io.StringIO()
        app = Sphinx(
            folder,
            None,
            tmp_path / "site",
            tmp_path / "trees",
            "html",
            confoverrides={
                "extensions": ["myst_parser", "docs.site_links", "docs.site_notebooks"],
                "myst_heading_anchors": 2,
            },
            status=None,
            warning=warnings,
        )
        app.build()
        return warnings.getvalue()

    return built


def test_links_that_leave_docs_lead_to_pages_of_the_site(build, tmp_path):
    assert build() == ""
    site = tmp_path / "site"
    index = (site / "index.html").read_text()
    for address in ("source/lib/code.py.html", "source/lib.html", "changelog.html"):
        assert f'href="{address}"' in index
        assert (site / address).is_file()
    assert re.search(r'href="_downloads/\w+/data.json"', index)
    assert re.search(r'<a [^>]*href="_images/drawn.svg"><img ', index)  # in full size
    assert "answer" in (site / "source/lib/code.py.html").read_text()
    listing = (site / "source/lib.html").read_text()
    assert '<a href="lib/code.py.html">code.py</a>' in listing
    assert "<code>other.py</code>" in listing  # no page links to it
    changes = (site / "changelog.html").read_text()
    assert 'href="index.html#second-part"' in changes
    assert "elsewhere" not in changes


def test_a_notebook_is_a_page_with_its_outputs(build, tmp_path):
    build()
    page = (tmp_path / "site" / "books" / "book.html").read_text()
    assert "<h1>A book" in page
    assert 'href="../source/lib/code.py.html"' in page
    assert 'src="data:image/png;base64,iVBORw0KGgo="' in page
    assert page.index("print") < page.index("one") < page.index("iVBOR")


@pytest.mark.parametrize("link", ["#third-part", "changelog.md#none", "../lib/none.py", "none.md"])
def test_a_link_to_nothing_is_a_warning(build, link):
    text = FILES["docs/index.md"].replace("../lib/code.py", link)
    assert "xref_missing" in build(**{"docs/index.md": text})


def test_the_source_of_a_documented_name_has_an_address():
    def address(module, fullname):
        return site_links.source_address("py", {"module": module, "fullname": fullname})

    assert re.fullmatch(
        r"\.\./source/mteditflow/losses/nft\.py\.html#L-\d+", address("mteditflow", "nft_loss")
    )
    assert address("mteditflow", "Trajectory.clean").startswith("../source/mteditflow/flow/")
    assert address("mteditflow.chains", "TASK_TYPES") is None  # data
    assert site_links.source_address("c", {}) is None
