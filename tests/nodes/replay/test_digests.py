"""`digest_of`: equal values have equal digests; different values have different ones."""

import itertools
import math
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
import torch

from fedmq.nodes.aggregator.checkpoint import Counts
from fedmq.nodes.run.digests import digest_of, model_digest

DIFFERENT = [
    None,
    0,
    1,
    -1,
    True,
    False,
    0.0,
    -0.0,
    1.0,
    math.nan,
    math.inf,
    0.1 + 0.2,
    0.3,
    "",
    "1",
    "1.0",
    "None",
    "nan",
    b"",
    b"1",
    10**30,
    [],
    {},
    [[]],
    [{}],
    [None],
    [1],
    [1, 2],
    [2, 1],
    [12],
    [[1], [2]],
    [[1, 2]],
    [[1], 2],
    [1, [2]],
    ["1", 2],
    ["1, 2"],
    {"a": 1},
    {"a": 1.0},
    {"b": 1},
    {"a": {"b": 1}},
    {"a": "b", "c": 1},
    {1: 2},
    {"1": 2},
    ["a", 1],
    list(range(11)),
    ["x" * 12],
    ["x" * 102],
    torch.zeros(4),
    torch.zeros(2, 2),
    torch.zeros(4, 1),
    torch.zeros(2, dtype=torch.float64),
    torch.zeros(4, dtype=torch.int32),
    torch.zeros(8, dtype=torch.bfloat16),
    torch.zeros(8, dtype=torch.float16),
    torch.zeros(16, dtype=torch.uint8),
    torch.zeros(16, dtype=torch.bool),
    torch.zeros(()),
    torch.zeros(1),
    torch.zeros(0),
    torch.zeros(0, 2),
    torch.zeros(2, 0),
    torch.zeros(0, dtype=torch.float64),
    -torch.zeros(4),
    torch.full((4,), math.nan),
    [torch.zeros(4)],
    [torch.zeros(2), torch.zeros(2)],
    {"w": torch.zeros(4)},
    {"v": torch.zeros(4)},
    np.zeros(4),
    np.zeros(4, np.float32),
    np.zeros((2, 2), np.float32),
    np.zeros(0, np.float32),
]


def test_no_two_different_values_have_one_digest():
    digests = [digest_of(each) for each in DIFFERENT]
    for (a, one), (b, other) in itertools.combinations(zip(DIFFERENT, digests, strict=True), 2):
        assert one != other, (a, b)


def test_a_digest_is_the_same_each_time():
    for each in DIFFERENT:
        assert digest_of(each) == digest_of(each)
        assert len(digest_of(each)) == 32


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.arange(6).reshape(2, 3).t(), torch.tensor([[0, 3], [1, 4], [2, 5]])),
        (torch.arange(8)[::2], torch.tensor([0, 2, 4, 6])),
        (torch.zeros(3).requires_grad_(), torch.zeros(3)),
        (torch.nn.Parameter(torch.ones(2)), torch.ones(2)),
        (torch.zeros(1).expand(5), torch.zeros(5)),
        (np.arange(6).reshape(2, 3).T, np.array([[0, 3], [1, 4], [2, 5]])),
        (np.arange(8)[::2], np.array([0, 2, 4, 6])),
        (float("nan"), math.nan),
        ({3, 1, 2}, {2, 3, 1}),
    ],
    ids=str,
)
def test_equal_values_have_one_digest(one, other):
    assert digest_of(one) == digest_of(other)


@dataclass
class Pair:
    left: object
    right: object


class Record(msgspec.Struct):
    left: object
    right: object


@pytest.mark.parametrize("kind", [Pair, Record])
def test_records_differ_by_each_field(kind):
    values = [kind(1, 2), kind(2, 1), kind(1, 2.0), kind([1], 2), kind(torch.ones(2), 2)]
    assert len({digest_of(each) for each in values}) == len(values)
    assert digest_of(kind(1, 2)) == digest_of(kind(1, 2))


def test_counts_differ_by_each_field():
    counts = [Counts(), Counts(used=1), Counts(stale=1), Counts(refused=1), Counts(dropped=1)]
    assert len({digest_of(each) for each in counts}) == len(counts)


def test_one_bit_of_a_tensor_is_another_digest():
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
        a = torch.ones(1000, dtype=dtype)
        b = a.clone()
        b.view(torch.uint8)[777] ^= 1
        assert digest_of(a) != digest_of(b)


def test_a_model_differs_by_name_order_shape_and_dtype():
    a = torch.zeros(4)
    models = [
        {"x": a},
        {"y": a},
        {"x": a, "y": a},
        {"y": a, "x": a},
        {"x": a.reshape(2, 2)},
        {"x": torch.zeros(2, dtype=torch.float64)},
        {"x": torch.zeros(8, dtype=torch.bfloat16)},
        {},
    ]
    assert len({model_digest(each) for each in models}) == len(models)


@pytest.mark.parametrize(
    "value",
    [object(), Pair(1, object()), [len], 1j, np.float32(1)],
    ids=lambda each: type(each).__name__,
)
def test_what_has_no_known_bytes_is_refused(value):
    with pytest.raises(TypeError, match="cannot digest"):
        digest_of(value)
