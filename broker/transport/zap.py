"""Decides who is let in: answers libzmq's requests to authenticate a connection (ZAP, RFC 27).

libzmq asks over inproc, and a handshake waits for the answer. The broker's loop answers between
two turns, so that no other thread needs to know who has access.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import zmq

from fedmq.broker.access.curve import key_text
from fedmq.broker.access.rights import Access

LOCAL_USER = "local"
"""User id of a connection without a key; no public key has five characters."""
DOMAIN = b"fedmq"
_KEY_BYTES = 32
_OK, _REFUSED = b"200", b"400"
_REPORT_EACH_S = 1.0
_REPEAT_S = 60.0
"""Time after which a key that keeps trying is reported again."""
_MOST_KEYS = 1000
"""Most refused keys that are remembered."""


class RefusedKey(NamedTuple):
    """A key without rights that has tried to connect.

    other_keys: number of others since the last report.
    """

    key: str
    address: str
    other_keys: int


class Door:
    """Answers ZAP requests.

    Connections without CURVE are let in: the broker binds such an endpoint only where no key is
    needed. With CURVE, a key needs rights or must be an invite's. An invite that has expired is
    let in too, because only the Broker core can answer why it is of no use.

    Args:
        context: of the sockets that it decides for. Create it before they are bound.

    Attributes:
        socket: readable while requests wait.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind("inproc://zeromq.zap.01")
        self._admitted: frozenset[str] = frozenset()
        self._refused: dict[str, str] = {}
        """Addresses of keys that were refused and not reported yet."""
        self._reported: dict[str, float] = {}
        """When each key was reported."""
        self._report_at = 0.0

    def admit(self, access: Access) -> None:
        """Admit the keys that have access from now on; does not touch existing connections."""
        self._admitted = frozenset((*access.keys, *access.invites))

    def is_admitted(self, key: str) -> bool:
        """Return whether a key would be let in now; "" for a connection without a key."""
        return not key or key in self._admitted

    def answer(self) -> None:
        """Answer the requests that wait."""
        with contextlib.suppress(zmq.Again):
            while True:
                version, request, *fields = self.socket.recv_multipart(zmq.NOBLOCK)
                user = self._user(fields)
                status, text = (_OK, b"") if user else (_REFUSED, b"this key has no rights here")
                reply = (version, request, status, text, user.encode(), b"")
                self.socket.send_multipart(reply)

    def _user(self, fields: list[bytes]) -> str:
        """Return the user id of a peer, which libzmq puts on each of its frames; "" to refuse it.

        Args:
            fields: domain, address, routing id, mechanism, and the mechanism's credentials.
        """
        match fields[3:]:
            case [b"NULL"]:
                return LOCAL_USER
            case [b"CURVE", raw] if len(raw) == _KEY_BYTES:
                key = key_text(raw)
                if key in self._admitted:
                    return key
                if len(self._refused) < _MOST_KEYS:
                    self._refused[key] = fields[1].decode(errors="replace")
        return ""

    def refused(self, now: float) -> RefusedKey | None:
        """Return a refused key that an operator may want to authorise; at most one a second.

        Args:
            now: in seconds, on any clock.
        """
        if not self._refused or now < self._report_at:
            return None
        refused, self._refused = self._refused, {}
        if len(self._reported) > _MOST_KEYS:
            self._reported.clear()
        known = self._reported
        new = [key for key in refused if known.get(key, -math.inf) + _REPEAT_S <= now]
        if not new:
            return None
        self._report_at, known[new[0]] = now + _REPORT_EACH_S, now
        return RefusedKey(new[0], refused[new[0]], len(new) - 1)
