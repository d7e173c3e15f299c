"""Co-distillation among devices, after Anil, Pereyra, Passos, Ormandi, Dahl, Hinton, "Large Scale
Distributed Neural Network Training through Online Distillation", ICLR 2018.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmq.algorithms.base import Client, Payload, Task, TrainResult
from fedmq.algorithms.distillation.devices import kept
from fedmq.algorithms.distillation.fd import Distillation, cross_entropy
from fedmq.algorithms.distillation.reports import Reports, check_probabilities, group_of
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.layout import expect_tensor
from fedmq.algorithms.toolkit.sgd import batches

_BATCH = 500
"""Number of public samples whose outputs are computed at a time."""


@dataclass(frozen=True)
class Codistillation(Distillation):
    """The baseline of federated distillation: outputs are exchanged by *sample*, not by label.

    All devices have the same public examples (the problem's ``public``), without their labels. A
    device sends its softmax output on each of them, by sample id, and receives the mean of the
    other devices'. It then minimises CE(F(x), y) on its own batches plus gamma * CE(F(x'),
    Fhat(x')) on batches of public samples, of the same size. In Anil et al. workers sometimes
    exchange models and compute each other's outputs on common data; here, as Jeong et al. 2018
    describe it, they exchange outputs: N x L values for N public samples, instead of L x L.

    Fields and their defaults are those of `Distillation`, batch_size 64 among them. The state is
    M x N x L float32.
    """

    name: ClassVar[str] = "codistillation"
    counts_examples: ClassVar[bool] = True

    # ---- at the aggregator

    def start(self, problem: Problem) -> Reports:
        """Return empty reports for the public examples.

        Raises:
            ProblemError: the problem has no public examples or no number of classes.
        """
        return Reports.none(problem.clients, len(problem.public()), problem.classes)

    def task(self, state: Reports, client: int) -> Payload:
        """Return the other devices' mean outputs by sample id, for those that have any."""
        means, having = state.others(client)
        ids = (having > 0).nonzero()[:, 0]
        return Payload(logits={"logits": means[ids], "ids": ids})

    def report_of(self, state: Reports, payload: Payload) -> tuple[Tensor, Tensor]:
        """Return (outputs, ones) of a report, sorted by sample id.

        Raises:
            ResultError: the report does not have probabilities for each public sample.
        """
        rows, ids = group_of(payload, "ids")
        samples, classes = state.means.shape[1:]
        expect_tensor("ids", ids, torch.int64, (samples,))
        expect_tensor("logits", rows, torch.float32, (samples, classes))
        if not ids.sort().values.equal(torch.arange(samples)):
            raise ResultError(f"expected each sample id from 0 to {samples - 1} once")
        check_probabilities(rows)
        return torch.empty_like(rows).index_copy_(0, ids, rows), torch.ones_like(ids)

    # ---- at the device

    def train(self, task: Task, client: Client) -> TrainResult:
        """Train with the others' outputs; then compute the device's own on every public sample."""
        model = self.own_model(client)
        public = client.problem.public().to(client.device)
        shared_batches = self._shared_batches(task, public, client)
        for x, y in self.steps(model, client):
            loss = client.problem.loss(model.module(x), y)
            if shared_batches is not None:
                shared, soft = next(shared_batches)
                loss = loss + self.gamma * cross_entropy(model.module(shared), soft)
            loss.backward()  # type: ignore[no-untyped-call] # torch's
        model.reset()
        outputs = _outputs(model.module, public.x)
        report = {"logits": outputs, "ids": torch.arange(len(outputs))}
        return TrainResult(Payload(logits=report), len(client.data), kept(model))

    def _shared_batches(
        self, task: Task, public: Examples, client: Client
    ) -> Iterator[tuple[Tensor, Tensor]] | None:
        """Return endless batches of (public x, others' mean outputs), or None if there are none."""
        soft, ids = group_of(task.payload, "ids")
        if not self.gamma or not len(ids):
            return None
        # By sample id, because the outputs may be in any order.
        taught = Examples(public.x[ids.to(client.device)], soft.to(client.device))
        endless = 1 << 40
        return batches(taught, self.batch_size, endless, derive_rng(client.seed, "public batches"))


def _outputs(module: nn.Module, x: Tensor) -> Tensor:
    """Return softmax outputs in evaluation mode, float32 [n, classes], on the CPU."""
    module.eval()
    with torch.no_grad():
        parts = [module(part).softmax(dim=1).cpu() for part in torch.split(x, _BATCH)]
    return torch.cat(parts)
