"""What a node sends as metrics, and what an aggregator takes for some."""

import math

import pytest

from fedmq.algorithms.problems.guards import guard
from fedmq.algorithms.values import ReturnedError
from fedmq.nodes.messages.metrics import (
    accuracy_of,
    metrics_fault,
    received_metric,
    sendable,
)
from fedmq.nodes.worker.training import check_ranges


def metric_range(name):
    return (0.0, 1.0) if name == "accuracy" else (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("metrics", "code", "reason"),
    [
        ({"accuracy": 2.0}, "out-of-range", "expected 'accuracy' from 0 to 1, got 2"),
        ({"accuracy": -0.1}, "out-of-range", "expected 'accuracy' from 0 to 1, got -0.1"),
        ({"accuracy": 0.5, "loss": math.inf}, "not-finite", "expected a finite number for 'loss'"),
        ({"accuracy": math.nan}, "not-finite", "expected a finite number for 'accuracy', got nan"),
        ({"accuracy": True}, "malformed", "expected a number by name"),
        ({"accuracy": "1"}, "malformed", "expected a number for 'accuracy', got '1'"),
        ({1: 0.5}, "malformed", "expected a number by name"),
        ({"accuracy": [0.5]}, "malformed", "expected a number by name"),
        (None, "malformed", "expected metrics as a map"),
        ([0.5], "malformed", "expected metrics as a map"),
    ],
)
def test_metrics_that_are_impossible_have_a_fault(metrics, code, reason):
    fault = metrics_fault(metrics, metric_range)
    assert fault.code == code
    assert fault.reason.startswith(reason)


@pytest.mark.parametrize(
    "metrics",
    [{}, {"accuracy": 0.0, "loss": 1e300}, {"accuracy": 1.0000001}, {"accuracy": 1, "loss": "nan"}],
)
def test_metrics_that_are_possible_have_none(metrics):
    assert metrics_fault(metrics, metric_range) is None


def test_a_metric_without_a_finite_value_is_sent_as_text_and_read_as_a_number():
    metrics = {"accuracy": 0.5, "loss": math.nan, "ratio": math.inf, "gap": -math.inf}
    sent = sendable(metrics)
    assert sent == {"accuracy": 0.5, "loss": "nan", "ratio": "inf", "gap": "-inf"}
    assert metrics_fault(sent, metric_range) is None
    received = {name: received_metric(each) for name, each in sent.items()}
    assert math.isnan(received.pop("loss"))
    assert received == {"accuracy": 0.5, "ratio": math.inf, "gap": -math.inf}
    assert received_metric("1") is received_metric(None) is received_metric([]) is None


@pytest.mark.parametrize("value", [math.nan, "nan", "inf", "-inf"])
def test_an_accuracy_without_a_finite_value_keeps_a_mean_from_any_target(value):
    assert math.isnan(accuracy_of({"accuracy": value}))
    assert accuracy_of({"accuracy": 1}) == 1.0
    assert accuracy_of({"loss": 0.5}) is None


class Percent:
    """What `check_ranges` reads of a problem."""

    def metric_range(self, name):
        return metric_range(name)


def test_a_node_refuses_to_send_a_metric_outside_of_its_range():
    check_ranges({"accuracy": 1.0, "loss": 8.4}, Percent())
    check_ranges({"accuracy": math.nan, "loss": math.inf}, Percent())
    expected = r"Percent.metrics: expected 'accuracy' from 0 to 1, got 8.4; define metric_range"
    with pytest.raises(ReturnedError, match=expected):
        check_ranges({"accuracy": 8.4}, Percent())


def test_a_metric_without_a_range_is_a_fault_and_ends_no_run():
    fault = metrics_fault({"loss": 0.5}, {"accuracy": (0, 1)}.__getitem__)
    assert fault.code == "malformed"
    assert fault.reason == "metric_range has no range for 'loss': KeyError: 'loss'"


@pytest.mark.parametrize("found", [None, 1.0, (1.0, 0.0), (0.0, math.nan), (0.0,), ("0", "1")])
def test_a_range_is_two_numbers_in_order(found):
    class Other(Percent):
        def metric_range(self, name):
            return found

    guard(Other, object)
    with pytest.raises(ReturnedError, match=r"Other.metric_range: expected the smallest"):
        Other().metric_range("loss")
