"""FedRep from the start of a run to its end: what is refused, saved and averaged, and replayed."""

import dataclasses
import random

import pytest
import torch

from fedmq.algorithms.base import Result
from fedmq.algorithms.errors import ProblemError, ResultError
from fedmq.algorithms.personal.fedrep import FedRep
from fedmq.algorithms.schedules import Buffered, Rounds, Stream
from fedmq.algorithms.toolkit.split_model import cut
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.worker.core import Worker
from tests.algorithms.fleet import Fleet
from tests.algorithms.split_problems import (
    Halves,
    NoSequence,
    Tied,
    Tracking,
    head_of,
    play,
    same,
    task_of,
    trained,
)
from tests.algorithms.tiny import HalfFrozen, client, payload
from tests.sim.recorded import check_recorded_run

pytestmark = pytest.mark.slow

# ---- determinism, state, and what is refused


def test_the_same_seed_gives_the_same_bytes_and_draws_from_nobody_elses():
    problem, algorithm = Tracking(), FedRep(head=3)
    before = torch.random.get_rng_state()
    first = trained(algorithm, problem, 1, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = trained(algorithm, problem, 1, seed=2)
    again = trained(algorithm, problem, 1, seed=1)
    for part in ("weights", "exact"):
        assert same(getattr(first[0], part), getattr(again[0], part))
    assert same(first[1].exact, again[1].exact)
    assert not same(first[0].weights, other[0].weights)


def test_a_state_is_saved_and_loaded_to_the_bit():
    problem, algorithm = Tracking(), FedRep(head=3, epochs=1)
    state, _ = play(algorithm, problem, 2)
    saved = algorithm.load(problem, algorithm.save(state))
    assert saved.layout == state.layout
    assert torch.equal(saved.weights, state.weights)
    assert torch.equal(saved.counters, state.counters)
    assert state.counters.tolist() == [4]


def bad(state, problem):
    good = payload(state, 0.1, n=1, reply="update")
    whole = {name: each for name, each in problem.model().state_dict().items() if each.dim()}
    yield "a head beside the body", {"weights": {**good.weights, **whole}}, "no tensor"
    yield "the head alone", {"weights": head_of(problem, ("7.weight", "7.bias"))}, "missing"
    yield "not finite", {"weights": payload(state, torch.inf).weights}, "NaN or infinite"
    yield "too large", {"weights": payload(state, 1e35).weights}, "as large as"
    shaped = {**good.weights, "0.bias": torch.zeros(7)}
    yield "another shape", {"weights": shaped}, "as torch.float32"
    doubles = {name: each.double() for name, each in good.weights.items()}
    yield "another dtype", {"weights": doubles}, "as torch.float32"


@pytest.mark.parametrize("which", range(6))
def test_a_result_that_cannot_be_used_leaves_the_sum_as_it_was(which):
    problem, algorithm = Tracking(), FedRep()
    state = algorithm.start(problem)
    good = payload(state, 0.1, n=1, reply="update")
    gathered = algorithm.accumulate(
        algorithm.new_accumulator(state), state, Result(0, 0, good, 1), 2.0
    )
    before = gathered.total.clone(), gathered.counters.clone(), gathered.models
    _, change, message = list(bad(state, problem))[which]
    with pytest.raises(ResultError, match=message):
        algorithm.accumulate(
            gathered, state, Result(1, 0, dataclasses.replace(good, **change), 1), 1.0
        )
    assert torch.equal(gathered.total, before[0])
    assert torch.equal(gathered.counters, before[1])
    assert gathered.models == before[2]


@pytest.mark.parametrize("head", [2, 3])
def test_a_head_that_leaves_nothing_to_share_is_refused(head):
    with pytest.raises(ProblemError, match="fewer than the model's 2 trained layers"):
        FedRep(head=head).start(Halves())


@pytest.mark.parametrize(
    ("problem", "message"), [(NoSequence(), "nn.Sequential"), (Tied(), "got a common one")]
)
def test_a_model_that_cannot_be_cut_is_refused_at_the_start(problem, message):
    with pytest.raises(ProblemError, match=message):
        FedRep().start(problem)


def test_layers_that_are_not_trained_do_not_count():
    module = torch.nn.Sequential(*(HalfFrozen().module() for _ in range(3)))
    module[2].requires_grad_(requires_grad=False)
    body, head = cut(module, 1)
    assert [len(body), len(head)] == [1, 2]


# ---- schedules


def weighted(schedule, algorithm, state, results):
    gathered, total = algorithm.new_accumulator(state), 0.0
    for vector, n, staleness, reply in results:
        weight = schedule.weight(n, staleness)
        sent = payload(state, vector, n=n, reply=reply)
        gathered = algorithm.accumulate(gathered, state, Result(0, staleness, sent, n), weight)
        total += weight
    return algorithm.commit(state, gathered, schedule.divisor(total, len(results)))


@pytest.mark.parametrize(
    ("schedule", "results", "moved"),
    [
        (Rounds(), [(1.0, 1, 0, "update"), (5.0, 3, 0, "update")], 4.0),
        (Buffered(), [(1.0, 1, 0, "update"), (4.0, 3, 3, "update")], 1.5),
    ],
    ids=["rounds", "buffered"],
)
def test_bodies_are_averaged_as_the_schedule_weighs_them(schedule, results, moved):
    """(1 * 1 + 3 * 5) / 4; (1 + 4 / sqrt(1 + 3)) / 2."""
    algorithm = FedRep()
    state = algorithm.start(Halves())
    new = weighted(schedule, algorithm, state, results)
    torch.testing.assert_close(new.weights, state.weights + moved)


def test_stream_mixes_the_body_in():
    """(1 - alpha) phi + alpha phi_k, alpha = 0.5 * (1 + 3)^-0.5."""
    algorithm = FedRep()
    state = algorithm.start(Halves())
    new = weighted(Stream(mixing=0.5), algorithm, state, [(2.0, 1, 3, "model")])
    torch.testing.assert_close(new.weights, 0.75 * state.weights + 0.5)


SCHEDULES = {
    "rounds": {"name": "rounds", "fraction": 0.5},
    "buffered": {"name": "buffered", "size": 2, "concurrency": 3},
    "stream": {"name": "stream", "concurrency": 2},
}


def setup_of(schedule, codec="raw", problem="Halves", algorithm="fedrep:FedRep", **run):
    return set_up(
        build(
            {
                "run": {"versions": 6, "evaluate_every": 0, **run},
                "problem": {"name": f"tests.algorithms.split_problems:{problem}", "clients": 4},
                "algorithm": {"name": f"fedmq.algorithms.personal.{algorithm}", "lr": 0.2},
                "schedule": SCHEDULES[schedule],
                "codec": {"up": codec, "down": codec},
            }
        )
    )


@pytest.mark.parametrize("codec", ["raw", "quantize(8)"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_fleet_learns(schedule, codec):
    fleet = Fleet(setup_of(schedule, codec, versions=15))
    fleet.run(random.Random(1))  # noqa: S311 - an order, not a secret
    assert fleet.counts[1:] == (0, 0, 0)
    assert fleet.core.version == 15
    algorithm, problem = fleet.setup.algorithm, fleet.setup.problem
    task = task_of(algorithm, fleet.core.state)
    accuracies = []
    for index in range(4):
        kept = fleet.locals[f"w{index}"].get(index)
        at = client(problem, index, local=kept.local if kept else None)
        accuracies.append(algorithm.evaluate_client(task, at)["accuracy"])
    assert sum(accuracies) / 4 >= 0.85


def test_no_message_of_a_run_holds_more_than_the_body():
    fleet = Fleet(setup_of("rounds", versions=4))
    while fleet.tasks:
        message, data = fleet.tasks.pop(0)
        answer, sent = fleet.work(message, data)
        assert [len(each) for each in (*data, *sent)] == [4 * 24, 4 * 24]
        fleet.hear(answer, sent)
    assert fleet.core.version == 4
    for message, data in fleet.evaluations:
        assert [len(each) for each in data] == [4 * 24]
        metrics = fleet.score(message, data).body["metrics"]
        assert set(metrics) == {"accuracy", "accuracy_before", "loss"}
    assert len(fleet.evaluations) == 4


def test_a_head_survives_its_workers_restart():
    """Another worker, with the disk of the first, makes the same of the client's next task."""
    answers = []
    for restart in (False, True):
        fleet = Fleet(setup_of("stream", versions=8))
        for turn in range(6):
            if restart and turn == 3:
                for name, kept in fleet.locals.items():
                    at = int(name[1:])
                    fleet.workers[name] = Worker(fleet.setup, "run", name, [(at, at)], kept)
            message, data = fleet.tasks.pop(0)
            answers.append(fleet.work(message, data))
            fleet.hear(*answers[-1])
    assert answers[:6] == answers[6:]
    assert len({message.body["client"] for message, _ in answers[:6]}) < 6


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_recorded_run_with_crashes_replays_to_the_bit(schedule, tmp_path):
    """The aggregator's fold, then every task of every node from the head that it kept."""
    setup = setup_of(schedule, "cast(float16)", evaluate_every=4, checkpoint_s=1.0)
    check_recorded_run(setup, tmp_path, 6)
