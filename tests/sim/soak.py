"""Run many histories on all cores: ``make soak SEEDS=100000``, or one: ``FIRST=17 SEEDS=1``.

Exits with 1 if a promise is broken, or, with 2,000 histories or more, if some kind of fault or some
pair of kinds did not happen. A history that fails prints its traceback and the command for it.
"""

import argparse
import functools
import multiprocessing as mp
import os
import sys
import time
import traceback
from pathlib import Path

from tests.sim.coverage import Coverage

BATCH = 50
ENOUGH = 2000
"""Histories that have each pair of faults at least once."""


def run_seeds(first, count, keep=None):
    """Run some histories here; return what is wrong with the first bad one, and the coverage.

    keep: folder for the ledger of the first one; by default, no ledger is kept.
    """
    import torch

    from tests.sim.history import check_history

    torch.set_num_threads(1)
    coverage = Coverage()
    for seed in range(first, first + count):
        try:
            coverage.add(check_history(seed, keep=keep if seed == first else None).faults)
        except Exception:  # noqa: BLE001 - whatever it is, its seed must be printed
            why = traceback.format_exc()
            return f"{why}\nhistory {seed} failed: make soak FIRST={seed} SEEDS=1", coverage
    return None, coverage


def soak(first, seeds, report=lambda done: None):
    """Run histories on all cores; return the failures, one of each batch, and the coverage."""
    batches = [(at, min(BATCH, first + seeds - at)) for at in range(first, first + seeds, BATCH)]
    bad, coverage = [], Coverage()
    with mp.get_context("spawn").Pool(os.cpu_count()) as pool:
        runs = pool.imap(functools.partial(_run, run_seeds), batches)
        for index, (why, covered) in enumerate(runs):
            coverage.update(covered)
            if why is not None:
                bad.append(why)
            report((index + 1) * BATCH)
    return bad, coverage


def _run(function, arguments):
    return function(*arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument(
        "--keep", type=Path, help="run one history; leave its ledger in this folder"
    )
    options = parser.parse_args()
    if options.keep is not None:
        why, _ = run_seeds(options.first, 1, options.keep)
        print(why or f"history {options.first} keeps its promises")  # noqa: T201
        return bool(why)
    began = time.monotonic()

    def report(done):
        if sys.stdout.isatty():
            print(f"\r{min(done, options.seeds)} of {options.seeds}", end="", flush=True)  # noqa: T201

    bad, coverage = soak(options.first, options.seeds, report)
    print(*bad, *coverage.report(), sep="\n")  # noqa: T201
    took = time.monotonic() - began
    print(f"{coverage.histories} histories in {took:.0f} s; batches that failed: {len(bad)}")  # noqa: T201
    incomplete = coverage.missing_pairs if coverage.histories >= ENOUGH else []
    if incomplete:
        print(f"failed: {len(incomplete)} pairs of faults met in no history")  # noqa: T201
    return bool(bad or incomplete)


if __name__ == "__main__":
    sys.exit(main())
