"""What the node programs have in common: sessions, a link that says goodbye."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from fedmq.broker.errors import LinkClosed
from fedmq.broker.link.events import Delivery
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.wire.addresses import name_fault
from fedmq.broker.wire.schema import Hello, Message
from fedmq.nodes.errors import NodeError
from fedmq.nodes.messages.actions import Inbound
from fedmq.nodes.process.exception_text import described
from fedmq.nodes.process.logs import Repeats
from fedmq.nodes.process.signals import Stopped, this_process


def new_session() -> str:
    """Return a session id: a restart of a node is told from a reconnect by it."""
    return f"{time.time_ns():x}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def linked(endpoint: str, hello: Hello, give_up_s: float | None = None) -> Iterator[NodeLink]:
    """Connect, wait to be admitted, and say goodbye, unless a cluster is stopped.

    Args:
        endpoint: where the broker listens.
        hello: what the node says of itself.
        give_up_s: so long without the broker or the run, now or later, and the node ends; None
            waits for ever. What it waits for is in its log meanwhile.

    Raises:
        GaveUp: the broker, or the run, was not there for ``give_up_s``.
        LinkClosed: the endpoint is no address, or its name has none.
        NodeError: the name of the node or of the run is no name, or the broker welcomes the
            node to a run that is not the one asked for.
    """
    for what, name in (("node", hello.node), ("run", hello.run)):
        if (name or what == "node") and (fault := name_fault(name)):
            raise NodeError(f"name of the {what}: {fault}")
    log = structlog.get_logger()
    link = NodeLink(endpoint, hello)
    try:
        if give_up_s is not None:
            link.give_up_after(give_up_s)
        welcome = link.welcome()
        if fault := name_fault(welcome.run):
            raise NodeError(f"the broker names a run that is none: {fault}")
        if hello.run not in ("", welcome.run):
            raise NodeError(f"asked for run {hello.run}, the broker welcomes to {welcome.run}")
        log.info("admitted", run=welcome.run)
        yield link
    except BaseException as error:
        failed = isinstance(error, Exception) and not isinstance(error, LinkClosed)
        # A cluster that is stopped goes on later, and a node that has said goodbye would be one
        # that is gone: the round would be closed without what it was at.
        silent = this_process.supervised and isinstance(error, Stopped)
        link.close(described(error), failed=failed, silent=silent)
        raise
    else:
        link.close()


def inbound_of(link: NodeLink, delivery: Delivery) -> Inbound:
    """Return a delivery as a core takes it: its blobs are read through the link."""
    read = functools.partial(link.read, delivery)
    stream = functools.partial(link.chunks, delivery)
    return Inbound(delivery.seq, delivery.at, delivery.message, read, stream)


def tell_refused(message: Message, repeats: Repeats) -> None:
    """Log that a message of this node was refused; those of one code once, and then a count."""
    code = str(message.body.get("code", ""))
    if times := repeats.count(("refused", code), time.monotonic()):
        structlog.get_logger().warning("refused", **message.body, times=times)


def node_key(folder: Path | None) -> str:
    """Return the key of the node that keeps its state here, drawn at its first start.

    By its key a restarted node is told from another one that was given the same name.

    Raises:
        NodeError: the folder cannot be written.
    """
    if folder is None:
        return secrets.token_hex(16)
    make_folder(folder)
    path = folder / "key"
    try:
        if not path.exists():
            fresh = folder / f"key.{os.getpid()}"
            fresh.write_text(secrets.token_hex(16) + "\n")
            fresh.replace(path)
        return path.read_text().strip()[:64]
    except OSError as error:
        raise NodeError(f"cannot read or write {path}: {error.strerror}") from None


def make_folder(folder: Path) -> None:
    """Make a folder for a node's state.

    Raises:
        NodeError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NodeError(f"cannot make {folder}: {error.strerror}") from None
