"""Invite tokens: what a node needs to hand in a key of its own, as one line of text."""

from __future__ import annotations

import base64
import binascii
import zlib

import msgspec
from msgspec import Struct

from fedmq.broker.access.curve import KeyPair, key_bytes, key_text
from fedmq.broker.errors import AccessError, EndpointError
from fedmq.broker.wire.endpoints import parse_endpoint

PREFIX = "fedmq-invite-1:"
_MOST_CHARACTERS = 1000
_CHECK_BYTES = 4


class InviteToken(Struct, frozen=True):
    """An invite, as a node gets it; anybody who reads it can use it.

    address: endpoint of the broker.
    broker: the broker's public key, Z85.
    own: the key pair of the invite, with which the node connects to hand in its own key.
    """

    address: str
    broker: str
    own: KeyPair

    def text(self) -> str:
        """Return the token as a line of text."""
        fields = (self.address, key_bytes(self.broker), key_bytes(self.own.secret, "a secret key"))
        data = msgspec.msgpack.encode(fields)
        data += zlib.crc32(data).to_bytes(_CHECK_BYTES, "big")
        return PREFIX + base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def parse_token(text: str) -> InviteToken:
    """Parse a token; white space around it is ignored.

    Raises:
        AccessError: it is not a token, or it is damaged; the message does not show it.
    """
    text = text.strip()
    if not text.startswith(PREFIX):
        got = "other text" if text else "nothing"
        raise AccessError(f"expected an invite that begins with {PREFIX}, got {got}")
    if len(text) > _MOST_CHARACTERS:
        raise AccessError(f"expected one invite, got {len(text)} characters")
    encoded = text.removeprefix(PREFIX)
    damaged = AccessError("the invite is damaged or incomplete: copy all of its line")
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True)
        fields, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
        if zlib.crc32(fields).to_bytes(_CHECK_BYTES, "big") != check:
            raise damaged
        address, broker, secret = msgspec.msgpack.decode(fields, type=tuple[str, bytes, bytes])
        parse_endpoint(address)
        key, pair = key_text(broker), KeyPair.of(key_text(secret))
        key_bytes(key)
    except (ValueError, binascii.Error, msgspec.DecodeError, EndpointError):
        raise damaged from None
    return InviteToken(address, key, pair)
