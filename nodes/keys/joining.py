"""Which keys a node uses at a broker: those that it knows, is given, or joins with.

A node needs the broker's public key: from its command line, from an invite, or from
``brokers.json``, where both are kept for the next start.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from msgspec.structs import replace

from fedmq.broker.access.curve import KeyPair, NodeKeys
from fedmq.broker.access.invites import InviteToken, parse_token
from fedmq.broker.access.key_files import (
    BROKERS_FILE,
    NODE_KEY,
    add_broker,
    known_brokers,
    own_key,
    public_key,
    read_key,
)
from fedmq.broker.access.private_files import check_writable
from fedmq.broker.enrolment import EnrolmentError, EnrolmentFault, enroll
from fedmq.broker.errors import AccessError, EndpointError, GaveUp, UnresolvedError
from fedmq.broker.transport.listening import is_loopback
from fedmq.broker.wire.endpoints import addresses_of, parse_endpoint
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.keys.folder import (
    BROKER_KEY_VARIABLE,
    JOIN_VARIABLE,
    KEYS_VARIABLE,
    has_key_folder,
    key_folder,
    secret_for,
)
from fedmq.nodes.process.exception_text import reason_of

_MOST_CHARACTERS = 4096
_REPORT_AFTER_S, _REPORT_EACH_S = (3.0, 7.0, 20.0), 60.0
"""Seconds without the broker between two reports: as those of a link."""
_INVITE_IS_OVER = (EnrolmentFault.REFUSED, EnrolmentFault.UNKNOWN_INVITE)


@dataclass(frozen=True)
class ConnectionOptions:
    """What a node's command line says about its connection.

    endpoint: address of the broker; None if not given.
    folder: of keys, see `key_folder`.
    key: name of the node's own key.
    broker_key: the broker's public key, or the path of a ``.pub`` file; None if not given.
    join_file: path of a file with an invite, "-" for standard input; None if not given.
    give_up_s: seconds without the broker after which a node ends; None for never.
    """

    endpoint: str | None = None
    folder: Path | None = None
    key: str = NODE_KEY
    broker_key: str | None = None
    join_file: str | None = None
    give_up_s: float | None = None


@dataclass(frozen=True)
class Credentials:
    """Where a node connects to, and with what.

    endpoint: address of the broker.
    keys: for CURVE; None without keys.
    secret: proves the node's name to a broker without keys; "" if the node has a folder or keys.
    remember: stores the broker's key for the next start, if it is new; to be called once the broker
        has proved it, so that a wrong key replaces no right one.
    """

    endpoint: str
    keys: NodeKeys | None
    secret: str
    remember: Callable[[], None] | None = field(default=None, compare=False)


NO_KEY = "none"
"""In place of a broker's key: connect without keys, although one is stored."""


def credentials(
    options: ConnectionOptions, endpoint_by_default: str, *, stateless: bool = True
) -> Credentials:
    """Return how a node connects; join with its invite first, if it has one.

    Args:
        options: of the node.
        endpoint_by_default: address of the broker without an option and an invite.
        stateless: whether the node has no folder, which would hold a secret of its own.

    Raises:
        ConfigError: an option is invalid, or a key is missing.
        AccessError: a file of keys is invalid, or others may read it; or the invite is refused.
        GaveUp: the broker of the invite was unavailable for ``options.give_up_s``.
    """
    token = read_invite(options.join_file)
    endpoint = options.endpoint or (token.address if token else endpoint_by_default)
    if endpoint.startswith("ipc://"):
        if token is not None or options.broker_key is not None:
            raise ConfigError(f"{endpoint}: connections over ipc:// use no keys: leave them out")
        return Credentials(endpoint, None, _secret(endpoint, options, stateless=stateless))
    given = options.broker_key or os.environ.get(BROKER_KEY_VARIABLE) or None
    if token is not None:
        if given not in (None, NO_KEY) and public_key(given) != token.broker:
            raise ConfigError("--broker-key: the invite is for a broker with another key")
        own = _join(token, endpoint, options)
        return Credentials(endpoint, NodeKeys(own, token.broker), "")
    stored = None if given == NO_KEY else _stored(endpoint, given, options.folder)
    broker = stored if given in (None, NO_KEY) else public_key(given)
    if broker is None:
        if leaves_this_host(endpoint):
            known = [] if given == NO_KEY else _same_port(endpoint, options.folder)
            structlog.get_logger().warning(
                "this connection is neither encrypted nor authenticated: others on its way can "
                "read and change it; --broker-key, --join-file or an address for which a key is "
                "stored protects it",
                endpoint=endpoint,
                **({"stored": ", ".join(known)} if known else {}),
            )
        return Credentials(endpoint, None, _secret(endpoint, options, stateless=stateless))
    remember = None
    if broker != stored:
        where = key_folder(options.folder)
        remember = functools.partial(_store_broker, where, endpoint, broker, stored)
    return Credentials(endpoint, NodeKeys(_own(options), broker), "", remember)


def _secret(endpoint: str, options: ConnectionOptions, *, stateless: bool) -> str:
    return secret_for(endpoint, options.folder) if stateless else ""


def read_invite(join_file: str | None) -> InviteToken | None:
    """Return the invite that a node was given; None without one.

    Args:
        join_file: see `ConnectionOptions`; None reads the variable FEDMQ_JOIN.

    Raises:
        ConfigError: the file cannot be read.
        AccessError: the text is not an invite.
    """
    if join_file is None:
        # Processes that this node starts have no use for it.
        text = os.environ.pop(JOIN_VARIABLE, "")
        return parse_token(text) if text else None
    if join_file == "-":
        return parse_token(sys.stdin.read(_MOST_CHARACTERS))
    try:
        with Path(join_file).open(encoding="utf-8", errors="replace") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_MOST_CHARACTERS)
    except OSError as error:
        raise ConfigError(f"--join-file: cannot read {join_file}: {reason_of(error)}") from None
    if stat.S_ISREG(mode) and mode & 0o077:
        structlog.get_logger().warning(
            f"other users of this host can read the invite in {join_file}; chmod 600 prevents that"
        )
    return parse_token(text)


def leaves_this_host(text: str) -> bool:
    """Return whether an endpoint, to connect to or to listen on, is beyond this host.

    Not if it is invalid, which its user reports.
    """
    try:
        endpoint = parse_endpoint(text, listen=True)
        if endpoint.path:
            return False
        if endpoint.host == "*":
            return True
        return not all(is_loopback(address) for _, address in addresses_of(endpoint))
    except UnresolvedError:
        return True
    except EndpointError:
        return False


def _stored(endpoint: str, given: str | None, folder: Path | None) -> str | None:
    """Return the public key that is stored for a broker; None if there is none."""
    if given is None and folder is None and not has_key_folder():
        return None
    where = key_folder(folder)
    named = given is not None or folder is not None or bool(os.environ.get(KEYS_VARIABLE))
    # A home that this user cannot enter, such as /dev/null, has no keys of this user.
    readable = named or os.access(where, os.X_OK)
    return known_brokers(where).get(endpoint) if readable else None


def _same_port(endpoint: str, folder: Path | None) -> list[str]:
    """Return addresses with stored keys that may be other spellings of an address."""
    port = endpoint.rpartition(":")[2]
    try:
        return [each for each in known_brokers(key_folder(folder)) if each.endswith(f":{port}")]
    except (AccessError, ConfigError):
        return []


def _store_broker(where: Path, endpoint: str, key: str, stored: str | None) -> None:
    """Store a broker's key; without it, a node that has everything else can still connect."""
    try:
        add_broker(where, endpoint, key)
        if stored is not None:
            structlog.get_logger().warning(
                "the broker's key replaces the one that was stored for its address",
                endpoint=endpoint,
                stored=stored,
            )
    except AccessError as error:
        structlog.get_logger().warning(
            "the broker's key is not stored; give --broker-key at each start", reason=str(error)
        )


def _own(options: ConnectionOptions) -> KeyPair:
    where = key_folder(options.folder)
    try:
        return read_key(where, options.key)
    except FileNotFoundError:
        name = "" if options.key == NODE_KEY else f" {options.key}"
        raise ConfigError(
            f"there is no key {options.key} in {where}: make one with `fedmq keys new{name}`, and "
            "authorise it on the broker's host"
        ) from None


def _join(token: InviteToken, endpoint: str, options: ConnectionOptions) -> KeyPair:
    """Hand in the node's own key with an invite, unless that was done before; return the key."""
    where = key_folder(options.folder)
    own = own_key(where, options.key)
    stored = known_brokers(where).get(endpoint)
    known = stored == token.broker
    if not known:
        _check_writable(where)
    try:
        _hand_in(replace(token, address=endpoint), own.public, options.give_up_s)
    except EnrolmentError as error:
        if not known or error.fault not in _INVITE_IS_OVER:
            raise
        # The key came in with an earlier invite, or with this one before it expired.
        structlog.get_logger().info(
            "the invite admits no further key; this node tries the key that it handed in earlier",
            reason=str(error),
        )
    if not known:
        _store_broker(where, endpoint, token.broker, stored)
    return own


def _check_writable(where: Path) -> None:
    """Raise AccessError if the broker's key cannot be stored: an invite's use would be wasted."""
    try:
        check_writable(where / BROKERS_FILE)
    except AccessError as error:
        raise AccessError(
            f"{error}: the broker's key would be lost, so the invite was not used; choose a folder "
            "that can be written with --keys DIR"
        ) from None


def _hand_in(token: InviteToken, key: str, give_up_s: float | None) -> None:
    """Hand in a key; wait for the broker, because nodes may start before it."""
    begun = time.monotonic()
    until = math.inf if give_up_s is None else begun + give_up_s
    for patience_s in itertools.chain(_REPORT_AFTER_S, itertools.repeat(_REPORT_EACH_S)):
        try:
            enroll(token, key, min(patience_s, until - time.monotonic()))
        except EnrolmentError as error:
            if error.fault is not EnrolmentFault.NO_ANSWER:
                raise
            now = time.monotonic()
            waiting = f"waiting for the broker at {token.address} for {now - begun:.0f} s"
            if now >= until:
                raise GaveUp(f"gave up: {waiting}; it did not answer the invite") from None
            structlog.get_logger().warning(waiting)
        else:
            structlog.get_logger().info("joined with an invite", broker=token.address)
            return
