"""Every random draw of a run comes from (run seed, purpose, and what it is for)."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *what: int | str) -> int:
    """Return 63 random bits that depend on all of the arguments, and on nothing else."""
    text = "\x1f".join(map(str, (seed, purpose, *what)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def derive_rng(seed: int, purpose: str, *what: int | str) -> np.random.Generator:
    """Return a generator of its own for one purpose, for example ("cohort", version)."""
    return np.random.default_rng(derive_seed(seed, purpose, *what))


_spare: list[np.random.MT19937] = []
"""Generators of numpy's kind that nobody uses now."""


@contextlib.contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch; afterwards they are as before.

    For what a user's code draws: a model's dropout, augmentation, a random crop.

    Args:
        seed: from `derive_seed`.
        device: torch device that is used, besides the CPU.
    """
    python = random.getstate()
    # Another generator in place of numpy's: to copy a state and back takes 70 us, to make a
    # generator 90.
    spare = _spare.pop() if _spare else np.random.MT19937(0)
    legacy = np.random.get_bit_generator()  # type: ignore[attr-defined] # numpy's stubs lack it
    np.random.set_bit_generator(spare)  # type: ignore[attr-defined] # likewise
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002 - users draw from it
        # torch.manual_seed would reseed every GPU, and only this one is put back.
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
