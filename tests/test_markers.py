"""A test that starts processes or opens sockets is marked end_to_end, so `make check` skips it."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "tests").rglob("test_*.py"))
STARTS = {"subprocess", "multiprocessing", "fork", "BrokerServer", "create_server", "zmq"}
"""Modules, functions and classes by which a test starts a process or opens a socket."""


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def words(node: ast.AST) -> set[str]:
    """Return the names, attributes and arguments (which are fixtures) in a piece of code."""
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            found.add(each.id)
        elif isinstance(each, ast.Attribute):
            found.add(each.attr)
        elif isinstance(each, ast.arg):
            found.add(each.arg)
    return found


@functools.cache
def starting(path: Path) -> frozenset[str]:
    """Return `STARTS`, and what reaches it by way of this module's imports and definitions."""
    found, definitions = set(STARTS), {}
    for node in tree(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            helper = ROOT.joinpath(*str(node.module).split(".")).with_suffix(".py")
            if helper.exists():
                found |= {each.name for each in node.names} & starting(helper)
        elif isinstance(node, ast.Import):
            found |= {each.asname for each in node.names if each.asname and each.name in STARTS}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = words(node)
    before = 0
    while len(found) > before:
        before = len(found)
        found |= {name for name, used in definitions.items() if used & found}
    return frozenset(found)


def is_marked(node: ast.AST) -> bool:
    return "end_to_end" in words(node)


def unmarked(path: Path) -> list[str]:
    body = tree(path).body
    if any(is_marked(node) for node in body if isinstance(node, ast.Assign)):
        return []
    return [
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and words(node) & starting(path)
        and not any(map(is_marked, node.decorator_list))
    ]


@pytest.mark.slow
def test_what_starts_processes_or_opens_sockets_is_marked() -> None:
    found = {str(path.relative_to(ROOT)): unmarked(path) for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}
