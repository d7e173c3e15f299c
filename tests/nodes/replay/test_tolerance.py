"""Distances between two computations: rounding must not hide other differences."""

import math

import pytest
import torch

from fedmq.algorithms.base import Payload
from fedmq.nodes.replay.tolerance import TOLERANCE, far_fields, number_distance, tensor_distance


def of(**tensors):
    return {name: torch.as_tensor(value) for name, value in tensors.items()}


def distance(a, b):
    return tensor_distance(Payload(weights=a), Payload(weights=b))


def test_it_is_relative_to_the_record():
    assert distance(of(w=[3.0, 4.0]), of(w=[3.0, 4.5])) == pytest.approx(0.1)
    assert distance(of(w=[3.0, 4.0]), of(w=[3.0, 4.0])) == 0


def test_a_small_tensor_does_not_hide_behind_a_large_one():
    """A bias that is other by a fifth, beside a matrix a hundred times as long."""
    large = torch.full((100, 100), 0.1)
    one, other = of(w=large, b=[0.06, 0.08]), of(w=large, b=[0.072, 0.096])
    assert distance(one, other) == pytest.approx(0.02, rel=1e-3)


def test_what_is_nothing_but_rounding_may_be_other_rounding():
    """A bias before a BatchNorm, beside weights of some size."""
    one, other = of(w=[6.0], b=[4e-4]), of(w=[6.0], b=[5e-4])
    assert distance(one, other) < TOLERANCE


@pytest.mark.parametrize("group", ["features", "logits"])
def test_a_model_does_not_hide_behind_what_travels_beside_it(group):
    """Nor tensors of the same name in two groups behind one another."""
    beside = {group: of(w=torch.full((1000,), 1000.0))}
    one, other = Payload(weights=of(w=[1.0]), **beside), Payload(weights=of(w=[1.5]), **beside)
    assert tensor_distance(one, other) == pytest.approx(0.5)


def test_a_model_is_compared_by_name_in_whatever_group_it_travels():
    whole = Payload(weights=of(w=[1.0, 2.0], mean=[3.0]))
    apart = Payload(weights=of(w=[1.0, 2.0]), exact=of(mean=[3.0]))
    assert tensor_distance(whole, apart) == tensor_distance(apart, whole) == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1.0, 2.0], [1.0, math.nan]),
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, math.inf]),
        ([1.0, math.inf], [1.0, -math.inf]),
        ([1.0, 2.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0], [[1.0, 2.0]]),
        ([1, 2], [1, 3]),
        ([1.0, 2.0], [1, 2]),
        ([1.0, 2.0], torch.tensor([1.0, 2.0], dtype=torch.float64)),
    ],
    ids=str,
)
def test_what_cannot_be_rounding_is_infinitely_far(one, other):
    # Another tensor that is near must not make a NaN of the largest distance be overlooked.
    assert distance(of(a=[1.0], w=one, z=[1.0]), of(a=[1.0], w=other, z=[1.0])) == math.inf


def test_nan_and_infinity_lie_where_they_were_recorded():
    values = [math.nan, math.inf, -math.inf, 1.0]
    assert distance(of(w=values), of(w=values)) == 0


def test_another_name_is_another_tensor():
    assert distance(of(w=[1.0]), of(v=[1.0])) == math.inf
    assert distance(of(w=[1.0]), of()) == math.inf


@pytest.mark.parametrize(
    ("one", "other"),
    [(2000, 2001), (True, 1), (1, True), (2, 2.0), (None, 0), ("a", "b"), (1.0, math.nan)],
)
def test_counts_and_all_else_are_equal_or_not(one, other):
    assert number_distance(one, other) == math.inf
    assert number_distance(one, one) == number_distance(other, other) == 0


def test_floats_lie_apart_relatively():
    assert number_distance(2.0, 2.001) == pytest.approx(5e-4)
    assert number_distance(math.inf, 1.0) == math.inf


def test_each_field_that_is_far_is_named():
    recorded = {"body": {"n": 5000, "x": [1.0, 2.0]}, "fold": {"at": 1.0}}
    replayed = {"body": {"n": 5001, "x": [1.0, 2.1], "client": 3}, "fold": {"at": 1.0, "new": 2}}
    assert [str(each) for each in far_fields(recorded, replayed)] == [
        "body.n: 5000 in the record, 5001 in the replay",
        "body.x[1]: 2.0 in the record, 2.1 in the replay",
        "body.client: absent in the record, 3 in the replay",
    ]


def test_digests_of_models_are_no_distance_but_one_must_be_there():
    recorded, replayed = {"body": {"model_digest": "a"}}, {"body": {"model_digest": "b"}}
    assert not list(far_fields(recorded, replayed))
    assert list(far_fields({"body": {}}, replayed))
