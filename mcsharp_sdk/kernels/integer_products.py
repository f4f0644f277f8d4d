"""Products of quantised activations with packed matrices, compiled by numba.

Rows are taken in tiles of four for one token (:mod:`mcsharp_sdk.kernels.integer_tiles`), and in
panels of sixteen for more (:mod:`mcsharp_sdk.kernels.integer_panels`), where the processor has an
instruction for that.

Imported only where numba is installed.
"""

from __future__ import annotations

import numpy as np

from mcsharp_sdk.kernels.integer_panels import panel_block, panel_parts, takes_panels
from mcsharp_sdk.kernels.integer_tiles import (
    TILE,
    block_zeros,
    tile_grid,
    token_factors,
)
from mcsharp_sdk.kernels.packed_codes import (
    VECTOR,
    compiled,
    inlined,
    packed_row,
    unpack,
    unpack_zeros,
)
from mcsharp_sdk.kernels.simd import load_float, load_word, prefetch, store_float
from mcsharp_sdk.kernels.simd_codes import unpack_block
from mcsharp_sdk.kernels.simd_quads import QUAD, less, negative, store_quad
from mcsharp_sdk.kernels.simd_tiles import tile_sums
from mcsharp_sdk.quantization.packing import BLOCK

LAYING_OUT = 4
"""Slots that take as long as it takes to read and lay out a matrix's codes."""

CACHE_LINE = 64
AHEAD = 24
"""Rows from the one at work to the one that is asked for: its products hide what memory takes."""


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


@inlined
def scratch_parts(start, columns, units):
    """Addresses of scratch, from one on; the last is where it ends.

    It holds unpacked codes of a tile, its scales and factors, four results, and zero points of 128
    rows, as codes and as numbers.
    """
    scales = start + TILE * ((columns + BLOCK - 1) // BLOCK * BLOCK)
    factors = scales + QUAD * units
    results = factors + QUAD * units
    zero_codes = results + QUAD
    zeros = zero_codes + BLOCK * units
    return start, scales, factors, results, zero_codes, zeros, zeros + 4 * BLOCK * units


@compiled
def unpack_tile(rows, bits, skipped, columns, codes):
    """Codes of four rows behind so many full blocks, one a byte; returns where each row is."""
    left = columns - BLOCK * skipped
    size = (left + BLOCK - 1) // BLOCK * BLOCK
    for i in range(TILE):
        source, target = rows[i] + 16 * bits * skipped, codes + size * i
        if left == BLOCK // 2:  # sooner done by itself; what is behind is multiplied by 0
            unpack_block(bits, left, source, target, np.int64(VECTOR))
        else:
            unpack(source, bits, left, target, np.int64(VECTOR))
    return codes, codes + size, codes + 2 * size, codes + 3 * size


@compiled
def write_tile(total, to, count, spare):
    """The first ``count`` of four results; ``spare`` is the address of four numbers."""
    if count == TILE:
        store_quad(to, total)
        return
    store_quad(spare, total)
    for i in range(count):
        store_float(to + 4 * i, load_float(spare + 4 * i))


@inlined
def tile_products(codes, bits, vectors, row, form, span, order, activations, scratch, out):
    """Four rows of a matrix times its slots, once ``tile_grid`` has written their grid.

    Parameters
    ----------
    codes : address of those of the matrix.
    vectors : of 32 columns, per unit.
    row : the first of the four.
    form : rows, columns and group size of the matrix.
    span : first and last+1 place in ``order``.
    order, out : addresses, see ``integer_dot``.
    activations : addresses of values, scales and weights, in one array; units of a row; and halves
        of activations that panels multiply.
    scratch : see ``scratch_parts``.
    """
    rows, columns, _ = form
    values, x_scales, x_weights, units, _ = activations
    unpacked, scales, factors, results, _, zeros, _ = scratch
    size = packed_row(columns, bits)
    tile = of_four_rows(codes, size, row, rows)
    # A single slot takes codes as they are stored, without a copy of them in between.
    stored = columns // BLOCK if span[1] - span[0] == 1 else 0
    rest = (columns + BLOCK - 1) // BLOCK - stored
    r0, r1, r2, r3 = tile
    if not stored:
        ask_for(tile[0], size)
    c0, c1, c2, c3 = tile
    if rest:
        c0, c1, c2, c3 = unpack_tile(tile, bits, stored, columns, unpacked)
    own = zeros + 4 * (row % BLOCK)
    behind, later = 2 * BLOCK * stored, QUAD * stored * (BLOCK // VECTOR) // vectors
    for place in range(span[0], span[1]):
        result, token = load_word(order + 16 * place), load_word(order + 16 * place + 8)
        x, grid = values + 2 * VECTOR * vectors * units * token, 4 * units * token
        less_total = token_factors(scales, own, units, x_scales + grid, x_weights + grid, factors)
        if stored:
            ahead = AHEAD * size
            found = tile_sums(bits, vectors, r0, r1, r2, r3, stored, x, factors, ahead)
            less_total = less(less_total, found)
        if rest:
            x, own_factors = x + behind, factors + later
            found = tile_sums(8, vectors, c0, c1, c2, c3, rest, x, own_factors, 0)
            less_total = less(less_total, found)
        to = out + 4 * (result * rows + row)
        write_tile(negative(less_total), to, min(TILE, rows - row), results)


@inlined
def tile_block(matrix, form, stretch, vectors, top, span, order, activations, scratch, out):
    """128 rows of a matrix times its slots, four rows at a time.

    Parameters
    ----------
    matrix : addresses of codes and scales, and the width.
    stretch : units per group.
    vectors : of 32 columns, per unit.
    top : the first row.
    span, order, activations, scratch, out : see ``tile_products``.
    """
    codes, scales, bits = matrix
    rows, columns, group_size = form
    groups, units = (columns + group_size - 1) // group_size, activations[3]
    for row in range(top, min(rows, top + BLOCK), TILE):
        tile = of_four_rows(scales, 2 * groups, row, rows)
        ask_for(tile[0], 2 * groups)
        tile_grid(tile, groups, stretch, units, scratch[1])
        tile_products(codes, bits, vectors, row, form, span, order, activations, scratch, out)


@inlined
def span_products(span, form, blocks, order, activations, scratch, panels, out):
    """Blocks of 128 rows of one matrix times its slots; see ``tile_products``.

    Parameters
    ----------
    span : as a row of ``spans`` in ``integer_dot``.
    blocks : first and last+1.
    panels : more scratch, see ``panel_parts``.
    """
    codes, scales, zeros, bits, first, last = span
    rows, columns, group_size = form
    units, matrix, slots = activations[3], (codes, scales, bits), (first, last)
    groups, stretch = (columns + group_size - 1) // group_size, max(1, group_size // BLOCK)
    vectors = min(group_size, BLOCK) // VECTOR
    middle = np.float32(((1 << bits) - 1) / 2)
    _, _, _, _, zero_codes, of_zeros, _ = scratch
    for block in range(blocks[0], blocks[1]):
        top = BLOCK * block
        unpack_zeros(zeros, bits, rows, top, groups, zero_codes)
        block_zeros(zero_codes, groups, stretch, units, middle, of_zeros)
        if takes_panels(last - first):
            panel_block(matrix, form, top, slots, order, activations, of_zeros, panels, out)
        else:
            tile_block(matrix, form, stretch, vectors, top, slots, order, activations, scratch, out)


@inlined
def blocks_within(work, cost, most):
    """How many blocks, of so much work each, begin before so much work is done."""
    return min(max(0, (work + cost - 1) // cost), most)


@compiled
def integer_dot(values, grid, spans, order, form, halves, out, share, shares):
    """Products of quantised activations with packed matrices of one shape: a share of the rows.

    Parameters
    ----------
    values, grid : what ``quantise_activations`` wrote.
    spans : int64 [S, 6], of each matrix in use the addresses of codes, scales and zero points, the
        width, and first and last+1 place of its slots in ``order``.
    order : int64 [N, 2], by matrix: the row of ``out`` and that of the activations.
    form : rows, columns, group size.
    halves : 2 to multiply high and low bytes of activations, 1 for the high ones alone where a
        matrix has several slots.
    out : fp32 [·, rows], written.
    """
    rows, columns, _ = form
    units, row_blocks = grid.shape[2], (rows + BLOCK - 1) // BLOCK
    tokens = np.max(spans[:, 5] - spans[:, 4])
    room = np.empty(panel_parts(scratch_parts(0, columns, units)[-1], units, tokens)[-1], np.uint8)
    scratch = scratch_parts(np.int64(room.ctypes.data), columns, units)
    panels = panel_parts(scratch[-1], units, tokens)
    activations = values.ctypes.data, grid[0].ctypes.data, grid[1].ctypes.data, units, halves
    work = row_blocks * (np.sum(spans[:, 5] - spans[:, 4]) + LAYING_OUT * len(spans))
    begin, end = work * share // shares, work * (share + 1) // shares
    for number in range(len(spans)):
        s = spans[number]
        cost = s[5] - s[4] + LAYING_OUT
        blocks = blocks_within(begin, cost, row_blocks), blocks_within(end, cost, row_blocks)
        begin, end = begin - cost * row_blocks, end - cost * row_blocks
        if blocks[0] < blocks[1]:
            span, to = (s[0], s[1], s[2], s[3], s[4], s[5]), np.int64(out.ctypes.data)
            span_products(span, form, blocks, order.ctypes.data, activations, scratch, panels, to)
    return room[0]  # which keeps it alive until here
