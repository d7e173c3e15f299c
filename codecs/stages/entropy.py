"""Lossless compression of a pipeline's buffers."""

from __future__ import annotations

from collections.abc import Sequence

import zstandard

from fedmq.codecs.base import Buffer
from fedmq.codecs.errors import DecodeError, SpecError
from fedmq.codecs.stages.base import Stage, StageOrder


class Entropy(Stage):
    """Zstandard, as the last stage; a buffer stays uncompressed if that is not smaller.

    level: 1 (fast) to 19. Codes of probabilistic quantization are nearly random: compression
    saves bytes of floats and positions, and of few-bit codes with long tails.
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
        """Return the buffers, and the original size of each compressed one; -1 for others."""
        compressor = zstandard.ZstdCompressor(level=self.level)
        written: list[Buffer] = []
        sizes = []
        for buffer in buffers:
            size = memoryview(buffer).nbytes
            compressed = compressor.compress(buffer)
            is_smaller = len(compressed) < size
            written.append(compressed if is_smaller else buffer)
            sizes.append(size if is_smaller else -1)
        return written, sizes

    def decompress(self, buffers: Sequence[Buffer], sizes: object, max_bytes: int) -> list[Buffer]:
        """Return the original buffers; allocate at most ``max_bytes``.

        Raises:
            DecodeError: the sizes or the compressed bytes are damaged or hostile.
        """
        if not isinstance(sizes, list | tuple) or len(sizes) != len(buffers):
            raise DecodeError("expected meta.sizes with the size of each buffer")
        if any(type(size) is not int or size < -1 for size in sizes):
            raise DecodeError("expected meta.sizes as numbers of bytes or -1")
        if (total := sum(size for size in sizes if size > 0)) > max_bytes:
            raise DecodeError(f"expected at most {max_bytes} bytes in all buffers, got {total}")
        pairs = zip(buffers, sizes, strict=True)
        return [buffer if size == -1 else _decompress(buffer, size) for buffer, size in pairs]


def _decompress(buffer: Buffer, size: int) -> bytes:
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(buffer)
        # Reading one more byte detects a longer frame without decompressing it.
        data: bytes = reader.read(size + 1)
    except zstandard.ZstdError as error:
        raise DecodeError(f"cannot read the zstd frame: {error}") from None
    if len(data) != size:
        raise DecodeError(f"expected {size} bytes after decompression, got {len(data)} or more")
    return data
