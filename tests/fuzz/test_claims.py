"""Tensors that a few bytes claim to be: refused before torch takes memory for them."""

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest

from fedmq.codecs.registry import codecs
from tests.fuzz.decoders import DECODERS, join, split
from tests.fuzz.seeds import ALL

pytestmark = pytest.mark.end_to_end


def claiming(name, rows):
    """Return a payload or a codec's input in which each tensor claims to be this large."""
    dtypes = ["float32"] * len(rows)
    seeds = []
    for seed in ALL[name]:
        first, *rest = split(seed)
        if name.startswith("codec-"):
            meta = {**msgpack.unpackb(rest[0]), "tensors": rows, "dtypes": dtypes}
            seeds.append(join(first, msgpack.packb(meta), *rest[1:]))
        else:
            fields = msgpack.unpackb(first)
            for group in fields["body"]["groups"]:
                group["meta"] |= {"tensors": rows, "dtypes": dtypes}
            seeds.append(join(msgpack.packb(fields), *rest))
    return seeds


def claims():
    """Yield inputs that claim up to a tebibyte in a few hundred bytes."""
    for name in [f"codec-{name}" for name in codecs()] + ["payload", "flatten"]:
        for dtype in ("float32", "float16", "bool", "int64"):
            for shape in (
                [1 << 40],
                [1 << 38],
                [1 << 36],
                [1 << 20, 1 << 17],
                [0, 1 << 39],
                [1 << 30],
            ):
                for seed in claiming(name, [["a", dtype, shape]]):
                    yield name, seed
                for seed in claiming(name, [[str(n), dtype, [1 << 30]] for n in range(30)]):
                    yield name, seed


def decode_within(room_bytes):
    """Decode all claims in a process that cannot take more memory than it has by much."""
    for name in DECODERS:
        for data in ALL[name]:
            DECODERS[name](data)
    gc.collect()
    with open("/proc/self/statm") as file:  # noqa: PTH123 - no file of ours
        limit = int(file.read().split()[0]) * resource.getpagesize() + room_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        bytearray(2 * room_bytes)
        raise AssertionError("the limit is none")
    except MemoryError:
        pass
    count = 0
    for name, data in claims():
        DECODERS[name](data)
        count += 1
    print(count, "decoded")  # noqa: T201 - what the test waits for


def test_tensors_that_are_claimed_are_refused_before_memory_is_taken():
    """In a process of its own: torch's memory is not Python's, and a limit is for ever."""
    code = "from tests.fuzz.test_claims import decode_within; decode_within(64 << 20)"
    paths = [str(Path(__file__).parents[2]), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.endswith("decoded\n"), done.stderr[-2000:]
