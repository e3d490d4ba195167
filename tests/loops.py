"""Checks that no loop of assertions iterates over nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Of these, no item is lost: they yield nothing only if what they are given holds nothing.
KEEPING = {"enumerate", "sorted", "reversed", "list", "tuple", "set", "dict", "product", "iter"}
VIEWS = {"items", "values", "keys", "splitlines"}


def some(items: Iterable[T]) -> list[T]:
    """The items, of which there is one at least: over none, assertions prove nothing."""
    found = list(items)
    assert found, "nothing to go over"
    return found


def empty_loops(path: Path) -> Iterator[str]:
    """Loops, ``all`` and ``not any`` of a file that assert something of what may be nothing."""
    tree = ast.parse(path.read_text())
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node, iterable in sorted(asserted(tree), key=lambda pair: pair[0].lineno):
        if not holds_something(iterable, constants):
            yield f"{path.name}:{node.lineno}: {ast.unparse(iterable)}"


def asserted(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Whatever is gone over with an assertion for each item, with the place where it stands."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.AsyncFor)) and any(map(asserts, node.body)):
            yield node.iter, node.iter
        elif isinstance(node, ast.Assert):
            for quantifier in quantifiers(node.test):
                for loop in quantifier.generators:
                    # What a condition leaves may be nothing, whatever is gone over.
                    filtered = ast.Name("filtered", ast.Load())
                    yield loop.iter, filtered if loop.ifs else loop.iter


def asserts(statement: ast.stmt) -> bool:
    """Whether a statement asserts something, or expects an error."""
    for node in ast.walk(statement):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Assert) or called.endswith((".raises", "assert_close")):
            return True
    return False


def quantifiers(test: ast.expr) -> Iterator[ast.GeneratorExp | ast.ListComp]:
    """Comprehensions in ``all(...)``, and those in ``not any(...)``."""
    for node in ast.walk(test):
        denied = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
        call, name = (node.operand, "any") if denied else (node, "all")
        if isinstance(call, ast.Call) and ast.unparse(call.func) == name:
            yield from (x for x in call.args if isinstance(x, (ast.GeneratorExp, ast.ListComp)))


def holds_something(node: ast.expr, constants: dict[str, ast.expr]) -> bool:
    """Whether it can be read off an expression that it has items."""

    def holds(inner: ast.expr) -> bool:
        return holds_something(inner, constants)

    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return any(holds(x.value) if isinstance(x, ast.Starred) else True for x in node.elts)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return any(key is not None or holds(value) for key, value in pairs)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (str, bytes)) and bool(node.value)
    if isinstance(node, ast.Name):
        return node.id in constants and holds(constants[node.id])
    if isinstance(node, ast.BinOp):
        return holds(node.left) or holds(node.right)
    return isinstance(node, ast.Call) and _call_holds(node, constants)


def _call_holds(node: ast.Call, constants: dict[str, ast.expr]) -> bool:
    def holds(inner: ast.expr) -> bool:
        return holds_something(inner, constants)

    name = ast.unparse(node.func).rpartition(".")[2]
    if name == "some":
        return True
    if name == "range":
        numbers = [constants.get(ast.unparse(x), x) for x in node.args]
        return all(isinstance(x, ast.Constant) for x in numbers) and bool(
            range(*(x.value for x in numbers if isinstance(x, ast.Constant)))
        )
    if name == "zip":  # strict: all are as long as one of them
        strict = any(ast.unparse(word) == "strict=True" for word in node.keywords)
        return (any if strict else all)(map(holds, node.args))
    if name in KEEPING:
        return all(map(holds, node.args)) and bool(node.args)
    return name in VIEWS and isinstance(node.func, ast.Attribute) and holds(node.func.value)
