"""What a client's result says of a model, as the client writes it and the aggregator reads it.

What is trained is sent as a whole, through the codec. Of frozen parameters and buffers, a
result brings those that training changed, exactly; what it does not bring stayed as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmq.algorithms.errors import Fault, ProblemError, ResultError
from fedmq.algorithms.tasks import Payload, Reply
from fedmq.algorithms.toolkit.layout import EXACT, Layout, Slot, check_tensor, named_once, same_bits
from fedmq.codecs.formats.streamed import Streamed
from fedmq.codecs.text import shorten


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
        start, stop = (each.weights[end:].cpu() for each in (before, after))
        for slot in layout.rest:
            old, new = slot.view(start, end), slot.view(stop, end)
            if not same_bits(old, new):
                refuse_unbounded(slot, old, new)
                exact[slot.name] = new.clone() if model else _change(old, new)
    for slot in layout.counters:
        value = slot.view(after.counters)
        if not same_bits(value, slot.view(before.counters)):
            exact[slot.name] = value
    return Payload(layout.trained_views(trained.cpu()), exact, numbers)


def refuse_unbounded(slot: Slot, old: Tensor, new: Tensor) -> None:
    """Refuse a frozen parameter or buffer that changes from infinity or NaN: by how much?

    Args:
        slot: of the tensor.
        old: its values before training, as they travel.
        new: the same after it.

    Raises:
        ProblemError: it does; the sentence names it.
    """
    differs = old.contiguous().view(torch.int32) != new.contiguous().view(torch.int32)
    if (differs & ~old.isfinite()).any():
        raise ProblemError(
            f"{slot.name} starts with infinity or NaN where training changes it: "
            "the change cannot be averaged; start it with a finite value"
        )


@dataclass(frozen=True)
class Arrived:
    """What a result says of a model.

    trained: in blocks, as `Layout.blocks` gives them.
    rest: likewise the change of frozen parameters and buffers, as far as there is any.
    counters: int64; None: as they were.
    """

    trained: Iterable[tuple[int, Tensor]]
    rest: Sequence[tuple[int, Tensor]]
    counters: Tensor | None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, block) of all that is to be added up; may be called again."""
        return itertools.chain(self.trained, self.rest)


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
    blocks = layout.blocks(trained)
    brought = [slot for slot in layout.rest if slot.name in others]
    rest = []
    if brought:
        # One block from the first to the last; frozen parameters, which come first, are large.
        first, end = brought[0].start, brought[-1].start + brought[-1].size
        change = torch.zeros(end - first)
        for slot in brought:
            tensor = check_tensor(slot, others.pop(slot.name))
            if weights is not None:
                tensor = _change(slot.view(weights), tensor)
            slot.view(change, first).copy_(tensor)
        rest = [(first, change)]
    new = None
    for slot in layout.counters:
        if slot.name not in others:
            continue
        tensor, now = check_tensor(slot, others.pop(slot.name)), slot.view(counters)
        if slot.dtype not in EXACT:
            new = counters.clone() if new is None else new
            slot.view(new).copy_(tensor)
        elif not same_bits(tensor, now):
            text = f"expected {slot.name!r}, {slot.dtype}, as the constant that it is"
            raise ResultError(text, Fault.WRONG_SHAPE)
    if others:
        raise ResultError(f"expected no tensor {shorten(min(others))}", Fault.WRONG_SHAPE)
    return Arrived(blocks, rest, new)


def merge_counters(merged: Tensor, now: Tensor, found: Tensor, *, fresh: bool) -> None:
    """Take a result's integers into those of the next version, in place.

    The largest counts: an average of counts means nothing. An integer that all who changed it
    have lowered (steps that are left, a mask that loses elements) is lowered, to the largest of
    them; but not by a result of an older version, whose counters are lower for that reason.

    Args:
        merged: int64, from ``now`` on.
        now: int64, of the aggregator's model.
        found: int64, the result's.
        fresh: whether the result was made from the aggregator's version.
    """
    raised, lowered = found > now, found < now
    torch.where(raised, torch.maximum(merged, found), merged, out=merged)
    if fresh and lowered.any():
        less = torch.where(merged == now, found, torch.maximum(merged, found))
        torch.where(lowered & (merged <= now), less, merged, out=merged)


def moved(rest: Tensor, change: Tensor) -> Tensor:
    """Return frozen parameters and buffers, float32 [dim - parameters], after a change.

    What nobody changed stays to the bit, whatever its value: infinity and NaN too.
    """
    return torch.where(change == 0, rest, rest + change)


def _change(old: Tensor, new: Tensor) -> Tensor:
    """Return new - old; what is equal bit by bit, infinity and NaN too, changes by 0."""
    differs = old.contiguous().view(torch.int32) != new.contiguous().view(torch.int32)
    return torch.where(differs, new - old, 0.0)
