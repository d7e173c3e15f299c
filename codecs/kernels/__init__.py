"""Compression kernels: compiled loops over float32 vectors, behind plain functions on arrays.

====================================== =====================================================
`quantize` `dequantize` `accumulate`   stochastic rounding to packed codes of 1 to 8 bits
`HadamardBasis` `KashinFrame`          the bases: a randomized rotation, Kashin's frame
`transform` `restore`                  to a basis and back, without quantization
`mask` `top`                           indices of a random subset, or of the largest values
`gather` `scatter` `scatter_add`       values at indices: read, write, add
`signs`                                random signs
`scale_add` `multiply`                 a weighted sum, a product of matrices
`coefficients` `code_bytes`            sizes of a vector in a basis, and of its packed codes
`on_device` (a module)                 the same functions for torch tensors on a device
====================================== =====================================================

Arrays are contiguous float32 numpy vectors, such as ``tensor.numpy()``. Random numbers come
from a seed and a counter (`fedmq.codecs.kernels.seeds`), so the same seed gives the same bytes
on any device. Kernels release the interpreter's lock and are thread-safe. Invalid arguments
raise ValueError before any kernel runs.

The first call of a kernel compiles it: a few seconds, once per machine. Importing this
package imports neither numba nor torch.
"""

from fedmq.codecs.kernels.layout import MAX_BLOCK, Basis, HadamardBasis, KashinFrame
from fedmq.codecs.kernels.quantization import (
    accumulate,
    code_bytes,
    coefficients,
    dequantize,
    quantize,
    restore,
    signs,
    transform,
)
from fedmq.codecs.kernels.selection import (
    MAX_VALUES,
    gather,
    mask,
    scatter,
    scatter_add,
    top,
)
from fedmq.codecs.kernels.sums import multiply, scale_add

__all__ = [
    "MAX_BLOCK",
    "MAX_VALUES",
    "Basis",
    "HadamardBasis",
    "KashinFrame",
    "accumulate",
    "code_bytes",
    "coefficients",
    "dequantize",
    "gather",
    "mask",
    "multiply",
    "quantize",
    "restore",
    "scale_add",
    "scatter",
    "scatter_add",
    "signs",
    "top",
    "transform",
]
