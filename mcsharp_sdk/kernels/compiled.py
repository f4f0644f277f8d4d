"""The kernels that numba compiles: integer products and dequantisation.

They read the stored format as it is, see :mod:`mcsharp_sdk.quantization.packing` and
:mod:`mcsharp_sdk.quantization.grid`: nothing is repacked or kept. Each call does one ``share`` of
``shares`` of the work and runs without Python's lock, so that threads can work side by side.

Columns are taken in *blocks* of 128, as they are packed, and within a block in *units* of
min(128, group size) columns, which have one scale and one zero point. The group size is a multiple
of 32 that divides 128, or a multiple of 128. Addresses are int64.

Imported only where numba is installed. What was compiled is cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from mcsharp_sdk.kernels.simd import (
    add_product,
    add_scaled,
    bfloat16_levels,
    dot,
    field,
    float16_levels,
    joined,
    load_byte,
    load_byte_quad,
    load_bytes,
    load_half,
    load_quad,
    no_bytes,
    no_floats,
    no_ints,
    quad,
    scaled,
    store_bfloat16,
    store_byte,
    store_bytes,
    store_float16,
    store_float32,
    store_levels,
    store_quad,
    sum_lanes,
    transpose_halves,
    two_bits,
    with_third_bit,
)

BLOCK = 128
VECTOR = 32
TILE = 4
"""Rows that are multiplied together."""

TOP = 127 * 256
"""Magnitude of a unit's largest activation after quantisation: 15 bits and a sign."""

FLOAT32, FLOAT16, BFLOAT16 = range(3)


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile, and cache on disk where there is a folder for it."""
    try:
        return numba.njit(function, nogil=True, cache=True)
    except RuntimeError:
        return numba.njit(function, nogil=True)


_inlined: Any = numba.njit(nogil=True, inline="always")


@_compiled
def packed_row(columns, bits):
    """As ``packed_bytes``."""
    return (columns + 7) // 8 * bits


@_inlined
def codes_of(source, bits, vector):
    """Codes of the 32 columns from 32·vector on, of the full block at ``source``."""
    if bits == 1:
        return two_bits(source, 2 * vector)
    if bits == 2:
        return field(load_bytes(source), 2 * vector, 3)
    if bits == 3:
        low = field(load_bytes(source), 2 * vector, 3)
        return with_third_bit(low, two_bits(source + 32, 2 * vector))
    if bits == 4:
        return field(load_bytes(source + 32 * (vector & 1)), 4 * (vector >> 1), 15)
    return load_bytes(source + 32 * vector)


@_compiled
def unpack_short_block(source, bits, columns, target, stride):
    """Codes of a block of fewer than 128 columns, 0 behind them; targets as ``unpack``."""
    for vector in range(BLOCK // VECTOR):
        store_bytes(target + stride * vector, no_bytes())
    padded = (columns + 7) // 8 * 8
    low = 0
    while low < bits:
        width = 2 if bits == 3 and low == 0 else bits - low
        length = padded * width // 8
        for place in range(8 // width):
            for byte in range(length):
                code = (load_byte(source + byte) >> (width * place)) & (2**width - 1)
                column = length * place + byte
                to = target + stride * (column // VECTOR) + column % VECTOR
                store_byte(to, load_byte(to) | (code << low))
        source += length
        low += width


@_inlined
def unpack_blocks(source, bits, blocks, target, stride):
    for block in range(blocks):
        for vector in range(BLOCK // VECTOR):
            codes = codes_of(source + 16 * bits * block, bits, vector)
            store_bytes(target + stride * (4 * block + vector), codes)


@_compiled
def unpack(source, bits, columns, target, stride):
    """Codes of a packed row, one a byte, 32 of them every ``stride`` bytes from ``target`` on.

    The last block is filled up with zeros.
    """
    blocks = columns // BLOCK
    if bits == 1:
        unpack_blocks(source, 1, blocks, target, stride)
    elif bits == 2:
        unpack_blocks(source, 2, blocks, target, stride)
    elif bits == 3:
        unpack_blocks(source, 3, blocks, target, stride)
    elif bits == 4:
        unpack_blocks(source, 4, blocks, target, stride)
    else:
        unpack_blocks(source, 8, blocks, target, stride)
    if columns > BLOCK * blocks:
        source, target = source + 16 * bits * blocks, target + 4 * stride * blocks
        unpack_short_block(source, bits, columns - BLOCK * blocks, target, stride)


@_compiled
def unpack_zeros(zeros, bits, rows, first, groups, target):
    """Zero-point codes of the rows first to first+127 of a matrix, to uint8 [groups, 128]."""
    for group in range(groups):
        source = zeros + group * packed_row(rows, bits) + first // BLOCK * 16 * bits
        unpack(source, bits, min(BLOCK, rows - first), target + BLOCK * group, VECTOR)


@_compiled
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


@_inlined
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


@_compiled
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


@_inlined
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


@_compiled
def unpacked_tile_sums(codes, vectors, units, x, factors, out):
    """``tile_sums``, compiled for each number of vectors."""
    if vectors == 4:
        tile_sums(codes, 4, units, x, factors, out)
    elif vectors == 2:
        tile_sums(codes, 2, units, x, factors, out)
    else:
        tile_sums(codes, 1, units, x, factors, out)


@_compiled
def tile_grid(rows, zero_codes, middle, groups, stretch, scales, zeros):
    """Scales, and scales times zero points, of four rows, both to fp32 [units * 4].

    Parameters
    ----------
    rows : addresses of the four rows' fp16 scales.
    zero_codes : address of uint8 [groups, 128], at the first of the four rows.
    middle : zero point of code 0.
    stretch : units per group.
    """
    at = scales.ctypes.data
    for group in range(0, groups - 7, 8):
        skip = 2 * group
        transpose_halves(
            rows[0] + skip, rows[1] + skip, rows[2] + skip, rows[3] + skip, at + 16 * group
        )
    for group in range(groups // 8 * 8, groups):
        for row in range(TILE):
            scales[TILE * group + row] = load_half(rows[row] + 2 * group)
    units = len(scales) // TILE
    for u in range(units - 1, -1, -1):
        group = u // stretch
        if group >= groups:
            store_quad(at + 16 * u, quad(np.float32(0)))
            store_quad(zeros.ctypes.data + 16 * u, quad(np.float32(0)))
            continue
        scale = load_quad(at + 16 * group)
        quarter = quad(np.float32(0.25))
        zero = add_product(quad(middle), load_byte_quad(zero_codes + BLOCK * group), quarter)
        store_quad(at + 16 * u, scale)
        product = add_product(quad(np.float32(0)), scale, zero)
        store_quad(zeros.ctypes.data + 16 * u, product)


@_compiled
def token_factors(scales, zeros, x_scales, x_weights, factors):
    """Factors of ``tile_sums`` for one token; returns what zero points take off the four rows."""
    off = quad(np.float32(0))
    for u in range(len(x_scales)):
        at = 16 * u
        factor = scaled(load_quad(scales.ctypes.data + at), x_scales[u])
        store_quad(factors.ctypes.data + at, factor)
        off = add_product(off, load_quad(zeros.ctypes.data + at), quad(x_weights[u]))
    return off


@_compiled
def integer_dot(x, x_scales, x_weights, qweight, scales, zeros, spans, form, out, share, shares):
    """Products of quantised activations with packed matrices of one shape.

    Parameters
    ----------
    x, x_scales, x_weights : as ``quantise_activations`` writes them.
    qweight, scales, zeros : addresses of the stacked matrices.
    spans : int64 [S, 3], of each matrix in use its place in the stack, and its first and last+1
        token.
    form : rows, columns, bits, group size.
    out : fp32 [N, rows], written.
    """
    rows, columns, bits, group_size = form
    blocks = (columns + BLOCK - 1) // BLOCK
    unit = min(group_size, BLOCK)
    units = x_scales.shape[1]
    groups = (columns + group_size - 1) // group_size
    middle = np.float32((2**bits - 1) / 2)
    row_size = packed_row(columns, bits)
    direct = unit == BLOCK and columns % BLOCK == 0

    codes = np.empty(TILE * BLOCK * blocks, np.uint8)
    zero_codes = np.zeros(groups * BLOCK + TILE, np.uint8)
    row_scales, row_zeros, factors = np.empty((3, TILE * units), np.float32)
    sums, off = np.empty((2, TILE), np.float32)
    lines = np.empty(TILE, np.int64)

    row_blocks = (rows + BLOCK - 1) // BLOCK
    items = len(spans) * row_blocks
    for item in range(items * share // shares, items * (share + 1) // shares):
        span = item // row_blocks
        slot, first, last = spans[span, 0], spans[span, 1], spans[span, 2]
        top = item % row_blocks * BLOCK
        zeros_of_slot = zeros + slot * groups * packed_row(rows, bits)
        unpack_zeros(zeros_of_slot, bits, rows, top, groups, zero_codes.ctypes.data)
        for row in range(top, min(rows, top + BLOCK), TILE):
            for i in range(TILE):
                lines[i] = slot * rows + min(row + i, rows - 1)
            tile_grid(
                scales + 2 * groups * lines,
                zero_codes.ctypes.data + row - top,
                middle,
                groups,
                max(1, group_size // BLOCK),
                row_scales,
                row_zeros,
            )
            alone = direct and last - first == 1
            if not alone:
                for i in range(TILE):
                    source = qweight + row_size * lines[i]
                    unpack(source, bits, columns, codes.ctypes.data + VECTOR * i, TILE * VECTOR)
            for token in range(first, last):
                less = token_factors(
                    row_scales, row_zeros, x_scales[token], x_weights[token], factors
                )
                store_quad(off.ctypes.data, less)
                at = x.ctypes.data + token * x.shape[1]
                if alone:
                    for i in range(TILE):
                        source = qweight + row_size * lines[i]
                        sums[i] = packed_row_sum(source, bits, blocks, at, factors, i)
                else:
                    unpacked_tile_sums(codes.ctypes.data, unit // VECTOR, units, at, factors, sums)
                for i in range(min(TILE, rows - row)):
                    out[token, row + i] = sums[i] - off[i]


@_inlined
def store_by_table(table, row):
    """One row in 16 bits, of codes below 16: by a table for each group."""
    codes, columns, scales, zero_codes, middle, group_size, out = row
    for start in range(0, columns, group_size):
        levels = table(load_half(scales), zero_point(zero_codes, middle))
        for column in range(start, min(columns, start + group_size), VECTOR):
            store_levels(out + 2 * column, load_bytes(codes + column), levels)
        scales, zero_codes = scales + 2, zero_codes + BLOCK


@_inlined
def store_by_arithmetic(store, size, row):
    """One row, of any codes and dtype."""
    codes, columns, scales, zero_codes, middle, group_size, out = row
    for start in range(0, columns, group_size):
        scale, zero = load_half(scales), zero_point(zero_codes, middle)
        for column in range(start, min(columns, start + group_size), VECTOR):
            store(out + size * column, load_bytes(codes + column), scale, zero)
        scales, zero_codes = scales + 2, zero_codes + BLOCK


@_inlined
def zero_point(code, middle):
    return np.float32(load_byte(code)) * np.float32(0.25) + middle


@_compiled
def store_row(kind, bits, codes, columns, scales, zero_codes, group_size, out):
    """One row as numbers, from unpacked codes; padded to a multiple of 32 columns."""
    middle = np.float32((2**bits - 1) / 2)
    row = (codes, columns, scales, zero_codes, middle, group_size, out)
    if kind == FLOAT32:
        store_by_arithmetic(store_float32, 4, row)
    elif kind == FLOAT16 and bits <= 4:
        store_by_table(float16_levels, row)
    elif kind == FLOAT16:
        store_by_arithmetic(store_float16, 2, row)
    elif bits <= 4:
        store_by_table(bfloat16_levels, row)
    else:
        store_by_arithmetic(store_bfloat16, 2, row)


@_compiled
def dequantise_rows(qweight, scales, zeros, form, first, last, kind, out, share, shares):
    """The rows first to last of one matrix, as numbers.

    Parameters
    ----------
    qweight, scales, zeros : addresses of the matrix.
    form : rows, columns, bits, group size.
    kind : ``FLOAT32``, ``FLOAT16`` or ``BFLOAT16``.
    out : address of [last - first, columns up to the next multiple of 32], written.
    """
    rows, columns, bits, group_size = form
    blocks = (columns + BLOCK - 1) // BLOCK
    groups = (columns + group_size - 1) // group_size
    line = (columns + VECTOR - 1) // VECTOR * VECTOR * (4 if kind == FLOAT32 else 2)
    codes = np.empty(BLOCK * blocks, np.uint8)
    zero_codes = np.empty(groups * BLOCK, np.uint8)
    count, known = last - first, -1
    for row in range(first + count * share // shares, first + count * (share + 1) // shares):
        top = row // BLOCK * BLOCK
        if top != known:
            unpack_zeros(zeros, bits, rows, top, groups, zero_codes.ctypes.data)
            known = top
        # numba frees an array after its last use: addresses are taken where they are needed.
        here, there = codes.ctypes.data, zero_codes.ctypes.data + row - top
        unpack(qweight + row * packed_row(columns, bits), bits, columns, here, VECTOR)
        to = out + (row - first) * line
        store_row(kind, bits, here, columns, scales + 2 * groups * row, there, group_size, to)
