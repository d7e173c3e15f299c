from typing import Any

import numba
import pytest

from fedmq.codecs.kernels import jit


def test_without_a_place_for_the_cache_kernels_are_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_place(cache: bool = False, **options: Any) -> Any:  # noqa: FBT001, FBT002
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(jit, "_njit", without_place)
    assert jit.entry(lambda x: x + 1)(2) == 3
