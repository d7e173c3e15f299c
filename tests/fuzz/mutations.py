"""Ways to spoil a valid input: its bytes, its pieces, and the values that it spells."""

from collections.abc import Sequence
from random import Random
from typing import Any

import msgpack

from tests.fuzz.decoders import join, split

CLAIMS = [
    *(bytes([head]) + b"\xff" * 4 for head in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)),  # msgpack: 4 G
    *(bytes([head]) + b"\xff" * 2 for head in (0xC5, 0xC8, 0xDA, 0xDC, 0xDE)),  # msgpack: 64 K
    b"\xff" * 4,
    b"\xff" * 8,
    (1 << 20).to_bytes(4, "little"),
    (1 << 62).to_bytes(8, "big"),
]
"""Bytes that say that much is to follow."""

STRANGE: Sequence[Any] = (
    *(None, False, True, 0, 1, 2, -1, 1 << 20, (1 << 40) - 1, 1 << 40, 1 << 62, 1 << 63),
    *(-(1 << 63), 0.0, -0.5, 1e308, float("nan"), float("inf")),
    *("", "a", "\0", "x" * 300, "raw@1", "float16", "float64", "int64", "../..", "\U0010ffff"),
    *(b"", b"x" * 16, b"\x80", b"\x81\xa1a\x01"),
    *([], {}, [[]], [0], {"": None}, {1: 2}, [0] * 100, [1 << 39, 1 << 39], [3, 2]),
    *(msgpack.ExtType(5, b"data"), msgpack.Timestamp(-(1 << 60), 1)),
)
"""Values that hardly any field expects."""


def spoil(rng: Random, data: bytes, other: bytes, *, pieces: bool) -> bytes:
    """Return an input that is almost valid; with ``pieces``, it was made by `join`.

    Args:
        rng: draws what is changed.
        data: a valid input.
        other: another one, to take parts from.
        pieces: whether to change the pieces within the input.
    """
    for _ in range(rng.randint(1, 3)):
        if not pieces or rng.random() < 0.2:
            data = rng.choice((_spoil_bytes, _spoil_value))(rng, data, other)
        else:
            data = join(*_spoil_pieces(rng, split(data), split(other)))
    return data


def _spoil_bytes(rng: Random, data: bytes, other: bytes) -> bytes:
    at = rng.randint(0, len(data))
    end = min(len(data), at + rng.randint(0, 20))
    match rng.randint(0, 5):
        case 0 if at < len(data):
            return data[:at] + bytes([data[at] ^ (1 << rng.randint(0, 7))]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[end:]
        case 3:
            return data[:at] + data[at:end] * rng.randint(1, 50) + data[at:]
        case 4:
            claim = rng.choice(CLAIMS)
            return data[:at] + claim + data[at + len(claim) :]
    return data[:at] + other[rng.randint(0, len(other)) :] + data[end:]


def _spoil_pieces(rng: Random, parts: list[bytes], others: list[bytes]) -> list[bytes]:
    if not parts:
        return others
    at = rng.randint(0, len(parts) - 1)
    before, after = parts[:at], parts[at + 1 :]
    match rng.randint(0, 9):
        case 0:
            return before + after
        case 1:
            return [*before, rng.choice(parts), *parts[at:]]
        case 2 if others:
            return [*before, rng.choice(others), *after]
        case 3:
            return [*before, _spoil_bytes(rng, parts[at], parts[at]), *after]
    return [*before, _spoil_value(rng, parts[at], parts[at]), *after]


def _spoil_value(rng: Random, data: bytes, other: bytes) -> bytes:
    """Change one value of a msgpack tree; what is none has its bytes changed."""
    try:
        tree = msgpack.unpackb(data, strict_map_key=False)
        return bytes(msgpack.packb(_twist(rng, tree)))
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
        return _spoil_bytes(rng, data, other)


def _twist(rng: Random, tree: Any) -> Any:
    if rng.random() < 0.1:
        return rng.choice(STRANGE)
    match tree:
        case {} if tree:
            key = rng.choice(list(tree))
            match rng.randint(0, 9):
                case 0:
                    return {name: each for name, each in tree.items() if name != key}
                case 1:
                    return {**tree, key: tree[rng.choice(list(tree))]}
            return {**tree, key: _twist(rng, tree[key])}
        case [_, *_]:
            at = rng.randint(0, len(tree) - 1)
            match rng.randint(0, 9):
                case 0:
                    return tree[:at] + tree[at + 1 :]
                case 1:
                    return tree[:at] * rng.randint(1, 3) + tree[at:]
            return [*tree[:at], _twist(rng, tree[at]), *tree[at + 1 :]]
        case bytes() if len(tree) > 20:
            # A message within a frame or an entry is msgpack in msgpack.
            return _spoil_value(rng, tree, tree)
        case int() if rng.random() < 0.5:
            return tree + rng.choice((-1, 1, 1 << 32))
    return rng.choice(STRANGE)
