"""``--worker`` with clients that changed hosts: their states move along, or start empty."""

import pytest
import torch
from msgspec.structs import replace

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Message
from fedmq.nodes.history.tracker import TaskTracker
from fedmq.nodes.replay.histories import Histories, read_histories
from fedmq.nodes.replay.workers import Retraining
from fedmq.nodes.simulation.virtual_run import Chances, Simulation
from fedmq.nodes.worker.client_state import ClientStateStore
from tests.algorithms.personal.test_fedrep_runs import setup_of
from tests.nodes.replay import material

pytestmark = pytest.mark.slow

LEASE_S = 3.0
SETUP = setup_of("stream", versions=40, evaluate_every=20)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models so small are trained ten times as fast by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def host(simulation, name):
    return [each for each in simulation.nodes if each.hello.node == name][-1]


def shared(*nodes):
    """What is in a folder that these share."""
    store = ClientStateStore()
    for each in nodes:
        for client, state in each.store._memory.items():
            store.put(client, state)
    return store


def crash(node):
    """Kill a node; it is not restarted."""
    node.port.on_exit = lambda: None
    node.port.kill()


def record(folder, *, share, returns=False):
    """A run in which worker-0 dies and worker-1 takes its clients over, for good or not."""
    simulation = Simulation(SETUP, 2, folder, 5, Chances(train_s=0.3))
    after, start = simulation.network.after, simulation.start_worker
    last, half = SETUP.problem.clients - 1, SETUP.problem.clients // 2
    one, zero = host(simulation, "worker-1"), host(simulation, "worker-0")

    def is_taken_over():
        crash(one)
        both = start("worker-1", ((0, last),), shared(zero, one) if share else one.store)
        if returns:
            after(5.0, lambda: gives_back(both))

    def gives_back(both):
        crash(both)
        start("worker-1", ((half, last),), both.store)
        store = shared(zero, both) if share else zero.store
        after(LEASE_S, lambda: start("worker-0", ((0, half - 1),), store))

    after(4.0, lambda: crash(zero))
    after(4.0 + 2 * LEASE_S, is_taken_over)
    assert simulation.run(0.0, 400.0)
    simulation.close()
    return folder


@pytest.fixture(scope="module", params=["shared", "alone", "shared, back", "alone, back"])
def moved(request, tmp_path_factory):
    share, returns = "shared" in request.param, "back" in request.param
    return record(tmp_path_factory.mktemp("moved"), share=share, returns=returns), share


def results_of(folder, node):
    """A node's results of the clients that worker-0 has at first."""
    half = SETUP.problem.clients // 2
    found = material.messages(folder, kind="result", sender=node)
    return [each for _, each in found if each.body["client"] < half]


def test_every_result_is_as_recorded_whatever_host_a_client_had(moved):
    folder, share = moved
    firsts = {each.re for each in results_of(folder, "worker-0")}
    taken_over = results_of(folder, "worker-1")
    assert firsts
    assert taken_over
    assert bool({each.body["after"] for each in taken_over} & firsts) is share
    trace = Trace(folder)
    for node in ("worker-0", "worker-1"):
        answers = list(Retraining(trace, SETUP, node).train_all())
        assert len(answers) == len(material.messages(folder, kind="result", sender=node)) + len(
            material.messages(folder, kind="score", sender=node)
        )
        assert [each.message.re for each in answers if not each.matches] == []


def test_one_task_needs_only_what_its_clients_state_follows_from(moved):
    folder, _ = moved
    trace = Trace(folder)
    last = results_of(folder, "worker-1")[-1]
    assert Retraining(trace, SETUP, "worker-1").train_one(last.re).matches
    histories = read_histories(trace)
    [at] = [index for index in histories.of("worker-1") if histories.answers[index].task == last.re]
    behind = [histories.answers[index] for index in histories.with_predecessors([at])]
    assert {each.client for each in behind} == {last.body["client"]}


def test_a_task_from_another_state_than_recorded_differs(tmp_path):
    """The new host did not have the state; the record says that it did."""
    folder = record(tmp_path / "run", share=False)
    firsts = {each.body["client"]: each.re for each in results_of(folder, "worker-0")}
    seq, lie = next(
        (seq, each)
        for seq, each in material.messages(folder, kind="result", sender="worker-1")
        if each.body["after"] == "" and each.body["client"] in firsts
    )
    change = material.edit(body={"after": firsts[lie.body["client"]]})
    (tmp_path / "lie").mkdir()
    trace = Trace(material.rewrite(folder, tmp_path / "lie", {seq: change}))
    assert not Retraining(trace, SETUP, "worker-1").train_one(lie.re).matches
    assert Retraining(Trace(folder), SETUP, "worker-1").train_one(lie.re).matches


def without_after(entry):
    """An entry as an older release wrote it."""
    if not isinstance(entry, Accepted) or "after" not in entry.read().body:
        return entry
    message = entry.read()
    body = {key: value for key, value in message.body.items() if key != "after"}
    return replace(entry, message=encode_message(replace(message, body=body)))


def test_in_an_older_trace_a_clients_results_follow_each_other(tmp_path):
    folder = record(tmp_path / "run", share=True, returns=True)
    changes = {entry.seq: without_after for entry in Trace(folder).entries()}
    (tmp_path / "old").mkdir()
    trace = Trace(material.rewrite(folder, tmp_path / "old", changes))
    for node in ("worker-0", "worker-1"):
        assert all(each.matches for each in Retraining(trace, SETUP, node).train_all())


def heard(*messages):
    """Histories of these: (kind, id or task, client or sender, after)."""
    found, tracker = Histories(), TaskTracker()
    for seq, (kind, name, who, after) in enumerate(messages):
        about = {"kind": kind, "run": "r"}
        if kind == "task":
            message = Message(**about, id=name, sender="aggregator", to=f"client/{who}")
        else:
            body = {} if after is None else {"after": after}
            message = Message(**about, id=f"{who}/{name}", sender=who, to="x", re=name, body=body)
        accepted = Accepted(seq=seq, at=0.0, message=encode_message(message))
        found.add(tracker.feed(accepted))
    return found


def chain(histories, index):
    return [
        (each.node, each.task)
        for each in map(histories.answers.__getitem__, histories.with_predecessors([index]))
    ]


TASKS = [("task", f"t{k}", 0, None) for k in range(4)]


def test_a_node_continues_from_its_own_state_and_a_new_host_from_the_last_ones():
    found = heard(
        *TASKS,
        ("result", "t0", "a", ""),
        ("result", "t0", "b", ""),  # both had it: the one was cut off
        ("result", "t1", "b", "t0"),
        ("result", "t2", "a", "t0"),
        ("result", "t3", "c", "t1"),
    )
    assert chain(found, 3) == [("a", "t0"), ("a", "t2")]
    assert chain(found, 4) == [("b", "t0"), ("b", "t1"), ("c", "t3")]


def test_a_state_whose_result_never_came_is_made_again():
    found = heard(*TASKS, ("result", "t0", "a", ""), ("result", "t2", "a", "t1"))
    assert chain(found, found.of("a")[-1]) == [("a", "t0"), ("a", "t1"), ("a", "t2")]
    assert [found.answers[index].task for index in found.of("a")] == ["t0", "t2"]


def test_a_task_counts_only_from_the_aggregator():
    found, tracker = Histories(), TaskTracker()
    task = Message(kind="task", id="t0", run="r", sender="a", to="client/0", body={"client": 0})
    answer = Message(kind="result", id="a/0", run="r", sender="a", to="x", re="t0")
    for seq, message in enumerate((task, answer)):
        entry = Accepted(seq=seq, at=0.0, message=encode_message(message))
        found.add(tracker.feed(entry))
    assert found.answers == []


def test_what_cannot_be_is_taken_for_no_state():
    other = ("task", "u", 1, None)
    found = heard(*TASKS, other, ("result", "u", "a", ""), ("result", "t0", "a", "u"))
    assert chain(found, 1) == [("a", "t0")]
    assert chain(heard(*TASKS, ("result", "t0", "a", "nothing")), 0) == [("a", "t0")]
