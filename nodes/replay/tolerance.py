"""Distance between two computations of a message that need not be equal to the bit."""

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
"""The same for tensors from a lossy codec, which may round a value between two levels to either."""
NAMES = "the record", "the replay"
"""Names of the two operands, for people."""
DIGESTS = frozenset({"model_digest"})
"""Fields from which no distance follows."""
_FLOOR = 0.1
"""The norm of a tensor counts as at least this fraction of the norm of all tensors: some small ones
are pure rounding, for example a bias before a BatchNorm under Adam, whose gradient is 0."""


def near_differences(
    recorded: Operand,
    replayed: Operand,
    *,
    ignore: frozenset[str] = frozenset(),
    overall: bool = False,
) -> tuple[list[Difference], float]:
    """Return the differences of two messages beyond the tolerance, and their tensors' distance.

    Model digests are not compared.

    Args:
        recorded: a message from the ledger.
        replayed: the same message, computed again, without the body fields that the release of
            the record did not have.
        ignore: paths of fields that may differ.
        overall: compare all tensors together, see `overall_distance`, instead of one by one.

    Returns:
        The differences; and the distance as a multiple of the tolerance: at most 1 is within it.
        Infinity if tensors cannot be decoded.
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

    Tensors are compared by name; ``weights`` and ``exact`` count as one group. Infinity if names,
    shapes, dtypes or integers differ, or if only one of two numbers is finite.
    """
    return max((each.distance for each in _tensor_gaps(a, b)), default=0.0)


def overall_distance(a: Payload, b: Payload) -> float:
    """Return |a - b| / |a| over all floating-point tensors of two payloads together.

    For the results of training, in which rounding errors grow, most in small tensors. Infinity as
    in `tensor_distance`.
    """
    gaps = list(_tensor_gaps(a, b))
    if any(math.isinf(each.distance) for each in gaps):
        return math.inf
    length = math.hypot(*(_length(each) for part in _parts(a) for _, each in part.values()))
    return math.hypot(*(each.gap for each in gaps)) / max(length, sys.float_info.min)


def number_distance(a: object, b: object) -> float:
    """Return |a - b| / |a| of two floats; of other values 0 if they are equal, else infinity.

    Integers are exact: they count things or number messages.
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
    """Return whether a value is a real number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def facts(operand: Operand) -> dict[str, Any]:
    """Return all fields of a message, including a checkpoint's fold, without its tensors.

    Raises:
        CodecError: its groups of tensors are invalid.
    """
    message = operand.message
    _, rest = groups_of(message)
    found = {name: getattr(message, name) for name in ("kind", "id", "run", "sender", "to", "re")}
    found["body"] = {key: value for key, value in message.body.items() if key != "groups"}
    found["blobs besides the tensors"] = len(message.blobs) - rest
    if message.to == CHECKPOINT and message.blobs:
        found["fold"] = fold_of(operand, len(message.blobs) - 1)
    return found


def far_fields(
    recorded: Any, replayed: Any, path: tuple[str | int, ...] = ()
) -> Iterator[Difference]:
    """Yield a difference for each recorded field that is not within the tolerance.

    An additional field of the replay is a difference, except in a checkpoint's fold.
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
    """Return counts of results as the recording release counted them.

    0.1.0 had no ``unused``: it counted an unused result as used unless the result was waiting for
    others of its cohort.
    """
    match recorded, replayed:
        case {"used": int(then)}, {"used": int(used), "unused": int(unused)}:
            if "unused" not in recorded and used <= then <= used + unused:
                return {**replayed, "used": then}
    return replayed


@dataclass(frozen=True)
class _TensorGap:
    """A tensor that differs between two payloads, with |a - b| and |a - b| / |a|."""

    difference: Difference
    gap: float = math.inf
    distance: float = math.inf


def _payload(operand: Operand) -> Payload:
    message = operand.message
    return unpack(message, operand.read) if "groups" in message.body else Payload()


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
            return None  # 0.1.0 sent zeros where later releases send nothing
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
    """Yield tensors by name, each with its group, for each set that is compared together."""
    groups = {"weights": payload.weights, "exact": payload.exact}
    yield {name: (group, each) for group, part in groups.items() for name, each in part.items()}
    yield {name: ("features", each) for name, each in payload.features.items()}
    yield {name: ("logits", each) for name, each in payload.logits.items()}


def _length(tensor: Tensor) -> float:
    """Return the norm of a tensor's finite values; 0 for integers."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    x = _real(tensor)
    return float(x[x.isfinite()].norm())


def _real(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.double()


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
