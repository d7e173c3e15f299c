"""Compression kernels: compiled loops over float32 vectors, behind plain functions on arrays.

======================================== ===================================================
`quantize` `dequantize` `accumulate`     stochastic rounding to 1..8 bits, packed; in a basis
`Hadamard` `Kashin`                      the bases: a randomized rotation, Kashin's frame
`rotate` `unrotate` `kashin` `unkashin`  to a basis and back without quantization
`mask` `top`                             which values to send: at random, or the largest
`gather` `scatter` `scatter_add`         these values out of a vector, and back into one
`signs`                                  random signs
`scale_add` `multiply`                   a weighted sum, a product of matrices
`rotated_size` `kashin_size`             coefficients of a vector
`code_bytes`                             bytes of its packed codes
`on_device` (a module)                   the same for torch tensors where they are
======================================== ===================================================

Arrays are numpy's: contiguous float32 vectors, as ``tensor.numpy()`` shares them. All that is
random follows from a seed by a counter (`fedmq.codecs.kernels.seeds`), so the same seed gives
the same bytes on any device, and any number of threads may run kernels at once: they hold no
lock. Arguments that do not fit raise ValueError before any kernel runs.

The kernels are compiled on their first call: a few seconds, once a machine. Importing this
package imports neither numba nor torch.
"""

from fedmq.codecs.kernels.layout import MAX_BLOCK, Basis, HadamardBasis, KashinFrame
from fedmq.codecs.kernels.quantization import (
    accumulate,
    code_bytes,
    dequantize,
    kashin,
    kashin_size,
    quantize,
    rotate,
    rotated_size,
    signs,
    unkashin,
    unrotate,
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
    "dequantize",
    "gather",
    "kashin",
    "kashin_size",
    "mask",
    "multiply",
    "quantize",
    "rotate",
    "rotated_size",
    "scale_add",
    "scatter",
    "scatter_add",
    "signs",
    "top",
    "unkashin",
    "unrotate",
]
