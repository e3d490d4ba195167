"""Version of a class: a hash of its code, so that two versions of a scorer are two judges."""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

DIGITS = 16  # of a hash in hexadecimal


def code_version(scorer: type) -> str | None:
    """Return a hash of the code that a class is made of.

    Hashed are the modules of the class and of all its base classes, those of Python's own library
    aside, and every module that they import from beside the class: of a package what lies in it, of
    a single module what lies in its folder. Import statements are followed anywhere in a file; what
    is imported by a computed name, and files that are read as data, are not seen.

    Returns:
        Hexadecimal; ``None`` if the class is of no file, as in a notebook.

    Example:
        >>> from mteditflow.rewards import Scale
        >>> len(code_version(Scale)), code_version(int)
        (16, None)
    """
    bases = (sys.modules.get(base.__module__) for base in scorer.__mro__)
    own = {x.__name__: _source(x) for x in bases if x is not None and not _of_python(x.__name__)}
    there = {name: file for name, file in own.items() if file is not None}
    if not there:
        return None
    near, files = _neighborhood(*next(iter(there.items()))), dict[str, Path]()
    for name, file in there.items():
        _follow(name, file, near, files)
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:DIGITS]


@dataclass(frozen=True)
class _Neighborhood:
    """Where the modules beside one lie.

    Attributes:
        root: folder that import paths begin at.
        package: the package that they are of; empty: any module of the folder.
    """

    root: Path
    package: str

    def find(self, name: str) -> Path | None:
        """Return the file of a module of here; ``None`` if it lies elsewhere."""
        if self.package and name.split(".")[0] != self.package:
            return None
        place = self.root.joinpath(*name.split("."))
        files = (place.with_name(f"{place.name}.py"), place / "__init__.py")
        return next((file for file in files if file.is_file()), None)


def _of_python(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names and name != "__main__"


def _source(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file) if file and file.endswith(".py") and Path(file).is_file() else None


def _neighborhood(name: str, file: Path) -> _Neighborhood:
    top, *inner = name.split(".")
    package = file.name == "__init__.py"
    installed = {Path(sysconfig.get_path(x)) for x in ("purelib", "platlib")}
    root = file.parents[len(inner) + package]
    alone = not (inner or package) and root not in installed
    return _Neighborhood(root, "" if alone else top)


def _follow(name: str, file: Path, near: _Neighborhood, files: dict[str, Path]) -> None:
    """Add a module and, if it is of a neighborhood, all that it imports of that."""
    if name in files:
        return
    files[name] = file
    if near.find(name) is None:
        return
    for imported in _imports(name, file):
        if (found := near.find(imported)) is not None:
            _follow(imported, found, near, files)


def _imports(name: str, file: Path) -> Iterator[str]:
    """Yield every name that may be a module in the import statements of a file."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from _with_parents(module)
            yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)


def _with_parents(name: str) -> Iterator[str]:
    """Yield a dotted name and the packages that it is in, whose modules run first."""
    parts = name.split(".")
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))
