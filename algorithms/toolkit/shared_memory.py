"""Refuse models in which different tensors share memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedmq.algorithms.errors import ProblemError

_TORCHS_OWN = frozenset({"_parameters", "_buffers", "_modules"})
"""Where torch itself keeps a module's tensors."""


def refuse_shared_memory(
    parameters: Sequence[tuple[str, Tensor]], buffers: Sequence[tuple[str, Tensor]]
) -> None:
    """Raise ProblemError if two of a model's tensors share memory.

    A tied tensor, with several names in the module, occurs once here and is accepted. Two tensors
    of which one is a view of the other are refused: copied into a vector they would separate.
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


def refuse_views(module: nn.Module) -> None:
    """Raise ProblemError if an attribute of a module is a view of a parameter or buffer.

    A working copy moves these to other memory, and the attribute would keep the old memory, which
    `forward` would then read or change.
    """
    own = [*module.named_parameters(), *module.named_buffers()]
    held = {
        (str(each.device), each.untyped_storage().data_ptr()): name
        for name, each in own
        if not each.is_meta and each.numel() and each.layout == torch.strided
    }
    themselves = {id(each) for _, each in own}
    for path, part in module.named_modules():
        # Attributes that torch's own norms recompute before each forward.
        remade = {getattr(each, "name", None) for each in part._forward_pre_hooks.values()}  # noqa: SLF001 - there is no public way
        for name, value in vars(part).items():
            if name in _TORCHS_OWN or name in remade:
                continue
            for each in _tensors_in(value):
                storage = (str(each.device), each.untyped_storage().data_ptr())
                if id(each) not in themselves and storage in held:
                    where = f"{path}.{name}" if path else name
                    raise ProblemError(
                        f"expected {where} in memory of its own, it shares that of "
                        f"{held[storage]}: use {held[storage]} itself in forward"
                    )


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors with memory, and arrays as tensors, in a value or its elements."""
    if isinstance(value, np.ndarray):
        base = value
        while isinstance(base.base, np.ndarray):
            base = base.base
        if base.flags.writeable and base.dtype.isnative and base.dtype.kind in "fiub":
            yield torch.from_numpy(base)
    elif isinstance(value, Tensor):
        if not value.is_meta and value.numel() and value.layout == torch.strided:
            yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors_in(each)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one storage have a byte in common."""
    one, other = _real(one), _real(other)
    (low, high), (begin, end) = _range(one), _range(other)
    if high <= begin or end <= low:
        return False
    if one.element_size() != other.element_size():
        return True
    # Interleaved tensors, such as the real and imaginary parts of one, do not overlap.
    size = one.element_size()
    first, last = min(low, begin) // size, max(high, end) // size
    touched = torch.zeros(last - first, dtype=torch.bool)
    _within(touched, one, first).fill_(value=True)
    return bool(_within(touched, other, first).any())


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _range(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the byte after its last."""
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + reach + 1) * tensor.element_size()


def _within(touched: Tensor, tensor: Tensor, first: int) -> Tensor:
    return touched.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - first)
