"""Who may import whom: DESIGN's rooms, held by walking the syntax trees."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "codecs": set(),
    "broker": set(),
    "algorithms": {"codecs"},
    "nodes": {"codecs", "broker", "algorithms"},
}
MAY_IMPORT_ZMQ = {"broker/router.py", "broker/link/dealer.py", "broker/wire/sockets.py"}
FILES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


@functools.cache
def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("fedmq.")}
    assert rooms <= MAY_IMPORT[room] | {room, "_lazy"}  # with which a room exports its names


def test_only_the_two_loops_and_their_sockets_import_zmq() -> None:
    users = {str(path.relative_to(ROOT)) for path in FILES if "zmq" in imports(path)}
    assert users == MAY_IMPORT_ZMQ


def test_the_broker_imports_no_torch_and_nothing_unpickles() -> None:
    for path in FILES:
        names = {name.split(".")[0] for name in imports(path)}
        assert "pickle" not in names
        if path.is_relative_to(ROOT / "broker"):
            assert "torch" not in names


def test_files_hold_one_idea_each() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
