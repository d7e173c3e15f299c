"""Key pairs for CURVE, in Z85.

Imports zmq for keys alone: no traffic.
"""

from __future__ import annotations

import zmq
from msgspec import Struct


class KeyPair(Struct, frozen=True):
    """A key pair: 40 characters of Z85 each. The secret never leaves its machine."""

    public: str
    secret: str

    @classmethod
    def new(cls) -> KeyPair:
        """Draw a key pair."""
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())


class NodeKeys(Struct, frozen=True):
    """What a node needs to connect to a broker with keys.

    own: the node's key pair.
    broker: the broker's public key, Z85.
    """

    own: KeyPair
    broker: str
