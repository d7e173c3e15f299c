"""Digests of models and of a node's state: equal bytes have equal digests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash
from torch import Tensor

from fedmq.codecs.raw import Raw


def model_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the XXH3-128 digest of a model: names, shapes, dtypes and bytes, in order.

    Complex tensors count as pairs of real numbers.
    """
    real = {
        name: torch.view_as_real(each) if each.is_complex() else each
        for name, each in tensors.items()
    }
    encoded = Raw().encode(real, 0)
    hasher = xxhash.xxh3_128(repr(encoded.meta).encode())
    for buffer in encoded.buffers:
        hasher.update(buffer)
    return str(hasher.hexdigest())


def digest_of(value: Any) -> str:
    """Return the XXH3-128 digest of a value made of tensors, arrays, numbers, text and containers.

    Raises:
        TypeError: the value contains an object of an unsupported type.
    """
    hasher = xxhash.xxh3_128()
    _feed(hasher, value)
    return str(hasher.hexdigest())


def _feed(hasher: xxhash.xxh3_128, value: Any) -> None:
    """Hash a value with the types and sizes of its parts, so that unequal values differ."""
    match value:
        case None | bool() | int() | float() | str() | bytes():
            # The repr of a float is exact.
            text = repr(value).encode()
            hasher.update(b"%d:%b" % (len(text), text))
        case torch.dtype():
            _feed(hasher, str(value))
        case Tensor():
            hasher.update(b"T")
            _feed(hasher, (str(value.dtype), list(value.shape)))
            flat = value.detach().cpu().contiguous().reshape(-1)
            hasher.update(flat.view(torch.uint8).numpy().data)
        case np.ndarray():
            hasher.update(b"A")
            _feed(hasher, (str(value.dtype), list(value.shape)))
            hasher.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        case Mapping():
            hasher.update(b"{%d" % len(value))
            for key, each in value.items():
                _feed(hasher, key)
                _feed(hasher, each)
        case list() | tuple():
            hasher.update(b"[%d" % len(value))
            for each in value:
                _feed(hasher, each)
        case set() | frozenset():
            _feed(hasher, sorted(value))
        case msgspec.Struct():
            # Field names of the encoding: they stay when a field is renamed.
            names = zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True)
            _feed(hasher, {encoded: getattr(value, name) for name, encoded in names})
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [each.name for each in dataclasses.fields(value)]
            _feed(hasher, {name: getattr(value, name) for name in fields})
        case _:
            raise TypeError(f"cannot digest a {type(value).__name__}")
