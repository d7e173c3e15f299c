"""Every decoder that reads from the network or the disk, as one function of bytes each.

A decoder that takes several pieces (a header and its buffers, the files of a ledger) gets
them joined into one string by `join`; `split` undoes that, whatever a fuzzer made of it.
`READERS` raise what the product raises; `DECODERS` swallow the project's own errors.
"""

import contextlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from msgspec import structs
from msgspec.msgpack import decode as unpack_any
from torch import nn

from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.toolkit.layout import Layout
from fedmq.broker.errors import BrokerError, WireError
from fedmq.broker.ledger.blob_store import BlobStore
from fedmq.broker.ledger.entries import (
    MESSAGES,
    PAYLOAD,
    Accepted,
    AnyEntry,
    blob_name,
    segment_path,
)
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC, pack, scan
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.wire.encoding import (
    check_inline,
    decode_frame,
    decode_message,
    is_deeper,
)
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    MAX_BUFFERS,
    MAX_DEPTH,
    POST_BYTES,
    Blob,
    Buffer,
    Message,
)
from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import CodecError
from fedmq.codecs.registry import codecs, make_codec
from fedmq.codecs.registry import decode as decode_tensors
from fedmq.nodes.errors import NodeError
from fedmq.nodes.messages.payloads import unpack
from fedmq.nodes.run.config import parse as parse_config
from tests.broker.ledger.payload import open_payload

OWN_ERRORS = (BrokerError, CodecError, AlgorithmError, NodeError)

MODEL = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
"""What decoded tensors are laid into; it has floats and a counter."""
_LAYOUT = Layout.of(MODEL)


def join(*parts: bytes) -> bytes:
    """Return the pieces as one string, each behind its length."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def split(data: bytes) -> list[bytes]:
    """Return the pieces that `join` joined; a length that is too large means all the rest."""
    parts = []
    start = 0
    while start + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, start)
        parts.append(data[start + 4 : start + 4 + size])
        start += 4 + size
    return parts


def _frame(data: bytes) -> None:
    decode_frame(memoryview(data))


def _message(data: bytes) -> None:
    is_deeper(decode_message(data).body, MAX_DEPTH)


def _inline(data: bytes) -> None:
    """A header, then the buffers beside it; only frames that carry a message have any."""
    header, *buffers = split(data) or [b""]
    frame = decode_frame(header)
    for each in (frame, *structs.asdict(frame).values()):
        if hasattr(each, "message") and hasattr(each, "inline"):
            check_inline(decode_message(each.message).blobs, each.inline, buffers, POST_BYTES)


def _segment(data: bytes) -> None:
    fd = os.memfd_create("segment")
    try:
        os.write(fd, data)
        for verify in (True, False):
            for _ in scan(Path(f"/proc/self/fd/{fd}"), verify_data=verify):
                pass
    finally:
        os.close(fd)


def _open_for_writing(folder: Path) -> None:
    entries: list[AnyEntry] = []
    ledger = Ledger(folder, entries.append)
    try:
        for entry in entries:
            if isinstance(entry, Accepted):
                message = entry.read()
                ledger.use(entry.seq, [blob_name(message, blob) for blob in message.blobs])
                ledger.read(entry.seq)
        _read_blobs(ledger.payload, entries)
    finally:
        ledger.close()


def _open_for_reading(folder: Path) -> None:
    index = open_payload(folder)
    try:
        _read_blobs(index, read_entries(folder))
    finally:
        index.close()


def _read_blobs(index: BlobStore, entries: Iterable[AnyEntry]) -> None:
    for entry in entries:
        if isinstance(entry, Accepted):
            message = entry.read()
            for blob in message.blobs:
                name = blob_name(message, blob)
                index.resume(name)
                size = index.size_of(name) or 0
                # In pieces of every length that an end of a link may ask for first.
                for step in (CHUNK_BYTES, 3):
                    for start in range(0, min(size, 64 * step), step):
                        index.read(name, start, min(step, size - start))


def _in_files(use: Callable[[Path], None]) -> Callable[[bytes], None]:
    """The pieces are files: one of messages, then those of payload."""

    def decoder(data: bytes) -> None:
        messages, *payloads = split(data) or [b""]
        _with_folder(use, [messages], payloads)

    return decoder


def _in_records(data: bytes) -> None:
    """The pieces are heads of entries, an empty one, then head and data of payload in turn.

    They get the right lengths and checksums, behind which a fuzzer of files never comes.
    """
    parts = split(data)
    cut = parts.index(b"") if b"" in parts else len(parts)
    messages, rest = parts[:cut], parts[cut + 1 :]
    pairs = zip(rest[::2], rest[1::2], strict=False)
    payload = [each for head, data in pairs for each in (pack(head, data), data)]
    files = [MAGIC, *map(pack, messages)]
    for use in (_open_for_reading, _open_for_writing):
        _with_folder(use, [b"".join(files)], [b"".join([MAGIC, *payload])])


def _with_folder(
    use: Callable[[Path], None], messages: Sequence[bytes], payloads: Sequence[bytes]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        for family, files in ((MESSAGES, messages), (PAYLOAD, payloads)):
            for number, data in enumerate(files):
                segment_path(Path(name), family, number).write_bytes(data)
        use(Path(name))


def _codec(name: str) -> Callable[[bytes], None]:
    """The pieces are the rest of the wire name, the meta, and the buffers."""

    def decoder(data: bytes) -> None:
        parts = split(data)
        if len(parts) < 2:
            return
        meta = _map(parts[1])
        decode_tensors(Encoded(name + _text(parts[0]), meta, _as_they_come(parts[2:])))

    return decoder


def _payload(data: bytes) -> None:
    """The pieces are a message and its blobs, which have the names of their bytes."""
    message, blobs = _with_blobs(data)
    unpack(message, blobs.__getitem__)


def _flatten(data: bytes) -> None:
    message, blobs = _with_blobs(data)
    payload = unpack(message, blobs.__getitem__)
    _LAYOUT.flatten(payload.weights)
    _LAYOUT.flatten_counters(payload.exact)


def _with_blobs(data: bytes) -> tuple[Message, list[Buffer]]:
    first, *rest = split(data) or [b""]
    blobs = _as_they_come(rest[:MAX_BUFFERS])
    names = tuple(Blob.of(each) for each in blobs)
    return structs.replace(decode_message(first), blobs=names), blobs


def _as_they_come(buffers: Sequence[bytes]) -> list[Buffer]:
    """Small blobs come as bytes, those that were fetched in memory that may be written to."""
    return [memoryview(bytearray(b)) if at % 2 else b for at, b in enumerate(buffers)]


def _config(data: bytes) -> None:
    parse_config(_text(data)).to_toml()


def _spec(data: bytes) -> None:
    make_codec(_text(data))


def _text(data: bytes) -> str:
    """A string of a message; msgspec lets nothing through that is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise WireError(str(error)) from None


def _map(data: bytes) -> dict[str, object]:
    """A map within a message's body."""
    try:
        found = unpack_any(data)
    except (ValueError, RecursionError) as error:
        raise WireError(str(error)) from None
    if not isinstance(found, dict):
        raise WireError("not a map")
    return found


READERS: dict[str, Callable[[bytes], None]] = {
    "frame": _frame,
    "message": _message,
    "inline": _inline,
    "segment": _segment,
    "ledger": _in_files(_open_for_writing),
    "follower": _in_files(_open_for_reading),
    "records": _in_records,
    **{f"codec-{name}": _codec(name) for name in codecs()},
    "payload": _payload,
    "flatten": _flatten,
    "config": _config,
    "spec": _spec,
}


def _swallow(reader: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def decoder(data: bytes) -> None:
        with contextlib.suppress(*OWN_ERRORS):
            reader(data)

    return decoder


DECODERS: dict[str, Callable[[bytes], None]] = {
    name: _swallow(reader) for name, reader in READERS.items()
}

JOINED = {name for name in READERS if name not in {"frame", "message", "segment", "config", "spec"}}
"""Decoders of several pieces."""
