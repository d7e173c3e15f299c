"""A module that goes back to how it was made, and what it has re-bound meanwhile.

torch lets a module do anything to itself in `forward`: assign a buffer, replace the data of a
parameter, count its calls, keep a hidden state. Within a task that is the module's own affair,
as in a plain loop of torch; but one module serves all clients of a process, and what it
learned is read from vectors that its tensors were bound to.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedmq.algorithms.errors import ProblemError

_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    torch.dtype,
    torch.device,
)
"""What never changes, or is shared by a deep copy anyway."""
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (dict, OrderedDict, list, set)


@dataclass
class BoundTensor:
    """A tensor of a module, and where its values belong.

    tensor: the module's own object.
    view: of the vector that the tensor is bound to; None: the memory that it has.
    gradient: of the gradients' vector; None where it is not trained.
    """

    name: str
    tensor: Tensor
    view: Tensor | None = None
    gradient: Tensor | None = None
    home: Tensor = field(init=False)
    """Where the values belong, and in which shape and dtype; ``pointer`` is its address."""
    pointer: int = field(init=False)
    gradient_pointer: int = field(init=False)
    needs_gradient: bool = field(init=False)

    def __post_init__(self) -> None:
        self.home = self.tensor.data if self.view is None else self.view.detach()
        self.pointer = self.home.data_ptr()
        self.gradient_pointer = 0 if self.gradient is None else self.gradient.data_ptr()
        self.needs_gradient = self.tensor.requires_grad
        self.bind()

    @property
    def at_home(self) -> bool:
        """Tell whether the tensor's values are where they belong."""
        tensor, home = self.tensor, self.home
        return (
            tensor.data_ptr() == self.pointer
            and tensor.shape == home.shape
            and tensor.stride() == home.stride()
            and tensor.dtype == home.dtype
        )

    def bind(self) -> None:
        """Let the tensor and its gradient be what lies in their places."""
        tensor = self.tensor
        if tensor.grad_fn is not None:
            tensor.detach_()  # a buffer that was added to in place hangs on its last graph
        if tensor.requires_grad != self.needs_gradient:
            tensor.requires_grad_(self.needs_gradient)
        if not self.at_home:
            tensor.data = self.home
        if tensor.grad is not self.gradient:
            tensor.grad = self.gradient

    def follow(self) -> None:
        """Copy values whose tensor was given other memory to where they belong.

        Raises:
            ProblemError: their shape or dtype is another.
        """
        if not self.at_home:
            values = self.check(self.tensor.data)
            self.tensor.grad = None  # torch compares its dtype and shape with those of the data
            self.tensor.data = self.home
            self.home.copy_(values)
            self.tensor.grad = self.gradient

    def follow_gradient(self) -> None:
        """Likewise for the gradient; where there is none it is zero.

        Raises:
            ProblemError: its shape or dtype is another.
        """
        found, ours = self.tensor.grad, self.gradient
        if ours is None or (found is ours and ours.data_ptr() == self.gradient_pointer):
            return
        if found is ours:
            raise ProblemError(f"the model gave the gradient of {self.name} other memory")
        if found is None:
            ours.zero_()
        else:
            ours.copy_(self.check(found.to_dense(), "the gradient of "))
        self.tensor.grad = ours

    def check(self, values: Tensor, what: str = "") -> Tensor:
        """Return a copy of values that were found in place of these.

        Raises:
            ProblemError: their shape or dtype is another.
        """
        if values.shape != self.home.shape or values.dtype != self.home.dtype:
            raise ProblemError(
                f"expected {what}{self.name} to stay {_kind(self.home)}, "
                f"the model made it {_kind(values)}"
            )
        return values.detach().clone()


class WorkingCopy:
    """A module whose tensors are bound to their places."""

    def __init__(self, module: nn.Module, places: Sequence[BoundTensor]) -> None:
        self.module = module
        self._places = places
        self._trained = [each for each in places if each.gradient is not None]
        by_tensor = {id(each.tensor): each for each in places}
        # By every name that a tensor has: tied ones have several.
        self._parameters = {name: by_tensor[id(each)] for name, each in _parameters(module)}
        self._buffers = {name: by_tensor[id(each)] for name, each in _buffers(module)}
        try:
            self._snapshot: _Snapshot | None = _Snapshot(module)
        except Exception:  # noqa: BLE001 - a module may hold anything, and refuse in any way
            self._snapshot = None

    def reset(self) -> bool:
        """Let the module be as it was made; return False if that takes a new one."""
        if self._snapshot is not None:
            self._snapshot.restore()
        for each in self._places:
            each.bind()
        return self._snapshot is not None

    def after_backward(self) -> None:
        """Follow trained parameters, and their gradients, that were given other memory.

        Raises:
            ProblemError: one cannot be followed.
        """
        for each in self._trained:
            each.follow_gradient()
            each.follow()

    def end_task(self) -> None:
        """Follow all parameters and buffers, and find them again under their names.

        Raises:
            ProblemError: one cannot be followed.
        """
        self._check_parameters()
        for each in self._parameters.values():
            each.follow()
        values: dict[str, tuple[BoundTensor, Tensor]] = {}
        found: dict[str, Tensor] = {}
        now = dict(_buffers(self.module))
        for name, place in self._buffers.items():
            tensor = now.get(name)
            if tensor is None:
                raise ProblemError(f"expected buffer {name} to stay, the model took it away")
            if found.setdefault(place.name, tensor) is not tensor:
                raise ProblemError(
                    f"expected {place.name} and {name} to stay one tensor, the model made them two"
                )
            if tensor is not place.tensor or not place.at_home:
                values[name] = (place, place.check(tensor))
        # Only when all are copies: a model may have swapped two of them.
        for name, (place, value) in values.items():
            place.bind()
            place.home.copy_(value)
            path, _, own = name.rpartition(".")
            try:
                setattr(_submodule(self.module, path), own, place.tensor)
            except (AttributeError, RuntimeError, TypeError):
                raise ProblemError(
                    f"buffer {name} is assigned in forward, and cannot be put back in a "
                    f"{type(self.module).__name__}: change its values in place"
                ) from None

    def _check_parameters(self) -> None:
        """Raise ProblemError unless each parameter is still the object that it was."""
        now = dict(_parameters(self.module))
        for name, place in self._parameters.items():
            if now.get(name) is not place.tensor:
                fate = "put another in its place" if name in now else "took it away"
                raise ProblemError(f"expected parameter {name} to stay, the model {fate}")
            if place.tensor.requires_grad and not place.needs_gradient:
                raise ProblemError(
                    f"expected parameter {name} to stay frozen, the model began to train it"
                )
        if extra := now.keys() - self._parameters.keys():
            raise ProblemError(
                f"expected all parameters to be there at the start, "
                f"the model added {min(extra)} in a task"
            )


class _Snapshot:
    """What a module and all modules in it hold in their attributes, but for tensors' values.

    Modules, dictionaries, lists and sets stay the objects that they are, so that whoever holds
    one of them (a hook, a function made in the constructor) sees it put back too.

    Raises:
        Exception: any, if an attribute cannot be copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        if any(isinstance(each, torch.jit.ScriptModule) for each in self._modules):
            raise TypeError("a compiled module keeps its attributes elsewhere")
        tensors = [each for _, each in (*_parameters(module), *_buffers(module))]
        # In every copy these are themselves.
        self._memo: dict[int, Any] = {id(each): each for each in (*self._modules, *tensors)}
        attributes = [dict(vars(each)) for each in self._modules]
        # So is what a hook belongs to, if that is a method. Where a module holds it, its attributes
        # are put back as well; what is somebody else's, such as the problem, is left alone.
        hooks = [each for held in attributes for name, each in held.items() if _is_hooks(name)]
        owners = [getattr(each, "__self__", None) for held in hooks for each in held.values()]
        self._memo |= {id(each): each for each in owners if each is not None}
        values = {id(each) for held in attributes for each in held.values()}
        self._owners = [
            each
            for each in owners
            if id(each) in values
            and hasattr(each, "__dict__")
            and not isinstance(each, nn.Module | type)
        ]
        self._owned = copy.deepcopy([dict(vars(each)) for each in self._owners], dict(self._memo))
        changing = [
            {name: each for name, each in held.items() if not _is_fixed(name, each)}
            for held in attributes
        ]
        self._fixed = [
            {name: each for name, each in held.items() if name not in others}
            for held, others in zip(attributes, changing, strict=True)
        ]
        self._containers = [
            {name: each for name, each in held.items() if type(each) in _CONTAINERS}
            for held in attributes
        ]
        # Their content as it is now: tensors and modules by name, or nothing.
        self._shallow = [
            {name: copy.copy(each) for name, each in held.items() if name in fixed}
            for held, fixed in zip(self._containers, self._fixed, strict=True)
        ]
        self._changing = copy.deepcopy(changing, dict(self._memo))

    def restore(self) -> None:
        """Put everything back."""
        copies = self._changing
        if any(copies):
            copies = copy.deepcopy(copies, dict(self._memo))
        if self._owners:
            owned = copy.deepcopy(self._owned, dict(self._memo))
            for owner, held in zip(self._owners, owned, strict=True):
                vars(owner).clear()
                vars(owner).update(held)
        for at, module in enumerate(self._modules):
            attributes, containers = vars(module), self._containers[at]
            attributes.clear()
            attributes.update(self._fixed[at])
            attributes.update(copies[at])
            attributes.update(containers)
            for name, content in (*self._shallow[at].items(), *copies[at].items()):
                if name in containers:
                    _refill(containers[name], content)


def _submodule(module: nn.Module, path: str) -> nn.Module:
    """Return a module in another; a compiled one has no `get_submodule`."""
    found: nn.Module = functools.reduce(getattr, path.split(".") if path else (), module)
    return found


def _is_hooks(name: str) -> bool:
    return name.startswith("_") and name.endswith("_hooks")


def _is_fixed(name: str, value: Any) -> bool:
    """Tell whether an attribute needs no deep copy to be put back."""
    if type(value) in _CONTAINERS:
        return name in _REGISTRIES or not value
    return _never_changes(value)


def _never_changes(value: Any) -> bool:
    if type(value) in (tuple, torch.Size, frozenset):
        return all(map(_never_changes, value))
    return type(value) in _ATOMS


def _refill(container: Any, content: Any) -> None:
    if container or content:
        container.clear()
        extend = container.extend if type(container) is list else container.update
        extend(content)


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(remove_duplicate=False))


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_buffers(remove_duplicate=False))


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
