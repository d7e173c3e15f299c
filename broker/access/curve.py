"""Key pairs for CURVE, in Z85.

Imports zmq for keys alone: no traffic.
"""

from __future__ import annotations

import struct

import zmq
from msgspec import Struct
from zmq.utils import z85

from fedmq.broker.errors import AccessError

_CHARACTERS = 40
_SHOWN = 60


class KeyPair(Struct, frozen=True):
    """A key pair: 40 characters of Z85 each. The secret never leaves its machine."""

    public: str
    secret: str

    @classmethod
    def new(cls) -> KeyPair:
        """Draw a key pair; the public key begins with a letter or a digit."""
        while True:  # a key that begins with "-" would be an option of a command
            public, secret = (each.decode() for each in zmq.curve_keypair())
            if public[0].isalnum():
                return cls(public, secret)

    @classmethod
    def of(cls, secret: str) -> KeyPair:
        """Return the pair of a secret key.

        Raises:
            AccessError: the text is not a key.
        """
        key_bytes(secret, "a secret key")
        return cls(zmq.curve_public(secret.encode()).decode(), secret)

    def __repr__(self) -> str:
        """Hide the secret, which does not belong into logs."""
        return f"KeyPair({self.public!r}, ...)"


class NodeKeys(Struct, frozen=True):
    """What a node needs to connect to a broker with keys.

    own: the node's key pair.
    broker: the broker's public key, Z85.
    """

    own: KeyPair
    broker: str


def key_bytes(key: str, what: str = "a public key") -> bytes:
    """Return the 32 bytes of a key.

    Args:
        key: in Z85.
        what: names the key in the error; a secret key is not shown there.

    Raises:
        AccessError: the text is not a key.
    """
    try:
        if len(key) != _CHARACTERS:
            raise ValueError(f"{len(key)} characters")
        data = z85.decode(key)
        if z85.encode(data) != key.encode():
            raise ValueError("not in Z85")
    except (ValueError, KeyError, struct.error):
        got = f"{len(key)} characters" if "secret" in what else repr(key[:_SHOWN])
        raise AccessError(f"expected {what}: {_CHARACTERS} characters of Z85, got {got}") from None
    return data


def key_text(data: bytes) -> str:
    """Return a key of 32 bytes in Z85."""
    return z85.encode(data).decode()
