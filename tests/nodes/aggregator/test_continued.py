"""A run that is taken up again: it waits for its nodes, and may go further than its end."""

import msgspec
import pytest

from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.nodes.aggregator.checkpoint import Fold
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.messages.actions import EndRun, Start
from fedmq.nodes.run.digests import model_digest
from tests.algorithms.fleet import Fleet, make_setup
from tests.nodes.aggregator.test_resume import (
    ALGORITHMS,
    SCHEDULES,
    busy_run,
    fold_of,
    is_checkpoint,
    plain,
    setup_of,
)

pytestmark = pytest.mark.slow

ROUNDS = {"name": "rounds", "fraction": 0.5}


def go_on(fleet, *, further=False, **run):
    """The broker tells that the run was taken up again; return the message's number."""
    config = fleet.setup.config
    asked = config.model_copy(update={"run": config.run.model_copy(update=run)})
    fleet.finished = None if further else fleet.finished
    fleet.tasks = [] if further else fleet.tasks
    return fleet.say("continued", {"config": asked.to_toml(), "further": further, "stopped_s": 5.0})


def come_back(fleet):
    for k in range(fleet.setup.problem.clients):
        fleet.join(k)


def with_evaluations(fleet):
    """Work, and answer each evaluation at once, until the run ends."""
    for _ in range(200):
        while fleet.evaluations:
            fleet.hear(fleet.score(*fleet.evaluations.pop(0)))
        if fleet.commits:
            fleet.say("tick", {"token": fleet.commits.pop(0).token})
        elif fleet.tasks:
            fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
        elif not fleet.evaluations:
            return fleet
    raise AssertionError("the run does not end")


@ALGORITHMS
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(2))
def test_an_ended_run_goes_further_and_says_the_same_from_any_checkpoint(schedule, algorithm, seed):
    fleet = busy_run(setup_of(schedule, algorithm=algorithm), seed)
    assert fleet.core.version == 9
    continued = go_on(fleet, further=True, versions=12)
    fleet.join_evaluator()
    come_back(fleet)
    with_evaluations(fleet)
    assert (fleet.core.version, fleet.finished) == (12, "12 versions committed")
    assert [each["version"] for each in fleet.versions] == list(range(1, 13))
    sums = fleet.core._results.counts
    assert sums.used == sum(each["results"] for each in fleet.versions)

    ends = 0
    for at, post in enumerate(fleet.actions):
        if not is_checkpoint(post):
            continue
        fold = fold_of(post)
        ends += fold.ended
        checkpoint = Delivery(fold.position + 1, 1e6, post.message, dict(enumerate(post.data)))
        core = Aggregator(fleet.setup, "run", "aggregator")
        actions = list(core.handle(Start(checkpoint, continued=continued)))
        for delivery in fleet.inbox:
            if delivery.seq > fold.position or delivery.seq in fold.deferred:
                actions += core.handle(delivery)
        # Its first end is none to a session that knows that it goes further.
        said = [each for each in fleet.actions[at + 2 :] if each != EndRun("9 versions committed")]
        assert plain(actions) == plain(said)
        assert model_digest(core.tensors()) == model_digest(fleet.core.tensors())
    assert ends == 2


def test_it_waits_for_its_clients_and_its_evaluator_and_then_goes_on_as_if_nothing_had_been():
    def run(stops_after):
        fleet = Fleet(make_setup(ROUNDS, clients=4, evaluate_every=1), join=False)
        fleet.join_evaluator()
        come_back(fleet)
        for number in range(100):
            if number == stops_after:
                before = len(fleet.actions)
                go_on(fleet)
                come_back(fleet)
                posts = [each for each in fleet.actions[before:] if isinstance(each, PostMessage)]
                assert not posts, "its evaluator is not here yet"
                fleet.join_evaluator()
            if fleet.finished is not None:
                break
            if fleet.evaluations:
                fleet.hear(fleet.score(*fleet.evaluations.pop(0)))
            elif fleet.tasks:
                fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
        assert fleet.finished == "3 versions committed"
        posts = [each for each in fleet.actions if isinstance(each, PostMessage)]
        return (
            # The wait for the last evaluation starts again.
            [each.message.kind for each in posts if each.message.kind != "timer"],
            [each["model_digest"] for each in fleet.versions],
        )

    whole = run(None)
    for moment in range(11):
        assert run(moment) == whole


def test_a_run_that_has_ended_stays_so_unless_it_is_to_go_further():
    fleet = Fleet(make_setup(ROUNDS, clients=2)).run()
    end, before = fleet.checkpoint, len(fleet.actions)
    go_on(fleet)
    come_back(fleet)
    assert not [each for each in fleet.actions[before:] if isinstance(each, PostMessage)]
    for continued, ended in ((-1, True), (10**6, False)):
        core = Aggregator(fleet.setup, "run", "aggregator")
        newest = Delivery(99, 1.0, end.message, end.inline)
        finishes = [
            isinstance(each, EndRun) for each in core.handle(Start(newest, None, continued))
        ]
        assert any(finishes) is ended


@pytest.mark.parametrize(
    ("more", "ends"),
    [
        ({"versions": 5}, (5, "5 versions committed")),
        ({"target_accuracy": 0.0001}, (3, "3 versions committed")),
        ({"versions": 3}, (3, "3 versions committed")),
    ],
)
def test_more_or_less_may_be_asked_for_while_it_goes_on(more, ends):
    fleet = Fleet(make_setup(ROUNDS, clients=2))
    fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    assert fleet.core.version == 1
    tasks = fleet.tasks
    go_on(fleet, further=True, **more)
    fleet.tasks = tasks  # nothing is lost: the nodes that host their clients get them
    come_back(fleet)
    fleet.run()
    assert (fleet.core.version, fleet.finished) == ends


def test_what_is_reached_when_it_is_asked_for_ends_the_run():
    fleet = Fleet(make_setup(ROUNDS, clients=2, versions=9))
    for _ in range(3):
        fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    go_on(fleet, further=True, versions=3)
    come_back(fleet)
    assert fleet.finished == "3 versions committed"
    assert fleet.core.version == 3


def test_a_target_that_is_asked_for_later_needs_accuracy_among_the_metrics():
    fleet = Fleet(make_setup(ROUNDS, clients=2, versions=9, evaluate_every=1), join=False)
    fleet.join_evaluator()
    come_back(fleet)
    go_on(fleet, further=True, target_accuracy=0.5)
    come_back(fleet)
    fleet.join_evaluator()
    (message, _), *_ = fleet.evaluations
    fleet.say("score", {"metrics": {"loss": 1.0}}, "evaluator", re=message.id)
    assert fleet.core.failed
    assert fleet.finished == "run.target_accuracy: expected accuracy among the metrics, got loss"


def test_a_last_evaluation_is_waited_for_across_the_pause():
    fleet = Fleet(make_setup(ROUNDS, clients=2, versions=1, evaluate_every=0), join=False)
    fleet.join_evaluator()
    come_back(fleet)
    fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    [evaluation] = fleet.evaluations
    tokens = list(fleet.ticks)
    go_on(fleet)
    for token in tokens:  # its time has passed meanwhile
        fleet.say("tick", {"token": token})
    come_back(fleet)
    assert fleet.finished is None
    fleet.join_evaluator()
    assert fleet.finished is None
    fleet.hear(fleet.score(*evaluation))
    assert fleet.finished == "1 versions committed"


def test_a_checkpoint_that_is_left_while_it_waits_tells_what_it_waits_for():
    """The last version was being made beside the inbox when the run was stopped."""
    schedule = {"name": "rounds", "fraction": 0.5}
    beside = {"name": "tests.algorithms.tiny:Beside"}
    setup = make_setup(schedule, clients=2, algorithm=beside, versions=1, checkpoint_s=0.0)
    fleet = Fleet(setup, join=False)
    fleet.join_evaluator()
    come_back(fleet)
    fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    [commit] = fleet.commits
    go_on(fleet)
    fleet.say("tick", {"token": commit.token})
    fold = msgspec.msgpack.decode(
        fleet.checkpoint.read(len(fleet.checkpoint.inline) - 1), type=Fold
    )
    assert (fold.version, fold.running, fold.expects_evaluator) == (1, False, True)
    core = Aggregator(setup, "run", "aggregator")
    core.handle(Start(fleet.checkpoint))
    before = len(fleet.inbox)
    come_back(fleet)
    assert fleet.finished is None
    for delivery in fleet.inbox[before:]:
        assert not [each for each in core.handle(delivery) if isinstance(each, EndRun)]
