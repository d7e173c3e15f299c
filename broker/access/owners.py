"""Owners of names, and the order of an owner's sessions.

With keys, the owner of a name is a public key. Without, it is a digest of the secret that a node
keeps: the ledger and other nodes can read it, but nobody can derive the secret from it.
"""

from __future__ import annotations

import hashlib
import re

from fedmq.broker.access.rights import Rights

_SECRET, _SESSION = b"secret\0", b"session\0"
_DIGEST_CHARACTERS = 32
_KEY_CHARACTERS = 40
_NUMBER = re.compile(r"[0-9a-f]{0,16}")


def owner_of(key: str, secret: str, session: str) -> str:
    """Return the owner that a Hello is from.

    Args:
        key: public key of the connection; "" if it has none.
        secret: ``key`` of the Hello, which its node keeps; "" for a node that keeps none. Then no
            other session can have the same owner.
        session: id of the session.
    """
    if key:
        return key
    data = _SECRET + secret.encode() if secret else _SESSION + session.encode()
    return hashlib.sha256(data).hexdigest()[:_DIGEST_CHARACTERS]


def key_of(owner: str) -> str:
    """Return the public key of an owner; "" if it has none."""
    return owner if len(owner) == _KEY_CHARACTERS else ""


def is_owner(owner: str, rights: Rights, known: str) -> bool:
    """Return whether what belongs to ``known`` belongs to ``owner``, who has these rights."""
    return known == owner or (bool(owner) and known in rights.replaces)


def session_number(session: str) -> int:
    """Return the number by which an owner's sessions are ordered; 0 if the id has none."""
    found = _NUMBER.match(session)
    return int(found[0] or "0", 16) if found else 0
