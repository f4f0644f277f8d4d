"""Products of sixteen rows of a packed matrix with several tokens, compiled by numba.

Each row is a lane of a vector, so that nothing is summed across lanes. Codes are laid out for that,
a block of 128 columns at a time, once for up to 128 tokens. Units, scales and zero points are those
of :mod:`mcsharp_sdk.kernels.integer_tiles`.

Imported only where numba is installed.
"""

from __future__ import annotations

import numpy as np

from mcsharp_sdk.kernels.packed_codes import (
    VECTOR,
    compiled,
    inlined,
    packed_row,
    unpack_short_block,
)
from mcsharp_sdk.kernels.simd import (
    load_float,
    load_half,
    load_lanes,
    load_word,
    prefetch,
    store_float,
    store_lanes,
    store_word,
)
from mcsharp_sdk.kernels.simd_panels import (
    CODE_VECTOR,
    HAS_WIDE_VNNI,
    PANEL,
    PLACE,
    STEP,
    add_products,
    four_scales,
    panel_codes,
)
from mcsharp_sdk.quantization.packing import BLOCK

EIGHT = 8
"""Tokens that are multiplied together, unless fewer are left."""

FLOATS = 4 * PANEL
"""Bytes of an fp32 number for each row."""


@inlined
def takes_panels(tokens):
    """Whether panels are faster for so many tokens, and there is an instruction for them."""
    return HAS_WIDE_VNNI and tokens > 1


@inlined
def panel_parts(start, units, tokens):
    """Addresses of scratch for panels of so many tokens, from one on; the last is where it ends.

    It holds unpacked codes and those that are laid out, of a block; scales; and places and sums of
    tokens.
    """
    laid_out = start + PANEL * BLOCK
    scales = laid_out + PANEL * BLOCK
    places = scales + FLOATS * units
    totals = places + PLACE * whole_eights(tokens)
    return start, laid_out, scales, places, totals, totals + FLOATS * whole_eights(tokens)


@inlined
def whole_eights(tokens):
    """The next multiple of eight."""
    return (tokens + EIGHT - 1) // EIGHT * EIGHT


@compiled
def block_codes(first, size, last, bits, columns, unpacked, laid_out):
    """Codes of a block of a panel as ``panel_codes`` has them, 0 behind the columns."""
    if columns >= BLOCK or columns == BLOCK // 2:
        for row in range(PANEL, 2 * PANEL):  # those of the next panel
            prefetch(first + size * row)
        panel_codes(bits, min(columns, BLOCK), first, size, last, laid_out)
        return
    for row in range(PANEL):
        to = unpacked + BLOCK * row
        unpack_short_block(first + size * min(row, last), bits, columns, to, np.int64(VECTOR))
    eight, whole = np.int64(8), np.int64(BLOCK)
    panel_codes(eight, whole, unpacked, whole, np.int64(PANEL - 1), laid_out)


@compiled
def panel_scales(first, groups, last, scales):
    """fp16 [16, groups] to fp32 [groups, 16]; rows behind the last repeat it."""
    fours = groups // 4 * 4
    for group in range(0, fours, 4):
        four_scales(first + 2 * group, 2 * groups, last, scales + FLOATS * group)
    for row in range(PANEL):
        source = first + 2 * groups * min(row, last)
        for group in range(fours, groups):
            store_float(scales + FLOATS * group + 4 * row, load_half(source + 2 * group))


@compiled
def token_places(order, span, activations, width, places):
    """Addresses of tokens and of their scales; the last is repeated up to a multiple of eight.

    Parameters
    ----------
    span : first and last+1 place in ``order``, see ``integer_dot``.
    width : bytes of a token's activations.
    places : address of int64 [tokens up to a multiple of eight, 2], written.
    """
    values, x_scales, _, units, _ = activations
    for place in range(whole_eights(span[1] - span[0])):
        token = load_word(order + 16 * min(span[0] + place, span[1] - 1) + 8)
        store_word(places + PLACE * place, values + width * token)
        store_word(places + PLACE * place + 8, x_scales + 4 * units * token)


@compiled
def write_panel(totals, order, span, rows, row, out):
    """Sums of a panel, fp32 [tokens, 16], to where they belong."""
    for place in range(span[0], span[1]):
        to = out + 4 * (load_word(order + 16 * place) * rows + row)
        if rows - row >= PANEL:
            store_lanes(to, load_lanes(totals))
        else:
            for lane in range(rows - row):
                store_float(to + 4 * lane, load_float(totals + 4 * lane))
        totals += FLOATS


@inlined
def panel_products(matrix, row, form, count, activations, zeros, panels):
    """Sixteen rows of a matrix times the tokens at ``panels``'s places, to its sums.

    Parameters
    ----------
    matrix : address of the codes of the first of the rows, and the width.
    row : its number.
    form : rows, columns and group size of the matrix.
    count : of tokens.
    activations : as in ``tile_products``.
    zeros : address of the zero points of the rows, in what ``block_zeros`` wrote.
    panels : see ``panel_parts``; scales and places are there.
    """
    first, bits = matrix
    rows, columns, group_size = form
    _, x_scales, x_weights, _, halves = activations
    unpacked, laid_out, scales, places, totals, _ = panels
    size, last, unit = packed_row(columns, bits), rows - row - 1, min(group_size, BLOCK)
    apart = (x_weights - x_scales) * (3 - halves)  # weights of high bytes are behind the others
    for place in range(PANEL * whole_eights(count)):
        store_float(totals + 4 * place, np.float32(0))
    for u in range((columns + unit - 1) // unit):
        begin, left = unit * u, columns - unit * u
        block = begin // BLOCK
        if begin == BLOCK * block:
            source = first + 16 * bits * block
            block_codes(source, size, last, bits, left, unpacked, laid_out)
        codes = laid_out + CODE_VECTOR * ((begin - BLOCK * block) // STEP)
        vectors = (min(unit, left) + VECTOR - 1) // VECTOR
        scale, zero = scales + FLOATS * (begin // group_size), zeros + 4 * BLOCK * u
        skip, grid_skip = begin + BLOCK * block, 4 * u
        for token in range(0, count, EIGHT):
            tokens = min(EIGHT, (count - token + 1) // 2 * 2)
            place, total = places + PLACE * token, totals + FLOATS * token
            # fmt: off
            add_products(tokens, halves, codes, vectors, place, skip, grid_skip, apart,
                         scale, zero, total)
            # fmt: on


@inlined
def panel_block(matrix, form, top, span, order, activations, zeros, panels, out):
    """128 rows of a matrix times its slots, sixteen rows at a time; see ``tile_block``."""
    codes, scales, bits = matrix
    rows, columns, group_size = form
    groups, size = (columns + group_size - 1) // group_size, packed_row(columns, bits)
    width = 2 * min(group_size, BLOCK) * activations[3]
    token_places(order, span, activations, width, panels[3])
    for row in range(top, min(rows, top + BLOCK), PANEL):
        panel_scales(scales + 2 * groups * row, groups, rows - row - 1, panels[2])
        panel, own = (codes + size * row, bits), zeros + 4 * (row - top)
        panel_products(panel, row, form, span[1] - span[0], activations, own, panels)
        write_panel(panels[4], order, span, rows, row, out)
