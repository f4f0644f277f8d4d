"""Turn the inputs of a matrix, so that no column stands out.

W·x = (W·H)·(Hᵀ·x) for an orthogonal H. The columns of W·H are sums and differences of all columns
of W: large and small ones even out, and a grid per group loses less. Rotations for quantisation are
from QuIP (arXiv 2307.13304) and QuaRot (arXiv 2404.00456).

With K = m·2ⁿ columns, m odd, H is the Kronecker product of the discrete Hartley transform of m,
with entries (cos + sin)(2π·i·j/m)/√m, and the Hadamard matrix of 2ⁿ; that transform is our choice.
Both are symmetric and orthogonal, so that turning twice changes nothing. An m above ``LARGEST_ODD``
would cost too much when the model runs; then only blocks of 2ⁿ columns are turned.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mcsharp_sdk.quantization.grid import QuantizedWeight, dequantise

LARGEST_ODD = 63
"""Largest odd part of the columns that is turned."""

ROWS_AT_A_TIME = 256
"""Rows or columns of a large matrix that are turned at a time."""


def rotate(rows: Tensor) -> Tensor:
    """Rows xᵀ [..., K] as xᵀ·H, in their dtype, computed in fp32 at least."""
    columns = rows.shape[-1]
    dtype = torch.promote_types(rows.dtype, torch.float32)
    left, right = _factors(columns, dtype, rows.device)
    parts = rows.to(dtype).unflatten(-1, (-1, len(left), len(right)))
    return (left @ parts @ right).flatten(-3).to(rows.dtype)


def rotate_both_(squares: Tensor) -> Tensor:
    """Matrices M [..., K, K] as H·M·H, in place: what Hessians of turned inputs are."""
    for sides in (squares, squares.mT):
        for rows in sides.split(ROWS_AT_A_TIME, dim=-2):
            rows.copy_(rotate(rows))
    return squares


def turned_back(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [..., R, K] for inputs as they are, of one that was quantised for turned ones."""
    return rotate(dequantise(weight, torch.float32)).to(dtype)


@lru_cache
def _factors(columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two matrices whose Kronecker product is H, or one block of it."""
    power = columns & -columns
    odd = columns // power
    odd = odd if odd <= LARGEST_ODD else 1
    first = 1
    while odd * (2 * first) ** 2 <= power:  # of about the same size
        first *= 2
    with torch.inference_mode(False):  # they outlive the caller's mode
        left = torch.kron(_hartley(odd), _hadamard(first))
        right = _hadamard(power // first)
        return left.to(dtype).to(device), right.to(dtype).to(device)


def _hartley(size: int) -> Tensor:
    """Discrete Hartley transform, fp64 [m, m]."""
    steps = torch.arange(size, dtype=torch.float64)
    angles = 2 * torch.pi * torch.outer(steps, steps) / size
    return (angles.cos() + angles.sin()) / size**0.5


def _hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix of 2ⁿ columns over the root of their number, fp64."""
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / size**0.5
