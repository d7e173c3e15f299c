import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs import kernels
from fedmq.codecs.kernels.layout import HadamardBasis, KashinFrame, cut

quick = settings(deadline=None, max_examples=60)
blocks = st.sampled_from([1, 2, 4, 8, 16, 64, 128, 512, 4096])


def heavy_tailed(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, n).astype(np.float32)


def sylvester(n: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@pytest.mark.slow
@pytest.mark.parametrize("n", [2**k for k in range(12)])
def test_a_rotation_is_the_hadamard_matrix_times_signs(n: int) -> None:
    """Konecny et al. 2016, section 4 (iii); the inverse shows the signs."""
    x = heavy_tailed(n)
    y = kernels.transform(x, n, HadamardBasis(3))
    signed = sylvester(n) @ y / np.sqrt(n)
    np.testing.assert_allclose(np.abs(signed), np.abs(x), atol=1e-5)


@pytest.mark.slow
@quick
@given(st.integers(0, 9000), blocks, st.integers(-(2**70), 2**70))
def test_a_rotation_keeps_the_norm_and_has_an_inverse(n: int, block: int, seed: int) -> None:
    x = heavy_tailed(n)
    basis = HadamardBasis(seed)
    y = kernels.transform(x, block, basis)
    assert y.dtype == np.float32
    assert y.shape == (kernels.coefficients(n, block, basis),) == (n,)
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-5)
    back = kernels.restore(y, n, block, basis)
    assert np.linalg.norm(back - x) <= 1e-6 * np.linalg.norm(x)


@pytest.mark.slow
@quick
@given(
    st.integers(0, 9000),
    blocks,
    st.integers(1, 6),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.floats(1e-30, 1e30),
)
def test_kashin_coefficients_represent_the_values_exactly(
    n: int, block: int, iterations: int, eta: float, delta: float, unit: float
) -> None:
    x = heavy_tailed(n) * np.float32(unit)
    frame = KashinFrame(5, iterations, eta, delta)
    a = kernels.transform(x, block, frame)
    assert a.dtype == np.float32
    assert a.shape == (kernels.coefficients(n, block, frame),)
    back = kernels.restore(a, n, block, frame).astype(np.float64)
    assert np.linalg.norm(back - x) <= 1e-5 * np.linalg.norm(x.astype(np.float64))


def test_clipping_bounds_every_coefficient() -> None:
    """Lyubarskii, Vershynin 2010: at most the sum of all levels, M (1 + eta + eta^2 ..)."""
    x = heavy_tailed(3840)
    frame = KashinFrame(1, 3, 0.5, 0.5, clipped=True)
    a = kernels.transform(x, 4096, frame)
    level = np.linalg.norm(x) / np.sqrt(0.5 * 4096)
    assert np.abs(a).max() <= level * (1 + 0.5 + 0.25) * 1.0001
    residual = np.linalg.norm(kernels.restore(a, x.size, 4096, frame) - x)
    assert residual < 0.2 * np.linalg.norm(x)


def test_zeros_stay_zeros() -> None:
    zeros = np.zeros(5000, np.float32)
    assert not kernels.transform(zeros, 4096, HadamardBasis(1)).any()
    assert not kernels.transform(zeros, 4096, KashinFrame(1)).any()


def test_signs_differ_between_blocks_and_seeds() -> None:
    same = np.tile(heavy_tailed(64), 20)
    first, second = (kernels.transform(same, 64, HadamardBasis(seed)) for seed in (1, 2))
    rows = first.reshape(20, 64)
    assert len({row.tobytes() for row in rows}) == 20
    assert (first != second).mean() > 0.9


def test_signs_are_fair_and_follow_from_the_seed() -> None:
    found = kernels.signs(100_001, 3)
    assert found.dtype == np.float32
    assert set(found) == {-1.0, 1.0}
    assert abs(found.mean()) < 0.02
    np.testing.assert_array_equal(found, kernels.signs(100_001, 3))
    assert abs((found * kernels.signs(100_001, 4)).mean()) < 0.02
    assert kernels.signs(0, 1).shape == (0,)


@given(st.integers(0, 1 << 40), st.sampled_from([1, 2, 8, 32, 64, 1024, 4096, 1 << 20]))
def test_a_cut_covers_all_values_and_wastes_few(n: int, block: int) -> None:
    for basis in (None, HadamardBasis(0), KashinFrame(0)):
        shape = cut(n, block, basis)
        assert shape.whole * shape.inputs + sum(values for values, _ in shape.tail) == n
        assert shape.rest <= block
        assert all(values <= size for values, size in shape.tail)
        if not isinstance(basis, KashinFrame):
            assert shape.coefficients == n
        elif block >= 64:
            assert shape.coefficients <= n * 16 / 15 + 64


@pytest.mark.parametrize("size", [0, 99, 101, 4096])
def test_a_wrong_number_of_coefficients_is_rejected(size: int) -> None:
    y = np.zeros(size, np.float32)
    for basis in (HadamardBasis(1), KashinFrame(1)):
        with pytest.raises(ValueError, match="coefficients"):
            kernels.restore(y, 100, 64, basis)


@pytest.mark.parametrize("block", [0, -4, 3, 48, 1 << 21, 64.0, True + 2])
def test_only_powers_of_two_are_blocks(block: int) -> None:
    with pytest.raises(ValueError, match="block"):
        kernels.transform(np.zeros(100, np.float32), block, HadamardBasis(1))
    with pytest.raises(ValueError, match="block"):
        kernels.coefficients(100, block, KashinFrame(1))
