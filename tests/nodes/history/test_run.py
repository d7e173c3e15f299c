"""The read model: where tasks are, at each entry and at the end; several runs in one ledger."""

from pathlib import Path

import pytest

from fedmq.broker.ledger.entries import Accepted, Consumed, Opened
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.virtual.network import Faults
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Message
from fedmq.nodes.cluster.view import line
from fedmq.nodes.history.outcomes import ResultOutcome
from fedmq.nodes.history.run import RunHistory, runs_of
from fedmq.nodes.history.tracker import TaskTracker
from fedmq.nodes.run_folder.strict_json import to_strict_json
from fedmq.nodes.run_folder.summary import summary_of
from fedmq.nodes.run_folder.summary_file import write_summary
from fedmq.nodes.simulation.virtual_run import Chances, Simulation
from tests.nodes.history.test_outcomes import CONFIG, Story
from tests.nodes.trace import story as written
from tests.sim.history import setup_of

TRACES = Path(__file__).parents[2] / "golden/traces"


@pytest.fixture
def story():
    found = Story()
    found.entry(Opened, run="r", config=CONFIG, total_clients=2)
    found.begin()
    return found


def joined(story, node="w0", client=0):
    story.feed("joined", "broker", node=node, role="worker", clients=[[client, client]])


def left(story, node="w0", client=0):
    """As the broker writes it: with all that the node's joining says."""
    body = {"node": node, "role": "worker", "clients": [[client, client]], "reason": "lease"}
    story.feed("left", "broker", **body)


def test_a_node_that_has_left_hosts_nothing(story):
    tracker = story.history.tracker
    assert tracker.placement.host_of("client/0") == "w0"
    left(story)
    assert tracker.placement.host_of("client/0") is None
    assert story.history.nodes["w0"].sessions == 1
    assert story.history.missing_clients == [(0, 0)]
    story.task(0, 0)
    assert tracker.unanswered["a/0"].host is None


def test_clients_that_are_away_are_waited_for(story):
    def report(sender="w1", **body):
        story.feed("availability", sender, **body)

    joined(story, "w1", 1)
    story.entry(Opened, run="r", config="", total_clients=3)
    assert story.history.missing_clients == [(2, 2)]
    report(back=[], away=[[1, 1]])
    assert story.history.missing_clients == [(1, 2)]
    assert story.history.tracker.placement.host_of("client/1") == "w1"
    report(back=[[1, 1]], away=[])
    report("w0", back=[], away=[[1, 1]])  # not its own
    report(back=[], away=[[1]])
    assert story.history.missing_clients == [(2, 2)]
    report(back=[], away=[[1, 1]])
    left(story, "w1", 1)
    joined(story, "w1", 1)
    assert story.history.missing_clients == [(2, 2)]


def test_clients_of_a_node_that_reports_availability_are_away_until_it_does(story):
    joined(story, "w1", 0)
    story.entry(Opened, run="r", config="", total_clients=3)
    body = {"node": "w2", "role": "worker", "session": "s", "clients": [[1, 2]]}
    story.feed("joined", "broker", **body, reports_availability=True)
    assert story.history.tracker.placement.unreachable(3) == [(1, 2)]
    story.feed("availability", "w2", back=[[2, 2]], away=[])
    assert story.history.tracker.placement.unreachable(3) == [(1, 1)]


def test_a_node_that_joins_again_still_has_its_tasks(story):
    """The broker delivers them again."""
    story.task(0, 0)
    story.task(1, 1)
    left(story)
    assert {node: [each.to for each in tasks] for node, tasks in story.history.at_work.items()} == {
        "w1": ["client/1"]
    }
    joined(story)
    assert story.history.working_clients == [0, 1]
    story.result(0, 0)
    assert story.history.working_clients == [1]


def test_a_dead_lettered_task_keeps_no_node_at_work(story):
    seq = story.task(0, 0)
    story.refuse(seq, "dead-letter", node="broker", dead_lettered=True, id="a/0")
    assert story.history.at_work == {}
    assert story.history.outcomes.failed == {"dead-letter": 1}
    story.task(0, 0)
    assert story.history.working_clients == [0]
    assert story.history.outcomes.failed.total() == 0


def test_a_withdrawn_task_is_scanned_no_more_but_its_late_answer_is_known(story):
    tracker = story.history.tracker
    for number in range(3):
        story.refuse(story.task(number, 0), "unusable", node="w0", id=f"a/{number}")
    assert tracker.unanswered == {}
    story.task(3, 1)
    story.feed("finished", "aggregator", to="checkpoint", reason="enough")
    story.feed("continued", "broker", config=CONFIG, further=True, stopped_s=1.0)
    joined(story, "w1", 1)
    assert tracker.unanswered == story.history.at_work == {}
    assert list(tracker.withdrawn) == ["a/0", "a/1", "a/2", "a/3"]
    re = Message(kind="result", id="late", run="r", sender="w1", to="aggregator", re="a/3")
    facts = tracker.feed(Accepted(seq=story.seq + 1, at=200.0, message=encode_message(re)))
    assert facts.is_answer
    assert facts.client == 1
    assert "a/3" not in tracker.withdrawn


def test_an_evaluation_that_is_delivered_again_has_not_failed(story):
    about = {"to": "evaluator", "model_version": 0}
    seq = story.feed("evaluate", "aggregator", "a/0", **about)
    story.refuse(seq, "dead-letter", node="broker", dead_lettered=True, id="a/0")
    assert story.history.outcomes.failed_evaluations == 1
    story.feed("evaluate", "aggregator", "a/0", **about)
    assert story.history.outcomes.failed_evaluations == 0


def test_each_result_has_an_outcome_and_each_used_one_its_staleness(story):
    for number, version in enumerate((0, 0, 0, 1)):
        story.task(number, 0, version)
    used = story.result(0, 0, model_version=0)
    story.version(1, used, 1)
    late, refused = (story.result(number, 0, model_version=0) for number in (1, 2))
    story.refuse(refused, "stale")
    story.version(2, refused, 1)
    open_ = story.result(3, 0, model_version=1)
    outcomes = story.history.outcomes
    assert [outcomes.outcome_of(seq) for seq in (used, late, refused, open_, open_ - 1)] == [
        ResultOutcome.USED,
        ResultOutcome.USED,
        ResultOutcome.REJECTED,
        ResultOutcome.OPEN,
        None,
    ]
    assert [outcomes.staleness_of(seq) for seq in (used, late, refused, open_)] == [
        0,
        1,
        None,
        None,
    ]
    assert outcomes.staleness == {0: 1, 1: 1}
    story.refuse(late, "not-finite")  # it was deferred while version 2 was committed
    assert outcomes.staleness == {0: 1}
    assert outcomes.clients[0].good == 1


def test_a_result_from_before_an_extension_takes_nothing_from_its_client(story):
    story.task(0, 0)
    old = story.result(0, 0, model_version=0)
    story.feed("finished", "aggregator", to="checkpoint", reason="enough")
    story.end()
    story.feed("continued", "broker", config=CONFIG, further=True, stopped_s=1.0)
    story.refuse(old, "unknown-task")
    joined(story)
    story.task(1, 0)
    story.version(1, story.result(1, 0, model_version=0), 1)
    assert story.history.outcomes.clients[0].good == 1
    assert story.history.outcomes.without_result == {}


def test_the_accuracy_of_some_clients_is_shown_as_such(story):
    for client in (0, 1):
        body = {"to": f"client/{client}", "client": client, "model_version": 0}
        story.feed("evaluate", "aggregator", f"a/{client}", **body)
    story.feed("score", "w0", re="a/0", metrics={"accuracy": 0.5})
    assert "accuracy 50.00% (1 of 2 clients)" in line(story.history)
    story.version(1, story.seq, 0)
    assert "accuracy 50.00% (v0, 1 of 2 clients)" in line(story.history)
    story.feed("score", "w1", re="a/1", metrics={"accuracy": 0.7})
    assert "accuracy 60.00% (v0)  used" in line(story.history)


def test_the_model_and_its_first_layer_yield_the_same_facts(tmp_path):
    written.write(tmp_path)
    entries = list(read_entries(tmp_path))
    history, tracker = RunHistory(), TaskTracker()
    for entry in entries:
        one, other = history.feed(entry), tracker.feed(entry)
        assert (one.host, one.task, one.client) == (other.host, other.task, other.client)
    assert history.nodes == tracker.placement.nodes


def test_the_runs_of_a_ledger_are_folded_apart(tmp_path):
    ledger = tmp_path / "ledger"
    written.write(ledger, "one")
    alone = to_strict_json(summary_of(runs_of(read_entries(ledger))["one"]))
    written.write(ledger, "two")
    runs = runs_of(read_entries(ledger))
    assert list(runs) == ["one", "two"]
    assert to_strict_json(summary_of(runs["one"])) == alone
    assert runs["two"].outcomes.results == runs["one"].outcomes.results == 3
    assert write_summary(tmp_path)["run"] == "two"


def test_what_consumes_a_message_of_several_runs_belongs_to_none_of_them(tmp_path):
    runs = runs_of(
        [
            Opened(seq=0, at=1.0, run="one", config="", total_clients=1),
            Consumed(seq=1, at=2.0, node="aggregator", of=(0,)),
            Opened(seq=2, at=3.0, run="two", config="", total_clients=1),
            Consumed(seq=3, at=4.0, node="aggregator", of=(0,)),
        ]
    )
    assert [each.now for each in runs.values()] == [2.0, 3.0]


@pytest.mark.parametrize(("schedule", "seed"), [(0, 1), (1, 1), (2, 1), (3, 1)])
def test_results_that_come_during_a_commit_are_for_the_next_version(tmp_path, schedule, seed):
    """The staleness of each version is what its aggregator recorded."""
    setup = setup_of(schedule, 1.0, "BesideTally")
    chances = Chances(Faults(loss=0.1, duplicate=0.1), crash=0.1, doom=0.1, cut=0.2)
    settings = BrokerSettings(lease_s=3.0, beat_s=0.5, deliveries=1000)
    simulation = Simulation(setup, 2, tmp_path, seed, chances, settings)
    assert simulation.run(40.0, 400.0)
    simulation.broker.ledger.close()
    check_staleness(tmp_path)


def check_staleness(ledger):
    history, before = RunHistory(), 0
    for entry in read_entries(ledger):
        facts = history.feed(entry)
        if facts.message is not None and facts.message.kind == "version":
            body, staleness = facts.message.body, history.outcomes.staleness
            total = sum(value * number for value, number in staleness.items())
            assert total - before == pytest.approx(body["mean_staleness"] * body["results"])
            before = total
    assert history.outcomes.staleness.total() == history.outcomes.used


def test_an_end_without_the_aggregators_record_is_a_failure(story):
    summary = story.end()
    assert summary["status"] == "failed"
    assert summary["ended"] == (
        "enough; failed: the ledger lacks the aggregator's record of this end"
    )
    story.feed("continued", "broker", config=CONFIG, further=True, stopped_s=1.0)
    assert (story.history.status, story.history.failed) == ("interrupted", False)


def test_a_failed_run_that_is_resumed_before_the_broker_has_recorded_its_end_stays_failed(story):
    story.feed("finished", "aggregator", to="checkpoint", reason="no answer", failed=True)
    story.feed("continued", "broker", config=CONFIG, further=False, stopped_s=1.0)
    assert story.end()["status"] == "failed"


@pytest.mark.parametrize("trace", sorted(TRACES.glob("*/*/")), ids=lambda each: each.name)
def test_recorded_runs_keep_their_status(trace):
    (history,) = runs_of(read_entries(trace / "ledger")).values()
    assert (history.status, history.failed) == ("finished", False)
