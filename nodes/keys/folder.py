"""The folder of this user's keys, and the secret that names nodes without a key.

Without CURVE a node proves that a name is its own with a secret in its Hello. A node with a folder
keeps one there; nodes without a folder share the user's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from pathlib import Path

import structlog

from fedmq.broker.access.private_files import create_private, make_key_folder, read_private
from fedmq.broker.errors import AccessError, EndpointError
from fedmq.broker.transport.listening import is_loopback
from fedmq.broker.wire.endpoints import parse_endpoint
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.process.user_folder import user_folder

KEYS_VARIABLE = "FEDMQ_KEYS"
BROKER_KEY_VARIABLE = "FEDMQ_BROKER_KEY"
JOIN_VARIABLE = "FEDMQ_JOIN"
_FILE = "keyless.secret"


def key_folder(given: Path | None = None) -> Path:
    """Return the folder of keys: ``given``, else that of FEDMQ_KEYS, else the user's.

    Raises:
        ConfigError: the user has no home.
    """
    if given is not None:
        return given
    if named := os.environ.get(KEYS_VARIABLE, ""):
        return Path(named)
    folder = user_folder()
    if folder is None:
        raise ConfigError(
            f"this user has no home folder for keys: use --keys DIR or set {KEYS_VARIABLE}"
        )
    return folder / "keys"


def has_key_folder() -> bool:
    """Return whether this user has a place for keys: no, without a home and the variable."""
    return bool(os.environ.get(KEYS_VARIABLE)) or user_folder() is not None


def secret_for(endpoint: str, given: Path | None = None) -> str:
    """Return what proves this user's nodes to a broker that knows no keys, the same at each start.

    Each address gets another one, so that the operator of one broker cannot use it at another: a
    node that connects to another name or address of the same host does not own its earlier name.
    Only the spellings of loopback count as one. If the secret cannot be stored, it is random, and a
    warning says what that means.

    Args:
        endpoint: address of the broker.
        given: the folder of keys, see `key_folder`.
    """
    try:
        secret = _user_secret(key_folder(given))
    except (ConfigError, AccessError) as error:
        structlog.get_logger().warning(
            "cannot store this user's secret: if this node restarts, the run refuses it under the "
            "same name; a folder (--state or --run DIR) prevents that",
            reason=str(error),
        )
        return secrets.token_hex(16)
    return hashlib.sha256(f"{secret} {_broker_at(endpoint)}".encode()).hexdigest()[:32]


def _broker_at(address: str) -> str:
    """Return the same text for all spellings of an address of this host, and of a host's name.

    The port stays: another user's broker on this host gets another secret.
    """
    try:
        endpoint = parse_endpoint(address)
    except EndpointError:
        return address
    if endpoint.path:
        return f"ipc://{Path(endpoint.path).absolute()}"
    host = endpoint.host.lower()
    here = host == "localhost" or (endpoint.literal and is_loopback(host))
    return f"tcp://{'localhost' if here else host}:{endpoint.port}"


def _user_secret(folder: Path) -> str:
    path = folder / _FILE
    with contextlib.suppress(FileNotFoundError):
        return _read(path)
    make_key_folder(folder)
    with contextlib.suppress(FileExistsError):  # another node that started now was first
        create_private(path, f"{secrets.token_hex(16)}\n".encode())
    return _read(path)


def _read(path: Path) -> str:
    data, _ = read_private(path)
    text = data.decode(errors="replace").strip()
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        raise AccessError(f"{path} is damaged; remove it")
    return text
