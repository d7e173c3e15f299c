"""State that clients keep between tasks, on the disk of the worker that hosts them.

A worker saves a client's new local state together with the task's result before it posts the
result. If it is killed in between, it receives the task again and posts the saved result: a task
changes its client's state exactly once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash
from msgspec import Struct

from fedmq.algorithms.base import Payload
from fedmq.broker.wire.encoding import decode_message, encode_message
from fedmq.broker.wire.schema import Buffer, Message
from fedmq.codecs.errors import CodecError
from fedmq.nodes.errors import NodeError, StorageError
from fedmq.nodes.messages.payload_parts import PayloadPart, append_payload, take_payload
from fedmq.nodes.process.exception_text import reason_of
from fedmq.nodes.run.session import make_folder
from fedmq.nodes.worker.client_files import ClientFolder


@dataclass(frozen=True)
class SavedClientState:
    """A client's state after a task, and the task's result.

    task, seq: id of the task, and its number in the ledger.
    local: the algorithm's local state, if it has any.
    message, data: the result, as posted.
    memory: error-feedback residual of the uplink's codec, if it keeps one.
    """

    task: str
    seq: int
    local: Payload | None
    message: Message
    data: tuple[Buffer, ...]
    memory: Payload | None = None


class _Head(Struct):
    task: str
    message: bytes
    sizes: list[int]
    """Sizes of the buffers of local state, memory and result, in this order, in bytes."""
    local: PayloadPart | None
    memory: PayloadPart | None


class ClientStateStore:
    """The saved states of a worker's clients.

    Each client has a folder, and each state a file there, named by the number of its task in the
    ledger: ``client-3/000000000106.state``. The newest task counts; saving it removes the files of
    older tasks. So a worker that is suspended while it saves, and whose clients another worker
    takes over, cannot replace a newer state by its old one when it continues. No lock is needed.

    Args:
        folder: of one run only; several workers can share it. None keeps the states in memory,
            until the worker ends.

    Raises:
        NodeError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._memory: dict[int, SavedClientState] = {}
        if folder is not None:
            make_folder(folder)

    def get(self, client: int) -> SavedClientState | None:
        """Return a client's state after its newest task, or None.

        Raises:
            NodeError: the file is damaged or cannot be read.
        """
        if self._folder is None:
            return self._memory.get(client)
        states = ClientFolder(self._folder, client)
        try:
            found = states.newest()
        except OSError as error:
            raise NodeError(f"cannot read {states}: {reason_of(error)}") from None
        if found is None:
            return None
        seq, path, data = found
        try:
            return _read(data, seq)
        except (ValueError, msgspec.MsgspecError, CodecError) as error:
            raise NodeError(f"local state of client {client} in {path}: {error}") from None

    def put(self, client: int, state: SavedClientState) -> SavedClientState:
        """Save a client's state; return the state whose result the worker posts.

        If another node has saved the same task before, its state is returned: the client's next
        task starts from that one.

        Raises:
            StorageError: the file cannot be written now.
            NodeError: the state that another node has saved is damaged.
        """
        if self._folder is None:
            known = self._memory.get(client)
            if known is not None and known.seq >= state.seq:
                return known if known.seq == state.seq else state
            self._memory[client] = state
            return state
        states = ClientFolder(self._folder, client)
        try:
            if states.save(state.seq, _write(state)):
                return state
        except OSError as error:
            raise StorageError(f"cannot write {states}: {reason_of(error)}") from None
        known = self.get(client)
        if known is None:
            raise StorageError(f"cannot write {states}: the new file was removed")
        return known if known.seq == state.seq else state


def _write(state: SavedClientState) -> bytes:
    buffers: list[Buffer] = []
    local = append_payload(state.local, buffers) if state.local is not None else None
    memory = append_payload(state.memory, buffers) if state.memory is not None else None
    buffers += state.data
    head = msgspec.msgpack.encode(
        _Head(
            task=state.task,
            message=encode_message(state.message),
            sizes=[memoryview(each).nbytes for each in buffers],
            local=local,
            memory=memory,
        )
    )
    whole = b"".join([len(head).to_bytes(8, "little"), head, *buffers])
    return xxhash.xxh3_128_digest(whole) + whole


def _read(data: bytes, seq: int) -> SavedClientState:
    if len(data) < 24 or xxhash.xxh3_128_digest(memoryview(data)[16:]) != data[:16]:
        raise ValueError("damaged: its checksum does not match")
    start = 24 + int.from_bytes(data[16:24], "little")
    head = msgspec.msgpack.decode(data[24:start], type=_Head)
    ends = list(itertools.accumulate(head.sizes, initial=start))
    rest: Sequence[Buffer] = [data[a:b] for a, b in itertools.pairwise(ends)]
    message = decode_message(head.message)
    local = memory = None
    if head.local is not None:
        local, rest = take_payload(head.local, rest)
    if head.memory is not None:
        memory, rest = take_payload(head.memory, rest)
    return SavedClientState(head.task, seq, local, message, tuple(rest), memory)
