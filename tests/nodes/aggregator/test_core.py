"""Runs in memory: joining, the three schedules, leaving, deadlines, evaluation."""

import random

import pytest
import torch

from fedmq.algorithms.fedavg import FedAvg
from fedmq.codecs.registry import make_codec
from fedmq.nodes.messages.payloads import Codecs, pack, unpack
from tests.algorithms.fleet import Fleet, changed, make_setup
from tests.algorithms.tiny import Normed, payload

ROUNDS = {"name": "rounds", "fraction": 1.0}
BUFFERED = {"name": "buffered", "size": 2, "concurrency": 3}
STREAM = {"name": "stream", "concurrency": 2}


def test_a_run_starts_when_enough_clients_are_there():
    fleet = Fleet(make_setup(ROUNDS, clients=4, min_clients=3), join=False)
    assert [each.kind for each in fleet.records] == ["run"]
    for k in (2, 0):
        fleet.join(k)
        assert not fleet.tasks
    fleet.join(3)
    assert [message.body["client"] for message, _ in fleet.tasks] == [0, 2, 3]
    assert [message.to for message, _ in fleet.tasks] == ["client/0", "client/2", "client/3"]
    assert all(message.body["model_version"] == 0 for message, _ in fleet.tasks)


def test_without_a_minimum_all_clients_are_waited_for():
    fleet = Fleet(make_setup(ROUNDS, clients=3), join=False)
    fleet.join(0)
    fleet.join(1)
    fleet.join(1)
    fleet.join_evaluator()
    assert not fleet.tasks
    fleet.join(2)
    assert len(fleet.tasks) == 3


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [ROUNDS, BUFFERED, STREAM], ids=lambda s: s["name"])
@pytest.mark.parametrize("problem", ["Tiny", "Normed"])
@pytest.mark.parametrize("codec", ["raw", "cast(float16)"])
def test_a_run_reaches_its_versions_and_ends(schedule, problem, codec):
    setup = make_setup(schedule, problem, clients=4, codec=codec, versions=7)
    fleet = Fleet(setup).run(random.Random(1))  # noqa: S311 - an order, not a secret
    assert fleet.finished == "7 versions committed"
    assert [each["version"] for each in fleet.versions] == list(range(1, 8))
    per_version = {"rounds": 4, "buffered": 2, "stream": 1}[schedule["name"]]
    assert [each["results"] for each in fleet.versions] == [per_version] * 7
    assert fleet.counts == (7 * per_version, 0, 0, 0)
    assert set(fleet.done_with) == set(range(1, fleet.seq + 1))
    assert set(fleet.done_with.values()) == {""}
    assert fleet.records[-1].kind == "finished"
    assert fleet.records[-1].body["used"] == 7 * per_version


def test_the_model_learns():
    setup = make_setup(ROUNDS, clients=4, versions=20, algorithm={"lr": 0.5})
    fleet = Fleet(setup)
    before = setup.algorithm.start(setup.problem)
    fleet.run()
    problem, module = setup.problem, setup.problem.model()
    data, losses = problem.test(), []
    for state in (before, fleet.core.state):
        module.load_state_dict(dict(FedAvg().tensors(state)))
        losses.append(problem.metrics(module(data.x).detach(), data.y)["loss"])
    assert losses[1] < losses[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["raw", "cast(bfloat16)"])
def test_rounds_give_the_same_model_in_whatever_order_results_come(codec):
    """Sums of floats depend on their order, so results are added up in cohort order."""
    schedule = {"name": "rounds", "fraction": 0.6}
    digests, orders = set(), set()
    for seed in range(5):
        setup = make_setup(schedule, "Normed", clients=10, codec=codec, versions=4, seed=3)
        fleet = Fleet(setup).run(random.Random(seed))  # noqa: S311
        assert fleet.finished
        digests.add(tuple(each["model_digest"] for each in fleet.versions))
        orders.add(tuple(sorted(fleet.done_with)) == tuple(fleet.done_with))
    assert len(digests) == 1
    assert False in orders, "every order was the cohort's"


def test_another_seed_gives_another_model():
    digests = [
        Fleet(make_setup(ROUNDS, versions=1, seed=seed)).run().versions[0]["model_digest"]
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_the_same_inbox_gives_the_same_actions():
    """Replayed into a new core, a stream run gives the same versions."""
    setup = make_setup(STREAM, clients=3, versions=6)
    fleet, inbox = Fleet(setup, join=False), []
    hear = fleet.core.handle
    fleet.core.handle = lambda event: (inbox.append(event), hear(event))[1]
    for k in range(3):
        fleet.join(k)
    fleet.run(random.Random(5))  # noqa: S311
    again = Fleet(setup, join=False)
    for event in inbox:
        again.act(again.core.handle(event))
    assert again.versions == fleet.versions
    assert again.finished == fleet.finished


def test_integer_buffers_arrive_exactly_whatever_the_codec():
    state = FedAvg().start(Normed())
    sent = payload(state, 0.1, counters=[2**53 + 1], n=3)
    packed = pack(sent, Codecs(make_codec("cast(float16)")), 0)
    setup = make_setup(ROUNDS, "Normed")
    (message, _), *_ = Fleet(setup).tasks
    arrived = unpack(
        changed(message, body=dict(packed.body), blobs=packed.blobs), packed.data.__getitem__
    )
    assert arrived.exact["1.num_batches_tracked"].item() == 2**53 + 1
    assert arrived.numbers == {"n": 3}
    assert arrived.weights["0.bias"].tolist() == torch.tensor([0.1] * 3).half().float().tolist()


def test_a_failed_task_frees_its_slot():
    fleet = Fleet(make_setup(STREAM, clients=2))
    message, _ = fleet.tasks.pop(0)
    fleet.say("failed", {"reason": "no memory"}, "w0", message.id)
    assert fleet.counts == (0, 0, 0, 1)
    assert sorted(each.body["client"] for each, _ in fleet.tasks) == [0, 1]
    assert fleet.run().finished


def test_a_round_whose_tasks_all_failed_draws_again():
    fleet = Fleet(make_setup(ROUNDS))
    for message, _ in [fleet.tasks.pop(0), fleet.tasks.pop(0)]:
        fleet.say("failed", {"reason": "?"}, f"w{message.body['client']}", message.id)
    assert [message.body["client"] for message, _ in fleet.tasks] == [0, 1]
    assert fleet.run().finished
    assert fleet.counts == (6, 0, 0, 2)


def test_a_round_closes_without_those_who_failed():
    fleet = Fleet(make_setup(ROUNDS))
    message, _ = fleet.tasks.pop(0)
    fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    assert not fleet.versions
    fleet.say("failed", {"reason": "?"}, "w0", message.id)
    assert [each["results"] for each in fleet.versions] == [1]


def test_a_worker_that_left_frees_its_slots_and_its_late_result_still_counts():
    fleet = Fleet(make_setup({"name": "stream", "concurrency": 2}, clients=3, versions=9))
    gone, data = fleet.tasks.pop(0)
    late = fleet.work(gone, data)
    node = late[0].sender
    fleet.leave(node)
    assert len(fleet.tasks) == 2
    assert node not in {f"w{message.body['client']}" for message, _ in fleet.tasks}
    fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    assert fleet.reason(*late) == ""
    assert fleet.counts == (2, 0, 0, 0)
    assert fleet.versions[1]["max_staleness"] == 1
    assert fleet.run().finished


def test_a_round_does_not_wait_for_a_worker_that_left():
    fleet = Fleet(make_setup(ROUNDS, versions=2))
    late = fleet.work(*fleet.tasks.pop(0))
    fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    fleet.leave("w0")
    assert [each["results"] for each in fleet.versions] == [1]
    assert fleet.reason(*late) == ""
    assert fleet.run().counts[0] == 3


def test_a_worker_that_returns_is_asked_again():
    fleet = Fleet(make_setup(ROUNDS, versions=2))
    fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    fleet.leave("w1")
    fleet.tasks = [each for each in fleet.tasks if each[0].body["model_version"] == 1]
    assert [message.body["client"] for message, _ in fleet.tasks] == [0]
    fleet.join(1)
    fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    assert fleet.core.version == 2


def test_a_deadline_closes_a_round_that_has_its_least():
    schedule = {**ROUNDS, "deadline_s": 5.0, "min_results": 2}
    fleet = Fleet(make_setup(schedule, clients=4, versions=2))
    assert fleet.ticks == ["deadline/0"]
    fleet.hear(*fleet.work(*fleet.tasks.pop()))
    fleet.say("tick", {"token": "deadline/0"})
    assert fleet.core.version == 0
    fleet.hear(*fleet.work(*fleet.tasks.pop()))
    assert [each["results"] for each in fleet.versions] == [2]
    assert fleet.ticks == ["deadline/0", "deadline/1"]
    fleet.say("tick", {"token": "deadline/0"})
    assert fleet.core.version == 1


def test_the_deadline_itself_closes_a_round_with_enough():
    schedule = {**ROUNDS, "deadline_s": 5.0}
    fleet = Fleet(make_setup(schedule, clients=3))
    seq = fleet.hear(*fleet.work(*fleet.tasks.pop()))
    assert seq not in fleet.done_with
    fleet.say("tick", {"token": "deadline/0"})
    assert fleet.done_with[seq] == ""
    assert [each["results"] for each in fleet.versions] == [1]


@pytest.mark.parametrize("token", ["deadline/7", "", None, 3, "final evaluation", ["x"]])
def test_a_tick_that_nobody_asked_for_changes_nothing(token):
    fleet = Fleet(make_setup({**ROUNDS, "deadline_s": 5.0}))
    seq = fleet.say("tick", {"token": token})
    assert fleet.done_with[seq] == ""
    assert not fleet.core._results.current.deadline_passed
    assert fleet.finished is None


def test_versions_are_evaluated_as_often_as_asked_and_the_last_is_waited_for():
    fleet = Fleet(make_setup(ROUNDS, versions=5, evaluate_every=2), join=False)
    fleet.join_evaluator()
    fleet.join(0)
    fleet.join(1)
    fleet.run()
    assert [message.body["model_version"] for message, _ in fleet.evaluations] == [0, 2, 4, 5]
    assert fleet.finished is None
    for message, data in fleet.evaluations:
        assert fleet.finished is None
        assert fleet.reason(fleet.score(message, data)) == ""
    assert fleet.finished == "5 versions committed"


def test_an_evaluator_that_says_nothing_does_not_hold_the_end_for_ever():
    fleet = Fleet(make_setup(ROUNDS, versions=1))
    fleet.join_evaluator()
    fleet.run()
    assert (fleet.finished, fleet.ticks) == (None, ["final evaluation"])
    fleet.say("tick", {"token": "final evaluation"})
    assert fleet.finished == "1 versions committed"


def test_an_evaluator_that_leaves_does_not_hold_the_end():
    fleet = Fleet(make_setup(ROUNDS, versions=1))
    fleet.join_evaluator()
    fleet.run()
    fleet.leave("evaluator")
    assert fleet.finished


def test_an_evaluation_that_failed_does_not_hold_the_end():
    """There is nothing left to wait for; nor is it a result that was refused."""
    fleet = Fleet(make_setup(ROUNDS, versions=1))
    fleet.join_evaluator()
    fleet.run()
    fleet.hear(fleet.score(*fleet.evaluations.pop(), fails=True))
    assert fleet.counts[2] == 0
    assert fleet.finished == "1 versions committed"


@pytest.mark.parametrize(("accuracy", "ends"), [(0.9, True), (0.89, False), (float("nan"), False)])
def test_a_run_ends_when_the_target_is_reached(accuracy, ends):
    fleet = Fleet(make_setup(ROUNDS, evaluate_every=1, target_accuracy=0.9))
    fleet.join_evaluator()
    message, _ = fleet.evaluations.pop()
    fleet.say("score", {"metrics": {"accuracy": accuracy}}, "evaluator", message.id)
    assert (fleet.finished is not None) is ends
    if ends:
        assert fleet.finished == "accuracy 0.9000 reached the target of 0.9"


def test_what_comes_after_the_end_changes_nothing():
    fleet = Fleet(make_setup(STREAM, versions=1))
    fleet.run()
    records = len(fleet.records)
    assert fleet.reason(*fleet.work(*fleet.tasks.pop(0))) == ""
    fleet.join(0)
    assert len(fleet.records) == records
