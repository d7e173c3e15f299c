"""FedSGD, the baseline of McMahan et al., AISTATS 2017, section 2: each client sends one
full-batch gradient a round, and the server takes the step.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from fedmq.algorithms.base import Client, Task, TrainResult
from fedmq.algorithms.fedavg import Accumulator, FedAvg, ModelState
from fedmq.algorithms.toolkit.results import moved
from fedmq.algorithms.toolkit.sgd import cuda_devices, learned, load_model, spans

_GRADIENT_BATCH = 500


@dataclass(frozen=True)
class FedSGD(FedAvg):
    """w_{t+1} = w_t - eta * sum_k (n_k/m) g_k, where g_k is the gradient over client k's data.

    lr: eta, the server's learning rate.
    weight_decay: added to each gradient; 0 in the paper.

    Clients send the gradient of the whole local set. There are no local steps, so epochs is 1,
    batch_size None and momentum 0, and lr is that of the server's step, by default 0.1.
    BatchNorm statistics, which have no gradient, are sent as their change.
    """

    name: ClassVar[str] = "fedsgd"
    schedules: ClassVar[frozenset[str]] = frozenset({"rounds", "buffered"})
    server_hparams: ClassVar[frozenset[str]] = frozenset({"lr"})

    lr: Annotated[float, Field(gt=0)] = 0.1
    epochs: Annotated[int, Field(ge=1, le=1)] = 1
    batch_size: None = None
    momentum: Annotated[float, Field(ge=0, le=0)] = 0.0
    server_lr: Annotated[float, Field(ge=1, le=1)] = 1.0

    def commit(self, state: ModelState, accumulator: Accumulator, divisor: float) -> ModelState:
        """Take one step along the averaged gradient; statistics move by their averaged change."""
        mean, end = accumulator.total.div_(divisor), state.layout.parameters
        mean[:end].mul_(-self.lr).add_(state.weights[:end])
        mean[end:] = moved(state.weights[end:], mean[end:])
        return ModelState(state.layout, mean, accumulator.counters)

    def train(self, task: Task, client: Client) -> TrainResult:
        """g_k = the gradient of the mean loss over all local examples at w_t."""
        model, start = load_model(task, client.problem, client.device)
        data = client.data.to(client.device)
        n = len(data)
        model.module.train()
        model.gradient.zero_()
        with torch.random.fork_rng(devices=cuda_devices(client.device)):
            torch.manual_seed(client.seed)
            # The mean over all examples, summed in blocks that fit in the cache.
            for first, end in spans(n, _GRADIENT_BATCH):
                y = data.y[first:end]
                outputs = model.module(data.x[first:end])
                (client.problem.loss(outputs, y) * (len(y) / n)).backward()  # type: ignore[no-untyped-call] # torch's
                model.after_backward()
        model.end_task()
        gradient = model.gradient.clone()
        self.regularize(gradient, model.trained, start[: model.layout.parameters])
        payload = learned(model, start, {"reply": task.reply}, trained=gradient)
        return TrainResult(payload, n)
