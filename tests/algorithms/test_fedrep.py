"""FedRep: the head on a frozen body, then the body under a frozen head; only the body travels."""

import dataclasses
import random

import pytest
import torch

from fedmq.algorithms.base import Payload, Result
from fedmq.algorithms.errors import ProblemError, ResultError
from fedmq.algorithms.fedavg import batches
from fedmq.algorithms.fedrep import FedRep
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.schedules import Buffered, Rounds, Stream
from fedmq.algorithms.split import Split, cut, scratch_split
from fedmq.broker.trace import Trace
from fedmq.nodes.config import build
from fedmq.nodes.digests import model_digest
from fedmq.nodes.replay.fold import Replay
from fedmq.nodes.replay.workers import Retraining
from fedmq.nodes.setup import set_up
from fedmq.nodes.simulation import Chances, Simulation
from fedmq.nodes.worker import Worker
from tests.algorithms.fleet import Fleet
from tests.algorithms.split_problems import (
    BODY,
    HEAD,
    Halves,
    NoSequence,
    Tied,
    Tracking,
    head_of,
    play,
    same,
    task_of,
)
from tests.algorithms.tiny import HalfFrozen, client, payload

HARD = {"momentum": 0.9, "weight_decay": 0.1}
"""What moves a parameter whose gradient is zero."""


def trained(algorithm, problem, index=0, local=None, reply="update", seed=7):
    at = client(problem, index, seed, local)
    return algorithm.train(task_of(algorithm, algorithm.start(problem), reply), at)


def fitted(problem, part, epochs=2, **options):
    """Return all tensors of a model before and after a part of it was fitted."""
    algorithm = FedRep(head=options.pop("head", 1), batch_size=4, lr=0.1, **options)
    model = Split(problem, algorithm.head)
    before = {name: each.clone() for name, each in model.whole.module.state_dict().items()}
    torch.manual_seed(1)
    model.fit(part, problem.client(1), epochs, algorithm, client(problem, 1))
    return before, model.whole.module.state_dict()


# ---- frozen means frozen


@pytest.mark.parametrize(("part", "frozen"), [("head", "01"), ("body", "2")])
def test_frozen_is_bit_equal_also_under_momentum_and_weight_decay(part, frozen):
    """Zeroed gradients would not do: momentum and weight decay move what has none."""
    before, after = fitted(Halves(), part, **HARD)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name[0] in frozen), name


def test_frozen_is_bit_equal_also_when_the_other_half_has_moved_before():
    """One momentum buffer over both phases would carry the first into the second."""
    problem = Halves()
    algorithm = FedRep(batch_size=2, **HARD)
    model, data, at = Split(problem, 1), problem.client(1), client(problem, 1)
    model.fit("head", data, 3, algorithm, at)
    model.fit("body", data, 3, algorithm, at)
    body = model.body_vector()
    model.fit("head", data, 3, algorithm, at)
    assert torch.equal(model.body_vector(), body)


@pytest.mark.parametrize(("part", "frozen"), [("head", "0123"), ("body", "4567")])
def test_what_is_frozen_keeps_its_running_statistics(part, frozen):
    """And what is trained does not."""
    before, after = fitted(Tracking(), part, head=3, **HARD)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name[0] in frozen), name


def test_a_frozen_body_has_no_dropout():
    """The head is fitted to what the body says when it is evaluated, whatever torch draws."""
    problem, algorithm = Tracking(), FedRep(head=3)
    ends = []
    for seed in (1, 2):
        model = Split(problem, 3)
        torch.manual_seed(seed)
        model.fit("head", problem.client(1), 2, algorithm, client(problem, 1))
        ends.append(model.kept_tensors())
    assert same(*ends)


# ---- the two phases, against torch.optim.SGD


@pytest.mark.parametrize("options", [{}, HARD], ids=["plain", "momentum and weight decay"])
def test_a_task_is_head_epochs_then_body_epochs(options):
    problem = Halves()
    algorithm = FedRep(lr=0.1, head_epochs=3, epochs=2, batch_size=2, **options)
    result, kept = trained(algorithm, problem, 1, reply="model")
    module, data = problem.model(), problem.client(1)
    for layer, epochs, purpose in ((2, 3, "head batches"), (0, 2, "batches")):
        optimizer = torch.optim.SGD(module[layer].parameters(), lr=0.1, **options)
        for x, y in batches(data, 2, epochs, derive_rng(7, purpose)):
            module.zero_grad()
            problem.loss(module(x), y).backward()
            optimizer.step()
    expected = module.state_dict()
    for name in BODY:
        torch.testing.assert_close(result.weights[name], expected[name])
    for name in HEAD:
        torch.testing.assert_close(kept.exact[name], expected[name])


def test_an_update_is_the_body_less_the_one_that_came():
    problem, algorithm = Halves(), FedRep()
    state = algorithm.start(problem)
    update, _ = trained(algorithm, problem, 1)
    body, _ = trained(algorithm, problem, 1, reply="model")
    for name, before in algorithm.tensors(state).items():
        assert torch.equal(update.weights[name], body.weights[name] - before)
    assert update.numbers == {"n": 6, "reply": "update"}


def test_structured_updates_restrict_the_body_alone():
    """The uplink knows the names of what is sent; the head is trained without it."""
    problem, algorithm, seen = Halves(), FedRep(head_epochs=2, epochs=1), []

    def restrict(tensors):
        seen.append(set(tensors))
        tensors["0.weight"].zero_()

    at = dataclasses.replace(client(problem, 1), restrict=restrict)
    result, kept = algorithm.train(task_of(algorithm, algorithm.start(problem)), at)
    assert seen == [set(BODY)]
    assert not result.weights["0.weight"].any()
    assert result.weights["0.bias"].any()
    assert not same(kept.exact, head_of(problem))


# ---- what travels, and what stays


@pytest.mark.parametrize("head", [1, 3])
def test_only_the_body_travels_down_and_up(head):
    problem, algorithm = Tracking(), FedRep(head=head)
    state = algorithm.start(problem)
    first = {1: 7, 3: 4}[head]
    body = {name for name in problem.model().state_dict() if int(name[0]) < first}
    result, kept = trained(algorithm, problem, 1)
    down = algorithm.task(state, 1)
    for sent in (down, result):
        assert set(sent.weights) | set(sent.exact) == body
        assert not sent.features
        assert not sent.logits
    assert set(kept.exact) == set(problem.model().state_dict()) - body
    assert set(algorithm.tensors(state)) == body


def test_the_bytes_are_those_of_the_body():
    """2 * 8 + 8 of 42 numbers."""
    problem, algorithm = Halves(), FedRep()
    result, _ = trained(algorithm, problem, 1)
    for sent in (algorithm.task(algorithm.start(problem), 0), result):
        assert sum(each.nbytes for each in sent.weights.values()) == 4 * 24
        assert not sent.exact


def test_averaging_all_keys_would_give_a_new_client_the_averaged_head():
    """A client that never trained starts with the initial head, to the bit."""
    problem, algorithm = Halves(4), FedRep(head_epochs=3, final_head_epochs=0)
    state, kept = play(algorithm, problem, 3)
    model = Split(problem, 1)
    model.load(algorithm.task(state, 3), None)
    assert same(model.kept_tensors(), head_of(problem))
    mean = torch.stack([each.exact["2.weight"] for each in kept.values()]).mean(dim=0)
    assert not torch.allclose(mean, head_of(problem)["2.weight"], atol=1e-3)


def test_a_client_goes_on_with_the_head_that_it_kept():
    problem, algorithm = Halves(), FedRep(head_epochs=1, epochs=1, lr=1e-6)
    head = {"2.weight": torch.full((2, 8), 0.5), "2.bias": torch.tensor([3.0, 4.0])}
    _, kept = trained(algorithm, problem, 1, Payload(exact=head))
    for name, before in head.items():
        torch.testing.assert_close(kept.exact[name], before, atol=1e-4, rtol=0)
        assert not torch.equal(kept.exact[name], before)


def test_one_clients_head_is_never_anothers():
    """Heads that alias one tensor would all be the last one that was trained."""
    problem, algorithm = Halves(3), FedRep()
    alone = [trained(algorithm, problem, index)[1].exact for index in range(3)]
    first = {name: each.clone() for name, each in alone[0].items()}
    trained(algorithm, problem, 2, Payload(exact=alone[0]))
    assert same(alone[0], first)
    assert same(trained(algorithm, problem, 0)[1].exact, first)
    assert not same(alone[0], alone[1])


# ---- evaluation


def test_a_client_is_evaluated_with_a_head_refitted_to_its_training_data():
    problem, algorithm = Halves(), FedRep(lr=0.1, final_head_epochs=3, batch_size=2)
    state, kept = play(algorithm, problem, 2)
    at = client(problem, 1, local=kept[1])
    found = algorithm.evaluate_client(task_of(algorithm, state), at)
    module, data = problem.model(), problem.client(1)
    module.load_state_dict({**algorithm.tensors(state), **kept[1].exact})
    test = problem.client_test(1)
    before = problem.metrics(module(test.x), test.y)["accuracy"]
    optimizer = torch.optim.SGD(module[2].parameters(), lr=0.1)
    for x, y in batches(data, 2, 3, derive_rng(7, "head batches")):
        module.zero_grad()
        problem.loss(module(x), y).backward()
        optimizer.step()
    expected = problem.metrics(module(test.x), test.y)
    assert found["accuracy_before"] == before
    assert found["accuracy"] == expected["accuracy"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


class OtherTest(Halves):
    def client_test(self, index):
        test = super().client_test(index)
        return Examples(test.x + 100, 1 - test.y)

    def test(self):
        raise AssertionError("nobody looks at the common test data")


def test_nothing_is_adapted_on_test_data():
    """Only the training part decides: with other test data, the refitted head is the same."""
    algorithm, heads = FedRep(final_head_epochs=2), []
    for problem in (Halves(), OtherTest()):
        state = algorithm.start(problem)
        algorithm.evaluate_client(task_of(algorithm, state), client(problem, 1))
        heads.append(scratch_split(problem, 1, "cpu").kept_tensors())
        assert not same(heads[-1], head_of(problem))
    assert same(*heads)


def test_an_evaluation_changes_neither_what_is_kept_nor_the_next_result():
    problem, algorithm = Tracking(), FedRep(head=3)
    state, kept = play(algorithm, problem, 1)
    before = {name: each.clone() for name, each in kept[1].exact.items()}
    first = trained(algorithm, problem, 1, kept[1])
    algorithm.evaluate_client(task_of(algorithm, state), client(problem, 1, local=kept[1]))
    assert same(kept[1].exact, before)
    again = trained(algorithm, problem, 1, kept[1])
    assert same(first[0].weights, again[0].weights)
    assert same(first[1].exact, again[1].exact)


def test_a_new_client_fits_a_head_to_the_final_body():
    problem, algorithm = Halves(3), FedRep(lr=0.3, final_head_epochs=30)
    state, _ = play(algorithm, problem, 5)
    new = client(problem, 7)
    found = algorithm.personalise(state, 5, new)
    assert found == algorithm.evaluate_client(task_of(algorithm, state, version=5), new)
    assert found["accuracy"] >= 0.8 > found["accuracy_before"]


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
    problem, algorithm = Tracking(), FedRep(head=3)
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
    yield "no counters", {"exact": {}}, "missing"
    yield "not finite", {"weights": payload(state, torch.inf).weights}, "NaN or infinite"
    yield "too large", {"weights": payload(state, 1e35).weights}, "as large as"
    shaped = {**good.weights, "0.bias": torch.zeros(7)}
    yield "another shape", {"weights": shaped}, "shape"
    doubles = {name: each.double() for name, each in good.weights.items()}
    yield "another dtype", {"weights": doubles}, "as torch.float32"


@pytest.mark.parametrize("which", range(7))
def test_a_result_that_cannot_be_used_leaves_the_sum_as_it_was(which):
    problem, algorithm = Tracking(), FedRep()
    state = algorithm.start(problem)
    good = payload(state, 0.1, n=1, reply="update")
    gathered = algorithm.absorb(algorithm.gather(state), state, Result(0, 0, good), 2.0)
    before = gathered.total.clone(), gathered.counters.clone(), gathered.models
    _, change, message = list(bad(state, problem))[which]
    with pytest.raises(ResultError, match=message):
        algorithm.absorb(gathered, state, Result(1, 0, dataclasses.replace(good, **change)), 1.0)
    assert torch.equal(gathered.total, before[0])
    assert torch.equal(gathered.counters, before[1])
    assert gathered.models == before[2]


@pytest.mark.parametrize("head", [2, 3])
def test_a_head_that_leaves_nothing_to_share_is_refused(head):
    with pytest.raises(ProblemError, match="fewer than the model's 2 trained layers"):
        FedRep(head=head).start(Halves())


@pytest.mark.parametrize(
    ("problem", "message"), [(NoSequence(), "nn.Sequential"), (Tied(), "in common")]
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
    gathered, total = algorithm.gather(state), 0.0
    for vector, n, staleness, reply in results:
        weight = schedule.weight(n, staleness)
        sent = payload(state, vector, n=n, reply=reply)
        gathered = algorithm.absorb(gathered, state, Result(0, staleness, sent), weight)
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
                "algorithm": {"name": f"fedmq.algorithms.{algorithm}", "lr": 0.2},
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
    simulation = Simulation(setup, 2, tmp_path, 5, Chances(train_s=0.3, crash=0.1))
    assert simulation.run(10.0, 400.0)
    simulation.broker.ledger.close()
    trace = Trace(tmp_path)
    replay = Replay(trace)
    for _ in replay.steps():
        pass
    assert replay.core.version == 6
    assert model_digest(replay.core.tensors()) == model_digest(simulation.aggregator.core.tensors())
    for node in ("worker-0", "worker-1"):
        tasks = list(Retraining(trace, setup, node).all())
        assert tasks
        assert all(each.same for each in tasks)
