"""The order of a model's tensors in flat vectors: trained, not trained, and exact ones."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedmq.algorithms.errors import Fault, ProblemError, ResultError
from fedmq.algorithms.tasks import Payload
from fedmq.algorithms.toolkit.shared_memory import refuse_shared_memory, refuse_views
from fedmq.algorithms.values import is_utf8
from fedmq.codecs.formats.flat import as_flat
from fedmq.codecs.formats.streamed import Streamed
from fedmq.codecs.text import shorten

EXACT = (torch.float64, torch.float16, torch.bfloat16, torch.complex128)
"""Dtypes of constants that are carried bit by bit and never computed with."""
_CARRIED = (torch.float32, torch.complex64, *EXACT)
_WORD = 8
"""Size of an int64 in bytes."""


@dataclass(frozen=True)
class Slot:
    """The position of a named tensor in a flat vector.

    shape: shape in a payload; a complex tensor is pairs of real numbers, a last dimension of 2.
    start, size: in elements of the vector.
    dtype: dtype in the module.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    size: int
    dtype: torch.dtype = torch.float32

    @property
    def wire_dtype(self) -> torch.dtype:
        """Return the dtype of the tensor in a payload."""
        if self.dtype in EXACT:
            return self.dtype.to_real()
        return torch.float32 if self.in_weights else torch.int64

    @property
    def in_weights(self) -> bool:
        """Return whether the tensor is stored as float32 values; otherwise as int64 words."""
        return self.dtype in (torch.float32, torch.complex64)

    def view(self, vector: Tensor, first: int = 0) -> Tensor:
        """Return the tensor as it is sent, without a copy.

        first: index in the whole vector of the first element of ``vector``.
        """
        start = self.start - first
        piece = vector[start : start + self.size]
        if self.dtype in EXACT:
            nbytes = math.prod(self.shape) * self.wire_dtype.itemsize
            piece = piece.view(torch.uint8)[:nbytes].view(self.wire_dtype)
        return piece.view(self.shape)

    def tensor(self, vector: Tensor) -> Tensor:
        """Return the tensor with the module's dtype (integers as int64), without a copy."""
        found = self.view(vector)
        if not self.dtype.is_complex:
            return found
        # torch requires an even offset; otherwise a copy is needed.
        return torch.view_as_complex(found.clone() if found.storage_offset() % 2 else found)


@dataclass(frozen=True)
class Layout:
    """The order of a model's tensors: parameters, then floating-point buffers; integers apart.

    ``weights``: tensors stored as float32: trained parameters, frozen parameters, and buffers (a
    BatchNorm's running mean and variance). Of those that are not trained, unchanged ones stay the
    same to the bit. complex64 is two float32 each.
    ``counters``: tensors stored as int64 words: integer buffers (a BatchNorm's
    num_batches_tracked), of which the largest of the cohort is taken because an average of counts
    is meaningless; and constants of other dtypes, bit by bit.
    """

    weights: tuple[Slot, ...]
    counters: tuple[Slot, ...]
    parameters: int
    """Number of elements of the weights that are trained."""

    @functools.cached_property
    def dim(self) -> int:
        """Return the length of the weight vector."""
        return max((slot.start + slot.size for slot in self.weights), default=0)

    @functools.cached_property
    def trained(self) -> tuple[Slot, ...]:
        """Return the parameters that are trained."""
        return tuple(slot for slot in self.weights if slot.start < self.parameters)

    @functools.cached_property
    def rest(self) -> tuple[Slot, ...]:
        """Return frozen parameters and floating-point buffers."""
        return tuple(slot for slot in self.weights if slot.start >= self.parameters)

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """Return the layout of a module.

        Raises:
            ProblemError: a tensor has an unsupported dtype, is sparse, has no shape yet, or shares
                memory with another.
        """
        parameters, buffers = list(module.named_parameters()), list(module.named_buffers())
        for name, tensor in parameters + buffers:
            if not is_utf8(name):
                raise ProblemError(f"expected names of tensors in UTF-8, got {name!a:.200}")
            if tensor.layout != torch.strided:
                raise ProblemError(f"expected dense tensors, got {tensor.layout} for {name}")
            if is_lazy(tensor):
                raise ProblemError(
                    f"expected tensors with a shape, got none for {name} before the first forward"
                )
        refuse_shared_memory(parameters, buffers)
        refuse_views(module)
        trained = [(name, each) for name, each in parameters if each.requires_grad]
        frozen = [(name, each) for name, each in parameters if not each.requires_grad]
        for name, tensor in trained:
            if not _slot(name, tensor).in_weights:
                raise ProblemError(f"expected float32 weights, got {tensor.dtype} for {name}")
        others = [_slot(name, each) for name, each in (*frozen, *buffers)]
        learned = end_to_end(_slot(name, each) for name, each in trained)
        length = max((slot.start + slot.size for slot in learned), default=0)
        rest = end_to_end((slot for slot in others if slot.in_weights), length)
        counters = end_to_end(slot for slot in others if not slot.in_weights)
        return cls((*learned, *rest), counters, length)

    def views(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a weight vector [dim] by name, without a copy."""
        return {slot.name: slot.view(weights) for slot in self.weights}

    def trained_views(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the trained parameters of a vector [>= parameters] by name, without a copy."""
        return {slot.name: slot.view(weights) for slot in self.trained}

    def counter_views(self, counters: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a counter vector by name, without a copy."""
        return {slot.name: slot.view(counters) for slot in self.counters}

    def tensors(self, weights: Tensor, counters: Tensor) -> dict[str, Tensor]:
        """Return a model's tensors by name, complex ones as complex and integers as int64."""
        vectors = ((self.weights, weights), (self.counters, counters))
        return {slot.name: slot.tensor(vector) for slots, vector in vectors for slot in slots}

    def write(self, weights: Tensor, counters: Tensor) -> Payload:
        """Return a whole model as a payload, without a copy.

        Trained parameters go through the codec; the rest and the counters are sent exactly.
        """
        rest = {slot.name: slot.view(weights) for slot in self.rest}
        return Payload(self.trained_views(weights), rest | self.counter_views(counters))

    def read(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Return the weight and the counter vector of a whole model.

        A tensor may be in either group: in ledgers of 0.1.0 all weights are in the first.

        Raises:
            ResultError: a name, shape or dtype differs from this model's.
        """
        exact = named_once(payload.weights, payload.exact)
        names = {slot.name for slot in self.counters}
        weights: Mapping[str, Tensor] = payload.weights
        if rest := {name: each for name, each in exact.items() if name not in names}:
            weights = {**weights, **rest}
        counters = {name: each for name, each in exact.items() if name in names}
        return self.flatten(weights), self.flatten_counters(counters)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return named tensors as one weight vector, float32 [dim], without a copy if possible.

        Raises:
            ResultError: a name, shape or dtype differs from this model's.
        """
        return _flatten(self.weights, tensors, torch.float32)

    def flatten_trained(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the trained parameters as one vector, float32 [parameters].

        Raises:
            ResultError: a name, shape or dtype differs from this model's.
        """
        return _flatten(self.trained, tensors, torch.float32)

    def blocks(self, tensors: Mapping[str, Tensor]) -> Iterable[tuple[int, Tensor]]:
        """Return the trained parameters in blocks: (start index, float32 [length]).

        They are one block unless they are streamed: the blocks of a large model are not in memory
        at once, and each iteration reads them again.

        Raises:
            ResultError: a name or shape differs from this model's.
        """
        if not isinstance(tensors, Streamed):
            return [(0, self.flatten_trained(tensors))]
        wanted = {slot.name: slot.shape for slot in self.trained}
        if dict(tensors.shapes) != wanted or list(tensors.shapes) != list(wanted):
            raise misfit("expected the names and shapes of this model's tensors, got others")
        if sum(slot.size for slot in self.trained) != self.parameters:
            return [(0, self.flatten_trained(tensors.read()))]  # there are gaps
        return _StreamedBlocks(tensors)

    def flatten_counters(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return named tensors as one counter vector, int64.

        Raises:
            ResultError: a name, shape or dtype differs from this model's.
        """
        return _flatten(self.counters, tensors, torch.int64)


def end_to_end(slots: Iterable[Slot], start: int = 0) -> tuple[Slot, ...]:
    """Return the slots one after the other; complex ones at even offsets, as torch requires."""
    placed = []
    for slot in slots:
        start += start % 2 if slot.dtype.is_complex else 0
        placed.append(dataclasses.replace(slot, start=start))
        start += slot.size
    return tuple(placed)


def named_once(weights: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the exact tensors.

    Raises:
        ResultError: a name is also among the weights.
    """
    twice = sorted(name for name in exact if name in weights)
    if twice:
        raise misfit(f"expected a tensor {shorten(twice[0])} in one group, got it in two")
    return exact


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one shape and dtype are equal bit by bit, including NaN."""
    one, other = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(one, other)


@dataclass(frozen=True)
class _StreamedBlocks:
    tensors: Streamed

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        start = 0
        for block in self.tensors.blocks():
            yield start, block
            start += block.numel()


def _slot(name: str, tensor: Tensor) -> Slot:
    """Return a tensor's slot without a position.

    Raises:
        ProblemError: its dtype is not supported.
    """
    dtype = tensor.dtype
    if (dtype.is_floating_point or dtype.is_complex) and dtype not in _CARRIED:
        kinds = ", ".join(str(each).removeprefix("torch.") for each in _CARRIED)
        raise ProblemError(f"expected {name} as one of {kinds} or integers, got {dtype}")
    shape, size = tuple(tensor.shape), tensor.numel()
    if dtype in EXACT:
        size = -(-size * dtype.itemsize // _WORD)
    elif dtype.is_complex:
        size *= 2
    return Slot(name, (*shape, 2) if dtype.is_complex else shape, 0, size, dtype)


def as_pairs(tensor: Tensor) -> Tensor:
    """Return a tensor without a gradient, complex numbers as pairs of real ones."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _flatten(slots: Sequence[Slot], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    for slot in slots:
        check_tensor(slot, tensors.get(slot.name))
    extra = sorted(set(tensors) - {slot.name for slot in slots})
    if extra:
        raise misfit(f"expected no tensor {shorten(extra[0])}")
    if not slots:
        return torch.zeros(0, dtype=dtype)
    end = slots[-1].start + slots[-1].size
    if end == sum(slot.size for slot in slots) and all(slot.wire_dtype == dtype for slot in slots):
        return as_flat([tensors[slot.name] for slot in slots])
    vector = torch.zeros(end, dtype=dtype)
    for slot in slots:
        slot.view(vector).copy_(tensors[slot.name])
    return vector


def check_tensor(slot: Slot, tensor: Tensor | None) -> Tensor:
    """Return a tensor of a payload that must fit a slot; see `expect_tensor`."""
    return expect_tensor(slot.name, tensor, slot.wire_dtype, slot.shape)


def expect_tensor(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """Return a tensor that must have this dtype and shape.

    Raises:
        ResultError: it is missing or has others; the message has both.
    """
    if tensor is None:
        raise misfit(f"expected a tensor {name!r}, it is missing")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise misfit(
            f"expected {name} as {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor


def misfit(reason: str) -> ResultError:
    """Return an error with the code for wrong names, shapes and dtypes."""
    return ResultError(reason, Fault.WRONG_SHAPE)
