"""Where the Triton kernels can run, and what the user asks of them."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mcsharp_sdk.errors import InputError

ACTIVATION_BITS = "MCSHARP_GPU_ACTIVATIONS"
"""Environment variable: 16, or 8 to round activations for ``dp4a`` where tokens come one by one."""

SMALLEST_CAPABILITY = (8, 0)


def serves(x: Tensor) -> bool:
    """Whether the Triton kernels can multiply x: 16-bit floats on a recent NVIDIA GPU.

    They have no gradients.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return False
    return runs_triton(x.device)


def runs_triton(device: torch.device) -> bool:
    """Whether triton is installed and ``device`` is a GPU that the kernels were compiled for."""
    return device.type == "cuda" and _device_serves(device.index or 0)


def activations_in_8_bits() -> bool:
    """Whether the user asks for 8-bit activations.

    Raises
    ------
    InputError
        If ``MCSHARP_GPU_ACTIVATIONS`` is neither 8 nor 16.
    """
    value = os.environ.get(ACTIVATION_BITS, "16")
    if value not in {"8", "16"}:
        raise InputError(f"{ACTIVATION_BITS} is {value!r}; set it to 16 (default) or 8")
    return value == "8"


@cache
def _device_serves(index: int) -> bool:
    if find_spec("triton") is None or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(index) >= SMALLEST_CAPABILITY
