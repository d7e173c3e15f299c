"""Weighted sums and products of matrices: a fixed order, one rounding per operation."""

import numpy as np
import pytest

from fedmq.codecs import kernels


def test_a_product_adds_its_terms_from_the_first_to_the_last():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((5, 9), np.float32), rng.standard_normal((9, 4), np.float32)
    wanted = np.zeros((5, 4), np.float32)
    for k in range(9):
        wanted += left[:, k : k + 1] * right[k]
    assert np.array_equal(kernels.multiply(left, right), wanted)
    assert np.array_equal(kernels.multiply(left, np.asfortranarray(right)), wanted)


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_an_empty_product(shape):
    rows, inner, columns = shape
    left, right = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
    assert np.array_equal(kernels.multiply(left, right), np.zeros((rows, columns), np.float32))


def test_matrices_with_different_inner_sizes_are_rejected():
    with pytest.raises(ValueError, match=r"cannot multiply \[2, 3\] by \[2, 3\]"):
        kernels.multiply(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))


def test_sums_are_in_place_and_check_their_arguments():
    total = np.ones(5, np.float32)
    kernels.scale_add(total, 2.0, np.full(5, 3, np.float32), 0.5)
    assert total.tolist() == [3.5] * 5
    with pytest.raises(ValueError, match="expected 5 values, got 4"):
        kernels.scale_add(total, 1.0, np.ones(4, np.float32), 1.0)
    total.flags.writeable = False
    with pytest.raises(ValueError, match="expected a writable total"):
        kernels.scale_add(total, 1.0, np.ones(5, np.float32), 1.0)
