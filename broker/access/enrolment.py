"""Check a key that is handed in with an invite."""

from __future__ import annotations

import re

from fedmq.broker.access.rights import Access, Invite
from fedmq.broker.rejections import RejectCode

_Z85 = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


def enrolment_fault(
    access: Access, invite: Invite, key: str, now: float
) -> tuple[RejectCode, str] | None:
    """Return (code, reason) if a key cannot be enrolled with an invite.

    Args:
        access: all keys and invites.
        invite: the one that the connection has.
        key: public key of the node, as it came.
        now: in seconds since 1970.
    """
    name = invite.rights.name
    if not _Z85.fullmatch(key):
        return RejectCode.KEY, "expected a public key: 32 bytes in Z85, 40 characters"
    if key in access.invites or (key in access.keys and key not in invite.enrolled):
        return RejectCode.KEY, "this key is known already; make another one"
    if key in invite.enrolled:
        if key in access.keys:
            return None  # the answer was lost
        return RejectCode.KEY, f"this key was enrolled with invite {name}, and then revoked"
    if invite.expires_at <= now:
        return RejectCode.INVITE, f"invite {name} has expired; ask for a new one"
    if invite.uses < 1:
        return RejectCode.INVITE, f"invite {name} has no uses left; ask for a new one"
    return None
