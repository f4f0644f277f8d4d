"""Vectors of a CPU inside functions that numba compiles.

numba knows no vector types, and its compiler does not find the instruction that multiplies bytes
four at a time (VNNI) by itself. Here are the few operations that the kernels need, each written in
the compiler's intermediate language: it brings them to the processor at hand. Addresses are int64
and need no alignment.

Imported only where numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import Parameter, Signature, signature
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from mcsharp_sdk.kernels.support import cpu_features, has_vnni
from mcsharp_sdk.quantization.grid import ZERO_STEP
from mcsharp_sdk.quantization.packing import PARTS

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()

BYTES_PER_VECTOR = 32
"""Codes, or quantised activations, in one vector of bytes."""


FEATURES = cpu_features()

HAS_VNNI = has_vnni()


class Vector(types.Type):
    """A vector as numba's type system sees it."""

    def __init__(self, name: str, element: ir.Type, lanes: int) -> None:
        self.llvm = ir.VectorType(element, lanes)
        super().__init__(name=name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


Bytes = Vector("Bytes", I8, BYTES_PER_VECTOR)
Ints = Vector("Ints", I32, 8)
Floats = Vector("Floats", FLOAT, 8)
Lanes = Vector("Lanes", FLOAT, 16)


def operation(result: Any, *arguments: Any) -> Callable[[Any], Any]:
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


def pointer_to(builder: Any, address: Any, target: ir.Type) -> Any:
    """An address as a pointer to a type."""
    return builder.inttoptr(address, target.as_pointer())


def load(builder: Any, address: Any, target: ir.Type) -> Any:
    """What is at an address."""
    return builder.load(pointer_to(builder, address, target), align=1)


def store(builder: Any, address: Any, value: Any) -> None:
    """Write to an address."""
    builder.store(value, pointer_to(builder, address, value.type), align=1)


def constant(element: ir.Type, values: list[Any]) -> Any:
    """A vector of these values."""
    return ir.Constant(ir.VectorType(element, len(values)), values)


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """The same value in all lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, first, constant(I32, [0] * lanes))


def pick(builder: Any, vector: Any, lanes: list[int]) -> Any:
    """Some lanes of a vector, in this order."""
    return builder.shuffle_vector(vector, vector, constant(I32, lanes))


def call(builder: Any, name: str, result: ir.Type, *operands: Any) -> Any:
    """What one of the compiler's intrinsic functions makes of the operands."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def choice_of(builder: Any, number: Any) -> tuple[Any, Any]:
    """What comes behind a choice by a number, and the choice; other numbers do not occur."""
    behind, other = (builder.append_basic_block(name) for name in ("behind", "does_not_occur"))
    choice = builder.switch(number, other)
    builder.position_at_end(other)
    builder.unreachable()
    return behind, choice


def repeated(builder: Any, count: Any, starts: list[Any], step: Any) -> list[Any]:
    """What ``step(number, values)`` makes of some values, for each number below ``count`` > 0."""
    before = builder.block
    loop, behind = (builder.append_basic_block(name) for name in ("loop", "behind_loop"))
    builder.branch(loop)
    builder.position_at_end(loop)
    number, *values = (builder.phi(start.type) for start in (ir.Constant(I64, 0), *starts))
    made = step(number, values)
    following = builder.add(number, ir.Constant(I64, 1))
    for phi, first, next_one in zip(
        (number, *values), (ir.Constant(I64, 0), *starts), (following, *made), strict=True
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(next_one, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, behind)
    builder.position_at_end(behind)
    return list(made)


@operation(Bytes, types.int64)
def load_bytes(builder: Any, address: Any) -> Any:
    """32 bytes."""
    return load(builder, address, Bytes.llvm)


def after(builder: Any, address: Any, skip: int) -> Any:
    """The address so many bytes further."""
    return builder.add(address, ir.Constant(I64, skip))


def planes(bits: int) -> Iterator[tuple[int, int]]:
    """The parts that codes are stored in: width, and place of its bits in the code."""
    place = 0
    for width in PARTS[bits]:
        yield width, place
        place += width


def ask_for_line(builder: Any, address: Any) -> None:
    """Ask for the cache line of an address that will be read soon; it need not exist."""
    pointer = pointer_to(builder, address, I8)
    # To read, into the second-level cache: the first holds what is at work. As data.
    hints = [ir.Constant(I32, value) for value in (0, 2, 1)]
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *hints)


prefetch = operation(types.void, types.int64)(ask_for_line)


def sum_products(builder: Any, total: Any, codes: Any, x: Any) -> Any:
    """``total`` plus the products of unsigned ``codes`` and signed ``x``, summed four by four.

    Without VNNI pairs of products are summed in 16 bits: codes have to stay below 128 then.
    """
    if HAS_VNNI:
        words = (builder.bitcast(codes, Ints.llvm), builder.bitcast(x, Ints.llvm))
        return call(builder, "llvm.x86.avx512.vpdpbusd.256", Ints.llvm, total, *words)
    pairs = ir.VectorType(I16, 16)
    products = call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs, codes, x)
    ones = constant(I16, [1] * 16)
    fours = call(builder, "llvm.x86.avx2.pmadd.wd", Ints.llvm, products, ones)
    return builder.add(total, fours)


dot = operation(Ints, Ints, Bytes, Bytes)(sum_products)


@operation(types.void, types.int64, Bytes)
def store_bytes(builder: Any, address: Any, value: Any) -> None:
    """Write 32 bytes."""
    store(builder, address, value)


@operation(Ints)
def no_ints(builder: Any) -> Any:
    """Zeros."""
    return constant(I32, [0] * 8)


@operation(types.float32, types.int64)
def load_float(builder: Any, address: Any) -> Any:
    """One fp32 number."""
    return load(builder, address, FLOAT)


@operation(types.void, types.int64, types.float32)
def store_float(builder: Any, address: Any, value: Any) -> None:
    """Write one fp32 number."""
    store(builder, address, value)


@operation(types.float32, types.int64)
def load_half(builder: Any, address: Any) -> Any:
    """One fp16 number."""
    return builder.fpext(load(builder, address, HALF), FLOAT)


@operation(types.int64, types.int64)
def load_byte(builder: Any, address: Any) -> Any:
    """One byte."""
    return builder.zext(load(builder, address, I8), I64)


@operation(types.void, types.int64, types.int64)
def store_byte(builder: Any, address: Any, value: Any) -> None:
    """Write one byte."""
    store(builder, address, builder.trunc(value, I8))


@operation(types.int64, types.int64)
def load_word(builder: Any, address: Any) -> Any:
    """Eight bytes as one number."""
    return load(builder, address, I64)


@operation(types.void, types.int64, types.int64)
def store_word(builder: Any, address: Any, value: Any) -> None:
    """Write one number as eight bytes."""
    store(builder, address, value)


@operation(Bytes)
def no_bytes(builder: Any) -> Any:
    """Zeros."""
    return constant(I8, [0] * BYTES_PER_VECTOR)


@operation(Lanes, types.int64)
def load_lanes(builder: Any, address: Any) -> Any:
    """16 fp32 numbers."""
    return load(builder, address, Lanes.llvm)


@operation(types.void, types.int64, Lanes)
def store_lanes(builder: Any, address: Any, value: Any) -> None:
    """Write 16 fp32 numbers."""
    store(builder, address, value)


@operation(types.void, types.int64, Lanes)
def store_lanes_as_bytes(builder: Any, address: Any, value: Any) -> None:
    """Write 16 whole numbers below 256."""
    store(builder, address, builder.fptoui(value, ir.VectorType(I8, 16)))


@operation(types.void, types.int64, types.int64, types.float32)
def store_zero_points(builder: Any, address: Any, codes: Any, middle: Any) -> None:
    """Write ``middle + ZERO_STEP * code`` of 16 bytes at an address."""
    values = builder.uitofp(load(builder, codes, ir.VectorType(I8, 16)), Lanes.llvm)
    steps = builder.fmul(values, constant(FLOAT, [ZERO_STEP] * 16))
    store(builder, address, builder.fadd(steps, splat(builder, middle, 16)))


@operation(Lanes, Lanes, Lanes)
def nearest_code(builder: Any, x: Any, top: Any) -> Any:
    """The nearest whole number from 0 to ``top``, halves to even; 0 of NaN."""
    zero = constant(FLOAT, [0.0] * 16)
    x = call(builder, "llvm.rint.v16f32", Lanes.llvm, x)
    x = builder.select(builder.fcmp_ordered(">", x, zero), x, zero)
    return builder.select(builder.fcmp_ordered("<", x, top), x, top)


@operation(Lanes, Lanes, Lanes)
def difference(builder: Any, x: Any, y: Any) -> Any:
    """``x - y``."""
    return builder.fsub(x, y)


@operation(Lanes, Lanes, Lanes, types.float32)
def less_product(builder: Any, total: Any, x: Any, factor: Any) -> Any:
    """``total - x * factor``."""
    factors = splat(builder, builder.fneg(factor), 16)
    return call(builder, "llvm.fma.v16f32", Lanes.llvm, x, factors, total)
