"""Federated Distillation (FD): Jeong, Oh, Kim, Park, Bennis, Kim, "Communication-Efficient
On-Device Machine Learning: Federated Distillation and Augmentation under Non-IID Private Data",
2018.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmq.algorithms.base import Client, Payload, Reply, Result, Task, TrainResult
from fedmq.algorithms.distillation.devices import DeviceModels, kept
from fedmq.algorithms.distillation.reports import (
    MOST_COUNTED,
    NewOutputs,
    Reports,
    check_probabilities,
    group_of,
)
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.toolkit.layout import expect_tensor
from fedmq.algorithms.toolkit.sgd import evaluate_module


@dataclass(frozen=True)
class Distillation(DeviceModels[Reports, NewOutputs]):
    """Algorithm 1 (federated distillation): devices exchange mean outputs by label, not models.

    lr: eta, of the devices' SGD; the paper does not state it.
    gamma: weight of the distillation term; with 0 each device trains alone. The paper does not
        state it.
    iterations: n, local steps a round; 250 in the paper. None: ``epochs`` decides.
    epochs: passes over the local data a round, if ``iterations`` is None.
    batch_size: 64 as in the paper; None is the whole local set.
    models: names of `fedmq.algorithms.problems.models`; device k has ``models[k % len]``. Empty:
        the problem's model. ``fd-cnn`` is the paper's.
    seed: seed of the first parameters of ``models``, different for each device; None is the
        run's.
    """

    name: ClassVar[str] = "fd"
    counts_examples: ClassVar[bool] = True
    reproducible: ClassVar[bool] = True
    fixed_reply: ClassVar[Reply | None] = "update"

    # ---- at the aggregator

    def start(self, problem: Problem) -> Reports:
        """Return empty reports.

        Raises:
            ProblemError: the problem has no number of classes.
        """
        return Reports.none(problem.clients, problem.classes, problem.classes)

    def task(self, state: Reports, client: int) -> Payload:
        """Return Fhat^(i), the other devices' mean outputs by label.

        ``counts``: the number of other devices with a label.
        """
        means, having = state.others(client)
        return Payload(logits={"logits": means, "counts": having})

    def evaluation_task(self, state: Reports, client: int = 0) -> Payload:
        """Return an empty payload: devices evaluate their own models."""
        return Payload()

    def result_bytes(self, state: Reports) -> int:
        """Return the size of one device's report, in bytes."""
        return int(state.means[0].nbytes + state.counts[0].nbytes)

    def new_accumulator(self, state: Reports) -> NewOutputs:
        """Return an empty accumulator."""
        return {}

    def accumulate(
        self, accumulator: NewOutputs, state: Reports, result: Result, weight: float
    ) -> NewOutputs:
        """Replace a device's report.

        ``weight`` is not used: the paper's mean over devices is unweighted.
        """
        accumulator[result.client] = self.report_of(state, result.payload)
        return accumulator

    def report_of(self, state: Reports, payload: Payload) -> tuple[Tensor, Tensor]:
        """Return (means, counts) of a report by label.

        Raises:
            ResultError: it does not consist of mean probabilities.
        """
        means, counts = group_of(payload, "counts")
        expect_tensor("counts", counts, torch.int64, tuple(state.counts.shape[1:]))
        expect_tensor("logits", means, torch.float32, tuple(state.means.shape[1:]))
        low, high = (int(each) for each in torch.aminmax(counts))
        if low < 0 or not 0 < high <= MOST_COUNTED:
            raise ResultError(f"expected counts from 0 to {MOST_COUNTED}, got {low} to {high}")
        if bool((means[counts == 0] != 0).any()):
            raise ResultError("expected means of 0 for labels with a count of 0")
        check_probabilities(means[counts > 0])
        return means, counts

    def commit(self, state: Reports, accumulator: NewOutputs, divisor: float) -> Reports:
        """Replace the reports of devices that sent one; the others stay."""
        return state.updated(accumulator)

    def load(self, problem: Problem, saved: Payload) -> Reports:
        """Return the state of saved reports, with their sums."""
        found = super().load(problem, saved)
        return Reports.of(found.means, found.counts)

    def tensors(self, state: Reports) -> Mapping[str, Tensor]:
        """Return all reports: float32 [M, R, L] and int64 [M, R]."""
        return {"means": state.means, "counts": state.counts}

    # ---- at the device

    def train(self, task: Task, client: Client) -> TrainResult:
        """Algorithm 1, lines 3 to 8: n steps on CE(F, y) + gamma * CE(F, Fhat_y).

        A sample whose label no other device has is trained on CE(F, y) alone. The outputs that
        are averaged by label are computed before each step.
        """
        soft, _ = group_of(task.payload, "counts")
        soft = soft.to(client.device)
        model = self.own_model(client)
        classes = len(soft)
        sums = torch.zeros((classes, classes), dtype=torch.float64, device=client.device)
        counts = torch.zeros(classes, dtype=torch.int64, device=client.device)
        for x, y in self.steps(model, client):
            outputs = model.module(x)
            loss = client.problem.loss(outputs, y)
            if self.gamma:
                loss = loss + self.gamma * cross_entropy(outputs, soft[y])
            loss.backward()  # type: ignore[no-untyped-call] # torch's
            of = F.one_hot(y, classes)
            sums += of.double().T @ outputs.detach().softmax(dim=1).double()
            counts += of.sum(dim=0)
        means = (sums / counts.clamp(min=1).unsqueeze(1)).float()
        report = {"logits": means.cpu(), "counts": counts.cpu()}
        return TrainResult(Payload(logits=report), len(client.data), kept(model))

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return the metrics of the device's own model on the whole test set."""
        return evaluate_module(self.own_model(client).module, client.problem, client.device)

    def personalise(self, state: Reports, version: int, client: Client) -> Mapping[str, float]:
        """Train a new device for one round with the others' outputs, and evaluate it."""
        task = Task(version, self.task(state, client.index))
        local = self.train(task, client).local_state
        return self.evaluate_client(task, dataclasses.replace(client, local=local))


# ---- shared with co-distillation and FAug


def cross_entropy(outputs: Tensor, soft: Tensor) -> Tensor:
    """Return the mean over a batch of CE(F, Fhat) = -sum_l Fhat_l log F_l.

    outputs: logits [n, L]; soft: probabilities [n, L]; a row of zeros adds nothing.
    """
    return -(soft * F.log_softmax(outputs, dim=1)).sum(dim=1).mean()
