"""Addresses, roles, and the names of runs and nodes.

Names are used for files, folders and addresses and are printed on terminals, so both ends check
them: the broker when a Hello arrives; a node before it sends Hello, and when a Welcome names its
run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from fedmq.broker.wire.schema import Hello

AGGREGATOR = "aggregator"
EVALUATOR = "evaluator"
WORKER = "worker"
OBSERVER = "observer"
ROLES = (AGGREGATOR, EVALUATOR, WORKER, OBSERVER)
BROKER = "broker"

MAX_RANGES = 1000
"""Most ranges of clients in one Hello, or in one message about their availability."""
MAX_CLIENTS = 1 << 20
"""Most clients of a run."""

CONTINUED = "continued"
"""Kind of the broker's message that a run has been continued."""

AVAILABILITY = "availability"
"""Kind of a worker's message to the aggregator that some of its clients came back or went away."""

CLIENT = "client"
"""The address of client 17 is ``client/17``."""
RECORD = "record"
CHECKPOINT = "checkpoint"
TIMER = "timer"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHOWN = 120


def name_fault(name: str) -> str:
    """Return what is wrong with the name of a run or a node; "" if it is valid."""
    if _NAME.fullmatch(name):
        return ""
    return (
        "expected 1 to 100 ASCII letters, digits, '.', '_' and '-', the first a letter or a "
        f"digit, got {name[:_SHOWN]!r}"
    )


def addresses(hello: Hello) -> Iterator[str]:
    """Yield the addresses that a node hosts."""
    yield node_address(hello.node)
    if hello.role == WORKER:
        for low, high in hello.clients:
            for client in range(low, high + 1):
                yield f"{CLIENT}/{client}"
    elif hello.role in (AGGREGATOR, EVALUATOR):
        yield hello.role


def num_addresses(hello: Hello) -> int:
    """Return the number of addresses that a node hosts."""
    if hello.role == WORKER:
        return 1 + sum(high - low + 1 for low, high in hello.clients)
    return 2 if hello.role in (AGGREGATOR, EVALUATOR) else 1


def node_address(name: str) -> str:
    """Return the address of a node itself, besides those that it hosts."""
    return f"node/{name}"
