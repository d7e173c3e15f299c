"""Tensors that are too large to hold twice in memory: read in chunks, repeatedly if needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fedmq.codecs.base import Buffer
from fedmq.codecs.errors import DecodeError

Chunks = Callable[[], Iterator[Buffer]]
"""Returns the bytes of one buffer, in order, in chunks of any size; can be called repeatedly."""


class Streamed(Mapping[str, Tensor]):
    """Named float32 tensors, concatenated in one buffer that is read in chunks.

    Looking up a tensor reads all of them into memory; `blocks` does not.

    Args:
        shapes: by name, in the order of the buffer.
        chunks: reads the buffer.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], chunks: Chunks) -> None:
        self.shapes = shapes
        self._chunks = chunks

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self.read()[name]

    def read(self) -> dict[str, Tensor]:
        """Read all tensors into memory.

        Raises:
            DecodeError: as `blocks`.
        """
        flat = torch.cat([torch.zeros(0), *(each.clone() for each in self.blocks())])
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), torch.split(flat, sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def blocks(self) -> Iterator[Tensor]:
        """Yield the values in order, as vectors float32 [any size].

        A vector is valid only until the next one.

        Raises:
            DecodeError: the buffer does not have the size of the tensors.
        """
        left = sum(math.prod(shape) for shape in self.shapes.values())
        rest = bytearray()
        for chunk in self._chunks():
            view = memoryview(chunk).cast("B")
            if rest or view.nbytes % 4 or view.readonly:
                whole = rest + view
                used = len(whole) - len(whole) % 4
                rest = whole[used:]
                view = memoryview(whole)[:used]
            left -= view.nbytes // 4
            if view.nbytes:
                yield torch.frombuffer(view, dtype=torch.float32)
        if left or rest:
            raise DecodeError("a buffer does not have the size of its tensors")
