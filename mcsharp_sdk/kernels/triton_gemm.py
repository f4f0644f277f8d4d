"""Triton kernel for many tokens: a matrix product per expert over the tokens that chose it.

The slots, one per token and chosen expert, are sorted by expert, and each expert's are cut into
tiles; one launch serves all tiles, whatever the expert's width. What goes to the tensor cores are
codes as fp16 numbers where tiles are small, and else weights, dequantised in registers and rounded
to the activations' type as ``chunked`` does; sums are fp32. Any shape and group size is taken.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.kernels.triton_codes import (
    BLOCK,
    code_places,
    codes_at,
    gathered_codes,
    matrix_at,
    padded,
    scale_and_zero,
    zero_point,
)
from mcsharp_sdk.kernels.triton_halves import fields, with_third_bits


@triton.jit
def multiply(weight, x, total, EMULATE: tl.constexpr):
    """``total`` + weight · x of 16-bit tiles."""
    if EMULATE:  # the interpreter would multiply the bit patterns of bfloat16
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    return tl.dot(weight, x, total, input_precision="ieee" if EMULATE else None)


@triton.jit
def and_or(value, mask: tl.constexpr, other, EMULATE: tl.constexpr):
    """(value & mask) | other as one instruction; the compiler would regroup several of these."""
    if EMULATE:
        return (value & mask) | other
    else:  # noqa: RET505 - both branches are compiled unless one is left out here
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [value, tl.full(value.shape, mask, tl.int32), other],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def block_bytes(start, BITS: tl.constexpr):
    """``low`` and ``high`` of :func:`field_weights` of blocks that begin at ``start`` [rows, 1]."""
    LO: tl.constexpr = 2 if BITS == 3 else BITS
    LOW: tl.constexpr = 14 if BITS == 3 else 15
    lane = tl.arange(0, 16 * LO)
    low = tl.load(start + lane[None, :]).to(tl.int32) << LOW
    high = low
    if BITS == 3:
        top = tl.load(start + 32 + (lane % 16)[None, :]).to(tl.int32)
        high = top << (LOW + 2 - lane // 16)[None, :]
    return low, high


@triton.jit
def field_weights(
    low, high, scale, zero, unknown_zero, t: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr
):
    """Weights, fp32 [rows, bytes], of field ``t`` of each byte.

    ``low`` are the bytes, shifted into the mantissa of a float, where under a fitting exponent a
    field makes a power of two + code; ``high`` those of the third bits, two places further. Scale
    and zero point are broadcast. Exponents that the compiler does not know stay in registers.
    """
    LO: tl.constexpr = 2 if BITS == 3 else BITS
    LOW: tl.constexpr = 14 if BITS == 3 else 15
    exponent = ((127 + 23 - LOW - LO * t) << 23) + unknown_zero
    value = (low & ((2**LO - 1) << (LOW + LO * t))) | exponent
    if BITS == 3:
        value = and_or(high, 1 << (LOW + 2 + 2 * t), value, EMULATE)
    shift = -scale * (zero + 2.0 ** (23 - LOW - LO * t))
    scale = tl.broadcast_to(scale, value.shape)
    return tl.fma(value.to(tl.float32, bitcast=True), scale, tl.broadcast_to(shift, value.shape))


@triton.jit
def full_blocks(
    x, row, matrix, n, has_token, total, unknown_zero,
    BITS: tl.constexpr, GROUP: tl.constexpr, EMULATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``total`` [rows, tokens] plus the product over all full blocks of columns."""
    LO: tl.constexpr = 2 if BITS == 3 else BITS
    FIELD: tl.constexpr = 16 * LO
    lane = tl.arange(0, FIELD)
    rows = n[:, None]
    known = rows >= 0
    for block in tl.range(0, matrix[4] // BLOCK, num_stages=STAGES):
        low, high = block_bytes(row[:, None] + block * (16 * BITS), BITS)
        if GROUP % 128 == 0:
            scale, zero = scale_and_zero(matrix, rows, block * BLOCK // GROUP, known, GROUP, BITS)
        for t in tl.static_range(8 // LO):
            k = block * BLOCK + t * FIELD + lane
            if GROUP % 128 != 0:
                g = (k // GROUP)[None, :]
                scale, zero = scale_and_zero(matrix, rows, g, known, GROUP, BITS)
            weight = field_weights(low, high, scale, zero, unknown_zero, t, BITS, EMULATE)
            tokens = tl.load(x[None, :] + k[:, None], mask=has_token[None, :], other=0.0)
            total = multiply(weight.to(x.dtype.element_ty), tokens, total, EMULATE)
    return total


@triton.jit
def blocks_of_codes(
    halves, sums, count, row, matrix, n, has_token, total,
    BITS: tl.constexpr, GROUP: tl.constexpr, EMULATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As :func:`full_blocks` for groups of whole blocks, in units of the activations' factors.

    Codes themselves are multiplied (:mod:`~mcsharp_sdk.kernels.triton_halves`); scale and zero
    point are applied to the sums of a block, which for many tokens costs more than it saves.
    """
    LO: tl.constexpr = 2 if BITS == 3 else BITS
    FIELD: tl.constexpr = 16 * LO
    _, s, z, rows, columns = matrix
    lane = tl.arange(0, FIELD)
    s += n.to(tl.int64) * tl.cdiv(columns, GROUP)
    length = padded(rows) * BITS // 8
    places = code_places(n, rows, BITS)
    known = tl.full(n.shape, True, tl.int1)
    for block in tl.range(0, columns // BLOCK, num_stages=STAGES):
        start = row[:, None] + block * (16 * BITS)
        low = tl.load(start + lane[None, :]).to(tl.int16)
        if BITS == 3:
            top = tl.load(start + 32 + (lane % 16)[None, :]).to(tl.int16)
            top = top << (2 - lane // 16).to(tl.int16)[None, :]
        g = block * BLOCK // GROUP
        zero = zero_point(codes_at(z + g * length, places, known, BITS), BITS)[:, None]
        part = tl.zeros(total.shape, tl.float32)
        for t in tl.static_range(8 // LO):
            code = low if LO == 8 else fields(low, t, LO, EMULATE)
            if BITS == 3:
                code = with_third_bits(code, top, t, EMULATE)
            k = block * BLOCK + t * FIELD + lane
            tokens = tl.load(halves[None, :] + k[:, None], mask=has_token[None, :], other=0.0)
            part = multiply(code.to(tl.float16, bitcast=True), tokens, part, EMULATE)
        scale = tl.load(s + g).to(tl.float32)[:, None]
        ones = tl.load(sums + block * count, mask=has_token, other=0.0)[None, :]
        total += scale * (part - zero * ones)
    return total


@triton.jit
def last_block(
    x, row, matrix, n, has_token, total,
    BITS: tl.constexpr, GROUP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """``total`` plus the product over the columns behind the last full block."""
    columns = matrix[4]
    for start in range(columns // BLOCK * BLOCK, columns, 32):
        k = start + tl.arange(0, 32)
        inside = k < columns
        code = gathered_codes(row[:, None], k[None, :], columns, inside[None, :], BITS)
        g = (k // GROUP)[None, :]
        scale, zero = scale_and_zero(matrix, n[:, None], g, inside[None, :], GROUP, BITS)
        weight = (scale * (code.to(tl.float32) - zero)).to(x.dtype.element_ty)
        mask = has_token[None, :] & inside[:, None]
        tokens = tl.load(x[None, :] + k[:, None], mask=mask, other=0.0)
        total = multiply(weight, tokens, total, EMULATE)
    return total


@triton.jit
def matrix_products(
    activations, count, matrix, n, has_token, total, unknown_zero,
    BITS: tl.constexpr, GROUP: tl.constexpr, EMULATE: tl.constexpr, TAIL: tl.constexpr,
    STAGES: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """``total`` [rows, tokens], zeros, plus the product over all columns."""
    x, halves, factors, sums = activations
    columns = matrix[4]
    # Written so that the compiler sees that full blocks lie at multiples of 16 bytes.
    length = padded(columns) * BITS // 8 if TAIL else columns // 128 * (16 * BITS)
    row = matrix[0] + n.to(tl.int64) * length
    if CODES:
        total = blocks_of_codes(
            halves, sums, count, row, matrix, n, has_token, total, BITS, GROUP, EMULATE, STAGES
        )
        total *= tl.load(factors, mask=has_token, other=0.0)[None, :]
    else:
        total = full_blocks(
            x, row, matrix, n, has_token, total, unknown_zero, BITS, GROUP, EMULATE, STAGES
        )
    if TAIL:
        total = last_block(x, row, matrix, n, has_token, total, BITS, GROUP, EMULATE)
    return total


@triton.jit
def grouped_gemm(
    x, halves, factors, sums, count, unknown_zero, out, order, tiles, table, weights, rows, columns,
    slots_per_row,
    WIDTHS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, TO_SLOTS: tl.constexpr,
    EMULATE: tl.constexpr, TAIL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """One matrix of all experts times the activations of their slots; grid (row tiles, tiles).

    ``order`` [slots] lists the slots by expert. ``tiles`` [n, 3]: expert, first and end position in
    ``order`` of a tile of at most BM; empty tiles name the expert that has no width. ``table`` and
    ``weights`` are as in :func:`~mcsharp_sdk.kernels.triton_decode.grouped_gemv`, and so is GATED;
    ``unknown_zero`` is 0. With CODES, for groups of whole blocks, ``halves``, ``factors`` and
    ``sums`` of :func:`~mcsharp_sdk.kernels.triton_halves.prepare_rows` stand for the ``count`` rows
    of x, and x itself for columns behind full blocks alone.

    With TO_SLOTS x has a row per position and ``out`` one per slot. Without it is the other way
    round, and slot i has row i // slots_per_row of x.
    """
    tile = tiles + 3 * tl.program_id(1)
    expert, end = tl.load(tile), tl.load(tile + 2)
    width, place = tl.load(table + 2 * expert), tl.load(table + 2 * expert + 1)
    position = tl.load(tile + 1) + tl.arange(0, BM)
    has_token = position < end
    slot = tl.load(order + position, mask=has_token, other=0).to(tl.int64)
    source, target = slot // slots_per_row, position.to(tl.int64)
    if TO_SLOTS:
        source, target = target, slot
    STEP: tl.constexpr = BN // 2 if GATED else BN
    last = rows // 2 if GATED else rows
    lane = tl.arange(0, BN)
    m = tl.program_id(0) * STEP + lane % STEP
    n = lane // STEP * last + tl.minimum(m, last - 1)
    total = tl.zeros((BN, BM), tl.float32)
    x += source * columns
    halves += source * columns
    factors += source
    sums += source
    for i in tl.static_range(len(WIDTHS)):
        if width == WIDTHS[i]:
            matrix = matrix_at(weights[i], place, rows, columns, GROUP, WIDTHS[i])
            total = matrix_products(
                (x, halves, factors, sums), count, matrix, n, has_token, total, unknown_zero,
                WIDTHS[i], GROUP, EMULATE, TAIL, STAGES, CODES,
            )  # fmt: skip
    if GATED:
        gate, up = tl.split(tl.reshape(total, (2, STEP, BM)).permute(1, 2, 0))
        total = gate * tl.sigmoid(gate) * up
    at = tl.program_id(0) * STEP + tl.arange(0, STEP)
    keep = has_token[None, :] & (at < last)[:, None]
    tl.store(out + target[None, :] * last + at[:, None], total, mask=keep)
