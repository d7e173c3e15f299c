"""Sessions of a node program: its key, its link to the broker, its logs of rejections."""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
from structlog.typing import FilteringBoundLogger

from fedmq.broker.access.curve import NodeKeys
from fedmq.broker.errors import LinkClosed
from fedmq.broker.file_modes import make_private_folder, restrict
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.wire.addresses import name_fault
from fedmq.broker.wire.schema import Hello, Message
from fedmq.nodes.errors import NodeError
from fedmq.nodes.process.atomic_write import replacing
from fedmq.nodes.process.exception_text import described, reason_of
from fedmq.nodes.process.logs import Repeats
from fedmq.nodes.process.signals import Stopped, this_process


def session_id(at_ns: int, last: str, token: str) -> str:
    """Return the id of a session; ids sort by the start of their session.

    Args:
        at_ns: time of the start, in nanoseconds since 1970, by a clock that may be wrong.
        last: id of the node's last session, which the new one follows; "" if unknown.
        token: random characters, so that no two sessions have the same id.
    """
    found = re.match(r"[0-9a-f]{16}(?=-)", last)
    return f"{max(at_ns, int(found[0], 16) + 1 if found else 0):016x}-{token}"


def new_session(folder: Path | None) -> str:
    """Return a new session id, which distinguishes a node's restart from a reconnect.

    Args:
        folder: of the node's state. It stores the id, so that the node's next session follows
            this one even if the machine's clock is set back; None stores nothing.
    """
    token = secrets.token_hex(4)
    if folder is None:
        return session_id(time.time_ns(), "", token)
    path, last = folder / "session", ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        last = path.read_text()
    session = session_id(time.time_ns(), last, token)
    with contextlib.suppress(OSError):  # a node starts on a full disk, too
        _write(path, session)
    return session


@contextlib.contextmanager
def linked(
    endpoint: str,
    hello: Hello,
    give_up_s: float | None = None,
    keys: NodeKeys | None = None,
    on_admission: Callable[[], None] | None = None,
) -> Iterator[NodeLink]:
    """Connect to the broker, wait for admission, and say goodbye at the end of the block.

    Args:
        endpoint: address of the broker.
        hello: the node's name, role, session and clients.
        give_up_s: seconds without the broker or the run, at any time, after which the node ends;
            None waits for ever. Meanwhile the log names what the node waits for.
        keys: of the node and the broker; None for a broker without keys.
        on_admission: called once the broker has admitted the node, and so proved its key.

    Raises:
        GaveUp: the broker or the run was unavailable for ``give_up_s``.
        LinkClosed: the endpoint is invalid, or its host name cannot be resolved.
        NodeError: the name of the node or of the run is invalid, or the broker admits the node to
            another run.
    """
    for what, name in (("node", hello.node), ("run", hello.run)):
        if (name or what == "node") and (fault := name_fault(name)):
            raise NodeError(f"name of the {what}: {fault}")
    link = NodeLink.connect(endpoint, hello, keys)
    if give_up_s is not None:
        link.give_up_after(give_up_s)
    with admitted(link, hello, structlog.get_logger()):
        if on_admission is not None:
            on_admission()
        yield link


@contextlib.contextmanager
def admitted(link: NodeLink, hello: Hello, log: FilteringBoundLogger) -> Iterator[None]:
    """Wait for admission, and close the link, with a goodbye, at the end of the block.

    Args:
        link: of the node.
        hello: of the node.
        log: of the node.

    Raises:
        NodeError: as `linked`.
        LinkClosed: the link ended before the admission.
        Rejected: the broker does not admit the node.
    """
    try:
        welcome = link.welcome()
        if fault := name_fault(welcome.run):
            raise NodeError(f"the broker sent an invalid run name: {fault}")
        if hello.run not in ("", welcome.run):
            raise NodeError(
                f"expected to join run {hello.run}, the broker admitted this node to {welcome.run}"
            )
        log.info("admitted", run=welcome.run)
        yield
    except BaseException as error:
        failed = isinstance(error, Exception) and not isinstance(error, LinkClosed)
        # A stopped cluster can be resumed. After a goodbye the aggregator would close the round
        # without this node's tasks.
        silent = this_process.supervised and isinstance(error, Stopped)
        link.close(described(error), failed=failed, silent=silent)
        raise
    else:
        link.close()


def log_rejected(message: Message, repeats: Repeats, log: FilteringBoundLogger) -> None:
    """Log that a message of this node was rejected; for each code once, and then a count."""
    code = str(message.body.get("code", ""))
    if times := repeats.count(("rejected", code), time.monotonic()):
        log.warning("message rejected", **message.body, times=times)


def node_key(folder: Path | None, secret: str = "", keys: NodeKeys | None = None) -> str:
    """Return the secret that proves the node's name to a broker without keys; "" with keys.

    It distinguishes a restarted node from another node with the same name. A node with a folder
    keeps a random one there.

    Args:
        folder: of the node's state; it is created.
        secret: for a node without a folder; "" draws one, which the next start does not have.
        keys: prove the name by themselves.

    Raises:
        NodeError: the key cannot be read or written.
    """
    if folder is not None:
        make_folder(folder)
    if keys is not None:
        return ""
    if folder is None:
        return secret or secrets.token_hex(16)
    path = folder / "key"
    try:
        if not path.exists():
            _write(path, secrets.token_hex(16))
        restrict(path)  # older releases let everybody read it
        return path.read_text().strip()[:64]
    except OSError as error:
        raise NodeError(f"cannot read or write {path}: {reason_of(error)}") from None


def _write(path: Path, text: str) -> None:
    with replacing(path) as fresh:
        fresh.write_text(f"{text}\n")


def make_folder(folder: Path) -> None:
    """Make a folder for a node's state.

    Raises:
        NodeError: the folder cannot be made.
    """
    try:
        make_private_folder(folder)
    except OSError as error:
        raise NodeError(f"cannot make {folder}: {reason_of(error)}") from None
