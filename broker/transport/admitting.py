"""Lets in the keys that have access, each time that the driver reads who has."""

from __future__ import annotations

from collections.abc import Callable

from fedmq.broker.access.rights import Access, AccessStore


class AdmittingStore:
    """An `AccessStore` that reports what it returns.

    Args:
        store: where access is kept.
        admit: called with who has access from now on.
    """

    def __init__(self, store: AccessStore, admit: Callable[[Access], None]) -> None:
        self._store, self._admit = store, admit

    def load(self) -> Access:
        """See `AccessStore`."""
        return self._admitted(self._store.load())

    def changed(self) -> bool:
        """See `AccessStore`."""
        return self._store.changed()

    def enroll(self, key: str, invite: str, now: float) -> Access:
        """See `AccessStore`."""
        return self._admitted(self._store.enroll(key, invite, now))

    def _admitted(self, access: Access) -> Access:
        self._admit(access)
        return access
