"""The torch kernels on the CPU have the same bits as the compiled ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs import kernels
from fedmq.codecs.kernels import on_device
from fedmq.codecs.kernels.layout import Basis, HadamardBasis, KashinFrame

pytestmark = pytest.mark.slow

quick = settings(deadline=None, max_examples=40)
sizes = st.sampled_from([0, 1, 7, 60, 64, 65, 100, 255, 1000, 4097])
blocks = st.sampled_from([1, 2, 8, 32, 64, 256, 4096])
bases = st.sampled_from(
    [None, HadamardBasis(5), KashinFrame(5), KashinFrame(5, 4, 0.9, 1.0, clipped=True)]
)


def some(n: int, unit: float = 1.0) -> tuple[np.ndarray, torch.Tensor]:
    x = (np.random.default_rng(n).uniform(-3, 3, n) * unit).astype(np.float32)
    return x, torch.from_numpy(x.copy())


def same(ours: np.ndarray, theirs: torch.Tensor) -> bool:
    found = theirs.numpy()
    return ours.dtype == found.dtype and ours.tobytes() == found.tobytes()


@quick
@given(
    sizes, st.integers(1, 8), blocks, bases, st.sampled_from([1.0, 1e37, 1e-30, 1e-41]),
    st.integers(-5, 2**64),
)  # fmt: skip
def test_codes_and_values_are_the_same(
    n: int, bits: int, block: int, basis: Basis, unit: float, seed: int
) -> None:
    x, tensor = some(n, unit if basis is None else 1.0)
    codes, ranges = kernels.quantize(x, bits, block, seed, basis)
    found = on_device.quantize(tensor, bits, block, seed, basis)
    assert same(codes, found[0])
    assert same(ranges, found[1])
    values = kernels.dequantize(codes, ranges, n, bits, block, basis)
    assert same(values, on_device.dequantize(*found, n, bits, block, basis))
    total, their_total = x.copy(), tensor.clone()
    kernels.accumulate(total, codes, ranges, bits, block, 0.3, basis)
    on_device.accumulate(their_total, *found, bits, block, 0.3, basis)
    assert same(total, their_total)


def test_a_range_beyond_float32_is_the_same() -> None:
    x, tensor = some(5000, 1.1e38)
    for bits in (1, 4, 8):
        assert same(kernels.quantize(x, bits, 64, 1)[0], on_device.quantize(tensor, bits, 64, 1)[0])


@quick
@given(sizes, blocks, st.integers(-5, 2**64))
def test_bases_are_the_same(n: int, block: int, seed: int) -> None:
    x, tensor = some(n)
    for basis in (HadamardBasis(seed), KashinFrame(seed)):
        y = kernels.transform(x, block, basis)
        assert same(y, on_device.transform(tensor, block, basis))
        back = on_device.restore(torch.from_numpy(y), n, block, basis)
        assert same(kernels.restore(y, n, block, basis), back)


@quick
@given(sizes, st.floats(0, 1), st.integers(-5, 2**64))
def test_selections_are_the_same(n: int, keep: float, seed: int) -> None:
    x, tensor = some(n)
    x, tensor = np.round(x), tensor.round()
    k = round(keep * n)
    assert same(kernels.mask(n, k, seed), on_device.mask(n, k, seed, "cpu"))
    indices, values = kernels.top(x, k)
    their_indices, their_values = on_device.top(tensor, k)
    assert same(indices, their_indices)
    assert same(values, their_values)


def test_invalid_arguments_are_rejected() -> None:
    tensor = some(100)[1]
    codes, ranges = on_device.quantize(tensor, 3, 32, 1)
    for damaged in (
        (codes[:-1], ranges),
        (codes.to(torch.int8), ranges),
        (codes, ranges[:-1]),
        (codes, ranges * torch.nan),
        (codes, ranges.flip(1)),
    ):
        with pytest.raises(ValueError, match="expected"):
            on_device.dequantize(*damaged, 100, 3, 32)
    for wrong in (tensor.double(), tensor.view(10, 10), tensor[::2]):
        with pytest.raises(ValueError, match="float32 vector"):
            on_device.quantize(wrong, 3, 32, 1)
    tensor[50] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        on_device.quantize(tensor, 3, 32, 1)
    with pytest.raises(ValueError, match="finite"):
        on_device.top(tensor, 3)
    with pytest.raises(ValueError, match="coefficients"):
        on_device.restore(tensor, 100, 64, KashinFrame(1))
    with pytest.raises(ValueError, match="float32 vector"):
        on_device.accumulate(torch.zeros(200)[::2], codes, ranges, 3, 32, 1.0)
