"""Who may join which run: the checks behind Welcome and Reject."""

from __future__ import annotations

from fedmq.broker.state import AGGREGATOR, BROKER, RECORD, ROLES, Node, Run, addresses
from fedmq.broker.wire import Hello


def find_run(runs: dict[str, Run], hello: Hello) -> Run | str | None:
    """Return the run that a node belongs to, None if it must wait for one, or why there is none.

    An aggregator brings its run with it.
    """
    if hello.role == AGGREGATOR:
        if not hello.run:
            return "an aggregator must name its run"
        return runs.setdefault(hello.run, Run(hello.run, hello.config, hello.total_clients))
    if hello.run:
        return runs.get(hello.run)
    current = [run for run in runs.values() if not run.over]
    if len(current) > 1:
        names = ", ".join(run.id for run in current)
        return f"this broker serves several runs, name one of them: {names}"
    return current[0] if current else None


def why_not(run: Run, hello: Hello, known: Node | None) -> tuple[str, str] | None:
    """Return (code, reason) if the node cannot be admitted."""
    if hello.role not in ROLES:
        return "role", f"unknown role {hello.role!r}; choose from {', '.join(ROLES)}"
    if run.over:
        return "over", f"run {run.id} is over"
    if hello.node in (BROKER, RECORD):
        return "name", f"a node may not be named {hello.node!r}"
    if known is not None and known.alive and known.hello.session != hello.session:
        return "name", f"a node named {hello.node!r} is already connected"
    for low, high in hello.clients:
        if not low <= high < run.total_clients:
            wrong = low if low >= run.total_clients else high
            return "client", (
                f"client {wrong} is out of range: this run has {run.total_clients} clients, "
                f"0 to {run.total_clients - 1}"
            )
    for address in addresses(hello):
        host = run.nodes.get(run.hosts.get(address, ""))
        if host is not None and host.alive and host.name != hello.node:
            return "client", f"{address} is already hosted by {host.name}"
    return None
