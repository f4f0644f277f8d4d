"""Products of quantised activations with packed matrices, compiled by numba.

Rows are taken in tiles of four, see :mod:`mcsharp_sdk.kernels.integer_tiles`.

Imported only where numba is installed.
"""

from __future__ import annotations

import numpy as np

from mcsharp_sdk.kernels.integer_tiles import (
    QUAD,
    TILE,
    stored_tile_sums,
    takes_stored,
    tile_grid,
    token_factors,
    unpacked_tile_sums,
)
from mcsharp_sdk.kernels.packed_codes import (
    BLOCK,
    VECTOR,
    compiled,
    inlined,
    packed_row,
    unpack,
    unpack_zeros,
)
from mcsharp_sdk.kernels.simd import load_float, load_word, prefetch, store_float
from mcsharp_sdk.kernels.simd_quads import less, negative, store_quad

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
    x : fp32 [N, padded K], zeros behind K, and ``bits_of_x``, the same memory as int32.
    values : int8 [N, 2 * padded K], written: of 32 columns the high bytes, then the low ones.
    scales : fp32 [N, units], written: x = scale · (256 · high + low). Infinite or NaN where an
        activation is.
    weights : fp32 [N, units], written: what a zero point of 1 adds up to, scale · sum of integers.
    """
    for token in range(x.shape[0]):
        for u in range(scales.shape[1]):
            top = np.int32(0)
            for column in range(unit * u, unit * (u + 1)):
                top = max(top, bits_of_x[token, column] & np.int32(0x7FFFFFFF))
            scale = np.int32(top).view(np.float32) / np.float32(TOP)
            inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
            total = np.int32(0)
            for start in range(unit * u, unit * (u + 1), VECTOR):
                for place in range(VECTOR):
                    value = np.int32(np.rint(x[token, start + place] * inverse))
                    high = (value + np.int32(128)) >> np.int32(8)
                    values[token, 2 * start + place] = high
                    values[token, 2 * start + VECTOR + place] = value - high * np.int32(256)
                    total += value
            scales[token, u] = scale
            weights[token, u] = scale * np.float32(total)


@inlined
def of_four_rows(first, size, row, rows):
    """Addresses of four rows of so many bytes; the last row is repeated behind the end."""
    last = rows - 1
    return (
        first + size * row,
        first + size * min(row + 1, last),
        first + size * min(row + 2, last),
        first + size * min(row + 3, last),
    )


@inlined
def ask_for(first, size):
    """Ask for the memory of a tile that comes later; rows have so many bytes."""
    for place in range(0, TILE * size, CACHE_LINE):
        prefetch(first + AHEAD * size + place)


@compiled
def unpack_tile(rows, bits, columns, codes):
    """Codes of four rows as ``unpacked_sums`` takes them."""
    for i in range(TILE):
        unpack(rows[i], bits, columns, codes + VECTOR * i, TILE * VECTOR)


@compiled
def write_tile(total, to, count, spare):
    """The first ``count`` of four results; ``spare`` is the address of four numbers."""
    if count == TILE:
        store_quad(to, total)
        return
    store_quad(spare, total)
    for i in range(count):
        store_float(to + 4 * i, load_float(spare + 4 * i))


@compiled
def tile_products(matrix, row, zero_codes, form, span, order, activations, scratch, out):
    """Four rows of a matrix times its slots; other fields as in ``integer_dot``.

    Parameters
    ----------
    matrix : addresses of codes and scales, and the width.
    row : the first of the four.
    zero_codes : as ``tile_grid`` takes them.
    span : first and last+1 place in ``order``.
    scratch : addresses of unpacked codes, scales, zeros, factors and four results.
    """
    qweight, scales, bits = matrix
    rows, columns, group_size = form
    values, x_scales, x_weights, units = activations
    codes, of_scales, of_zeros, factors, spare = scratch
    groups, stretch = (columns + group_size - 1) // group_size, max(1, group_size // BLOCK)
    vectors = min(group_size, BLOCK) // VECTOR
    line, size = 2 * groups, packed_row(columns, bits)
    here = of_four_rows(scales, line, row, rows)
    ask_for(here[0], line)
    middle = np.float32(((1 << bits) - 1) / 2)
    tile_grid(here, groups, stretch, units, zero_codes, middle, of_scales, of_zeros)
    # A single slot takes codes as they are stored, without a copy of them in between.
    alone = span[1] - span[0] == 1 and takes_stored(bits, vectors)
    stored = columns // BLOCK if alone else 0
    done = 16 * bits * stored
    here = of_four_rows(qweight, size, row, rows)
    ask_for(here[0], size)
    if stored * BLOCK < columns:
        rest = here[0] + done, here[1] + done, here[2] + done, here[3] + done
        unpack_tile(rest, bits, columns - BLOCK * stored, codes)
    known = stored * (BLOCK // VECTOR) // vectors
    behind = 2 * BLOCK * stored
    for place in range(span[0], span[1]):
        slot, token = load_word(order + 16 * place), load_word(order + 16 * place + 8)
        x, grid = values + 2 * VECTOR * vectors * units * token, 4 * units * token
        of_token = x_scales + grid, x_weights + grid
        off = token_factors(of_scales, of_zeros, units, of_token[0], of_token[1], factors)
        if stored:
            off = less(off, stored_tile_sums(here, bits, vectors, stored, x, factors))
        if known < units:
            left = units - known, x + behind, factors + QUAD * known
            off = less(off, unpacked_tile_sums(codes, vectors, left[0], left[1], left[2]))
        to = out + 4 * (slot * rows + row)
        write_tile(negative(off), to, min(TILE, rows - row), spare)


@compiled
def span_products(span, form, blocks, order, activations, scratch, out):
    """Blocks of 128 rows of one matrix times its slots.

    Parameters
    ----------
    span : as a row of ``spans`` in ``integer_dot``.
    blocks : first and last+1.
    scratch : address of memory of the size that ``integer_dot`` makes.
    """
    qweight, scales, zeros, bits, first, last = span
    rows, columns, group_size = form
    groups, units = (columns + group_size - 1) // group_size, activations[3]
    padded = (columns + BLOCK - 1) // BLOCK * BLOCK
    zero_codes, codes = scratch, scratch + BLOCK * groups + QUAD
    parts = codes + TILE * padded
    rest = parts, parts + QUAD * units, parts + 2 * QUAD * units
    scratch_of_tile = codes, rest[0], rest[1], rest[2], parts + 3 * QUAD * units
    for block in range(blocks[0], blocks[1]):
        top = BLOCK * block
        unpack_zeros(zeros, bits, rows, top, groups, zero_codes)
        for row in range(top, min(rows, top + BLOCK), TILE):
            tile_products(
                *((qweight, scales, bits), row, zero_codes + row - top, form, (first, last)),
                *(order, activations, scratch_of_tile, out),
            )


@compiled
def integer_dot(values, grid, spans, order, form, out, share, shares):
    """Products of quantised activations with packed matrices of one shape: a share of the rows.

    Parameters
    ----------
    values : what ``quantise_activations`` wrote, and ``grid``, fp32 [2, T, units], its scales and
        weights.
    spans : int64 [S, 6], of each matrix in use the addresses of codes, scales and zero points, the
        width, and first and last+1 place of its slots in ``order``.
    order : int64 [N, 2], by matrix: the row of ``out`` and that of the activations.
    form : rows, columns, group size.
    out : fp32 [·, rows], written.
    """
    rows, columns, _ = form
    units, row_blocks = grid.shape[2], (rows + BLOCK - 1) // BLOCK
    padded = (columns + BLOCK - 1) // BLOCK * BLOCK
    scratch = np.empty((BLOCK + 3 * QUAD) * units + TILE * padded + 2 * QUAD, np.uint8)
    activations = values.ctypes.data, grid[0].ctypes.data, grid[1].ctypes.data, units
    items = len(spans) * row_blocks
    begin, end = items * share // shares, items * (share + 1) // shares
    for number in range(begin // row_blocks, len(spans)):
        before = number * row_blocks
        blocks = max(begin - before, 0), min(end - before, row_blocks)
        if blocks[0] < blocks[1]:
            s = spans[number]
            span = s[0], s[1], s[2], s[3], s[4], s[5]
            room, to = np.int64(scratch.ctypes.data), np.int64(out.ctypes.data)
            span_products(span, form, blocks, order.ctypes.data, activations, room, to)
    return scratch[0]  # which keeps it alive until here
