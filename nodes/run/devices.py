"""Torch devices: choosing one, and which devices train to the same bytes."""

from __future__ import annotations

import functools
import re

import torch

from fedmq.nodes.errors import ConfigError


@functools.cache
def kind_of(device: str) -> str:
    """Return the kind of a device: a task trains to the same bytes on devices of one kind.

    The kind is the GPU's name, or the widest instruction set that torch uses on the CPU, and
    torch's version.
    """
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, torch {torch.__version__}"


def choose_device(wanted: str, key: str = "worker.device") -> str:
    """Return the torch device to use.

    Args:
        wanted: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        key: configuration key or option that names it, for the error.

    Raises:
        ConfigError: this machine has no such device; the message lists those it has.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return "cuda" if gpus else "cpu"
    # One spelling for each device: torch rejects "cuda:01".
    match = re.fullmatch(r"cuda(?::(\d{1,9}))?", wanted, re.ASCII)
    if wanted == "cpu" or (match is not None and int(match[1] or 0) < gpus):
        return f"cuda:{int(match[1])}" if match is not None and match[1] else wanted
    there = ", ".join(["auto", "cpu", *(f"cuda:{index}" for index in range(gpus))])
    raise ConfigError(f"{key}: there is no device {wanted[:100]!r} here; choose from {there}")
