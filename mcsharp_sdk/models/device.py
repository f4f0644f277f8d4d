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
