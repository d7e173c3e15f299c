"""The Worker core: one task at a time, each applied once across sessions and nodes."""

import pytest

from fedmq.algorithms.toolkit.returned import result_of
from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Message
from fedmq.nodes.messages.actions import Handled
from fedmq.nodes.worker.client_state import ClientStateStore
from fedmq.nodes.worker.core import Failed, Pause, SaveClientState, Saved, Train, Trained, Worker
from tests.algorithms.fleet import Fleet, changed, make_setup, posted

STREAM = {"name": "stream", "concurrency": 2}
COUNTING = {"name": "tests.algorithms.tiny:Counting"}


def counting(**more):
    return make_setup(STREAM, "Normed", algorithm=COUNTING, **more)


def tasks_of(setup):
    """Return the first task of each client, as its worker receives it."""
    fleet = Fleet(setup)
    return [
        Delivery(number, 0.0, message, dict(enumerate(data)))
        for number, (message, data) in enumerate(fleet.tasks, start=10)
    ]


def worker_of(setup, kept=None, k=0):
    return Worker(setup, "run", f"w{k}", [(k, k)], kept)


def trained(setup, train):
    """Carry out a `Train` action, as the worker's program does."""
    at = train.at(setup, "cpu")
    return Trained(*result_of(setup.algorithm.train(train.task, at), "train"), 0.5)


def again(delivery, seq, **fields):
    return Delivery(seq, 1.0, changed(delivery.message, **fields), delivery.inline)


def count(payload):
    return int(payload.exact["tasks"])


def test_a_clients_state_is_saved_before_its_result_is_posted():
    setup = counting()
    task, _ = tasks_of(setup)
    worker = worker_of(setup)
    (train,) = worker.handle(task)
    assert train.local is None
    (keep,) = worker.handle(trained(setup, train))
    assert isinstance(keep, SaveClientState)
    assert (keep.client, keep.kept.task, keep.kept.seq) == (0, task.message.id, task.seq)
    assert count(keep.kept.local) == 1
    (post,) = worker.handle(Saved(keep.kept))
    assert (keep.kept.message, keep.kept.data) == (post.message, post.data)
    assert post.consumes == (task.seq,)


def test_the_next_task_starts_from_the_saved_state():
    setup, kept = counting(), ClientStateStore()
    task, _ = tasks_of(setup)
    for number in range(1, 4):
        worker = worker_of(setup, kept)  # whatever session it is
        (train,) = worker.handle(again(task, number, id=f"aggregator/{number}"))
        assert (train.local is None) is (number == 1)
        (keep,) = worker.handle(trained(setup, train))
        kept.put(keep.client, keep.kept)
        assert count(kept.get(0).local) == number


@pytest.mark.parametrize("kind", ["task", "evaluate"])
def test_a_task_from_another_node_is_rejected_and_changes_no_state(kind):
    setup, kept = counting(), ClientStateStore()
    task, _ = tasks_of(setup)
    worker = worker_of(setup, kept)
    forged = again(task, 11, sender="w1", id="aggregator/1", kind=kind)
    (handled,) = worker.handle(forged)
    assert handled == Handled(11, "only aggregator sends tasks, this one is from w1", "not-allowed")
    assert kept.get(0) is None
    (train,) = worker.handle(task)
    assert train.local is None


def test_a_client_that_is_no_number_is_rejected():
    task, _ = tasks_of(counting())
    (handled,) = worker_of(counting()).handle(again(task, 11, body={"client": False}))
    assert handled.code == "wrong-client"


def test_a_redelivered_task_is_answered_with_the_saved_result():
    """Training again would change the client's state twice."""
    setup, kept = counting(), ClientStateStore()
    task, _ = tasks_of(setup)
    worker = worker_of(setup, kept)
    (train,) = worker.handle(task)
    post = posted(worker, worker.handle(trained(setup, train)), kept.put)
    (again_posted,) = worker_of(setup, kept).handle(again(task, 99))
    assert isinstance(again_posted, PostMessage)
    assert encode_message(again_posted.message) == encode_message(post.message)
    assert [bytes(each) for each in again_posted.data] == [bytes(each) for each in post.data]
    assert again_posted.consumes == (99,)


def test_a_clients_state_moves_to_the_node_that_takes_it_over(tmp_path):
    """Both nodes share the folder of states; a task is still applied once."""
    setup = counting()
    task, _ = tasks_of(setup)
    worker = worker_of(setup, ClientStateStore(tmp_path))
    (train,) = worker.handle(task)
    post = posted(worker, worker.handle(trained(setup, train)), ClientStateStore(tmp_path).put)
    other = Worker(setup, "run", "other", [(0, 0)], ClientStateStore(tmp_path))
    (resent,) = other.handle(again(task, 99))
    assert encode_message(resent.message) == encode_message(changed(post.message, sender="other"))
    (train,) = other.handle(again(task, 100, id="aggregator/9"))
    assert count(train.local) == 1


def test_of_two_nodes_that_train_a_task_the_second_posts_the_result_of_the_first(tmp_path):
    """Whichever post is used, the client's next task starts from the matching state."""
    setup = counting()
    task, _ = tasks_of(setup)
    one = worker_of(setup, ClientStateStore(tmp_path))
    other = Worker(setup, "run", "other", [(0, 0)], ClientStateStore(tmp_path))
    trainings = [worker.handle(task)[0] for worker in (one, other)]
    done = trained(setup, trainings[0])
    first = posted(one, one.handle(done), ClientStateStore(tmp_path).put)
    slower = Trained(done.payload, done.local, 9.0, "another device")
    second = posted(other, other.handle(slower), ClientStateStore(tmp_path).put)
    assert second.message == changed(first.message, sender="other")
    assert second.consumes == (task.seq,)
    assert other.handle(again(task, 100, id="aggregator/9"))[0].local is not None


def test_a_task_without_saved_state_is_trained_again_to_the_same_message():
    """The worker was killed before it saved the state, or the algorithm has none."""
    setup = make_setup(STREAM, "Normed")
    task, _ = tasks_of(setup)
    posts = []
    for _ in range(2):
        worker = worker_of(setup)
        (train,) = worker.handle(task)
        (post,) = worker.handle(trained(setup, train))
        posts.append((encode_message(post.message), [bytes(each) for each in post.data]))
    assert posts[0] == posts[1]


def test_nothing_is_saved_for_an_algorithm_without_local_state():
    setup = make_setup(STREAM)
    worker = worker_of(setup)
    (train,) = worker.handle(tasks_of(setup)[0])
    assert [type(each) for each in worker.handle(trained(setup, train))] == [PostMessage]


def test_a_failed_or_dropped_task_does_not_change_the_saved_state():
    setup = counting()
    worker = worker_of(setup)
    (train,) = worker.handle(tasks_of(setup)[0])
    (post,) = worker.handle(Failed("no memory"))
    body = {"reason": "no memory", "code": "training-failed"}
    assert (post.message.kind, post.message.body) == ("failed", body)
    dropping = setup.config.model_copy(
        update={"worker": setup.config.worker.model_copy(update={"drop": 1.0})}
    )
    worker = Worker(
        type(setup)(**{**vars(setup), "config": dropping}),
        "run",
        "w0",
        [(0, 0)],
        ClientStateStore(),
    )
    (train,) = worker.handle(tasks_of(setup)[0])
    actions = worker.handle(trained(setup, train))
    assert [type(each) for each in actions if not isinstance(each, Pause)] == [PostMessage]
    assert actions[-1].message.body == {"reason": "dropped on demand", "code": "dropped"}


def test_tasks_are_trained_one_after_the_other():
    setup = make_setup(STREAM)
    first, _ = tasks_of(setup)
    worker = worker_of(setup)
    (train,) = worker.handle(first)
    second = again(first, 20, id="aggregator/20")
    assert worker.handle(second) == []
    post, following = worker.handle(trained(setup, train))
    assert (post.consumes, post.message.re) == ((first.seq,), first.message.id)
    assert isinstance(following, Train)
    (post,) = worker.handle(trained(setup, following))
    assert (post.consumes, post.message.re) == ((20,), "aggregator/20")


def test_the_rejection_of_an_own_message_is_handled():
    note = Message(
        kind="refused", id="broker/9", run="run", sender="broker", to="node/w0", body={"id": "x"}
    )
    assert worker_of(make_setup(STREAM)).handle(Delivery(9, 0.0, note)) == [Handled(9)]


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"kind": "joined"}, "unknown-kind", "a worker takes no 'joined' messages"),
        ({"body": {"client": 1}}, "wrong-client", "client 1 is not hosted by w0"),
        ({"body": {"client": "0"}}, "wrong-client", "client '0' is not hosted by w0"),
        ({"body": {"model_version": None}}, "malformed", "expected model_version in the task"),
        (
            {"body": {"groups": None}},
            "undecodable",
            "expected groups as a list in the message's body",
        ),
    ],
)
def test_an_invalid_task_is_rejected_and_handled(fields, code, reason):
    """Another session could not use it either."""
    setup = counting()
    task, _ = tasks_of(setup)
    assert worker_of(setup).handle(again(task, 30, **fields)) == [Handled(30, reason, code)]


def test_a_state_that_contradicts_itself_is_reported():
    setup = make_setup(STREAM)
    first, second = tasks_of(setup)
    worker = worker_of(setup)
    worker._queue.append(first)
    with pytest.raises(AssertionError, match=r"messages \[10\] wait, but there is no current task"):
        worker.validate_state()
    worker._current = second
    with pytest.raises(AssertionError, match=r"not in the order of their numbers: \[11, 10\]"):
        worker.validate_state()
    worker._current = Delivery(9, 1.0, changed(first.message, kind="refused"))
    with pytest.raises(AssertionError, match="message 9 is the current task, but a 'refused'"):
        worker.validate_state()
