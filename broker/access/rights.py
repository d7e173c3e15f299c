"""Who may connect to a broker and what each node may do: rights by key, and the table of posts.

The Broker core reads the table, and nothing else does.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct

from fedmq.broker.wire.addresses import (
    AGGREGATOR,
    AVAILABILITY,
    CHECKPOINT,
    CLIENT,
    EVALUATOR,
    RECORD,
    ROLES,
    TIMER,
    WORKER,
)
from fedmq.broker.wire.schema import Range


class Origin(Struct, frozen=True):
    """What the transport proves about a connection.

    key: the public key of the peer (Z85, 40 characters); "" if the connection has no keys, which
        only a peer of this host or of an ``--insecure`` broker can have.
    address: of the peer's host; "" for a Unix socket, or if unknown.
    """

    key: str = ""
    address: str = ""

    @property
    def is_local(self) -> bool:
        """Return whether the address is of this host: a loopback address, or none."""
        if not self.address:
            return True
        try:
            found = ipaddress.ip_address(self.address.partition("%")[0])
        except ValueError:
            return False
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        return (mapped or found).is_loopback


KEYLESS = Origin()


class Rights(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the holder of a key may do.

    name: of the key, for people; unique at its broker.
    key: the public key, Z85.
    roles: that its nodes may have. An aggregator may open runs.
    clients: ranges that its workers may host, both ends included; None for all.
    runs: ids of the runs that its nodes may join, or open; empty for all.
    read_files: whether its nodes may read blobs from the ledger's files.
    replaces: public keys whose nodes and names this key has taken over.
    """

    name: str
    key: str = ""
    roles: tuple[str, ...] = ROLES
    clients: tuple[Range, ...] | None = None
    runs: tuple[str, ...] = ()
    read_files: bool = False
    replaces: tuple[str, ...] = ()

    def may_read_files(self, origin: Origin) -> bool:
        """Return whether a node may read the ledger's files.

        Without a key, a node of another host may not: it cannot, and would learn their paths.
        """
        return self.read_files and (bool(origin.key) or origin.is_local)


LOCAL = Rights(name="local", read_files=True)
"""Rights of connections without a key, on this host or at an ``--insecure`` broker."""


class Invite(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lets nodes hand in keys of their own, which get its rights.

    rights: of each key that is handed in; its ``key`` is the invite's own public key.
    uses: number of keys that may still be handed in.
    expires_at: in seconds since 1970.
    enrolled: the keys that have been handed in; handing one in again uses nothing.
    """

    rights: Rights
    uses: int
    expires_at: float
    enrolled: tuple[str, ...] = ()


class Access(Struct, frozen=True, kw_only=True):
    """All whom a broker admits.

    keys: rights by public key.
    invites: by the invite's public key.
    keyless: rights of connections without a key; None admits none.
    """

    keys: Mapping[str, Rights] = {}
    invites: Mapping[str, Invite] = {}
    keyless: Rights | None = LOCAL

    def rights_of(self, key: str) -> Rights | None:
        """Return the rights of a key, or of connections without one (""); None without rights."""
        return self.keys.get(key) if key else self.keyless


OPEN = Access()
"""Admits every connection without a key, with all rights; nothing has a key."""


class AccessStore(Protocol):
    """Where a broker's `Access` is kept; others may change it at any time."""

    def load(self) -> Access:
        """Return the present state.

        Raises:
            OSError: it cannot be read.
            ValueError: it is invalid; the message says where.
        """

    def changed(self) -> bool:
        """Return whether the state may have changed since the last `load`; takes microseconds."""

    def enroll(self, key: str, invite: str, now: float) -> Access:
        """Give a key the rights of an invite, count the use, sync, and return the new state.

        A key that was handed in before uses nothing.

        Args:
            key: public key of the node, Z85.
            invite: public key of the invite, Z85.
            now: in seconds since 1970.

        Raises:
            OSError: it cannot be written.
            ValueError: the invite has expired, has no uses left, or was revoked; the message says
                which.
        """


# ---- the table of posts

ANY = "*"
"""Kinds of messages that the table does not name, such as those of a user's own program."""


class MayPost(Struct, frozen=True):
    """Nodes with a role may post messages of these kinds to these addresses.

    role: of the node.
    kinds: of the message; `ANY` for all that no row names.
    to: addresses; `CLIENT` for the address of any client.
    asked: whether the message must answer a delivery that the node has not answered before.
    """

    role: str
    kinds: tuple[str, ...]
    to: tuple[str, ...]
    asked: bool = False


TABLE = (
    MayPost(AGGREGATOR, ("task", ANY), (CLIENT,)),
    MayPost(AGGREGATOR, ("evaluate", ANY), (CLIENT, EVALUATOR)),
    MayPost(AGGREGATOR, ("run", "version", "finished", ANY), (RECORD, CHECKPOINT)),
    MayPost(AGGREGATOR, ("timer", ANY), (TIMER,)),
    MayPost(AGGREGATOR, (ANY,), (AGGREGATOR,)),
    MayPost(WORKER, ("result", "failed", "score", ANY), (AGGREGATOR,), asked=True),
    MayPost(WORKER, (AVAILABILITY,), (AGGREGATOR,)),
    MayPost(EVALUATOR, ("failed", "score", ANY), (AGGREGATOR,), asked=True),
)
"""All that nodes may post. An observer posts nothing."""
ENDS_RUN = frozenset({AGGREGATOR})
"""Roles that may end their run."""

POSTS = {(row.role, kind, to): row.asked for row in TABLE for kind in row.kinds for to in row.to}
"""The table, by role, kind and address: whether the message must be an answer."""
KINDS = frozenset(kind for row in TABLE for kind in row.kinds)


def must_answer(role: str, kind: str, to: str) -> bool | None:
    """Return whether a post must answer a delivery; None if the role may not post it.

    Args:
        role: of the sender.
        kind: of the message.
        to: its address; `CLIENT` for any client's.
    """
    found = POSTS.get((role, kind, to))
    if found is None and kind not in KINDS:
        found = POSTS.get((role, ANY, to))
    return found
