"""What a client's result says of a model, as the client writes it and the aggregator reads it.

What is trained is sent as a whole, through the codec. Of frozen parameters and buffers, a
result brings those that training changed, exactly; what it does not bring stayed as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmq.algorithms.base import Payload, Reply
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.layout import EXACT, Layout, check_tensor, named_once, same_bits
from fedmq.codecs.base import brief
from fedmq.codecs.streamed import Streamed


@dataclass(frozen=True)
class Vectors:
    """A model's numbers: weights float32 [dim], counters int64."""

    weights: Tensor
    counters: Tensor


def result_payload(
    layout: Layout,
    before: Vectors,
    after: Vectors,
    numbers: Mapping[str, int | float | str],
    reply: Reply = "update",
    trained: Tensor | None = None,
) -> Payload:
    """Return what a client sends: how its model changed, or the model.

    Args:
        layout: of both.
        before: the model as it came.
        after: as it was trained.
        numbers: of the payload.
        reply: ``update`` or ``model``; counters are sent as they are in both.
        trained: what is sent of the trained parameters, float32 [parameters], if not that.
    """
    end, model = layout.parameters, reply == "model"
    if trained is None:
        trained = after.weights[:end]
        trained = trained.clone() if model else trained - before.weights[:end]
    exact: dict[str, Tensor] = {}
    if layout.rest:
        old, new = (each.weights[end:].cpu() for each in (before, after))
        differs = old.view(torch.int32) != new.view(torch.int32)
        # What is equal bit by bit, infinity and NaN among it, changes by 0.
        said = new.clone() if model else torch.where(differs, new - old, 0.0)
        exact = {
            slot.name: slot.view(said, end) for slot in layout.rest if slot.view(differs, end).any()
        }
    for slot in layout.counters:
        value = slot.view(after.counters)
        if not same_bits(value, slot.view(before.counters)):
            exact[slot.name] = value
    return Payload(layout.trained_views(trained.cpu()), exact, numbers)


@dataclass(frozen=True)
class Arrived:
    """What a result says of a model.

    trained: in blocks, as `Layout.blocks` gives them.
    rest: the change of everything else, float32 [dim - parameters], or None: no change.
    counters: int64, those of the model that the result does not bring as they were.
    """

    layout: Layout
    trained: Iterable[tuple[int, Tensor]]
    rest: Tensor | None
    counters: Tensor

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, block) of all that is to be added up; may be called again."""
        rest = () if self.rest is None else ((self.layout.parameters, self.rest),)
        return itertools.chain(self.trained, rest)


def read_result(
    layout: Layout, payload: Payload, counters: Tensor, weights: Tensor | None = None
) -> Arrived:
    """Return what a result says of a model.

    A tensor may be in either group: in ledgers of 0.1.0 all of the weights are in the first.

    Args:
        layout: of the model.
        payload: the result's.
        counters: of the aggregator's model now.
        weights: of the aggregator's model now, if the result is a model and no update: of
            what is not trained, the change from these is taken.

    Raises:
        ResultError: a name, shape or dtype is not this model's.
    """
    trained: Mapping[str, Tensor] = payload.weights
    others = dict(named_once(trained, payload.exact))
    names = {slot.name for slot in layout.trained}
    if isinstance(trained, Streamed) and not set(trained) <= names:
        trained = trained.read()
    if not isinstance(trained, Streamed):
        both = {**trained, **others}
        trained = {name: each for name, each in both.items() if name in names}
        others = {name: each for name, each in both.items() if name not in names}
    blocks, change, end = layout.blocks(trained), None, layout.parameters
    for slot in layout.rest:
        if slot.name not in others:
            continue
        tensor = check_tensor(slot, others.pop(slot.name))
        if change is None:
            change = torch.zeros(layout.dim - end)
        if weights is not None:
            now = slot.view(weights)
            differs = now.contiguous().view(torch.int32) != tensor.contiguous().view(torch.int32)
            tensor = torch.where(differs, tensor - now, 0.0)
        slot.view(change, end).copy_(tensor)
    counters = counters.clone()
    for slot in layout.counters:
        if slot.name not in others:
            continue
        tensor, place = check_tensor(slot, others.pop(slot.name)), slot.view(counters)
        if slot.dtype in EXACT and not same_bits(tensor, place):
            raise ResultError(f"expected {slot.name!r}, {slot.dtype}, as the constant that it is")
        place.copy_(tensor)
    if others:
        raise ResultError(f"expected no tensor {brief(min(others))}")
    return Arrived(layout, blocks, change, counters)


def moved(rest: Tensor, change: Tensor) -> Tensor:
    """Return frozen parameters and buffers, float32 [dim - parameters], after a change.

    What nobody changed stays to the bit, whatever its value: infinity and NaN too.
    """
    return torch.where(change == 0, rest, rest + change)
