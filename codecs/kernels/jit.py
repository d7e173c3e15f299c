"""How kernels are compiled: once a machine, without the interpreter's lock, strictly IEEE.

No ``fastmath`` and no contraction to fused multiply-adds: every kernel gives the same
bits on every processor, and so does its torch counterpart in `on_device`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
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
    if not _has_place():
        alone: Function = _njit(**_OPTIONS)(function)
        return alone
    try:
        compiled: Function = _njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # numba found no place for its cache
        compiled = _njit(**_OPTIONS)(function)
    return compiled


def _has_place() -> bool:
    """Tell whether there may be a place for a cache.

    Of a user without a home, numba would make a folder named ``~`` in the current one.
    """
    return (
        "NUMBA_CACHE_DIR" in os.environ
        or os.access(Path(__file__).parent, os.W_OK)
        or os.path.expanduser("~") != "~"  # noqa: PTH111 - pathlib's raises where there is none
    )


def helper(function: Function) -> Function:
    """Compile what only other kernels call; it becomes part of their machine code."""
    compiled: Function = _njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function)
    return compiled
