"""Tensors that are too large to hold twice: read in pieces, as often as need be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fedmq.codecs.base import Buffer
from fedmq.codecs.errors import DecodeError

Pieces = Callable[[], Iterator[Buffer]]
"""Returns the bytes of one buffer, in order, in pieces of any size; may be called again."""


class Streamed(Mapping[str, Tensor]):
    """Named float32 tensors, end to end in one buffer that is read piece by piece.

    As a mapping it is like any other, but looking a tensor up reads all of them into
    memory; `blocks` does not.

    Args:
        shapes: by name, in the order of the buffer.
        pieces: reads the buffer.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], pieces: Pieces) -> None:
        self.shapes = shapes
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self.read()[name]

    def read(self) -> dict[str, Tensor]:
        """Return all tensors, which are then in memory.

        Raises:
            DecodeError: as `blocks`.
        """
        flat = torch.cat([torch.zeros(0), *(each.clone() for each in self.blocks())])
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        pieces = zip(self.shapes.items(), torch.split(flat, sizes), strict=True)
        return {name: piece.view(shape) for (name, shape), piece in pieces}

    def blocks(self) -> Iterator[Tensor]:
        """Yield the values in order, in vectors that are only valid until the next one.

        Raises:
            DecodeError: there are fewer or more bytes than the tensors need.
        """
        left = sum(math.prod(shape) for shape in self.shapes.values())
        rest = bytearray()
        for piece in self._pieces():
            view = memoryview(piece).cast("B")
            if rest or view.nbytes % 4 or view.readonly:
                whole = rest + view
                used = len(whole) - len(whole) % 4
                rest = whole[used:]
                view = memoryview(whole)[:used]
            left -= view.nbytes // 4
            if view.nbytes:
                yield torch.frombuffer(view, dtype=torch.float32)
        if left or rest:
            raise DecodeError("a buffer has other bytes than its tensors need")
