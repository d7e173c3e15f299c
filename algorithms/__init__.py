"""Federated algorithms, their schedules and their problems."""

from typing import TYPE_CHECKING

__all__ = [
    "ALGORITHMS",
    "PROBLEMS",
    "SCHEDULES",
    "Algorithm",
    "AlgorithmError",
    "Allowed",
    "Client",
    "DataError",
    "Examples",
    "Fault",
    "FedAvg",
    "NotAllowed",
    "Payload",
    "Problem",
    "ProblemError",
    "Result",
    "ResultError",
    "Schedule",
    "ScheduleView",
    "Task",
    "derive_rng",
    "derive_seed",
    "find_algorithm",
    "find_schedule",
    "load_problem",
]

if TYPE_CHECKING:
    from fedmq.algorithms.allowed import Allowed
    from fedmq.algorithms.base import Algorithm, Client, Payload, Result, Task
    from fedmq.algorithms.errors import (
        AlgorithmError,
        DataError,
        Fault,
        NotAllowed,
        ProblemError,
        ResultError,
    )
    from fedmq.algorithms.fedavg import FedAvg
    from fedmq.algorithms.problems.base import Examples, Problem
    from fedmq.algorithms.problems.registry import PROBLEMS, load_problem
    from fedmq.algorithms.registry import ALGORITHMS, find_algorithm
    from fedmq.algorithms.rng import derive_rng, derive_seed
    from fedmq.algorithms.schedules import SCHEDULES, find_schedule
    from fedmq.algorithms.schedules.base import Schedule, ScheduleView
else:
    from fedmq._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "fedmq.algorithms.allowed": "Allowed",
            "fedmq.algorithms.base": "Algorithm Client Payload Result Task",
            "fedmq.algorithms.errors": "AlgorithmError DataError Fault NotAllowed "
            "ProblemError ResultError",
            "fedmq.algorithms.fedavg": "FedAvg",
            "fedmq.algorithms.problems.base": "Examples Problem",
            "fedmq.algorithms.problems.registry": "PROBLEMS load_problem",
            "fedmq.algorithms.registry": "ALGORITHMS find_algorithm",
            "fedmq.algorithms.rng": "derive_rng derive_seed",
            "fedmq.algorithms.schedules": "SCHEDULES find_schedule",
            "fedmq.algorithms.schedules.base": "Schedule ScheduleView",
        },
    )
