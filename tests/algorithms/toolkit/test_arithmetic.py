"""Sums are rounded once an operation, whatever the CPU could do at once."""

import hashlib
import os
import subprocess
import sys
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch

from fedmq.algorithms.toolkit import arithmetic
from fedmq.algorithms.toolkit.arithmetic import add_scaled, power, scale_and_add, square_root

SIZES = [0, 1, 7, 1000, arithmetic._SMALL, arithmetic._SMALL + 1, 300_001]


def vectors(n, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(n, np.float32)) for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("weight", [1.0, -0.3, 1 / 3, 1e-30])
def test_a_product_is_rounded_and_then_the_sum(n, weight):
    total, values = vectors(n)
    product = (values.double() * float(np.float32(weight))).float()
    wanted = (total.double() + product.double()).float()
    add_scaled(total, values, weight)
    assert torch.equal(total, wanted)


@pytest.mark.parametrize("n", SIZES)
def test_both_terms_are_scaled(n):
    total, values = vectors(n)
    factor, weight = np.float32(0.7), np.float32(1 / 3)
    left = (total.double() * float(factor)).float()
    right = (values.double() * float(weight)).float()
    found = scale_and_add(total, 0.7, values, 1 / 3)
    assert found is total
    assert torch.equal(total, (left.double() + right.double()).float())


def test_a_fused_multiply_add_would_be_seen():
    """(1 + e)(1 - e) - 1 is 0 if the product is rounded, and -e^2 if it is not."""
    e = 2.0**-13
    for n in (3, 100_000):
        total, values = torch.full((n,), -1.0), torch.full((n,), 1 + e)
        add_scaled(total, values, 1 - e)
        assert torch.count_nonzero(total) == 0


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_values_may_begin_at_any_byte(offset):
    total, values = vectors(arithmetic._SMALL + 5)
    memory = bytearray(offset) + bytearray(values.numpy().tobytes())
    shifted = torch.frombuffer(memoryview(memory)[offset:], dtype=torch.float32)
    wanted = total + values * 0.4
    add_scaled(total, shifted, 0.4)
    assert torch.equal(total, wanted)


def test_roots_are_correctly_rounded():
    values = torch.from_numpy(np.random.default_rng(1).random(100_000, np.float32) * 10)
    wanted = np.sqrt(values.numpy().astype(np.float64)).astype(np.float32)
    assert np.array_equal(square_root(values).numpy(), wanted)


@pytest.mark.parametrize("base", [1, 2, 3, 10, 1_000_001, 0.999, 0.5])
@pytest.mark.parametrize("exponent", [-0.5, -1.0, -2.5, 0.1, 3, 1000])
def test_powers_are_correctly_rounded(base, exponent):
    getcontext().prec = 60
    assert power(base, exponent) == float(Decimal(base) ** Decimal(exponent))


KERNELS = """
import hashlib, numpy as np
from fedmq.codecs import kernels
from fedmq.codecs.kernels.layout import cut
rng = np.random.default_rng(3)
x, y = (rng.standard_normal(100_003, np.float32) for _ in range(2))
found = hashlib.sha256()
kernels.scale_add(x, 0.7, y, 1 / 3)
found.update(x)
left, right = rng.standard_normal((33, 17), np.float32), rng.standard_normal((17, 65), np.float32)
found.update(kernels.multiply(left, right))
for basis in (None, kernels.HadamardBasis(1), kernels.KashinFrame(1)):
    codes = rng.integers(0, 256, kernels.code_bytes(y.size, 4, 1024, basis), np.uint8)
    blocks = cut(y.size, 1024, basis).blocks
    ends = np.sort(rng.standard_normal((blocks, 2), np.float32), axis=1)
    kernels.accumulate(x, codes, ends, 4, 1024, 0.3, basis)
found.update(x)
print(found.hexdigest())
"""


def digest_of_kernels(**machine):
    """Return what sums and decoding come to on a CPU with these instructions."""
    environment = {**os.environ, **machine}
    done = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.end_to_end
def test_compiled_kernels_give_the_same_bits_on_a_cpu_without_extensions(tmp_path):
    """LLVM may use this CPU's fused and wide instructions, or those of the oldest one."""
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    plain = digest_of_kernels(NUMBA_CACHE_DIR=str(tmp_path), **generic)
    assert len(plain) == len(hashlib.sha256().hexdigest()) + 1
    assert plain == digest_of_kernels()


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("values", "loaded"), [(arithmetic._SMALL, False), (arithmetic._SMALL + 1, True)]
)
def test_what_sums_of_a_size_need_is_loaded_before_the_first(values, loaded):
    code = (
        "import sys; from fedmq.algorithms.toolkit import arithmetic; "
        f"arithmetic.prepare({values}); print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == str(loaded), done.stderr
