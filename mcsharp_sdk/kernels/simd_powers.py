"""Powers of errors, 32 rows at a time; see :mod:`mcsharp_sdk.kernels.simd`.

Imported only where numba is installed.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from mcsharp_sdk.kernels.simd import (
    FLOAT,
    I32,
    after,
    call,
    constant,
    load,
    operation,
    repeated,
    splat,
    store,
)

ROWS = 32

NUMBERS, PATTERNS = ir.VectorType(FLOAT, ROWS), ir.VectorType(I32, ROWS)

ROOT_OF_HALF = 0x3F3504F3
"""The pattern of the root of 1/2."""

LOGARITHM = (
    1.442696452140808,
    -0.7213640213012695,
    0.4806291460990906,
    -0.35935065150260925,
    0.29563361406326294,
    -0.2695062756538391,
    0.17212873697280884,
)
"""log2(1 + t) / t for 1 + t from the root of 1/2 to that of 2, within 6e-7 (Chebyshev's series)."""

EXPONENTIAL = (
    1.0000001192092896,
    0.6931471824645996,
    0.2402210682630539,
    0.05550327152013779,
    0.009676037356257439,
    0.0013400432653725147,
)
"""2^f for f from -1/2 to 1/2, within 3e-7 (the same)."""


@operation(
    types.void,
    types.int64,
    types.int64,
    types.int64,
    types.int64,
    types.float32,
    types.float32,
    types.float32,
    types.float32,
)
def half_quadratic_turn(
    builder: Any,
    tile: Any,
    columns: Any,
    grid: Any,
    found: Any,
    top: Any,
    norm: Any,
    least: Any,
    price: Any,
) -> None:
    """Sums over the columns: |errors|^norm, and what zero points move to, both of 32 rows.

    Parameters
    ----------
    tile : address of fp32 [columns, 32], in units of the scale.
    grid : address of fp32 [2, 32], scales and zero points.
    found : address of fp32 [2, 32], written.
    top, norm, least, price : as of ``half_quadratic.search_zero_points``.
    """
    line = 4 * ROWS
    scale, zero = load(builder, grid, NUMBERS), load(builder, after(builder, grid, line), NUMBERS)
    top, norm, least, price = (splat(builder, value, ROWS) for value in (top, norm, least, price))
    none, one = constant(FLOAT, [0.0] * ROWS), constant(FLOAT, [1.0] * ROWS)

    def add_column(number: Any, sums: list[Any]) -> list[Any]:
        size, move = sums
        address = builder.add(tile, builder.mul(number, ir.Constant(number.type, line)))
        exact = load(builder, address, NUMBERS)
        shifted = builder.fadd(exact, zero)
        code = call(builder, f"llvm.rint.v{ROWS}f32", NUMBERS, shifted)
        code = _smaller(builder, _larger(builder, code, none), top)
        change = builder.fsub(shifted, code)
        error = builder.fmul(call(builder, f"llvm.fabs.v{ROWS}f32", NUMBERS, change), scale)
        error = _larger(builder, error, least)
        powered = _power(builder, error, norm)
        share = builder.fdiv(powered, builder.fmul(builder.fmul(error, error), price))
        kept = _larger(builder, builder.fsub(one, share), none)
        moved = builder.fadd(builder.fsub(code, exact), builder.fmul(change, kept))
        return [builder.fadd(size, powered), builder.fadd(move, moved)]

    for place, total in enumerate(repeated(builder, columns, [none, none], add_column)):
        store(builder, after(builder, found, line * place), total)


def _power(builder: Any, base: Any, exponent: Any) -> Any:
    """``base ** exponent`` within 4e-6 of itself, where both are positive and normal."""
    pattern = builder.bitcast(base, PATTERNS)
    places = constant(I32, [23] * ROWS)
    above = builder.sub(pattern, constant(I32, [ROOT_OF_HALF] * ROWS))
    whole = builder.ashr(above, places)
    rest = builder.bitcast(builder.sub(pattern, builder.shl(whole, places)), NUMBERS)
    t = builder.fsub(rest, constant(FLOAT, [1.0] * ROWS))
    whole = builder.sitofp(whole, NUMBERS)
    logarithm = _multiply_add(builder, _polynomial(builder, LOGARITHM, t), t, whole)
    logarithm = builder.fmul(logarithm, exponent)
    nearest = call(builder, f"llvm.rint.v{ROWS}f32", NUMBERS, logarithm)
    fraction = _polynomial(builder, EXPONENTIAL, builder.fsub(logarithm, nearest))
    steps = builder.shl(builder.fptosi(nearest, PATTERNS), places)
    return builder.bitcast(builder.add(builder.bitcast(fraction, PATTERNS), steps), NUMBERS)


def _polynomial(builder: Any, coefficients: tuple[float, ...], x: Any) -> Any:
    """Coefficients are those of 1, x, x² and so on."""
    vectors = [constant(FLOAT, [value] * ROWS) for value in reversed(coefficients)]
    total = vectors[0]
    for vector in vectors[1:]:
        total = _multiply_add(builder, total, x, vector)
    return total


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return call(builder, f"llvm.fma.v{ROWS}f32", NUMBERS, x, y, z)


def _larger(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _smaller(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)
