"""Triton kernel for many tokens: a matrix product per expert over the tokens that chose it.

The slots, one per token and chosen expert, are sorted by expert, and each expert's are cut into
tiles; one launch serves all tiles, whatever the expert's width. Weights are dequantised in
registers, rounded to the activations' type as ``chunked`` does, and go to the tensor cores; sums
are fp32. Any shape and group size is taken.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.kernels.triton_codes import (
    BLOCK,
    gathered_codes,
    matrix_at,
    padded,
    scale_and_zero,
)


@triton.jit
def multiply(x, weight, total, EMULATE: tl.constexpr):
    """``total`` + x · weight of 16-bit tiles."""
    if EMULATE:  # the interpreter would multiply the bit patterns of bfloat16
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    return tl.dot(x, weight, total, input_precision="ieee" if EMULATE else None)


@triton.jit
def full_blocks(
    x, row, matrix, n, ok, has_token, total,
    BITS: tl.constexpr, GROUP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """``total`` [tokens, rows] plus the product over all full blocks of columns."""
    LO: tl.constexpr = 2 if BITS == 3 else BITS
    FIELD: tl.constexpr = 16 * LO
    lane = tl.arange(0, FIELD)[:, None]
    mask, n = ok[None, :], n[None, :]
    for block in range(matrix[4] // BLOCK):
        start = row[None, :] + block * (16 * BITS)
        byte = tl.load(start + lane, mask=mask, other=0).to(tl.int32)
        if BITS == 3:
            top = tl.load(start + 32 + lane % 16, mask=mask, other=0).to(tl.int32)
        if GROUP % 128 == 0:
            scale, zero = scale_and_zero(matrix, n, block * BLOCK // GROUP, mask, GROUP, BITS)
        for t in tl.static_range(8 // LO):
            code = (byte >> (LO * t)) & (2**LO - 1)
            if BITS == 3:
                code |= ((top >> (2 * t + lane // 16)) & 1) << 2
            k = block * BLOCK + t * FIELD + tl.arange(0, FIELD)
            if GROUP % 128 != 0:
                scale, zero = scale_and_zero(matrix, n, (k // GROUP)[:, None], mask, GROUP, BITS)
            weight = (scale * (code.to(tl.float32) - zero)).to(x.dtype.element_ty)
            tokens = tl.load(x[:, None] + k[None, :], mask=has_token[:, None], other=0.0)
            total = multiply(tokens, weight, total, EMULATE)
    return total


@triton.jit
def last_block(
    x, row, matrix, n, ok, has_token, total,
    BITS: tl.constexpr, GROUP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """``total`` plus the product over the columns behind the last full block."""
    columns = matrix[4]
    for start in range(columns // BLOCK * BLOCK, columns, 32):
        k = start + tl.arange(0, 32)
        inside = k < columns
        mask = inside[:, None] & ok[None, :]
        code = gathered_codes(row[None, :], k[:, None], columns, mask, BITS)
        scale, zero = scale_and_zero(matrix, n[None, :], (k // GROUP)[:, None], mask, GROUP, BITS)
        weight = (scale * (code.to(tl.float32) - zero)).to(x.dtype.element_ty)
        mask = has_token[:, None] & inside[None, :]
        tokens = tl.load(x[:, None] + k[None, :], mask=mask, other=0.0)
        total = multiply(tokens, weight, total, EMULATE)
    return total


@triton.jit
def grouped_gemm(
    x, out, order, tiles, table, weights, rows, columns, slots_per_row,
    WIDTHS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, TO_SLOTS: tl.constexpr,
    EMULATE: tl.constexpr, TAIL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One matrix of all experts times the activations of their slots; grid (row tiles, tiles).

    ``order`` [slots] lists the slots by expert. ``tiles`` [n, 3]: expert, first and end position in
    ``order`` of a tile of at most BM; empty tiles name the expert that has no width. ``table`` and
    ``weights`` are as in :func:`~mcsharp_sdk.kernels.triton_decode.grouped_gemv`, and so is GATED.
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
    ok, n = m < last, lane // STEP * last + m
    total = tl.zeros((BM, BN), tl.float32)
    x += source * columns
    for i in tl.static_range(len(WIDTHS)):
        if width == WIDTHS[i]:
            matrix = matrix_at(weights[i], place, rows, columns, GROUP, WIDTHS[i])
            row = matrix[0] + n.to(tl.int64) * (padded(columns) * WIDTHS[i] // 8)
            total = full_blocks(x, row, matrix, n, ok, has_token, total, WIDTHS[i], GROUP, EMULATE)
            if TAIL:
                total = last_block(
                    x, row, matrix, n, ok, has_token, total, WIDTHS[i], GROUP, EMULATE
                )
    if GATED:
        gate, up = tl.split(tl.reshape(total, (BM, 2, STEP)).permute(0, 2, 1))
        total = gate * tl.sigmoid(gate) * up
    at = tl.program_id(0) * STEP + tl.arange(0, STEP)
    keep = has_token[:, None] & (at < last)[None, :]
    tl.store(out + target[:, None] * last + at[None, :], total, mask=keep)
