"""Lossless compression of what a pipeline has written, where it pays."""

from __future__ import annotations

from collections.abc import Sequence

import zstandard

from fedmq.codecs.base import Buffer
from fedmq.codecs.errors import DecodeError, SpecError
from fedmq.codecs.stages.base import Stage, StageOrder


class Entropy(Stage):
    """Zstandard, last of all. Each buffer is only compressed if that makes it smaller.

    level: 1 (fast) to 19. Codes of probabilistic quantization are nearly random: it pays for
    float bytes, for places, and for few bits with long tails.
    """

    name = "entropy"
    place = StageOrder.ENTROPY

    def __init__(self, level: int = 3) -> None:
        if type(level) is not int or not 1 <= level <= 19:
            raise SpecError(f"codec entropy: level must be from 1 to 19, got {level!r}")
        self.level = level

    def parameters(self) -> str:
        """Return the level."""
        return str(self.level)

    def compress(self, buffers: Sequence[Buffer]) -> tuple[list[Buffer], list[int]]:
        """Return the buffers, and the size before of each that is compressed, else -1."""
        compressor = zstandard.ZstdCompressor(level=self.level)
        found: list[Buffer] = []
        sizes = []
        for buffer in buffers:
            size = memoryview(buffer).nbytes
            small = compressor.compress(buffer)
            pays = len(small) < size
            found.append(small if pays else buffer)
            sizes.append(size if pays else -1)
        return found, sizes

    def decompress(self, buffers: Sequence[Buffer], sizes: object, max_bytes: int) -> list[Buffer]:
        """Return the buffers as they were; at most ``max_bytes`` are taken.

        Raises:
            DecodeError: the sizes, or what is compressed, are damaged or hostile.
        """
        if not isinstance(sizes, list | tuple) or len(sizes) != len(buffers):
            raise DecodeError("expected meta.sizes to have the size of each buffer")
        if any(type(size) is not int or size < -1 for size in sizes):
            raise DecodeError("expected meta.sizes as numbers of bytes, or -1")
        if (total := sum(size for size in sizes if size > 0)) > max_bytes:
            raise DecodeError(f"expected at most {max_bytes} bytes in all buffers, got {total}")
        pairs = zip(buffers, sizes, strict=True)
        return [buffer if size == -1 else _decompress(buffer, size) for buffer, size in pairs]


def _decompress(buffer: Buffer, size: int) -> bytes:
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(buffer)
        # One byte more than it says: whoever has more is caught without taking it.
        data: bytes = reader.read(size + 1)
    except zstandard.ZstdError as error:
        raise DecodeError(f"not what zstd has compressed: {error}") from None
    if len(data) != size:
        raise DecodeError(f"expected {size} bytes after decompression, got {len(data)} or more")
    return data
