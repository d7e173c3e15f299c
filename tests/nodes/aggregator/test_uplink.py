"""What clients send up through a pipeline: structures they train in, and rests they remember."""

import random

import pytest
import torch

from fedmq.algorithms.base import Payload, Task
from fedmq.algorithms.toolkit.returned import result_of
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.messages.payloads import unpack
from fedmq.nodes.replay.workers import Retraining
from fedmq.nodes.run.config import build
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.simulation.virtual_run import Chances, Simulation
from fedmq.nodes.worker.client_state import ClientStateStore
from fedmq.nodes.worker.core import Failed, SaveClientState, Saved, Train, Trained, Worker
from tests.algorithms.fleet import Fleet, changed
from tests.sim.recorded import check_recorded_run

pytestmark = pytest.mark.slow

SCHEDULES = {
    "rounds": {"name": "rounds", "fraction": 0.6},
    "buffered": {"name": "buffered", "size": 2, "concurrency": 3},
    "stream": {"name": "stream", "concurrency": 2},
}
UPDATES_ONLY = ["topk(0.1)", "lowrank(2)", "randommask(0.1)", "subsample(0.5)"]
FORMS = {
    "plain": {"name": "fedavg"},
    "momentum": {"name": "fedavg", "momentum": 0.9},
    "decay": {"name": "fedavg", "momentum": 0.5, "weight_decay": 0.1},
    "proximal": {"name": "fedprox", "mu": 0.3, "momentum": 0.9, "weight_decay": 0.1},
    "dropout": {"name": "feddropout", "keep": 0.5, "momentum": 0.9},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Nothing here is large enough for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def setup_of(up="raw", down="raw", schedule="buffered", algorithm=None, problem="Hidden", **run):
    return set_up(
        build(
            {
                "run": {"versions": 3, "evaluate_every": 0, **run},
                "problem": {"name": f"tests.algorithms.layered:{problem}", "clients": 4},
                "algorithm": {"name": "fedavg", "lr": 0.2, "epochs": 3, **(algorithm or {})},
                "schedule": SCHEDULES[schedule],
                "codec": {"up": up, "down": down},
            }
        )
    )


def first_task(setup):
    """Return the first task, and its client."""
    message, data = Fleet(setup).tasks[0]
    return Delivery(10, 0.0, message, dict(enumerate(data))), message.body["client"]


def worker_of(setup, client, kept=None):
    return Worker(setup, "run", f"w{client}", [(client, client)], kept)


def named(delivery, seq, name):
    return Delivery(seq, 1.0, changed(delivery.message, id=name), delivery.inline)


def trained(setup, train):
    found = setup.algorithm.train(train.task, train.at(setup, "cpu"))
    return Trained(*result_of(found, "train"), 0.5)


def flat(tensors):
    return torch.cat([each.reshape(-1) for each in tensors.values()])


def sent(post):
    return unpack(post.message, post.data.__getitem__)


# ---- structured updates


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", ["lowrank(2)", "lowrank(1)", "randommask(0.1)", "randommask(0.5)"])
def test_what_is_sent_of_a_structured_update_is_all_of_it(spec, form):
    """Konecny et al. 2016, section 3: trained in the structure, not projected at the end."""
    setup = setup_of(f"limit(0) | {spec}", algorithm=FORMS[form])
    task, client = first_task(setup)
    worker = worker_of(setup, client)
    (train,) = worker.handle(task)
    done = trained(setup, train)
    (post,) = worker.handle(done)
    meant, found = flat(done.payload.weights), flat(sent(post).weights)
    assert meant.norm() > 1e-3
    assert (found - meant).norm() <= 1e-4 * meant.norm()
    free = setup_of("raw", algorithm=FORMS[form])
    (train,) = worker_of(free, client).handle(task)
    assert train.at(free, "cpu").project is None
    other = flat(trained(free, train).payload.weights)
    assert (other - meant).norm() > 0.05 * other.norm()
    assert sum(each.nbytes for each in map(memoryview, post.data)) < 4 * meant.numel()


def test_the_structure_is_another_one_for_each_task_and_client():
    setup = setup_of("limit(0) | randommask(0.3)")
    task, client = first_task(setup)
    masks = []
    for seq, name in enumerate(["aggregator/1", "aggregator/2", "aggregator/1"]):
        worker = worker_of(setup, client)
        (train,) = worker.handle(named(task, seq, name))
        masks.append(flat(trained(setup, train).payload.weights) != 0)
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_small_layers_are_trained_in_full():
    setup = setup_of("limit(30) | randommask(0.2)")
    task, client = first_task(setup)
    (train,) = worker_of(setup, client).handle(task)
    weights = trained(setup, train).payload.weights
    zeros = {name: float((each == 0).float().mean()) for name, each in weights.items()}
    assert zeros.pop("2.bias") < 0.6
    assert zeros.pop("0.bias") < 0.6  # but for units that never fire
    assert min(zeros.values()) > 0.6


@pytest.mark.parametrize("spec", ["lowrank(1)", "randommask(0.5)", "lowrank(1) | quantize(8, 16)"])
@pytest.mark.parametrize("schedule", ["rounds", "buffered"])
def test_a_fleet_learns_with_structured_updates(spec, schedule):
    fleet = Fleet(setup_of(f"limit(0) | {spec}", schedule=schedule, versions=60))
    before = accuracy(fleet)
    fleet.run(random.Random(1))  # noqa: S311 - an order, not a secret
    assert fleet.counts[1:] == (0, 0, 0)
    assert accuracy(fleet) >= max(0.85, before)


def accuracy(fleet):
    algorithm, problem = fleet.setup.algorithm, fleet.setup.problem
    task = Task(fleet.core.version, algorithm.save(fleet.core.state))
    return algorithm.evaluate(task, problem, "cpu")["accuracy"]


# ---- error feedback

TOPK = "limit(0) | topk(0.05)"


def kept_and_posted(setup, worker, delivery):
    """Do a task; return the state to save, the post, and what was trained."""
    (train,) = worker.handle(delivery)
    assert isinstance(train, Train)
    done = trained(setup, train)
    (keep,) = worker.handle(done)
    assert isinstance(keep, SaveClientState)
    (post,) = worker.handle(Saved(keep.kept))
    assert isinstance(post, PostMessage)
    return keep.kept, post, done.payload


def test_what_is_left_out_is_kept_and_sent_with_the_next_task():
    setup, kept = setup_of(TOPK), ClientStateStore()
    task, client = first_task(setup)
    worker = worker_of(setup, client, kept)
    meant, total = torch.zeros(()), torch.zeros(())
    for number in range(1, 6):
        delivery = named(task, number, f"aggregator/{number}")
        before = kept.get(client)
        state, post, payload = kept_and_posted(setup, worker, delivery)
        kept.put(client, state)
        left = flat(before.memory.weights) if before else torch.zeros(82)
        found, update = flat(sent(post).weights), flat(payload.weights)
        assert found.count_nonzero() <= 4
        at = found.nonzero().flatten()
        assert torch.equal(found[at], (update + left)[at])
        assert torch.equal(flat(state.memory.weights), update + left - found)
        assert state.local is None
        meant, total = meant + update, total + found
        assert torch.allclose(total + flat(state.memory.weights), meant, atol=1e-5)


def test_the_rest_survives_a_worker_that_starts_again(tmp_path):
    setup = setup_of(TOPK)
    task, client = first_task(setup)
    posts = []
    for folder in (None, tmp_path / "state"):
        kept, results = ClientStateStore(folder), []
        for number in range(1, 4):
            if folder is not None:
                kept = ClientStateStore(folder)  # started again
            delivery = named(task, number, f"aggregator/{number}")
            state, post, _ = kept_and_posted(setup, worker_of(setup, client, kept), delivery)
            kept.put(client, state)
            results.append([bytes(each) for each in post.data])
        (again,) = worker_of(setup, client, ClientStateStore(folder) if folder else kept).handle(
            delivery
        )
        assert isinstance(again, PostMessage)
        assert [bytes(each) for each in again.data] == results[-1]
        posts.append(results)
    assert posts[0] == posts[1]
    assert posts[0][0] != posts[0][1] != posts[0][2]


@pytest.mark.parametrize("way", ["failed", "dropped", "not finite"])
def test_a_failed_task_leaves_the_rest_as_it_was(way):
    setup, kept = setup_of(TOPK), ClientStateStore()
    task, client = first_task(setup)
    state, _, payload = kept_and_posted(setup, worker_of(setup, client, kept), task)
    kept.put(client, state)
    if way == "dropped":
        dropping = setup.config.worker.model_copy(update={"drop": 1.0})
        config = setup.config.model_copy(update={"worker": dropping})
        setup = type(setup)(**{**vars(setup), "config": config})
    worker = worker_of(setup, client, kept)
    (train,) = worker.handle(named(task, 11, "aggregator/11"))
    done = trained(setup, train)
    if way == "not finite":
        bad = {name: each * float("nan") for name, each in payload.weights.items()}
        done = Trained(Payload(bad, payload.exact, payload.numbers), None, 0.1)
    actions = worker.handle(Failed("no memory") if way == "failed" else done)
    assert not [each for each in actions if isinstance(each, SaveClientState)]
    assert actions[-1].message.kind == "failed"
    assert kept.get(client) is state


def test_with_other_codecs_nothing_is_kept():
    setup = setup_of("limit(0) | hadamard(16) | quantize(2, 16)")
    task, client = first_task(setup)
    worker = worker_of(setup, client)
    (train,) = worker.handle(task)
    assert [type(each) for each in worker.handle(trained(setup, train))] == [PostMessage]


class Forgetting(Fleet):
    """Without the memory."""

    def keep(self, client, kept):
        """Save nothing."""
        return kept


@pytest.mark.parametrize("spec", ["topk(0.05)", "topk(0.1) | quantize(8, 4) | entropy"])
@pytest.mark.parametrize("schedule", ["rounds", "buffered"])
def test_a_fleet_learns_from_the_largest_changes(spec, schedule):
    fleet = Fleet(setup_of(f"limit(0) | {spec}", schedule=schedule, versions=80))
    before = accuracy(fleet)
    fleet.run(random.Random(1))  # noqa: S311
    assert fleet.counts[1:] == (0, 0, 0)
    assert accuracy(fleet) >= max(0.85, before)


def test_the_rest_counts():
    """The same fleet without memory has sent something else."""
    ends = []
    for kind in (Forgetting, Fleet):
        fleet = kind(setup_of(TOPK, schedule="rounds", versions=10))
        fleet.run()
        ends.append(model_digest(fleet.core.tensors()))
    assert ends[0] != ends[1]


# ---- set-up


@pytest.mark.parametrize("spec", ["topk(0.1)", "lowrank(2)", "randommask(0.1) | quantize(4)"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_codecs_for_updates_do_not_go_down(spec, schedule):
    with pytest.raises(ConfigError, match=r"^codec\.down: .* is for updates of clients") as caught:
        setup_of(down=spec, schedule=schedule)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", UPDATES_ONLY)
def test_whoever_sends_models_sends_all_of_them(spec):
    with pytest.raises(ConfigError, match=r"^codec\.up: under schedule stream clients send models"):
        setup_of(spec, schedule="stream")
    for schedule in ("rounds", "buffered"):
        setup_of(spec, schedule=schedule)


def test_a_pipeline_that_is_none_is_one_sentence_with_its_key():
    for direction in ("up", "down"):
        for spec in ("quantize(9)", "entropy | quantize(1)", "hadamrd"):
            with pytest.raises(ConfigError, match=rf"^codec\.{direction}: ") as caught:
                setup_of(**{direction: spec})
            assert "\n" not in str(caught.value)


# ---- whole runs

BOTH = "limit(0) | hadamard(64) | quantize(4)"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spec", [BOTH, "limit(0) | kashin(64) | quantize(6, 64) | entropy"])
def test_every_schedule_runs_with_coarse_numbers_down_and_up(schedule, spec):
    fleet = Fleet(setup_of(spec, spec, schedule, versions=40))
    before = accuracy(fleet)
    codecs = {group["codec"] for message, _ in fleet.tasks for group in message.body["groups"]}
    assert codecs == {fleet.setup.down.wire_name}
    fleet.run(random.Random(1))  # noqa: S311
    assert fleet.counts[1:] == (0, 0, 0)
    assert accuracy(fleet) >= max(0.8, before)


@pytest.mark.parametrize(
    ("schedule", "up", "problem"),
    [
        ("rounds", BOTH, "Images"),
        ("buffered", BOTH, "Images"),
        ("stream", BOTH, "Images"),
        ("rounds", "limit(0) | topk(0.1)", "Hidden"),
        ("buffered", "limit(0) | topk(0.1) | quantize(5, 8)", "Hidden"),
        ("rounds", "limit(0) | lowrank(2) | entropy", "Hidden"),
        ("buffered", "limit(0) | randommask(0.5) | hadamard(16) | quantize(4, 16)", "Hidden"),
    ],
)
def test_a_recorded_run_replays_to_the_bit(schedule, up, problem, tmp_path):
    """With crashes; the aggregator's fold, then every task of every node."""
    setup = setup_of(
        up, BOTH, schedule, problem=problem, versions=8, evaluate_every=4, checkpoint_s=1.0
    )
    check_recorded_run(setup, tmp_path, 8, ("worker-0", "worker-1", "evaluator"))


def test_one_task_of_a_run_with_memory_is_trained_again_to_the_bit(tmp_path):
    """Its rest comes from the tasks before it."""
    setup = setup_of(TOPK, schedule="buffered", versions=12)
    simulation = Simulation(setup, 2, tmp_path, 6, Chances(train_s=0.3))
    assert simulation.run(10.0, 400.0)
    simulation.close()
    trace = Trace(tmp_path)
    names = [each.message.re for each in Retraining(trace, setup, "worker-0").train_all()]
    assert len(names) > 3
    assert Retraining(trace, setup, "worker-0").train_one(names[-1]).matches


@pytest.mark.parametrize(
    "codec",
    [
        "limit@1(0) | hadamard@1(32) | quantize@1(4, 4096)",
        "limit@1(0) | quantize@1(5, 4096)",
        "limit@1(0) | lowrank@1(1)",
        "limit@1(0) | topk@1(1.0)",
        "entropy@1(3)",
        "quantize@1(4)@1",
    ],
)
def test_a_result_under_another_name_is_refused_or_read_and_the_run_goes_on(codec):
    fleet = Fleet(setup_of(BOTH, versions=3))
    message, data = fleet.work(*fleet.tasks.pop(0))
    groups = [dict(each) for each in message.body["groups"]]
    groups[0]["codec"] = codec
    number = fleet.hear(changed(message, body={"groups": groups}), data)
    if "hadamard" not in codec:
        assert fleet.done_with[number]
        assert fleet.counts[2] == 1
    fleet.run()
    assert fleet.core.version == 3
