"""What clients keep between their tasks, on the disk of the worker that hosts them.

A worker saves a client's new local state, with the result that goes with it, before it
sends that result. Killed in between, it is given the task again, finds both, and sends the
result that it has: a task changes its client once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import xxhash
from msgspec import Struct

from fedmq.algorithms.base import Payload
from fedmq.broker.wire.encoding import decode_message, encode_message
from fedmq.broker.wire.schema import (
    Blob,
    Buffer,
    Message,
)
from fedmq.codecs.errors import CodecError
from fedmq.nodes.errors import NodeError, StorageError
from fedmq.nodes.messages.payloads import RAW, Packed, pack, unpack
from fedmq.nodes.run.session import make_folder
from fedmq.nodes.worker.client_files import ClientFolder


@dataclass(frozen=True)
class SavedClientState:
    """What a client keeps after a task, and that task's result as it was posted.

    task, seq: id of the task, and its number in the ledger. local: the algorithm's state, if it
    has any. memory: what the uplink's codec has left out of the results so far, if it remembers
    that.
    """

    task: str
    seq: int
    local: Payload | None
    message: Message
    data: tuple[Buffer, ...]
    memory: Payload | None = None


class _Part(Struct):
    """A payload that is kept: a message's body, and how many of the buffers are its own."""

    body: dict[str, Any]
    buffers: int


class _Head(Struct):
    task: str
    message: bytes
    sizes: list[int]
    """Of the buffers: those of the local state, of the memory, and of the result."""
    local: _Part | None
    memory: _Part | None


class ClientStateStore:
    """The kept states of a worker's clients.

    On disk a client has a folder, and each state a file there that is named by the number of its
    task in the ledger, ``client-3/000000000106.state``. The newest task counts, and saving one
    removes the files of older tasks. So a worker that was stopped while it saved, and whose
    clients were taken over meanwhile, cannot put its old state in the place of a newer one,
    whenever it goes on; nobody holds a lock.

    Args:
        folder: of one run, and no other; several workers may share it. None keeps the states in
            memory, where they end with the worker.

    Raises:
        NodeError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._memory: dict[int, SavedClientState] = {}
        if folder is not None:
            make_folder(folder)

    def get(self, client: int) -> SavedClientState | None:
        """Return what a client kept after the newest of its tasks, or None.

        Raises:
            NodeError: its file is damaged, or cannot be read.
        """
        if self._folder is None:
            return self._memory.get(client)
        states = ClientFolder(self._folder, client)
        try:
            found = states.newest()
        except OSError as error:
            raise NodeError(f"cannot read {states}: {error.strerror}") from None
        if found is None:
            return None
        seq, path, data = found
        try:
            return _read(data, seq)
        except (ValueError, msgspec.MsgspecError, CodecError) as error:
            raise NodeError(f"local state of client {client} in {path}: {error}") from None

    def put(self, client: int, kept: SavedClientState) -> SavedClientState:
        """Keep a client's state; return what is to be posted as its task's result.

        That is ``kept``, or what another node has kept of the same task before: the client's
        next task starts from that.

        Raises:
            StorageError: its file cannot be written now.
            NodeError: what another node has kept is damaged.
        """
        if self._folder is None:
            known = self._memory.get(client)
            if known is not None and known.seq >= kept.seq:
                return known if known.seq == kept.seq else kept
            self._memory[client] = kept
            return kept
        states = ClientFolder(self._folder, client)
        try:
            if states.save(kept.seq, _write(kept)):
                return kept
        except OSError as error:
            raise StorageError(f"cannot write {states}: {error.strerror}") from None
        known = self.get(client)
        if known is None:
            raise StorageError(f"cannot write {states}: it was removed meanwhile")
        return known if known.seq == kept.seq else kept


def _write(kept: SavedClientState) -> bytes:
    local, memory = _packed(kept.local), _packed(kept.memory)
    buffers = [*(local.data if local else ()), *(memory.data if memory else ()), *kept.data]
    head = msgspec.msgpack.encode(
        _Head(
            task=kept.task,
            message=encode_message(kept.message),
            sizes=[memoryview(each).nbytes for each in buffers],
            local=_Part(dict(local.body), len(local.data)) if local else None,
            memory=_Part(dict(memory.body), len(memory.data)) if memory else None,
        )
    )
    whole = b"".join([len(head).to_bytes(8, "little"), head, *buffers])
    return xxhash.xxh3_128_digest(whole) + whole


def _packed(payload: Payload | None) -> Packed | None:
    return pack(payload, RAW, 0) if payload is not None else None


def _read(data: bytes, seq: int) -> SavedClientState:
    if len(data) < 24 or xxhash.xxh3_128_digest(memoryview(data)[16:]) != data[:16]:
        raise ValueError("damaged: its checksum does not match")
    start = 24 + int.from_bytes(data[16:24], "little")
    head = msgspec.msgpack.decode(data[24:start], type=_Head)
    buffers: list[Buffer] = []
    for size in head.sizes:
        buffers.append(data[start : start + size])
        start += size
    message = decode_message(head.message)
    local, rest = _take(head.local, message, buffers)
    memory, rest = _take(head.memory, message, rest)
    return SavedClientState(head.task, seq, local, message, tuple(rest), memory)


def _take(
    part: _Part | None, message: Message, buffers: list[Buffer]
) -> tuple[Payload | None, list[Buffer]]:
    """Return a kept payload from the first buffers, and the other buffers."""
    if part is None:
        return None, buffers
    mine = buffers[: part.buffers]
    blobs = tuple(Blob.of(each) for each in mine)
    holder = msgspec.structs.replace(message, body=part.body, blobs=blobs)
    return unpack(holder, mine.__getitem__), buffers[part.buffers :]
