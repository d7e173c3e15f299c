"""Run many histories on all cores: ``make soak SEEDS=100000``, or one: ``FIRST=17 SEEDS=1``."""

import argparse
import functools
import multiprocessing as mp
import os
import sys
import time
import traceback

BATCH = 50


def run_seeds(first, count):
    """Run some histories here; return what is wrong with the first bad one, and its command."""
    import torch

    from tests.sim.history import check_history

    torch.set_num_threads(1)
    for seed in range(first, first + count):
        try:
            check_history(seed)
        except Exception:  # noqa: BLE001 - whatever it is, its seed must be told
            why = traceback.format_exc()
            return f"{why}\nhistory {seed} went wrong: make soak FIRST={seed} SEEDS=1"
    return None


def soak(first, seeds, report=lambda done: None):
    """Run histories on all cores; return the bad ones, a sentence with the command for each."""
    batches = [(at, min(BATCH, first + seeds - at)) for at in range(first, first + seeds, BATCH)]
    bad = []
    with mp.get_context("spawn").Pool(os.cpu_count()) as pool:
        for index, found in enumerate(pool.imap(functools.partial(_run, run_seeds), batches)):
            if found is not None:
                bad.append(found)
            report((index + 1) * BATCH)
    return bad


def _run(function, arguments):
    return function(*arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=10_000)
    options = parser.parse_args()
    began = time.monotonic()

    def report(done):
        if sys.stdout.isatty():
            print(f"\r{min(done, options.seeds)} of {options.seeds}", end="", flush=True)  # noqa: T201

    bad = soak(options.first, options.seeds, report)
    print(*bad, sep="\n")  # noqa: T201
    print(f"{options.seeds} histories in {time.monotonic() - began:.0f} s, {len(bad)} bad")  # noqa: T201
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
