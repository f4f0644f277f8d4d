"""Codes to weights of any dtype, in vectors; see :mod:`mcsharp_sdk.kernels.simd`.

Imported only where numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from mcsharp_sdk.kernels.simd import (
    BYTES_PER_VECTOR,
    FEATURES,
    FLOAT,
    HALF,
    I8,
    I16,
    I32,
    Bytes,
    Vector,
    call,
    constant,
    operation,
    pick,
    splat,
    store,
)

_HAS_BFLOAT16 = {"avx512bf16", "avx512vl"} <= FEATURES

Levels = Vector("Levels", I16, 16)


class _BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _to_bfloat16(builder: Any, values: Any, lanes: int) -> Any:
    """fp32 to bf16, to nearest even; infinities and NaN do not occur in weights."""
    if _HAS_BFLOAT16:
        return builder.fptrunc(values, ir.VectorType(_BFloat(), lanes))
    words = ir.VectorType(I32, lanes)
    bits = builder.bitcast(values, words)
    sixteen = constant(I32, [16] * lanes)
    odd = builder.and_(builder.lshr(bits, sixteen), constant(I32, [1] * lanes))
    rounded = builder.add(builder.add(bits, odd), constant(I32, [0x7FFF] * lanes))
    return builder.trunc(builder.lshr(rounded, sixteen), ir.VectorType(I16, lanes))


def _to_float16(builder: Any, values: Any, lanes: int) -> Any:
    return builder.fptrunc(values, ir.VectorType(HALF, lanes))


@operation(types.void, types.int64, Bytes, types.float32, types.float32)
def store_float32(builder: Any, address: Any, codes: Any, scale: Any, zero: Any) -> None:
    """Write 32 weights ``scale * (code - zero)``."""
    levels = builder.uitofp(codes, ir.VectorType(FLOAT, BYTES_PER_VECTOR))
    store(builder, address, _weights(builder, levels, scale, zero, BYTES_PER_VECTOR))


def _weights(builder: Any, levels: Any, scale: Any, zero: Any, lanes: int) -> Any:
    """``scale * (level - zero)`` in fp32, like the torch code that defines the grid."""
    shifted = builder.fsub(levels, splat(builder, zero, lanes))
    return builder.fmul(shifted, splat(builder, scale, lanes))


def _level_table(convert: Callable[[Any, Any, int], Any]) -> Any:
    """The operation that makes a table of all weights of a group in some 16-bit dtype."""

    def emit(builder: Any, scale: Any, zero: Any) -> Any:
        levels = constant(FLOAT, [float(level) for level in range(16)])
        values = convert(builder, _weights(builder, levels, scale, zero, 16), 16)
        return builder.bitcast(values, Levels.llvm)

    emit.__doc__ = "Weights of the codes 0 to 15, computed in fp32 and rounded once."
    return operation(Levels, types.float32, types.float32)(emit)


bfloat16_levels = _level_table(_to_bfloat16)
float16_levels = _level_table(_to_float16)


@operation(types.void, types.int64, Bytes, Levels)
def store_levels(builder: Any, address: Any, codes: Any, levels: Any) -> None:
    """Write what a table has for 32 codes, each below 16."""
    halves = []
    for part in (levels, builder.lshr(levels, constant(I16, [8] * 16))):
        table = pick(builder, builder.trunc(part, ir.VectorType(I8, 16)), list(range(16)) * 2)
        halves.append(call(builder, "llvm.x86.avx2.pshuf.b", Bytes.llvm, table, codes))
    order = [lane + half for lane in range(BYTES_PER_VECTOR) for half in (0, BYTES_PER_VECTOR)]
    store(builder, address, builder.shuffle_vector(*halves, constant(I32, order)))


def _store_rounded(convert: Callable[[Any, Any, int], Any]) -> Any:
    """The operation that writes 32 weights of any code in some 16-bit dtype."""

    def emit(builder: Any, address: Any, codes: Any, scale: Any, zero: Any) -> None:
        levels = builder.uitofp(codes, ir.VectorType(FLOAT, BYTES_PER_VECTOR))
        weights = _weights(builder, levels, scale, zero, BYTES_PER_VECTOR)
        store(builder, address, convert(builder, weights, BYTES_PER_VECTOR))

    emit.__doc__ = "Write 32 weights ``scale * (code - zero)``, rounded once."
    return operation(types.void, types.int64, Bytes, types.float32, types.float32)(emit)


store_bfloat16 = _store_rounded(_to_bfloat16)
store_float16 = _store_rounded(_to_float16)
