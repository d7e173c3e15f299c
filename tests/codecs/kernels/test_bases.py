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
    """Konecny et al. 2016, section 4 (iii); the signs are what the inverse shows of them."""
    x = heavy_tailed(n)
    y = kernels.rotate(x, n, 3)
    signed = sylvester(n) @ y / np.sqrt(n)
    np.testing.assert_allclose(np.abs(signed), np.abs(x), atol=1e-5)


@pytest.mark.slow
@quick
@given(st.integers(0, 9000), blocks, st.integers(-(2**70), 2**70))
def test_a_rotation_keeps_the_norm_and_can_be_undone(n: int, block: int, seed: int) -> None:
    x = heavy_tailed(n)
    y = kernels.rotate(x, block, seed)
    assert y.dtype == np.float32
    assert y.shape == (kernels.rotated_size(n, block),) == (n,)
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-5)
    back = kernels.unrotate(y, block, seed, n)
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
    a = kernels.kashin(x, block, iterations, eta, delta, 5)
    assert a.dtype == np.float32
    assert a.shape == (kernels.kashin_size(n, block),)
    back = kernels.unkashin(a, n, block, 5).astype(np.float64)
    assert np.linalg.norm(back - x) <= 1e-5 * np.linalg.norm(x.astype(np.float64))


def test_clipping_bounds_every_coefficient() -> None:
    """Lyubarskii, Vershynin 2010: at most the sum of all levels, M (1 + eta + eta^2 ..)."""
    x = heavy_tailed(3840)
    a = kernels.kashin(x, 4096, 3, 0.5, 0.5, 1, clipped=True)
    level = np.linalg.norm(x) / np.sqrt(0.5 * 4096)
    assert np.abs(a).max() <= level * (1 + 0.5 + 0.25) * 1.0001
    residual = np.linalg.norm(kernels.unkashin(a, x.size, 4096, 1) - x)
    assert residual < 0.2 * np.linalg.norm(x)


def test_zeros_stay_zeros() -> None:
    zeros = np.zeros(5000, np.float32)
    assert not kernels.rotate(zeros, 4096, 1).any()
    assert not kernels.kashin(zeros, 4096, 3, 0.3, 0.5, 1).any()


def test_each_block_and_each_seed_has_its_own_signs() -> None:
    same = np.tile(heavy_tailed(64), 20)
    rows = kernels.rotate(same, 64, 1).reshape(20, 64)
    assert len({row.tobytes() for row in rows}) == 20
    assert (kernels.rotate(same, 64, 1) != kernels.rotate(same, 64, 2)).mean() > 0.9


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
def test_a_wrong_number_of_coefficients_is_refused(size: int) -> None:
    y = np.zeros(size, np.float32)
    with pytest.raises(ValueError, match="coefficients"):
        kernels.unrotate(y, 64, 1, 100)
    with pytest.raises(ValueError, match="coefficients"):
        kernels.unkashin(y, 100, 64, 1)


@pytest.mark.parametrize("block", [0, -4, 3, 48, 1 << 21, 64.0, True + 2])
def test_only_powers_of_two_are_blocks(block: int) -> None:
    with pytest.raises(ValueError, match="block"):
        kernels.rotate(np.zeros(100, np.float32), block, 1)
    with pytest.raises(ValueError, match="block"):
        kernels.kashin_size(100, block)
