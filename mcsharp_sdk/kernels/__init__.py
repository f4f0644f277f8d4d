"""Products with packed weights: one interface, several back ends."""

from mcsharp_sdk.kernels.case import Case
from mcsharp_sdk.kernels.linear import (
    KERNELS,
    Kernel,
    choose_kernel,
    packed_linear,
    packed_linears,
)
from mcsharp_sdk.kernels.matrix import PackedMatrix, PackedStack

__all__ = [
    "KERNELS",
    "Case",
    "Kernel",
    "PackedMatrix",
    "PackedStack",
    "choose_kernel",
    "packed_linear",
    "packed_linears",
]
