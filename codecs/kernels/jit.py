"""How kernels are compiled: once a machine, without the interpreter's lock, strictly IEEE.

No ``fastmath`` and no contraction to fused multiply-adds: every kernel gives the same
bits on every processor, and so does its torch counterpart in `on_device`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

# numba's own types know neither all options nor what becomes of the decorated function.
_njit: Any = numba.njit
_OPTIONS = {"nogil": True, "error_model": "numpy"}


def entry(function: Function) -> Function:
    """Compile what Python calls, and keep the machine code beside the source or in ~/.cache.

    Where neither can be written (a read-only install without a home), each process
    compiles for itself on the first call.
    """
    try:
        compiled: Function = _njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # numba found no place for its cache
        compiled = _njit(**_OPTIONS)(function)
    return compiled


def helper(function: Function) -> Function:
    """Compile what only other kernels call; it becomes part of their machine code."""
    compiled: Function = _njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function)
    return compiled
