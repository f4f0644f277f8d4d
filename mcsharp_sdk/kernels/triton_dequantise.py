"""Triton kernel that dequantises rows of all experts' matrices, for torch to multiply by.

Codes become weights as in :mod:`~mcsharp_sdk.kernels.triton_gemm`, rounded to the type that is
asked for. It takes rows of whole blocks, and any group size.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.kernels.triton_codes import BLOCK, matrix_at, scale_and_zero
from mcsharp_sdk.kernels.triton_gemm import block_bytes, field_weights


@triton.jit
def dequantise_block(
    out, matrix, n, block, keep, unknown_zero,
    BITS: tl.constexpr, GROUP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A block of columns of rows ``n`` to where ``out`` [rows, 1] points."""
    LO: tl.constexpr = 2 if BITS == 3 else BITS
    FIELD: tl.constexpr = 16 * LO
    rows = n[:, None]
    known = rows >= 0
    row = matrix[0] + rows.to(tl.int64) * (matrix[4] // 128 * (16 * BITS))
    low, high = block_bytes(row + block * (16 * BITS), BITS)
    if GROUP % 128 == 0:
        scale, zero = scale_and_zero(matrix, rows, block * BLOCK // GROUP, known, GROUP, BITS)
    for t in tl.static_range(8 // LO):
        k = block * BLOCK + t * FIELD + tl.arange(0, FIELD)[None, :]
        if GROUP % 128 != 0:
            scale, zero = scale_and_zero(matrix, rows, k // GROUP, known, GROUP, BITS)
        weight = field_weights(low, high, scale, zero, unknown_zero, t, BITS, EMULATE)
        tl.store(out + k, weight.to(out.dtype.element_ty), mask=keep)


@triton.jit
def dequantise_rows(
    out, unknown_zero, table, weights, rows, columns, first, count, height,
    WIDTHS: tl.constexpr, GROUP: tl.constexpr, EMULATE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Some rows of the matrix of each expert; grid (blocks, row tiles, experts).

    ``out`` [experts, height, columns]: rows ``first`` … ``first + count``, and where height is
    twice count those of the second half of the rows behind them. ``table``, ``weights`` and
    ``unknown_zero`` are as in :func:`~mcsharp_sdk.kernels.triton_decode.grouped_gemv`. The weights
    of an expert without a width are 0.
    """
    block, expert = tl.program_id(0), tl.program_id(2)
    width, place = tl.load(table + 2 * expert), tl.load(table + 2 * expert + 1)
    r = tl.program_id(1) * BN + tl.arange(0, BN)
    keep = (r < height)[:, None]
    n = tl.minimum(first + r % count + r // count * (rows // 2), rows - 1)
    out += ((expert.to(tl.int64) * height + r) * columns)[:, None]
    for i in tl.static_range(len(WIDTHS)):
        if width == WIDTHS[i]:
            matrix = matrix_at(weights[i], place, rows, columns, GROUP, WIDTHS[i])
            dequantise_block(out, matrix, n, block, keep, unknown_zero, WIDTHS[i], GROUP, EMULATE)
    if width == 0:
        nothing = tl.zeros((BN, BLOCK), out.dtype.element_ty)
        tl.store(out + block * BLOCK + tl.arange(0, BLOCK)[None, :], nothing, mask=keep)
