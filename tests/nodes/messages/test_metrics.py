"""What a node sends as metrics, and what an aggregator takes for some."""

import math

import pytest

from fedmq.nodes.messages.metrics import metrics_fault, received_metric, sendable


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
