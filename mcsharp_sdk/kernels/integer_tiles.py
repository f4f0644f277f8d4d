"""Scales and zero points of a tile, four rows of a packed matrix, compiled by numba.

Within a block, columns are taken in *units* of min(128, group size), which have one scale and one
zero point. The group size is a multiple of 32 that divides 128, or a multiple of 128. All is
addresses and numbers: handing arrays on costs as much as the products of a short row.

Imported only where numba is installed.
"""

from __future__ import annotations

import numpy as np

from mcsharp_sdk.kernels.packed_codes import compiled
from mcsharp_sdk.kernels.simd import (
    load_float,
    load_half,
    store_float,
    store_zero_points,
)
from mcsharp_sdk.kernels.simd_quads import (
    QUAD,
    add_product,
    load_quad,
    quad,
    scaled,
    store_quad,
    transpose_eight_halves,
    transpose_four_halves,
)
from mcsharp_sdk.quantization.packing import BLOCK

TILE = 4
"""Rows that are multiplied together."""

LANES = 16
"""Zero points that are written together."""


@compiled
def tile_scales(rows, groups, scales):
    """Scales of four rows to fp32 [groups, 4]; ``rows`` are the addresses of their fp16 scales."""
    r0, r1, r2, r3 = rows
    group = 0
    while group + 8 <= groups:
        skip = 2 * group
        transpose_eight_halves(r0 + skip, r1 + skip, r2 + skip, r3 + skip, scales + QUAD * group)
        group += 8
    if group + 4 <= groups:
        skip = 2 * group
        transpose_four_halves(r0 + skip, r1 + skip, r2 + skip, r3 + skip, scales + QUAD * group)
        group += 4
    while group < groups:
        skip, to = 2 * group, scales + QUAD * group
        store_float(to, load_half(r0 + skip))
        store_float(to + 4, load_half(r1 + skip))
        store_float(to + 8, load_half(r2 + skip))
        store_float(to + 12, load_half(r3 + skip))
        group += 1


@compiled
def tile_grid(rows, groups, stretch, units, scales):
    """Scales of four rows to fp32 [units, 4], 0 where a short block is filled up.

    Parameters
    ----------
    rows : addresses of the fp16 scales of each row.
    stretch : units per group.
    """
    tile_scales(rows, groups, scales)
    for u in range(stretch * groups, units):
        store_quad(scales + QUAD * u, quad(np.float32(0)))
    if stretch > 1:
        for group in range(groups - 1, -1, -1):  # from the end, where no others are yet
            scale = load_quad(scales + QUAD * group)
            for u in range(stretch * group, min(units, stretch * (group + 1))):
                store_quad(scales + QUAD * u, scale)


@compiled
def block_zeros(codes, groups, stretch, units, middle, zeros):
    """Zero points of 128 rows to fp32 [units, 128].

    Parameters
    ----------
    codes : address of uint8 [groups, 128].
    middle : zero point of code 0.
    """
    for u in range(units):
        source, to = codes + BLOCK * min(u // stretch, groups - 1), zeros + 4 * BLOCK * u
        for row in range(0, BLOCK, LANES):
            store_zero_points(to + 4 * row, source + row, middle)


@compiled
def token_factors(scales, zeros, units, x_scales, x_weights, factors):
    """Factors of sums for one token; returns what zero points take off the four rows.

    Parameters
    ----------
    scales : what ``tile_grid`` wrote.
    zeros : address in what ``block_zeros`` wrote, at the first of the four rows.
    x_scales, x_weights : addresses of fp32 [units].
    factors : address of fp32 [units, 4], written.
    """
    off = quad(np.float32(0))
    for u in range(units):
        scale, at = load_quad(scales + QUAD * u), 4 * u
        store_quad(factors + QUAD * u, scaled(scale, load_float(x_scales + at)))
        weight = scaled(scale, load_float(x_weights + at))
        off = add_product(off, weight, load_quad(zeros + BLOCK * at))
    return off
