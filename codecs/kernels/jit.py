"""How kernels are compiled: once per machine, without the interpreter's lock, strictly IEEE.

No ``fastmath`` and no contraction to fused multiply-adds: every kernel gives the same
bits on every processor, and so does its torch counterpart in `on_device`.
"""

# numba's classes have untyped methods.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache

Function = TypeVar("Function", bound=Callable[..., Any])

# numba's types know neither all options nor the type of the compiled function.
_njit: Any = numba.njit
_OPTIONS = {"nogil": True, "error_model": "numpy"}


def _digest_of_sources() -> str:
    """Return a digest of all source files of this folder."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


_SOURCES = _digest_of_sources()


class _CacheFiles(CompileResultCacheImpl):
    """Puts the digest of all sources into the names of cache files.

    An entry's machine code contains its helpers, but numba checks only the entry's own file
    and would load code with an outdated helper. With the digest in the name, processes that
    run different versions of the sources never share a file either.
    """

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        """Return the name that the index and all data files of an entry begin with."""
        return f"{super().get_filename_base(fullname, abiflags)}-{_SOURCES}"


class _Cache(FunctionCache):
    """numba's cache of one function, with our file names."""

    _impl_class = _CacheFiles


def entry(function: Function) -> Function:
    """Compile a function that Python calls; cache its code beside the source or in ~/.cache.

    Where neither is writable (a read-only install and no home), each process compiles on
    its first call.
    """
    compiled: Any = _njit(**_OPTIONS)(function)
    if _may_cache():
        with contextlib.suppress(RuntimeError):  # numba found no writable folder
            compiled._cache = _Cache(function)  # noqa: SLF001 - numba's switch takes no class
    entry_point: Function = compiled
    return entry_point


def _may_cache() -> bool:
    """Return whether numba may look for a cache folder.

    For a user without a home, numba would create a folder named ``~`` in the current one.
    """
    return (
        "NUMBA_CACHE_DIR" in os.environ
        or os.access(Path(__file__).parent, os.W_OK)
        or os.path.expanduser("~") != "~"  # noqa: PTH111 - pathlib's raises without a home
    )


def helper(function: Function) -> Function:
    """Compile a function that only kernels call; it becomes part of their machine code."""
    compiled: Function = _njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function)
    return compiled
