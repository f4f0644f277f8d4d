"""Vectors of a CPU inside functions that numba compiles.

numba knows no vector types, and its compiler does not find the instruction that multiplies bytes
four at a time (VNNI) by itself. Here are the few operations that the kernels need, each written in
the compiler's intermediate language: it brings them to the processor at hand. Addresses are int64
and need no alignment.

Imported only where numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()

BYTES_PER_VECTOR = 32
"""Codes, or quantised activations, in one vector of bytes."""


def cpu_features() -> frozenset[str]:
    """What the processor that numba compiles for can do, in LLVM's names, such as ``avx2``."""
    found = cpu_target.target_context.codegen()._tm_features
    return frozenset(name[1:] for name in found.split(",") if name.startswith("+"))


_FEATURES = cpu_features()

_HAS_VNNI = {"avx512vnni", "avx512vl"} <= _FEATURES or "avxvnni" in _FEATURES
_HAS_BFLOAT16 = {"avx512bf16", "avx512vl"} <= _FEATURES


class _BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


class Vector(types.Type):
    """A vector as numba's type system sees it."""

    def __init__(self, name: str, element: ir.Type, lanes: int) -> None:
        self.llvm = ir.VectorType(element, lanes)
        super().__init__(name=name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


Bytes = Vector("Bytes", _I8, BYTES_PER_VECTOR)
Ints = Vector("Ints", _I32, 8)
Floats = Vector("Floats", _FLOAT, 8)
Quad = Vector("Quad", _FLOAT, 4)
Levels = Vector("Levels", _I16, 16)


def _operation(result: Any, *arguments: Any) -> Callable[[Any], Any]:
    """Make an operation of ``emit(builder, *operands) -> value`` with these types."""

    def decorate(emit: Any) -> Any:
        def generate(context: Any, builder: Any, types_in: Any, operands: Any) -> Any:
            value = emit(builder, *operands)
            return context.get_dummy_value() if result is types.void else value

        def define(context: Any, *given: Any) -> Any:
            return result(*arguments), generate

        # numba passes arguments by the names that it finds here.
        names = ["context", *list(signature(emit).parameters)[1:]]
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        define.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        define.__name__, define.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(define)

    return decorate


def _pointer(builder: Any, address: Any, target: ir.Type) -> Any:
    return builder.inttoptr(address, target.as_pointer())


def _load(builder: Any, address: Any, target: ir.Type) -> Any:
    return builder.load(_pointer(builder, address, target), align=1)


def _store(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, _pointer(builder, address, value.type), align=1)


def _constant(element: ir.Type, values: list[Any]) -> Any:
    return ir.Constant(ir.VectorType(element, len(values)), values)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, first, _constant(_I32, [0] * lanes))


def _pick(builder: Any, vector: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(vector, vector, _constant(_I32, lanes))


def _call(builder: Any, name: str, result: ir.Type, *operands: Any) -> Any:
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


@_operation(Bytes, types.int64)
def load_bytes(builder: Any, address: Any) -> Any:
    """32 bytes."""
    return _load(builder, address, Bytes.llvm)


@_operation(types.void, types.int64)
def prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line of an address that will be read soon; it need not exist."""
    pointer = _pointer(builder, address, _I8)
    # To read, to be kept in every cache, as data.
    hints = [ir.Constant(_I32, value) for value in (0, 3, 1)]
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *hints)


@_operation(types.void, types.int64, Bytes)
def store_bytes(builder: Any, address: Any, value: Any) -> None:
    """Write 32 bytes."""
    _store(builder, address, value)


@_operation(Bytes, Bytes, types.int64, types.int64)
def field(builder: Any, value: Any, shift: Any, mask: Any) -> Any:
    """``(byte >> shift) & mask`` of each byte; ``mask`` has at most ``8 - shift`` bits."""
    words = builder.bitcast(value, Ints.llvm)
    words = builder.lshr(words, _splat(builder, builder.trunc(shift, _I32), 8))
    masks = _splat(builder, builder.trunc(mask, _I8), BYTES_PER_VECTOR)
    return builder.and_(builder.bitcast(words, Bytes.llvm), masks)


@_operation(Bytes, types.int64, types.int64)
def two_bits(builder: Any, address: Any, shift: Any) -> Any:
    """Bit ``shift`` of 16 bytes, and behind them bit ``shift + 1`` of the same 16 bytes."""
    words = _load(builder, address, ir.VectorType(_I32, 4))
    words = _pick(builder, words, [0, 1, 2, 3] * 2)
    shifts = _splat(builder, builder.trunc(shift, _I32), 8)
    shifts = builder.add(shifts, _constant(_I32, [0] * 4 + [1] * 4))
    bits = builder.bitcast(builder.lshr(words, shifts), Bytes.llvm)
    return builder.and_(bits, _constant(_I8, [1] * BYTES_PER_VECTOR))


@_operation(Bytes, Bytes, Bytes)
def with_third_bit(builder: Any, low: Any, bit: Any) -> Any:
    """``low + 4 * bit`` of each byte; ``low`` is below 4 and ``bit`` below 2."""
    words = builder.shl(builder.bitcast(bit, Ints.llvm), _constant(_I32, [2] * 8))
    return builder.or_(low, builder.bitcast(words, Bytes.llvm))


@_operation(Ints)
def no_ints(builder: Any) -> Any:
    """Zeros."""
    return _constant(_I32, [0] * 8)


@_operation(Floats)
def no_floats(builder: Any) -> Any:
    """Zeros."""
    return _constant(_FLOAT, [0.0] * 8)


@_operation(Ints, Ints, Bytes, Bytes)
def dot(builder: Any, total: Any, codes: Any, x: Any) -> Any:
    """``total`` plus the products of unsigned ``codes`` and signed ``x``, summed four by four.

    Without VNNI pairs of products are summed in 16 bits: codes have to stay below 128 then.
    """
    if _HAS_VNNI:
        words = (builder.bitcast(codes, Ints.llvm), builder.bitcast(x, Ints.llvm))
        return _call(builder, "llvm.x86.avx512.vpdpbusd.256", Ints.llvm, total, *words)
    pairs = ir.VectorType(_I16, 16)
    products = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs, codes, x)
    ones = _constant(_I16, [1] * 16)
    fours = _call(builder, "llvm.x86.avx2.pmadd.wd", Ints.llvm, products, ones)
    return builder.add(total, fours)


@_operation(Floats, Ints, Ints)
def joined(builder: Any, high: Any, low: Any) -> Any:
    """``256 * high + low`` in floating point."""
    shifted = builder.shl(high, _constant(_I32, [8] * 8))
    return builder.sitofp(builder.add(shifted, low), Floats.llvm)


@_operation(Floats, Floats, Floats, types.float32)
def add_scaled(builder: Any, total: Any, x: Any, factor: Any) -> Any:
    """``total + x * factor``."""
    factors = _splat(builder, factor, 8)
    return _call(builder, "llvm.fma.v8f32", Floats.llvm, x, factors, total)


@_operation(types.float32, Floats)
def sum_lanes(builder: Any, x: Any) -> Any:
    """The sum of a vector."""
    lanes = 8
    while lanes > 1:
        lanes //= 2
        upper = _pick(builder, x, list(range(lanes, 2 * lanes)))
        x = builder.fadd(_pick(builder, x, list(range(lanes))), upper)
    return builder.extract_element(x, ir.Constant(_I32, 0))


@_operation(types.float32, types.int64)
def load_half(builder: Any, address: Any) -> Any:
    """One fp16 number."""
    return builder.fpext(_load(builder, address, _HALF), _FLOAT)


@_operation(types.void, *[types.int64] * 5)
def transpose_halves(builder: Any, r0: Any, r1: Any, r2: Any, r3: Any, target: Any) -> None:
    """Eight fp16 numbers at each of four addresses, to fp32 [8, 4]."""
    halves = [_load(builder, row, ir.VectorType(_HALF, 8)) for row in (r0, r1, r2, r3)]
    rows = [builder.fpext(row, Floats.llvm) for row in halves]
    lanes = _constant(_I32, list(range(16)))
    first = builder.shuffle_vector(rows[0], rows[1], lanes)
    second = builder.shuffle_vector(rows[2], rows[3], lanes)
    order = [8 * row + column for column in range(8) for row in range(4)]
    _store(builder, target, builder.shuffle_vector(first, second, _constant(_I32, order)))


@_operation(types.int64, types.int64)
def load_byte(builder: Any, address: Any) -> Any:
    """One byte."""
    return builder.zext(_load(builder, address, _I8), ir.IntType(64))


@_operation(types.void, types.int64, types.int64)
def store_byte(builder: Any, address: Any, value: Any) -> None:
    """Write one byte."""
    _store(builder, address, builder.trunc(value, _I8))


@_operation(Bytes)
def no_bytes(builder: Any) -> Any:
    """Zeros."""
    return _constant(_I8, [0] * BYTES_PER_VECTOR)


@_operation(Quad, types.float32)
def quad(builder: Any, value: Any) -> Any:
    """The same number four times."""
    return _splat(builder, value, 4)


@_operation(Quad, types.int64)
def load_quad(builder: Any, address: Any) -> Any:
    """Four fp32 numbers."""
    return _load(builder, address, Quad.llvm)


@_operation(types.void, types.int64, Quad)
def store_quad(builder: Any, address: Any, value: Any) -> None:
    """Write four fp32 numbers."""
    _store(builder, address, value)


@_operation(Quad, types.int64)
def load_byte_quad(builder: Any, address: Any) -> Any:
    """Four bytes, as fp32."""
    return builder.uitofp(_load(builder, address, ir.VectorType(_I8, 4)), Quad.llvm)


@_operation(Quad, Quad, types.float32)
def scaled(builder: Any, x: Any, factor: Any) -> Any:
    """``x * factor``."""
    return builder.fmul(x, _splat(builder, factor, 4))


@_operation(Quad, Quad, Quad, Quad)
def add_product(builder: Any, total: Any, x: Any, y: Any) -> Any:
    """``total + x * y``."""
    return builder.fadd(total, builder.fmul(x, y))


def _to_bfloat16(builder: Any, values: Any, lanes: int) -> Any:
    """fp32 to bf16, to nearest even; infinities and NaN do not occur in weights."""
    if _HAS_BFLOAT16:
        return builder.fptrunc(values, ir.VectorType(_BFloat(), lanes))
    words = ir.VectorType(_I32, lanes)
    bits = builder.bitcast(values, words)
    sixteen = _constant(_I32, [16] * lanes)
    odd = builder.and_(builder.lshr(bits, sixteen), _constant(_I32, [1] * lanes))
    rounded = builder.add(builder.add(bits, odd), _constant(_I32, [0x7FFF] * lanes))
    return builder.trunc(builder.lshr(rounded, sixteen), ir.VectorType(_I16, lanes))


def _to_float16(builder: Any, values: Any, lanes: int) -> Any:
    return builder.fptrunc(values, ir.VectorType(_HALF, lanes))


@_operation(types.void, types.int64, Bytes, types.float32, types.float32)
def store_float32(builder: Any, address: Any, codes: Any, scale: Any, zero: Any) -> None:
    """Write 32 weights ``scale * (code - zero)``."""
    levels = builder.uitofp(codes, ir.VectorType(_FLOAT, BYTES_PER_VECTOR))
    _store(builder, address, _weights(builder, levels, scale, zero, BYTES_PER_VECTOR))


def _weights(builder: Any, levels: Any, scale: Any, zero: Any, lanes: int) -> Any:
    """``scale * (level - zero)`` in fp32, like the torch code that defines the grid."""
    shifted = builder.fsub(levels, _splat(builder, zero, lanes))
    return builder.fmul(shifted, _splat(builder, scale, lanes))


def _level_table(convert: Callable[[Any, Any, int], Any]) -> Any:
    """The operation that makes a table of all weights of a group in some 16-bit dtype."""

    def emit(builder: Any, scale: Any, zero: Any) -> Any:
        levels = _constant(_FLOAT, [float(level) for level in range(16)])
        values = convert(builder, _weights(builder, levels, scale, zero, 16), 16)
        return builder.bitcast(values, Levels.llvm)

    emit.__doc__ = "Weights of the codes 0 to 15, computed in fp32 and rounded once."
    return _operation(Levels, types.float32, types.float32)(emit)


bfloat16_levels = _level_table(_to_bfloat16)
float16_levels = _level_table(_to_float16)


@_operation(types.void, types.int64, Bytes, Levels)
def store_levels(builder: Any, address: Any, codes: Any, levels: Any) -> None:
    """Write what a table has for 32 codes, each below 16."""
    halves = []
    for part in (levels, builder.lshr(levels, _constant(_I16, [8] * 16))):
        table = _pick(builder, builder.trunc(part, ir.VectorType(_I8, 16)), list(range(16)) * 2)
        halves.append(_call(builder, "llvm.x86.avx2.pshuf.b", Bytes.llvm, table, codes))
    order = [lane + half for lane in range(BYTES_PER_VECTOR) for half in (0, BYTES_PER_VECTOR)]
    _store(builder, address, builder.shuffle_vector(*halves, _constant(_I32, order)))


def _store_rounded(convert: Callable[[Any, Any, int], Any]) -> Any:
    """The operation that writes 32 weights of any code in some 16-bit dtype."""

    def emit(builder: Any, address: Any, codes: Any, scale: Any, zero: Any) -> None:
        levels = builder.uitofp(codes, ir.VectorType(_FLOAT, BYTES_PER_VECTOR))
        weights = _weights(builder, levels, scale, zero, BYTES_PER_VECTOR)
        _store(builder, address, convert(builder, weights, BYTES_PER_VECTOR))

    emit.__doc__ = "Write 32 weights ``scale * (code - zero)``, rounded once."
    return _operation(types.void, types.int64, Bytes, types.float32, types.float32)(emit)


store_bfloat16 = _store_rounded(_to_bfloat16)
store_float16 = _store_rounded(_to_float16)
