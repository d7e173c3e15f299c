"""Write the final model of a run to files, and read it.

``model.safetensors`` has the state dict of the problem's module: `read_state_dict` returns it for
``module.load_state_dict(state, strict=True)``. If the algorithm's model is not that module (a
hypernetwork, a server network, tables of outputs), the file has the algorithm's tensors by name.
Tensors that the format does not support are converted, and the file's metadata describe how.
``model.npz`` has the algorithm's tensors as numpy arrays.
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import structlog
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems.base import Problem
from fedmq.nodes.errors import NodeError
from fedmq.nodes.process.atomic_write import replacing
from fedmq.nodes.process.exception_text import reason_of

MODEL_FILE = "model.safetensors"
ARRAYS_FILE = "model.npz"
_RESERVED = "__metadata__"
_NOTES = "fedmq"
"""Key in the file's metadata: facts about the run, and notes on converted tensors."""

_log = structlog.get_logger()


def save_model(
    folder: Path, tensors: Mapping[str, Tensor], problem: Problem, about: Mapping[str, str]
) -> None:
    """Write the files of a run's final model, each atomically.

    Args:
        folder: of the run.
        tensors: the algorithm's tensors by name.
        problem: makes the module that the tensors may belong to.
        about: facts for the file's metadata, such as the run's id.

    Raises:
        NodeError: a file cannot be written.
    """
    state = module_state(tensors, problem)
    holds = "tensors" if state is None else "module"
    content, notes = _as_held(tensors if state is None else state)
    metadata = {"format": "pt", _NOTES: json.dumps({"holds": holds, **about, **notes})}
    _replace(
        folder / MODEL_FILE,
        lambda path: safetensors.torch.save_file(content, path, metadata=metadata),
    )
    _replace(folder / ARRAYS_FILE, lambda path: _write_arrays(path, tensors))


def remove_model(folder: Path) -> None:
    """Remove the files of an earlier final model; the run writes them again at its end.

    Raises:
        NodeError: a file cannot be removed.
    """
    for name in (MODEL_FILE, ARRAYS_FILE):
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise NodeError(f"cannot remove {folder / name}: {reason_of(error)}") from None


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Return the final model of a run as a state dict.

    Each tensor has the name, shape and dtype that the problem's module gives it, so that
    ``module.load_state_dict(read_state_dict(path), strict=True)`` works.

    Args:
        path: the run's folder, or the file itself.

    Raises:
        NodeError: the file is missing, or is not a final model.
    """
    file = Path(path)
    if file.is_dir():
        file /= MODEL_FILE
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        reason = "there is no such file" if not file.exists() else str(error)
        raise NodeError(f"cannot read the model in {file}: {reason}") from None
    try:
        return _as_named(tensors, json.loads(metadata.get(_NOTES, "{}")))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise NodeError(
            f"cannot read the model in {file}: its notes are damaged: {error}"
        ) from None


def module_state(tensors: Mapping[str, Tensor], problem: Problem) -> dict[str, Tensor] | None:
    """Return the state dict of the problem's module with these values; None if they do not fit it.

    The module determines the keys: a tied tensor is under each of its names, and a buffer that is
    not persistent is under none.
    """
    try:
        module = problem.model()
        own = dict(module.named_parameters()) | dict(module.named_buffers())
        if not own or any(
            name not in tensors or tensors[name].shape != each.shape for name, each in own.items()
        ):
            return None
        with torch.no_grad():
            for name, each in own.items():
                each.copy_(tensors[name])
        state = module.state_dict()
    except (ProblemError, NotImplementedError):
        return None  # the algorithm makes its own
    except Exception:  # noqa: BLE001 - a user's module can raise anything; the run has its model
        _log.exception("cannot get the state of the problem's module: writing tensors by name")
        return None
    # Extra state can be any object, which only the module itself can make again.
    return {name: each.detach() for name, each in state.items() if isinstance(each, Tensor)}


def _as_held(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert tensors to those that the format supports; also return notes on the conversions."""
    held: dict[str, Tensor] = {}
    pairs: dict[str, dict[str, str]] = {}
    renamed: dict[str, str] = {}
    storages: set[int] = set()

    def hold(name: str, tensor: Tensor) -> str:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # The format has no tensors that share memory.
        storage = tensor.untyped_storage().data_ptr()
        held[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
        return name

    def free(name: str) -> str:
        while name in tensors or name in held:
            name += "_"
        return name

    for name, tensor in tensors.items():
        if tensor.is_complex() and not _can_hold(tensor.dtype):
            # float64 represents each part exactly.
            both = torch.view_as_real(tensor.detach().cpu().resolve_conj()).double()
            parts = {
                part: hold(free(f"{name}.{part}"), both[..., index])
                for index, part in enumerate(("real", "imag"))
            }
            pairs[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), **parts}
        elif name == _RESERVED:
            renamed[hold(free(f"{name}."), tensor)] = name
        else:
            hold(name, tensor)
    notes = {"complex": pairs, "renamed": renamed}
    return held, {key: each for key, each in notes.items() if each}


def _as_named(tensors: dict[str, Tensor], notes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Undo the conversions of `_as_held`."""
    renamed, pairs = notes.get("renamed", {}), notes.get("complex", {})
    found = dict(tensors)
    for key, name in renamed.items():
        found[name] = found.pop(key)
    for name, pair in pairs.items():
        real, imaginary = found.pop(pair["real"]), found.pop(pair["imag"])
        dtype = torch.complex64 if pair["dtype"] == "complex64" else torch.complex128
        found[name] = torch.complex(real, imaginary).to(dtype)
    return found


@functools.cache
def _can_hold(dtype: torch.dtype) -> bool:
    """Return whether the installed release of safetensors supports a dtype."""
    try:
        safetensors.torch.save({"x": torch.zeros(1, dtype=dtype)})
    except (KeyError, ValueError, TypeError, SafetensorError):
        return False
    return True


def _write_arrays(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as `numpy.savez` does, which does not accept a tensor named ``file``."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, tensor in tensors.items():
            each = tensor.detach().cpu()
            # numpy has no bfloat16; float32 represents its values exactly.
            array = (each.float() if each.dtype == torch.bfloat16 else each).numpy()
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Replace a file of the model atomically."""
    try:
        with replacing(path) as fresh:
            write(fresh)
    except (OSError, SafetensorError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else error
        raise NodeError(f"cannot write the model to {path}: {reason}") from None
