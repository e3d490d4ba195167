"""Sphinx extension: links that leave docs/ lead to pages of the site.

Markdown pages link to the files of the repository by relative paths, which GitHub follows. On the
site such a file has a page with its highlighted source, a folder a page with what it holds, and
CONTRIBUTING.md and CHANGELOG.md are pages like those of docs/. No host of the repository is needed.
What is not there is left to MyST, which warns.
"""

from __future__ import annotations

import html
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.util.osutil import relative_uri

ROOT = Path(__file__).parents[1]
#: Pages of docs/ that show a file outside of it.
SHOWN = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}
SOURCES = {".py": "python", ".md": "markdown", ".rst": "rst", ".toml": "toml"}
LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def source_address(domain: str, info: dict[str, str]) -> str | None:
    """Address of the source of a documented name, from the pages in api/; for sphinx.ext.linkcode.

    None where there is no source, as for data.
    """
    if domain != "py" or not info["module"]:
        return None
    thing = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        thing = getattr(thing, name, None)
    try:
        thing = inspect.unwrap(getattr(thing, "fget", None) or thing)
        file = Path(str(inspect.getsourcefile(thing))).resolve()
        line = inspect.getsourcelines(thing)[1]
    except (TypeError, OSError):
        return None
    if not file.is_relative_to(ROOT):
        return None
    path = file.relative_to(ROOT).as_posix()
    _WANTED.add(path)
    return f"../source/{path}.html#L-{line}"


#: Paths below the root that have a page in this build.
_WANTED: set[str] = set()


def show_file(_app: Any, docname: str, source: list[str]) -> None:
    """Put the file of the root in place of the page that stands for it."""
    if docname in SHOWN:
        text = (ROOT / SHOWN[docname]).read_text(encoding="utf-8")
        source[0] = LINK.sub(r"](../\1)", text)


def lead_to_sources(app: Any, tree: nodes.document) -> None:
    """Replace links to files and folders by links to their pages.

    Runs before Sphinx copies the targets of downloads.
    """
    docname = app.env.current_document.docname
    kinds = (addnodes.download_reference, addnodes.pending_xref)
    for link in [x for kind in kinds for x in tree.findall(kind) if x.get("reftype") == "myst"]:
        path = link["reftarget"].split("#")[0]
        if link.get("refdomain") == "doc":  # a Markdown page, absolute where it is not in docs/
            if not path.startswith("/"):
                continue
            path += ".md"
        target = (Path(app.srcdir, docname).parent / path).resolve()
        page = _page(target) if path else None
        if page is None:
            continue
        address = app.builder.get_relative_uri(docname, page)
        reference = nodes.reference("", "", *link.children, refuri=address, internal=True)
        link.replace_self(reference)


def enlarge_images(app: Any, tree: nodes.document, docname: str) -> None:
    """Make each picture a link to itself in full size."""
    folder = relative_uri(app.builder.get_target_uri(docname), app.builder.imagedir)
    for image in list(tree.findall(nodes.image)):
        if image["uri"] in app.env.images and not isinstance(image.parent, nodes.reference):
            address = f"{folder}/{app.env.images[image['uri']][1]}"
            image.replace_self(nodes.reference("", "", image.deepcopy(), refuri=address))


def _page(target: Path) -> str | None:
    """Name of the page of a file or folder; None if it has none."""
    if not target.exists() or not target.is_relative_to(ROOT):
        return None
    path = target.relative_to(ROOT).as_posix()
    for docname, shown in SHOWN.items():
        if path == shown:
            return docname
    if path == "README.md":
        return "index"
    if target.is_file() and target.suffix not in SOURCES:
        return None
    _WANTED.add(path)
    return f"source/{path}"


def source_pages(app: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Pages of all files and folders that were linked to.

    Pages of one depth share the navigation, which Sphinx would make anew for each.
    """
    navigation: dict[int, str] = {}

    def toctree(page: str, **options: Any) -> str:
        depth = page.count("/")
        if depth not in navigation:
            navigation[depth] = app.builder._get_local_toctree(page, **options)
        return navigation[depth]

    for path in sorted(_WANTED):
        target = ROOT / path
        if target.is_file():
            body = app.builder.highlighter.highlight_block(
                target.read_text(encoding="utf-8"), SOURCES[target.suffix], lineanchors="L"
            )
        else:
            body = _listing(app, path)
        context = {
            "title": path,
            "body": f"<h1><code>{html.escape(path)}</code></h1>\n{body}",
            "toctree": partial(toctree, f"source/{path}"),
        }
        yield f"source/{path}", context, "page.html"


def _listing(app: Any, path: str) -> str:
    rows = []
    for file in sorted((ROOT / path).iterdir()):
        name, shown = file.name, file.relative_to(ROOT).as_posix()
        if name.startswith((".", "__pycache__")):
            continue
        if shown in _WANTED:
            address = app.builder.get_relative_uri(f"source/{path}", f"source/{shown}")
            name = f'<a href="{html.escape(address)}">{html.escape(name)}</a>'
        rows.append(f"<li><code>{name}</code></li>")
    return f"<ul>{''.join(rows)}</ul>"


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    _WANTED.clear()
    app.connect("source-read", show_file)
    app.connect("doctree-read", lead_to_sources, priority=100)
    app.connect("doctree-resolved", enlarge_images)
    app.connect("html-collect-pages", source_pages)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
