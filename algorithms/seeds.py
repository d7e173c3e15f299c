"""Derive every random draw of a run from (run seed, purpose, client, task); needs no torch."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, purpose: str, *what: int | str) -> int:
    """Return 63 random bits that depend on all of the arguments and on nothing else."""
    text = "\x1f".join(map(str, (seed, purpose, *what)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def derive_rng(seed: int, purpose: str, *what: int | str) -> np.random.Generator:
    """Return a separate generator for one purpose, for example ("cohort", version)."""
    return np.random.default_rng(derive_seed(seed, purpose, *what))
