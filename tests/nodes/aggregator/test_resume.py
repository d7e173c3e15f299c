"""A new aggregator, a checkpoint, and the messages since: what it says then was said before."""

import itertools
import random

import msgspec
import numpy as np
import pytest

from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.rejections import Code
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Blob
from fedmq.nodes.aggregator.checkpoint import Fold
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.errors import NodeError, OwnCodeError
from fedmq.nodes.messages.actions import AckUpTo, Commit, EndRun, Handled, Start
from fedmq.nodes.run.digests import model_digest
from tests.algorithms.fleet import Fleet, changed, make_setup, with_data

SCHEDULES = {
    "rounds": {"name": "rounds", "fraction": 0.6, "deadline_s": 5.0, "min_results": 1},
    "buffered": {"name": "buffered", "size": 2, "concurrency": 3},
    "stream": {"name": "stream", "concurrency": 2, "staleness": "polynomial(0.5)"},
}


def spoiled(message, data):
    """A result whose first weight is no number."""
    weights = np.frombuffer(data[0], dtype=np.float32).copy()
    weights[0] = np.nan
    return with_data(message, [weights.tobytes(), *data[1:]])


def busy_run(setup, seed, limit=600):
    """A run in which everything happens: nodes come and go, results are late, bad or lost."""
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    fleet = Fleet(setup)
    fleet.join_evaluator()
    away = []
    for _ in range(limit):
        if fleet.finished is not None:
            break
        if fleet.commits and rng.random() < 0.2:
            fleet.say("tick", {"token": fleet.commits.pop(0).token})
            continue
        dice = rng.random()
        if dice < 0.06 and len(away) < 2:
            away.append(rng.randrange(setup.problem.clients))
            fleet.leave(f"w{away[-1]}")
        elif dice < 0.14 and away:
            fleet.join(away.pop())
        elif dice < 0.24 and fleet.evaluations:
            fleet.hear(fleet.score(*fleet.evaluations.pop(0), fails=dice < 0.16))
        elif dice < 0.28 and fleet.ticks:
            fleet.say("tick", {"token": fleet.ticks[-1]})
        elif dice < 0.30:
            fleet.say("nonsense", {})
        elif fleet.tasks:
            message, data = fleet.tasks.pop(rng.randrange(len(fleet.tasks)))
            worker = f"w{message.body['client']}"
            if dice < 0.36:
                fleet.say("failed", {"reason": "no memory"}, worker, message.id)
            elif dice < 0.40:
                body = {"id": message.id, "reason": "parked", "by": "broker"}
                fleet.say("refused", body, re=message.id)
            else:
                result = fleet.work(message, data)
                fleet.hear(*(spoiled(*result) if dice < 0.46 else result))
                if dice > 0.95:
                    fleet.hear(*result)  # a second time
    assert fleet.finished, "the run does not end"
    for k in range(2):  # and what comes after the end
        fleet.join(k)
    return fleet


def plain(actions):
    """Actions as what can be compared: a message by its bytes and those of its blobs."""
    return [
        ("post", encode_message(each.message), [bytes(data) for data in each.data], each.consumes)
        if isinstance(each, PostMessage)
        else ("commit", encode_message(each.message))
        if isinstance(each, Commit)
        else each
        for each in actions
    ]


def is_checkpoint(action):
    return isinstance(action, PostMessage) and action.message.to == "checkpoint"


def handed_over(post):
    """A checkpoint as the broker hands it to the next session."""
    return Delivery(10**6, 1e6, post.message, dict(enumerate(post.data)))


def fold_of(post):
    return msgspec.msgpack.decode(post.data[-1], type=Fold)


def resumed(setup, checkpoint, inbox):
    """A new aggregator that was given this; returns it, and what it wanted done."""
    core = Aggregator(setup, "run", "aggregator")
    actions = list(core.handle(Start(checkpoint)))
    for delivery in inbox:
        actions += core.handle(delivery)
    return core, actions


def setup_of(schedule, problem="Normed", algorithm="fedavg", **run):
    defaults = {"versions": 9, "evaluate_every": 2, "checkpoint_s": 0.0, "seed": 5}
    return make_setup(
        SCHEDULES[schedule], problem, 4, algorithm={"name": algorithm}, **{**defaults, **run}
    )


ALGORITHMS = pytest.mark.parametrize("algorithm", ["fedavg", "tests.algorithms.tiny:Beside"])


@pytest.mark.slow
@ALGORITHMS
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("every_s", [0.0, 12.0, 1e9])
@pytest.mark.parametrize("seed", range(3))
def test_from_any_checkpoint_a_run_goes_on_as_it_did(schedule, every_s, seed, algorithm):
    """Each checkpoint may be the newest that was kept; what it does not tell of comes again."""
    setup = setup_of(schedule, algorithm=algorithm, checkpoint_s=every_s)
    fleet = busy_run(setup, seed)
    digest = model_digest(fleet.core.tensors())
    checkpoints = [at for at, action in enumerate(fleet.actions) if is_checkpoint(action)]
    # The run's record is one, and so is the end.
    assert len(checkpoints) == {0.0: 11, 1e9: 2}.get(every_s, len(checkpoints))
    assert len(checkpoints) >= 2
    for at in checkpoints:
        post = fleet.actions[at]
        assert isinstance(fleet.actions[at + 1], AckUpTo)
        fold = fold_of(post)
        unknown = [
            each for each in fleet.inbox if each.seq > fold.position or each.seq in fold.deferred
        ]
        core, actions = resumed(setup, handed_over(post), unknown)
        assert plain(actions) == plain(fleet.actions[at + 2 :])
        assert model_digest(core.tensors()) == digest
        assert (core.version, core._results.counts) == (
            fleet.core.version,
            fleet.core._results.counts,
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_any_checkpoint_a_run_begins_anew_and_says_the_same(schedule):
    setup = setup_of(schedule)
    fleet = busy_run(setup, 7)
    core, actions = resumed(setup, None, fleet.inbox)
    assert plain(actions) == plain(fleet.actions)
    assert model_digest(core.tensors()) == model_digest(fleet.core.tensors())


@pytest.mark.slow
@ALGORITHMS
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cut_after_any_message_nothing_is_missing_and_nothing_is_said_anew(schedule, algorithm):
    """The next session gets the newest checkpoint, and what no session has settled."""
    setup = setup_of(schedule, algorithm=algorithm, checkpoint_s=9.0)
    fleet = busy_run(setup, 11)
    said = {
        each.message.id: plain([each]) for each in fleet.actions if isinstance(each, PostMessage)
    }
    replay = Fleet(setup, join=False)
    for cut, delivery in enumerate(fleet.inbox):
        replay.seq = delivery.seq
        replay.act(replay.core.handle(delivery))
        unfinished = [
            each
            for each in fleet.inbox[: cut + 1]
            if each.seq > replay.settled or each.seq in replay.untold
        ]
        core, actions = resumed(setup, replay.checkpoint, unfinished)
        for each in actions:
            assert not isinstance(each, PostMessage) or plain([each]) == said[each.message.id]
        assert model_digest(core.tensors()) == model_digest(replay.core.tensors())
        assert core._messages.next_id == replay.core._messages.next_id
        assert core._tasks.in_flight == replay.core._tasks.in_flight
        here, there = core._results.current, replay.core._results.current
        assert (here.order, sorted(here.held)) == (there.order, sorted(there.held))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_settled_that_no_checkpoint_tells_of(schedule):
    setup = setup_of(schedule, checkpoint_s=9.0)
    fleet = busy_run(setup, 13)
    position = -2  # the run's record stands before the first message
    for action, following in zip(fleet.actions, [*fleet.actions[1:], None], strict=True):
        if is_checkpoint(action):
            assert fold_of(action).position > position
            position = fold_of(action).position
            assert isinstance(following, AckUpTo)
    assert sum(isinstance(each, AckUpTo) for each in fleet.actions) == sum(
        map(is_checkpoint, fleet.actions)
    )
    assert fleet.settled == position


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_message_that_the_checkpoint_tells_of_is_settled_and_changes_nothing(schedule):
    """The session before it may have died before it could say so."""
    setup = setup_of(schedule)
    fleet = busy_run(setup, 17)
    post = [each for each in fleet.actions if is_checkpoint(each)][4]
    position = fold_of(post).position
    core = Aggregator(setup, "run", "aggregator")
    core.handle(Start(handed_over(post)))
    before = (
        core.version,
        model_digest(core.tensors()),
        dict(core._tasks.in_flight),
        core._messages.next_id,
    )
    for delivery in fleet.inbox:
        if delivery.seq <= position:
            assert core.handle(delivery) == [AckUpTo()]
    assert before == (
        core.version,
        model_digest(core.tensors()),
        core._tasks.in_flight,
        core._messages.next_id,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_the_end_a_new_session_only_says_so_again(schedule):
    setup = setup_of(schedule)
    fleet = busy_run(setup, 19)
    core, actions = resumed(setup, fleet.checkpoint, [])
    assert actions == [EndRun(fleet.finished)]
    assert model_digest(core.tensors()) == model_digest(fleet.core.tensors())
    late = fleet.inbox[-1]
    assert core.handle(late) == [Handled(late.seq)]


def test_a_version_is_a_checkpoint_when_the_last_one_is_old_enough_and_a_record_else():
    setup = setup_of("stream", checkpoint_s=6.0)
    fleet = busy_run(setup, 23)
    versions = [each for each in fleet.records if each.kind == "version"]
    assert {each.to for each in versions} == {"record", "checkpoint"}
    assert versions[0].to == "checkpoint"
    times = [fold_of(each).at for each in fleet.actions if is_checkpoint(each)]
    pauses = [later - sooner for sooner, later in itertools.pairwise(times[:-1])]
    assert min(pauses) >= 6.0
    assert fleet.records[-1].kind == "finished"
    assert fleet.records[-1].to == "checkpoint"
    for each in versions:
        assert bool(each.blobs) is (each.to == "checkpoint")
        assert each.body["version"] >= 1


def test_a_checkpoint_carries_the_model_of_its_version():
    setup = setup_of("rounds")
    fleet = busy_run(setup, 29)
    posts = [each for each in fleet.actions if is_checkpoint(each)]
    assert [each.message.kind for each in posts] == ["run"] + ["version"] * 9 + ["finished"]
    first, _ = resumed(setup, handed_over(posts[0]), [])
    assert (first.version, first._running) == (0, False)
    assert model_digest(first.tensors()) == model_digest(
        setup.algorithm.tensors(setup.algorithm.start(setup.problem))
    )
    for post in posts[1:-1]:
        core, _ = resumed(setup, handed_over(post), [])
        assert core.version == fold_of(post).version == post.message.body["version"]
        assert model_digest(core.tensors()) == post.message.body["model_digest"]


@pytest.mark.parametrize("fault", ["another problem", "no fold", "damaged fold", "a weight less"])
def test_a_checkpoint_that_does_not_fit_is_one_sentence(fault):
    setup = setup_of("stream")
    post = next(filter(is_checkpoint, busy_run(setup, 31).actions))
    message, data = post.message, post.data
    match fault:
        case "another problem":
            setup = setup_of("stream", "Tiny")
        case "no fold":
            message, data = with_data(message, data[:-1])
        case "damaged fold":
            message, data = with_data(message, [*data[:-1], b"\x81" + bytes(data[-1])[1:]])
        case "a weight less":
            data = (bytes(data[0])[:-4], *data[1:])
            message = changed(message, blobs=tuple(Blob.of(each) for each in data))
    with pytest.raises(NodeError, match=f"checkpoint {message.id} does not fit") as caught:
        resumed(setup, Delivery(1, 1.0, message, dict(enumerate(data))), [])
    assert "\n" not in str(caught.value)


def test_an_error_of_the_algorithm_in_a_checkpoint_does_not_end_the_run(monkeypatch):
    """Its code may be repaired; an end would come from a state that was never restored."""
    setup = setup_of("stream", checkpoint_s=0.0)
    fleet = Fleet(setup)
    fleet.hear(*fleet.work(*fleet.tasks.pop(0)))

    def fails(*_):
        raise RuntimeError("size mismatch for fc.weight")

    for method in ("load", "new_accumulator"):
        core = Aggregator(setup, "run", "aggregator")
        with monkeypatch.context() as patch:
            patch.setattr(type(setup.algorithm), method, fails)
            with pytest.raises(
                OwnCodeError, match=r"algorithm.name: .*size mismatch for fc.weight"
            ):
                core.handle(Start(fleet.checkpoint))
    assert core.handle(Start(fleet.checkpoint))
    assert core.version == 1


def test_an_end_right_after_a_restart_rejects_the_results_that_the_end_before_it_rejected():
    """A result came during the last commit, and no node is left to evaluate the last version."""
    setup = setup_of("buffered", algorithm="tests.algorithms.tiny:Beside", versions=1)
    fleet = Fleet(setup)
    for _ in range(3):
        deferred = fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    for k in range(4):
        fleet.leave(f"w{k}")
    before = len(fleet.actions)
    fleet.say("tick", {"token": fleet.commits.pop().token})
    _, post, _, *rest = fleet.actions[before:]
    assert post.message.kind == "version"
    assert fleet.codes[deferred] == Code.RUN_OVER
    unfinished = [each for each in fleet.inbox if each.seq == deferred]
    _, actions = resumed(setup, handed_over(post), unfinished)
    assert plain(actions) == plain(rest)


def test_a_run_that_ends_during_a_commit_drops_it():
    setup = setup_of(
        "buffered",
        algorithm="tests.algorithms.tiny:Beside",
        target_accuracy=0.01,
        evaluate_every=1,
    )
    fleet = Fleet(setup)
    for _ in range(2):
        fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    for message, data in fleet.evaluations:
        fleet.hear(fleet.score(message, data))
    assert fleet.finished.endswith("reached the target of 0.01")
    fleet.say("tick", {"token": fleet.commits.pop().token})
    assert (fleet.core.version, fleet.core.missing_clients()) == (0, [])


def test_a_final_evaluation_that_spans_a_restart_has_one_timer():
    """The run reached its goal during a commit, whose version is evaluated, too."""
    setup = setup_of(
        "buffered", algorithm="tests.algorithms.tiny:Beside", target_accuracy=0.01, evaluate_every=1
    )
    fleet = Fleet(setup)
    for _ in range(4):
        fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
        if fleet.core.version == 0 and fleet.commits:
            fleet.say("tick", {"token": fleet.commits.pop().token})
    for message, data in fleet.evaluations[:4]:
        fleet.hear(fleet.score(message, data))
    assert "final evaluation" in fleet.ticks
    before = len(fleet.actions)
    tick = fleet.say("tick", {"token": fleet.commits.pop().token})
    actions = fleet.actions[before:]
    post = next(filter(is_checkpoint, actions))
    unfinished = [each for each in fleet.inbox if each.seq == tick]
    _, again = resumed(setup, handed_over(post), unfinished)
    assert plain(again[:-1]) == plain(actions[actions.index(post) + 2 :])


def test_while_a_version_is_being_made_nodes_come_and_go_and_results_wait():
    """A server that trains does so beside its inbox, not in front of it."""
    setup = setup_of("buffered", algorithm="tests.algorithms.tiny:Beside", versions=2)
    fleet = Fleet(setup)
    for _ in range(2):
        fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    assert fleet.core.version == 0
    assert not [each for each in fleet.records if each.kind == "version"]
    waiting = fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    assert waiting not in fleet.done_with
    fleet.leave("w3")
    assert 3 not in fleet.core._fleet.hosts
    fleet.say("tick", {"token": fleet.commits.pop().token})
    assert fleet.core.version == 1
    assert fleet.done_with[waiting] == ""
    assert fleet.core._results.current.staleness == [1]


def test_what_fails_beside_the_inbox_ends_the_run_where_its_tick_stands():
    """A run does not go on with a version that was not made, and would not be made again."""
    setup = setup_of("buffered", algorithm="tests.algorithms.tiny:Beside", versions=2)
    fleet = Fleet(setup)
    for _ in range(2):
        fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    (commit,) = fleet.commits
    commit._work = lambda: 1 / 0
    assert fleet.finished is None
    fleet.say("tick", {"token": commit.token})
    assert "raised ZeroDivisionError: division by zero" in fleet.finished
    assert fleet.core.failed


def test_clients_score_a_version_together():
    """The target is met by the mean over all clients, when the last of them has said its word."""
    setup = setup_of(
        "rounds", algorithm="tests.algorithms.tiny:Beside", target_accuracy=0.25, evaluate_every=1
    )
    fleet = Fleet(setup)
    assert [message.body["client"] for message, _ in fleet.evaluations] == [0, 1, 2, 3]
    for evaluation in fleet.evaluations[:3]:
        fleet.hear(fleet.score(*evaluation))
        assert fleet.core._finishing == ""
    stranger = fleet.score(*fleet.evaluations[3])
    assert "no evaluation" in fleet.reason(changed(stranger, sender="w0"))
    fleet.hear(stranger)
    assert fleet.core._finishing == "accuracy 0.2500 reached the target of 0.25"


def test_the_end_waits_for_clients_as_long_as_one_after_the_other_answers():
    setup = setup_of("buffered", algorithm="tests.algorithms.tiny:Beside", versions=1)
    fleet = Fleet(setup)
    for _ in range(2):
        fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    fleet.say("tick", {"token": fleet.commits.pop().token})
    assert len(fleet.evaluations) == 8  # of version 0 and of the last
    for number in range(3):
        fleet.hear(fleet.score(*fleet.evaluations[number]))
        fleet.say("tick", {"token": fleet.ticks[number]})
        assert fleet.finished is None
        assert len(fleet.ticks) == number + 2
    fleet.say("tick", {"token": fleet.ticks[-1]})
    assert fleet.finished == "1 versions committed"


def test_a_run_of_another_release_is_not_gone_on_with():
    """Its late results counted otherwise: half of it by either rule is neither's run."""
    setup = setup_of("rounds")
    post = [each for each in busy_run(setup, 37).actions if is_checkpoint(each)][2]
    core = Aggregator(setup, "run", "aggregator", Computed(arithmetic=1))
    with pytest.raises(NodeError, match="run 'run' was started by a release of fedmq"):
        core.handle(Start(handed_over(post)))
