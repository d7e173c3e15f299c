"""Traces of every release are replayed by every later one, to the same bytes."""

import json

import pytest

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted, Ended
from fedmq.nodes.replay.fold import recorded_setup
from fedmq.nodes.replay.workers import Retraining
from fedmq.nodes.run.devices import kind_of
from tests.golden.make_traces import TRACES, outcome
from tests.own_code import OWN_CODE

FOLDERS = sorted(path.parent for path in TRACES.glob("*/*/ledger"))
EXPECTED = json.loads((TRACES / "expected.json").read_text())


def of(folder):
    return f"{folder.parent.name}/{folder.name}"


def test_every_trace_has_its_expected_end():
    assert sorted(map(of, FOLDERS)) == sorted(EXPECTED)
    assert FOLDERS


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=of)
def test_a_golden_trace_reads_and_replays_as_it_was_recorded(folder):
    trace = Trace(folder)
    assert isinstance(list(trace.entries())[-1], Ended)
    assert trace.damage is None
    assert trace.torn is None
    assert sum(trace.check_payload())
    assert outcome(folder) == EXPECTED[of(folder)]


@pytest.mark.parametrize("folder", FOLDERS, ids=of)
def test_a_golden_trace_holds_restarts(folder):
    joined = [
        entry.read().body["node"]
        for entry in Trace(folder).entries()
        if isinstance(entry, Accepted) and entry.read().kind == "joined"
    ]
    assert len(joined) > len(set(joined))


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=of)
def test_a_golden_workers_tasks_train_to_the_same_result(folder):
    """Another CPU, or another torch, may differ in the last bits: then it is said by how much."""
    trace = Trace(folder)
    again = Retraining(trace, recorded_setup(trace, allowed=OWN_CODE), "worker-0")
    found = list(again.train_all())
    assert found
    for each in found:
        assert each.matches, each.differences
        if each.message.body["device"] == kind_of("cpu"):
            assert not each.differences
