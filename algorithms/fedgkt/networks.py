"""Run samples through the edge and server networks, and order them in batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.fedgkt.feature_store import Maps
from fedmq.algorithms.fedgkt.uploads import check_names
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.problems.resnets import Edge
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.layout import expect_tensor
from fedmq.algorithms.toolkit.sgd import spans

_BLOCK = 256
"""Number of samples a batch in evaluation."""


def shuffled(
    n: int, samples: int, size: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Yield batches of indices 0 to n - 1, ``samples`` in all; each pass has a new order.

    A last pass of a single sample joins the one before, like a last batch in `spans`.
    """
    while samples > 0:
        order = rng.permutation(n)[:samples]
        samples -= len(order)
        if samples == 1 and size > 1:
            order = np.concatenate([order, rng.permutation(n)[:1]])
            samples = 0
        for start, end in spans(len(order), size):
            yield order[start:end]


def through_edge(model: FlatModel, data: Examples) -> tuple[Tensor, Tensor]:
    """Return H, float32 [n, c, h, w], and the edge's logits, [n, classes], in eval mode."""
    edge = cast("Edge", model.module)
    features = list(_outputs(edge.extractor, _blocks(data.x), model))
    logits = list(_outputs(edge.classifier, features, model))
    return torch.cat(features), torch.cat(logits)


def through_server(model: FlatModel, features: Tensor | Maps) -> Tensor:
    """Return the server's logits of feature maps, float32 [n, classes], in eval mode."""
    return torch.cat(list(_outputs(model.module, _blocks(features), model)))


def stack_metrics(
    problem: Problem, server: FlatModel, features: Tensor, edge_logits: Tensor, y: Tensor
) -> dict[str, float]:
    """Return the problem's metrics of edge and server together, and as ``edge_*`` of the edge."""
    edge = problem.metrics(edge_logits, y)
    stack = problem.metrics(through_server(server, features), y)
    return {**stack, **{f"edge_{name}": value for name, value in edge.items()}}


def teacher_of(logits: Mapping[str, Tensor], n: int, classes: int) -> Tensor | None:
    """Return logits in the order of ids 0 to n - 1, with rows of NaN for missing ids.

    Args:
        logits: ``logits``, float32 [m, classes], and ``ids``, int64 [m]; or empty.
        n: number of samples.
        classes: number of columns.

    Raises:
        ResultError: the ids are not of these samples.
    """
    if not logits:
        return None
    check_names(logits, ("logits", "ids"))
    given, ids = logits["logits"], logits["ids"]
    expect_tensor("ids", ids, torch.int64, (len(ids),))
    expect_tensor("logits", given, torch.float32, (len(ids), classes))
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= n):
        raise ResultError(f"expected logits of samples 0 to {n - 1}")
    teacher = torch.full((n, classes), math.nan)
    teacher[ids] = given
    return teacher


def _blocks(rows: Tensor | Maps) -> Iterator[Tensor]:
    for start in range(0, len(rows), _BLOCK):
        yield rows[start : start + _BLOCK]


def _outputs(module: nn.Module, blocks: Iterable[Tensor], model: FlatModel) -> Iterator[Tensor]:
    model.module.eval()
    with torch.no_grad():
        for block in blocks:
            yield module(block.to(model.weights.device)).cpu()
