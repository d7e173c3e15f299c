"""Pipelines as codecs: names, shapes and dtypes are restored from the message alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs import registry
from fedmq.codecs.errors import CodecError, SpecError
from fedmq.codecs.formats.flat import as_flat
from fedmq.codecs.pipeline import LIMIT, STAGES, Limit, Pipeline, _seed
from fedmq.codecs.registry import codecs, decode, make_codec
from fedmq.codecs.spec import parse
from fedmq.codecs.stages.base import Context, StageOrder
from fedmq.codecs.stages.quantizers import Quantize
from fedmq.codecs.stages.transforms import Hadamard, Kashin
from tests.codecs.decoding import received

SINGLE = [
    "identity",
    "hadamard(16)",
    "kashin(64)",
    "subsample(0.3)",
    "topk(0.2)",
    "cast(float16)",
    "cast(bfloat16)",
    "quantize(3, 10)",
    "lowrank(2)",
    "randommask(0.4)",
    "entropy(1)",
]
SEVERAL = [
    "hadamard(16) | quantize(4, 16)",
    "hadamard(16) | quantize(4)",
    "identity | quantize(8, 7)",
    "kashin(64) | quantize(2, 64)",
    "kashin(64, iterations=6, eta=0.5, delta=0.8) | subsample(0.5) | quantize(2, 32) | entropy",
    "topk(0.1) | quantize(5, 16) | entropy(3)",
    "topk(0.1) | cast(float16)",
    "hadamard(64) | topk(0.3)",
    "lowrank(3) | hadamard(16) | quantize(6, 16)",
    "lowrank(2) | kashin(16) | subsample(0.9) | cast(bfloat16) | entropy(19)",
    "randommask(0.25) | hadamard(32) | quantize(4, 32) | entropy",
    "randommask(0.5) | topk(0.5) | quantize(1, 8)",
    "hadamard(2) | subsample(1) | quantize(1, 1)",
]
SPECS = SINGLE + SEVERAL
EXACT = ("identity", "entropy(1)")

OTHERS = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple) | st.integers(0, 200).map(
    lambda n: (n,)
)
tables = st.lists(
    st.tuples(shapes, st.just(torch.float32) | st.sampled_from([torch.float32, *OTHERS])),
    max_size=6,
)


def tensors_of(table, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{i}": (torch.randn(shape, generator=generator) * scale).to(dtype)
        for i, (shape, dtype) in enumerate(table)
    }


def through_the_wire(encoded):
    """Decode a copy of the message with an empty cache of codecs."""
    registry._codec_of.cache_clear()
    return decode(received(encoded))


def written(encoded):
    return [bytes(each) for each in encoded.buffers]


def check(tensors, decoded, limit):
    """Check everything but the values of the large tensors."""
    assert list(decoded) == list(tensors)
    for name, tensor in tensors.items():
        found = decoded[name]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        if tensor.dtype != torch.float32 or tensor.numel() < max(1, limit):
            assert torch.equal(found, tensor)
        elif tensor.numel():
            assert torch.isfinite(found).all()


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@given(tables, st.sampled_from([0, 1, 5, 24, 1000]), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=12)
def test_names_order_shapes_and_dtypes_come_back(spec, table, limit, seed):
    tensors = tensors_of(table)
    encoded = make_codec(f"limit({limit}) | {spec}").encode(tensors, seed)
    decoded = through_the_wire(encoded)
    check(tensors, decoded, limit)
    if spec in EXACT:
        assert all(torch.equal(decoded[name], each) for name, each in tensors.items())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 1, 2), (63,), (65, 64), (4097,)])
def test_odd_sizes_come_back(spec, sizes):
    tensors = tensors_of([((n,), torch.float32) for n in sizes])
    check(tensors, through_the_wire(make_codec(f"limit(0) | {spec}").encode(tensors, 3)), 0)


@pytest.mark.parametrize("spec", [each for each in SPECS if not each.startswith("cast")])
def test_by_default_matrices_of_a_thousand_values_are_large(spec):
    """Vectors are not: BatchNorm's variances must not become negative."""
    shapes = [(LIMIT // 10, 10), (1, LIMIT - 1), (5 * LIMIT,)]
    tensors = tensors_of([(shape, torch.float32) for shape in shapes])
    encoded = make_codec(spec).encode(tensors, 3)
    assert encoded.meta["large"] == [0]
    found = through_the_wire(encoded)
    assert torch.equal(found["t2"], tensors["t2"])
    del tensors["t2"], found["t2"]
    check(tensors, found, LIMIT)


def test_the_limit_itself_is_large():
    tensors = tensors_of([((5,), torch.float32), ((4,), torch.float32), ((2, 3), torch.float32)])
    encoded = make_codec("limit(5) | quantize(1)").encode(tensors, 0)
    assert encoded.meta["large"] == [0, 2]
    assert make_codec("limit(6) | quantize(1)").encode(tensors, 0).meta["large"] == [2]
    assert make_codec("limit(7) | quantize(1)").encode(tensors, 0).meta["large"] == []


@pytest.mark.parametrize("spec", SPECS)
def test_empty_groups_and_groups_without_large_tensors_decode(spec):
    codec = make_codec(f"limit(0) | {spec}")
    assert through_the_wire(codec.encode({}, 1)) == {}
    tensors = {"n": torch.tensor([1, 2]), "e": torch.empty(0, 3), "h": torch.ones(2).half()}
    check(tensors, through_the_wire(codec.encode(tensors, 1)), 0)


@pytest.mark.parametrize("spec", ["hadamard | quantize(4)", "kashin | quantize(2) | entropy"])
def test_a_huge_tensor_decodes_like_a_small_one(spec):
    tensors = tensors_of([((1 << 11, 1 << 10), torch.float32), ((10,), torch.float32)])
    encoded = make_codec(spec).encode(tensors, 1)
    check(tensors, through_the_wire(encoded), LIMIT)
    assert encoded.nbytes < tensors["t0"].nbytes / 7


@pytest.mark.parametrize("spec", SPECS)
def test_large_tensors_of_a_decoded_message_are_one_vector(spec):
    table = [((3, 4), torch.float32), ((1,), torch.float32), ((2, 7), torch.float32)]
    tensors = tensors_of([*table, ((5,), torch.int64), ((4, 4), torch.float32)])
    decoded = through_the_wire(make_codec(f"limit(10) | {spec}").encode(tensors, 1))
    large = [decoded[name] for name in ("t0", "t2", "t4")]
    flat = as_flat(large)
    assert flat.numel() == 12 + 14 + 16
    assert flat.data_ptr() == large[0].data_ptr()
    flat.add_(1.0)  # it is writable


@pytest.mark.parametrize("spec", SPECS)
def test_views_strides_and_gradients_do_not_change_the_bytes(spec):
    codec = make_codec(f"limit(0) | {spec}")
    base = torch.randn(6, 8)
    odd = {"a": base.t(), "b": base[1:, ::2], "c": base.clone().requires_grad_()}
    plain = {name: each.detach().clone().contiguous() for name, each in odd.items()}
    assert written(codec.encode(odd, 5)) == written(codec.encode(plain, 5))


@pytest.mark.parametrize("spec", SPECS)
def test_encoding_does_not_change_the_tensors(spec):
    tensors = tensors_of([((9, 9), torch.float32), ((3,), torch.float32)])
    before = {name: each.clone() for name, each in tensors.items()}
    make_codec(f"limit(0) | {spec}").encode(tensors, 5)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


# ---- seeds

RANDOM = [
    each for each in SPECS if each not in EXACT and not each.startswith(("topk(0.2)", "cast"))
]
RANDOM.remove("topk(0.1) | cast(float16)")


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_seed_writes_the_same_bytes(spec):
    tensors = tensors_of([((20, 30), torch.float32)])
    one, other = (make_codec(f"limit(0) | {spec}").encode(tensors, 2**64 - 1) for _ in range(2))
    assert written(one) == written(other)
    assert one.meta == other.meta


@pytest.mark.parametrize("spec", RANDOM)
def test_another_seed_writes_other_bytes(spec):
    tensors = tensors_of([((20, 30), torch.float32)])
    codec = make_codec(f"limit(0) | {spec}")
    assert len({b"".join(written(codec.encode(tensors, seed))) for seed in range(8)}) == 8


# ---- a basis and a quantization in one pass


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("basis", [Hadamard(32), Kashin(64), Kashin(32, 6, 0.5, 0.8)])
@pytest.mark.parametrize("n", [1, 31, 32, 60, 64, 1000, 4099])
def test_fusing_changes_neither_bytes_nor_values(basis, bits, n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    number = Quantize(bits, basis.block)
    fused = Pipeline([Limit(0), basis, number])
    assert fused._own_passes == []
    apart = type("Apart", (Pipeline,), {"_own_passes": property(lambda self: self._values)})(
        fused.stages
    )
    one, other = fused.encode({"x": x}, 9), apart.encode({"x": x}, 9)
    assert written(one) == written(other)
    assert torch.equal(fused.decode(one, 1 << 30)["x"], apart.decode(one, 1 << 30)["x"])


def test_a_pipeline_writes_the_same_as_its_stages_in_sequence():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    encoded = make_codec("limit(0) | hadamard(64) | quantize(4, 64)").encode({"x": x}, 9)
    shape = ((1000,),)
    rotated, sides = Hadamard(64).encode(x.numpy(), Context(_seed(9, 0), shape, 1000))
    assert sides == []
    buffers = Quantize(4, 64).encode(rotated, Context(_seed(9, 1), shape, len(rotated)))
    assert [bytes(each) for each in buffers] == written(encoded)


def test_different_blocks_take_two_passes():
    pipeline = make_codec("hadamard(64) | quantize(4)")
    assert pipeline._own_passes == pipeline._values
    assert make_codec("hadamard | quantize(4)")._own_passes == []


# ---- specs and wire names


@pytest.mark.parametrize("spec", [*SPECS, "hadamard", "kashin", "subsample(1)", "topk(1e-07)"])
def test_a_wire_name_is_a_spec_with_versions(spec):
    spec = f"limit(10) | {spec}"
    codec = make_codec(spec)
    bare = " | ".join(part.replace("@1", "", 1) for part in codec.wire_name.split(" | "))
    assert make_codec(bare).wire_name == codec.wire_name
    assert make_codec(" | ".join(map(str, parse(spec)))).wire_name == codec.wire_name


def test_a_wire_name_holds_every_parameter():
    assert make_codec("kashin(eta=0.25) | quantize(bits=3) | entropy").wire_name == (
        "kashin@1(4096, 3, 0.25, 0.5) | quantize@1(3, 4096) | entropy@1(3)"
    )


@pytest.mark.parametrize("fields", ["deltas_only", "error_feedback", "structured"])
def test_properties_follow_from_the_stages(fields):
    wanted = {
        "deltas_only": {"lowrank(2)", "randommask(0.4)", "subsample(0.3)", "topk(0.2)"},
        "error_feedback": {"topk(0.2)"},
        "structured": {"lowrank(2)", "randommask(0.4)"},
    }[fields]
    assert {spec for spec in SINGLE if getattr(make_codec(spec), fields)} == wanted


ONE_OF_EACH = {
    StageOrder.SELECTION: "limit(0)",
    StageOrder.STRUCTURE: "lowrank(1)",
    StageOrder.BASIS: "hadamard(4)",
    StageOrder.SUBSET: "topk(0.5)",
    StageOrder.NUMBER: "quantize(2)",
    StageOrder.ENTROPY: "entropy",
}


@pytest.mark.parametrize("first", StageOrder)
@pytest.mark.parametrize("second", StageOrder)
def test_a_wrong_order_is_a_one_line_error_with_the_right_one(first, second):
    spec = f"{ONE_OF_EACH[first]} | {ONE_OF_EACH[second]}"
    if first < second:
        assert isinstance(make_codec(spec), Pipeline)
        return
    with pytest.raises(SpecError) as caught:
        make_codec(spec)
    text = str(caught.value)
    assert "expected stages in this order, one of each: selection (limit), structure" in text
    assert "\n" not in text
    assert f"{spec.split('(')[0]}" in text


@pytest.mark.parametrize(
    "spec", ["hadamard | kashin", "lowrank(1) | randommask(1)", "subsample(1) | topk(1)"]
)
def test_two_stages_at_one_position_are_rejected(spec):
    with pytest.raises(SpecError, match="one of each"):
        make_codec(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hadamrd | quantize(4)", "unknown codec 'hadamrd' (did you mean 'hadamard'?); choose"),
        ("quantise(4)", "unknown codec 'quantise' (did you mean 'quantize'?)"),
        ("raw | quantize(4)", "codec raw cannot be a stage"),
        ("hadamard |", "expected name(value, key=value), got ''"),
        ("limit(-1) | entropy", "codec limit: expected a number of values, got -1"),
        ("limit(1.5) | entropy", "codec limit: expected a number of values, got 1.5"),
        ("limit(True) | entropy", "codec limit: expected a number of values, got True"),
        ("limit", "expected limit(values)"),
        ("hadamard(0)", "codec hadamard: block must be a power of two from 2 to 65536, got 0"),
        ("hadamard(1)", "power of two from 2 to 65536, got 1"),
        ("hadamard(48)", "power of two from 2 to 65536, got 48"),
        ("hadamard(131072)", "power of two from 2 to 65536, got 131072"),
        ("hadamard(4.0)", "power of two from 2 to 65536, got 4.0"),
        ("hadamard(size=4)", "expected hadamard(block)"),
        ("kashin(3)", "codec kashin: block must be a power of two"),
        ("kashin(64, 0)", "codec kashin: iterations must be from 1 to 100, got 0"),
        ("kashin(64, 101)", "iterations must be from 1 to 100, got 101"),
        ("kashin(64, 3, 0)", "codec kashin: eta must be above 0 and at most 1, got 0"),
        ("kashin(64, 3, 1.5)", "eta must be above 0 and at most 1, got 1.5"),
        ("kashin(delta=-1)", "codec kashin: delta must be above 0 and at most 1, got -1"),
        ("subsample(0)", "codec subsample: keep must be above 0 and at most 1, got 0"),
        ("subsample(1.01)", "keep must be above 0 and at most 1, got 1.01"),
        ("subsample(half)", "keep must be above 0 and at most 1, got 'half'"),
        ("subsample(1e999)", "keep must be above 0 and at most 1, got inf"),
        ("topk(True)", "codec topk: keep must be above 0 and at most 1, got True"),
        ("topk", "expected topk(keep)"),
        ("randommask(-0.5)", "codec randommask: keep must be above 0"),
        ("lowrank(0)", "codec lowrank: rank must be a number from 1 to 65536, got 0"),
        ("lowrank(65537)", "from 1 to 65536, got 65537"),
        ("lowrank(2.0)", "from 1 to 65536, got 2.0"),
        ("quantize(0)", "codec quantize: bits must be from 1 to 8, got 0"),
        ("quantize(9)", "bits must be from 1 to 8, got 9"),
        ("quantize(True)", "bits must be from 1 to 8, got True"),
        ("quantize(4, 0)", "codec quantize: block must be from 1 to 1048576, got 0"),
        ("quantize(4, 1048577)", "block must be from 1 to 1048576, got 1048577"),
        ("quantize", "expected quantize(bits, block)"),
        ("topk(1) | cast(int8)", "codec cast: dtype must be float16 or bfloat16, got 'int8'"),
        ("topk(1) | cast(4)", "codec cast: dtype must be float16 or bfloat16, got 4"),
        ("entropy(0)", "codec entropy: level must be from 1 to 19, got 0"),
        ("entropy(20)", "level must be from 1 to 19, got 20"),
        ("identity(1)", "too many positional arguments"),
    ],
)
def test_an_invalid_spec_is_a_one_line_error(spec, message):
    with pytest.raises(SpecError) as caught:
        make_codec(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.lists(st.sampled_from(sorted({*STAGES, *codecs()})), max_size=5), st.text("(,)0.1 x"))
@settings(deadline=None)
def test_no_spec_raises_anything_but_a_spec_error(names, inside):
    for spec in (" | ".join(names), " | ".join(f"{name}({inside})" for name in names)):
        try:
            make_codec(spec)
        except SpecError:
            continue


# ---- values that cannot be written


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "spec",
    ["quantize(4)", "hadamard(8) | quantize(4, 8)", "kashin(8) | quantize(4, 8)", "topk(0.5)"],
)
def test_codecs_that_mix_values_reject_nan_and_infinities(spec, value):
    with pytest.raises(CodecError, match="expected finite values"):
        make_codec(f"limit(0) | {spec}").encode({"x": torch.tensor([1.0, value, 2.0])}, 0)


@pytest.mark.parametrize("spec", SPECS)
def test_complex_tensors_are_rejected(spec):
    with pytest.raises(CodecError, match="complex64"):
        make_codec(spec).encode({"x": torch.ones(2, dtype=torch.complex64)}, 0)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 3.0, -1e30])
def test_constant_vectors_come_back_finite(spec, value):
    x = torch.full((7, 19), value)
    found = through_the_wire(make_codec(f"limit(0) | {spec}").encode({"x": x}, 0))["x"]
    if abs(value) < 1 or not spec.startswith(("cast", "topk(0.1) | cast")):
        assert torch.isfinite(found).all()
    if value == 0:
        assert not found.any()
