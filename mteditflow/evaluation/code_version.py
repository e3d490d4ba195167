"""Version of a class as a hash of its code, so that a changed scorer counts as another judge."""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

DIGITS = 16  # hexadecimal digits of a version


def code_version(scorer: type) -> str | None:
    """Return a hash of the source code that defines a class.

    The hash covers the modules of the class and of all its base classes except the standard
    library, and every module that they import, directly or not, from the neighborhood of the class:
    its top-level package, or the folder of a single module. Import statements are found anywhere in
    a file. Modules that are imported by a computed name and data files are not covered.

    Returns:
        16 hexadecimal digits; ``None`` if the class has no source file, as in a notebook.

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
        digest.update(file.read_bytes())  # comments and docstrings too: a docstring may be a prompt
    return digest.hexdigest()[:DIGITS]


@dataclass(frozen=True)
class _Neighborhood:
    """Modules that belong to the code of a class.

    Attributes:
        root: folder that import paths are relative to.
        package: top-level package of the modules; empty for any module of the folder.
    """

    root: Path
    package: str

    def find(self, name: str) -> Path | None:
        """Return the file of a module in the neighborhood; ``None`` if it is outside."""
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
    # A module alone in site-packages is its own neighborhood, else all installed code would be.
    alone = not (inner or package) and root not in installed
    return _Neighborhood(root, "" if alone else top)


def _follow(name: str, file: Path, near: _Neighborhood, files: dict[str, Path]) -> None:
    """Add a module and, if it is in the neighborhood, all modules that it imports from there."""
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
            # A relative import of level 1 begins at the package itself, of level 2 at its parent.
            parts = package.split(".")
            above = parts[: len(parts) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from _with_parents(module)
            yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)


def _with_parents(name: str) -> Iterator[str]:
    """Yield a dotted name after its parent packages, whose ``__init__`` modules run first."""
    parts = name.split(".")
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))
