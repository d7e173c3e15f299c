"""The aggregator's core reports a state that contradicts itself."""

import pytest

from fedmq.broker.link.events import Delivery
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.checkpoint import OutstandingTask
from fedmq.nodes.aggregator.evaluations import ClientEvaluation
from fedmq.nodes.aggregator.progress import Failing
from fedmq.nodes.messages.actions import Commit
from tests.algorithms.fleet import Fleet, make_setup

NOTE = Message(kind="result", id="x/1", run="run", sender="x", to="aggregator")


def in_a_round():
    """Return the core in its second round, with one used, one held and two outstanding results."""
    fleet = Fleet(make_setup({"name": "rounds", "fraction": 1.0}, clients=4))
    for _ in range(4):
        fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    fleet.hear(*fleet.work(*fleet.tasks.pop(1)))
    core = fleet.core
    assert (core.version, core._results.current.num_results) == (1, 1)
    assert (len(core._results.current.held), len(core._tasks.in_flight)) == (1, 2)
    return core


def held(core):
    """Return the only held result, and the id of its task."""
    ((name, result),) = core._results.current.held.items()
    return name, result


def outstanding(core):
    """Return the id of the first outstanding task, and the task."""
    return next(iter(core._tasks.in_flight.items()))


def commit_other(core):
    core._committing = Commit("commit/9", NOTE, int)


def commit_with_held_results(core):
    core._committing = Commit("commit/2", NOTE, int)


def forget_end(core):
    core._finishing = "3 versions"


def forget_deferred(core):
    core._deferred.add(Delivery(1, 1.0, NOTE))


def end_without_reason(core):
    core._ended = True


def end_with_deferred(core):
    core._ended, core._finishing = True, "3 versions"
    core._deferred.add(Delivery(1, 1.0, NOTE))


def lose_counts(core):
    core._results.counts.used = 0


def count_below_zero(core):
    core._results.counts.stale = -1


def stay_at_a_version(core):
    core._progress.version = 0


def use_without_staleness(core):
    core._results.current.num_results += 1


def use_as_late(core):
    core._results.current.late += 1


def use_from_the_future(core):
    core._results.current.staleness[0] = -1


def send_twice(core):
    core._results.current.order.append(core._results.current.order[0])


def settle_a_held_result(core):
    core._results.current._held_positions.clear()


def hold_for_a_stranger(core):
    core._results.current.contributed.clear()


def draw_a_busy_client(core):
    name, task = outstanding(core)
    core._tasks.in_flight[name + "0"] = task


def draw_a_client_again(core):
    _, task = outstanding(core)
    task.client = held(core)[1].client


def make_a_task_of_the_next_version(core):
    outstanding(core)[1].version = 2


def send_without_order(core):
    name, _ = outstanding(core)
    core._results.current.order.remove(name)
    del core._results.current._positions[name]


def answer_and_keep(core):
    core._tasks.in_flight[held(core)[0]] = OutstandingTask(9, 1, "w9")


def miscount(core):
    core._tasks.num_in_flight += 1


def return_a_lost_task(core):
    core._tasks._returned.add("aggregator/99")


def defer_twice(core):
    core._deferred.unsettled = (1,)
    core._deferred.add(Delivery(1, 1.0, NOTE))
    core._deferred.awaited.add(1)


def await_anything(core):
    core._deferred.awaited.add(1)


def defer_the_future(core):
    core._deferred.add(Delivery(99, 1.0, NOTE))


def evaluate_unasked(core):
    core._evaluations.client_evaluations["x"] = ClientEvaluation(0, 1)


def evaluate_the_future(core):
    core._evaluations.ask("x", ClientEvaluation(0, 9))


def keep_scores(core):
    core._evaluations.scores[0] = [0.5]


def drop_more_than_failed(core):
    core._progress.failures.dropped = 1


def wait_without_failure(core):
    core._progress.failures.clients[0] = Failing()


def host_a_stranger(core):
    core._fleet.hosts.assign(9, 9, "w0")


FAULTS = {
    commit_other: "commit/9 is under way in version 1",
    commit_with_held_results: "without its held results",
    forget_end: "the run waits for nothing, but has not ended: 3 versions",
    forget_deferred: r"results \(1,\) are deferred, but no commit is under way",
    end_without_reason: "the run ends without a reason",
    end_with_deferred: r"results \(1,\) are deferred after the end",
    lose_counts: "0 results are used, 1 of them in one version",
    count_below_zero: "a count is negative",
    stay_at_a_version: "back-offs count from version 0, not 1",
    use_without_staleness: "2 results are used, 1 have a staleness",
    use_as_late: "1 results count as late",
    use_from_the_future: "version 1 cannot have results of staleness",
    send_twice: "a task is in the cohort twice",
    settle_a_held_result: "results are held of tasks that are settled or unknown",
    hold_for_a_stranger: "have a held result and have not contributed",
    draw_a_busy_client: "has 2 tasks in flight",
    draw_a_client_again: "has a task in flight, and a result in this round",
    make_a_task_of_the_next_version: "is of version 2, after the current one",
    send_without_order: "was made from version 1; the cohort of version 1 lacks it",
    answer_and_keep: "is in flight, but its result was received",
    miscount: "3 tasks are counted, 2 are in flight",
    return_a_lost_task: "clients came back to tasks that are not in flight",
    defer_twice: r"results \[1\] are received and awaited",
    await_anything: r"results \[1\] are awaited, but no checkpoint leaves them out",
    defer_the_future: r"results \[99\] are deferred, but come after message 10",
    evaluate_unasked: r"evaluations \['x'\] are with clients, but were not requested",
    evaluate_the_future: r"versions \[9\] are evaluated before they exist",
    keep_scores: r"versions \[0\] wait for scores, but every client has answered",
    drop_more_than_failed: "1 of 0 failures in a row are drop-outs",
    wait_without_failure: "0 has 0 back-offs after 0 failures",
    host_a_stranger: r"clients \[\(9, 9\)\] have a host, but the run has 4 clients",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_contradiction_is_reported_with_what_is_wrong(plant):
    core = in_a_round()
    core.validate_state()
    plant(core)
    with pytest.raises(AssertionError, match=FAULTS[plant]):
        core.validate_state()


def test_a_version_that_is_ready_must_be_committed():
    fleet = Fleet(make_setup({"name": "buffered", "size": 2}, clients=4))
    fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    result, data = fleet.work(*fleet.tasks.pop(0))
    # Without the step that commits.
    fleet.core._results.take(Delivery(fleet.seq, 1.0, result, dict(enumerate(data))), [])
    with pytest.raises(AssertionError, match="version 1 is ready, but not committed"):
        fleet.core.validate_state()


def test_a_core_checks_itself_after_each_event():
    """As all tests of nodes do, see ``tests/nodes/conftest.py``."""
    fleet = Fleet(make_setup({"name": "rounds", "fraction": 1.0}, clients=4))
    count_below_zero(fleet.core)
    with pytest.raises(AssertionError, match="a count is negative"):
        fleet.leave("w3")


def test_results_are_held_only_by_schedules_with_a_cohort_order():
    fleet = Fleet(make_setup({"name": "stream", "concurrency": 2}))
    fleet.core._results.current.contributed.add(0)
    with pytest.raises(AssertionError, match="the schedule has no cohort order"):
        fleet.core.validate_state()
