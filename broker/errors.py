"""The exceptions of the messaging layer.

::

    BrokerError (Exception)
    +-- WireError       bytes from the network are not a frame of this protocol
    |   +-- VersionError    a frame of another major version
    +-- LedgerError     the ledger on disk cannot be read or written; holds segment and offset
    |   +-- LedgerDamage    bytes are missing or differ from those written
    |   +-- NotKept         bytes are missing; the retention policy may have deleted them
    |   +-- NoSpace         the disk or the quota is full
    +-- BrokerFailed    the broker had to stop while it was serving
    +-- AccessError     a key file, the access file or an invite is invalid or cannot be used
    +-- EndpointError   an endpoint is invalid, or cannot be listened on
    |   +-- UnresolvedError   its host name has no address
    +-- Rejected        the broker does not admit this node; holds the broker's reason
    +-- LinkClosed      the link has ended: the node was stopped, or it failed
        +-- RunOver         the run has ended; holds the reason
        +-- GaveUp          no broker or run was found within the time limit
"""

from __future__ import annotations

import errno

from fedmq.broker.rejections import Code

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class BrokerError(Exception):
    """Root of every error that this package raises on purpose."""


class WireError(BrokerError):
    """Bytes from the network are not a frame of this protocol.

    Attributes:
        code: why a message was rejected, for programs.
    """

    def __init__(self, reason: str, code: Code = Code.UNREADABLE) -> None:
        super().__init__(reason)
        self.code = code


class VersionError(WireError):
    """A frame of another protocol major.

    Attributes:
        theirs: the version in the frame, (major, minor).
        ours: the version of this side.
    """

    def __init__(self, theirs: tuple[int, int], ours: tuple[int, int]) -> None:
        super().__init__(
            f"expected protocol {ours[0]}.x, got {theirs[0]}.{theirs[1]}: both ends need the same "
            "major version"
        )
        self.theirs = theirs
        self.ours = ours


class LedgerError(BrokerError):
    """The ledger cannot be read or written.

    Attributes:
        reason: what is wrong, without the location.
        segment: name of the segment file; "" if the error is not about a single one.
        offset: byte offset in it.
    """

    def __init__(self, reason: str, segment: str = "", offset: int = 0) -> None:
        where = f" (at {segment}, byte {offset})" if segment else ""
        super().__init__(reason + where)
        self.reason = reason
        self.segment = segment
        self.offset = offset


class EndpointError(BrokerError):
    """An endpoint is invalid, or cannot be listened on."""


class UnresolvedError(EndpointError):
    """The host name in an endpoint has no address.

    Attributes:
        temporary: no name server could be reached; a later attempt may succeed.
    """

    def __init__(self, reason: str, *, temporary: bool = False) -> None:
        super().__init__(reason)
        self.temporary = temporary


class LedgerDamage(LedgerError):
    """Bytes in the ledger are missing or differ from those written."""

    def advise(self, text: str) -> LedgerDamage:
        """Return the same error with advice appended to its message."""
        advised = LedgerDamage(str(self) + text)
        advised.segment, advised.offset = self.segment, self.offset
        return advised


class NotKept(LedgerError):
    """Bytes are missing from the ledger; the retention policy may have deleted them."""


class NoSpace(LedgerError):
    """The disk or the quota is full; a later attempt may succeed."""


def check_advice(folder: object) -> str:
    """Return the end of an error about damage: the command that reports it in full."""
    return f"; `fedmq ledger check {folder}` shows what is damaged and what would be lost"


def io_error(doing: str, error: OSError, segment: str = "", offset: int = 0) -> LedgerError:
    """Return the exception to raise for an error of the operating system.

    Args:
        doing: what failed, such as "cannot write".
        error: the operating system's error.
        segment: name of the file.
        offset: byte offset in it.
    """
    kind = NoSpace if error.errno in _NO_SPACE else LedgerError
    return kind(f"{doing}: {error.strerror or error}", segment, offset)


class AccessError(BrokerError, ValueError):
    """A key, a key file, the access file or an invite is invalid, or cannot be read or written."""


class BrokerFailed(BrokerError):
    """The broker had to stop while it was serving: its ledger cannot be read or written."""


class Rejected(BrokerError):
    """The broker does not admit this node; the message is the broker's reason.

    Attributes:
        code: the reason, for programs; empty if the broker sent none.
        config: the run's configuration, if the node has another one.
    """

    def __init__(self, reason: str, code: str = "", config: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.config = config


class LinkClosed(BrokerError):
    """The link has ended: the node was stopped, or it failed."""


class RunOver(LinkClosed):
    """The run has ended; the message says why."""


class GaveUp(LinkClosed):
    """The node found no broker or run within its time limit."""
