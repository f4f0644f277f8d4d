"""Activations to integers, 32 at a time; see :mod:`mcsharp_sdk.kernels.simd`.

Imported only where numba is installed.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from mcsharp_sdk.kernels.simd import (
    BYTES_PER_VECTOR,
    FLOAT,
    I8,
    I16,
    I32,
    Bytes,
    Ints,
    call,
    constant,
    load,
    operation,
    splat,
    store,
)

_LANES = 8
_WITHOUT_SIGN = 0x7FFFFFFF


@operation(Bytes)
def one_bytes(builder: Any) -> Any:
    """Ones."""
    return constant(I8, [1] * BYTES_PER_VECTOR)


@operation(Ints, Ints, types.int64)
def larger_magnitudes(builder: Any, tops: Any, address: Any) -> Any:
    """The larger of each lane and of four in 32 fp32 numbers, without signs, as bit patterns.

    NaN is larger than infinity, and that than all numbers.
    """
    words = load(builder, address, ir.VectorType(I32, BYTES_PER_VECTOR))
    words = builder.and_(words, constant(I32, [_WITHOUT_SIGN] * BYTES_PER_VECTOR))
    for first in range(0, BYTES_PER_VECTOR, _LANES):
        part = builder.shuffle_vector(words, words, constant(I32, [*range(first, first + _LANES)]))
        tops = builder.select(builder.icmp_signed(">", part, tops), part, tops)
    return tops


@operation(types.float32, Ints)
def largest(builder: Any, tops: Any) -> Any:
    """The largest of what ``larger_magnitudes`` found."""
    return builder.bitcast(call(builder, "llvm.vector.reduce.smax.v8i32", I32, tops), FLOAT)


@operation(types.int32, Ints)
def sum_of_ints(builder: Any, values: Any) -> Any:
    """The sum of all lanes."""
    return call(builder, "llvm.vector.reduce.add.v8i32", I32, values)


@operation(types.void, types.int64, types.float32, types.int64, types.int64)
def store_quantised(builder: Any, address: Any, inverse: Any, highs: Any, lows: Any) -> None:
    """High and low bytes of 32 fp32 numbers times ``inverse``, at most 2¹⁵ - 256, rounded."""
    numbers = load(builder, address, ir.VectorType(FLOAT, BYTES_PER_VECTOR))
    scaled = builder.fmul(numbers, splat(builder, inverse, BYTES_PER_VECTOR))
    nearest = call(builder, "llvm.rint.v32f32", scaled.type, scaled)
    values = builder.fptosi(nearest, ir.VectorType(I16, BYTES_PER_VECTOR))
    raised = builder.add(values, constant(I16, [128] * BYTES_PER_VECTOR))
    high = builder.ashr(raised, constant(I16, [8] * BYTES_PER_VECTOR))
    # Both are signed: the low byte is what is left when the nearest multiple of 256 is taken off.
    store(builder, highs, builder.trunc(high, Bytes.llvm))
    store(builder, lows, builder.trunc(values, Bytes.llvm))
