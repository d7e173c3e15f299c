"""The metrics of a score: as a node sends them, and as the aggregator checks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from fedmq.broker.rejections import Code, Rejection
from fedmq.codecs.text import shorten
from fedmq.nodes.process.exception_text import described

UNDEFINED = ("nan", "inf", "-inf")
"""How a node writes a metric that has no finite value, such as the loss of a diverged model."""
_ROUNDING = 1e-6
"""By how much the mean of many values may exceed their range."""


def sendable(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Return metrics as a score has them: those without a finite value as text."""
    return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}


def received_metric(value: object) -> float | None:
    """Return a metric from a score as a number; None if it is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return float(value) if isinstance(value, str) and value in UNDEFINED else None


def accuracy_of(metrics: Mapping[object, object]) -> float | None:
    """Return the accuracy in valid metrics of a score; NaN if it has no finite value.

    A mean with a NaN is NaN, so it reaches no target, whatever the other clients have.
    """
    accuracy = received_metric(metrics.get("accuracy"))
    return math.nan if accuracy is not None and not math.isfinite(accuracy) else accuracy


def received_metrics(metrics: Mapping[object, object]) -> dict[str, float]:
    """Return those metrics of a score that are numbers, by name."""
    numbers = {str(name): received_metric(value) for name, value in metrics.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def within(value: float, low: float, high: float) -> bool:
    """Return whether a metric is in its range, up to the rounding of a mean."""
    return low - _ROUNDING <= value <= high + _ROUNDING


def metrics_fault(
    metrics: object, metric_range: Callable[[str], tuple[float, float]]
) -> Rejection | None:
    """Return why the metrics of a score cannot be used; None if they can.

    Each is a finite number in its range, or one of `UNDEFINED`.

    Args:
        metrics: from the body of the score.
        metric_range: `Problem.metric_range`.
    """
    if not isinstance(metrics, dict):
        return Rejection(Code.MALFORMED, "expected metrics as a map of numbers")
    for name, value in metrics.items():
        if not isinstance(name, str) or type(value) not in (int, float, str):
            text = f"expected a number by name in metrics, got {shorten(name)}: {shorten(value)}"
            return Rejection(Code.MALFORMED, text)
        if isinstance(value, str):
            if value in UNDEFINED:
                continue
            text = f"expected a number for {shorten(name)}, got {shorten(value)}"
            return Rejection(Code.MALFORMED, text)
        if not math.isfinite(value):
            text = f"expected a finite number for {shorten(name)}, got {value}"
            return Rejection(Code.NOT_FINITE, text)
        try:
            low, high = metric_range(name)
        except Exception as error:  # noqa: BLE001 - user code, for any name that a node sends
            text = f"metric_range has no range for {shorten(name)}: {described(error)}"
            return Rejection(Code.MALFORMED, text)
        if not within(value, low, high):
            text = f"expected {shorten(name)} from {low:g} to {high:g}, got {value:g}"
            return Rejection(Code.OUT_OF_RANGE, text)
    return None
