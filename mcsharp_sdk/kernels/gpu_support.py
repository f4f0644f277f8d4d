"""Where the Triton kernels can run."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

SMALLEST_CAPABILITY = (8, 0)
HALF_PRECISION = (torch.float16, torch.bfloat16)


def serves(x: Tensor) -> bool:
    """Whether the kernels can multiply x: 16-bit floats on a GPU that they know."""
    return x.dtype in HALF_PRECISION and not missing_support(x.device.type)


@cache
def missing_support(device: str) -> str:
    """Why the kernels cannot run on a kind of device; empty if they can."""
    if device != "cuda":
        return f"it runs on a GPU, not on {device}"
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'mcsharp_sdk[gpu]'"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "it was written for NVIDIA GPUs, and none can be used"
    capability = min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if capability < SMALLEST_CAPABILITY:
        return (
            f"it needs compute capability 8.0, and a GPU here has {capability[0]}.{capability[1]}"
        )
    return ""
