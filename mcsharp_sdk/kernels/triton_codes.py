"""Reading the stored format inside Triton kernels: codes, scales and zero points.

Device functions only. A ``matrix`` [R, K] is a tuple: pointers to its ``qweight``, ``scales`` and
``zeros`` (:mod:`mcsharp_sdk.quantization.packing`, :mod:`mcsharp_sdk.quantization.grid`), R and K.

This module needs triton, so it is imported only by what runs on a GPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.quantization import grid, packing

BLOCK = tl.constexpr(packing.BLOCK)
"""Columns, or rows of zero-point codes, that are packed together. Tests of the group size say 128
instead, for in the interpreter a number is not divisible by a constexpr."""

ZERO_STEP = tl.constexpr(grid.ZERO_STEP)


@triton.jit
def padded(count):
    """``count`` rounded up to whole bytes of 1-bit codes."""
    return (count + 7) // 8 * 8


@triton.jit
def matrix_at(weights, place, rows, columns, GROUP: tl.constexpr, BITS: tl.constexpr):
    """The matrix at ``place`` in a stack of one width."""
    q, s, z = weights
    place = place.to(tl.int64)
    groups = tl.cdiv(columns, GROUP)
    q += place * rows * (padded(columns) * BITS // 8)
    s += place * rows * groups
    z += place * groups * (padded(rows) * BITS // 8)
    return q, s, z, rows, columns


@triton.jit
def packed_place(k, count, BITS: tl.constexpr, LOW: tl.constexpr, WIDTH: tl.constexpr):
    """Byte and shift of one part of code ``k`` of ``count`` codes of BITS bits.

    The part is WIDTH bits wide and holds the bits from LOW on.
    """
    block = k // BLOCK
    length = tl.minimum(padded(count) - block * BLOCK, BLOCK)
    part = length * WIDTH // 8
    at = k % BLOCK
    field = at * 0  # at // part, which is below 8 // WIDTH; divisions take long
    for t in tl.static_range(1, 8 // WIDTH):
        field += (at >= t * part).to(tl.int32)
    byte = block * (BLOCK * BITS // 8) + length * LOW // 8 + at - field * part
    return byte, field * WIDTH


@triton.jit
def code_places(k, count, BITS: tl.constexpr):
    """Bytes and shifts of codes ``k`` of ``count``: of all bits, or at 3 bits of two and of one."""
    LO: tl.constexpr = 2 if BITS == 3 else BITS
    byte, shift = packed_place(k, count, BITS, 0, LO)
    top_byte, top_shift = packed_place(k, count, BITS, 2, 1)
    return byte, shift, top_byte, top_shift


@triton.jit
def load_where(pointers, ok):
    """What is there where ``ok``, and 0 elsewhere; None is everywhere."""
    if ok is None:
        return tl.load(pointers)
    else:  # noqa: RET505 - both branches are compiled unless one is left out here
        return tl.load(pointers, mask=ok, other=0)


@triton.jit
def code_in(low, top, places, BITS: tl.constexpr):
    """Codes, int32, in the bytes at :func:`code_places`: ``low``, and at 3 bits ``top``."""
    LO: tl.constexpr = 2 if BITS == 3 else BITS
    _, shift, _, top_shift = places
    code = (low.to(tl.int32) >> shift) & ((1 << LO) - 1)
    if BITS == 3:
        code |= ((top.to(tl.int32) >> top_shift) & 1) << 2
    return code


@triton.jit
def codes_at(pointers, places, ok, BITS: tl.constexpr):
    """Codes, int32, at :func:`code_places` of packed rows that start at ``pointers``, or 0 as
    :func:`load_where`; broadcast."""
    byte, _, top_byte, _ = places
    low = load_where(pointers + byte, ok)
    top = load_where(pointers + top_byte, ok) if BITS == 3 else low
    return code_in(low, top, places, BITS)


@triton.jit
def gathered_codes(pointers, k, count, ok, BITS: tl.constexpr):
    """Codes ``k``, int32, of packed rows that start at ``pointers``; shapes are broadcast."""
    return codes_at(pointers, code_places(k, count, BITS), ok, BITS)


@triton.jit
def zero_point(code, BITS: tl.constexpr):
    """The zero point that a code stands for, fp32."""
    return code.to(tl.float32) * ZERO_STEP + (2**BITS - 1) * 0.5


@triton.jit
def scale_pointers(matrix, n, g, GROUP: tl.constexpr):
    """Where the scales of rows ``n`` in groups ``g`` are, of less than 2³¹; broadcast."""
    return matrix[1] + (n * tl.cdiv(matrix[4], GROUP) + g)


@triton.jit
def scale_and_zero(matrix, n, g, ok, GROUP: tl.constexpr, BITS: tl.constexpr):
    """Scales and zero points, fp32, of rows ``n`` in groups ``g``, where ``ok`` or everywhere if it
    is None; broadcast."""
    _, _, z, rows, _ = matrix
    pointers = scale_pointers(matrix, n, g, GROUP)
    scale = load_where(pointers, ok).to(tl.float32)
    code = gathered_codes(z + g * (padded(rows) * BITS // 8), n, rows, ok, BITS)
    return scale, zero_point(code, BITS)
