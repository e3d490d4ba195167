"""The public API: ``python -m docs.render_api`` writes api.md and the pages of Sphinx in api/.

Public is what a package of mteditflow names in ``__all__``. The core is shown by the module that a
name comes from; titles are the first lines of docstrings, so nothing is listed by hand.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sphinx.pycode import ModuleAnalyzer

import mteditflow

DOCS = Path(__file__).parent
PAGE, FOLDER = DOCS / "api.md", DOCS / "api"

INTRODUCTION = """\
# The public API in one page

Made by `python -m docs.render_api`; do not edit. {count} names, each with a link to its source.
`make site` builds the reference, with every docstring, in `build/site/api/index.html`.
"""

INDEX = """\
mteditflow
==========

.. automodule:: mteditflow
   :no-members:

Everything that can be imported, from the docstrings. Made by ``python -m docs.render_api``.

.. toctree::
   :maxdepth: 2

"""


@dataclass(frozen=True)
class Name:
    """A public name: what it is, the package to import it from, the module that defines it."""

    package: str
    name: str
    thing: Any
    home: str

    @property
    def documentation(self) -> str:
        """The docstring of a class or function, the ``#:`` comment above anything else."""
        if self.kind == "data":
            return "\n".join(_comments(self.home)["", self.name])
        return inspect.getdoc(self.thing) or ""

    @property
    def kind(self) -> str:
        """The role of Sphinx's Python domain."""
        if inspect.isfunction(inspect.unwrap(self.thing)):
            return "function"
        if not inspect.isclass(self.thing):
            return "data"
        return "exception" if issubclass(self.thing, BaseException) else "class"

    @property
    def signature(self) -> str:
        """Return the call signature without types; empty for names that users do not call."""
        protocol = getattr(self.thing, "_is_protocol", False)
        enumeration = isinstance(self.thing, enum.EnumMeta)
        if self.kind in ("data", "exception") or protocol or enumeration:
            return ""
        whole = inspect.signature(self.thing)
        parameters = [_parameter(p) for p in whole.parameters.values()]
        return str(whole.replace(parameters=parameters, return_annotation=whole.empty))


@dataclass(frozen=True)
class Area:
    """Names that are shown together: those of a package, or of one module of the core."""

    module: str
    names: tuple[Name, ...]

    @property
    def title(self) -> str:
        """The package to import from; in the core also the module, for where it is read."""
        package = self.names[0].package
        module = self.module.removeprefix(package).lstrip("._")
        return f"{package}: {module}" if module else package

    @property
    def about(self) -> str:
        """First line of the docstring of the module."""
        return first_line(importlib.import_module(self.module).__doc__)


class _Shown(str):
    """A default that is shown as the code that names it."""

    __slots__ = ()
    __repr__ = str.__str__


def first_line(documentation: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((documentation or "").strip().split("\n\n")[0].split())


def public_names() -> list[Name]:
    """Every name of every ``__all__``, of the core first, then package by package."""
    walked = pkgutil.walk_packages(mteditflow.__path__, "mteditflow.")
    packages = ["mteditflow", *(module.name for module in walked if module.ispkg)]
    names = []
    for package in packages:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            names.append(Name(package, name, thing, _home(package, name, thing)))
    return names


def areas() -> list[Area]:
    """All public names, grouped."""
    grouped: dict[str, list[Name]] = {}
    for name in public_names():
        key = name.home if name.package == "mteditflow" else name.package
        grouped.setdefault(key, []).append(name)
    shown = [Area(module, tuple(names)) for module, names in grouped.items()]
    return sorted(shown, key=lambda area: (area.names[0].package, area.title))


def page(shown: list[Area]) -> str:
    """The API in one page of Markdown."""
    parts = [INTRODUCTION.format(count=sum(len(area.names) for area in shown))]
    for area in shown:
        parts += [f"## {area.title}\n", f"{_markdown(area.about)}\n"]
        parts += ["| name | what it does |", "|---|---|"]
        parts += [_row(name) for name in area.names]
        parts.append("")
    return "\n".join(parts)


def reference(shown: list[Area]) -> dict[str, str]:
    """The pages of Sphinx, by file name."""
    pages = {f"{area.module}.rst": _reference_page(area) for area in shown}
    listed = "".join(f"   {file.removesuffix('.rst')}\n" for file in pages)
    return {"index.rst": INDEX + listed} | pages


def _row(name: Name) -> str:
    module = importlib.import_module(name.home)
    source = Path(str(module.__file__)).relative_to(DOCS.parent).as_posix()
    call = f"`{name.name}{name.signature}`".replace("|", r"\|")
    return f"| [{call}](../{source}) | {_markdown(first_line(name.documentation))} |"


def _reference_page(area: Area) -> str:
    parts = [area.title, "=" * len(area.title), ""]
    parts += [f".. automodule:: {area.module}", "   :no-members:", "   :no-index:", ""]
    for name in area.names:
        path = f"{name.package}.{name.name}"
        if name.kind == "data":
            text = name.documentation.replace("\n", "\n   ")
            parts += [f".. py:data:: {path}", "", f"   {text}", ""]
        else:
            parts += [f".. auto{name.kind}:: {path}", ""]
    return "\n".join(parts)


def _parameter(parameter: inspect.Parameter) -> inspect.Parameter:
    """Without its type, and with the name alone of a default that is a function."""
    default = parameter.default
    if inspect.isroutine(default):
        default = _Shown(default.__name__)
    return parameter.replace(annotation=parameter.empty, default=default)


def _markdown(text: str) -> str:
    """Return the first line of a docstring as Markdown in a cell."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text).replace("``", "`")
    return text.replace("|", r"\|")


def _home(package: str, name: str, thing: Any) -> str:
    """The module that defines a name: of data, the one that comments on it with ``#:``."""
    if inspect.isclass(thing) or inspect.isfunction(inspect.unwrap(thing)):
        return thing.__module__
    modules = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    for module in (package, *(m.name for m in modules if not m.name.endswith("__main__"))):
        if ("", name) in _comments(module):
            return module
    raise ValueError(f"{package}.{name}: expected a comment that begins with '#:' above it")


@cache
def _comments(module: str) -> dict[tuple[str, str], list[str]]:
    analyzer = ModuleAnalyzer.for_module(module)
    return analyzer.find_attr_docs()


def main() -> None:
    """Write all pages, and remove those of modules that are gone."""
    shown = areas()
    PAGE.write_text(page(shown), encoding="utf-8")
    pages = reference(shown)
    for file in FOLDER.glob("*.rst"):
        if file.name not in pages:
            file.unlink()
    for file, text in pages.items():
        (FOLDER / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
