"""Sixteen rows of a packed matrix at a time, one in each lane of a vector.

Vectors have 512 bits: see ``support.has_wide_vnni``. A *step* is four columns, which one
instruction multiplies for all sixteen rows; what a code vector holds are the codes of one step, row
by row. Addresses are int64 and need no alignment.

Imported only where numba is installed.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types

from mcsharp_sdk.kernels.simd import (
    FLOAT,
    HALF,
    I32,
    I64,
    Lanes,
    after,
    call,
    choice_of,
    constant,
    load,
    operation,
    pick,
    planes,
    repeated,
    splat,
    store,
)
from mcsharp_sdk.kernels.support import VECTOR, has_wide_vnni
from mcsharp_sdk.quantization.packing import BLOCK, PARTS

HAS_WIDE_VNNI = has_wide_vnni()

PANEL = 16
"""Rows of a panel."""

STEP = 4
"""Columns of a step."""

CODE_VECTOR = PANEL * STEP
"""Bytes of the codes of a step."""

STEPS_PER_VECTOR = VECTOR // STEP

TOKENS = (2, 4, 6, 8)
"""Tokens whose sums may be in registers together."""

PLACE = 16
"""Bytes of a token's two addresses."""

_INTS = ir.VectorType(I32, PANEL)
_FLOATS = Lanes.llvm


def _addresses(builder: Any, first: Any, size: Any, last: Any) -> list[Any]:
    """Where sixteen rows begin; rows behind the last one repeat it."""
    found = []
    for row in range(PANEL):
        number = ir.Constant(I64, row)
        within = builder.icmp_signed("<=", number, last)
        found.append(builder.add(first, builder.mul(size, builder.select(within, number, last))))
    return found


def _words(builder: Any, rows: list[Any], skip: int, count: int) -> list[Any]:
    """The next 2 or 4 32-bit words of each of sixteen rows, as so many vectors [16]."""
    kind = ir.VectorType(I32, count)
    words = [load(builder, after(builder, row, skip), kind) for row in rows]
    fours = [pick(builder, word, [place % count for place in range(4)]) for word in words]
    return _transposed(builder, fours)[:count]


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors of four lanes, as four of sixteen."""

    def shuffle(x: Any, y: Any, order: list[int]) -> Any:
        return builder.shuffle_vector(x, y, constant(I32, order))

    def side_by_side(first: int) -> Any:
        """Rows first, first + 4, first + 8 and first + 12."""
        a, b, c, d = rows[first::4]
        return shuffle(shuffle(a, b, list(range(8))), shuffle(c, d, list(range(8))), [*range(16)])

    def interleaved(x: Any, y: Any, order: tuple[int, ...]) -> Any:
        """The same lanes of each four; those of y count from 16 on."""
        return shuffle(x, y, [lane + 4 * four for four in range(4) for lane in order])

    r0, r1, r2, r3 = (side_by_side(row) for row in range(4))
    found = []
    for order in ((0, 16, 1, 17), (2, 18, 3, 19)):
        upper, lower = interleaved(r0, r1, order), interleaved(r2, r3, order)
        found.append(interleaved(upper, lower, (0, 1, 16, 17)))
        found.append(interleaved(upper, lower, (2, 3, 18, 19)))
    return found


@operation(types.void, *[types.int64] * 6)
def panel_codes(
    builder: Any, bits: Any, columns: Any, first: Any, size: Any, last: Any, target: Any
) -> None:
    """Codes of a block of 128 or 64 columns of sixteen rows to uint8 [steps, 16 rows, 4 columns].

    Rows of so many bytes follow each other from ``first`` on; those behind number ``last`` repeat
    it.
    """
    behind, choice = choice_of(builder, builder.add(bits, columns))
    for width, length in product(PARTS, (BLOCK, BLOCK // 2)):
        block = builder.append_basic_block(f"{length}_of_{width}_bits")
        choice.add_case(ir.Constant(I64, width + length), block)
        builder.position_at_end(block)
        rows = _addresses(builder, first, size, last)
        _store_codes(builder, width, length, rows, target)
        builder.branch(behind)
    builder.position_at_end(behind)


def _store_codes(builder: Any, bits: int, columns: int, rows: list[Any], target: Any) -> None:
    """Codes of so many columns, from rows at these addresses."""
    begin = 0
    for width, place in planes(bits):
        words = width * columns // 32
        for start in range(0, words, 4):
            found = _words(builder, rows, begin + 4 * start, min(4, words))
            for word, vector in enumerate(found, start):
                for field in range(8 // width):
                    to = after(builder, target, CODE_VECTOR * (words * field + word))
                    codes = _field(builder, vector, width * field, width, place)
                    if place:
                        codes = builder.or_(codes, load(builder, to, _INTS))
                    store(builder, to, codes)
        begin += 4 * words


def _field(builder: Any, words: Any, shift: int, width: int, place: int) -> Any:
    """``((byte >> shift) & (2**width - 1)) << place`` of each byte."""
    if shift > place:
        words = builder.lshr(words, constant(I32, [shift - place] * PANEL))
    elif shift < place:
        words = builder.shl(words, constant(I32, [place - shift] * PANEL))
    mask = (((1 << width) - 1) << place) * 0x01010101
    return builder.and_(words, constant(I32, [mask] * PANEL))


@operation(types.void, *[types.int64] * 4)
def four_scales(builder: Any, first: Any, size: Any, last: Any, target: Any) -> None:
    """Four fp16 numbers of each of sixteen rows to fp32 [4, 16]; rows as in ``panel_codes``."""
    rows = _addresses(builder, first, size, last)
    halves = [load(builder, row, ir.VectorType(HALF, 4)) for row in rows]
    numbers = [builder.fpext(half, ir.VectorType(FLOAT, 4)) for half in halves]
    for place, vector in enumerate(_transposed(builder, numbers)):
        store(builder, after(builder, target, 4 * PANEL * place), vector)


@operation(types.void, *[types.int64] * 11)
def add_products(
    builder: Any,
    tokens: Any,
    halves: Any,
    codes: Any,
    vectors: Any,
    places: Any,
    skip: Any,
    grid_skip: Any,
    apart: Any,
    scales: Any,
    zeros: Any,
    totals: Any,
) -> None:
    """Add the products of a unit of a panel with a few tokens.

    Parameters
    ----------
    tokens : 2, 4, 6 or 8.
    halves : 2 to multiply high and low bytes of activations, 1 for the high ones alone.
    codes : address of uint8 [steps, 16, 4].
    vectors : of 32 columns, in the unit.
    places : address of int64 [tokens, 2]: where the quantised activations of a token are, and its
        first scale.
    skip, grid_skip : bytes from there to those of the unit.
    apart : bytes from a scale to the weight of a zero point.
    scales, zeros : addresses of fp32 [16].
    totals : address of fp32 [tokens, 16].
    """
    number = builder.add(builder.mul(tokens, ir.Constant(I64, 2)), halves)
    behind, choice = choice_of(builder, number)
    for count, parts in product(TOKENS, (1, 2)):
        block = builder.append_basic_block(f"{parts}_halves_of_{count}")
        choice.add_case(ir.Constant(I64, 2 * count + parts), block)
        builder.position_at_end(block)
        rows = [after(builder, places, PLACE * token) for token in range(count)]
        starts = [builder.add(load(builder, row, I64), skip) for row in rows]
        grids = [builder.add(load(builder, after(builder, r, 8), I64), grid_skip) for r in rows]
        sums = _sums(builder, codes, vectors, starts, parts)
        scale, zero = load(builder, scales, _FLOATS), load(builder, zeros, _FLOATS)
        for token, grid in enumerate(grids):
            own = sums[parts * token : parts * (token + 1)]
            to = after(builder, totals, 4 * PANEL * token)
            _add_scaled(builder, own, grid, apart, scale, zero, to)
        builder.branch(behind)
    builder.position_at_end(behind)


def _sums(builder: Any, codes: Any, vectors: Any, starts: list[Any], halves: int) -> list[Any]:
    """Sums of the high bytes, and of the low ones, of each token times codes, int32 [16] each."""

    def add_vector(number: Any, sums: list[Any]) -> list[Any]:
        skip = builder.mul(number, ir.Constant(I64, STEPS_PER_VECTOR * CODE_VECTOR))
        at = builder.add(codes, skip)
        skip = builder.mul(number, ir.Constant(I64, VECTOR))
        tokens, sums = [builder.add(start, skip) for start in starts], list(sums)
        for step in range(STEPS_PER_VECTOR):
            vector = load(builder, after(builder, at, CODE_VECTOR * step), _INTS)
            for place, total in enumerate(sums):
                token, half = divmod(place, halves)
                word = load(builder, after(builder, tokens[token], BLOCK * half + STEP * step), I32)
                operands = total, vector, splat(builder, word, PANEL)
                sums[place] = call(builder, "llvm.x86.avx512.vpdpbusd.512", _INTS, *operands)
        return sums

    nothing = constant(I32, [0] * PANEL)
    return repeated(builder, vectors, [nothing] * (halves * len(starts)), add_vector)


def _add_scaled(
    builder: Any, sums: list[Any], grid: Any, apart: Any, scale: Any, zero: Any, total: Any
) -> None:
    """Add ``scale · (sum · scale of the token - zero point · its weight)`` to the sums at total."""
    whole = builder.shl(sums[0], constant(I32, [8] * PANEL))
    for low in sums[1:]:
        whole = builder.add(whole, low)
    x_scale = splat(builder, load(builder, grid, FLOAT), PANEL)
    weight = splat(builder, load(builder, builder.add(grid, apart), FLOAT), PANEL)
    off = builder.fneg(builder.fmul(zero, weight))
    unit = _fma(builder, builder.sitofp(whole, _FLOATS), x_scale, off)
    store(builder, total, _fma(builder, unit, scale, load(builder, total, _FLOATS)))


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return call(builder, "llvm.fma.v16f32", _FLOATS, x, y, z)
