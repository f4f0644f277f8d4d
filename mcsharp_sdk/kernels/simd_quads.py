"""Four fp32 numbers at a time, one for each row of a tile; see :mod:`mcsharp_sdk.kernels.simd`.

Imported only where numba is installed.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from mcsharp_sdk.kernels.simd import (
    FLOAT,
    HALF,
    I32,
    Vector,
    constant,
    load,
    operation,
    pick,
    splat,
    store,
)

Quad = Vector("Quad", FLOAT, 4)

QUAD = 16
"""Bytes of four fp32 numbers, one for each row of a tile."""


@operation(Quad, types.float32)
def quad(builder: Any, value: Any) -> Any:
    """The same number four times."""
    return splat(builder, value, 4)


@operation(Quad, types.int64)
def load_quad(builder: Any, address: Any) -> Any:
    """Four fp32 numbers."""
    return load(builder, address, Quad.llvm)


@operation(types.void, types.int64, Quad)
def store_quad(builder: Any, address: Any, value: Any) -> None:
    """Write four fp32 numbers."""
    store(builder, address, value)


@operation(Quad, Quad, types.float32)
def scaled(builder: Any, x: Any, factor: Any) -> Any:
    """``x * factor``."""
    return builder.fmul(x, splat(builder, factor, 4))


@operation(Quad, Quad, Quad, Quad)
def add_product(builder: Any, total: Any, x: Any, y: Any) -> Any:
    """``total + x * y``."""
    return builder.fadd(total, builder.fmul(x, y))


@operation(Quad, Quad, Quad)
def less(builder: Any, x: Any, y: Any) -> Any:
    """``x - y``."""
    return builder.fsub(x, y)


@operation(Quad, Quad)
def negative(builder: Any, x: Any) -> Any:
    """``-x``."""
    return builder.fneg(x)


def sum_each(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The sum of the eight lanes of each of four vectors."""
    upper, lower = [0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]

    def pairs(x: Any, y: Any) -> Any:
        lanes = [builder.shuffle_vector(x, y, constant(I32, order)) for order in (upper, lower)]
        return builder.fadd(*lanes)

    fours = pairs(pairs(a, b), pairs(c, d))
    return builder.fadd(pick(builder, fours, [0, 2, 4, 6]), pick(builder, fours, [1, 3, 5, 7]))


def _transposition(count: int) -> Any:
    """The operation that turns a few fp16 numbers of four rows into columns."""

    def emit(builder: Any, r0: Any, r1: Any, r2: Any, r3: Any, target: Any) -> None:
        halves = [load(builder, row, ir.VectorType(HALF, count)) for row in (r0, r1, r2, r3)]
        rows = [builder.fpext(row, ir.VectorType(FLOAT, count)) for row in halves]
        joining = constant(I32, list(range(2 * count)))
        first = builder.shuffle_vector(rows[0], rows[1], joining)
        second = builder.shuffle_vector(rows[2], rows[3], joining)
        order = [count * row + column for column in range(count) for row in range(4)]
        store(builder, target, builder.shuffle_vector(first, second, constant(I32, order)))

    emit.__name__ = f"transpose_{count}_halves"
    emit.__doc__ = f"{count} fp16 numbers at each of four addresses, to fp32 [{count}, 4]."
    return operation(types.void, *[types.int64] * 5)(emit)


transpose_four_halves = _transposition(4)
transpose_eight_halves = _transposition(8)
