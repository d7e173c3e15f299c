"""Key pairs as files: ``NAME.key`` holds both keys and stays here, ``NAME.pub`` the public key.

The folder also holds ``brokers.json``: the public keys of the brokers that this user's nodes know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from fedmq.broker.access.curve import KeyPair, key_bytes
from fedmq.broker.access.private_files import (
    check_private_folder,
    create_private,
    locked,
    make_key_folder,
    read_private,
    replace_private,
)
from fedmq.broker.errors import AccessError
from fedmq.broker.wire.addresses import name_fault

BROKER_KEY = "broker"
"""Name of a broker's own key."""
NODE_KEY = "node"
"""Name of the key that a node uses unless another is named."""
BROKERS_FILE = "brokers.json"
_HEADER = "# Secret key of fedmq; it never leaves this machine.\n"
_MAX_PUBLIC_BYTES = 4096


def key_path(folder: Path, name: str) -> Path:
    """Return the path of a key pair's file.

    Raises:
        AccessError: the name is invalid.
    """
    if fault := name_fault(name):
        raise AccessError(f"invalid name of a key: {fault}")
    return folder / f"{name}.key"


def new_key(folder: Path, name: str) -> KeyPair:
    """Draw a key pair, and write its two files.

    Args:
        folder: created with mode 0700 if it does not exist.
        name: of the files.

    Raises:
        AccessError: the name is invalid, the key exists, or the files cannot be written.
    """
    path = key_path(folder, name)
    make_key_folder(folder)
    pair = KeyPair.new()
    text = f"{_HEADER}public {pair.public}\nsecret {pair.secret}\n"
    try:
        create_private(path, text.encode())
    except FileExistsError:
        complete_key(folder, name)
        raise AccessError(f"the key {path} exists: choose another name, or delete it") from None
    replace_private(path.with_suffix(".pub"), f"{pair.public}\n".encode())
    return pair


def complete_key(folder: Path, name: str) -> None:
    """Write the public key's file of an existing key if it is missing: its maker ended before.

    Raises:
        FileNotFoundError: there is no such key.
        AccessError: see `read_key`; or the file cannot be written.
    """
    path = key_path(folder, name).with_suffix(".pub")
    public = read_key(folder, name).public
    if not path.exists():
        replace_private(path, f"{public}\n".encode())


def read_key(folder: Path, name: str) -> KeyPair:
    """Read a key pair.

    Raises:
        FileNotFoundError: there is no such key.
        AccessError: the name or the file is invalid, or others may read it.
    """
    path = key_path(folder, name)
    try:
        data, _ = read_private(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no key {path}") from None
    lines = data.decode(errors="replace").splitlines()
    fields = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    match fields:
        case [["public", public], ["secret", secret]]:
            try:
                pair = KeyPair.of(secret)
            except AccessError:
                fault = "its secret key is invalid"
            else:
                if pair.public == public:
                    return pair
                fault = "its public key does not belong to its secret"
        case _:
            fault = "expected the lines `public KEY` and `secret KEY`"
    then = "give it to the nodes (--broker-key)" if name == BROKER_KEY else "authorise it"
    raise AccessError(
        f"{path} is damaged: {fault}; restore it from a backup, or remove it, run `fedmq keys new "
        f"{name}` for another key, and {then}"
    )


def own_key(folder: Path, name: str) -> KeyPair:
    """Read a key pair; draw and write it if there is none.

    Raises:
        AccessError: see `read_key` and `new_key`.
    """
    with contextlib.suppress(FileNotFoundError):
        return read_key(folder, name)
    try:
        return new_key(folder, name)
    except AccessError:
        with contextlib.suppress(FileNotFoundError):
            return read_key(folder, name)  # another node that started now was first
        raise


def public_key(text: str) -> str:
    """Return a public key that a user gave as Z85, or as the path of a ``.pub`` file.

    Raises:
        AccessError: it is neither.
    """
    path = Path(text)
    if path.suffix == ".key":
        raise AccessError(f"{path} holds a secret key: use {path.with_suffix('.pub')}")
    if path.suffix == ".pub":
        try:
            with path.open("rb") as file:
                found = file.read(_MAX_PUBLIC_BYTES).decode(errors="replace").strip()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise AccessError(f"cannot read {path}: {reason}") from None
        try:
            key_bytes(found)
        except AccessError as error:
            raise AccessError(f"{path}: {error}") from None
        return found
    key_bytes(text)
    return text


def key_names(folder: Path) -> list[str]:
    """Return the names of the key pairs in a folder, in order; none if there is no folder.

    Raises:
        AccessError: others may open the folder.
    """
    if not folder.exists():
        return []
    check_private_folder(folder)
    return sorted(path.stem for path in folder.glob("*.key"))


def known_brokers(folder: Path) -> Mapping[str, str]:
    """Return the public keys of the brokers that this user's nodes know, by address.

    Raises:
        AccessError: the file is invalid, or others may read or write it.
    """
    path = folder / BROKERS_FILE
    try:
        data, _ = read_private(path)
    except FileNotFoundError:
        return {}
    try:
        brokers = msgspec.json.decode(data, type=dict[str, str])
        for address, key in brokers.items():
            key_bytes(key, f"the public key of the broker at {address}")
    except (msgspec.DecodeError, UnicodeDecodeError, AccessError) as error:
        raise AccessError(
            f"{path} is damaged: {error}; correct it, or remove it and start each node once more "
            "with --broker-key"
        ) from None
    return brokers


def add_broker(folder: Path, address: str, key: str) -> None:
    """Store the public key of a broker; it replaces an earlier one of this address.

    Raises:
        AccessError: the key or the file is invalid, or the file cannot be written.
    """
    key_bytes(key)
    make_key_folder(folder)
    path = folder / BROKERS_FILE
    with locked(path):
        brokers = {**known_brokers(folder), address: key}
        text = msgspec.json.format(msgspec.json.encode(brokers, order="sorted"), indent=2)
        replace_private(path, text + b"\n")
