"""The server's store of its clients' samples: feature maps, labels and logits.

Versions of a store share the uploads that did not change, and never change them. Feature maps
beyond a memory limit go to temporary files, which have no name and disappear with their last user
or with the process.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmq.algorithms.errors import AlgorithmError, ResultError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_LEVELS = 256
_GLANCE = 4096
FORMS = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of stored feature maps; the first that loses nothing is used."""


class MemoryLimit:
    """Limit of the bytes of feature maps in memory, in all versions of a store together."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._held: weakref.WeakSet[Maps] = weakref.WeakSet()

    @property
    def used_bytes(self) -> int:
        """Return the bytes that are in memory now."""
        return sum(each.nbytes for each in self._held)

    def hold(self, maps: Maps) -> bool:
        """Return whether the maps fit; if so, count them until their last reference is gone."""
        room = self.used_bytes + maps.nbytes <= self.most_bytes
        if room:
            self._held.add(maps)
        return room


class Maps:
    """Feature maps, float32 [n, c, ...], stored in the fewest bytes without loss.

    If no channel has more than 256 different values, as after an int8 or int4 codec, they are
    stored as uint8 codes and a table; otherwise as float16 or bfloat16 if all values fit, as after
    those codecs.

    Args:
        packed: a tensor of one of the `FORMS`, [n, c, ...].
        table: float32 [c, 256], the values of uint8 codes.
        limit: memory limit; beyond it ``packed`` goes to a file.
    """

    def __init__(self, packed: Tensor, table: Tensor | None, limit: MemoryLimit) -> None:
        self.nbytes = packed.nbytes
        self.table = table
        self.in_memory = limit.hold(self)
        self.packed = packed if self.in_memory else _in_file(packed)

    @classmethod
    def of(cls, x: Tensor, limit: MemoryLimit) -> Maps:
        """Return a copy of feature maps, float32 [n, c, ...] on the CPU, n at least 1."""
        coded = _coded(x)
        if coded is not None:
            return cls(*coded, limit)
        for form in (torch.float16, torch.bfloat16):
            # One sample mostly shows that a dtype loses values.
            if x[:1].to(form).float().equal(x[:1]):
                packed = x.to(form)
                if packed.float().equal(x):
                    return cls(packed, None, limit)
        return cls(x.clone(), None, limit)

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Return some samples' feature maps, float32 [m, c, ...]."""
        chosen = self.packed[rows]
        if self.table is None:
            return chosen.float()
        channels = torch.arange(len(self.table)).view(-1, *(1,) * (chosen.dim() - 2))
        return self.table.flatten()[chosen.long() + _LEVELS * channels]


@dataclass(frozen=True)
class Upload:
    """The last upload of a client.

    features: feature maps of n samples. ids: int64 [n], the client's numbers of them, ascending.
    labels: int64 [n]. logits: float32 [n, classes], of the client's classifier.
    test: the same of m test samples, without ids, if the client sends them.
    """

    features: Maps
    ids: Tensor
    labels: Tensor
    logits: Tensor
    test: UploadedTest | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class UploadedTest:
    """The test samples of a client's last upload; fields as in `Upload`."""

    features: Maps
    labels: Tensor
    logits: Tensor


@dataclass(frozen=True)
class FeatureStore:
    """One version of the store, by client.

    limit: memory limit that all versions share.
    """

    limit: MemoryLimit
    uploads: Mapping[int, Upload] = field(default_factory=dict)

    def updated(self, fresh: Mapping[int, Upload]) -> FeatureStore:
        """Return the next version, with the new uploads of these clients; no samples are copied."""
        merged = {**self.uploads, **fresh}
        return FeatureStore(self.limit, {client: merged[client] for client in sorted(merged)})

    def __len__(self) -> int:
        """Return the number of samples."""
        return sum(len(each) for each in self.uploads.values())

    def read(self, index: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Return some samples, by their index in the order of clients and ids.

        Returns:
            Feature maps float32 [m, c, ...], labels int64 [m], and the clients' logits
            float32 [m, classes].
        """
        uploads = list(self.uploads.values())
        ends = np.cumsum([len(each) for each in uploads])
        owners = np.searchsorted(ends, index, side="right")
        features, labels, logits, back_to = [], [], [], []
        for owner in np.unique(owners):
            upload, place = uploads[owner], np.flatnonzero(owners == owner)
            rows = torch.from_numpy(index[place] - (ends[owner] - len(upload)))
            features.append(upload.features[rows])
            labels.append(upload.labels[rows])
            logits.append(upload.logits[rows])
            back_to.append(torch.from_numpy(place))
        back = torch.cat(back_to).argsort()
        return torch.cat(features)[back], torch.cat(labels)[back], torch.cat(logits)[back]

    # ---- for a checkpoint

    def save(self) -> dict[str, Tensor]:
        """Return all tensors by name; feature maps in their stored form."""
        saved: dict[str, Tensor] = {}
        for client, upload in self.uploads.items():
            named = {"ids": upload.ids, "labels": upload.labels, "logits": upload.logits}
            named |= _named("features", upload.features)
            if upload.test is not None:
                named |= {"test.labels": upload.test.labels, "test.logits": upload.test.logits}
                named |= _named("test.features", upload.test.features)
            saved |= {f"{client}.{key}": each for key, each in named.items()}
        return saved

    @classmethod
    def load(cls, saved: Mapping[str, Tensor], limit: MemoryLimit) -> FeatureStore:
        """Return the store that `save` was called on; the caller checks its uploads.

        Raises:
            ResultError: these are not the tensors of a store.
        """
        by_client: dict[int, dict[str, Tensor]] = {}
        for name, tensor in saved.items():
            client, _, key = name.partition(".")
            if not client.isdecimal():
                raise ResultError(f"expected a client's number before {key!r}, got {client!r}")
            by_client.setdefault(int(client), {})[key] = tensor
        try:
            uploads = {client: _upload(by_client[client], limit) for client in sorted(by_client)}
        except KeyError as error:
            raise ResultError(f"expected a tensor {error} of each client, it is missing") from None
        return cls(limit, uploads)


def _upload(tensors: Mapping[str, Tensor], limit: MemoryLimit) -> Upload:
    test = None
    if "test.labels" in tensors:
        test = UploadedTest(
            _maps("test.features", tensors, limit),
            tensors["test.labels"].clone(),
            tensors["test.logits"].clone(),
        )
    ids, labels, logits = (tensors[name].clone() for name in ("ids", "labels", "logits"))
    return Upload(_maps("features", tensors, limit), ids, labels, logits, test)


def _coded(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return uint8 codes and their values, float32 [c, 256]; None if there are too many values."""
    codes = torch.empty(x.shape, dtype=torch.uint8)
    table = torch.zeros(x.shape[1], _LEVELS)
    for channel in range(x.shape[1]):
        values = x[:, channel].contiguous()
        if len(torch.unique(values.flatten()[:_GLANCE])) > _LEVELS:
            return None
        levels = torch.unique(values)
        if len(levels) > _LEVELS:
            return None
        table[channel, : len(levels)] = levels
        codes[:, channel] = torch.searchsorted(levels, values)
    return codes, table


def _in_file(packed: Tensor) -> Tensor:
    """Return the same tensor in a file's memory map, whose pages the kernel can evict.

    Raises:
        AlgorithmError: the file cannot be written.
    """
    kind = _INTEGERS[packed.element_size()]
    array = packed.contiguous().view(kind).numpy()
    try:
        with tempfile.TemporaryFile(prefix="fedmq-features-") as file:
            array.tofile(file)
            # Writable, because torch expects that; it is never written to.
            mapped = np.memmap(file, array.dtype, "r+", shape=array.shape)
    except OSError as error:
        raise AlgorithmError(
            f"cannot write {array.nbytes:,} bytes of feature maps to a file in the folder TMPDIR: "
            f"{error.strerror or error}"
        ) from None
    return torch.from_numpy(mapped).view(packed.dtype)


def _named(name: str, maps: Maps) -> dict[str, Tensor]:
    table = {} if maps.table is None else {f"{name}.table": maps.table}
    return {name: maps.packed, **table}


def _maps(name: str, tensors: Mapping[str, Tensor], limit: MemoryLimit) -> Maps:
    packed, table = tensors[name], tensors.get(f"{name}.table")
    if packed.dim() < 2 or 0 in packed.shape:
        raise ResultError(f"expected {name} as [n, channels, ...], got {list(packed.shape)}")
    if packed.dtype not in FORMS or (packed.dtype == torch.uint8) != (table is not None):
        raise ResultError(
            f"expected {name} as uint8 with a table or a float dtype, got {packed.dtype}"
        )
    shape = None if table is None else (packed.shape[1], _LEVELS)
    if table is not None and (table.shape != shape or table.dtype != torch.float32):
        raise ResultError(f"expected {name}.table as float32 {shape}, got {list(table.shape)}")
    return Maps(packed.clone(), table if table is None else table.clone(), limit)
