"""Keys for the processes of a test: a folder of key files, edited as `fedmq keys` does."""

from __future__ import annotations

import time
from pathlib import Path

from fedmq.broker.access.access_file import AccessFile
from fedmq.broker.access.invites import InviteToken
from fedmq.broker.access.key_files import BROKER_KEY, new_key
from fedmq.broker.access.rights import Rights
from fedmq.broker.wire.schema import Range


class Keyring:
    """The key of a broker, and those of nodes, in one folder of one user.

    Args:
        folder: of the keys; created here.
        endpoint: address of the broker, for invites.
    """

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder, self._endpoint = folder, endpoint
        self._broker = new_key(folder, BROKER_KEY).public
        self._access = AccessFile(folder)

    def authorize(self, name: str, role: str, clients: tuple[Range, ...] = ()) -> None:
        """Make a node's key, and authorise it."""
        public = new_key(self.folder, name).public
        self._access.authorize(Rights(name=name, key=public, roles=(role,), clients=clients))

    def revoke(self, name: str) -> None:
        """Revoke a node's key."""
        self._access.revoke(name)

    def invite(self, name: str, clients: tuple[Range, ...]) -> str:
        """Return an invite for one worker, as text."""
        rights = Rights(name=name, roles=("worker",), clients=clients)
        pair = self._access.invite(rights, 1, time.time() + 3600)
        return InviteToken(self._endpoint, self._broker, pair).text()

    def of_broker(self) -> tuple[str, ...]:
        """Return the options of the broker."""
        return ("--keys", str(self.folder))

    def of_node(self, name: str) -> tuple[str, ...]:
        """Return the options of a node."""
        public = self.folder / f"{BROKER_KEY}.pub"
        return ("--keys", str(self.folder), "--key", name, "--broker-key", str(public))
