"""Lazy public names: loaded on first use, complete, and clear about a missing extra."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

from tests.loops import some

LAZY = ["mteditflow", "mteditflow.rewards"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``needy`` with a name that loads, one that is not there, and two that fail."""
    folder = tmp_path / "needy"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from mteditflow._lazy import lazy\n"
        "table = {'plain': '.good', 'gone': '.good', 'lacking': '.lacking', 'buggy': '.buggy'}\n"
        "__getattr__, __dir__ = lazy(__name__, table, 'rewards')\n"
    )
    (folder / "good.py").write_text("plain = object()\n")
    (folder / "lacking.py").write_text("import absent_package.part\n")
    (folder / "buggy.py").write_text("from mteditflow._lazy import misspelled\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("needy")
    for name in [name for name in sys.modules if name.partition(".")[0] == "needy"]:
        del sys.modules[name]


def test_a_name_is_loaded_on_first_use_and_stays(package):
    assert "needy.good" not in sys.modules
    assert "plain" not in vars(package)
    plain = package.plain
    assert vars(package)["plain"] is plain is sys.modules["needy.good"].plain
    assert "needy.lacking" not in sys.modules


def test_a_module_of_the_package_is_an_attribute_as_if_it_were_imported(package):
    (Path(package.__file__).parent / "plainly.py").write_text("value = 7\n")
    (Path(package.__file__).parent / "failing.py").write_text("import absent_package\n")
    importlib.invalidate_caches()
    assert "needy.plainly" not in sys.modules
    assert package.plainly is sys.modules["needy.plainly"]
    assert package.plainly.value == 7
    with pytest.raises(ImportError, match=r"failing needs absent_package: pip install"):
        _ = package.failing


def test_dir_lists_every_name_before_and_after_use(package):
    names = dir(package)
    assert {"plain", "gone", "lacking", "buggy", "__name__"} <= set(names)
    assert names == sorted(names)
    assert package.plain
    assert set(dir(package)) == {*names, "good"}  # the submodule


def test_a_name_that_is_not_in_the_table_is_no_attribute(package):
    assert not hasattr(package, "absent")
    with pytest.raises(AttributeError, match=r"module 'needy' has no attribute 'absent'"):
        _ = package.absent
    with pytest.raises(AttributeError, match="gone"):
        _ = package.gone


def test_a_missing_package_is_named_with_the_extra_that_has_it(package):
    message = r"^needy\.lacking needs absent_package: pip install 'mteditflow\[rewards\]'$"
    with pytest.raises(ImportError, match=message) as caught:
        _ = package.lacking
    assert caught.value.name == "absent_package"


def test_a_bug_of_mteditflow_is_not_taken_for_a_missing_extra(package):
    with pytest.raises(ImportError, match="cannot import name 'misspelled'"):
        _ = package.buggy


@pytest.mark.parametrize("name", LAZY)
def test_tables_agree_with_all_and_with_what_type_checkers_see(name):
    package = importlib.import_module(name)
    tree = ast.parse(Path(package.__file__).read_text())
    (branch,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (table,) = [node for node in ast.walk(branch) if isinstance(node, ast.Dict)]
    lazily = {public: f"{name}{module}" for public, module in ast.literal_eval(table).items()}
    assert lazily == seen
    assert sorted(package.__all__) == sorted(seen)
    for public, module in some(seen.items()):
        assert getattr(package, public) is getattr(importlib.import_module(module), public)
    assert set(package.__all__) <= set(dir(package))
