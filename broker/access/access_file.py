"""``access.json``: who may connect to a broker, kept in its key folder.

The command line and the running broker edit it, one at a time: each takes the lock, reads the
file, and replaces it at once. A person may edit it, too; the broker notices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from fedmq.broker.access.curve import KeyPair, key_bytes
from fedmq.broker.access.private_files import (
    locked,
    make_key_folder,
    read_private,
    replace_private,
)
from fedmq.broker.access.rights import LOCAL, Access, Invite, Rights
from fedmq.broker.errors import AccessError
from fedmq.broker.wire.addresses import ROLES, name_fault

ACCESS_FILE = "access.json"
_FORMAT = 1
SHORT_KEY = 8
"""Characters of a public key by which a person recognises it in a list."""
_MAX_INVITE_NAME = 90
"""The keys that an invite enrolls have its name and a number."""
_Signature = tuple[int, int, int, int]


class _Content(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of the file. A field that this version does not know could limit a right."""

    format: int = _FORMAT
    keys: tuple[Rights, ...] = ()
    invites: tuple[Invite, ...] = ()
    revoked: tuple[Rights, ...] = ()
    """Rights of revoked keys, which a new key may take over."""


class AccessFile:
    """The `AccessStore` of a live broker, and what edits it.

    Connections without a key come only from this host, over a Unix socket; they have all rights.

    Args:
        folder: with mode 0700; holds the file, with mode 0600. No file authorises no key.

    Attributes:
        path: of the file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ACCESS_FILE
        self._loaded: _Signature | None = None
        """Of the file as last loaded, valid or not; None if there was none."""
        self._existed = False
        """Whether it has been loaded; then a missing file is no broker without nodes."""

    # ---- what a broker needs

    def load(self) -> Access:
        """Return the present state.

        Raises:
            AccessError: the file is invalid, others may read or write it, or it has vanished.
        """
        self._loaded = self._signature()  # if it changes meanwhile, `changed` says so
        if self._loaded is None and self._existed:
            raise AccessError(f"{self.path} is missing: restore it, or start the broker again")
        self._existed = self._loaded is not None
        return _access(self._read())

    def changed(self) -> bool:
        """Return whether the file may have changed since the last `load`."""
        return self._signature() != self._loaded

    def enroll(self, key: str, invite: str, now: float) -> Access:
        """Give a key the rights of an invite; see `AccessStore`."""
        key_bytes(key)

        def enlist(content: _Content) -> _Content:
            found = next((each for each in content.invites if each.rights.key == invite), None)
            if found is None:
                raise AccessError("the invite was revoked")
            if any(rights.key == key for rights in content.keys) and key in found.enrolled:
                return content
            _check_open(found, key, now)
            taken = {rights.name for rights in (*_all_rights(content), *content.revoked)}
            names = (f"{found.rights.name}-{number}" for number in itertools.count(1))
            name = next(name for name in names if name not in taken)
            used = replace(found, uses=found.uses - 1, enrolled=(*found.enrolled, key))
            return replace(
                content,
                keys=(*content.keys, replace(found.rights, name=name, key=key)),
                invites=tuple(used if each is found else each for each in content.invites),
            )

        return _access(self._edit(enlist))

    # ---- what the command line needs

    def authorize(self, rights: Rights) -> None:
        """Add a key; if the same key has the same name already, change its rights.

        Raises:
            AccessError: the rights are invalid, the name or the key is in use, the key was revoked,
                or the file cannot be read or written.
        """

        def add(content: _Content) -> _Content:
            same = [each for each in content.keys if each.name == rights.name]
            if same and same[0].key == rights.key:
                new = replace(rights, replaces=same[0].replaces)
                return replace(content, keys=_swapped(content.keys, same[0], new))
            _check_not_replaced(content, rights.key)
            before = next((each for each in content.revoked if each.key == rights.key), None)
            if before is not None:
                raise AccessError(
                    f"this key was revoked: make another one on its host; if it may be used again, "
                    f"--replace {before.name} gives it back its rights"
                )
            return replace(content, keys=(*content.keys, rights))

        self._edit(add)

    def replace(self, name: str, key: str) -> Rights:
        """Give the name, the rights and the nodes of a key to a new one; return its rights.

        The old key may have been revoked before; otherwise it is now. A revoked key may be given
        back its own rights. If the new key had rights under another name, it loses that name.

        Raises:
            AccessError: no key has this name, the new key is invalid, or the file cannot be read or
                written.
        """

        def swap(content: _Content) -> _Content:
            choices = (*content.keys, *content.revoked)
            old = next((each for each in choices if each.name == name), None)
            if old is None:
                raise AccessError(f"no key has the name {name!r}: {_named(choices)}")
            _check_not_replaced(content, key)
            if key == old.key:
                new = old
            else:
                new = replace(old, key=key, replaces=(*old.replaces, old.key))
            others = tuple(each for each in content.keys if each is old or each.key != key)
            if old in others:
                return replace(content, keys=_swapped(others, old, new))
            revoked = tuple(each for each in content.revoked if each is not old)
            return replace(content, keys=(*others, new), revoked=revoked)

        return next(each for each in self._edit(swap).keys if each.name == name)

    def revoke(self, name_or_key: str) -> Rights:
        """Remove a key, or an invite (keys that it has enrolled stay); return its rights.

        Args:
            name_or_key: a name, or a public key, or the beginning of a single one with at least
                `SHORT_KEY` characters.

        Raises:
            AccessError: there is no such key or invite, or several, or the file cannot be read or
                written.
        """
        revoked: list[Rights] = []

        def remove(content: _Content) -> _Content:
            choices = _all_rights(content)
            found = [each for each in choices if name_or_key in (each.name, each.key)]
            if not found and len(name_or_key) >= SHORT_KEY:
                found = [each for each in choices if each.key.startswith(name_or_key)]
                if len(found) > 1:
                    raise AccessError(f"several keys begin with {name_or_key!r}: {_named(found)}")
            if not found:
                raise AccessError(f"no key or invite is {name_or_key!r}: {_named(choices)}")
            revoked.extend(found)
            keys = [each for each in content.keys if each in found]
            names = {each.name for each in keys}
            return replace(
                content,
                keys=tuple(each for each in content.keys if each not in found),
                invites=tuple(each for each in content.invites if each.rights not in found),
                revoked=(*(each for each in content.revoked if each.name not in names), *keys),
            )

        self._edit(remove)
        return revoked[0]

    def invite(self, rights: Rights, uses: int, expires_at: float) -> KeyPair:
        """Add an invite; return its key pair, of which the file holds the public half.

        Args:
            rights: of the keys that will be handed in; ``name`` is the invite's, ``key`` ignored.
            uses: number of keys that may be handed in.
            expires_at: in seconds since 1970.

        Raises:
            AccessError: the rights are invalid, the name is in use, or the file cannot be read or
                written.
        """
        pair = KeyPair.new()
        new = Invite(rights=replace(rights, key=pair.public), uses=uses, expires_at=expires_at)
        self._edit(lambda content: replace(content, invites=(*content.invites, new)))
        return pair

    def revoked(self) -> tuple[Rights, ...]:
        """Return the rights that revoked keys had, which `replace` may give to a new key.

        Raises:
            AccessError: see `load`.
        """
        return self._read().revoked

    # ---- the file

    def _edit(self, change: Callable[[_Content], _Content]) -> _Content:
        """Change the file; no other process edits it meanwhile. Return the new content."""
        make_key_folder(self.path.parent)
        with locked(self.path):
            before = self._read()
            after = change(before)
            if after != before:
                _check(after)
                data = msgspec.json.format(msgspec.json.encode(after), indent=2)
                replace_private(self.path, data + b"\n")
        return after

    def _read(self) -> _Content:
        try:
            data, _ = read_private(self.path)
        except FileNotFoundError:
            return _Content()
        try:
            content = msgspec.json.decode(data, type=_Content)
            _check(content)
        except (msgspec.DecodeError, UnicodeDecodeError, AccessError) as error:
            raise AccessError(
                f"{self.path} is invalid: {error}; correct it, or restore it from a backup "
                "(without it, no key is authorised)"
            ) from None
        return content

    def _signature(self) -> _Signature | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _access(content: _Content) -> Access:
    return Access(
        keys={rights.key: rights for rights in content.keys},
        invites={each.rights.key: each for each in content.invites},
        keyless=LOCAL,
    )


def _check_not_replaced(content: _Content, key: str) -> None:
    """Raise AccessError if another key has taken over the nodes of a key."""
    for each in content.keys:
        if key in each.replaces:
            raise AccessError(
                f"the key {each.name!r} has replaced this key and has its nodes: authorise another "
                "one"
            )


def _check_open(invite: Invite, key: str, now: float) -> None:
    """Raise AccessError if no further key may be handed in with an invite."""
    if key in invite.enrolled:
        raise AccessError("the key was handed in with this invite, and revoked later")
    if now >= invite.expires_at:
        raise AccessError("the invite has expired")
    if invite.uses < 1:
        raise AccessError("the invite has no uses left")


def _check(content: _Content) -> None:
    """Raise AccessError if the content is invalid."""
    if content.format != _FORMAT:
        raise AccessError(f"expected format {_FORMAT}, got {content.format}")
    names: set[str] = set()
    keys: set[str] = set()
    for rights in content.revoked:
        _check_rights(rights)
    for rights in _all_rights(content):
        _check_rights(rights)
        if rights.name in names:
            raise AccessError(f"the name {rights.name!r} is in use: choose another, or revoke it")
        if rights.key in keys:
            used_by = next(each.name for each in _all_rights(content) if each.key == rights.key)
            raise AccessError(f"the key {rights.key} is in use: its name is {used_by!r}")
        names.add(rights.name)
        keys.add(rights.key)
    for invite in content.invites:
        if len(invite.rights.name) > _MAX_INVITE_NAME:
            raise AccessError(f"expected a name of at most {_MAX_INVITE_NAME} characters")
        if invite.uses < 0:
            raise AccessError(f"{invite.rights.name}: expected uses of at least 0")
        if not math.isfinite(invite.expires_at):
            raise AccessError(f"{invite.rights.name}: expected a finite expires_at")


def _check_rights(rights: Rights) -> None:
    if fault := name_fault(rights.name):
        raise AccessError(f"invalid name of a key: {fault}")
    if rights.name == LOCAL.name:
        raise AccessError(f"the name {LOCAL.name!r} is reserved for connections without a key")
    key_bytes(rights.key, f"the public key of {rights.name}")
    unknown = [role for role in rights.roles if role not in ROLES]
    if unknown or not rights.roles:
        got = repr(unknown[0]) if unknown else "none"
        raise AccessError(f"{rights.name}: expected roles out of {', '.join(ROLES)}, got {got}")
    for low, high in rights.clients or ():
        if low > high:
            raise AccessError(f"{rights.name}: expected clients LOW-HIGH, got {low}-{high}")
    for run in rights.runs:
        if fault := name_fault(run):
            raise AccessError(f"{rights.name}: invalid name of a run: {fault}")


def _all_rights(content: _Content) -> list[Rights]:
    return [*content.keys, *(each.rights for each in content.invites)]


def _swapped(keys: Sequence[Rights], old: Rights, new: Rights) -> tuple[Rights, ...]:
    return tuple(new if each is old else each for each in keys)


def _named(keys: Sequence[Rights]) -> str:
    names = ", ".join(sorted(each.name for each in keys))
    return f"there are {names}" if names else "there are none"
