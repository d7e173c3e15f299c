"""Tests of the nodes check the state of their cores after each event."""

import pytest

from fedmq.broker.virtual.validation import validated
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.worker.core import Worker


@pytest.fixture(autouse=True)
def validated_cores(monkeypatch):
    """Check the state of each aggregator and worker after each event."""
    for core in (Aggregator, Worker):
        monkeypatch.setattr(core, "__init__", _validating(core.__init__))


def _validating(init):
    def validating(self, *args, **more):
        init(self, *args, **more)
        validated(self)

    return validating
