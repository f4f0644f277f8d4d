"""Packed codes to vectors of bytes; see :mod:`mcsharp_sdk.kernels.simd`.

Imported only where numba is installed.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types

from mcsharp_sdk.kernels.simd import (
    I32,
    I64,
    Bytes,
    after,
    choice_of,
    constant,
    load,
    operation,
    pick,
    planes,
    store,
)
from mcsharp_sdk.kernels.support import VECTOR
from mcsharp_sdk.quantization.packing import BLOCK, PARTS

_WORDS = VECTOR // 4


def codes_of(builder: Any, bits: int, columns: int, block: Any, vector: int) -> Any:
    """Codes of the 32 columns from 32·vector on, of a block of 128 or 64 columns at an address."""
    found = None
    for width, place in planes(bits):
        # One after the other, the fields of so many bytes.
        length, begin = columns * width // 8, columns // 8 * place
        field, byte = divmod(VECTOR * vector, length)
        size = min(length, VECTOR) // 4
        words = load(builder, after(builder, block, begin + byte), ir.VectorType(I32, size))
        words = pick(builder, words, [lane % size for lane in range(_WORDS)])
        shifts = [width * (field + lane // size) for lane in range(_WORDS)]
        mask = ((1 << width) - 1) * 0x01010101
        codes = builder.lshr(words, constant(I32, shifts))
        codes = builder.and_(codes, constant(I32, [mask] * _WORDS))
        if place:
            codes = builder.shl(codes, constant(I32, [place] * _WORDS))
        found = codes if found is None else builder.or_(found, codes)
    return builder.bitcast(found, Bytes.llvm)


@operation(types.void, *[types.int64] * 5)
def unpack_block(
    builder: Any, bits: Any, columns: Any, source: Any, target: Any, stride: Any
) -> None:
    """Codes of a block of 128 or 64 columns, one a byte, 32 of them every ``stride`` bytes."""
    behind, choice = choice_of(builder, builder.add(bits, columns))
    for width, length in product(PARTS, (BLOCK, BLOCK // 2)):
        block = builder.append_basic_block(f"{length}_of_{width}_bits")
        choice.add_case(ir.Constant(I64, width + length), block)
        builder.position_at_end(block)
        for vector in range(length // VECTOR):
            to = builder.add(target, builder.mul(stride, ir.Constant(I64, vector)))
            store(builder, to, codes_of(builder, width, length, source, vector))
        builder.branch(behind)
    builder.position_at_end(behind)
