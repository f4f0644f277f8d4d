"""Codes as fp16 numbers inside Triton kernels, and activations to multiply them with.

A code in the lowest bits of an fp16 number, without an exponent, is code · 2⁻²⁴: such subnormal
numbers are as fast as others, on tensor cores too. So a code needs no conversion, only a mask, and
the scale and the zero point of a group are applied to sums. Activations are scaled by powers of two
to fit into fp16, which changes none of them but those smaller than the largest by 2²¹ and more.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.kernels.triton_codes import BLOCK
from mcsharp_sdk.kernels.triton_powers import exponent_of, power_of_two

LARGEST = tl.constexpr(15)
"""Activations are scaled to at most 2^15, half of fp16's range."""

UNIT = tl.constexpr(24)
"""A code in the lowest bits of an fp16 number is code · 2^-24."""


@triton.jit
def prepare_rows(x, halves, factors, sums, columns, AT_ONCE: tl.constexpr):
    """What products with codes need of each row of x [n, K]; grid (n,).

    ``halves`` fp16 [n, K] are x / (factor · 2⁻²⁴), ``factors`` fp32 [n] powers of two, and ``sums``
    fp32 [full blocks, n] those of each block of ``halves``, times 2⁻²⁴: x · code comes out as
    factor · (halves · subnormal code).
    """
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK)
    block, lane = tl.arange(0, AT_ONCE), tl.arange(0, BLOCK)
    at = block[:, None] * BLOCK + lane[None, :]
    x += row * columns
    halves += row * columns
    largest = tl.zeros((AT_ONCE,), tl.float32)
    for first in range(0, blocks, AT_ONCE):
        k = first * BLOCK + at
        value = tl.load(x + k, mask=k < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(value), 1))
    exponent = -exponent_of(tl.max(largest, 0), -60, 118) + LARGEST
    tl.store(factors + row, power_of_two(-exponent + UNIT))
    full = columns // BLOCK
    for first in range(0, blocks, AT_ONCE):
        k = first * BLOCK + at
        value = tl.load(x + k, mask=k < columns, other=0.0).to(tl.float32)
        value *= power_of_two(exponent)
        tl.store(halves + k, value.to(tl.float16), mask=k < columns)
        inside = first + block < full
        to = sums + (first + block) * tl.num_programs(0) + row
        tl.store(to, tl.sum(value, 1) * 2.0**-24, mask=inside)


@triton.jit
def fields(value, t: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr):
    """Field ``t`` of BITS bits of bytes in int16, two at a time."""
    SHIFT: tl.constexpr = BITS * t
    MASK: tl.constexpr = 2**BITS - 1
    if EMULATE:
        return (value >> SHIFT) & MASK
    else:  # noqa: RET505 - both branches are compiled unless one is left out here
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 by, moved;
            and.b32 by, $2, 31;
            shr.u32 moved, $1, by;
            and.b32 $0, moved, $3;
            }""",
            "=r,r,r,r",
            [value, tl.full(value.shape, SHIFT, tl.int16), tl.full(value.shape, MASK, tl.int16)],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def with_third_bits(code, top, t: tl.constexpr, EMULATE: tl.constexpr):
    """Codes of two bits with the third ones of field ``t``, of which ``top`` has 2t + 2 as the
    place, in int16, two at a time."""
    if EMULATE:
        return code | ((top >> (2 * t)) & 4)
    else:  # noqa: RET505
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 by, moved;
            and.b32 by, $3, 31;
            shr.u32 moved, $2, by;
            lop3.b32 $0, moved, $4, $1, 0xEA;
            }""",
            "=r,r,r,r,r",
            [code, top, tl.full(code.shape, 2 * t, tl.int16), tl.full(code.shape, 4, tl.int16)],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
