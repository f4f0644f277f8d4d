"""Triton kernel that rounds activations to integers, whose products with codes are exact.

128 at a time, to 8 bits or to 15: these as two planes of 8, v = 256 · high + low, so that ``dp4a``
multiplies either. 15 bits are of the power of two above the largest of the 128, so bf16 numbers
down to 1/64 of it, and fp16 ones down to 1/8, stay as they are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.kernels.triton_codes import BLOCK
from mcsharp_sdk.kernels.triton_overlap import let_next_begin, wait_for_last
from mcsharp_sdk.kernels.triton_powers import exponent_of, power_of_two


@triton.jit
def place_in_plane(k, columns):
    """Where a plane has column ``k``: 16 columns of a block are a chunk, and the same chunk of all
    blocks lies side by side, as programs read it."""
    blocks = tl.cdiv(columns, BLOCK)
    return (k % BLOCK // 16 * blocks + k // BLOCK) * 16 + k % 16


@triton.jit
def round_activations(
    x, planes, scales, sums, columns,
    PLANES: tl.constexpr, OVERLAP: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """x [T, K] ≈ scale · v, v integers; grid (blocks, T).

    ``planes`` int8 [T, PLANES, 128 · blocks]: v, |v| ≤ 127, or with two PLANES first the high and
    then the low bytes of v, |v| ≤ 2^14, in the order of :func:`place_in_plane`, with zeros for the
    columns behind K. ``scales`` fp32 [T, blocks], and ``sums`` fp32 [T, blocks] those of scale · v.
    A block with a number that is not finite gives NaN.

    With OVERLAP it may be launched before ``x`` is there. The product behind it reads the chosen
    experts and their first weights before it waits. So it may not begin before whatever wrote these
    has ended: this kernel waits first, unless it is CHAINED to an earlier product of the same
    experts, before which these weights were there, too.
    """
    if OVERLAP and CHAINED:
        let_next_begin()
        wait_for_last()
    elif OVERLAP:
        wait_for_last()
        let_next_begin()
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    value = tl.load(x + row * columns + k, mask=k < columns, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 0)
    if PLANES == 1:
        scale = largest / 127.0
        v = tl.floor(value / tl.where(scale > 0, scale, 1.0) + 0.5).to(tl.int32)
    else:
        exponent = exponent_of(largest, -112, 128)
        scale = power_of_two(exponent - 14)
        v = tl.floor(value * power_of_two(14 - exponent) + 0.5).to(tl.int32)
    to = row * PLANES * tl.num_programs(0) * BLOCK + place_in_plane(k, columns)
    if PLANES == 2:
        high = (v + 128) >> 8
        tl.store(planes + to, high.to(tl.int8))
        to += tl.num_programs(0) * BLOCK
        tl.store(planes + to, (v - 256 * high).to(tl.int8))
    else:
        tl.store(planes + to, v.to(tl.int8))
    scale += tl.sum(value * 0.0, 0)
    block = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(scales + block, scale)
    tl.store(sums + block, tl.sum(v.to(tl.float32), 0) * scale)
