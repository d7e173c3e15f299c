"""What can go wrong between nodes.

::

    BrokerError (Exception)
    +-- WireError       bytes from the network are not a frame of this protocol
    |   +-- VersionError    they are, but of another major version
    +-- LedgerError     the ledger on disk cannot be read or written; holds segment and offset
    |   +-- LedgerDamage    something in it is not what was written, or is missing
    |   +-- NotKept         bytes are not there, as the retention policy may have it
    |   +-- NoSpace         there is no room for it now
    +-- BrokerFailed    the broker had to end while it was serving
    +-- EndpointError   an endpoint is none, or cannot be listened on
    |   +-- UnresolvedError   its name has no address
    +-- Rejected        the broker does not admit this node; holds the broker's reason
    +-- LinkClosed      the link has ended: the node was stopped, or it failed
        +-- RunOver         the run is over; holds the reason
        +-- GaveUp          the broker, or the run, was not there for too long
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
        ours: the version spoken here.
    """

    def __init__(self, theirs: tuple[int, int], ours: tuple[int, int]) -> None:
        super().__init__(
            f"protocol {theirs[0]}.{theirs[1]} cannot talk to protocol {ours[0]}.{ours[1]}: "
            "the major numbers must be equal"
        )
        self.theirs = theirs
        self.ours = ours


class LedgerError(BrokerError):
    """The ledger cannot be read or written.

    Attributes:
        reason: what is wrong, without the place.
        segment: name of the segment file, or "" where no single one is at fault.
        offset: byte offset in it.
    """

    def __init__(self, reason: str, segment: str = "", offset: int = 0) -> None:
        where = f" (at {segment}, byte {offset})" if segment else ""
        super().__init__(reason + where)
        self.reason = reason
        self.segment = segment
        self.offset = offset


class EndpointError(BrokerError):
    """An endpoint is none, or cannot be listened on."""


class UnresolvedError(EndpointError):
    """The name in an endpoint has no address.

    Attributes:
        temporary: no name server could be asked; the answer may be another one later.
    """

    def __init__(self, reason: str, *, temporary: bool = False) -> None:
        super().__init__(reason)
        self.temporary = temporary


class LedgerDamage(LedgerError):
    """Something in the ledger is not what was written, or is missing."""

    def advise(self, text: str) -> LedgerDamage:
        """Return the same error with a longer sentence: what it means, and what to do."""
        advised = LedgerDamage(str(self) + text)
        advised.segment, advised.offset = self.segment, self.offset
        return advised


class NotKept(LedgerError):
    """Bytes are not in the ledger. The retention policy may have deleted them."""


class NoSpace(LedgerError):
    """There is no room on the device now, or the quota is used up; there may be later."""


def io_error(doing: str, error: OSError, segment: str = "", offset: int = 0) -> LedgerError:
    """Return what to raise where the operating system refused to read or write.

    Args:
        doing: what was refused, such as "cannot write".
        error: the operating system's.
        segment: name of the file.
        offset: byte offset in it.
    """
    kind = NoSpace if error.errno in _NO_SPACE else LedgerError
    return kind(f"{doing}: {error.strerror or error}", segment, offset)


class BrokerFailed(BrokerError):
    """The broker had to end while it was serving: its ledger cannot be kept any more."""


class Rejected(BrokerError):
    """The broker does not admit this node; the message is the broker's reason.

    Attributes:
        code: why, for programs; empty where the broker gave none.
        config: of the run, where the node came with another one.
    """

    def __init__(self, reason: str, code: str = "", config: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.config = config


class LinkClosed(BrokerError):
    """The link has ended: the node was stopped, or it failed."""


class RunOver(LinkClosed):
    """The run is over; the message says why it ended."""


class GaveUp(LinkClosed):
    """The broker, or the run, was not there for longer than this node was to wait."""
