"""A node hands in its own public key with an invite, and so gets access to a broker."""

from __future__ import annotations

import enum
import time

import zmq

from fedmq.broker.access.curve import NodeKeys, key_bytes
from fedmq.broker.access.invites import InviteToken
from fedmq.broker.errors import BrokerError, EndpointError, WireError
from fedmq.broker.transport.dealer_socket import DealerSocket, HandshakeFailure
from fedmq.broker.wire.clock import milliseconds_until
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.endpoints import parse_endpoint, resolve
from fedmq.broker.wire.schema import AnyFrame, Enroll, Enrolled, Reject
from fedmq.broker.wire.sockets import receive, send_parts

TIMEOUT_S = 60.0
_SEND_EACH_S = 2.0
_CUTS = 5
"""Handshakes in a row that the broker cuts off, after which its key is taken to be another."""


class EnrolmentFault(enum.Enum):
    """Why a key was not accepted."""

    REFUSED = "refused"
    """The broker's answer: the invite has expired, has no uses left, or the key was revoked."""
    UNKNOWN_INVITE = "unknown-invite"
    """The broker does not know the invite: it was revoked."""
    OTHER_BROKER = "other-broker"
    """What listens there does not have the key of the broker that made the invite."""
    NO_ANSWER = "no-answer"
    """Nothing answered in time."""
    ADDRESS = "address"
    """The address in the invite cannot be used here."""


class EnrolmentError(BrokerError):
    """A key could not be handed in.

    Attributes:
        fault: why, for programs.
    """

    def __init__(self, reason: str, fault: EnrolmentFault) -> None:
        super().__init__(reason)
        self.fault = fault


def enroll(token: InviteToken, key: str, timeout_s: float = TIMEOUT_S) -> None:
    """Hand in a public key, and return once the broker has stored it.

    If it is interrupted or fails without an answer, it may be called again: the same key uses the
    invite once.

    Args:
        token: the invite.
        key: the node's own public key, Z85.
        timeout_s: how long to try.

    Raises:
        EnrolmentError: the key was not accepted; the message says why.
        AccessError: the key is invalid.
    """
    key_bytes(key)
    try:
        endpoint = parse_endpoint(token.address)
        families = resolve(endpoint)
        dealer = DealerSocket(endpoint, families, NodeKeys(token.own, token.broker))
    except (EndpointError, zmq.ZMQError) as error:
        text = f"cannot connect to {token.address}: {error}"
        raise EnrolmentError(text, EnrolmentFault.ADDRESS) from None
    try:
        _hand_in(dealer, token, key, time.monotonic() + timeout_s)
    finally:
        dealer.close()


def _hand_in(dealer: DealerSocket, token: InviteToken, key: str, until: float) -> None:
    """Send the key until the broker answers."""
    send_at, cuts = 0.0, 0
    while (now := time.monotonic()) < until:
        if now >= send_at:
            try:
                send_parts(dealer.socket, [encode_frame(Enroll(key=key))])
                send_at = now + _SEND_EACH_S
            except zmq.Again:
                pass  # not connected yet
        poller = zmq.Poller()
        waiting = send_at <= now
        dealer.register(poller, zmq.POLLIN | (zmq.POLLOUT if waiting else 0))
        at = until if waiting else min(until, send_at)
        ready = dict(poller.poll(milliseconds_until(at, now)))
        if dealer.monitor in ready:
            dealer.turn(time.monotonic())
            cuts = cuts + 1 if dealer.failure is HandshakeFailure.CUT else 0
            _check(dealer.failure, cuts, token)
        for frame in _received(dealer):
            match frame:
                case Enrolled() if frame.key == key:
                    return
                case Reject(reason=reason):
                    text = f"the broker at {token.address} did not accept this node's key: {reason}"
                    raise EnrolmentError(text, EnrolmentFault.REFUSED)
    text = f"the broker at {token.address} did not answer in time"
    raise EnrolmentError(text, EnrolmentFault.NO_ANSWER)


def _received(dealer: DealerSocket) -> list[AnyFrame]:
    try:
        frames = receive(dealer.socket)
    except (zmq.Again, WireError):
        return []
    return [frame for frame, _ in frames]


def _check(failure: HandshakeFailure | None, cuts: int, token: InviteToken) -> None:
    """Raise EnrolmentError if a failed handshake will not succeed later."""
    at = token.address
    if failure is HandshakeFailure.KEY_REFUSED:
        text = f"the broker at {at} does not know this invite: it was revoked; ask for another"
        raise EnrolmentError(text, EnrolmentFault.UNKNOWN_INVITE)
    if failure is HandshakeFailure.OTHER_MECHANISM or cuts >= _CUTS:
        text = (
            f"what listens at {at} is not the broker that made this invite: it does not have the "
            f"key {token.broker}"
        )
        raise EnrolmentError(text, EnrolmentFault.OTHER_BROKER)
