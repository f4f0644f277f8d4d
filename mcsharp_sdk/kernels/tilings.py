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
    "gemv_16": Tiling(True, 16),
    "gemv_32": Tiling(True, 32),
    "gemm_16": Tiling(False, 16),
    "gemm_32": Tiling(False, 32),
    "gemm_64": Tiling(False, 64),
    "gemm_128": Tiling(False, 128),
}
"""Name -> tiling."""
