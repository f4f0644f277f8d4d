"""Names of devices."""

from __future__ import annotations

from difflib import get_close_matches

import torch

from mcsharp_sdk.arguments import shown
from mcsharp_sdk.errors import InputError

AnyDevice = str | torch.device

_USUAL = ("cpu", "cuda")
_MEANT = {"gpu": "cuda", "nvidia": "cuda"}
"""What people write -> the name that torch has for it."""

_CHOICE = "give cpu, cuda or cuda:N"


def device_name(device: object) -> str:
    """The name of a device that is given by it, or as torch has it.

    Raises
    ------
    InputError
        If it is given in another way.
    """
    if not isinstance(device, AnyDevice):
        raise InputError(f"device is a text or a torch.device, not {shown(device)}: {_CHOICE}")
    return str(device)


def check_device(name: str) -> None:
    """Raise InputError if torch cannot put a tensor with numbers on the device ``name``."""
    kind = name.partition(":")[0]
    try:
        torch.device(name)
    except RuntimeError:
        near = _MEANT.get(kind.lower()) or next(iter(get_close_matches(kind, _USUAL, n=1)), "")
        meant = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"device {name!r} cannot be used: {_CHOICE}{meant}") from None
    if kind == "meta":
        raise InputError(f"device {name!r} cannot be used: it holds no numbers; {_CHOICE}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {name!r} cannot be used: torch finds no CUDA GPU; use cpu or, where there is "
            "a GPU, pip install 'mcsharp_sdk[gpu]' and a torch with CUDA"
        )
    try:
        torch.empty(1, device=name)
    except NotImplementedError as error:  # its message is a list of all that torch could have
        raise InputError(
            f"device {name!r} cannot be used: this torch does without it; {_CHOICE}"
        ) from error
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used: {reason}") from error


def is_cpu(name: str) -> bool:
    """Whether a device is the CPU, such as ``cpu`` or ``cpu:0``; ``auto`` is no name of it."""
    return name.partition(":")[0] == "cpu"
