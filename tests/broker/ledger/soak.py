"""Run many ledgers on failing disks: ``python -m tests.broker.ledger.soak --seeds 10000``."""

import argparse
import itertools
import multiprocessing as mp
import os
import sys
import time
import traceback

from tests.broker.ledger.failing_disk import check_seeds, small_ledgers


def check_seed(job):
    """Run one seed under one durability; return what went wrong, or ""."""
    durability, seed = job
    try:
        with small_ledgers() as folder:
            check_seeds(folder, durability, [seed])
    except Exception:  # noqa: BLE001 - whatever it is, it is reported with its seed
        return traceback.format_exc()
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=10_000)
    options = parser.parse_args()
    began = time.monotonic()
    seeds = range(options.first, options.first + options.seeds)
    jobs = itertools.product(("process", "power"), seeds)
    with mp.get_context("spawn").Pool(os.cpu_count()) as pool:
        bad = [why for why in pool.imap(check_seed, jobs, chunksize=50) if why]
    print(*bad, sep="\n")  # noqa: T201
    print(f"{2 * len(seeds)} ledgers in {time.monotonic() - began:.0f} s, {len(bad)} bad")  # noqa: T201
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
