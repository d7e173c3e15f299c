"""Concatenate tensors to one vector, without a copy if they are adjacent in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the concatenated tensors as one vector [sum of sizes].

    Tensors that are adjacent in one storage, in this order, are not copied: the views of a
    `Layout`, for example, or the tensors of a decoded message.

    Args:
        tensors: at least one; all of one dtype.
    """
    first = tensors[0]
    begin = expected = first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        if (
            not tensor.is_contiguous()
            or tensor.dtype != first.dtype
            or tensor.storage_offset() != expected
            or tensor.untyped_storage().data_ptr() != storage
        ):
            return torch.cat([each.reshape(-1) for each in tensors])
        expected += tensor.numel()
    return first.as_strided((expected - begin,), (1,), begin)
