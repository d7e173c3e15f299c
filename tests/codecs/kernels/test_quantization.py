import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs import kernels
from fedmq.codecs.kernels.layout import Basis, HadamardBasis, KashinFrame

# The first call compiles for seconds.
quick = settings(deadline=None, max_examples=40)
blocks = st.sampled_from([1, 2, 8, 32, 64, 256])
bases = st.sampled_from([None, HadamardBasis(5), KashinFrame(5)])
FLOAT_MAX = float(np.finfo(np.float32).max)


def heavy_tailed(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, n).astype(np.float32)


def nmse(x: np.ndarray, bits: int, block: int, basis: Basis) -> float:
    codes, ranges = kernels.quantize(x, bits, block, 1, basis)
    decoded = kernels.dequantize(codes, ranges, x.size, bits, block, basis)
    error = decoded.astype(np.float64) - x
    return float((error**2).sum() / (x.astype(np.float64) ** 2).sum())


@quick
@given(st.integers(0, 700), st.integers(1, 8), blocks, bases)
def test_sizes_match_and_errors_stay_within_a_step(
    n: int, bits: int, block: int, basis: Basis
) -> None:
    x = heavy_tailed(n)
    codes, ranges = kernels.quantize(x, bits, block, 3, basis)
    assert codes.dtype == np.uint8
    assert codes.shape == (kernels.code_bytes(n, bits, block, basis),)
    assert ranges.dtype == np.float32
    decoded = kernels.dequantize(codes, ranges, n, bits, block, basis)
    assert decoded.shape == (n,)
    if basis is None and n:
        step = np.repeat(ranges[:, 1] - ranges[:, 0], block)[:n] / (2**bits - 1)
        assert (np.abs(decoded - x) <= step * 1.0001 + 1e-6).all()


@quick
@given(st.integers(1, 700), st.integers(1, 8), blocks, bases)
def test_accumulation_has_the_bits_of_decoding_and_adding(
    n: int, bits: int, block: int, basis: Basis
) -> None:
    codes, ranges = kernels.quantize(heavy_tailed(n), bits, block, 3, basis)
    total = heavy_tailed(n, 1)
    expected = total + np.float32(0.3) * kernels.dequantize(codes, ranges, n, bits, block, basis)
    kernels.accumulate(total, codes, ranges, bits, block, 0.3, basis)
    np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_densely_from_the_lowest_bit(bits: int) -> None:
    # Values on a level are not rounded.
    levels = np.random.default_rng(bits).integers(0, 2**bits, 2 * 24 + 13)
    levels[[0, 24, 48]], levels[[1, 25, 49]] = 0, 2**bits - 1
    codes, _ = kernels.quantize(levels.astype(np.float32), bits, 24, 0)
    expected = b""
    for start in range(0, levels.size, 24):
        part = levels[start : start + 24]
        word = sum(int(level) << (bits * j) for j, level in enumerate(part))
        expected += word.to_bytes((part.size * bits + 7) // 8, "little")
    assert codes.tobytes() == expected


@quick
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.integers(1, 8),
    st.integers(0, 2**64 - 1),
)
def test_any_finite_values_keep_their_extremes(values: list[float], bits: int, seed: int) -> None:
    """Including constant blocks, subnormals, -0.0 and ranges beyond float32."""
    x = np.array(values, np.float32)
    codes, ranges = kernels.quantize(x, bits, 64, seed)
    decoded = kernels.dequantize(codes, ranges, x.size, bits, 64)
    assert decoded[x.argmin()] == x.min()
    assert decoded[x.argmax()] == x.max()
    with np.errstate(over="ignore"):  # infinity is the right result
        low, high = np.nextafter([x.min(), x.max()], np.float32([-np.inf, np.inf]))
    assert (decoded >= low).all()
    assert (decoded <= high).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "basis"),
    [
        (1.0, None),
        (FLOAT_MAX, None),
        (1e-30, None),
        (1e-41, None),
        (1.0, HadamardBasis(2)),
        (1.0, KashinFrame(2)),
    ],
)
def test_the_mean_over_seeds_is_the_value(unit: float, basis: Basis) -> None:
    x = (np.linspace(-1, 1, 60) * unit).astype(np.float32)
    seeds, bits = 3000, 2
    total = np.zeros(60)
    squares = np.zeros(60)
    for seed in range(seeds):
        codes, ranges = kernels.quantize(x, bits, 64, seed, basis)
        error = (kernels.dequantize(codes, ranges, 60, bits, 64, basis).astype(float) - x) / unit
        total += error
        squares += error**2
    standard_error = np.sqrt(squares / seeds / seeds)
    spacing = 2.0**-149 / unit  # of subnormals, which decoded values are rounded to
    assert (np.abs(total / seeds) <= 5 * standard_error + 2**-21 + spacing).all()


@pytest.mark.parametrize("basis", [None, HadamardBasis(2), KashinFrame(2)])
def test_the_error_falls_with_bits(basis: Basis) -> None:
    errors = [nmse(heavy_tailed(3840 * 2), bits, 4096, basis) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1000 * errors[-1]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_kashin_errs_less_than_a_rotation_and_that_less_than_none(bits: int) -> None:
    """Caldas et al. 2018: for the same number of bits per coefficient."""
    x = heavy_tailed(200_000)
    plain, hadamard, kashin = (
        nmse(x, bits, 4096, b) for b in (None, HadamardBasis(2), KashinFrame(2))
    )
    assert kashin < 0.9 * hadamard
    assert hadamard < 0.3 * plain


def test_one_bit_of_kashin_beats_a_rotation_for_the_same_bytes_too() -> None:
    x = heavy_tailed(400_000)
    one, two = (np.log(nmse(x, bits, 4096, HadamardBasis(2))) for bits in (1, 2))
    basis = KashinFrame(2, iterations=6, eta=0.5, delta=0.8)
    extra = kernels.code_bytes(x.size, 1, 4096, basis) * 8 / x.size - 1
    # The error of a rotation, interpolated to the same number of bytes.
    assert np.log(nmse(x, 1, 4096, basis)) < one + extra * (two - one)


@pytest.mark.parametrize("basis", [None, HadamardBasis(2), KashinFrame(2)])
def test_the_bytes_depend_on_the_seed_only(basis: Basis) -> None:
    x = heavy_tailed(5000)
    ours, again, other = (kernels.quantize(x, 3, 256, seed, basis)[0] for seed in (7, 7, 8))
    np.testing.assert_array_equal(ours, again)
    assert (ours != other).mean() > 0.3
    assert (kernels.quantize(x, 3, 256, 7 + 2**64, basis)[0] == ours).all()


def test_fusing_changes_no_byte() -> None:
    x = heavy_tailed(10_000)
    for basis in (HadamardBasis(3), KashinFrame(3)):
        fused = kernels.quantize(x, 4, 1024, 9, basis)
        in_two_passes = kernels.quantize(kernels.transform(x, 1024, basis), 4, 1024, 9)
        for a, b in zip(fused, in_two_passes, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("basis", [None, HadamardBasis(2), KashinFrame(2)])
@pytest.mark.parametrize("place", [0, 70, 99])
def test_values_that_are_not_finite_are_rejected(value: float, basis: Basis, place: int) -> None:
    x = np.ones(100, np.float32)
    x[place] = value
    with pytest.raises(ValueError, match="finite"):
        kernels.quantize(x, 4, 64, 0, basis)


N, BITS, BLOCK = 100, 3, 32
Message = tuple[np.ndarray, np.ndarray]


def _with_range(low: float, high: float) -> Callable[[Message], Message]:
    def change(message: Message) -> Message:
        ranges = message[1].copy()
        ranges[1] = low, high
        return message[0], ranges

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda m: (m[0][:-1], m[1]),
        lambda m: (np.append(m[0], np.uint8(0)), m[1]),
        lambda m: (m[0][:0], m[1]),
        lambda m: (m[0].astype(np.int8), m[1]),
        lambda m: (m[0].reshape(1, -1), m[1]),
        lambda m: (np.repeat(m[0], 2)[::2], m[1]),
        lambda m: (m[0], m[1][:-1]),
        lambda m: (m[0], m[1].reshape(-1)),
        lambda m: (m[0], m[1].astype(np.float64)),
        _with_range(np.nan, 1),
        _with_range(0, np.nan),
        _with_range(0, np.inf),
        _with_range(-np.inf, 0),
        _with_range(np.inf, np.inf),
        _with_range(1, 0),
    ],
)
def test_a_damaged_message_is_rejected(change: Callable[[Message], Message]) -> None:
    codes, ranges = change(kernels.quantize(heavy_tailed(N), BITS, BLOCK, 0))
    with pytest.raises(ValueError, match="expected"):
        kernels.dequantize(codes, ranges, N, BITS, BLOCK)
    with pytest.raises(ValueError, match="expected"):
        kernels.accumulate(np.zeros(N, np.float32), codes, ranges, BITS, BLOCK, 1.0)


@pytest.mark.parametrize(
    ("n", "bits", "block", "basis"),
    [
        (-1, 3, 32, None), (1 << 62, 3, 32, None), (N, 0, 32, None), (N, 9, 32, None),
        (N, True, 32, None), (N, 3.0, 32, None), (N, 3, 0, None), (N, 3, 1 << 21, None),
        (N, 3, 24, HadamardBasis(0)), (float(N), 3, 32, None),
        (N, 3, 32, KashinFrame(0, iterations=0)),
        (N, 3, 32, KashinFrame(0, eta=2.0)), (N, 3, 32, KashinFrame(0, delta=float("nan"))),
    ],
)  # fmt: skip
def test_invalid_parameters_are_rejected(n: int, bits: int, block: int, basis: Basis) -> None:
    codes, ranges = kernels.quantize(heavy_tailed(N), BITS, BLOCK, 0)
    with pytest.raises(ValueError, match="expected"):
        kernels.dequantize(codes, ranges, n, bits, block, basis)


@quick
@given(st.binary(max_size=300), st.integers(0, 400), st.integers(1, 8), blocks, bases)
def test_any_bytes_decode_or_are_rejected(
    data: bytes, n: int, bits: int, block: int, basis: Basis
) -> None:
    codes = np.frombuffer(data, np.uint8)
    size = kernels.code_bytes(n, bits, block, basis)
    ranges = np.tile(np.array([[-1, 1]], np.float32), (n // 2 + 2, 1))
    for blocks_ in range(len(ranges)):
        try:
            found = kernels.dequantize(codes, ranges[:blocks_], n, bits, block, basis)
        except ValueError:
            continue
        assert len(codes) == size
        assert np.isfinite(found).all()


def test_unaligned_and_read_only_messages_decode() -> None:
    x = heavy_tailed(N)
    codes, ranges = kernels.quantize(x, BITS, BLOCK, 0)
    data = b"x" + ranges.tobytes() + codes.tobytes()
    elsewhere = np.frombuffer(data, np.float32, ranges.size, 1).reshape(-1, 2)
    found = kernels.dequantize(
        np.frombuffer(data, np.uint8, offset=1 + ranges.nbytes), elsewhere, N, BITS, BLOCK
    )
    np.testing.assert_array_equal(found, kernels.dequantize(codes, ranges, N, BITS, BLOCK))


def test_other_arrays_than_float32_vectors_are_rejected() -> None:
    for x in (np.ones(9), np.ones((3, 3), np.float32), np.ones(9, np.float32)[::2]):
        with pytest.raises(ValueError, match="float32 vector"):
            kernels.quantize(x, 4, 64, 0)
    total = np.zeros(9, np.float32)
    codes, ranges = kernels.quantize(total, 4, 64, 0)
    with pytest.raises(ValueError, match="finite weight"):
        kernels.accumulate(total, codes, ranges, 4, 64, float("inf"))
    total.flags.writeable = False
    with pytest.raises(ValueError, match="expected a writable total"):
        kernels.accumulate(total, codes, ranges, 4, 64, 1.0)


@pytest.mark.end_to_end
def test_numba_is_imported_by_the_first_kernel() -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; import fedmq.codecs.kernels"
    code += "; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
