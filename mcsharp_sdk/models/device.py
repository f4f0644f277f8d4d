"""Names of devices."""

from __future__ import annotations

from difflib import get_close_matches

import torch

from mcsharp_sdk.errors import InputError

_USUAL = ("cpu", "cuda")
_MEANT = {"gpu": "cuda", "nvidia": "cuda"}
"""What people write -> the name that torch has for it."""


def check_device(name: str) -> None:
    """Raise InputError if torch cannot put a tensor on the device ``name``."""
    kind = name.partition(":")[0]
    try:
        torch.device(name)
    except RuntimeError:
        near = _MEANT.get(kind.lower()) or next(iter(get_close_matches(kind, _USUAL, n=1)), "")
        meant = f"; did you mean {near!r}?" if near else ""
        raise InputError(
            f"device {name!r} cannot be used: give cpu, cuda or cuda:N{meant}"
        ) from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {name!r} cannot be used: torch finds no CUDA GPU; use cpu or, where there is "
            "a GPU, pip install 'mcsharp_sdk[gpu]' and a torch with CUDA"
        )
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used: {reason}") from error


def is_cpu(name: str) -> bool:
    """Whether a device is the CPU, such as ``cpu`` or ``cpu:0``; ``auto`` is no name of it."""
    return name.partition(":")[0] == "cpu"
