"""Sums of a tile, four rows of a packed matrix times one token, compiled by numba.

Within a block, columns are taken in *units* of min(128, group size), which have one scale and one
zero point. The group size is a multiple of 32 that divides 128, or a multiple of 128. All is
addresses and numbers: handing arrays on costs as much as the products of a short row.

Imported only where numba is installed.
"""

from __future__ import annotations

import numpy as np

from mcsharp_sdk.kernels.packed_codes import BLOCK, VECTOR, codes_of, compiled, inlined, merged
from mcsharp_sdk.kernels.simd import (
    add_scaled,
    dot,
    joined,
    load_bytes,
    load_float,
    load_half,
    no_floats,
    no_ints,
    prefetch,
    store_float,
    store_zero_points,
)
from mcsharp_sdk.kernels.simd_quads import (
    add_product,
    load_quad,
    quad,
    scaled,
    store_quad,
    sum_of_four,
    transpose_eight_halves,
    transpose_four_halves,
)

TILE = 4
"""Rows that are multiplied together."""

LANES = 16
"""Zero points that are written together."""

QUAD = 16
"""Bytes of four fp32 numbers, one for each row of a tile."""


@merged
def row_sums(rows, bits, vectors, blocks, x, factors, ahead):
    """Four rows times one token, without zero points.

    Parameters
    ----------
    rows : addresses of the codes of the four rows, as they are stored or unpacked to 8 bits.
    vectors : of 32 columns, per unit.
    blocks : full ones.
    x : address of the token's quantised activations.
    factors : address of fp32 [units, 4], scales of weights times scales of activations.
    ahead : bytes from a code to one whose memory is asked for.
    """
    r0, r1, r2, r3 = rows
    a0, a1, a2, a3 = no_floats(), no_floats(), no_floats(), no_floats()
    for block in range(blocks):
        skip = 16 * bits * block
        # Spread like this, between products, it comes sooner than asked for at once.
        prefetch(r0 + skip + ahead)
        prefetch(r1 + skip + ahead)
        prefetch(r2 + skip + ahead)
        prefetch(r3 + skip + ahead)
        for part in range(BLOCK // VECTOR // vectors):
            h0, h1, h2, h3 = no_ints(), no_ints(), no_ints(), no_ints()
            l0, l1, l2, l3 = no_ints(), no_ints(), no_ints(), no_ints()
            for vector in range(vectors * part, vectors * (part + 1)):
                at = x + 2 * BLOCK * block + VECTOR * vector
                high, low = load_bytes(at), load_bytes(at + BLOCK)
                row = codes_of(r0 + skip, bits, vector)
                h0, l0 = dot(h0, row, high), dot(l0, row, low)
                row = codes_of(r1 + skip, bits, vector)
                h1, l1 = dot(h1, row, high), dot(l1, row, low)
                row = codes_of(r2 + skip, bits, vector)
                h2, l2 = dot(h2, row, high), dot(l2, row, low)
                row = codes_of(r3 + skip, bits, vector)
                h3, l3 = dot(h3, row, high), dot(l3, row, low)
            a0 = add_scaled(a0, joined(h0, l0), load_float(factors))
            a1 = add_scaled(a1, joined(h1, l1), load_float(factors + 4))
            a2 = add_scaled(a2, joined(h2, l2), load_float(factors + 8))
            a3 = add_scaled(a3, joined(h3, l3), load_float(factors + 12))
            factors += QUAD
    return sum_of_four(a0, a1, a2, a3)


@inlined
def row_sums_of_width(rows, bits, vectors, blocks, x, factors, ahead):
    if bits == 1:
        return row_sums(rows, 1, vectors, blocks, x, factors, ahead)
    if bits == 2:
        return row_sums(rows, 2, vectors, blocks, x, factors, ahead)
    if bits == 3:
        return row_sums(rows, 3, vectors, blocks, x, factors, ahead)
    if bits == 4:
        return row_sums(rows, 4, vectors, blocks, x, factors, ahead)
    return row_sums(rows, 8, vectors, blocks, x, factors, ahead)


@inlined
def takes_stored(vectors):
    """Whether ``tile_sums`` takes all widths; else codes have to be unpacked.

    Groups of 32 are too rare to compile it for each width.
    """
    return vectors >= 2


@compiled
def tile_sums(rows, bits, vectors, blocks, x, factors, ahead):
    """``row_sums``, compiled for each width and number of vectors."""
    if vectors == 4:
        return row_sums_of_width(rows, bits, 4, blocks, x, factors, ahead)
    if vectors == 2:
        return row_sums_of_width(rows, bits, 2, blocks, x, factors, ahead)
    return row_sums(rows, 8, 1, blocks, x, factors, ahead)


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
