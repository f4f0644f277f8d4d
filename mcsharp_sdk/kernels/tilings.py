"""The ways in which the Triton kernels can divide a product, that measurements choose between."""

from __future__ import annotations

from typing import NamedTuple


class Tiling(NamedTuple):
    """How a product is divided.

    Attributes
    ----------
    gemv : each slot reads the weights by itself, in matrix-vector kernels; otherwise slots of one
        matrix share them, in the grouped product.
    size : rows of the matrix in a program (``gemv``), or most slots in one (else).
    """

    gemv: bool
    size: int


TILINGS = {
    "gemv_128": Tiling(True, 128),
    "gemv_64": Tiling(True, 64),
    "gemm_16": Tiling(False, 16),
    "gemm_32": Tiling(False, 32),
    "gemm_64": Tiling(False, 64),
}
"""Name -> tiling."""
