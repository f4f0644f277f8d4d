"""The ways in which the Triton kernels can divide a product, that measurements choose between."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["gemv", "gemm", "dense"]
"""``gemv``: each slot reads the weights by itself, in matrix-vector kernels; ``gemm``: slots of one
matrix share them, in the grouped product; ``dense``: weights are dequantised into memory, and torch
multiplies by them, which takes a whole layer."""


class Tiling(NamedTuple):
    """How a product is divided.

    Attributes
    ----------
    kind : what does it.
    size : rows of the matrix in a program (``gemv``), or most slots in one (``gemm``); None for
        what is built in.
    """

    kind: Kind
    size: int | None = None


TILINGS = {
    "gemv": Tiling("gemv"),
    "gemv_32": Tiling("gemv", 32),
    "gemm_16": Tiling("gemm", 16),
    "gemm_32": Tiling("gemm", 32),
    "gemm_64": Tiling("gemm", 64),
    "gemm_128": Tiling("gemm", 128),
    "dense": Tiling("dense"),
}
"""Name -> tiling."""

MATRIX_TILINGS = {name: tiling for name, tiling in TILINGS.items() if tiling.kind != "dense"}
"""Those that single matrices have too."""
