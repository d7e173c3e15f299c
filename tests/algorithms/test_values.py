"""What is taken for a number, and what is refused, of what a user's code returns."""

import decimal
import enum
import fractions
import math

import numpy as np
import pytest
import torch

from fedmq.algorithms.base import Payload, TrainResult
from fedmq.algorithms.toolkit.returned import payload_of, result_of
from fedmq.algorithms.values import (
    MAX_METRICS_BYTES,
    ReturnedError,
    metrics_of,
    plain_number,
    plain_settings,
)

WHO = "Regression.metrics"


class Level(enum.IntEnum):
    TOP = 3


NUMBERS = [
    (0.5, 0.5),
    (3, 3),
    (True, 1),
    (np.bool_(1), 1),
    (np.float16(0.5), 0.5),
    (np.float32(0.5), 0.5),
    (np.float64(0.5), 0.5),
    (np.longdouble(0.5), 0.5),
    (np.int64(7), 7),
    (np.uint8(7), 7),
    (np.array(0.5), 0.5),
    (np.array([7]), 7),
    (torch.tensor(0.5), 0.5),
    (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    (torch.tensor(0.5, dtype=torch.float64), 0.5),
    (torch.tensor([0.5], requires_grad=True), 0.5),
    (torch.tensor(7), 7),
    (torch.tensor(1).bool(), 1),
    (fractions.Fraction(1, 2), 0.5),
    (decimal.Decimal("0.5"), 0.5),
    (Level.TOP, 3),
]


@pytest.mark.parametrize(("value", "number"), NUMBERS, ids=lambda each: repr(each)[:30])
def test_what_is_a_number_is_taken_for_one(value, number):
    found = plain_number(value)
    assert found == number
    assert type(found) is type(number) or isinstance(number, bool)
    assert type(found) in (int, float)
    assert metrics_of({"mae": value}, WHO) == {"mae": float(number)}


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), torch.tensor(math.inf)])
def test_a_metric_may_be_no_finite_number(value):
    (found,) = metrics_of({"loss": value}, WHO).values()
    assert type(found) is float
    assert not math.isfinite(found)


NO_NUMBERS = [
    (None, "None"),
    ("0.5", "type 'str'"),
    (b"0.5", "type 'bytes'"),
    (1 + 0j, "type 'complex'"),
    (np.complex64(1), "type 'complex64'"),
    (np.datetime64("2020"), "type 'datetime64'"),
    (np.str_("1"), "type 'str_'"),
    (torch.tensor(1 + 0j), "a Tensor of complex64 []"),
    (torch.zeros(2), "a Tensor of float32 [2]"),
    (torch.zeros(0), "a Tensor of float32 [0]"),
    (torch.empty((), device="meta"), "a Tensor of float32 []"),
    (np.zeros(2), "a ndarray of float64 [2]"),
    ([0.5], "type 'list'"),
    ({}, "type 'dict'"),
    (object(), "type 'object'"),
    (10**400, "1000"),
]


@pytest.mark.parametrize(
    ("value", "said"), NO_NUMBERS, ids=lambda each: repr(each)[:30].partition(" at 0x")[0]
)
def test_what_is_no_number_is_named_with_the_method(value, said):
    with pytest.raises(ReturnedError) as caught:
        metrics_of({"loss": 0.5, "mae": value}, WHO)
    assert str(caught.value).startswith("Regression.metrics: expected a number for 'mae', got ")
    assert said in str(caught.value)


def test_the_elements_of_a_tensor_are_not_said():
    with pytest.raises(ReturnedError) as caught:
        metrics_of({"mae": torch.full((3,), 0.123456)}, WHO)
    assert "0.12" not in str(caught.value)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "expected a map from names to numbers, got None"),
        (torch.zeros(()), "expected a map from names to numbers, got a Tensor"),
        ([("loss", 1.0)], "got a value of type 'list'"),
        ({1: 0.5}, "expected the name of a metric as text, got 1"),
        ({None: 0.5}, "expected the name of a metric as text, got None"),
        ({"lone \udc80": 0.5}, "expected the name of a metric in UTF-8, got 'lone \\udc80'"),
        ({"": 0.5}, "expected 1 to 200 characters in the name of a metric, got 0"),
        ({"m" * 201: 0.5}, "expected 1 to 200 characters in the name of a metric, got 201"),
        ({f"metric {n}": 0.5 for n in range(5000)}, f"expected at most {MAX_METRICS_BYTES} bytes"),
    ],
)
def test_metrics_that_are_no_map_of_names_to_numbers_are_refused(found, said):
    with pytest.raises(ReturnedError) as caught:
        metrics_of(found, WHO)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_thousand_metrics_are_not_too_many():
    assert len(metrics_of({f"class_{n}": 0.5 for n in range(1000)}, WHO)) == 1000


def test_names_become_plain_text():
    (name,) = metrics_of({np.str_("loss"): 0.5}, WHO)
    assert type(name) is str


def test_numbers_of_a_payload_become_pythons_own():
    numbers = {"n": np.int64(7), "loss": torch.tensor(0.5), "reply": np.str_("update"), "ok": True}
    found = payload_of(Payload({"w": torch.zeros(2)}, numbers=numbers), "Mine.train")
    assert found.numbers == {"n": 7, "loss": 0.5, "reply": "update", "ok": True}
    assert [type(each) for each in found.numbers.values()] == [int, float, str, bool]


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (None, "expected a Payload, got None"),
        ({"w": torch.zeros(2)}, "expected a Payload, got a value of type 'dict'"),
        (Payload([torch.zeros(2)]), "expected weights as a map from names to tensors"),
        (Payload({"w": np.zeros(2)}), "expected a tensor for 'w' of weights, got a ndarray"),
        (Payload(exact={"w": 3}), "expected a tensor for 'w' of exact, got 3"),
        (Payload({0: torch.zeros(2)}), "expected the names of weights as text in UTF-8, got 0"),
        (Payload({"\udc80": torch.zeros(2)}), "expected the names of weights as text in UTF-8"),
        (Payload(numbers={"n": "\udc80"}), "expected a number or text for 'n', got a value"),
        (Payload(numbers={"n": None}), "expected a number or text for 'n', got None"),
        (Payload(numbers={"n": [1, 2]}), "expected a number or text for 'n', got a value"),
        (Payload(numbers={"n": 1 << 64}), "expected a number or text for 'n', got 18446744"),
        (Payload(numbers={1: 2}), "expected the names of numbers as text in UTF-8, got 1"),
        (Payload(numbers=3), "expected numbers as a map from names to values, got 3"),
        (
            Payload(numbers={f"number {n}": n for n in range(5000)}),
            "expected at most 16384 bytes of numbers",
        ),
    ],
)
def test_a_payload_that_cannot_be_sent_is_named_with_the_method(payload, said):
    with pytest.raises(ReturnedError) as caught:
        payload_of(payload, "Mine.train")
    assert str(caught.value).startswith("Mine.train: ")
    assert said in str(caught.value)


def test_the_number_of_examples_is_sent_first_among_the_numbers():
    payload = Payload({"w": torch.zeros(2)}, numbers={"loss": np.float32(2.0)})
    sent, local = result_of(TrainResult(payload, np.int32(3)), "Mine.train")
    assert list(sent.numbers.items()) == [("n", 3), ("loss", 2.0)]
    assert local is None
    assert result_of(TrainResult(payload, 1, payload), "Mine.train")[1].numbers == {"loss": 2.0}
    masked = result_of(TrainResult(payload, torch.ones(3).sum()), "Mine.train")[0]
    assert [type(each) for each in masked.numbers.values()] == [int, float]


RESULT = Payload({"w": torch.zeros(2)})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (RESULT, r"expected TrainResult\(payload, num_examples, local_state\), got a value"),
        (None, r"local_state\), got None"),
        ((RESULT, None), r"got a value of type 'tuple' \(the form of version 0\.1\)$"),
        ([RESULT, None], r"got a value of type 'list' \(the form of version 0\.1\)$"),
        (TrainResult(RESULT, "3"), "expected num_examples as a number, got a value of type 'str'"),
        (TrainResult(RESULT, float("nan")), "expected num_examples as a number, got nan"),
        (TrainResult(Payload(numbers={"n": 3}), 3), "num_examples is sent as 'n'"),
        (TrainResult(3, 3), "expected a Payload, got 3"),
        (TrainResult(RESULT, 3, 3), "expected a Payload, got 3"),
    ],
)
def test_what_train_returns_is_checked(found, message):
    with pytest.raises(ReturnedError, match=rf"^Mine\.train: .*{message}"):
        result_of(found, "Mine.train")


def test_settings_of_numpy_become_pythons_own():
    given = {"lr": np.float64(0.1), "sizes": (np.int64(3), 4), "name": "x", "none": None, "b": True}
    found = plain_settings(given)
    assert found == {"lr": 0.1, "sizes": (3, 4), "name": "x", "none": None, "b": True}
    assert [type(each) for each in (found["lr"], *found["sizes"], found["b"])] == [
        float,
        int,
        int,
        bool,
    ]
