"""Write and read results that are models or updates of models.

Trained parameters are sent as a whole, through the codec. Of frozen parameters and buffers a result
contains those that training changed, exactly; the others are unchanged.
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
    """A model's values: weights float32 [dim], counters int64."""

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
    """Return the payload of a result: a model or its change.

    Args:
        layout: layout of both models.
        before: the received model.
        after: the trained model.
        numbers: numbers of the payload.
        reply: ``update`` or ``model``; counters are always sent as values.
        trained: values to send for the trained parameters, float32 [parameters], instead.
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
    """Refuse a frozen parameter or buffer that changes from infinity or NaN.

    Args:
        slot: slot of the tensor.
        old: its values before training, as they are sent.
        new: its values after training.

    Raises:
        ProblemError: it does; the message has its name.
    """
    differs = old.contiguous().view(torch.int32) != new.contiguous().view(torch.int32)
    if (differs & ~old.isfinite()).any():
        raise ProblemError(
            f"{slot.name}: expected a finite value at the start where training changes it, "
            "got infinity or NaN, whose change cannot be averaged"
        )


@dataclass(frozen=True)
class Arrived:
    """Content of a result.

    trained: trained parameters, in blocks as `Layout.blocks` returns them.
    rest: changes of frozen parameters and buffers, in the same form.
    counters: int64; None if unchanged.
    """

    trained: Iterable[tuple[int, Tensor]]
    rest: Sequence[tuple[int, Tensor]]
    counters: Tensor | None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, block) of all values to add up; each iteration starts again."""
        return itertools.chain(self.trained, self.rest)


def read_result(
    layout: Layout, payload: Payload, counters: Tensor, weights: Tensor | None = None
) -> Arrived:
    """Return the content of a result.

    A tensor may be in either group: in ledgers of 0.1.0 all weights are in the first.

    Args:
        layout: layout of the model.
        payload: payload of the result.
        counters: counters of the aggregator's current model.
        weights: weights of the aggregator's current model, if the result is a model: changes of
            tensors that are not trained are computed from them.

    Raises:
        ResultError: a name, shape or dtype differs from this model's.
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
    changed = [slot for slot in layout.rest if slot.name in others]
    rest = []
    if changed:
        # One block from the first to the last one that changed: frozen parameters are large.
        first, end = changed[0].start, changed[-1].start + changed[-1].size
        change = torch.zeros(end - first)
        for slot in changed:
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
            text = f"expected {slot.name!r}, {slot.dtype}, unchanged"
            raise ResultError(text, Fault.WRONG_SHAPE)
    if others:
        raise ResultError(f"expected no tensor {shorten(min(others))}", Fault.WRONG_SHAPE)
    return Arrived(blocks, rest, new)


def merge_counters(merged: Tensor, now: Tensor, found: Tensor, *, fresh: bool) -> None:
    """Merge a result's integers into those of the next version, in place.

    The largest is taken, because an average of counts is meaningless. An integer that every result
    which changed it has lowered (remaining steps, a mask that loses elements) becomes the largest
    of these; results of older versions do not lower it, because their counters are lower anyway.

    Args:
        merged: int64, equal to ``now`` at first.
        now: int64, of the aggregator's model.
        found: int64, of the result.
        fresh: whether the result was made from the aggregator's version.
    """
    raised, lowered = found > now, found < now
    torch.where(raised, torch.maximum(merged, found), merged, out=merged)
    if fresh and lowered.any():
        less = torch.where(merged == now, found, torch.maximum(merged, found))
        torch.where(lowered & (merged <= now), less, merged, out=merged)


def moved(rest: Tensor, change: Tensor) -> Tensor:
    """Return frozen parameters and buffers, float32 [dim - parameters], after a change.

    Unchanged values stay the same to the bit, including infinity and NaN.
    """
    return torch.where(change == 0, rest, rest + change)


def _change(old: Tensor, new: Tensor) -> Tensor:
    """Return new - old; values that are equal bit by bit, including NaN, change by 0."""
    differs = old.contiguous().view(torch.int32) != new.contiguous().view(torch.int32)
    return torch.where(differs, new - old, 0.0)
