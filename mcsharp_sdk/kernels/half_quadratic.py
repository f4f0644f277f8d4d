"""The half-quadratic search of zero points on the CPU.

The arithmetic is that of :mod:`mcsharp_sdk.quantization.hqq` in fp32, with powers within 4e-6 of
themselves. Rows are independent, and some are taken at a time.

Imported only where numba is installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mcsharp_sdk.kernels.gptq_loops import load_tile
from mcsharp_sdk.kernels.gptq_rows import flat_memory
from mcsharp_sdk.kernels.packed_codes import compiled, inlined
from mcsharp_sdk.kernels.simd_powers import ROWS, half_quadratic_turn
from mcsharp_sdk.kernels.threads import in_shares

POWER_WORK = 20
"""What a power costs, in multiplications."""


@inlined
def start_from_full_range(tile, top, smallest, grid):
    """Scale and zero point of each row's range, which always has zero in it."""
    scale, zero = grid
    scale[:], zero[:] = np.float32(0), np.float32(0)
    for k in range(tile.shape[0]):
        for row in range(ROWS):
            value = tile[k, row]
            zero[row] = value if value < zero[row] else zero[row]
            scale[row] = value if value > scale[row] else scale[row]
    for row in range(ROWS):
        step = (scale[row] - zero[row]) / top
        scale[row] = step if step > smallest else smallest
        zero[row] = -zero[row] / scale[row]


@compiled
def search_zero_points(weights, strides, columns, constants, prices, found, shares):
    """Search the zero points of groups of columns for a share of all tiles of rows.

    Parameters
    ----------
    weights : fp32, flat memory of [n, g, R] with ``strides`` (group, column), rows side by side.
    columns : g.
    constants : fp32: the largest code, the norm's exponent, the smallest error, the smallest scale.
    prices : fp32, of each turn.
    found : fp32 [2, n, R], written: scale and zero point.
    shares : which share of how many.
    """
    top, norm, least, smallest = constants
    _, groups, rows = found.shape
    tile = np.empty((columns, ROWS), np.float32)
    grid = np.empty((2, ROWS), np.float32)
    sums = np.empty((2, ROWS), np.float32)
    best = np.empty((2, ROWS), np.float32)
    tiles = (rows + ROWS - 1) // ROWS
    share, count = shares
    for at in range(groups * tiles * share // count, groups * tiles * (share + 1) // count):
        group, first = at // tiles, at % tiles * ROWS
        width = min(ROWS, rows - first)
        load_tile(weights, group * strides[0] + first, strides[1], width, tile)
        start_from_full_range(tile, top, smallest, grid)
        for k in range(columns):
            for row in range(ROWS):
                tile[k, row] /= grid[0, row]
        best[0, :] = np.inf
        for price in prices:
            half_quadratic_turn(
                tile.ctypes.data,
                columns,
                grid.ctypes.data,
                sums.ctypes.data,
                top,
                norm,
                least,
                price,
            )
            for row in range(ROWS):
                better = sums[0, row] < best[0, row]
                best[0, row] = sums[0, row] if better else best[0, row]
                best[1, row] = grid[1, row] if better else best[1, row]
                grid[1, row] = sums[1, row] / np.float32(columns)
        found[0, group, first : first + width] = grid[0, :width]
        found[1, group, first : first + width] = best[1, :width]


def fit_zero_points(
    weights: Tensor, top: int, norm: float, limits: tuple[float, float], prices: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Scale of each row's range and its best zero point, fp32 [n, R] both.

    Parameters
    ----------
    weights : fp32 [n, g, R], groups of columns, transposed.
    top : the largest code.
    norm : exponent of the norm.
    limits : smallest error that a power is taken of, and smallest scale; positive and normal.
    prices : of each turn.
    """
    if weights.stride(-1) != 1:
        weights = weights.contiguous()
    n, columns, rows = weights.shape
    found = np.empty((2, n, rows), np.float32)
    arguments = (
        flat_memory(weights),
        weights.stride()[:2],
        columns,
        tuple(map(np.float32, (top, norm, *limits))),
        np.array(prices, np.float32),
        found,
    )

    def work(share: int, shares: int) -> None:
        search_zero_points(*arguments, (share, shares))

    in_shares(work, POWER_WORK * weights.numel() * len(prices))
    scales, zeros = torch.from_numpy(found)
    return scales, zeros
