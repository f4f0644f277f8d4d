"""Products of quantised activations with packed matrices, compiled by numba.

Within a block, columns are taken in *units* of min(128, group size), which have one scale and one
zero point. The group size is a multiple of 32 that divides 128, or a multiple of 128.

Imported only where numba is installed.
"""

from __future__ import annotations

import numpy as np

from mcsharp_sdk.kernels.packed_codes import (
    BLOCK,
    VECTOR,
    codes_of,
    compiled,
    inlined,
    packed_row,
    unpack,
    unpack_zeros,
)
from mcsharp_sdk.kernels.simd import (
    add_product,
    add_scaled,
    dot,
    joined,
    load_byte_quad,
    load_bytes,
    load_half,
    load_quad,
    no_floats,
    no_ints,
    prefetch,
    quad,
    scaled,
    store_quad,
    sum_lanes,
    transpose_halves,
)

TILE = 4
"""Rows that are multiplied together."""

CACHE_LINE = 64
AHEAD = 24
"""Rows from the one at work to the one that is asked for: its products hide what memory takes."""

TOP = 127 * 256
"""Magnitude of a unit's largest activation after quantisation: 15 bits and a sign."""


@compiled
def quantise_activations(x, bits_of_x, unit, values, scales, weights):
    """Activations as 16-bit integers of one scale per token and unit.

    Parameters
    ----------
    x : fp32 [N, K], and ``bits_of_x``, the same memory as int32.
    values : int8 [N, 2 * padded K], written: of 32 columns the high bytes, then the low ones.
    scales : fp32 [N, units], written: x = scale · (256 · high + low). Infinite or NaN where an
        activation is.
    weights : fp32 [N, units], written: what a zero point of 1 adds up to, scale · sum of integers.
    """
    tokens, columns = x.shape
    values[:] = 0
    for token in range(tokens):
        for u in range(scales.shape[1]):
            first, last = unit * u, min(unit * (u + 1), columns)
            top = np.int32(0)
            for column in range(first, last):
                top = max(top, bits_of_x[token, column] & np.int32(0x7FFFFFFF))
            scale = np.int32(top).view(np.float32) / np.float32(TOP)
            inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
            total = np.int32(0)
            for column in range(first, last):
                value = np.int32(np.rint(x[token, column] * inverse))
                high = (value + np.int32(128)) >> np.int32(8)
                place = 2 * column - column % VECTOR
                values[token, place] = high
                values[token, place + VECTOR] = value - high * np.int32(256)
                total += value
            scales[token, u] = scale
            weights[token, u] = scale * np.float32(total)


@inlined
def row_sum(source, bits, blocks, x, factors, place):
    """One row times one token, without its zero points; units are whole blocks."""
    total = no_floats()
    for block in range(blocks):
        high, low = no_ints(), no_ints()
        for vector in range(BLOCK // VECTOR):
            codes = codes_of(source + 16 * bits * block, bits, vector)
            at = x + 2 * BLOCK * block + 2 * VECTOR * vector
            high = dot(high, codes, load_bytes(at))
            low = dot(low, codes, load_bytes(at + VECTOR))
        total = add_scaled(total, joined(high, low), factors[TILE * block + place])
    return sum_lanes(total)


@compiled
def packed_row_sum(source, bits, blocks, x, factors, place):
    """``row_sum`` of a row as it is stored; all blocks are full."""
    if bits == 1:
        return row_sum(source, 1, blocks, x, factors, place)
    if bits == 2:
        return row_sum(source, 2, blocks, x, factors, place)
    if bits == 3:
        return row_sum(source, 3, blocks, x, factors, place)
    if bits == 4:
        return row_sum(source, 4, blocks, x, factors, place)
    return row_sum(source, 8, blocks, x, factors, place)


@inlined
def tile_sums(codes, vectors, units, x, factors, out):
    """Four rows times one token, without zero points.

    Parameters
    ----------
    codes : address of unpacked codes; of each 32 columns those of the four rows in turn.
    vectors : per unit.
    x : address of the token's quantised activations.
    factors : fp32 [units * 4], scales of weights times scales of activations.
    out : fp32 [4], written.
    """
    a0, a1, a2, a3 = no_floats(), no_floats(), no_floats(), no_floats()
    for u in range(units):
        h0, h1, h2, h3 = no_ints(), no_ints(), no_ints(), no_ints()
        l0, l1, l2, l3 = no_ints(), no_ints(), no_ints(), no_ints()
        for vector in range(vectors):
            at = u * vectors + vector
            high, low = load_bytes(x + 64 * at), load_bytes(x + 64 * at + 32)
            tile = codes + TILE * VECTOR * at
            row = load_bytes(tile)
            h0, l0 = dot(h0, row, high), dot(l0, row, low)
            row = load_bytes(tile + 32)
            h1, l1 = dot(h1, row, high), dot(l1, row, low)
            row = load_bytes(tile + 64)
            h2, l2 = dot(h2, row, high), dot(l2, row, low)
            row = load_bytes(tile + 96)
            h3, l3 = dot(h3, row, high), dot(l3, row, low)
        a0 = add_scaled(a0, joined(h0, l0), factors[TILE * u])
        a1 = add_scaled(a1, joined(h1, l1), factors[TILE * u + 1])
        a2 = add_scaled(a2, joined(h2, l2), factors[TILE * u + 2])
        a3 = add_scaled(a3, joined(h3, l3), factors[TILE * u + 3])
    out[0], out[1], out[2], out[3] = sum_lanes(a0), sum_lanes(a1), sum_lanes(a2), sum_lanes(a3)


@compiled
def unpacked_tile_sums(codes, vectors, units, x, factors, out):
    """``tile_sums``, compiled for each number of vectors."""
    if vectors == 4:
        tile_sums(codes, 4, units, x, factors, out)
    elif vectors == 2:
        tile_sums(codes, 2, units, x, factors, out)
    else:
        tile_sums(codes, 1, units, x, factors, out)


@compiled
def tile_grid(source, lines, zero_codes, middle, groups, stretch, scales, zeros):
    """Scales, and scales times zero points, of four rows, both to fp32 [units * 4].

    Parameters
    ----------
    source : address of fp16 [rows, groups], and ``lines``, int64 [4], the rows to take.
    zero_codes : address of uint8 [groups, 128], at the first of the four rows.
    middle : zero point of code 0.
    stretch : units per group.
    """
    at, line = scales.ctypes.data, 2 * groups
    for row in range(TILE):
        for place in range(0, line, CACHE_LINE):
            prefetch(source + line * (lines[row] + AHEAD) + place)
    r0, r1 = source + line * lines[0], source + line * lines[1]
    r2, r3 = source + line * lines[2], source + line * lines[3]
    for group in range(0, groups - 7, 8):
        skip = 2 * group
        transpose_halves(r0 + skip, r1 + skip, r2 + skip, r3 + skip, at + 16 * group)
    for group in range(groups // 8 * 8, groups):
        for row in range(TILE):
            scales[TILE * group + row] = load_half(source + line * lines[row] + 2 * group)
    units, none = len(scales) // TILE, quad(np.float32(0))
    for u in range(units - 1, -1, -1):
        group = u // stretch
        scale, zero = none, none
        if group < groups:
            scale = load_quad(at + 16 * group)
            code = load_byte_quad(zero_codes + BLOCK * group)
            zero = add_product(quad(middle), code, quad(np.float32(0.25)))
        store_quad(at + 16 * u, scale)
        store_quad(zeros.ctypes.data + 16 * u, add_product(none, scale, zero))


@compiled
def token_factors(scales, zeros, x_scales, x_weights, factors):
    """Factors of ``tile_sums`` for one token; returns what zero points take off the four rows."""
    off = quad(np.float32(0))
    for u in range(len(x_scales)):
        at = 16 * u
        factor = scaled(load_quad(scales.ctypes.data + at), x_scales[u])
        store_quad(factors.ctypes.data + at, factor)
        off = add_product(off, load_quad(zeros.ctypes.data + at), quad(x_weights[u]))
    return off


@compiled
def tile_products(x, x_grid, qweight, lines, form, tokens, grid, scratch, out, row):
    """Four rows of a matrix times its tokens; fields as in ``integer_dot``.

    Parameters
    ----------
    lines : the four rows, counted through the stack; the last is repeated behind the end.
    tokens : first and last+1.
    grid : what ``tile_grid`` wrote.
    scratch : codes, factors, and twice four numbers.
    row : where the first of the four goes in ``out``.
    """
    rows, columns, bits, group_size = form
    x_scales, x_weights = x_grid
    row_scales, row_zeros = grid
    codes, factors, sums, off = scratch
    unit, units = min(group_size, BLOCK), x_scales.shape[1]
    row_size = packed_row(columns, bits)
    # A single token takes codes as they are stored, without a copy of them in between.
    alone = tokens[1] - tokens[0] == 1 and unit == BLOCK and columns % BLOCK == 0
    if not alone:
        for i in range(TILE):
            target = codes.ctypes.data + VECTOR * i
            unpack(qweight + row_size * lines[i], bits, columns, target, TILE * VECTOR)
    for token in range(tokens[0], tokens[1]):
        less = token_factors(row_scales, row_zeros, x_scales[token], x_weights[token], factors)
        store_quad(off.ctypes.data, less)
        at = x.ctypes.data + token * x.shape[1]
        if alone:
            for i in range(TILE):
                source = qweight + row_size * lines[i]
                for line in range(0, row_size, CACHE_LINE):
                    prefetch(source + AHEAD * row_size + line)
                sums[i] = packed_row_sum(source, bits, columns // BLOCK, at, factors, i)
        else:
            unpacked_tile_sums(codes.ctypes.data, unit // VECTOR, units, at, factors, sums)
        for i in range(min(TILE, rows - row)):
            out[token, row + i] = sums[i] - off[i]


@compiled
def integer_dot(x, x_grid, qweight, scales, zeros, spans, form, out, share, shares):
    """Products of quantised activations with packed matrices of one shape: a share of the rows.

    Parameters
    ----------
    x, x_grid : values, and scales and weights, as ``quantise_activations`` writes them.
    qweight, scales, zeros : addresses of the stacked matrices.
    spans : int64 [S, 3], of each matrix in use its place in the stack, and its first and last+1
        token.
    form : rows, columns, bits, group size.
    out : fp32 [N, rows], written.
    """
    rows, columns, bits, group_size = form
    units = x_grid[0].shape[1]
    groups = (columns + group_size - 1) // group_size
    middle = np.float32((2**bits - 1) / 2)
    codes = np.empty(TILE * ((columns + BLOCK - 1) // BLOCK * BLOCK), np.uint8)
    zero_codes = np.zeros(groups * BLOCK + TILE, np.uint8)
    grid = np.empty(TILE * units, np.float32), np.empty(TILE * units, np.float32)
    numbers = np.empty(TILE * units, np.float32), np.empty(TILE, np.float32)
    scratch = codes, numbers[0], numbers[1], np.empty(TILE, np.float32)
    lines = np.empty(TILE, np.int64)
    row_blocks = (rows + BLOCK - 1) // BLOCK
    items = len(spans) * row_blocks
    for item in range(items * share // shares, items * (share + 1) // shares):
        span = spans[item // row_blocks]
        top = item % row_blocks * BLOCK
        of_slot = zeros + span[0] * groups * packed_row(rows, bits)
        unpack_zeros(of_slot, bits, rows, top, groups, zero_codes.ctypes.data)
        for row in range(top, min(rows, top + BLOCK), TILE):
            for i in range(TILE):
                lines[i] = span[0] * rows + min(row + i, rows - 1)
            here = zero_codes.ctypes.data + row - top
            stretch = max(1, group_size // BLOCK)
            tile_grid(scales, lines, here, middle, groups, stretch, grid[0], grid[1])
            tokens = span[1], span[2]
            tile_products(x, x_grid, qweight, lines, form, tokens, grid, scratch, out, row)
