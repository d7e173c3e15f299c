"""Hyper-parameters are checked at construction, and names of version 0.1 are refused."""

import dataclasses
import time
from typing import Annotated, ClassVar

import numpy as np
import pytest
from pydantic import Field

from fedmq.algorithms.base import Algorithm
from fedmq.algorithms.distillation.fd import Distillation
from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.faug.algorithm import FAug
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.registry import ALGORITHMS
from fedmq.algorithms.schedules import Rounds, Schedule
from fedmq.algorithms.schedules.base import Asynchronous


@dataclasses.dataclass(frozen=True)
class Mine(FedAvg):
    name: ClassVar[str] = "mine"

    widths: tuple[int, ...] = (4,)
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    check: object = None


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (FedAvg, {"lr": -1}, "lr: expected a number greater than 0, got -1"),
        (FedAvg, {"lr": None}, "lr: expected a number, got None"),
        (FedAvg, {"lr": "0.1"}, "lr: expected a number, got '0.1'"),
        (FedAvg, {"lr": float("inf")}, "lr: expected a finite number, got inf"),
        (FedAvg, {"lr": float("nan")}, "lr: expected a finite number, got nan"),
        (FedAvg, {"epochs": 1.5}, "epochs: expected a whole number, got 1.5"),
        (FedAvg, {"epochs": True}, "epochs: expected a number, got True"),
        (
            FedAvg,
            {"batch_size": 0},
            "batch_size: expected a number greater than or equal to 1, got 0",
        ),
        (Mine, {"share": 2}, "share: expected a number less than or equal to 1, got 2"),
        (Mine, {"widths": [1, "x"]}, "widths: expected a whole number, got 'x'"),
        (FAug, {"then": "sgd"}, "then: expected 'fd' or 'fedavg', got 'sgd'"),
        (Rounds, {"late": "never"}, "late: expected 'use', 'discount' or 'refuse', got 'never'"),
        (
            Rounds,
            {"over_select": 0.5},
            "over_select: expected a number greater than or equal to",
        ),
    ],
)
def test_a_value_out_of_range_is_named(kind, given, message):
    with pytest.raises(AlgorithmError) as caught:
        kind(**given)
    assert str(caught.value).startswith(message)
    with pytest.raises(AlgorithmError):
        dataclasses.replace(kind(), **given)


def test_numbers_of_numpy_and_lists_are_converted():
    made = Mine(lr=np.float32(0.5), epochs=np.int64(3), widths=[1, np.int32(2)], share=1)
    assert (made.lr, made.epochs, made.widths, made.share) == (0.5, 3, (1, 2), 1.0)
    assert [type(each) for each in (made.lr, made.epochs, made.share)] == [float, int, float]
    assert type(made.widths[1]) is int


@pytest.mark.parametrize("kind", ALGORITHMS.values())
def test_the_defaults_are_valid_and_a_check_takes_microseconds(kind):
    made = kind()
    assert dataclasses.replace(made) == made
    began = time.perf_counter()
    for _ in range(200):
        dataclasses.replace(made)
    assert (time.perf_counter() - began) / 200 < 1e-3  # on a busy host; 50 us on an idle one


@pytest.mark.parametrize(
    ("base", "old", "new"),
    [
        (Algorithm, "gather", "new_accumulator"),
        (FedAvg, "absorb", "accumulate"),
        (FedAvg, "at_commit", "server_hparams"),
        (FedAvg, "trains", "commits_in_background"),
        (Distillation, "sends", "fixed_reply"),
        (FedAvg, "personal", "task_per_client"),
        (FedAvg, "examined", "evaluation_task"),
        (FedAvg, "evaluated", "evaluated_by"),
        (Schedule, "wants", "num_to_start"),
        (Asynchronous, "closes", "is_ready"),
    ],
)
def test_a_name_of_version_0_2_is_refused_when_the_class_is_made(base, old, new):
    with pytest.raises(AlgorithmError, match=rf"^Old\.{old} is now called {new}: rename it$"):
        type("Old", (base,), {old: lambda self: None})
