"""Federated Augmentation (FAug): Jeong, Oh, Kim, Park, Bennis, Kim, "Communication-Efficient
On-Device Machine Learning: Federated Distillation and Augmentation under Non-IID Private Data",
2018.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from fedmq.algorithms.base import AnyAlgorithm, Client, Payload, Result, Task, TrainResult
from fedmq.algorithms.distillation.devices import DeviceModels
from fedmq.algorithms.distillation.fd import Distillation
from fedmq.algorithms.errors import AlgorithmError, ResultError
from fedmq.algorithms.faug.augmentation import (
    OWN,
    Averaging,
    Gan,
    filled,
    inner_local,
    joined,
    leakage_of,
    missing,
    own_local,
    share_metrics,
    split_labels,
)
from fedmq.algorithms.faug.cgan import WIDTHS, GanSettings
from fedmq.algorithms.faug.state import (
    AugAccumulator,
    AugState,
    check_empty,
    inner_saved,
    load_aug_state,
    save_aug_state,
    seeds_of,
)
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.rng import derive_rng, derive_seed
from fedmq.algorithms.toolkit.sgd import load_model
from fedmq.codecs.text import shorten

PHASES = ("seeds", "fill", "then")


@dataclass(frozen=True)
class FAug(DeviceModels[AugState, AugAccumulator]):
    """Section 3: devices send a few samples, receive a generator, and fill their missing labels.

    There are three phases. ``seeds``: a device sends a few samples of its target labels (those
    that it has too few of) and of redundant labels, which hide the targets from the server.
    ``fill``: it receives the generator that the server trained on all seeds, and generates samples
    of its target labels until it has as many as of the others. ``then``: federated distillation or
    averaging. A device that was disconnected gets the phases that it missed, except ``seeds`` once
    the generator is trained, because they would not be used.

    then: ``fd`` or ``fedavg``, with the fields of `Distillation` (batch_size 64 among them), or
        those of them that `FedAvg` has; its ``iterations`` are rounded to whole epochs, and its
        SGD is plain like that of `Distillation`.
    scarce: a label is a target of a device that has fewer samples of it than this share of its
        mean number a label.
    seeds: largest number of samples that a device sends of each target and redundant label.
    redundant: number of redundant labels; 0 in the paper's Table 1.
    wait: share of the devices whose seeds the server waits for; 1 in the paper.
    gan_steps, gan_batch, gan_lr: of the generator's training; the paper does not state them.
    gan_widths: of the generator's hidden layers; the default has 1,493,520 parameters on MNIST.

    The paper's server oversamples the seeds by web image search; here it rotates, scales and
    shifts them, and adds noise (`fedmq.algorithms.faug.cgan.augmented`).
    """

    name: ClassVar[str] = "faug"
    commits_in_background: ClassVar[bool] = True
    server_hparams: ClassVar[frozenset[str]] = frozenset(
        {"wait", "gan_steps", "gan_batch", "gan_lr"}
    )

    then: Literal["fd", "fedavg"] = "fd"
    scarce: Annotated[float, Field(gt=0, le=1)] = 0.25
    seeds: Annotated[int, Field(ge=1, le=1000)] = 5
    redundant: Annotated[int, Field(ge=0)] = 0
    wait: Annotated[float, Field(gt=0, le=1)] = 1.0
    gan_steps: Annotated[int, Field(ge=1)] = 5000
    gan_batch: Annotated[int, Field(ge=2)] = 32
    gan_lr: Annotated[float, Field(gt=0)] = 2e-4
    gan_widths: tuple[int, int, int] = WIDTHS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.then == "fedavg" and self.models:
            raise AlgorithmError(
                "models: expected none with then = 'fedavg': all devices have one model"
            )
        if min(self.gan_widths) < 1:
            raise AlgorithmError(f"gan_widths: expected at least 1, got {list(self.gan_widths)}")

    @property
    def _then(self) -> AnyAlgorithm:
        """Return the algorithm that learns; only it sees its own states."""
        if self.then == "fd":
            names = [each.name for each in dataclasses.fields(Distillation)]
            return cast(
                "AnyAlgorithm", Distillation(**{name: getattr(self, name) for name in names})
            )
        averaging = Averaging(
            lr=self.lr,
            epochs=self.epochs,
            batch_size=self.batch_size,
            momentum=0.0,
            iterations=self.iterations,
        )
        return cast("AnyAlgorithm", averaging)

    # ---- at the aggregator

    def start(self, problem: Problem) -> AugState:
        """Return a state without seeds and generator."""
        none = torch.zeros(problem.clients, dtype=torch.int64)
        then = self._then.start(problem)
        return AugState(then, none, none, {}, None, problem.shape, problem.classes)

    def task(self, state: AugState, client: int) -> Payload:
        """Return the payload of the device's next phase, with ``phase`` in its numbers."""
        known = client < len(state.given)
        if state.gan is None and known and not state.given[client]:
            return Payload(numbers={"phase": "seeds"})
        if state.gan is not None and not (known and state.served[client]):
            return _in_phase(state.gan.payload(), "fill")
        return _in_phase(self._then.task(state.then, client), "then")

    def evaluation_task(self, state: AugState, client: int = 0) -> Payload:
        """Return the evaluation payload of the algorithm that learns."""
        return self._then.evaluation_task(state.then, client)

    def result_bytes(self, state: AugState) -> int:
        """Return the larger of the sizes of seeds and of the algorithm's results, in bytes."""
        seeds = self.seeds * state.classes * (4 * math.prod(state.shape) + 16)
        return max(seeds, self._then.result_bytes(state.then))

    def new_accumulator(self, state: AugState) -> AugAccumulator:
        """Return an empty accumulator."""
        return AugAccumulator(self._then.new_accumulator(state.then))

    def accumulate(
        self, accumulator: AugAccumulator, state: AugState, result: Result, weight: float
    ) -> AugAccumulator:
        """Add a result, by its phase."""
        phase = result.payload.numbers.get("phase")
        if phase == "seeds":
            accumulator.seeds[result.client] = seeds_of(state, result.payload, self.seeds)
        elif phase == "fill":
            check_empty(result.payload)
            accumulator.served.add(result.client)
        elif phase == "then":
            accumulator.then = self._then.accumulate(accumulator.then, state.then, result, weight)
            accumulator.weight += weight
        else:
            raise ResultError(f"expected phase as one of {', '.join(PHASES)}, got {shorten(phase)}")
        accumulator.total += weight
        return accumulator

    def commit(self, state: AugState, accumulator: AugAccumulator, divisor: float) -> AugState:
        """Commit the algorithm that learns; train the generator when enough seeds have arrived."""
        then = state.then
        if accumulator.weight:
            share = accumulator.weight / accumulator.total
            then = self._then.commit(then, accumulator.then, divisor * share)
        given, served = state.given.clone(), state.served.clone()
        given[list(accumulator.seeds)] = 1
        served[list(accumulator.served)] = 1
        if state.gan is not None:
            return dataclasses.replace(state, then=then, given=given, served=served)
        seeds = {**state.seeds, **accumulator.seeds}
        gan = None
        enough = int(given.sum()) >= math.ceil(self.wait * len(given))
        if enough and any(len(y) for _, y in seeds.values()):
            # In the devices' order, not that of arrival.
            x, y = (torch.cat([seeds[k][part] for k in sorted(seeds)]) for part in (0, 1))
            settings = GanSettings(self.gan_steps, self.gan_batch, self.gan_lr, self.gan_widths)
            seed = derive_seed(self.seed or 0, "faug")
            gan, seeds = Gan.trained(x, y, state.classes, settings, seed), {}
        return dataclasses.replace(
            state, then=then, given=given, served=served, seeds=seeds, gan=gan
        )

    def save(self, state: AugState) -> Payload:
        """Return everything in a state, including seeds until the generator is trained."""
        return save_aug_state(state, self._then.save(state.then))

    def load(self, problem: Problem, saved: Payload) -> AugState:
        """Return a saved state."""
        then = self._then.load(problem, inner_saved(saved))
        return load_aug_state(self.start(problem), then, saved, problem, self.gan_widths)

    def tensors(self, state: AugState) -> Mapping[str, Tensor]:
        """Return the algorithm's tensors, the generator's, and the devices' phases; never seeds."""
        found = {"faug.given": state.given, "faug.served": state.served}
        if state.gan is not None:
            views = state.gan.layout.views(state.gan.weights)
            found |= {f"generator.{name}": tensor for name, tensor in views.items()}
        return {**self._then.tensors(state.then), **found}

    # ---- at the device

    def train(self, task: Task, client: Client) -> TrainResult:
        """Carry out the task's phase."""
        phase = task.payload.numbers.get("phase")
        if phase == "seeds":
            found = self._give(client)
        elif phase == "fill":
            found = self._fill(task, client)
        else:
            phase = "then"
            found = self._learn(task, client)
        return dataclasses.replace(found, payload=_in_phase(found.payload, phase))

    def _give(self, client: Client) -> TrainResult:
        """Choose seeds, sorted by label, so that their order does not reveal the targets.

        The choice is drawn from the device's own samples, because the server knows the task's
        seed and could search for targets that lead to these redundant labels. A device that is
        asked twice sends the same seeds.
        """
        y = client.data.y.cpu()
        targets, others = split_labels(y, client.problem.classes, self.scarce)
        x = client.data.x.cpu()
        secret = hashlib.blake2b(x.contiguous().numpy().tobytes() + y.numpy().tobytes())
        rng = derive_rng(0, "faug seeds", secret.hexdigest())
        shown = [label for label in targets if bool((y == label).any())]
        hiding = rng.permutation(others)[: self.redundant].tolist()
        rows: list[int] = []
        for label in sorted([*shown, *hiding]):
            rows += rng.permutation((y == label).nonzero()[:, 0].numpy())[: self.seeds].tolist()
        own = {f"{OWN}targets": len(shown), f"{OWN}redundant": len(hiding)}
        local = joined(inner_local(client.local), Payload(numbers=own))
        chosen = torch.tensor(rows, dtype=torch.int64)
        features = {
            "features": x[chosen],
            "ids": torch.arange(len(rows)),
            "labels": y[chosen],
        }
        return TrainResult(Payload(features=features if rows else {}), len(y), local)

    def _fill(self, task: Task, client: Client) -> TrainResult:
        """Generate samples of each target label that the generator was trained on."""
        gan = Gan.of(task.payload, client.problem, self.gan_widths)
        y, known = client.data.y.cpu(), set(gan.labels.tolist())
        lacks = missing(y, client.problem.classes, self.scarce)
        labels = torch.tensor(
            [label for label, count in lacks.items() if label in known for _ in range(count)],
            dtype=torch.int64,
        )
        seed = derive_seed(client.seed, "faug fill")
        images = gan.make(labels, client.problem, self.gan_widths, seed)
        before = {} if client.local is None else client.local.numbers
        facts = {f"{OWN}union": len(known), f"{OWN}low": gan.low, f"{OWN}high": gan.high}
        own = Payload(
            exact={f"{OWN}images": images, f"{OWN}labels": labels}, numbers={**before, **facts}
        )
        return TrainResult(Payload(), len(y), joined(inner_local(client.local), own))

    def _learn(self, task: Task, client: Client) -> TrainResult:
        """Train by the algorithm that learns, on own and generated samples."""
        local = inner_local(client.local)
        whole = dataclasses.replace(client, data=filled(client), local=local)
        found = self._then.train(task, whole)
        own = own_local(client.local)
        return dataclasses.replace(found, local_state=joined(found.local_state, own))

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return the metrics and the privacy leakage of this device's labels.

        With ``fd``, metrics are of the device's own model on the whole test set. With ``fedavg``,
        they are of the global model on every K-th test example, so that K devices cover the set.
        """
        if self.then == "fd":
            inner = dataclasses.replace(client, local=inner_local(client.local))
            metrics = self._then.evaluate_client(task, inner)
        else:
            model, _ = load_model(task, client.problem, client.device)
            metrics = share_metrics(model.module, client)
        return {**metrics, **leakage_of(client.local)}

    def personalise(self, state: AugState, version: int, client: Client) -> Mapping[str, float]:
        """Evaluate a new device after the phases ``fill`` (if there is a generator) and ``then``.

        With ``fedavg``, evaluate the global model.
        """
        if self.then == "fd":
            todo = [_in_phase(self._then.task(state.then, client.index), "then")]
            if state.gan is not None:
                todo.insert(0, _in_phase(state.gan.payload(), "fill"))
            for payload in todo:
                local = self.train(Task(version, payload), client).local_state
                client = dataclasses.replace(client, local=local)
        return self.evaluate_client(
            Task(version, self.evaluation_task(state, client.index)), client
        )


def _in_phase(payload: Payload, phase: str) -> Payload:
    return dataclasses.replace(payload, numbers={**payload.numbers, "phase": phase})
