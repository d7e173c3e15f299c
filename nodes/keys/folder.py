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

from fedmq.nodes.errors import ConfigError
from fedmq.nodes.process.exception_text import reason_of
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

    Each address gets another one, so that the operator of one broker cannot use it at another. If
    it cannot be stored, it is random, and a warning says what that means.

    Args:
        endpoint: address of the broker.
        given: the folder of keys, see `key_folder`.
    """
    try:
        secret = _user_secret(key_folder(given))
    except (ConfigError, OSError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"{error.filename}: {reason_of(error)}"
        structlog.get_logger().warning(
            "cannot store this user's secret: if this node restarts, the run refuses it under the "
            "same name; a folder (--state or --run DIR) prevents that",
            reason=reason,
        )
        return secrets.token_hex(16)
    return hashlib.sha256(f"{secret} {endpoint}".encode()).hexdigest()[:32]


def _user_secret(folder: Path) -> str:
    path = folder / _FILE
    with contextlib.suppress(FileNotFoundError):
        return _read(path)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = folder / f"{_FILE}.{secrets.token_hex(4)}"
    try:
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(f"{secrets.token_hex(16)}\n")
            file.flush()
            os.fsync(handle)
        # A link fails if another node was first, and never shows a part of the file.
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return _read(path)


def _read(path: Path) -> str:
    text = path.read_bytes().decode(errors="replace").strip()
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        raise ConfigError(f"{path} is damaged; remove it")
    return text
