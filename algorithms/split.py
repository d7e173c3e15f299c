"""A model in two: a body that all clients share, and a head that each keeps to itself."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmq.algorithms.base import Client, Payload, Task
from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.fedavg import FedAvg, ModelState, batches, cuda_devices, metrics_on, restrict
from fedmq.algorithms.model import FlatModel, Layout
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.rng import derive_rng

_BATCH = 500
"""Examples that go through a model at once where nothing is trained."""

Part = Literal["head", "body", "both"]


class Split:
    """A working copy of a problem's model, cut in two.

    Attributes:
        whole: the model; its weights are those of `body` and `head`.
        body, head: modules; the head takes what the body returns.
        shared, kept: layouts of the body's tensors and of the head's, with the whole's names.

    Raises:
        ProblemError: the model cannot be cut there.
    """

    def __init__(self, problem: Problem, head: int, device: str = "cpu") -> None:
        module = problem.model()
        self.body, self.head = cut(module, head)
        self.whole = FlatModel(module, device)
        self.shared, self.kept = Layout.of(self.body), Layout.of(self.head)
        # Parameters go by the layers' order: the body's gradients come first, then the head's.
        self._border = self.shared.parameters
        if self._border + self.kept.parameters != self.whole.layout.parameters:
            raise ProblemError("the model's body and head have a parameter in common")
        self._first = self.kept_tensors()

    def load(self, body: Payload, local: Payload | None) -> Tensor:
        """Load a body, and the head that a client kept or else the problem's first one.

        Returns the body as it came, float32 [shared.dim].
        """
        vector = self.shared.flatten(body.weights)
        tensors = self.shared.views(vector)
        tensors |= self.shared.counter_views(self.shared.flatten_counters(body.exact))
        head = self._first if local is None else local.exact
        weights = {slot.name for slot in self.kept.weights}
        own = self.kept.flatten({name: head[name] for name in head if name in weights})
        counters = {name: head[name] for name in head if name not in weights}
        tensors |= self.kept.views(own)
        tensors |= self.kept.counter_views(self.kept.flatten_counters(counters))
        whole = self.whole.layout
        self.whole.load(
            whole.flatten({slot.name: tensors[slot.name] for slot in whole.weights}),
            whole.flatten_counters({slot.name: tensors[slot.name] for slot in whole.counters}),
        )
        return vector

    def body_vector(self) -> Tensor:
        """Return a copy of the body's weights, float32 [shared.dim], on the CPU."""
        views = self.whole.layout.views(self.whole.weights)
        pieces = [views[slot.name].reshape(-1) for slot in self.shared.weights]
        return torch.cat(pieces).to("cpu")

    def body_counters(self) -> dict[str, Tensor]:
        """Return a copy of the body's integer buffers, by name."""
        counters = self.whole.layout.counter_views(self.whole.read_counters())
        return {slot.name: counters[slot.name] for slot in self.shared.counters}

    def kept_tensors(self) -> dict[str, Tensor]:
        """Return a copy of all tensors of the head by name, on the CPU."""
        whole = self.whole.layout
        views = whole.views(self.whole.weights) | whole.counter_views(self.whole.read_counters())
        return {
            slot.name: views[slot.name].detach().to("cpu", copy=True)
            for slot in (*self.kept.weights, *self.kept.counters)
        }

    def fit(
        self, part: Part, data: Examples, epochs: int, algorithm: FedAvg, client: Client
    ) -> None:
        """Run epochs of SGD on a part; the rest stays as it is, to the bit.

        Only the part's own slice of the weights is stepped, so that no momentum and no weight
        decay can reach the rest. What is frozen is in evaluation mode: its running statistics
        stay as well, and its dropout is off. Momentum starts from zero.

        Args:
            part: what is trained.
            data: x float32 [n, ...], y int64 [n], on the model's device.
            epochs: passes over the data; 0 does nothing.
            algorithm: whose lr, batch_size, momentum and weight_decay.
            client: whose loss, randomness and structured updates.
        """
        if not epochs:
            return
        start, end = {"head": (self._border, None), "body": (0, self._border), "both": (0, None)}[
            part
        ]
        trained, gradient = self.whole.trained[start:end], self.whole.gradient[start:end]
        forward: nn.Module = self.whole.module
        self.body.train(part != "head")
        self.head.train(part != "body")
        if part == "head":
            # A frozen body says the same of an example in every epoch.
            data, forward = Examples(outputs(self.body, data.x), data.y), self.head
        velocity = torch.zeros_like(gradient) if algorithm.momentum else None
        rng = derive_rng(client.seed, "head batches" if part == "head" else "batches")
        for x, y in batches(data, algorithm.batch_size, epochs, rng):
            gradient.zero_()
            client.problem.loss(forward(x), y).backward()  # type: ignore[no-untyped-call] # torch's
            with torch.no_grad():
                if algorithm.weight_decay:
                    gradient.add_(trained, alpha=algorithm.weight_decay)
                if part != "head":
                    restrict(client, self.shared, gradient[: self._border])
                step = gradient
                if velocity is not None:
                    step = velocity.mul_(algorithm.momentum).add_(gradient)
                trained.add_(step, alpha=-algorithm.lr)


@dataclass(frozen=True)
class SharedBody(FedAvg):
    """FedAvg of the body alone; each client keeps a head, which never travels.

    head: how many of the last trained layers are the head; at least one, or nothing is personal.
    Other fields are FedAvg's.
    """

    head: Annotated[int, Field(ge=1)] = 1

    @property
    def evaluated(self) -> Literal["model", "clients"]:
        """By clients: there is no model without a client's head."""
        return "clients"

    # ---- at the aggregator

    def start(self, problem: Problem) -> ModelState:
        """phi_0, the body of the problem's first model.

        Raises:
            ProblemError: the model cannot be cut.
        """
        model = Split(problem, self.head)
        counters = model.shared.flatten_counters(model.body_counters())
        return ModelState(model.shared, model.body_vector(), counters)

    def load(self, problem: Problem, saved: Payload) -> ModelState:
        """Return the state of a saved phi_t."""
        layout = Layout.of(cut(problem.model(), self.head)[0])
        return ModelState(
            layout, layout.flatten(saved.weights), layout.flatten_counters(saved.exact)
        )

    # ---- at the client

    def train(self, task: Task, client: Client) -> tuple[Payload, Payload]:
        """Return the change of the body (or the body), and the client's head."""
        model = scratch_split(client.problem, self.head, client.device)
        start = model.load(task.payload, client.local)
        data = client.data.to(client.device)
        with torch.random.fork_rng(devices=cuda_devices(client.device)):
            torch.manual_seed(client.seed)
            self.learn(model, data, client)
        vector = model.body_vector()
        if task.reply != "model":
            vector -= start
        numbers = {"n": len(data), "reply": task.reply}
        result = Payload(model.shared.views(vector), model.body_counters(), numbers)
        return result, Payload(exact=model.kept_tensors())

    @abstractmethod
    def learn(self, model: Split, data: Examples, client: Client) -> None:
        """Do a task's local epochs on a loaded model."""

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return the metrics, on the client's test data, of its head on phi_t.

        ``loss`` and ``accuracy`` are those after `tune` on its training data;
        ``accuracy_before`` is with the head as it was kept (or as it first was).
        """
        model = scratch_split(client.problem, self.head, client.device)
        model.load(task.payload, client.local)
        before = local_metrics(model.whole.module, client)["accuracy"]
        data = client.data.to(client.device)
        with torch.random.fork_rng(devices=cuda_devices(client.device)):
            torch.manual_seed(client.seed)
            self.tune(model, data, client)
        return {**local_metrics(model.whole.module, client), "accuracy_before": before}

    @abstractmethod
    def tune(self, model: Split, data: Examples, client: Client) -> None:
        """Fit a loaded model to the client's training data, for an evaluation."""


def cut(module: nn.Module, head: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Return the body and the head of a model, which share its tensors and keep their names.

    The head begins with the first of the last ``head`` layers that are trained.

    Raises:
        ProblemError: the model is no sequence of layers, or nothing would be left to share.
    """
    if not isinstance(module, nn.Sequential):
        raise ProblemError(
            f"expected a model that is an nn.Sequential of layers, got {type(module).__name__}"
        )
    places = [
        at
        for at, layer in enumerate(module)
        if any(each.requires_grad for each in layer.parameters())
    ]
    if not 1 <= head < len(places):
        raise ProblemError(
            f"head: expected fewer than the model's {len(places)} trained layers, got {head}"
        )
    return module[: places[-head]], module[places[-head] :]


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a module makes of x, float32 [n, ...], without a gradient."""
    with torch.no_grad():
        return torch.cat([module(each) for each in torch.split(x, _BATCH)])


def local_metrics(module: nn.Module, client: Client) -> dict[str, float]:
    """Return a module's metrics on the client's own test data, averaged over examples."""
    data = client.problem.client_test(client.index)
    return metrics_on(module, client.problem, data, client.device)


def scratch_split(problem: Problem, head: int, device: str) -> Split:
    """Return this process's one working copy of a problem's model, cut in two."""
    for known, where, model in _scratch:
        if known is problem and where == (head, device):
            return model
    model = Split(problem, head, device)
    _scratch.appendleft((problem, (head, device), model))
    return model


_scratch: deque[tuple[Problem, tuple[int, str], Split]] = deque(maxlen=4)
