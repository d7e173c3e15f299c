"""Sessions of a node program: its key, its link to the broker, its logs of rejections."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from fedmq.broker.errors import LinkClosed
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.wire.addresses import name_fault
from fedmq.broker.wire.schema import Hello, Message
from fedmq.nodes.errors import NodeError
from fedmq.nodes.process.exception_text import described, reason_of
from fedmq.nodes.process.logs import Repeats
from fedmq.nodes.process.signals import Stopped, this_process


def new_session() -> str:
    """Return a new session id, which distinguishes a node's restart from a reconnect."""
    return f"{time.time_ns():x}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def linked(endpoint: str, hello: Hello, give_up_s: float | None = None) -> Iterator[NodeLink]:
    """Connect to the broker, wait for admission, and say goodbye at the end of the block.

    Args:
        endpoint: address of the broker.
        hello: the node's name, role, session and clients.
        give_up_s: seconds without the broker or the run, at any time, after which the node ends;
            None waits for ever. Meanwhile the log names what the node waits for.

    Raises:
        GaveUp: the broker or the run was unavailable for ``give_up_s``.
        LinkClosed: the endpoint is invalid, or its host name cannot be resolved.
        NodeError: the name of the node or of the run is invalid, or the broker admits the node to
            another run.
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
            raise NodeError(f"the broker sent an invalid run name: {fault}")
        if hello.run not in ("", welcome.run):
            raise NodeError(
                f"expected to join run {hello.run}, the broker admitted this node to {welcome.run}"
            )
        log.info("admitted", run=welcome.run)
        yield link
    except BaseException as error:
        failed = isinstance(error, Exception) and not isinstance(error, LinkClosed)
        # A stopped cluster can be resumed. After a goodbye the aggregator would close the round
        # without this node's tasks.
        silent = this_process.supervised and isinstance(error, Stopped)
        link.close(described(error), failed=failed, silent=silent)
        raise
    else:
        link.close()


def log_rejected(message: Message, repeats: Repeats) -> None:
    """Log that a message of this node was rejected; for each code once, and then a count."""
    code = str(message.body.get("code", ""))
    if times := repeats.count(("rejected", code), time.monotonic()):
        structlog.get_logger().warning("message rejected", **message.body, times=times)


def node_key(folder: Path | None) -> str:
    """Return a node's key, read from its folder; a new random one at its first start.

    The key distinguishes a restarted node from another node with the same name.

    Args:
        folder: of the node's state; None for a key that is not stored.

    Raises:
        NodeError: the key cannot be read or written.
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
        raise NodeError(f"cannot read or write {path}: {reason_of(error)}") from None


def make_folder(folder: Path) -> None:
    """Make a folder for a node's state.

    Raises:
        NodeError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NodeError(f"cannot make {folder}: {reason_of(error)}") from None
