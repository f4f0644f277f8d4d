"""Products with packed weights: one interface, several back ends."""

from mcsharp_sdk.kernels.linear import KERNELS, Kernel, PackedMatrix, packed_linear

__all__ = ["KERNELS", "Kernel", "PackedMatrix", "packed_linear"]
