"""Measure the cost of compression on one core, in copies of the vector.

Each figure is the median time of a kernel divided by that of ``np.copyto`` of the same float32
vector; both alternate in the same run. ``first call`` is the time to compile, or to load from
numba's cache, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedmq.codecs import kernels

SIZES = (1 << 21, 1 << 25)
BLOCK = 4096
LIMITS = {
    "quantize(4)": 3.0,
    "accumulate(4)": 1.5,
    "hadamard + quantize(4)": 7.0,
    "kashin(3) + quantize(2)": 40.0,
    "add a weighted update": 1.25,
}
"""Largest accepted figure by kernel; the other kernels have no limit."""

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]


def cases(x: Vector) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the names and calls to measure."""
    total = np.zeros_like(x)
    hadamard, kashin = kernels.HadamardBasis(1), kernels.KashinFrame(1, iterations=3)
    for name, bits, basis in (
        ("quantize(4)", 4, None),
        ("hadamard + quantize(4)", 4, hadamard),
        ("kashin(3) + quantize(2)", 2, kashin),
    ):
        codes, ranges = kernels.quantize(x, bits, BLOCK, 1, basis)
        yield name, lambda b=bits, a=basis: kernels.quantize(x, b, BLOCK, 1, a)
        yield (
            name.replace("quantize", "accumulate"),
            lambda b=bits, a=basis, c=codes, r=ranges: kernels.accumulate(
                total, c, r, b, BLOCK, 0.5, a
            ),
        )
    yield "hadamard", lambda: kernels.transform(x, BLOCK, kernels.HadamardBasis(1))
    yield "add a weighted update", lambda: kernels.scale_add(total, 1.0, x, 0.5)
    sums, values = torch.from_numpy(total), torch.from_numpy(x)
    yield "the same, torch's add_", lambda: sums.add_(values, alpha=0.5)
    chosen = kernels.mask(x.size, x.size // 4, 1)
    yield "mask(1/4)", lambda: kernels.mask(x.size, x.size // 4, 1)
    yield "gather(1/4)", lambda: kernels.gather(x, chosen)
    yield "top(1/100)", lambda: kernels.top(x, x.size // 100)


def duration(call: Callable[[], object]) -> float:
    """Return the duration of a call in seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(size: int, repetitions: int) -> dict[str, float]:
    """Return the figures by kernel, and ``copy_ms``, the duration of the copy."""
    x = np.random.default_rng(0).standard_normal(size, np.float32)
    other = np.zeros_like(x)
    calls = {"copy": lambda: np.copyto(other, x), **dict(cases(x))}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            times[name].append(duration(call))
    medians = {name: statistics.median(each) for name, each in times.items()}
    copy = medians.pop("copy")
    return {"copy_ms": copy * 1000, **{name: each / copy for name, each in medians.items()}}


def main() -> int:
    """Print the table; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    sizes = list(map(int, options.sizes.split(",")))

    torch.set_num_threads(1)
    small = np.ones(2 * BLOCK, np.float32)
    first = {name: duration(call) for name, call in _first_calls(small)}
    # Short calls vary more, and cost less to repeat.
    repetitions = {size: options.repetitions * (5 if size < 1 << 23 else 1) for size in sizes}
    measured = {size: measure(size, repetitions[size]) for size in sizes}

    table = Table("kernel", *(f"{size:,}" for size in sizes), "limit", "first call s")
    missed = False
    for name in measured[sizes[0]]:
        if name == "copy_ms":
            continue
        limit = LIMITS.get(name)
        figures = [measured[size][name] for size in sizes]
        missed |= limit is not None and max(figures) > limit
        began = f"{first[name]:.2f}" if name in first else ""
        table.add_row(name, *(f"{figure:.2f}" for figure in figures), f"{limit or '-'}", began)
    table.add_row("copy, ms", *(f"{measured[size]['copy_ms']:.2f}" for size in sizes), "-", "")
    Console().print(table)
    if options.json:
        found = {
            f"codecs.{size}.{name}": figure
            for size, figures_of in measured.items()
            for name, figure in figures_of.items()
        }
        found |= {f"codecs.first_call_s.{name}": seconds for name, seconds in first.items()}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(missed)


def _first_calls(x: Vector) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield one call for each separately compiled kernel; the first includes importing numba."""
    codes, ranges = np.zeros(x.size // 2, np.uint8), np.zeros((x.size // BLOCK, 2), np.float32)
    yield "quantize(4)", lambda: kernels.quantize(x, 4, BLOCK, 1)
    yield "accumulate(4)", lambda: kernels.accumulate(x.copy(), codes, ranges, 4, BLOCK, 1.0)
    yield (
        "kashin(3) + quantize(2)",
        lambda: kernels.quantize(x, 2, BLOCK, 1, kernels.KashinFrame(1)),
    )
    yield "hadamard", lambda: kernels.transform(x, BLOCK, kernels.HadamardBasis(1))
    yield "add a weighted update", lambda: kernels.scale_add(x.copy(), 1.0, x, 0.5)
    yield "mask(1/4)", lambda: kernels.mask(x.size, 1, 1)
    yield "gather(1/4)", lambda: kernels.gather(x, np.arange(3))
    yield "top(1/100)", lambda: kernels.top(x, 1)


if __name__ == "__main__":
    sys.exit(main())
