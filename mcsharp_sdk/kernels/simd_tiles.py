"""Four rows of a packed matrix times one token; see :mod:`mcsharp_sdk.kernels.simd`.

Widths and sizes of units are constants of code that is made for each: so much less is compiled than
where a compiler finds the constants.

Imported only where numba is installed.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types

from mcsharp_sdk.kernels.simd import (
    FLOAT,
    I32,
    I64,
    Bytes,
    Floats,
    after,
    ask_for_line,
    call,
    choice_of,
    constant,
    load,
    operation,
    repeated,
    splat,
    sum_products,
)
from mcsharp_sdk.kernels.simd_codes import codes_of
from mcsharp_sdk.kernels.simd_quads import QUAD, Quad, sum_each
from mcsharp_sdk.kernels.support import VECTOR
from mcsharp_sdk.quantization.packing import BLOCK, PARTS

_VECTORS = (1, 2, 4)
"""Vectors of 32 columns in a unit."""


@operation(Quad, *[types.int64] * 10)
def tile_sums(
    builder: Any,
    bits: Any,
    vectors: Any,
    r0: Any,
    r1: Any,
    r2: Any,
    r3: Any,
    blocks: Any,
    x: Any,
    factors: Any,
    ahead: Any,
) -> Any:
    """Four rows times one token, without zero points.

    Parameters
    ----------
    bits : of the codes.
    vectors : of 32 columns, per unit: 1, 2 or 4.
    r0, r1, r2, r3 : addresses of the codes of the rows.
    blocks : full ones, one at least.
    x : address of the token's quantised activations.
    factors : address of fp32 [units, 4], scales of weights times scales of activations.
    ahead : bytes from a code to one whose memory is asked for.
    """
    number = builder.add(builder.mul(bits, ir.Constant(I64, 8)), vectors)
    behind, choice = choice_of(builder, number)
    found = []
    for width, count in product(PARTS, _VECTORS):
        block = builder.append_basic_block(f"{width}_bits_{count}_vectors")
        choice.add_case(ir.Constant(I64, 8 * width + count), block)
        builder.position_at_end(block)
        sums = _block_sums(builder, width, count, [r0, r1, r2, r3], blocks, x, factors, ahead)
        found.append((sum_each(builder, *sums), builder.block))
        builder.branch(behind)
    builder.position_at_end(behind)
    result = builder.phi(Quad.llvm)
    for value, block in found:
        result.add_incoming(value, block)
    return result


def _block_sums(
    builder: Any,
    bits: int,
    vectors: int,
    rows: list[Any],
    blocks: Any,
    x: Any,
    factors: Any,
    ahead: Any,
) -> list[Any]:
    """Scaled sums of each row over all blocks, in eight lanes."""

    def add_block(number: Any, totals: list[Any]) -> list[Any]:
        def of_block(address: Any, size: int) -> Any:
            return builder.add(address, builder.mul(number, ir.Constant(I64, size)))

        here = [of_block(row, 16 * bits) for row in rows]
        for row in here:  # spread like this, it comes sooner than asked for at once
            ask_for_line(builder, builder.add(row, ahead))
        parts = BLOCK // VECTOR // vectors
        scales, values = of_block(factors, QUAD * parts), of_block(x, 2 * BLOCK)
        for part in range(parts):
            unit = range(vectors * part, vectors * (part + 1))
            sums = _unit_sums(builder, bits, unit, here, values)
            own = after(builder, scales, QUAD * part)
            totals = [
                _add_scaled(builder, total, *sums[row], after(builder, own, 4 * row))
                for row, total in enumerate(totals)
            ]
        return totals

    nothing = constant(FLOAT, [0.0] * 8)
    return repeated(builder, blocks, [nothing] * len(rows), add_block)


def _add_scaled(builder: Any, total: Any, high: Any, low: Any, factor: Any) -> Any:
    """``total + (256 · high + low) · factor``, of the factor at an address."""
    whole = builder.add(builder.shl(high, constant(I32, [8] * 8)), low)
    factors = splat(builder, load(builder, factor, FLOAT), 8)
    whole = builder.sitofp(whole, Floats.llvm)
    return call(builder, "llvm.fma.v8f32", Floats.llvm, whole, factors, total)


def _unit_sums(
    builder: Any, bits: int, vectors: range, rows: list[Any], values: Any
) -> list[tuple[Any, Any]]:
    """Sums of high and of low bytes times codes, of each row, over some vectors of a block."""
    sums = [(constant(I32, [0] * 8), constant(I32, [0] * 8)) for _ in rows]
    for vector in vectors:
        high = load(builder, after(builder, values, VECTOR * vector), Bytes.llvm)
        low = load(builder, after(builder, values, VECTOR * vector + BLOCK), Bytes.llvm)
        for place, row in enumerate(rows):
            codes = codes_of(builder, bits, BLOCK, row, vector)
            sums[place] = (
                sum_products(builder, sums[place][0], codes, high),
                sum_products(builder, sums[place][1], codes, low),
            )
    return sums
