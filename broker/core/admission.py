"""Decide which nodes may join which run: by key, by name, and by the broker's limits."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Iterable, Sequence

from fedmq.broker.access.owners import is_owner, session_number
from fedmq.broker.access.quotas import Quotas, source_of
from fedmq.broker.access.rights import Access, Origin, Rights
from fedmq.broker.core.state import Node, RunState
from fedmq.broker.rejections import RejectCode
from fedmq.broker.settings import BrokerSettings, Limits
from fedmq.broker.wire.addresses import (
    AGGREGATOR,
    BROKER,
    MAX_CLIENTS,
    MAX_RANGES,
    RECORD,
    ROLES,
    WORKER,
    name_fault,
    node_address,
)
from fedmq.broker.wire.schema import (
    MAX_MESSAGE_BYTES,
    MAX_NAMED,
    Hello,
    Range,
    Reject,
    Serving,
    Wait,
)

TWO_NAMES = "Two nodes need two names: set one with --name"
"""What to do if a session replaces another node's."""
Fault = tuple[RejectCode, str]
"""Code and reason of a rejection."""


def key_fault(access: Access, key: str, revoked: str) -> Fault | None:
    """Return (code, reason) if a key may do nothing; an invite's key may only enroll.

    Args:
        access: all keys and invites.
        key: of the connection; "" without one.
        revoked: name that the key had when it was revoked, if it was.
    """
    if access.rights_of(key) is not None:
        return None
    if not key:
        return RejectCode.KEY, "this broker admits no connection without a key"
    if key in access.invites:
        text = "an invite only serves to hand in a key; enroll one, and connect with that"
        return RejectCode.KEY, text
    if revoked:
        return RejectCode.KEY, f"the key {revoked} has been revoked"
    return RejectCode.KEY, "the key is not authorised; ask for an invite"


def malformed(hello: Hello, settings: BrokerSettings) -> Fault | None:
    """Return (code, reason) if no run could admit such a Hello; reads the Hello alone."""
    if fault := name_fault(hello.node):
        return RejectCode.NAME, f"invalid node name: {fault}; set one with --name"
    if hello.node in (BROKER, RECORD):
        return RejectCode.NAME, f"the node name {hello.node!r} is reserved"
    if hello.run and (fault := name_fault(hello.run)):
        return RejectCode.RUN, f"invalid run name: {fault}"
    if fault := name_fault(hello.session):
        return RejectCode.SESSION, f"invalid session id: {fault}"
    if hello.role == AGGREGATOR and not hello.run:
        return RejectCode.RUN, "an aggregator must name its run"
    if hello.role not in ROLES:
        return RejectCode.ROLE, f"unknown role {hello.role!r}; choose from {', '.join(ROLES)}"
    if (size := len(hello.config.encode())) > (most := MAX_MESSAGE_BYTES // 2):
        return RejectCode.CONFIG, f"expected a configuration of at most {most} bytes, got {size}"
    if hello.clients and hello.role != WORKER:
        return RejectCode.CLIENT, f"only workers host clients; this node is the {hello.role}"
    if (count := len(hello.clients)) > MAX_RANGES:
        return RejectCode.CLIENT, f"expected at most {MAX_RANGES} ranges of clients, got {count}"
    if hello.total_clients > MAX_CLIENTS:
        text = f"expected at most {MAX_CLIENTS} clients, got {hello.total_clients}"
        return RejectCode.RUN, text
    for low, high in hello.clients:
        if low > high:
            text = f"expected a range of clients from low to high, got {low}-{high}"
            return RejectCode.CLIENT, text
    hosted, most = sum(high - low + 1 for low, high in hello.clients), settings.limits.clients
    if hosted > most:
        text = f"a node may host at most {most} clients (broker.limits.clients), not {hosted}"
        return RejectCode.LIMIT, text
    return None


def served_runs(runs: dict[str, RunState], settings: BrokerSettings) -> Collection[str]:
    """Return the ids of the runs that the broker serves; none if it serves any."""
    if settings.only_run:
        return (settings.only_run,)
    return runs.keys() if settings.once else ()


def rights_fault(rights: Rights, hello: Hello) -> Fault | None:
    """Return (code, reason) if a key's rights do not allow what a Hello asks for."""
    who = f"the key {rights.name}" if rights.key else "a connection without a key"
    if hello.role not in rights.roles:
        may = ", ".join(rights.roles) or "nothing"
        text = f"{who} may not be the {hello.role}; its roles: {may}"
        return RejectCode.ROLE, text
    if hello.run and not may_join(rights, hello.run):
        return RejectCode.RUN, f"{who} may not join or open run {hello.run}"
    if rights.clients is not None:
        beyond = first_beyond(hello.clients, rights.clients)
        if beyond is not None:
            return RejectCode.CLIENT, f"{who} may not host client {beyond}"
    return None


def may_join(rights: Rights, run: str) -> bool:
    """Return whether the nodes of a key may join a run, or open it."""
    return not rights.runs or run in rights.runs


def first_beyond(ranges: Iterable[Range], allowed: Sequence[Range]) -> int | None:
    """Return the first number in ranges that is in no allowed range; None if there is none."""
    ordered = sorted(allowed)
    for low, high in ranges:
        at = low
        for first, last in ordered:
            if first <= at <= last:
                at = last + 1
        if at <= high:
            return at
    return None


def find_run(
    runs: dict[str, RunState], hello: Hello, rights: Rights, owner: str, served: Collection[str]
) -> RunState | Fault | None:
    """Return the run that a node belongs to.

    Returns None if the node must wait for a run, or (code, reason) for a rejection. For the
    aggregator of a new run, returns a new `RunState` that is not in ``runs`` yet.
    """
    if served and hello.run and hello.run not in served:
        names = ", ".join([*served][:MAX_NAMED])
        what = "run" if len(served) == 1 else "the runs"
        return RejectCode.RUN, f"this broker serves {what} {names} only"
    if hello.role == AGGREGATOR:
        known = runs.get(hello.run)
        return known or RunState(hello.run, hello.config, hello.total_clients, owner=owner)
    if hello.run or len(served) == 1:
        return runs.get(hello.run or next(iter(served)))
    for run in runs.values():
        node = run.nodes.get(hello.node)
        if node is not None and node.hello.session == hello.session and node.owner == owner:
            return run
    current = [run for run in runs.values() if not run.over and may_join(rights, run.id)]
    if len(current) > 1:
        names = ", ".join(run.id for run in current[:MAX_NAMED])
        more = f" and {len(current) - MAX_NAMED} more" if len(current) > MAX_NAMED else ""
        text = f"this broker serves several runs, choose one with --run-id: {names}{more}"
        return RejectCode.RUN, text
    return current[0] if current else None


def wait_for_run(runs: dict[str, RunState], rights: Rights, served: Collection[str]) -> Wait:
    """Return the answer to a node whose run does not exist: it lists the runs that it may join."""
    joinable = [
        run
        for run in reversed(runs.values())
        if may_join(rights, run.id) and (not served or run.id in served)
    ]
    if not joinable:
        return Wait(reason="no run has started yet")
    current = [run.id for run in joinable if not run.over]
    ended = [run.id for run in joinable if run.over]
    serving = Serving(
        tuple(current[:MAX_NAMED]),
        len(current[MAX_NAMED:]),
        tuple(ended[:MAX_NAMED]),
        len(ended[MAX_NAMED:]),
    )
    return Wait(reason="no such run has started yet", serving=serving)


def owner_fault(
    run: RunState, hello: Hello, rights: Rights, owner: str, known: Node | None, *, release: bool
) -> Fault | None:
    """Return (code, reason) if the name, or the place of the aggregator, is another owner's.

    ``release``: see `BrokerSettings.release_names`.
    """
    if release and (run.host_of(hello.role) or run.host_of(node_address(hello.node))) is None:
        return None
    if known is not None and not is_owner(owner, rights, known.owner):
        if known.alive:
            return RejectCode.NAME, f"a node named {hello.node!r} is already connected"
        text = (
            f"the name {hello.node!r} belongs to a node of this run that has left; start that one "
            "with its own key (--state, --run or --keys), set another name with --name, or start "
            "the broker with --release-names if that key is lost"
        )
        if rights.key:
            text += (
                "; or the broker's operator gives this key the place of the old one: "
                f"`fedmq keys authorize {shlex.quote(rights.key)} --replace NAME`"
            )
        return RejectCode.NAME, text
    if hello.role == AGGREGATOR and run.owner and not is_owner(owner, rights, run.owner):
        text = (
            f"run {run.id} was opened by another key: choose another run.id, or start its "
            "aggregator with the key or the folder (--run) that it had before; if that is lost, "
            "start the broker with --release-names"
        )
        return RejectCode.RUN, text
    return None


def why_not(run: RunState, hello: Hello, owner: str, known: Node | None) -> Fault | None:
    """Return (code, reason) if a node that owns its name cannot be admitted now."""
    if known is not None and known.owner == owner and known.hello.session != hello.session:
        older = session_number(hello.session) < session_number(known.hello.session)
        # An aggregator's older session lacks what the newer one has settled, wherever that is.
        if older and (known.alive or hello.role == AGGREGATOR):
            return RejectCode.REPLACED, _older_session(hello, known)
    if (
        known is not None
        and known.alive
        and (known.owner, known.hello.session) == (owner, hello.session)
        and (known.hello.role, known.hello.clients) != (hello.role, hello.clients)
    ):
        text = f"this session of {hello.node!r} has other clients or another role"
        return RejectCode.CLIENT, text
    if hello.role == AGGREGATOR and hello.config != run.config:
        text = f"run {run.id} has another configuration; set another run.id for this one"
        return RejectCode.CONFIG, text
    return _clients_fault(run, hello)


def _older_session(hello: Hello, known: Node) -> str:
    """Return the reason for the rejection of an older session, and what may be the cause of it."""
    behind_ns = session_number(known.hello.session) - session_number(hello.session)
    return (
        f"a newer session of {hello.node!r} {'is' if known.alive else 'was'} connected; if this "
        f"one was started later, its host's clock is {math.ceil(behind_ns / 1e9):,} s behind: "
        f"correct it, or start this node again after that time. {TWO_NAMES}"
    )


def _clients_fault(run: RunState, hello: Hello) -> Fault | None:
    for _, high in hello.clients:
        if high >= run.total_clients:
            return RejectCode.CLIENT, (
                f"client {high} is out of range: this run has {run.total_clients} clients, "
                f"0 to {run.total_clients - 1}"
            )
    if sum(high - low + 1 for low, high in hello.clients) > run.total_clients:
        text = f"expected each of the {run.total_clients} clients of this run at most once"
        return RejectCode.CLIENT, text
    for address, name in run.hosts.hosted(hello):
        host = run.nodes.get(name)
        if host is not None and host.alive and host.name != hello.node:
            return RejectCode.CLIENT, f"{address} is already hosted by {host.name}"
    return None


def run_limit_fault(
    runs: dict[str, RunState],
    run: RunState,
    limits: Limits,
    quotas: Quotas,
    origin: Origin,
    now: float,
) -> Fault | None:
    """Return (code, reason) if one more run may not be opened."""
    if run.id in runs:
        return None
    if sum(not each.over for each in runs.values()) >= limits.runs:
        text = f"this broker serves at most {limits.runs} runs at a time (broker.limits.runs)"
        return RejectCode.LIMIT, text
    if not quotas.may_open(origin, now):
        wait_s = math.ceil(quotas.open_wait_s(origin))
        text = (
            "too many runs were opened in a short time (broker.limits.runs); start this one again "
            f"after {wait_s} s"
        )
        return RejectCode.LIMIT, text
    return None


def new_name_fault(
    run: RunState, hello: Hello, access: Access, origin: Origin, limits: Limits
) -> Fault | None:
    """Return (code, reason) if a name that no node of the run has had yet cannot be taken.

    A source, see `source_of`, may hold as many names as are free: no source can take them all. The
    names of keys are theirs; connections without a key, beside keys, are the operator's own.
    """
    name = hello.node
    if origin.key and any(
        each.name == name and key != origin.key for key, each in access.keys.items()
    ):
        text = (
            f"the name {name!r} is that of another authorised key; this one is "
            f"{access.keys[origin.key].name}: set another name with --name or, if this node uses "
            "the wrong key, choose the right one with --key or --keys"
        )
        return RejectCode.NAME, text
    free = limits.nodes - len(run.nodes)
    if free <= 0:
        text = f"a run may have at most {limits.nodes} nodes (broker.limits.nodes)"
        return RejectCode.LIMIT, text
    source = source_of(origin)
    if source and len(run.nodes) > free:
        held = sum(source_of(each.origin) == source for each in run.nodes.values())
        if held > free:
            who = "key" if origin.key else "host"
            text = (
                f"this {who} has {held} names in the run, and only {free} are left for others "
                "(broker.limits.nodes)"
            )
            return RejectCode.LIMIT, text
    return None


def join_limit_fault(origin: Origin, limits: Limits, wait_s: float | None) -> Fault:
    """Return (code, reason) for a node whose source has too many sessions, or joins too often.

    ``wait_s``: seconds until it may join; None if its source has too many sessions.
    """
    if wait_s is None:
        who = "a key" if origin.key else "a host"
        text = (
            f"{who} may have at most {limits.sessions} live sessions (broker.limits.sessions); end "
            "another node of it first, or start the broker with a higher limit"
        )
        return RejectCode.LIMIT, text
    text = (
        "this node, or others of its key or host, were started too often "
        f"(broker.limits.joins_per_s); start it again after {math.ceil(wait_s)} s"
    )
    return RejectCode.LIMIT, text


def too_many_wait(limits: Limits) -> Wait:
    """Return the answer to a node that cannot wait for its run: it says Hello again."""
    text = f"at most {limits.waiting} nodes may wait for a run (broker.limits.waiting)"
    return Wait(reason=text, crowded=True)


def rejection(fault: Fault) -> Reject:
    """Return the frame that rejects a node for a fault."""
    code, reason = fault
    return Reject(code=code, reason=reason[:2000])
