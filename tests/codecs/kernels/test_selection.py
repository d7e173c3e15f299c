import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs import kernels

quick = settings(deadline=None, max_examples=60)


@quick
@given(st.integers(0, 20_000), st.floats(0, 1), st.integers(0, 2**64 - 1))
def test_a_mask_has_k_ascending_indices(n: int, keep: float, seed: int) -> None:
    k = round(keep * n)
    chosen = kernels.mask(n, k, seed)
    assert chosen.dtype == np.int64
    assert chosen.shape == (k,)
    assert (np.diff(chosen) > 0).all()
    assert k == 0 or (chosen[0] >= 0 and chosen[-1] < n)
    np.testing.assert_array_equal(chosen, kernels.mask(n, k, seed))


def test_a_mask_keeps_each_value_equally_often() -> None:
    n, k, seeds = 200, 50, 2000
    counts = np.zeros(n)
    pairs = 0
    for seed in range(seeds):
        chosen = kernels.mask(n, k, seed)
        counts[chosen] += 1
        pairs += np.isin([10, 11], chosen).all()
    deviation = np.sqrt(seeds * 0.25 * 0.75)
    assert np.abs(counts - seeds * 0.25).max() < 4.5 * deviation
    assert abs(pairs / seeds - 0.25 * 49 / 199) < 0.025


def test_masks_of_different_seeds_differ() -> None:
    both = np.intersect1d(kernels.mask(100_000, 25_000, 1), kernels.mask(100_000, 25_000, 2))
    assert abs(both.size - 6250) < 400


@quick
@given(
    st.lists(st.floats(-4, 4, width=16) | st.sampled_from([0.0, -0.0, 1.0, -1.0]), max_size=300),
    st.floats(0, 1),
)
def test_top_is_what_a_stable_sort_by_magnitude_puts_first(
    values: list[float], keep: float
) -> None:
    x = np.array(values, np.float32)
    k = round(keep * x.size)
    indices, found = kernels.top(x, k)
    np.testing.assert_array_equal(indices, np.sort(np.argsort(-np.abs(x), kind="stable")[:k]))
    np.testing.assert_array_equal(found, x[indices])


def test_top_of_many_equal_magnitudes_takes_the_first() -> None:
    x = np.ones(100_000, np.float32)
    x[7::10] = -1
    np.testing.assert_array_equal(kernels.top(x, 12_345)[0], np.arange(12_345))


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_top_rejects_values_that_are_not_finite(value: float) -> None:
    x = np.arange(50, dtype=np.float32)
    x[33] = value
    with pytest.raises(ValueError, match="finite"):
        kernels.top(x, 3)


def test_scattering_undoes_gathering() -> None:
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    chosen = kernels.mask(1000, 300, 1)
    full = kernels.scatter(kernels.gather(x, chosen), chosen, 1000)
    np.testing.assert_array_equal(full[chosen], x[chosen])
    assert np.count_nonzero(full) == 300
    total = np.ones(1000, np.float32)
    kernels.scatter_add(total, chosen, x[chosen], 0.5)
    np.testing.assert_array_equal(total, np.float32(1) + np.float32(0.5) * full)


@pytest.mark.parametrize(
    "indices",
    [
        np.array([0, 10]),
        np.array([-1, 3]),
        np.array([0, 2**62]),
        np.array([0, 1], np.int32),
        np.array([[0, 1]]),
        np.arange(4)[::2],
    ],
)
def test_indices_out_of_range_are_rejected(indices: np.ndarray) -> None:
    x, values = np.zeros(10, np.float32), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="expected"):
        kernels.gather(x, indices)
    with pytest.raises(ValueError, match="expected"):
        kernels.scatter(values, indices, 10)
    with pytest.raises(ValueError, match="expected"):
        kernels.scatter_add(x, indices, values, 1.0)


def test_invalid_counts_are_rejected() -> None:
    for n, k in ((-1, 0), (10, 11), (10, -1), (1 << 31, 1), (10.0, 1), (10, True)):
        with pytest.raises(ValueError, match="expected"):
            kernels.mask(n, k, 1)
    with pytest.raises(ValueError, match="expected 2 values"):
        kernels.scatter(np.zeros(3, np.float32), np.arange(2), 10)
