"""One driver carries out the actions of each core, in every world; and the virtual world is small.

What the fault histories and the replay test is then what runs in production.
"""

import ast
import functools
import importlib
import io
import tokenize
import typing
from pathlib import Path

import pytest

from fedmq.broker.core import events as broker_events
from fedmq.broker.link import events
from fedmq.nodes.messages import actions
from fedmq.nodes.worker import core

ROOT = Path(__file__).parent.parent
ROOMS = ("broker", "nodes", "tests")
DRIVERS = {
    "broker/driver.py": broker_events.Action,
    "broker/link/node_link.py": events.Action,
    "nodes/aggregator/driver.py": actions.AggregatorAction,
    "nodes/worker/driver.py": core.Action,
}
ELSEWHERE = {
    # Actions of one core that are an event of another.
    "broker/link/core.py": {events.PostMessage},
    "nodes/worker/core.py": {events.Delivery},
    # How people hear of the connection.
    "broker/link/dealer.py": {events.Blocked, events.OutOfTouch, events.BackInTouch},
}
VIRTUAL = ("broker/virtual/*.py", "nodes/simulation/virtual_*.py")
OF_SIMULATIONS = {"side_tasks.py", "plain_disk.py"}
"""Parts of `fedmq simulate` alone: work beside a program, and a disk without faults."""
MOST_VIRTUAL_LINES = 1185
"""Lines of code that the fault histories and simulations run in place of live code; some 90 of them
let simulations start other nodes than the histories' workers."""


def resolved(name: ast.expr, imported: dict[str, str], module: str) -> object:
    """Return what a name in a pattern stands for."""
    *head, last = ast.unparse(name).split(".")
    if head:
        source = imported.get(head[0], module)
    else:
        source, _, last = imported.get(last, f"{module}.{last}").rpartition(".")
    return getattr(importlib.import_module(source), last, None)


@functools.cache
def matched(path: Path) -> frozenset[object]:
    """Return the classes that a file's ``case`` patterns name."""
    tree = ast.parse(path.read_text())
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(parts if parts[0] == "tests" else ("fedmq", *parts))
    patterns = [each.cls for each in ast.walk(tree) if isinstance(each, ast.MatchClass)]
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return frozenset(resolved(each, imported, module) for each in patterns)


FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_driver_carries_out_every_action_of_its_core(driver: str) -> None:
    assert set(typing.get_args(DRIVERS[driver])) <= matched(ROOT / driver)


def test_no_other_file_carries_out_actions() -> None:
    classes = {each for union in DRIVERS.values() for each in typing.get_args(union)}
    found = {}
    for path in FILES:
        name = str(path.relative_to(ROOT))
        if name not in DRIVERS:
            others = (matched(path) & classes) - ELSEWHERE.get(name, set())
            if others:
                found[name] = sorted(each.__name__ for each in others)
    assert found == {}


def code_lines(path: Path) -> int:
    """Return the number of lines of code, without comments and docstrings."""
    text = path.read_text()
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_only_ports_and_fakes_are_left_to_the_virtual_world() -> None:
    files = [
        path for each in VIRTUAL for path in ROOT.glob(each) if path.name not in OF_SIMULATIONS
    ]
    lines = sum(map(code_lines, files))
    assert lines <= MOST_VIRTUAL_LINES, f"{lines} lines of code run in the virtual world only"
