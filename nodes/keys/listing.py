"""What ``fedmq keys list`` shows: keys and their rights, invites, own keys, known brokers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedmq.broker.access.access_file import SHORT_KEY, AccessFile
from fedmq.broker.access.key_files import BROKERS_FILE, key_names, known_brokers, read_key
from fedmq.broker.access.rights import Access, Invite, Rights
from fedmq.broker.errors import AccessError
from fedmq.broker.wire.addresses import ROLES, WORKER
from fedmq.broker.wire.schema import Range
from fedmq.nodes.process.terminal import WIDTH, fitted, plain, plural

_NAME_COLUMNS = 20


def lines(folder: Path, now: float, faults: list[AccessError]) -> Iterator[str]:
    """Yield the lines of ``fedmq keys list``; a file that is invalid does not hide the others.

    Args:
        folder: of the keys.
        now: the time, in seconds since 1970.
        faults: gets an error for each file that cannot be used.

    Raises:
        AccessError: others may open the folder.
    """
    own = key_names(folder)
    yield plain(folder)
    file = AccessFile(folder)
    try:
        access, revoked = file.load(), file.revoked()
    except AccessError as error:
        faults.append(error)
        yield f"authorised keys: unknown, {file.path.name} cannot be used"
    else:
        yield from _authorised(access, revoked, now)
    if own:
        yield "own keys:"
    for name in own:
        try:
            yield from _entry(name, read_key(folder, name).public)
        except AccessError as error:
            faults.append(error)
            yield from _entry(name, "cannot be used")
    try:
        brokers = known_brokers(folder)
    except AccessError as error:
        faults.append(error)
        yield f"known brokers: unknown, {BROKERS_FILE} cannot be used"
        return
    if brokers:
        yield "known brokers:"
    for address, key in brokers.items():
        yield from _entry(plain(address), key)


def _authorised(access: Access, revoked: Sequence[Rights], now: float) -> Iterator[str]:
    yield f"authorised keys: {len(access.keys) or 'none'}"
    for rights in access.keys.values():
        yield from _entry(rights.name, f"{rights.key[:SHORT_KEY]}  {in_words(rights)}")
    if access.invites:
        yield f"invites: {len(access.invites)}"
    for each in access.invites.values():
        yield from _entry(each.rights.name, f"{_state(each, now)}; {in_words(each.rights)}")
    if revoked:
        yield f"revoked keys: {len(revoked)}"
    for rights in revoked:
        yield from _entry(rights.name, rights.key[:SHORT_KEY])


def facts(folder: Path, now: float) -> dict[str, Any]:
    """Return what ``fedmq keys list --json`` prints; it has no secrets."""
    file = AccessFile(folder)
    access = file.load()
    return {
        "folder": str(folder),
        "keys": [_facts(each) for each in access.keys.values()],
        "invites": [
            {
                **_facts(each.rights),
                "open": _is_open(each, now),
                "uses_left": each.uses,
                "expires_at": each.expires_at,
                "enrolled": list(each.enrolled),
            }
            for each in access.invites.values()
        ],
        "revoked": [_facts(each) for each in file.revoked()],
        "own_keys": {name: read_key(folder, name).public for name in key_names(folder)},
        "brokers": dict(known_brokers(folder)),
    }


def _facts(rights: Rights) -> dict[str, Any]:
    return {
        "name": rights.name,
        "key": rights.key,
        "roles": list(rights.roles),
        "clients": None if rights.clients is None else [list(each) for each in rights.clients],
        "runs": list(rights.runs),
        "read_files": rights.read_files,
        "replaces": list(rights.replaces),
    }


def _entry(name: str, text: str) -> Iterator[str]:
    """Yield an indented line of a list, wrapped, with a long name on a line of its own."""
    indent = " " * (_NAME_COLUMNS + 4)
    first = f"  {name.ljust(_NAME_COLUMNS)}  "
    if len(name) > _NAME_COLUMNS:
        yield f"  {name}"
        first = indent
    found = fitted(text, width=WIDTH - len(indent), indent="")
    for index, line in enumerate(found):
        yield f"{indent if index else first}{line}"


def in_words(rights: Rights) -> str:
    """Return what a key may do: ``worker; clients 0-9; all runs``."""
    parts = ["all roles" if set(rights.roles) == set(ROLES) else ", ".join(rights.roles)]
    if WORKER in rights.roles:
        clients = rights.clients
        parts.append("all clients" if clients is None else f"clients {clients_text(clients, ', ')}")
    parts.append(f"runs {', '.join(rights.runs)}" if rights.runs else "all runs")
    if rights.read_files:
        parts.append("reads the ledger's files")
    if rights.replaces:
        parts.append(f"replaces {plural(len(rights.replaces), 'key')}")
    return "; ".join(parts)


def clients_text(clients: Sequence[Range], comma: str = ",") -> str:
    """Return ranges of clients as the command line takes them: ``0-9,12``."""
    return comma.join(f"{low}" if low == high else f"{low}-{high}" for low, high in clients)


def _is_open(invite: Invite, now: float) -> bool:
    return invite.uses > 0 and now < invite.expires_at


def _state(invite: Invite, now: float) -> str:
    left = f"{plural(invite.uses, 'use')} left"
    if now >= invite.expires_at:
        return f"expired, {left}"
    if not invite.uses:
        return "used up"
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(invite.expires_at))
    return f"open, {left}, until {at}"
