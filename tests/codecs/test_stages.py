"""Properties of the stages in the papers: bias, error by bits and basis, structure."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmq.codecs import kernels
from fedmq.codecs.pipeline import _seed
from fedmq.codecs.registry import decode, make_codec
from fedmq.codecs.stages.entropy import Entropy
from fedmq.codecs.stages.quantizers import Quantize
from fedmq.codecs.stages.sparsifiers import TopK


def there_and_back(spec, x, seed=0):
    return decode(make_codec(spec).encode({"x": x}, seed))["x"]


def nmse(spec, x, repeats=1):
    errors = [(there_and_back(spec, x, seed) - x).square().sum() for seed in range(repeats)]
    return float(sum(errors) / repeats / x.square().sum())


def heavy_tailed(n, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_t(3, n).astype(np.float32))


@pytest.fixture(scope="module")
def trained():
    """Weights of a small network after some steps, as one vector: most small, few large."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(512, 160) * torch.logspace(0.5, -1.5, 160)
        y = (x[:, :8] @ torch.randn(8, 10)).argmax(dim=1)
        model = nn.Sequential(nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 10))
        weights = list(model.parameters())
        velocities = [torch.zeros_like(each) for each in weights]
        for _ in range(40):
            loss = nn.functional.cross_entropy(model(x), y)
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for each, velocity, gradient in zip(weights, velocities, gradients, strict=True):
                    each -= 0.2 * velocity.mul_(0.9).add_(gradient)
    return torch.cat([each.detach().reshape(-1) for each in model.parameters()])


# ---- no bias


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        "quantize(1)",
        "quantize(3, 50)",
        "hadamard(64) | quantize(2, 64)",
        "hadamard(64) | quantize(2)",
        "kashin(64) | quantize(2, 64)",
        "subsample(0.3)",
        "subsample(0.3) | quantize(3, 20)",
        "hadamard(64) | subsample(0.5) | quantize(4)",
        "kashin(128) | subsample(0.7) | quantize(2, 32) | entropy",
    ],
)
def test_the_mean_over_seeds_is_the_vector(spec):
    """600 seeds, 200 values: each mean, and all means together, within the standard error."""
    x, seeds = heavy_tailed(200), 600
    codec = make_codec(f"limit(0) | {spec}")
    found = torch.stack([decode(codec.encode({"x": x}, s))["x"] for s in range(seeds)]).double()
    error = found.mean(dim=0) - x
    standard = found.std(dim=0) / math.sqrt(seeds)
    z = error / standard.clamp_min(float(standard.mean()) / 5)  # a value next to a level is rare
    assert z.abs().max() < 5.5
    assert z.square().mean() < 1.5


def test_topk_is_biased_and_needs_error_feedback():
    x = heavy_tailed(200)
    found = torch.stack([there_and_back("limit(0) | topk(0.1)", x, s) for s in range(5)])
    assert (found == found[0]).all()
    assert (found[0] - x).abs().max() > 0.1


# ---- errors


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["identity", "hadamard", "kashin"])
def test_the_error_falls_with_each_bit(trained, basis):
    errors = [nmse(f"limit(0) | {basis} | quantize({bits})", trained, 2) for bits in range(1, 9)]
    for more, less in itertools.pairwise(errors):
        assert less < more / 2
    assert errors[7] < 1e-3


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_kashin_errs_less_than_hadamard_and_that_less_than_none(trained, bits):
    """Caldas et al. 2018, section 3: for the same bits of a coefficient, K < HD < I."""
    none, rotated, spread = (
        nmse(f"limit(0) | {basis} | quantize({bits})", trained, 6)
        for basis in ("identity", "hadamard", "kashin")
    )
    assert spread < 0.95 * rotated
    assert rotated < 0.95 * none


def test_a_bound_on_each_value_of_quantization():
    x = heavy_tailed(1000)
    for bits in range(1, 9):
        found = there_and_back(f"limit(0) | quantize({bits}, 100)", x)
        for a, b in zip(x.split(100), found.split(100), strict=True):
            step = (a.max() - a.min()) / (2**bits - 1)
            assert (a - b).abs().max() <= step * 1.0001
            assert (b.min(), b.max()) == (a.min(), a.max())


@given(st.integers(1, 3000), st.sampled_from([2, 8, 64, 1024]), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=60)
def test_bases_alone_are_exact_to_rounding(n, block, seed):
    x = heavy_tailed(n, n)
    for spec in (f"hadamard({block})", f"kashin({block})", f"kashin({block}, 6, 0.9, 1)"):
        found = there_and_back(f"limit(0) | {spec}", x, seed)
        assert (found - x).norm() <= 1e-5 * x.norm()


@pytest.mark.parametrize("parameter", [1e-45, 1e-30, 1e-7])
def test_kashin_with_tiny_parameters_stays_exact_or_is_rejected(parameter):
    x = heavy_tailed(200)
    for spec in (f"kashin(64, 3, {parameter})", f"kashin(64, 3, 0.3, {parameter})"):
        found = there_and_back(f"limit(0) | {spec}", x)
        assert (found - x).norm() <= 1e-5 * x.norm()
        zeros = there_and_back(f"limit(0) | {spec}", torch.zeros(200))
        assert not zeros.any()


# ---- structured updates


STRUCTURES = ["lowrank(1)", "lowrank(3)", "lowrank(8)", "randommask(0.1)", "randommask(0.5)"]
SHAPES = [(12, 9), (30, 4, 3, 3), (7, 3), (3, 50), (2, 2), (1, 40), (25,), (), (4, 0), (0, 4)]


@pytest.mark.parametrize("spec", STRUCTURES)
@given(st.lists(st.sampled_from(SHAPES), max_size=5), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=40)
def test_projected_updates_are_sent_without_loss(spec, shapes, seed):
    generator = torch.Generator().manual_seed(seed % 1000)
    update = {f"t{i}": torch.randn(s, generator=generator) for i, s in enumerate(shapes)}
    codec = make_codec(f"limit(0) | {spec}")
    before = {name: each.clone() for name, each in update.items()}
    codec.project(update, seed)
    once = {name: each.clone() for name, each in update.items()}
    codec.project(update, seed)
    found = decode(codec.encode(once, seed))
    for name, each in once.items():
        size = before[name].norm() + 1e-6
        assert each.norm() <= size * 1.0001  # a projection
        assert (update[name] - each).norm() <= 1e-4 * size
        assert (found[name] - each).norm() <= 1e-4 * size


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("rank", "width"), [(2, 3), (7, 8), (8, 9), (24, 25)])
def test_frames_with_dependent_columns_work(seed, rank, width):
    """A quarter of all pairs of random columns of three signs are linearly dependent."""
    codec = make_codec(f"limit(0) | lowrank({rank})")
    update = {"w": torch.randn(30, width, generator=torch.Generator().manual_seed(seed))}
    size = update["w"].norm()
    codec.project(update, seed)
    found = decode(codec.encode(update, seed))["w"]
    assert (found - update["w"]).norm() <= 1e-4 * size
    assert found.norm() <= size * 1.0001


def test_lowrank_is_exact_on_matrices_of_its_form():
    seed, rank, generator = 17, 3, torch.Generator().manual_seed(1)
    tensors = {}
    for index, shape in enumerate([(20, 12), (9, 5, 2, 2)]):
        width = math.prod(shape[1:])
        signs = kernels.signs(width * rank, _seed(seed, 0) + index).reshape(width, rank)
        c = torch.randn(shape[0], rank, generator=generator)
        tensors[f"t{index}"] = (c @ torch.from_numpy(signs).T).reshape(shape)
    codec = make_codec(f"limit(0) | lowrank({rank})")
    encoded = codec.encode(tensors, seed)
    assert encoded.nbytes == 4 * rank * (20 + 9)
    for name, each in decode(encoded).items():
        assert (each - tensors[name]).norm() <= 1e-5 * tensors[name].norm()
    other = decode(codec.encode(tensors, seed + 1))["t0"]
    assert (other - tensors["t0"]).norm() > 0.1 * tensors["t0"].norm()


def test_the_matrices_of_a_message_have_different_frames():
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    found = decode(make_codec("limit(0) | lowrank(4)").encode({"a": w, "b": w.clone()}, 0))
    assert not torch.allclose(found["a"], found["b"], atol=1e-2)


def test_a_mask_keeps_its_fraction_of_values_unchanged():
    x = heavy_tailed(1000)
    found = there_and_back("limit(0) | randommask(0.1)", x)
    at = found.nonzero().flatten()
    assert len(at) == 100
    assert torch.equal(found[at], x[at])
    scaled = there_and_back("limit(0) | subsample(0.1)", x)
    at = scaled.nonzero().flatten()
    assert len(at) == 100
    assert torch.allclose(scaled[at], x[at] * 10)


@pytest.mark.parametrize("spec", STRUCTURES)
def test_small_tensors_are_not_restricted(spec):
    update = {"w": torch.randn(40, 30), "b": torch.randn(40)}
    bias = update["b"].clone()
    make_codec(spec).project(update, 1)
    assert torch.equal(update["b"], bias)
    assert update["w"].count_nonzero() < 1200 or spec.startswith("lowrank")


# ---- the largest


def test_topk_sends_the_largest():
    x = heavy_tailed(1000)
    found = there_and_back("limit(0) | topk(0.05)", x)
    at = x.abs().topk(50).indices
    assert found.count_nonzero() == 50
    assert torch.equal(found[at], x[at])


@pytest.mark.parametrize("spec", ["topk(0.05)", "hadamard(64) | topk(0.1) | quantize(8, 64)"])
def test_error_feedback_sends_every_value_eventually(spec):
    """The sum of the sent updates stays within a bound of the sum of the original ones."""
    codec = make_codec(f"limit(0) | {spec}")
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(400, generator=generator)
    left, sent, meant = (torch.zeros(400) for _ in range(3))
    residuals = []
    for step in range(300):
        update = drift + 0.5 * torch.randn(400, generator=generator)
        found = decode(codec.encode({"x": update + left}, step))["x"]
        left = update + left - found
        sent, meant = sent + found, meant + update
        residuals.append(float(left.norm()))
    assert (meant - sent - left).norm() < 1e-2 * meant.norm() / 300
    assert max(residuals[150:]) < 1.3 * max(residuals[:150])  # bounded
    assert (meant - sent).norm() < 0.1 * meant.norm()
    assert (decode(codec.encode({"x": drift}, 0))["x"] - drift).norm() > 0.3 * drift.norm()


@pytest.mark.parametrize(
    ("n", "keep", "count"), [(0, 0.5, 0), (1, 1e-9, 1), (10, 0.25, 2), (10, 1, 10), (3, 0.9, 3)]
)
def test_the_number_of_values_of_a_fraction(n, keep, count):
    assert TopK(keep).size(n, ()) == count


# ---- sizes


def test_a_message_has_the_bytes_that_its_bits_need():
    x = {"x": heavy_tailed(1 << 16).reshape(1 << 8, -1)}
    assert make_codec("quantize(4)").encode(x, 0).nbytes == (1 << 15) + 16 * 8
    assert make_codec("hadamard | quantize(1)").encode(x, 0).nbytes == (1 << 13) + 16 * 8
    assert make_codec("topk(0.01)").encode(x, 0).nbytes == 655 * 8
    assert make_codec("randommask(0.01)").encode(x, 0).nbytes == 655 * 4
    kashin = make_codec("kashin | quantize(2)").encode(x, 0).nbytes
    assert kashin <= 1.08 * (1 << 14) + 20 * 8


def test_the_largest_block_of_a_spec_encodes():
    assert Quantize(4, kernels.MAX_BLOCK).block == kernels.MAX_BLOCK
    x = heavy_tailed(100)
    there_and_back(f"limit(0) | quantize(4, {kernels.MAX_BLOCK})", x)


def test_entropy_compresses_only_if_that_saves_bytes():
    tensors = {"zeros": torch.zeros(5000), "noise": heavy_tailed(3000)[:3000], "n": torch.arange(3)}
    plain = make_codec("quantize(8)").encode(tensors, 0)
    small = make_codec("quantize(8) | entropy").encode(tensors, 0)
    assert small.nbytes < plain.nbytes
    assert len(small.meta["sizes"]) == len(small.buffers) == len(plain.buffers)
    for buffer, before, size in zip(small.buffers, plain.buffers, small.meta["sizes"], strict=True):
        if size == -1:
            assert bytes(buffer) == bytes(before)
        else:
            assert size == len(bytes(before)) > len(bytes(buffer))


@given(st.lists(st.binary(max_size=300), max_size=5), st.integers(1, 19))
@settings(deadline=None, max_examples=40)
def test_entropy_returns_any_bytes(buffers, level):
    entropy = Entropy(level)
    packed, sizes = entropy.compress([*buffers, bytes(500)])
    assert sizes[-1] == 500
    assert list(entropy.decompress(packed, sizes, 2000)) == [*buffers, bytes(500)]
