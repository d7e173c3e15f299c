"""Learning problems: a model, each client's data, test data, loss and metrics."""

from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.problems.datasets import DATASETS, DataSet, load_dataset
from fedmq.algorithms.problems.image import ImageClassification
from fedmq.algorithms.problems.models import MODELS
from fedmq.algorithms.problems.partitions import PARTITIONS, Partition
from fedmq.algorithms.problems.registry import (
    DEFAULT_MODEL,
    PROBLEMS,
    complete_options,
    load_problem,
)

__all__ = [
    "DATASETS",
    "DEFAULT_MODEL",
    "MODELS",
    "PARTITIONS",
    "PROBLEMS",
    "DataSet",
    "Examples",
    "ImageClassification",
    "Partition",
    "Problem",
    "complete_options",
    "load_dataset",
    "load_problem",
]
