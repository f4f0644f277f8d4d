"""Triton kernel for GPTQ's columns: a whole block of them, for all experts, in one launch.

Rows are independent, so a program takes some rows of one matrix through all columns of the block.
The arithmetic is that of :mod:`mcsharp_sdk.quantization.gptq`, in units of the scale; only the
order of sums differs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Rows of a program."""


@triton.jit
def quantise_column_block(
    exact, updates, top, codes, errors, rows, columns,
    exact_stride, updates_stride, updates_row, updates_column, errors_stride,
    COMPENSATE: tl.constexpr, N: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Codes and errors of ``columns`` columns, at most N; grid (row tiles, matrices).

    ``exact``, ``errors`` and ``codes`` are [matrices, columns, rows] with contiguous columns
    (``codes`` without gaps), ``updates`` [matrices, columns, columns], ``top`` [matrices, rows].
    """
    matrix = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, N)
    has_row = r < rows
    inside = (c < columns)[:, None] & has_row[None, :]
    at = c[:, None] * rows + r[None, :]
    t = tl.load(exact + matrix * exact_stride + at, mask=inside, other=0.0)
    largest = tl.load(top + matrix * rows + r, mask=has_row, other=0.0)
    code_tile = tl.zeros((N, BR), tl.float32)
    for i in range(columns):
        here = (c == i)[:, None]
        column = tl.sum(tl.where(here, t, 0.0), 0)
        bounded = tl.minimum(tl.maximum(column, -1.0), largest + 1.0)
        # Adding and taking away 1.5 · 2^23 rounds to the nearest, halves to even, as torch does.
        rounded = (bounded + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(rounded, 0.0), largest)
        error = column - code
        code_tile = tl.where(here, code[None, :], code_tile)
        if COMPENSATE:
            later = updates + matrix * updates_stride + i * updates_row + c * updates_column
            u = tl.load(later, mask=(c > i) & (c < columns), other=0.0)
            t -= u[:, None] * error[None, :]
    tl.store(codes + matrix * columns * rows + at, code_tile, mask=inside)
    # A column changes no more once it is quantised, so that its error is still what is left of it.
    tl.store(errors + matrix * errors_stride + at, t - code_tile, mask=inside)


def quantise_columns(exact: Tensor, updates: Tensor | None, top: Tensor, error: Tensor) -> Tensor:
    """Codes of columns given in units of the scale; their errors go to ``error``.

    Parameters
    ----------
    exact : fp32 [B, n, rows], rows contiguous.
    updates : fp32 [B, n, n] in any order, row i of U divided by U_ii; None passes no errors on.
    top : fp32 [B, rows], the largest code of each row.
    error : fp32 [B, n, rows], rows contiguous.

    Returns
    -------
    fp32 [B, n, rows].
    """
    matrices, columns, rows = exact.shape
    codes = torch.empty(exact.shape, dtype=exact.dtype, device=exact.device)
    some = exact if updates is None else updates
    quantise_column_block[(triton.cdiv(rows, ROWS), matrices)](
        exact,
        some,
        top.contiguous(),
        codes,
        error,
        rows,
        columns,
        exact.stride(0),
        some.stride(0),
        some.stride(1),
        some.stride(2),
        error.stride(0),
        COMPENSATE=updates is not None,
        N=max(16, triton.next_power_of_2(columns)),
        BR=ROWS,
    )
    return codes
