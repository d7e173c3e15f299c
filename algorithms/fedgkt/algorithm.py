"""FedGKT: He, Annavaram, Avestimehr,
"Group Knowledge Transfer: Federated Learning of Large CNNs at the Edge", NeurIPS 2020.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmq.algorithms.base import Algorithm, Client, Payload, Result, Task, TrainResult
from fedmq.algorithms.errors import ProblemError, ResultError
from fedmq.algorithms.fedgkt.feature_store import FeatureStore, MemoryLimit, Upload
from fedmq.algorithms.fedgkt.mutual_training import Batch, NetworkState, Objective, Optimizer, fit
from fedmq.algorithms.fedgkt.networks import (
    shuffled,
    stack_metrics,
    teacher_of,
    through_edge,
    through_server,
)
from fedmq.algorithms.fedgkt.uploads import TEST, Expected
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.problems.resnets import EDGES, SERVERS, Shape, feature_shape, initialised
from fedmq.algorithms.rng import derive_rng, derive_seed
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.layout import Layout, expect_tensor
from fedmq.algorithms.toolkit.states import DERIVED, load_state, save_state, take
from fedmq.codecs.text import shorten


@dataclass(frozen=True)
class GktState:
    """One version of the server.

    layout: layout of the server network. server: its weights, and its optimizer's moments.
    store: the last upload of each client.
    answers: by client, the server's logits for the samples of its upload, float32
        [n, classes], in the order of its ids.
    version: number of versions before it.
    features, classes: shape of a sample's feature maps, number of classes.
    """

    layout: Layout
    server: NetworkState
    store: FeatureStore = field(metadata=DERIVED)
    answers: Mapping[int, Tensor] = field(metadata=DERIVED)
    version: int
    features: Shape = field(metadata=DERIVED)
    classes: int = field(metadata=DERIVED)


@dataclass
class GktAccumulator:
    """The newest uploads for one version, by client."""

    fresh: dict[int, Upload] = field(default_factory=dict)


@dataclass(frozen=True)
class FedGKT(Algorithm[GktState, GktAccumulator]):
    """Small networks at the edge and a large one at the server teach each other.

    Each client trains an extractor f_e and a classifier f_c, and sends H = f_e(x), f_c(H) and
    the labels of all of its samples. The server trains f_s on these and returns f_s(H) by
    sample. The final model is f_s(f_e(x)).

    edge: f_e and f_c, a key of `EDGES`. server: f_s, a key of `SERVERS`.
    optimizer, lr, momentum, weight_decay, batch_size, epochs: of a client's training; the
        optimizer's moments are kept from task to task. Momentum is SGD's. The defaults are the
        paper's: Adam with lr 0.001, weight_decay 1e-4 (momentum 0.9 for SGD), batch_size 64 and
        one pass (epochs).
    server_lr, server_batch_size: of the server's training; None is the clients'.
    server_epochs: E_s, passes at each commit; 20 in the paper.
    effort: length of the server's passes: as many samples as have arrived for this version
        (``fresh``), or as the server holds (``held``). Both draw from all samples that it holds,
        and they are equal if every client takes part in every round.
    alpha: weight of KL relative to CE. temperature: T.
    distil_server: the server learns from the edges' logits. distil_edge: the edges learn from
        the server's; if False, none are sent.
    max_samples: largest number of a client's samples; it limits the size of an upload.
    memory_mb: limit of feature maps in the server's memory, in 2^20 bytes; further ones go to
        temporary files in the folder TMPDIR.
    server_device: torch device of the server's training; exact replay is promised for a CPU.
    test_on: ``all``: a client evaluates on all test data; ``own``: on its own test data.
    test_features: clients also send the feature maps and labels of their test data, as in the
        paper, and the evaluator evaluates; otherwise each client evaluates.
    seed: seed of the networks' first values and the order of the server's samples; None is the
        run's.

    Adam is the amsgrad variant. The weights of a schedule have no effect: the paper weighs no
    sample by its age.
    """

    name: ClassVar[str] = "fedgkt"
    schedules: ClassVar[frozenset[str]] = frozenset({"rounds", "buffered", "stream"})
    task_per_client: ClassVar[bool] = True
    commits_in_background: ClassVar[bool] = True
    fixed_reply: ClassVar[Literal["update"]] = "update"
    server_hparams: ClassVar[frozenset[str]] = frozenset(
        {
            "server",
            "server_lr",
            "server_batch_size",
            "server_epochs",
            "effort",
            "distil_server",
            "memory_mb",
            "server_device",
        }
    )

    edge: Literal["resnet8", "tiny"] = "resnet8"
    server: Literal["resnet55", "resnet109", "resnet10", "tiny"] = "resnet55"
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    batch_size: Annotated[int, Field(ge=1)] = 64
    epochs: Annotated[int, Field(ge=1)] = 1
    server_lr: Annotated[float, Field(gt=0)] | None = None
    server_batch_size: Annotated[int, Field(ge=1)] | None = None
    server_epochs: Annotated[int, Field(ge=1)] = 1
    effort: Literal["fresh", "held"] = "fresh"
    alpha: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 3.0
    distil_server: bool = True
    distil_edge: bool = True
    max_samples: Annotated[int, Field(ge=1, le=10**7)] = 10_000
    memory_mb: Annotated[int, Field(ge=0)] = 1024
    server_device: str = "cpu"
    test_on: Literal["all", "own"] = "all"
    test_features: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    # ---- at the aggregator

    def start(self, problem: Problem) -> GktState:
        """Return the first server network, an empty store and no answers."""
        features = feature_shape(self.edge, problem.shape)
        model = self._server(features, problem.classes)
        return GktState(
            model.layout,
            self._optimizer(at_server=True).first(model),
            FeatureStore(MemoryLimit(self.memory_mb << 20)),
            {},
            0,
            features,
            problem.classes,
        )

    def task(self, state: GktState, client: int) -> Payload:
        """Return the server's logits by sample id; empty before the client's first upload."""
        answer = state.answers.get(client)
        if answer is None:
            return Payload()
        return Payload(logits={"logits": answer, "ids": state.store.uploads[client].ids})

    @property
    def evaluated_by(self) -> Literal["model", "clients"]:  # type: ignore[override] # follows from a field
        """Return ``model`` if clients send feature maps of their test data, else ``clients``."""
        return "model" if self.test_features else "clients"

    def evaluation_task(self, state: GktState, client: int = 0) -> Payload:
        """Return the server network; with ``test_features`` also the uploaded test data."""
        exact = dict(self.tensors(state))
        if self.test_features:
            for index, upload in state.store.uploads.items():
                if upload.test is not None:
                    exact |= {
                        f"{index}.test.features": upload.test.features[:],
                        f"{index}.test.labels": upload.test.labels,
                        f"{index}.test.logits": upload.test.logits,
                    }
        return Payload(exact=exact)

    def result_bytes(self, state: GktState) -> int:
        """Return the size of ``max_samples`` feature maps with ids, labels and logits, in bytes."""
        return self._expected(state).nbytes

    def new_accumulator(self, state: GktState) -> GktAccumulator:
        """Return an empty accumulator."""
        return GktAccumulator()

    def accumulate(
        self,
        accumulator: GktAccumulator,
        state: GktState,
        result: Result,
        weight: float,
    ) -> GktAccumulator:
        """Replace a client's upload."""
        upload = self._expected(state).upload(
            result.payload, result.num_examples, state.store.limit
        )
        accumulator.fresh[result.client] = upload
        return accumulator

    def commit(self, state: GktState, accumulator: GktAccumulator, divisor: float) -> GktState:
        """Train f_s on CE + alpha T^2 KL(p_c || p_s), then compute the answers.

        The answers are logits of f_s after its training, in eval mode: for the clients with an
        upload for this version, or for all with effort ``held``.
        """
        store = state.store.updated(accumulator.fresh)
        renewed = store.uploads if self.effort == "held" else accumulator.fresh
        model = self._server(state.features, state.classes)
        samples = self.server_epochs * sum(len(each) for each in renewed.values())
        alpha = self.alpha if self.distil_server else 0.0
        server = fit(
            model,
            state.server,
            self._optimizer(at_server=True),
            Objective(alpha, self.temperature),
            self._held_batches(store, samples, state.version),
        )
        answers = dict(state.answers)
        if self.distil_edge:
            for client in sorted(renewed):
                answers[client] = through_server(model, store.uploads[client].features)
        return dataclasses.replace(
            state, server=server, store=store, answers=answers, version=state.version + 1
        )

    def save(self, state: GktState) -> Payload:
        """Return the server network, its optimizer's moments, the store and the answers."""
        saved = super().save(state)
        exact = {**saved.exact}
        exact |= {f"store.{name}": each for name, each in state.store.save().items()}
        exact |= {f"answers.{client}": each for client, each in state.answers.items()}
        return dataclasses.replace(saved, exact=exact)

    def load(self, problem: Problem, saved: Payload) -> GktState:
        """Return a saved state; its uploads are checked like new ones."""
        first, exact = self.start(problem), dict(saved.exact)
        store = FeatureStore.load(take(exact, "store."), first.store.limit)
        self._expected(first).check_store(store, problem.clients)
        answers = {}
        for name, tensor in take(exact, "answers.").items():
            client = int(name) if name.isdecimal() else -1
            if client not in store.uploads:
                raise ResultError(f"expected an answer to a client, got {shorten(name)}")
            shape = (len(store.uploads[client]), first.classes)
            expect_tensor("answers", tensor, torch.float32, shape)
            answers[client] = tensor.clone()
        state = load_state(first, dataclasses.replace(saved, exact=exact))
        return dataclasses.replace(state, store=store, answers=answers)

    def tensors(self, state: GktState) -> Mapping[str, Tensor]:
        """Return the server network; the edges' networks stay at the clients."""
        layout, server = state.layout, state.server
        return layout.views(server.weights) | layout.counter_views(server.counters)

    def _held_batches(self, store: FeatureStore, samples: int, version: int) -> Iterator[Batch]:
        """Yield ``samples`` samples of the store in batches; each pass has a new order."""
        rng = derive_rng(self.seed or 0, "fedgkt", version)
        size = self.server_batch_size or self.batch_size
        for rows in shuffled(len(store), samples, size, rng):
            yield Batch(*store.read(rows))

    # ---- at the client

    def train(self, task: Task, client: Client) -> TrainResult:
        """Train f_e and f_c on CE + alpha T^2 KL(p_s || p_c), then send H, z_c and y.

        H and z_c are computed from the training images, in eval mode. KL is omitted for samples
        without an answer of the server, as in the first round.
        """
        data = client.data
        n = len(data)
        if n > self.max_samples:
            raise ProblemError(
                f"client {client.index}: expected at most {self.max_samples} samples, got {n}; "
                "raise algorithm.max_samples"
            )
        model, trained = self._edge_of(client)
        teacher = teacher_of(task.payload.logits, n, client.problem.classes)
        rng = derive_rng(client.seed, "batches")
        order = shuffled(n, n * self.epochs, self.batch_size, rng)
        batches = (
            Batch(data.x[rows], data.y[rows], None if teacher is None else teacher[rows])
            for rows in map(torch.from_numpy, order)
        )
        objective = Objective(self.alpha, self.temperature)
        trained = fit(model, trained, self._optimizer(at_server=False), objective, batches)
        features, logits = through_edge(model, data)
        ids = torch.arange(n)
        exact = {}
        if self.test_features:
            test = self._test_data(client)
            test_features, test_logits = through_edge(model, test)
            exact = dict(zip(TEST, (test_features, test.y, test_logits), strict=True))
        payload = Payload(
            exact=exact,
            features={"features": features, "ids": ids, "labels": data.y},
            logits={"logits": logits, "ids": ids},
        )
        return TrainResult(payload, n, save_state(trained))

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return the metrics of f_s(f_e(x)), and as ``edge_*`` those of f_c(f_e(x))."""
        edge, trained = self._edge_of(client)
        edge.load(trained.weights, trained.counters)
        test = self._test_data(client)
        server = self._received(task, client.problem, client.device)
        return stack_metrics(client.problem, server, *through_edge(edge, test), test.y)

    def personalise(self, state: GktState, version: int, client: Client) -> Mapping[str, float]:
        """Return a new client's metrics after one task of training its edge, without answers."""
        local = self.train(Task(version, Payload()), client).local_state
        kept = dataclasses.replace(client, local=local)
        payload = Payload(exact=self.tensors(state))
        return self.evaluate_client(Task(version, payload), kept)

    # ---- at the evaluator

    def evaluate(self, task: Task, problem: Problem, device: str) -> Mapping[str, float]:
        """Return the metrics of the clients' uploaded test data.

        Before the first upload, those of the first networks on the problem's test data.
        """
        exact = task.payload.exact
        clients = [name[: -len(".test.labels")] for name in exact if name.endswith(".test.labels")]
        server = self._received(task, problem, device)
        if not clients:
            test = problem.test()
            edge = self._edge(problem.shape, problem.classes, device)
            return stack_metrics(problem, server, *through_edge(edge, test), test.y)
        features, logits, y = (
            torch.cat([exact[f"{client}.test.{what}"] for client in clients])
            for what in ("features", "logits", "labels")
        )
        return stack_metrics(problem, server, features, logits, y)

    # ---- networks

    def _edge(self, shape: Shape, classes: int, device: str) -> FlatModel:
        """Return f_e and f_c with the same first values for all clients, as in the paper's code."""
        seed = derive_seed(self.seed or 0, "fedgkt edge")
        return FlatModel(initialised(EDGES[self.edge], seed, shape, classes), device)

    def _edge_of(self, client: Client) -> tuple[FlatModel, NetworkState]:
        """Return a client's f_e and f_c, and the values to load into them."""
        problem, optimizer = client.problem, self._optimizer(at_server=False)
        model = self._edge(problem.shape, problem.classes, client.device)
        first = optimizer.first(model)
        return model, first if client.local is None else load_state(first, client.local)

    def _server(self, features: Shape, classes: int, device: str = "") -> FlatModel:
        """Return f_s with its first values."""
        seed = derive_seed(self.seed or 0, "fedgkt server")
        module = initialised(SERVERS[self.server], seed, features, classes)
        return FlatModel(module, device or self.server_device)

    def _received(self, task: Task, problem: Problem, device: str) -> FlatModel:
        """Return the f_s in the payload of an evaluation."""
        features = feature_shape(self.edge, problem.shape)
        model, exact = self._server(features, problem.classes, device), task.payload.exact
        layout = model.layout
        weights = layout.flatten({slot.name: exact[slot.name] for slot in layout.weights})
        counters = {slot.name: exact[slot.name] for slot in layout.counters}
        model.load(weights, layout.flatten_counters(counters))
        return model

    def _expected(self, state: GktState) -> Expected:
        return Expected(state.features, state.classes, self.max_samples, self.test_features)

    def _optimizer(self, *, at_server: bool) -> Optimizer:
        lr = self.server_lr if at_server and self.server_lr is not None else self.lr
        return Optimizer(self.optimizer, lr, self.momentum, self.weight_decay)

    def _test_data(self, client: Client) -> Examples:
        if self.test_on == "own":
            return client.problem.client_test(client.index)
        return client.problem.test()
