"""No test asserts something of each item where there may be no item: it would prove nothing."""

from pathlib import Path

import pytest

from tests.loops import empty_loops, some

TESTS = Path(__file__).parent


def test_no_assertion_goes_over_what_may_be_nothing():
    files = some(sorted(TESTS.rglob("*.py")))
    found = [where for path in files for where in empty_loops(path)]
    assert found == [], "name what is gone over, or wrap it in tests.loops.some"


def test_nothing_to_go_over_fails():
    assert some(x for x in "ab") == ["a", "b"]
    with pytest.raises(AssertionError, match="nothing to go over"):
        some({}.items())


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("for x in found:\n    assert x", [1]),
        ("for x in found:\n    check(x)", []),  # what it asserts is not to be seen here
        ("for x in found:\n    with pytest.raises(ValueError):\n        x()", [1]),
        ("for x in some(found):\n    assert x", []),
        ("for x in enumerate(some(found)):\n    assert x", []),
        ("for x, y in zip((1, 2), found, strict=True):\n    assert x == y", []),
        ("for x, y in zip((1, 2), found):\n    assert x == y", [1]),
        ("for x in range(3):\n    assert x", []),
        ("for x in range(0):\n    assert x", [1]),
        ("N = 3\nfor x in range(N):\n    assert x", []),
        ("for x in range(n):\n    assert x", [1]),
        ("NAMES = ()\nfor x in NAMES:\n    assert x", [2]),
        ("NAMES = {'a': 1}\nfor x in NAMES.items():\n    assert x", []),
        ("for x in (*found,):\n    assert x", [1]),
        ("for x in (1, *found):\n    assert x", []),
        ("assert all(x for x in found)", [1]),
        ("assert all(x for x in some(found))", []),
        ("assert all(x for x in (1, 2) if x > 1)", [1]),
        ("assert not any(x for x in found)", [1]),
        ("assert any(x for x in found)", []),
        ("assert all(found)", []),  # a tensor or an array; a list is for its writer to name
    ],
)
def test_what_may_be_nothing_is_found(tmp_path, code, lines):
    (tmp_path / "test_x.py").write_text(code)
    assert [int(where.split(":")[1]) for where in empty_loops(tmp_path / "test_x.py")] == lines
