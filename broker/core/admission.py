"""Check which nodes may join a run, and which messages they may post."""

from __future__ import annotations

from fedmq.broker.core.state import Node, RunState
from fedmq.broker.errors import WireError
from fedmq.broker.rejections import Code
from fedmq.broker.wire.addresses import (
    AGGREGATOR,
    BROKER,
    CHECKPOINT,
    CONTINUED,
    EVALUATOR,
    MAX_RANGES,
    RECORD,
    ROLES,
    TIMER,
    addresses,
    name_fault,
)
from fedmq.broker.wire.encoding import is_deeper
from fedmq.broker.wire.schema import (
    MAX_DEPTH,
    MAX_MESSAGE_BYTES,
    MAX_NAMED,
    Hello,
    Message,
    Serving,
    Wait,
)

MAX_CLIENTS = 1 << 20
MAX_EARLY = 10_000
"""Most connections that may wait for a run that has not started."""
MAX_TIMER_S = 1e9
BROKERS_OWN = ("joined", "left", "tick", "refused", CONTINUED)
"""Kinds of messages that only the broker may send."""


def wrong_name(hello: Hello) -> tuple[str, str] | None:
    """Return (code, reason) if the name of the node or of its run is invalid."""
    if fault := name_fault(hello.node):
        return "name", f"invalid node name: {fault}; set one with --name"
    if hello.run and (fault := name_fault(hello.run)):
        return "run", f"invalid run name: {fault}"
    if hello.role == AGGREGATOR and not hello.run:
        return "run", "an aggregator must name its run"
    return None


def find_run(runs: dict[str, RunState], hello: Hello) -> RunState | str | None:
    """Return the run that a node belongs to.

    Returns None if the node must wait for a run, or the reason (str) for a rejection. For the
    aggregator of a new run, returns a new `RunState` that is not in ``runs`` yet.
    """
    if hello.role == AGGREGATOR:
        return runs.get(hello.run) or RunState(hello.run, hello.config, hello.total_clients)
    if hello.run:
        return runs.get(hello.run)
    for run in runs.values():
        known = run.nodes.get(hello.node)
        if known is not None and known.hello.session == hello.session:
            return run
    current = [run for run in runs.values() if not run.over]
    if len(current) > 1:
        names = ", ".join(run.id for run in current)
        return f"this broker serves several runs, choose one with --run-id: {names}"
    return current[0] if current else None


def wait_for_run(runs: dict[str, RunState]) -> Wait:
    """Return the answer to a node whose run does not exist: it lists the runs that do."""
    if not runs:
        return Wait(reason="no run has started yet")
    current = [run.id for run in reversed(runs.values()) if not run.over]
    ended = [run.id for run in reversed(runs.values()) if run.over]
    serving = Serving(
        tuple(current[:MAX_NAMED]),
        len(current[MAX_NAMED:]),
        tuple(ended[:MAX_NAMED]),
        len(ended[MAX_NAMED:]),
    )
    return Wait(reason="no such run has started yet", serving=serving)


def why_not(run: RunState, hello: Hello, known: Node | None) -> tuple[str, str] | None:
    """Return (code, reason) if the node cannot be admitted."""
    if hello.role not in ROLES:
        return "role", f"unknown role {hello.role!r}; choose from {', '.join(ROLES)}"
    if (size := len(hello.config.encode())) > (most := MAX_MESSAGE_BYTES // 2):
        return "config", f"expected a configuration of at most {most} bytes, got {size}"
    if hello.node in (BROKER, RECORD):
        return "name", f"the node name {hello.node!r} is reserved"
    if known is not None and known.alive and known.hello.session != hello.session:
        if not hello.key or hello.key != known.hello.key:
            return "name", f"a node named {hello.node!r} is already connected"
        if hello.session < known.hello.session:
            return "replaced", f"a newer session of {hello.node!r} is connected"
    elif known is not None and hello.role == AGGREGATOR and hello.session < known.hello.session:
        # It lacks what the newer session has settled, even if that one is disconnected.
        return "replaced", f"a newer session of {hello.node!r} was connected"
    if (
        known is not None
        and known.hello.session == hello.session
        and (known.hello.role, known.hello.clients) != (hello.role, hello.clients)
    ):
        return "client", f"this session of {hello.node!r} has other clients or another role"
    if hello.role == AGGREGATOR and hello.config != run.config:
        return "config", f"run {run.id} has another configuration; set another run.id for this one"
    if len(hello.clients) > MAX_RANGES:
        count = len(hello.clients)
        return "client", f"expected at most {MAX_RANGES} ranges of clients, got {count}"
    if run.total_clients > MAX_CLIENTS:
        return "run", f"expected at most {MAX_CLIENTS} clients, got {run.total_clients}"
    for low, high in hello.clients:
        if low > high:
            return "client", f"expected a range of clients from low to high, got {low}-{high}"
        if high >= run.total_clients:
            return "client", (
                f"client {high} is out of range: this run has {run.total_clients} clients, "
                f"0 to {run.total_clients - 1}"
            )
    if sum(high - low + 1 for low, high in hello.clients) > run.total_clients:
        return "client", (
            f"expected each of the {run.total_clients} clients of this run at most once"
        )
    for address in addresses(hello):
        host = run.nodes.get(run.hosts.get(address, ""))
        if host is not None and host.alive and host.name != hello.node:
            return "client", f"{address} is already hosted by {host.name}"
    return None


def check_message(node: Node, message: Message) -> None:
    """Check that a node may post a message: its sender, run, kind, depth and address.

    Raises:
        WireError: the reason for a rejection.
    """
    if message.sender != node.name or message.run != node.run.id:
        raise WireError(
            f"expected a message from {node.name} in run {node.run.id}, "
            f"got one from {message.sender} in {message.run}",
            Code.NOT_OWN,
        )
    if message.kind in BROKERS_OWN:
        raise WireError(f"only the broker may send {message.kind!r}", Code.RESERVED_KIND)
    if is_deeper(message.body, MAX_DEPTH):
        raise WireError(f"expected a body nested at most {MAX_DEPTH} deep", Code.TOO_DEEP)
    if message.to in (CHECKPOINT, TIMER):
        if node.hello.role != AGGREGATOR:
            text = f"only the aggregator may write to {message.to!r}"
            raise WireError(text, Code.NOT_ALLOWED)
        if message.to == TIMER:
            timer_of(message)
    elif fault := _address_fault(message.to, node.run.total_clients):
        raise WireError(fault, Code.NO_ADDRESS)


def _address_fault(address: str, clients: int) -> str:
    """Return why an address does not exist in a run with this number of clients; "" if it does."""
    if address in (AGGREGATOR, EVALUATOR, RECORD):
        return ""
    kind, _, number = address.partition("/")
    if kind != "client" or not number.isascii() or not number.isdigit():
        return f"no such address: {address!r}"
    if number != str(int(number)):
        return f"no such address: {address!r}; expected client/{int(number)}"
    if int(number) >= clients:
        return (
            f"client {number} is out of range: this run has {clients} clients, 0 to {clients - 1}"
        )
    return ""


def timer_of(message: Message) -> tuple[str, float]:
    """Return the token of a requested timer, and its delay in seconds.

    Raises:
        WireError: the message is not a valid timer request.
    """
    match message.body:
        case {"token": str(token), "after_s": float() | int() as after_s}:
            if token and 0 <= after_s <= MAX_TIMER_S:
                return token, float(after_s)
    text = f"expected a body with a token and after_s from 0 to {MAX_TIMER_S:g}"
    raise WireError(text, Code.MALFORMED)
