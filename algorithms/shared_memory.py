"""Tensors of a model that are different, and yet share memory: one could not be told apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmq.algorithms.errors import ProblemError


def refuse_shared_memory(
    parameters: Sequence[tuple[str, Tensor]], buffers: Sequence[tuple[str, Tensor]]
) -> None:
    """Raise ProblemError if two of a model's tensors share memory.

    A tensor that the module has under several names is here once and may be tied; what this
    refuses are two tensors, one a view of the other: moved into a vector they would part.
    """
    by_storage: dict[tuple[str, int], list[tuple[str, Tensor]]] = {}
    for name, tensor in (*parameters, *buffers):
        if tensor.is_meta or not tensor.numel() or tensor.layout != torch.strided:
            continue
        storage = (str(tensor.device), tensor.untyped_storage().data_ptr())
        by_storage.setdefault(storage, []).append((name, tensor.detach()))
    for together in by_storage.values():
        for at, (name, tensor) in enumerate(together):
            for other, earlier in together[:at]:
                if _overlap(earlier, tensor):
                    raise ProblemError(
                        f"expected {name} in memory of its own, it shares that of {other}"
                    )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors of one storage have a byte in common."""
    one, other = _real(one), _real(other)
    (low, high), (begin, end) = _range(one), _range(other)
    if high <= begin or end <= low:
        return False
    if one.element_size() != other.element_size():
        return True
    # Interleaved ones, such as the real and imaginary parts of one tensor, are fine.
    size = one.element_size()
    first, last = min(low, begin) // size, max(high, end) // size
    touched = torch.zeros(last - first, dtype=torch.bool)
    _within(touched, one, first).fill_(value=True)
    return bool(_within(touched, other, first).any())


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _range(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the one after its last."""
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + reach + 1) * tensor.element_size()


def _within(touched: Tensor, tensor: Tensor, first: int) -> Tensor:
    return touched.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - first)
