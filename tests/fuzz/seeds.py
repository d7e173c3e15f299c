"""Valid inputs of every decoder, from which a fuzzer starts.

Frames and entries are made from the structs themselves, so a new kind or field is in.
"""

import json
import re
import tempfile
import typing
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import inspect, structs

from fedmq.algorithms.base import Payload
from fedmq.broker.ledger.entries import (
    MESSAGES,
    PAYLOAD,
    Accepted,
    AcceptedAll,
    AnyRecord,
    blob_name,
    segment_path,
)
from fedmq.broker.ledger.records import MAGIC, scan
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.wire.encoding import (
    decode_message,
    encode_frame,
    encode_message,
)
from fedmq.broker.wire.schema import (
    AnyFrame,
    Blob,
    Message,
)
from fedmq.codecs.base import Encoded
from fedmq.codecs.registry import codecs, make_codec
from fedmq.nodes.messages.payloads import Codecs, Packed, pack
from fedmq.nodes.run.config import load
from tests.fuzz.decoders import MODEL, READERS, join

SPECS = {"cast": ("cast(float16)", "cast(bfloat16)")}
"""How to make a codec that has no default; any other is made by its name."""
BLOBS = (b"first blob", b"", bytes(range(200)))
_GOLDEN = Path(__file__).parents[1] / "golden"


def golden(kind: str) -> list[bytes]:
    """Return the golden bytes of a kind of frame, or of a message, in all versions."""
    files = [json.loads(path.read_text()) for path in sorted(_GOLDEN.glob("wire-*.json"))]
    return [bytes.fromhex(each[kind]) for each in files if kind in each]


def example(of: Any) -> Any:
    """Return a valid value of a type, with something in every field."""
    match inspect.type_info(of) if not isinstance(of, inspect.Type) else of:
        case inspect.StructType(cls=cls, fields=fields):
            return cls(**{f.name: f.default if _fixed(f) else example(f.type) for f in fields})
        case inspect.UnionType(types=types):
            return example(next(t for t in types if not isinstance(t, inspect.NoneType)))
        case inspect.VarTupleType(item_type=item):
            return (example(item),)
        case inspect.TupleType(item_types=items):
            return tuple(example(item) for item in items)
        case inspect.DictType(key_type=key, value_type=value):
            return {example(key): example(value)}
        case inspect.StrType(pattern=str(pattern)):
            return next(each for each in ("some text", "0a") if re.search(pattern, each))
        case inspect.StrType(min_length=int(least)):
            return "some text".ljust(least, "x")
        case inspect.StrType() | inspect.AnyType():
            return "some text"
        case inspect.BytesType(min_length=least):
            return bytes(least or 4)
        case inspect.IntType(le=most):
            return 0 if most == 0 else 1
        case inspect.FloatType():
            return 0.5
        case inspect.BoolType():
            return True
        case inspect.NoneType():
            return None
        case other:
            raise TypeError(f"no example of {other}")


def _fixed(field: inspect.Field) -> bool:
    # The protocol's version; an empty default is there to be filled.
    return field.default is not msgspec.NODEFAULT and bool(field.default)


def message(**fields: Any) -> Message:
    """Return the newest golden message with other fields."""
    return structs.replace(decode_message(golden("message")[-1]), **fields)


def _frames() -> list[bytes]:
    kinds = typing.get_args(AnyFrame)
    old = [data for kind in kinds for data in golden(kind.__name__.lower())]
    return old + [encode_frame(example(kind)) for kind in kinds]


def _inline() -> list[bytes]:
    carried = encode_message(message(blobs=tuple(Blob.of(each) for each in BLOBS)))
    seeds = []
    for kind in typing.get_args(AnyFrame):
        if {"message", "inline"} <= {field.name for field in structs.fields(kind)}:
            frame = structs.replace(example(kind), message=carried, inline=(0, 2))
            seeds.append(join(encode_frame(frame), BLOBS[0], BLOBS[2]))
    return seeds


@cache
def _files() -> tuple[bytes, bytes, bytes]:
    """Return the segments of a small ledger: messages, and payload twice."""
    note = message(blobs=tuple(Blob.of(each) for each in BLOBS))
    with tempfile.TemporaryDirectory() as name:
        ledger = Ledger(Path(name))
        for blob, data in zip(note.blobs, BLOBS, strict=True):
            for start in range(0, len(data) or 1, 64):
                ledger.put(blob_name(note, blob), blob.size, start, data[start : start + 64])
        entries = [example(kind) for kind in typing.get_args(AnyRecord)]
        whole: dict[type, dict[str, Any]] = {
            Accepted: {"message": encode_message(note)},
            AcceptedAll: {"messages": (encode_message(note),) * 2},
        }
        for entry in entries:
            fields = {"seq": ledger.next_seq, **whole.get(type(entry), {})}
            ledger.append(structs.replace(entry, **fields))
        ledger.close()
        messages, payload = (
            segment_path(Path(name), family, 0).read_bytes() for family in (MESSAGES, PAYLOAD)
        )
    return messages, payload, MAGIC


def _records() -> list[bytes]:
    parts = []
    with tempfile.TemporaryDirectory() as name:
        for data in _files()[:2]:
            path = Path(name, "segment")
            path.write_bytes(data)
            for record in scan(path):
                piece = data[record.data_offset : record.end]
                parts += [record.head, piece] if parts and b"" in parts else [record.head]
            parts += [] if b"" in parts else [b""]
    return [join(*parts)]


def _tensors() -> Payload:
    state = MODEL.state_dict()
    floats = {name: each for name, each in state.items() if each.is_floating_point()}
    return Payload(floats, {n: t for n, t in state.items() if n not in floats}, {"n": 3})


def _payload(codec: str) -> Payload:
    """What this codec is for."""
    ids = torch.tensor([3, 1, 7])
    if codec == "features":
        maps = torch.arange(24.0).reshape(3, 2, 2, 2).sub(9).relu()
        return Payload({"features": maps, "ids": ids, "labels": ids % 2}, {}, {"n": 3})
    if codec == "logits":
        return Payload({"logits": torch.arange(12.0).reshape(3, 4), "ids": ids}, {}, {"n": 3})
    return _tensors()


def _encoded(name: str) -> list[Encoded]:
    tensors = _payload(name).weights
    return [make_codec(spec).encode(tensors, 0) for spec in SPECS.get(name, (name,))]


def _codec(name: str) -> list[bytes]:
    return [
        join(
            each.codec.removeprefix(name).encode(),
            msgspec.msgpack.encode(each.meta),
            *(bytes(buffer) for buffer in each.buffers),
        )
        for each in _encoded(name)
    ]


def _payloads(names: Iterable[str]) -> list[bytes]:
    seeds = []
    for name in names:
        for spec in SPECS.get(name, (name,)):
            packed = pack(_payload(name), Codecs(make_codec(spec)), 0)
            body = encode_message(message(body=dict(packed.body), blobs=packed.blobs))
            seeds.append(join(body, *(bytes(each) for each in packed.data)))
            seeds.append(_with_table(packed))
    return seeds


def _with_table(packed: Packed) -> bytes:
    """Return a payload whose first group says what is in it in a blob, as large models do."""
    group, *others = packed.body["groups"]
    table = msgspec.msgpack.encode(group["meta"])
    body = {**packed.body, "groups": [{**group, "meta": {}, "table": True}, *others]}
    whole = encode_message(message(body=body, blobs=(Blob.of(table), *packed.blobs)))
    return join(whole, table, *(bytes(each) for each in packed.data))


def _configs() -> list[bytes]:
    small = '[run]\nseed = 1\n[worker.nodes.w1]\ndrop = 0.5\n[algorithm]\nname = "fedsgd"\n'
    return [small.encode(), load(None).to_toml().encode(), b""]


@cache
def seeds(name: str) -> list[bytes]:
    """Return valid inputs of one decoder."""
    match name:
        case "frame":
            return _frames()
        case "message":
            return [*golden("message"), *(encode_message(message(body=b)) for b in _BODIES)]
        case "inline":
            return _inline()
        case "segment":
            return list(_files())
        case "ledger" | "follower":
            return [join(*_files()), join(_files()[0])]
        case "records":
            return _records()
        case "payload":
            return _payloads(codecs())
        case "flatten":
            return _payloads(name for name in codecs() if name not in ("features", "logits"))
        case "config":
            return _configs()
        case "spec":
            return [b"raw", b"cast(float16)", b"cast(dtype='bfloat16')"]
    return _codec(name.removeprefix("codec-"))


_BODIES: tuple[dict[str, Any], ...] = (
    {},
    {"x": [1, -1, 1.5, None, True, "text", b"bytes", {"y": []}]},
)


def write_corpus(name: str, folder: Path) -> None:
    """Write the valid inputs of a decoder as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(name)):
        (folder / f"{name}-{number}").write_bytes(data)


ALL = {name: seeds(name) for name in READERS}
