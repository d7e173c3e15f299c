"""How far two computations of one message lie apart, where they need not agree to the bit."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedmq.algorithms.base import Payload
from fedmq.broker.state import CHECKPOINT
from fedmq.codecs.raw import Raw
from fedmq.nodes.payload import unpack
from fedmq.nodes.trace.differ import Side, fold_of
from fedmq.nodes.trace.groups import groups_of
from fedmq.nodes.trace.text import literal, plain

TOLERANCE = 1e-3
"""The largest |a - b| / |a| of each tensor of a message, and of each fraction in its body."""
LOSSY_TOLERANCE = 2e-2
"""The same for tensors that a lossy codec wrote: a value at the border between two levels may be
rounded to the other one."""
_FLOOR = 0.1
"""A tensor's length counts as at least this part of the length of all: some small ones are
nothing but rounding, for example a bias before a BatchNorm, whose gradient is 0, under Adam."""
DIGESTS = frozenset({"model_digest"})
"""Fields that say nothing of how far two models lie apart."""
_NOTHING = object()


def tensor_distance(a: Payload, b: Payload) -> float:
    """Return the largest |a - b| / |a| of all floating-point tensors of two payloads.

    Tensors are compared by name; a model's are, whether they travel as ``weights`` or as
    ``exact``. Infinity if names, shapes, types or whole numbers differ, or where only one of
    two numbers is finite.
    """
    return max(_distance(one, other) for one, other in zip(_parts(a), _parts(b), strict=True))


def _parts(payload: Payload) -> Iterator[dict[str, Tensor]]:
    yield {**payload.weights, **payload.exact}
    yield dict(payload.features)
    yield dict(payload.logits)


def _distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    forms = [{n: (t.dtype, t.shape) for n, t in each.items()} for each in (ours, theirs)]
    if forms[0] != forms[1]:
        return math.inf
    lengths: dict[str, float] = {}
    gaps: dict[str, float] = {}
    for name, one in ours.items():
        other = theirs[name]
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return math.inf
            continue
        x, y = one.double(), other.double()
        lengths[name] = float(x[x.isfinite()].norm())
        differ = (x != y) & ~(x.isnan() & y.isnan())
        gaps[name] = float((x - y)[differ].norm())
    least = max(_FLOOR * math.hypot(*lengths.values()), sys.float_info.min)
    far = [gap / max(lengths[name], least) for name, gap in gaps.items()]
    # A NaN against a number is no small distance, and not found by max() either.
    return math.inf if any(map(math.isnan, far)) else max(far, default=0.0)


def number_distance(a: object, b: object) -> float:
    """Return |a - b| / |a| of two floats; of all else 0 if they are equal, or infinity.

    Counts and numbers of messages are no measurements: 2000 is not 2001.
    """
    if type(a) is not type(b):
        return math.inf
    if not (isinstance(a, float) and isinstance(b, float)):
        return 0.0 if a == b else math.inf
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    gap = abs(a - b) / max(abs(a), sys.float_info.min)
    return gap if math.isfinite(gap) else math.inf


def distance(recorded: Side, replayed: Side) -> float:
    """Return how far the tensors of two messages lie apart, in units of what is tolerated.

    At most 1 is within the tolerance.

    Raises:
        CodecError: the groups of one of them cannot be decoded.
        LedgerError: bytes of one of them are not there.
    """
    if not any("groups" in each.message.body for each in (recorded, replayed)):
        return 0.0
    one, other = (unpack(each.message, each.read) for each in (recorded, replayed))
    lossy = any(each.codec != Raw().wire_name for each in groups_of(recorded.message)[0])
    return tensor_distance(one, other) / (LOSSY_TOLERANCE if lossy else TOLERANCE)


def facts(side: Side) -> dict[str, Any]:
    """Return all that a message says besides its tensors, a checkpoint's fold included.

    Raises:
        CodecError: it does not say which of its blobs are tensors.
    """
    message = side.message
    _, rest = groups_of(message)
    found = {name: getattr(message, name) for name in ("kind", "id", "run", "sender", "to", "re")}
    found["body"] = {key: value for key, value in message.body.items() if key != "groups"}
    found["blobs besides the tensors"] = len(message.blobs) - rest
    if message.to == CHECKPOINT and message.blobs:
        found["fold"] = fold_of(side, len(message.blobs) - 1)
    return found


def far_fields(recorded: Any, replayed: Any, path: str = "") -> Iterator[str]:
    """Yield a sentence for each recorded field that is not near the replayed one.

    What only the replay says is a difference in a message's body, of which it says no more
    than was recorded; in a checkpoint's fold it is not.
    """
    if isinstance(recorded, Mapping) and isinstance(replayed, Mapping):
        for key in recorded if path.startswith("fold") else dict.fromkeys([*recorded, *replayed]):
            name = f"{path}.{plain(key)}" if path else plain(key)
            one, other = (each.get(key, _NOTHING) for each in (recorded, replayed))
            if key not in DIGESTS or _NOTHING in (one, other):
                yield from far_fields(one, other, name)
    elif _is_list(recorded) and _is_list(replayed) and len(recorded) == len(replayed):
        for index, (one, other) in enumerate(zip(recorded, replayed, strict=True)):
            yield from far_fields(one, other, f"{path}[{index}]")
    elif number_distance(recorded, replayed) > TOLERANCE:
        yield f"{path}: {_shown(recorded)} in the record, {_shown(replayed)} in the replay"


def _shown(value: object) -> str:
    return "nothing" if value is _NOTHING else literal(value, 60)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
