"""Packed rows to numbers, compiled by numba.

Imported only where numba is installed.
"""

from __future__ import annotations

import numpy as np

from mcsharp_sdk.kernels.packed_codes import (
    VECTOR,
    compiled,
    inlined,
    packed_row,
    unpack,
    unpack_zeros,
)
from mcsharp_sdk.kernels.simd import load_byte, load_bytes, load_half
from mcsharp_sdk.kernels.simd_weights import (
    bfloat16_levels,
    float16_levels,
    store_bfloat16,
    store_float16,
    store_float32,
    store_levels,
)
from mcsharp_sdk.quantization.grid import ZERO_STEP
from mcsharp_sdk.quantization.packing import BLOCK

FLOAT32, FLOAT16, BFLOAT16 = range(3)
"""Kinds of numbers."""


@inlined
def store_by_table(table, row):
    """One row in 16 bits, of codes below 16: by a table for each group."""
    codes, columns, scales, zero_codes, middle, group_size, out = row
    for start in range(0, columns, group_size):
        levels = table(load_half(scales), zero_point(zero_codes, middle))
        for column in range(start, min(columns, start + group_size), VECTOR):
            store_levels(out + 2 * column, load_bytes(codes + column), levels)
        scales, zero_codes = scales + 2, zero_codes + BLOCK


@inlined
def store_by_arithmetic(store, size, row):
    """One row, of any codes and dtype."""
    codes, columns, scales, zero_codes, middle, group_size, out = row
    for start in range(0, columns, group_size):
        scale, zero = load_half(scales), zero_point(zero_codes, middle)
        for column in range(start, min(columns, start + group_size), VECTOR):
            store(out + size * column, load_bytes(codes + column), scale, zero)
        scales, zero_codes = scales + 2, zero_codes + BLOCK


@inlined
def zero_point(code, middle):
    return np.float32(load_byte(code)) * np.float32(ZERO_STEP) + middle


@compiled
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


@compiled
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
            unpack_zeros(zeros, bits, rows, top, groups, np.int64(zero_codes.ctypes.data))
            known = top
        # numba frees an array after its last use: addresses are taken where they are needed.
        here, there = np.int64(codes.ctypes.data), np.int64(zero_codes.ctypes.data) + row - top
        unpack(qweight + row * packed_row(columns, bits), bits, columns, here, np.int64(VECTOR))
        to = out + (row - first) * line
        store_row(kind, bits, here, columns, scales + 2 * groups * row, there, group_size, to)
