"""How far two computations of one message lie apart, where they need not agree to the bit."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fedmq.algorithms.base import Payload
from fedmq.broker.errors import LedgerError
from fedmq.broker.wire.addresses import CHECKPOINT
from fedmq.codecs.errors import CodecError
from fedmq.codecs.raw import Raw
from fedmq.nodes.messages.payloads import unpack
from fedmq.nodes.trace.differ import Operand, differences, fold_of, form_of, gap_between
from fedmq.nodes.trace.differences import ABSENT, Difference, DifferenceKind, Field, InGroup
from fedmq.nodes.trace.groups import groups_of

TOLERANCE = 1e-3
"""The largest |a - b| / |a| of each tensor of a message, and of each fraction in its body."""
LOSSY_TOLERANCE = 2e-2
"""The same for tensors that a lossy codec wrote: a value at the border between two levels may be
rounded to the other one."""
NAMES = "the record", "the replay"
"""Of the two sides."""
DIGESTS = frozenset({"model_digest"})
"""Fields that say nothing of how far two models lie apart."""
_FLOOR = 0.1
"""A tensor's length counts as at least this part of the length of all: some small ones are
nothing but rounding, for example a bias before a BatchNorm, whose gradient is 0, under Adam."""


def near_differences(
    recorded: Operand,
    replayed: Operand,
    *,
    ignore: frozenset[str] = frozenset(),
    overall: bool = False,
) -> tuple[list[Difference], float]:
    """Return what is not near in two messages, and the distance of their tensors.

    Numbers and tensors that lie within the tolerance are no differences, nor are digests of
    models.

    Args:
        recorded: a message from the ledger.
        replayed: the same message, made again; of its body, only what a release that recorded
            the other one could say.
        ignore: paths of fields that may differ.
        overall: compare tensors together, see `overall_distance`, and not one by one.

    Returns:
        The differences; and the distance in units of what is tolerated, so that at most 1 is
        within it. Tensors that cannot be decoded are infinitely far apart.
    """
    try:
        found = [
            each
            for each in far_fields(facts(recorded), facts(replayed))
            if str(each.place) not in ignore
        ]
        one, other = _payload(recorded), _payload(replayed)
        gaps = list(_tensor_gaps(one, other))
    except (CodecError, LedgerError):
        exact = differences(recorded, replayed, names=NAMES, ignore=ignore)
        return [each for each in exact if not isinstance(each.place, Field)], math.inf
    lossy = any(each.codec != Raw().wire_name for each in groups_of(recorded.message)[0])
    limit = LOSSY_TOLERANCE if lossy else TOLERANCE
    distance = (overall_distance if overall else tensor_distance)(one, other)
    if distance > limit:
        found += [each.difference for each in gaps if overall or each.distance > limit]
    return found, distance / limit


def tensor_distance(a: Payload, b: Payload) -> float:
    """Return the largest |a - b| / |a| of all floating-point tensors of two payloads.

    Tensors are compared by name; a model's are, whether they travel as ``weights`` or as
    ``exact``. Infinity if names, shapes, types or whole numbers differ, or where only one of
    two numbers is finite.
    """
    return max((each.distance for each in _tensor_gaps(a, b)), default=0.0)


def overall_distance(a: Payload, b: Payload) -> float:
    """Return |a - b| / |a| over all floating-point tensors of two payloads together.

    What training comes to is compared like this: rounding grows in it, most in small tensors.
    Infinity as in `tensor_distance`.
    """
    gaps = list(_tensor_gaps(a, b))
    if any(math.isinf(each.distance) for each in gaps):
        return math.inf
    length = math.hypot(*(_length(each) for part in _parts(a) for _, each in part.values()))
    return math.hypot(*(each.gap for each in gaps)) / max(length, sys.float_info.min)


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


def is_number(value: object) -> TypeGuard[int | float]:
    """Tell whether a value is a number that rounding can change."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def facts(side: Operand) -> dict[str, Any]:
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


def far_fields(
    recorded: Any, replayed: Any, path: tuple[str | int, ...] = ()
) -> Iterator[Difference]:
    """Yield a difference for each recorded field that is not near the replayed one.

    What only the replay says is a difference in a message's body, of which it says no more
    than was recorded; in a checkpoint's fold it is not.
    """
    if isinstance(recorded, Mapping) and isinstance(replayed, Mapping):
        replayed = counted_as_in(recorded, replayed)
        in_fold = path[:1] == ("fold",)
        for key in recorded if in_fold else dict.fromkeys([*recorded, *replayed]):
            one, other = (each.get(key, ABSENT) for each in (recorded, replayed))
            if key not in DIGESTS or ABSENT in (one, other):
                yield from far_fields(one, other, (*path, key))
    elif _is_list(recorded) and _is_list(replayed) and len(recorded) == len(replayed):
        for index, (one, other) in enumerate(zip(recorded, replayed, strict=True)):
            yield from far_fields(one, other, (*path, index))
    elif number_distance(recorded, replayed) > TOLERANCE:
        yield Difference(DifferenceKind.FIELD, Field(path), (recorded, replayed), NAMES)


def counted_as_in(recorded: Mapping[str, Any], replayed: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return counts of results as the release counted that recorded them.

    0.1.0 had no ``unused``: of the results in no version, it counted those as used that were
    not waiting for others of their cohort.
    """
    match recorded, replayed:
        case {"used": int(then)}, {"used": int(used), "unused": int(unused)}:
            if "unused" not in recorded and used <= then <= used + unused:
                return {**replayed, "used": then}
    return replayed


@dataclass(frozen=True)
class _TensorGap:
    """A tensor that is not the same in two payloads, with |a - b| and |a - b| / |a|."""

    difference: Difference
    gap: float = math.inf
    distance: float = math.inf


def _payload(side: Operand) -> Payload:
    return unpack(side.message, side.read) if "groups" in side.message.body else Payload()


def _tensor_gaps(a: Payload, b: Payload) -> Iterator[_TensorGap]:
    for ours, theirs in zip(_parts(a), _parts(b), strict=True):
        length = math.hypot(*(_length(each) for _, each in ours.values()))
        for name in dict.fromkeys([*ours, *theirs]):
            group, one = ours.get(name, (theirs.get(name, ("", None))[0], None))
            _, other = theirs.get(name, ("", None))
            gap = _gap(InGroup(group, name), one, other, _FLOOR * length)
            if gap is not None:
                yield gap


def _gap(
    place: InGroup, one: Tensor | None, other: Tensor | None, least: float
) -> _TensorGap | None:
    if one is None or other is None:
        if one is not None and not one.any():
            return None  # 0.1.0 sent a change of 0, where nothing is sent now
        forms = tuple(ABSENT if each is None else form_of(each) for each in (one, other))
        return _TensorGap(Difference(DifferenceKind.MISSING, place, (forms[0], forms[1]), NAMES))
    both = form_of(one), form_of(other)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return _TensorGap(Difference(DifferenceKind.FORM, place, both, NAMES))
    found = gap_between(one, other)
    if found is None:
        return None
    difference = Difference(DifferenceKind.VALUES, place, both, NAMES, found)
    if not found.rounded:
        return _TensorGap(difference)
    x, y = _real(one), _real(other)
    differ = (x != y) & ~(x.isnan() & y.isnan())
    gap = float((x - y)[differ].norm())
    if not math.isfinite(gap):
        return _TensorGap(difference)  # a NaN or an infinity against a number
    return _TensorGap(difference, gap, gap / max(_length(one), least, sys.float_info.min))


def _parts(payload: Payload) -> Iterator[dict[str, tuple[str, Tensor]]]:
    """Yield tensors that belong together by name, each with its group."""
    groups = {"weights": payload.weights, "exact": payload.exact}
    yield {name: (group, each) for group, part in groups.items() for name, each in part.items()}
    yield {name: ("features", each) for name, each in payload.features.items()}
    yield {name: ("logits", each) for name, each in payload.logits.items()}


def _length(tensor: Tensor) -> float:
    """Return the norm of a tensor's finite values; 0 of whole numbers."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    x = _real(tensor)
    return float(x[x.isfinite()].norm())


def _real(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.double()


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
