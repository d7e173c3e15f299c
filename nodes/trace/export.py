"""``fedmq trace export --json``: one JSON object per entry and line."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted, AnyEntry
from fedmq.broker.wire.schema import Message
from fedmq.nodes.trace.bodies import shown_body
from fedmq.nodes.trace.overview import before_damage


def json_lines(trace: Trace) -> Iterator[str]:
    """Yield a line for each entry of a run, up to its end or to damage."""
    for entry in before_damage(trace):
        yield to_json(_entry(entry)) + "\n"


def to_json(value: Any) -> str:
    """Return a value as one line of JSON, in ASCII.

    JSON has no NaN and no infinities: they become the strings ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"``; bytes become ``{"bytes": hex}``.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, TypeError):
        return json.dumps(_plain(value), allow_nan=False)


def _entry(entry: AnyEntry) -> dict[str, Any]:
    fields: dict[str, Any] = {"seq": entry.seq, "at": entry.at}
    fields["entry"] = type(entry).__name__.lower()
    if isinstance(entry, Accepted):
        fields["consumes"] = entry.consumes
        fields["message"] = _message(entry.read())
        return fields
    kind = type(entry)
    for name, key in zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True):
        if key not in fields:
            fields[key] = getattr(entry, name)
    return fields


def _message(message: Message) -> dict[str, Any]:
    fields = {name: getattr(message, name) for name in ("kind", "id", "run", "sender", "to", "re")}
    blobs = [{"digest": blob.digest.hex(), "size": blob.size} for blob in message.blobs]
    return {**fields, "body": shown_body(message), "blobs": blobs}


def _plain(value: Any) -> Any:
    """Return a value from a message as a value of JSON."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if math.isfinite(value):
                return value
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case Mapping():
            return {_key(key): _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case bytes():
            return {"bytes": value.hex()}
        case msgspec.msgpack.Ext():
            return {"ext": value.code, "bytes": bytes(value.data).hex()}
        case dt.datetime():
            return value.isoformat()
        case _:
            return repr(value)


def _key(key: Any) -> str:
    return key if isinstance(key, str) else key.hex() if isinstance(key, bytes) else repr(key)
