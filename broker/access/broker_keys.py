"""What a broker with keys needs: its own key pair, and who has access."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from fedmq.broker.access.access_file import AccessFile
from fedmq.broker.access.curve import KeyPair
from fedmq.broker.access.key_files import BROKER_KEY, read_key
from fedmq.broker.access.rights import AccessStore


class BrokerKeys(Struct, frozen=True):
    """A broker's own key pair, and who has access."""

    own: KeyPair
    access: AccessStore

    @classmethod
    def in_folder(cls, folder: Path) -> BrokerKeys:
        """Return the keys of the broker that uses a key folder.

        Raises:
            FileNotFoundError: the folder holds no key of a broker.
            AccessError: the key is invalid, or others may read it.
        """
        return cls(read_key(folder, BROKER_KEY), AccessFile(folder))
