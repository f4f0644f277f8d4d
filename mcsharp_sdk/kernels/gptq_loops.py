"""The two inner loops of quantising, compiled by numba: the search of grids, and GPTQ's columns.

Rows of a matrix are independent. Some are taken at a time through a whole group, so that what they
need stays in the processor's first-level cache.

Imported only where numba is installed.
"""

from __future__ import annotations

import numpy as np

from mcsharp_sdk.kernels.packed_codes import compiled, inlined
from mcsharp_sdk.kernels.simd import (
    difference,
    less_product,
    load_lanes,
    nearest_code,
    store_lanes,
    store_lanes_as_bytes,
)

LANES = 64
"""Rows of a tile in the search: several vectors, so that sums do not wait for each other."""

VECTOR_ROWS = 16
"""Rows of a tile in the loop over columns: one vector."""

TINY = np.finfo(np.float32).tiny

SMALLEST_NORMAL = np.float32(2**-14)
"""Of fp16: numbers below are multiples of 2**-24."""


@inlined
def storable(scale, smallest, largest):
    """Clamped, and rounded to an fp16 number, halves to even.

    Normal ones have 11 bits. To those below, what fp32 rounds off is when 0.5 is added: between
    0.5 and 1 its numbers are 2**-24 apart.
    """
    scale = scale if scale > smallest else smallest
    scale = scale if scale < largest else largest
    pattern = np.float32(scale).view(np.int32)
    pattern += np.int32(0xFFF) + ((pattern >> np.int32(13)) & np.int32(1))
    normal = np.int32(pattern & np.int32(~0x1FFF)).view(np.float32)
    subnormal = np.float32(np.float32(scale) + np.float32(0.5)) - np.float32(0.5)
    return normal if scale >= SMALLEST_NORMAL else subnormal


@inlined
def on_grid(offset, step, limit):
    """The nearest multiple of ``step`` within the limit."""
    offset = np.rint(offset / step) * step
    offset = offset if offset > -limit else -limit
    return offset if offset < limit else limit


@inlined
def load_tile(weights, first, stride, width, tile):
    """Some rows of a group of columns, from ``first`` on, and zeros behind them."""
    for k in range(tile.shape[0]):
        tile[k, width:] = np.float32(0)
        for lane in range(width):
            tile[k, lane] = weights[first + k * stride + lane]


@inlined
def consider(tile, importance, top, scale, offset, work, best):
    """Keep the candidates, one for each lane, where they lower the error."""
    inverse, middle, error = work[0], work[1], work[2]
    for lane in range(LANES):
        inverse[lane] = np.float32(1) / scale[lane]
        middle[lane] = offset[lane] + top / np.float32(2)
        error[lane] = np.float32(0)
    for k in range(tile.shape[0]):
        weight = importance[k]
        for lane in range(LANES):
            exact = tile[k, lane] * inverse[lane] + middle[lane]
            code = np.rint(exact)
            code = code if code > np.float32(0) else np.float32(0)
            code = code if code < top else top
            error[lane] += weight * ((exact - code) * (exact - code))
    for lane in range(LANES):
        found = error[lane] * scale[lane] * scale[lane]
        better = found < best[0, lane]
        best[0, lane] = found if better else best[0, lane]
        best[1, lane] = scale[lane] if better else best[1, lane]
        best[2, lane] = offset[lane] if better else best[2, lane]


@inlined
def refit(tile, importance, top, limits, scale, offset, work, best):
    """Consider the least-squares scales for the codes that grids give; changes ``scale``."""
    inverse, middle, norm, fit = work[0], work[1], work[2], work[3]
    for lane in range(LANES):
        inverse[lane] = np.float32(1) / scale[lane]
        middle[lane] = offset[lane] + top / np.float32(2)
        norm[lane] = np.float32(0)
        fit[lane] = np.float32(0)
    for k in range(tile.shape[0]):
        weight = importance[k]
        for lane in range(LANES):
            code = np.rint(tile[k, lane] * inverse[lane] + middle[lane])
            code = code if code > np.float32(0) else np.float32(0)
            code = code if code < top else top
            level = code - middle[lane]
            norm[lane] += weight * (level * level)
            fit[lane] += weight * (level * tile[k, lane])
    for lane in range(LANES):
        below = norm[lane] if norm[lane] > TINY else TINY
        scale[lane] = storable(fit[lane] / below, limits[0], limits[1])
    consider(tile, importance, top, scale, offset, work, best)


@inlined
def start_from_range(tile, importance, top, step, limits, ratios, grid, work, best):
    """Grids over shares of the range, which always has zero in it."""
    scale, offset, low, high = grid[0], grid[1], grid[2], grid[3]
    for lane in range(LANES):
        low[lane] = np.float32(0)
        high[lane] = np.float32(0)
    for k in range(tile.shape[0]):
        for lane in range(LANES):
            value = tile[k, lane]
            low[lane] = value if value < low[lane] else low[lane]
            high[lane] = value if value > high[lane] else high[lane]
    for ratio in ratios:
        for lane in range(LANES):
            span = (high[lane] - low[lane]) * (ratio / top)
            scale[lane] = storable(span, limits[0], limits[1])
            middle = (high[lane] + low[lane]) / (np.float32(-2) * scale[lane])
            offset[lane] = on_grid(middle, step, top * step)
        consider(tile, importance, top, scale, offset, work, best)


@inlined
def start_binary(tile, importance, top, step, limits, grid, work, best):
    """Twice the mean magnitude, at three zero points."""
    scale, offset, mean = grid[0], grid[1], grid[2]
    total = np.float32(0)
    for lane in range(LANES):
        mean[lane] = np.float32(0)
    for k in range(tile.shape[0]):
        weight = importance[k]
        total += weight
        for lane in range(LANES):
            mean[lane] += weight * abs(tile[k, lane])
    total = total if total > TINY else TINY
    for sign in range(-1, 2):
        for lane in range(LANES):
            scale[lane] = storable(np.float32(2) * mean[lane] / total, limits[0], limits[1])
            offset[lane] = np.float32(sign) * step
        refit(tile, importance, top, limits, scale, offset, work, best)


@compiled
def search_tiles(
    weights, strides, importance, codes, limits, ratios, neighbours, rounds, found, shares
):
    """Search scale and offset of one group of columns for a share of all tiles of rows.

    Parameters
    ----------
    weights : fp32, flat memory of [n, g, R] with ``strides`` (expert, column), rows side by side.
    importance : fp32 [n, g].
    codes : the largest code, and the distance of zero points.
    limits : smallest and largest scale.
    ratios, neighbours, rounds : as of ``GridSettings``; ``ratios`` are not used at 1 bit.
    found : fp32 [2, n, R], written: scale and offset of the zero point from the grid's middle.
    shares : which share of how many.
    """
    top, step = codes
    _, experts, rows = found.shape
    columns = importance.shape[1]
    tile = np.empty((columns, LANES), np.float32)
    work = np.empty((4, LANES), np.float32)
    grid = np.empty((4, LANES), np.float32)
    best = np.empty((3, LANES), np.float32)
    tiles = (rows + LANES - 1) // LANES
    share, count = shares
    for at in range(experts * tiles * share // count, experts * tiles * (share + 1) // count):
        expert, first = at // tiles, at % tiles * LANES
        width = min(LANES, rows - first)
        load_tile(weights, expert * strides[0] + first, strides[1], width, tile)
        best[0, :], best[1, :], best[2, :] = np.inf, np.float32(1), np.float32(0)
        importances = importance[expert]
        if top == np.float32(1):
            start_binary(tile, importances, top, step, limits, grid, work, best)
        else:
            start_from_range(tile, importances, top, step, limits, ratios, grid, work, best)
        for _ in range(rounds):
            grid[2:4] = best[1:3]
            for distance in neighbours:
                for lane in range(LANES):
                    grid[1, lane] = on_grid(grid[3, lane] + distance, step, top * step)
                consider(tile, importances, top, grid[2], grid[1], work, best)
            grid[:2] = best[1:3]
            refit(tile, importances, top, limits, grid[0], grid[1], work, best)
        found[0, expert, first : first + width] = best[1, :width]
        found[1, expert, first : first + width] = best[2, :width]


@inlined
def code_column(tile, top, codes, errors):
    """Codes and errors of 16 rows of one column."""
    exact = load_lanes(tile)
    code = nearest_code(exact, load_lanes(top))
    store_lanes_as_bytes(codes, code)
    store_lanes(errors, difference(exact, code))


@inlined
def compensate_four(tile, line, errors, error_line, updates, i, columns):
    """Take what the errors of columns i to i + 3 move away from the later ones, in 16 rows."""
    e0, e1 = load_lanes(errors), load_lanes(errors + error_line)
    e2, e3 = load_lanes(errors + 2 * error_line), load_lanes(errors + 3 * error_line)
    for j in range(i + 4, columns):
        column = less_product(load_lanes(tile + line * j), e0, updates[i, j])
        column = less_product(column, e1, updates[i + 1, j])
        column = less_product(column, e2, updates[i + 2, j])
        store_lanes(tile + line * j, less_product(column, e3, updates[i + 3, j]))


@compiled
def code_tiles(exact, stride, updates, compensate, top, errors, error_stride, codes, shape, shares):
    """Codes and errors of a share of all tiles of 16 rows, column by column.

    Parameters
    ----------
    exact : address of fp32 [B, n, R]; ``stride`` bytes from one B to the next.
    updates : fp32 [B, n, n], U_ij/U_ii; not read unless ``compensate``.
    top : address of fp32 [B, R], the largest codes.
    errors : address of fp32 [B, n, R], written; ``error_stride`` bytes from one B to the next.
    codes : address of uint8 [B, n, R], written.
    shape : B, n, R; R is at least 16.
    """
    matrices, columns, rows = shape
    memory = np.empty((columns, VECTOR_ROWS), np.float32)
    tile, line, error_line = memory.ctypes.data, 4 * VECTOR_ROWS, 4 * rows
    tiles = (rows + VECTOR_ROWS - 1) // VECTOR_ROWS
    share, count = shares
    for at in range(matrices * tiles * share // count, matrices * tiles * (share + 1) // count):
        # The last tile ends where the rows do, and does some again: it comes to the same.
        matrix, first = at // tiles, min(at % tiles * VECTOR_ROWS, rows - VECTOR_ROWS)
        source = exact + matrix * stride + 4 * first
        target = errors + matrix * error_stride + 4 * first
        code = codes + matrix * columns * rows + first
        largest = top + 4 * (matrix * rows + first)
        for k in range(columns):
            store_lanes(tile + line * k, load_lanes(source + 4 * rows * k))
        for start in range(0, columns, 4):
            stop = min(start + 4, columns)
            for i in range(start, stop):
                error = target + error_line * i
                code_column(tile + line * i, largest, code + rows * i, error)
                for j in range(i + 1, stop if compensate else 0):
                    column, update = tile + line * j, updates[matrix, i, j]
                    moved = less_product(load_lanes(column), load_lanes(error), update)
                    store_lanes(column, moved)
            if compensate and stop < columns:
                errors_here = target + error_line * start
                own = updates[matrix]
                compensate_four(tile, line, errors_here, error_line, own, start, columns)
    return memory[0, 0]  # numba frees an array after its last use
