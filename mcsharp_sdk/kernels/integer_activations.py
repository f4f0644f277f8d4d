"""Activations as integers of 16 bits, compiled by numba.

Imported only where numba is installed.
"""

from __future__ import annotations

import numpy as np

from mcsharp_sdk.kernels.packed_codes import VECTOR, compiled, inlined
from mcsharp_sdk.kernels.simd import dot, load_bytes, no_bytes, no_ints, store_bytes
from mcsharp_sdk.kernels.simd_activations import (
    larger_magnitudes,
    largest,
    one_bytes,
    store_quantised,
    sum_of_ints,
)
from mcsharp_sdk.quantization.packing import BLOCK

TOP = 127 * 256
"""Magnitude of a unit's largest activation after quantisation: 15 bits and a sign."""

SMALLEST = np.float32(2.0**-126)
"""Scale below which a unit counts as zeros: its inverse would be infinite."""


@inlined
def place_of(column):
    """Where the high byte of a column is; its low byte is 128 bytes further."""
    return 2 * BLOCK * (column // BLOCK) + column % BLOCK


@compiled
def quantise_activations(x, unit, values, grid, share, shares):
    """Activations as 16-bit integers of one scale per token and unit: a share of the tokens.

    Parameters
    ----------
    x : fp32 [N, K], K a multiple of 32.
    values : int8 [N, blocks, 2, 128], written: of 128 columns the high bytes, then the low ones;
        zeros behind K.
    grid : fp32 [3, N, units], written. First scales: x = scale · (256 · high + low); infinite or
        NaN where an activation is. Then what a zero point of 1 adds up to, scale · sum of integers;
        and the same of the high bytes alone.
    """
    tokens, columns = x.shape
    for token in range(tokens * share // shares, tokens * (share + 1) // shares):
        first = np.int64(x.ctypes.data) + 4 * columns * token
        target = np.int64(values.ctypes.data) + 2 * unit * grid.shape[2] * token
        for u in range(grid.shape[2]):
            begin, end = min(unit * u, columns), min(unit * (u + 1), columns)
            tops = no_ints()
            for column in range(begin, end, VECTOR):
                tops = larger_magnitudes(tops, first + 4 * column)
            scale = largest(tops) / np.float32(TOP)
            inverse = np.float32(1) / scale if scale >= SMALLEST else np.float32(0)
            highs, lows = no_ints(), no_ints()
            for column in range(begin, end, VECTOR):
                to = target + place_of(column)
                store_quantised(first + 4 * column, inverse, to, to + BLOCK)
                highs = dot(highs, one_bytes(), load_bytes(to))
                lows = dot(lows, one_bytes(), load_bytes(to + BLOCK))
            for column in range(max(unit * u, end), unit * (u + 1), VECTOR):
                store_bytes(target + place_of(column), no_bytes())
                store_bytes(target + place_of(column) + BLOCK, no_bytes())
            high = 256 * sum_of_ints(highs)
            grid[0, token, u] = scale
            grid[1, token, u] = scale * np.float32(high + sum_of_ints(lows))
            grid[2, token, u] = scale * np.float32(high)
