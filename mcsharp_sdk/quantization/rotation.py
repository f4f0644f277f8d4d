"""Turn the inputs of experts' matrices, so that no column stands out.

W·x = (W·Tᵀ)·(T·x) for an orthogonal T. The columns of W·Tᵀ are sums and differences of all columns
of W: large and small ones even out, and a grid per group loses less. Rotations for quantisation are
from QuIP (arXiv 2307.13304) and QuaRot (arXiv 2404.00456).

T = D·H·D, where D changes the signs of some columns, others for each expert. So errors of experts
that resemble each other are not alike, and do not add up in the sum of a token's experts; that is
ours. With K = m·2ⁿ columns, m odd, H is the Kronecker product of the discrete Hartley transform of
m, with entries (cos + sin)(2π·i·j/m)/√m, also our choice, and the Hadamard matrix of 2ⁿ. An m above
``LARGEST_ODD`` would cost too much when the model runs; then only blocks of 2ⁿ columns are turned.
D, H and T are symmetric and orthogonal, so that turning twice changes nothing.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mcsharp_sdk.quantization.grid import QuantizedWeight, dequantise

LARGEST_ODD = 63
"""Largest odd part of the columns that is turned."""

ROWS_AT_A_TIME = 256
"""Rows or columns of a large matrix that are turned at a time."""


def rotate(rows: Tensor, signs: Tensor) -> Tensor:
    """Rows xᵀ [..., K] as xᵀ·T, in their dtype, computed in fp32 at least.

    ``signs`` is the diagonal of D, [K] or with a row for each of the rows.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    left, right = rotation_factors(rows.shape[-1], dtype, rows.device)
    parts = (rows.to(dtype) * signs).unflatten(-1, (-1, len(left), len(right)))
    return ((left @ parts @ right).flatten(-3) * signs).to(rows.dtype)


def rotate_(matrix: Tensor, signs: Tensor) -> Tensor:
    """A large matrix [R, K] as :func:`rotate` has it, in place, some rows at a time."""
    for rows in matrix.split(ROWS_AT_A_TIME):
        rows.copy_(rotate(rows, signs))
    return matrix


def rotate_both_(square: Tensor, signs: Tensor) -> None:
    """A matrix M [K, K] as T·M·T, in place: what the Hessian of turned inputs is."""
    for side in (square, square.mT):
        rotate_(side, signs)


def turned_back(weight: QuantizedWeight, dtype: torch.dtype, signs: Tensor) -> Tensor:
    """The weight [R, K] for inputs as they are, of one that was quantised for turned ones."""
    return rotate_(dequantise(weight, torch.float32), signs).to(dtype)


@lru_cache
def expert_signs(experts: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Signs of each expert's columns, ±1, fp32 [experts, K]. Part of the format.

    They are bits of a hash of both numbers (the finaliser of MurmurHash3), so that they are the
    same everywhere.
    """
    expert, column = np.ogrid[:experts, :columns]
    mixed = (expert.astype(np.uint32) * 0x9E3779B1 + column.astype(np.uint32)).astype(np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    with torch.inference_mode(False):  # they outlive the caller's mode
        odd = torch.from_numpy((mixed >> np.uint32(31)).astype(np.float32))
        return (1 - 2 * odd).to(device)


@lru_cache
def rotation_factors(
    columns: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Two matrices, [a, a] and [b, b], whose Kronecker product is H, or one block of it."""
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
