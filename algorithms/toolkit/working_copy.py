"""A module that can be restored, and whose re-bound tensors are followed.

torch lets a module change itself in `forward`: assign a buffer, replace the data of a parameter,
count its calls, keep a hidden state. Within a task this works as in a plain torch loop. But one
module serves all clients of a process, and its trained values are read from vectors to which its
tensors were bound.
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
"""Types that never change, or that a deep copy shares anyway."""
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (dict, OrderedDict, list, set)


@dataclass
class BoundTensor:
    """A tensor of a module, and the memory of its values.

    tensor: the module's object.
    view: view of the vector that the tensor is bound to; None: its own memory.
    gradient: view of the vector of gradients; None if it is not trained.
    """

    name: str
    tensor: Tensor
    view: Tensor | None = None
    gradient: Tensor | None = None
    home: Tensor = field(init=False)
    """Memory of the values, with their shape and dtype; ``pointer`` is its address."""
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
        """Return whether the tensor still uses its memory."""
        tensor, home = self.tensor, self.home
        return (
            tensor.data_ptr() == self.pointer
            and tensor.shape == home.shape
            and tensor.stride() == home.stride()
            and tensor.dtype == home.dtype
        )

    def bind(self) -> None:
        """Bind the tensor and its gradient to their memory."""
        tensor = self.tensor
        if tensor.grad_fn is not None:
            tensor.detach_()  # a buffer that was changed in place refers to its last graph
        if tensor.requires_grad != self.needs_gradient:
            tensor.requires_grad_(self.needs_gradient)
        if not self.at_home:
            tensor.data = self.home
        if tensor.grad is not self.gradient:
            tensor.grad = self.gradient

    def follow(self) -> None:
        """Copy values from other memory that the module gave the tensor.

        Raises:
            ProblemError: their shape or dtype differs.
        """
        if not self.at_home:
            values = self.check(self.tensor.data)
            self.tensor.grad = None  # torch compares its dtype and shape with those of the data
            self.tensor.data = self.home
            self.home.copy_(values)
            self.tensor.grad = self.gradient

    def follow_gradient(self) -> None:
        """Copy a gradient from other memory; a missing one is zero.

        Raises:
            ProblemError: its shape or dtype differs, or the bound gradient was moved.
        """
        found, ours = self.tensor.grad, self.gradient
        if ours is None or (found is ours and ours.data_ptr() == self.gradient_pointer):
            return
        if found is ours:
            raise ProblemError(
                f"expected the gradient of {self.name} in its memory, the model moved it"
            )
        if found is None:
            ours.zero_()
        else:
            ours.copy_(self.check(found.to_dense(), "the gradient of "))
        self.tensor.grad = ours

    def check(self, values: Tensor, what: str = "") -> Tensor:
        """Return a copy of values that replaced these.

        Raises:
            ProblemError: their shape or dtype differs.
        """
        if values.shape != self.home.shape or values.dtype != self.home.dtype:
            raise ProblemError(
                f"expected {what}{self.name} to stay {_kind(self.home)}, "
                f"the model made it {_kind(values)}"
            )
        return values.detach().clone()


class WorkingCopy:
    """A module whose tensors are bound to vectors."""

    def __init__(self, module: nn.Module, bound: Sequence[BoundTensor]) -> None:
        self.module = module
        self._bound = bound
        self._trained = [each for each in bound if each.gradient is not None]
        by_tensor = {id(each.tensor): each for each in bound}
        # By every name that a tensor has: tied ones have several.
        self._parameters = {name: by_tensor[id(each)] for name, each in _parameters(module)}
        self._buffers = {name: by_tensor[id(each)] for name, each in _buffers(module)}
        try:
            self._snapshot: _Snapshot | None = _Snapshot(module)
        except Exception:  # noqa: BLE001 - attributes of a module may raise anything
            self._snapshot = None

    def reset(self) -> bool:
        """Restore the module; return False if that needs a new one."""
        if self._snapshot is not None:
            self._snapshot.restore()
        for each in self._bound:
            each.bind()
        return self._snapshot is not None

    def after_backward(self) -> None:
        """Follow trained parameters and gradients that the module re-bound.

        Raises:
            ProblemError: one cannot be followed.
        """
        for each in self._trained:
            each.follow_gradient()
            each.follow()

    def end_task(self) -> None:
        """Follow all parameters and buffers that the module re-bound, by their names.

        Raises:
            ProblemError: one cannot be followed.
        """
        self._check_parameters()
        for each in self._parameters.values():
            each.follow()
        values: dict[str, tuple[BoundTensor, Tensor]] = {}
        found: dict[str, Tensor] = {}
        now = dict(_buffers(self.module))
        for name, each in self._buffers.items():
            tensor = now.get(name)
            if tensor is None:
                raise ProblemError(f"expected buffer {name} to stay, the model removed it")
            if found.setdefault(each.name, tensor) is not tensor:
                raise ProblemError(
                    f"expected {each.name} and {name} to stay one tensor, the model made them two"
                )
            if tensor is not each.tensor or not each.at_home:
                values[name] = (each, each.check(tensor))
        # After all copies are made, because the model may have swapped two buffers.
        for name, (each, value) in values.items():
            each.bind()
            each.home.copy_(value)
            path, _, own = name.rpartition(".")
            try:
                setattr(_submodule(self.module, path), own, each.tensor)
            except (AttributeError, RuntimeError, TypeError):
                raise ProblemError(
                    f"buffer {name} is assigned in forward and cannot be restored in a "
                    f"{type(self.module).__name__}: change its values in place"
                ) from None

    def _check_parameters(self) -> None:
        """Raise ProblemError unless each parameter is still the same object."""
        now = dict(_parameters(self.module))
        for name, each in self._parameters.items():
            if now.get(name) is not each.tensor:
                change = "replaced it" if name in now else "removed it"
                raise ProblemError(f"expected parameter {name} to stay, the model {change}")
            if each.tensor.requires_grad and not each.needs_gradient:
                raise ProblemError(f"expected parameter {name} to stay frozen, the model trains it")
        if extra := now.keys() - self._parameters.keys():
            raise ProblemError(
                f"expected all parameters at the start, the model added {min(extra)} in a task"
            )


class _Snapshot:
    """A copy of the attributes of a module and its submodules, without tensors' values.

    Modules, dictionaries, lists and sets stay the same objects, so that others that refer to them
    (a hook, a function made in the constructor) see the restored content.

    Raises:
        Exception: any, if an attribute cannot be copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        if any(isinstance(each, torch.jit.ScriptModule) for each in self._modules):
            raise TypeError("a compiled module stores its attributes elsewhere")
        tensors = [each for _, each in (*_parameters(module), *_buffers(module))]
        # Deep copies share these objects.
        self._memo: dict[int, Any] = {id(each): each for each in (*self._modules, *tensors)}
        attributes = [dict(vars(each)) for each in self._modules]
        # They also share the owner of a hook that is a method. If a module refers to the owner, its
        # attributes are restored too; other owners, such as the problem, are left alone.
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
        # Their current content: tensors and modules by name, or nothing.
        self._shallow = [
            {name: copy.copy(each) for name, each in held.items() if name in fixed}
            for held, fixed in zip(self._containers, self._fixed, strict=True)
        ]
        self._changing = copy.deepcopy(changing, dict(self._memo))

    def restore(self) -> None:
        """Restore all attributes."""
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
    """Return a submodule; a compiled module has no `get_submodule`."""
    found: nn.Module = functools.reduce(getattr, path.split(".") if path else (), module)
    return found


def _is_hooks(name: str) -> bool:
    return name.startswith("_") and name.endswith("_hooks")


def _is_fixed(name: str, value: Any) -> bool:
    """Return whether an attribute can be restored without a deep copy."""
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
