"""Processes that move large blobs reuse their memory."""

import platform
import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.end_to_end

_ALLOCATE = """
import resource, sys
import numpy as np
from fedmq.broker.process import keep_freed_memory
keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    np.ones(int(sys.argv[1]), np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="keep_freed_memory does nothing with another libc"
)
@pytest.mark.parametrize("size", [1 << 20, 7_000_000, 30_000_000])
def test_a_blob_that_follows_another_lands_in_the_same_pages(size):
    command = [sys.executable, "-P", "-c", _ALLOCATE, str(size)]
    faults = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert faults < 3 * size // resource.getpagesize()


def test_a_broker_has_a_file_for_each_of_very_many_nodes():
    code = """
import resource
from fedmq.broker.process import allow_many_files
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))
allow_many_files()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
