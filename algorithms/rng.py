"""Seed the global generators of Python, numpy and torch for a user's code, and restore them."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch

from fedmq.algorithms.seeds import derive_rng, derive_seed

__all__ = ["derive_rng", "derive_seed", "seeded"]


_global_generators = threading.RLock()
"""Held while they are seeded: nodes on several threads of a process would mix them up."""
_spare: list[np.random.MT19937] = []
"""Idle generators of the kind that numpy uses globally."""


@contextlib.contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch; restore them afterwards.

    For draws of a user's code: a model's dropout, augmentation, a random crop. Other threads that
    want to seed them wait meanwhile.

    Args:
        seed: from `derive_seed`.
        device: torch device that is used besides the CPU.
    """
    with _global_generators:
        yield from _seeded(seed, device)


def _seeded(seed: int, device: str) -> Iterator[None]:
    python = random.getstate()
    # Swap numpy's generator for a spare one: copying its state twice takes 70 us, a new one 90.
    spare = _spare.pop() if _spare else np.random.MT19937(0)
    legacy = np.random.get_bit_generator()  # type: ignore[attr-defined] # numpy's stubs lack it
    np.random.set_bit_generator(spare)  # type: ignore[attr-defined] # likewise
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002 - users draw from it
        # torch.manual_seed would reseed every GPU, and only this one is restored.
        torch.default_generator.manual_seed(seed)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_bit_generator(legacy)  # type: ignore[attr-defined] # likewise
            _spare.append(spare)
