"""Names of devices."""

from __future__ import annotations

import torch

from mcsharp_sdk.errors import InputError


def check_device(name: str) -> None:
    """Raise InputError if torch cannot put a tensor on the device ``name``."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used: {reason}") from error


def is_cpu(name: str) -> bool:
    """Whether a device is the CPU, such as ``cpu`` or ``cpu:0``; ``auto`` is no name of it."""
    return name.partition(":")[0] == "cpu"
