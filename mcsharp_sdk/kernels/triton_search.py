"""Triton kernel for the search of grids: all candidates for the rows of a group in one launch.

Rows are independent, so a program holds the whole group of some rows of one matrix in registers.
The arithmetic is that of :mod:`mcsharp_sdk.quantization.search`; only the order of sums differs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Rows of a program: one for each lane of a warp, whose threads share out the columns."""

COLUMNS_PER_WARP = 32
"""Columns of a group that a thread holds, where there are so many."""

LONGEST_GROUP = 256
"""Columns of a group that a program's registers can hold."""

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def nearest_integer(x):
    """Halves to even, as torch does, by adding and taking away 1.5 · 2^23; |x| up to 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def storable(scale, smallest, largest):
    """Rounded to a positive finite fp16 number; fp32."""
    return tl.minimum(tl.maximum(scale, smallest), largest).to(tl.float16).to(tl.float32)


@triton.jit
def on_offset_grid(offset, top, step):
    """The nearest multiple of ``step`` within ``top`` steps."""
    return nearest_integer(tl.minimum(tl.maximum(tl.div_rn(offset, step), -top), top)) * step


@triton.jit
def exact_and_codes(w, top, scale, offset):
    """Weights in units of the scale, from the lowest level on, and the codes nearest to them."""
    exact = w * tl.div_rn(1.0, scale)[None, :] + (offset + top / 2)[None, :]
    return exact, nearest_integer(tl.minimum(tl.maximum(exact, 0.0), top))


@triton.jit
def consider(w, d, top, scale, offset, best_error, best_scale, best_offset):
    """The best after a candidate for each row: the candidate where it lowers the error."""
    exact, codes = exact_and_codes(w, top, scale, offset)
    left = exact - codes
    error = tl.sum(d[:, None] * (left * left), 0) * scale * scale
    better = error < best_error
    return (
        tl.where(better, error, best_error),
        tl.where(better, scale, best_scale),
        tl.where(better, offset, best_offset),
    )


@triton.jit
def refit(w, d, top, scale, offset, smallest, largest, best_error, best_scale, best_offset):
    """The best after the least-squares scales for the codes that grids give."""
    _, codes = exact_and_codes(w, top, scale, offset)
    levels = codes - (offset + top / 2)[None, :]
    weighed = d[:, None] * levels
    norm = tl.maximum(tl.sum(weighed * levels, 0), TINY)
    fit = tl.div_rn(tl.sum(weighed * w, 0), norm)
    scale = storable(fit, smallest, largest)
    return consider(w, d, top, scale, offset, best_error, best_scale, best_offset)


UNKNOWN = (
    "rows", "columns", "matrix_stride", "column_stride", "importance_matrix", "importance_column",
    "starts", "neighbours", "rounds",
)  # fmt: skip
"""Numbers that the kernel is not compiled anew for. With strides of which nothing is known, too,
a lane has single rows, not runs of four: sums over columns then stay within its thread."""


@triton.jit(do_not_specialize=UNKNOWN)
def search_rows(
    weights, importance, candidates, scales, offsets, rows, columns,
    matrix_stride, column_stride, importance_matrix, importance_column,
    starts, neighbours, rounds, top, step, smallest, largest,
    BINARY: tl.constexpr, N: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Scales and offsets of a group of ``columns`` columns, at most N; grid (row tiles, matrices).

    ``weights`` is [matrices, columns, rows] with rows side by side, ``importance`` [matrices,
    columns], ``scales`` and ``offsets`` [matrices, rows] without gaps. ``candidates`` are first
    ``starts`` shares of the range divided by the largest code, or offsets at 1 bit, then the
    ``neighbours`` distances.
    """
    matrix = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, N)
    has_row, has_column = r < rows, c < columns
    at = matrix * matrix_stride + c.to(tl.int64)[:, None] * column_stride + r[None, :]
    w = tl.load(weights + at, mask=has_column[:, None] & has_row[None, :], other=0.0)
    at_column = matrix * importance_matrix + c.to(tl.int64) * importance_column
    d = tl.load(importance + at_column, mask=has_column, other=0.0)

    error = tl.full((BR,), float("inf"), tl.float32)
    scale = tl.full((BR,), 1.0, tl.float32)
    offset = tl.zeros((BR,), tl.float32)
    if BINARY:
        mean = tl.div_rn(2 * tl.sum(d[:, None] * tl.abs(w), 0), tl.maximum(tl.sum(d, 0), TINY))
        tried = storable(mean, smallest, largest)
        for i in range(starts):
            place = tl.zeros((BR,), tl.float32) + tl.load(candidates + i)
            error, scale, offset = refit(
                w, d, top, tried, place, smallest, largest, error, scale, offset
            )
    else:
        low, high = tl.minimum(tl.min(w, 0), 0.0), tl.maximum(tl.max(w, 0), 0.0)
        for i in range(starts):
            tried = storable((high - low) * tl.load(candidates + i), smallest, largest)
            place = on_offset_grid(tl.div_rn(high + low, -2 * tried), top, step)
            error, scale, offset = consider(w, d, top, tried, place, error, scale, offset)
    for _ in range(rounds):
        tried, middle = scale, offset
        for i in range(starts, starts + neighbours):
            place = on_offset_grid(middle + tl.load(candidates + i), top, step)
            error, scale, offset = consider(w, d, top, tried, place, error, scale, offset)
        error, scale, offset = refit(
            w, d, top, scale, offset, smallest, largest, error, scale, offset
        )
    tl.store(scales + matrix * rows + r, scale, mask=has_row)
    tl.store(offsets + matrix * rows + r, offset, mask=has_row)


def search_groups(
    weights: Tensor,
    importance: Tensor,
    codes: tuple[int, float],
    limits: tuple[float, float],
    search: tuple[Sequence[float], Sequence[float], int],
) -> tuple[Tensor, Tensor]:
    """Scale and offset of the zero point from the grid's middle of each row, fp32 [n, R] both.

    As :func:`~mcsharp_sdk.kernels.gptq_rows.search_groups`, on a GPU; groups have at most
    ``LONGEST_GROUP`` columns.
    """
    if weights.stride(-1) != 1:
        weights = weights.contiguous()
    n, columns, rows = weights.shape
    top, step = codes
    ratios, neighbours, rounds = search
    starts = (0.0, -step, step) if top == 1 else tuple(ratio / top for ratio in ratios)
    each = importance.expand(n, -1)
    scales, offsets = weights.new_empty(2, n, rows)
    search_rows[(triton.cdiv(rows, ROWS), n)](
        weights,
        each,
        _on_device((*starts, *neighbours), weights.device),
        scales,
        offsets,
        rows,
        columns,
        *weights.stride()[:2],
        *each.stride(),
        len(starts),
        len(neighbours),
        rounds,
        float(top),
        step,
        *limits,
        BR=ROWS,
        **launch_constants(top, columns),
    )
    return scales, offsets


def launch_constants(top: int, columns: int) -> dict[str, int]:
    """What the kernel is compiled for, and its warps."""
    size = max(16, triton.next_power_of_2(columns))
    return {"BINARY": top == 1, "N": size, "num_warps": max(1, size // COLUMNS_PER_WARP)}


@lru_cache(maxsize=64)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """fp32, copied once: a copy at each call would wait for the GPU."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)
