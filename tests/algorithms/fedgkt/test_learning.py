"""FedGKT learns: on real digits, halved to 14x14, with the small pair of networks."""

import random

import pytest
import torch
import torch.nn.functional as F

from fedmq.algorithms.base import Client, Payload, Result, Task
from fedmq.algorithms.fedgkt.algorithm import FedGKT
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.problems.image import ImageClassification
from fedmq.algorithms.rng import derive_seed
from fedmq.codecs.base import MAX_DECODED_BYTES
from fedmq.codecs.registry import decode, make_codec

pytestmark = pytest.mark.slow

CLIENTS, ROUNDS, SEED = 3, 3, 1
ALGORITHM = FedGKT(
    edge="tiny",
    server="tiny",
    lr=5e-3,
    batch_size=8,
    server_batch_size=16,
    server_epochs=2,
    seed=SEED,
)


class Digits(Problem):
    """390 training images and 500 test images of mnist-mini."""

    clients = CLIENTS
    shape, classes = (1, 14, 14), 10

    def __init__(self):
        self.whole = ImageClassification("mnist-mini", "2nn", CLIENTS, "iid", SEED, 390)
        self.parts = [self.halved(self.whole.client(k)) for k in range(CLIENTS)]
        self.tested = self.halved(self.whole.test(), 500)

    def halved(self, examples, most=None):
        return Examples(F.avg_pool2d(examples.x[:most], 2), examples.y[:most])

    def model(self):
        raise AssertionError("FedGKT brings its own")

    def client(self, index):
        return self.parts[index]

    def test(self):
        return self.tested

    def loss(self, outputs, y):
        return self.whole.loss(outputs, y)

    def metrics(self, outputs, y):
        return self.whole.metrics(outputs, y)


class Run:
    """Clients and a server, without anything between them but the features' codec."""

    def __init__(self, problem, codec="features(float32, none)", algorithm=ALGORITHM):
        self.problem, self.codec, self.algorithm = problem, make_codec(codec), algorithm
        self.state, self.local = algorithm.start(problem), {}
        self.feature_bytes = 0

    def client(self, k, version):
        seed = derive_seed(SEED, "client", k, version)
        return Client(k, self.problem, self.problem.client(k), self.local.get(k), seed)

    def upload(self, k, state):
        """Return what reaches the server when a client has worked on its task."""
        task = Task(state.version, self.algorithm.task(state, k))
        trained = self.algorithm.train(task, self.client(k, state.version))
        sent, self.local[k] = trained.payload, trained.local_state
        encoded = self.codec.encode(sent.features, 0)
        self.feature_bytes += encoded.nbytes
        features = decode(encoded, MAX_DECODED_BYTES)
        return Payload(numbers=sent.numbers, features=features, logits=sent.logits)

    def commit(self, results):
        gathered = self.algorithm.new_accumulator(self.state)
        for k, payload in results.items():
            result = Result(k, 0, payload, len(payload.features["ids"]))
            gathered = self.algorithm.accumulate(gathered, self.state, result, 1.0)
        self.state = self.algorithm.commit(self.state, gathered, 1.0)

    def synchronous(self):
        for _ in range(ROUNDS):
            self.commit({k: self.upload(k, self.state) for k in range(CLIENTS)})
        return self

    def asynchronous(self):
        """As many uploads, whoever comes next; each client is answered at once."""
        order = random.Random(SEED)  # noqa: S311 - an order, not a secret
        started = [self.state] * CLIENTS
        for _ in range(ROUNDS * CLIENTS):
            k = order.randrange(CLIENTS)
            self.commit({k: self.upload(k, started[k])})
            started[k] = self.state
        return self

    def metrics(self):
        task = Task(self.state.version, self.algorithm.evaluation_task(self.state))
        each = [self.algorithm.evaluate_client(task, self.client(k, 0)) for k in range(CLIENTS)]
        return {name: sum(one[name] for one in each) / CLIENTS for name in each[0]}


@pytest.fixture(scope="module")
def problem():
    torch.set_num_threads(1)
    return Digits()


@pytest.fixture(scope="module")
def synchronous(problem):
    return Run(problem).synchronous()


def test_the_stack_is_far_above_edges_that_train_alone(problem, synchronous):
    """The same networks and tasks, without answers."""
    alone = Run(problem)
    for version in range(ROUNDS):
        for k in range(CLIENTS):
            alone.local[k] = ALGORITHM.train(
                Task(version, Payload()), alone.client(k, version)
            ).local_state
    metrics = synchronous.metrics()
    assert metrics["accuracy"] >= 0.6
    assert metrics["accuracy"] >= alone.metrics()["edge_accuracy"] + 0.2


def test_asynchronous_uploads_lead_nearly_as_far(problem, synchronous):
    asynchronous = Run(problem).asynchronous()
    assert asynchronous.state.server.steps == pytest.approx(synchronous.state.server.steps, abs=40)
    assert asynchronous.metrics()["accuracy"] >= synchronous.metrics()["accuracy"] - 0.08


def test_features_as_int8_are_a_quarter_of_the_bytes_and_nearly_as_good(problem, synchronous):
    coarse = Run(problem, "features(int8, none)").synchronous()
    assert coarse.feature_bytes / synchronous.feature_bytes == pytest.approx(0.25, abs=0.01)
    assert abs(coarse.metrics()["accuracy"] - synchronous.metrics()["accuracy"]) <= 0.06
    kept = coarse.state.store.uploads[0].features
    assert kept.packed.dtype == torch.uint8
