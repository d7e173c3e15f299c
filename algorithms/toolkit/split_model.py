"""A model cut in two: a body that all clients share, and a head that each client keeps."""

from __future__ import annotations

from collections import deque
from typing import Literal

import torch
from torch import Tensor, nn

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.tasks import Client, Payload
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.layout import Layout
from fedmq.algorithms.toolkit.results import Vectors
from fedmq.algorithms.toolkit.sgd import SGDSettings, batches, metrics_on, project

_BATCH = 500
"""Number of examples a batch in evaluation."""

Part = Literal["head", "body", "both"]


class Split:
    """A working copy of a problem's model, cut in two.

    Attributes:
        whole: the model; its weights are those of `body` and `head`.
        body, head: modules; the head's input is the body's output.
        shared, kept: layouts of the body's and the head's tensors, with the whole's names.

    Raises:
        ProblemError: the model cannot be cut there.
    """

    def __init__(self, problem: Problem, head: int, device: str = "cpu") -> None:
        self._layers = head
        self.whole = FlatModel(problem.model(), device, problem.model)
        self.shared, self.kept = Layout.of(self.body), Layout.of(self.head)
        names = [{each.name for each in part.weights} for part in (self.shared, self.kept)]
        if names[0] & names[1] or len(names[0] | names[1]) != len(self.whole.layout.weights):
            raise ProblemError("expected different parameters in body and head, got a common one")
        # Parameters are in the order of layers: the body's gradients come before the head's.
        self._border = self.shared.parameters
        self._first = self.kept_tensors()

    @property
    def body(self) -> nn.Sequential:
        """Return the body."""
        return cut(self.whole.module, self._layers)[0]

    @property
    def head(self) -> nn.Sequential:
        """Return the head."""
        return cut(self.whole.module, self._layers)[1]

    def load(self, body: Payload, local: Payload | None) -> Vectors:
        """Load a body, and the client's local head or the problem's first one.

        Returns the received body.
        """
        came = Vectors(*self.shared.read(body))
        tensors = _views(self.shared, came)
        head = Payload(exact=self._first) if local is None else local
        tensors |= _views(self.kept, Vectors(*self.kept.read(head)))
        self.whole.load(*self.whole.layout.read(Payload(exact=tensors)))
        return came

    def body_vectors(self) -> Vectors:
        """Return a copy of the body's values, on the CPU."""
        mine = {slot.name for slot in (*self.shared.weights, *self.shared.counters)}
        tensors = {name: each for name, each in self._tensors().items() if name in mine}
        return Vectors(*self.shared.read(Payload(exact=tensors)))

    def kept_tensors(self) -> dict[str, Tensor]:
        """Return a copy of all tensors of the head by name, on the CPU."""
        tensors = self._tensors()
        return {slot.name: tensors[slot.name] for slot in (*self.kept.weights, *self.kept.counters)}

    def _tensors(self) -> dict[str, Tensor]:
        """Return a copy of all tensors, as they are sent."""
        weights = self.whole.weights.detach().to("cpu", copy=True)
        return _views(self.whole.layout, Vectors(weights, self.whole.read_counters()))

    def fit(
        self, part: Part, data: Examples, epochs: int, sgd: SGDSettings, client: Client
    ) -> None:
        """Run epochs of SGD on a part; the rest stays the same to the bit.

        Only the part's slice of the weights is stepped, so that momentum and weight decay do not
        affect the rest. The frozen part is in evaluation mode: its running statistics stay, and
        its dropout is off. Momentum starts from zero.

        Args:
            part: part to train.
            data: x float32 [n, ...], y int64 [n], on the model's device.
            epochs: passes over the data; 0 does nothing.
            sgd: settings of the steps.
            client: client with the loss, the seed and structured updates.
        """
        if not epochs:
            return
        start, end = {"head": (self._border, None), "body": (0, self._border), "both": (0, None)}[
            part
        ]
        trained, gradient = self.whole.trained[start:end], self.whole.gradient[start:end]
        forward: nn.Module = self.whole.module
        body, head = self.body, self.head
        body.train(part != "head")
        head.train(part != "body")
        if part == "head":
            # A frozen body has the same outputs in every epoch.
            data, forward = Examples(outputs(body, data.x), data.y), head
        velocity = torch.zeros_like(gradient) if sgd.momentum else None
        rng = derive_rng(client.seed, "head batches" if part == "head" else "batches")
        for x, y in batches(data, sgd.batch_size, epochs, rng):
            gradient.zero_()
            client.problem.loss(forward(x), y).backward()  # type: ignore[no-untyped-call] # torch's
            self.whole.after_backward()
            with torch.no_grad():
                if sgd.weight_decay:
                    gradient.add_(trained, alpha=sgd.weight_decay)
                if part != "head":
                    project(client, self.shared, gradient[: self._border])
                step = gradient
                if velocity is not None:
                    step = velocity.mul_(sgd.momentum).add_(gradient)
                trained.add_(step, alpha=-sgd.lr)
        self.whole.end_task()


def cut(module: nn.Module, head: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Return the body and the head of a model, which share its tensors and keep their names.

    The head begins with the first of the last ``head`` trained layers.

    Raises:
        ProblemError: the model is no sequence of layers, or its body would have none.
    """
    if not isinstance(module, nn.Sequential):
        raise ProblemError(
            f"expected a model that is an nn.Sequential of layers, got {type(module).__name__}"
        )
    trained = [
        at
        for at, layer in enumerate(module)
        if any(each.requires_grad for each in layer.parameters())
    ]
    if not 1 <= head < len(trained):
        raise ProblemError(
            f"head: expected fewer than the model's {len(trained)} trained layers, got {head}"
        )
    return module[: trained[-head]], module[trained[-head] :]


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    """Return a module's outputs, float32 [n, ...], without a gradient."""
    with torch.no_grad():
        return torch.cat([module(each) for each in torch.split(x, _BATCH)])


def local_metrics(model: FlatModel, client: Client) -> dict[str, float]:
    """Return a model's metrics on the client's own test data, averaged over examples."""
    data = client.problem.client_test(client.index)
    model.reset()
    return metrics_on(model.module, client.problem, data, client.device)


def _views(layout: Layout, numbers: Vectors) -> dict[str, Tensor]:
    return layout.views(numbers.weights) | layout.counter_views(numbers.counters)


def scratch_split(problem: Problem, head: int, device: str) -> Split:
    """Return the one working copy of a problem's model in this process, cut in two."""
    for known, where, model in _scratch:
        if known is problem and where == (head, device):
            return model
    model = Split(problem, head, device)
    _scratch.appendleft((problem, (head, device), model))
    return model


_scratch: deque[tuple[Problem, tuple[int, str], Split]] = deque(maxlen=4)
